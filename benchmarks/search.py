"""Picture search on 10,000 pictures: indexing, kills, times of a query, and what storing rows smaller costs.

The pictures are small JPEGs, made here: 8,000 of shapes and 2,000 crops of the photographs for testing.

* ``index``: the folder is indexed at once; rows are compared with ``embed_images``. Beside it, an update in
  which nothing changed.
* ``kills``: the folder is indexed by processes that end with SIGKILL at random moments, 20 times: first while
  it is indexed for the first time, then while pictures come, change, move and go, the last five while the
  index is written. After each kill the index must open, be sound, and be the one before or the one of
  everything that is there. In the end each embedding must have the bytes of an index made at once.
* ``query``, warm: an open index, by words whose embedding is cached, by words that are new (the text tower is
  open), by an embedding and by a picture file: ``--bar-ms`` is for the median of each. Beside them the words
  with most kinds, which cost most. Cold: the command in a fresh process, from start to end.
* ``exact``: the answers against a matrix product of float32, and of 16 threads at once.
* ``rows``: what float16 and int8 rows change in the ten best, and what they cost to search.
* ``made_up``: indexes of 10,000 and 200,000 made-up rows of 512 numbers: opening, the first query (which
  reads and checks all rows), further ones, and memory that is not the mapped file.
* ``bars``: what was asked for, what was reached, and whether that passes; exit code 1 where one does not.

    edgeclip data fetch photos
    python benchmarks/search.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from written import ROOT, arguments, model, write

from edgeclip.bundle import Bundle
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import EdgeClipError
from edgeclip.fetch import photos
from edgeclip.heads import cosines
from edgeclip.index import IndexReport, made_with, update_index
from edgeclip.index_file import BLOCK_ROWS, Entry, MadeWith, PictureIndex, Stat, write_index
from edgeclip.reject import read_reject_head
from edgeclip.runtime.latency import LatencySamples, measure
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.search import Searcher, nearest
from edgeclip.shapes import ordered_combinations, render

PICTURES, CROPS = 10_000, 2_000
KILLS, FIRST_KILLS, WRITING_KILLS = 20, 10, 5
_SHAPE_PX, _CROP_PX, _QUALITY = 96, 224, 85
_QUERIES, _TOP, _PROCESSES, _THREADS, _CHECKED = 200, 10, 21, 16, 500
_CHANGED = 0.06  # share of the pictures between kills, once the folder is indexed
_MADE_UP, _MADE_UP_DIM = (10_000, 200_000), 512
_BARRED = ("words, cached", "words, new", "embedding", "picture file")
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
OPTIONS = RuntimeOptions(threads=1)


# --- pictures ----------------------------------------------------------------------------------------------


def make_pictures(folder: Path, number: int) -> None:
    """Write small JPEGs: a fifth crops of photographs, the others shapes."""
    crops = number * CROPS // PICTURES
    for place, combination in enumerate(islice(ordered_combinations(False, 0), number - crops)):
        _save(
            Image.fromarray(render(combination, seed=place, size_px=_SHAPE_PX)),
            folder / f"shapes/{place // 1000}",
            place,
        )
    source = photos(use="test")
    draw = random.Random(0)
    for place in range(crops):
        with Image.open(source[place % len(source)].path) as photo:
            photo.draft("RGB", (1024, 1024))
            side = draw.randint(min(photo.size) // 4, min(photo.size) - 1)
            left, top = draw.randint(0, photo.width - side), draw.randint(0, photo.height - side)
            part = photo.convert("RGB").crop((left, top, left + side, top + side))
        _save(part.resize((_CROP_PX, _CROP_PX), Image.Resampling.BILINEAR), folder / "crops", place)


def _save(picture: Image.Image, folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{number:05}.jpg", "JPEG", quality=_QUALITY)


def disturb(folder: Path, draw: random.Random, changed: int) -> None:
    """Let pictures come, change, move and go."""
    pictures = sorted(folder.rglob("*.jpg"))
    for number, path in enumerate(draw.sample(pictures, min(changed, len(pictures)))):
        if number % 6 == 0:
            path.unlink()
        elif number % 6 == 1:
            path.rename(path.with_name(f"{path.stem}-moved.jpg"))
        else:  # brighter or darker: another content
            with Image.open(path) as picture:
                level = draw.uniform(0.6, 1.4)
                shaded = picture.convert("RGB").point(
                    [min(255, int(each * level)) for each in range(256)] * 3
                )
            out = BytesIO()
            shaded.save(out, "JPEG", quality=_QUALITY)
            target = path if number % 6 < 4 else path.with_name(f"{path.stem}-{draw.randrange(10**6)}.jpg")
            target.write_bytes(out.getvalue())


# --- indexing and kills ------------------------------------------------------------------------------------


def index(folder: Path, path: Path, bundle: str, variant: str) -> IndexReport:
    """Bring an index up to date, as the command does."""
    with ZeroShotClassifier.open(bundle, variant=variant, options=OPTIONS) as classifier:
        made = made_with(classifier.bundle, classifier.choice.variant)
        return update_index(folder, classifier, made, path=path)


def in_child(work: Callable[[], object]) -> int:
    """Run something in a fork and return its process; it ends with code 0 where nothing was raised."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def told_by_child(work: Callable[[], dict[str, Any]], directory: Path) -> dict[str, Any]:
    """Return what something returns in a fork."""
    said = directory / "said.json"
    child = in_child(lambda: said.write_text(json.dumps(work()), encoding="utf-8"))
    assert os.waitpid(child, 0)[1] == 0
    told: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
    return told


def counted(report: IndexReport) -> dict[str, int]:
    """Return what an update counted."""
    names = ("pictures", "embedded", "resumed", "recognised", "removed", "unchanged")
    return {name: getattr(report, name) for name in names}


def state(path: Path) -> dict[str, str]:
    """Return a digest of each embedding by path, of an index that must be sound; ``{}`` for none."""
    if not path.exists():
        return {}
    opened = PictureIndex(path)
    opened.check()
    rows = zip(opened.paths, opened.embeddings, strict=True)
    return {name: hashlib.sha256(row.tobytes()).hexdigest() for name, row in rows}


def written(path: Path) -> int | None:
    """Return when a file was last written to, ``None`` where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def kills(folder: Path, work: Path, bundle: str, variant: str, whole_s: float) -> dict[str, Any]:
    """Kill runs at random moments; see the head of this file."""
    draw = random.Random(0)
    path, journal, new = (work / f"killed{end}" for end in ("", ".journal", ".new"))
    told: list[dict[str, Any]] = []
    before: dict[str, str] = {}
    changed = round(_CHANGED * sum(1 for _ in folder.rglob("*.jpg")))
    update_s = _CHANGED * whole_s + 1.0
    while (done := sum(each["killed"] for each in told)) < KILLS:
        if before:  # it is indexed: something has to happen
            disturb(folder, draw, changed)
        longest_s = update_s if before else 1.6 * whole_s / FIRST_KILLS
        left = written(new)  # what an earlier kill left
        child = in_child(lambda: index(folder, path, bundle, variant))
        writing = done >= KILLS - WRITING_KILLS
        after_s = draw.uniform(0, 0.03) if writing else draw.uniform(0.3, longest_s)
        if writing:
            while written(new) == left and os.waitid(os.P_PID, child, _ENDED) is None:
                time.sleep(0.001)
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0, status
        there = {each.relative_to(folder).as_posix() for each in folder.rglob("*.jpg")}
        wrong = ""
        try:
            found = state(path)
            if found != before and set(found) != there:
                wrong = "neither the old index nor the new one"
        except EdgeClipError as error:
            found, wrong = {}, str(error).replace(str(work), "")
        told.append(
            {
                "killed": killed,
                "after_s": round(after_s, 3),
                "while_the_index_is_written": written(new) not in (None, left),
                "journal_bytes": journal.stat().st_size if journal.exists() else 0,
                "index": wrong or ("none" if not found else "as it was" if found == before else "new"),
                "wrong": bool(wrong),
            }
        )
        before = found
    reports = [
        told_by_child(lambda target=target: counted(index(folder, target, bundle, variant)), work)
        for target in (path, work / "at-once")
    ]
    last, at_once = state(path), state(work / "at-once")
    return {
        "kills": sum(each["killed"] for each in told),
        "finished_before_the_kill": sum(not each["killed"] for each in told),
        "damaged": sum(each["wrong"] for each in told),
        "last_run": reports[0],
        "at_once": reports[1],
        "pictures": len(last),
        "equal_to_one_made_at_once": last == at_once,
        "left_over": sorted(each.name for each in work.glob("killed?*")),
        "runs": told,
    }


# --- queries -----------------------------------------------------------------------------------------------


def said(taken: LatencySamples) -> dict[str, Any]:
    """Return samples with their percentiles."""
    found = {f"p{each.p:g}": each for each in taken.percentiles((50, 90))}
    return {
        "n": len(taken),
        **{
            f"{name}_ms": [round(each.ms, 3), round(each.low_ms, 3), round(each.high_ms, 3)]
            for name, each in found.items()
        },
        "samples_ms": taken.samples_ms.round(3).tolist(),
    }


def warm(searcher: Searcher, classifier: ZeroShotClassifier, picture: Path) -> dict[str, Any]:
    """Time queries of an open index."""
    number = count()
    searcher.by_text(searcher.encode("a red circle"))
    kinds = read_reject_head(searcher.bundle).kinds if searcher.bundle.manifest.background_bank else {}
    widest = max(kinds, key=lambda name: len(kinds[name]), default="thing")
    embedding = classifier.embed_images(picture)
    calls: dict[str, Callable[[], object]] = {
        "words, cached": lambda: searcher.by_text(searcher.encode("a red circle")),
        "words, new": lambda: searcher.by_text(searcher.encode(f"a red circle {next(number)}")),
        f"words, most kinds: {widest}": lambda: searcher.by_text(searcher.encode(widest)),
        "embedding": lambda: searcher.by_embedding(embedding),
        "picture file": lambda: searcher.by_embedding(classifier.embed_images(picture), leave_out=picture),
        "cosines alone": lambda: nearest(searcher.index, embedding),
    }
    return {name: said(measure(call, min_samples=200, max_duration_s=10)) for name, call in calls.items()}


def cold(path: Path, bundle: str, picture: Path, work: Path) -> dict[str, Any]:
    """Time the command from the start of its process to its end."""
    program = "from edgeclip.cli.search import search; search()"
    number = count()
    elsewhere = work / "elsewhere.jpg"
    elsewhere.write_bytes(picture.read_bytes())

    def run(query: str) -> None:
        command = [sys.executable, "-c", program, query, str(path), "--bundle", bundle, "--paths"]
        environment = {**os.environ, "EDGECLIP_CACHE_DIR": str(work / "cache")}
        subprocess.run(command, check=True, capture_output=True, env=environment)

    calls: dict[str, Callable[[], object]] = {
        "words, cached": lambda: run("a red circle"),
        "words, new": lambda: run(f"a red circle {next(number)}"),
        "picture of the index": lambda: run(str(picture)),
        "picture file": lambda: run(str(elsewhere)),
    }
    taken = {
        name: measure(call, warmup=1, min_samples=_PROCESSES, min_duration_s=0, max_duration_s=600)
        for name, call in calls.items()
    }
    return {name: said(each) for name, each in taken.items()}


def exact(searcher: Searcher, classifier: ZeroShotClassifier, folder: Path) -> dict[str, Any]:
    """Compare rows with ``embed_images``, answers with a matrix product, and threads with each other."""
    index = searcher.index
    chosen = random.Random(1).sample(range(len(index)), min(_CHECKED, len(index)))
    own = np.stack([classifier.embed_images(folder / index.paths[row]) for row in chosen])
    queries = _queries(index)
    matrix = np.array(index.embeddings)
    product = queries @ matrix.T
    similarity = np.stack([nearest(index, each) for each in queries])
    same = 0
    for query, row in zip(queries, product, strict=True):
        found = [each.path for each in searcher.by_embedding(query, top_k=_TOP).matches]
        best = np.argsort(-row, kind="stable")[:_TOP]
        names = [index.paths[each] for each in best]
        # Sums in another order: pictures that differ by less than a rounding may change places.
        ties = np.diff(np.sort(row)[::-1][: _TOP + 1]) > -1e-6
        same += found == names or bool(ties.any())
    answers: list[list[Any]] = []

    def ask() -> None:
        words = [searcher.encode(name) for name in ("red circle", "cat", "blue star", "a castle")]
        answers.append([searcher.by_text(each) for each in words])

    threads = [threading.Thread(target=ask) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "rows_checked": len(chosen),
        "rows_with_the_bytes_of_embed_images": int((own == matrix[chosen]).all(axis=1).sum()),
        "queries": len(queries),
        "top_10_as_a_matrix_product": same,
        "max_abs_difference_of_cosines": float(np.abs(similarity - product).max()),
        "threads": _THREADS,
        "threads_with_the_same_answers": sum(each == answers[0] for each in answers),
    }


def _queries(index: PictureIndex) -> NDArray[np.float32]:
    """Return embeddings of pictures, slightly turned away so that none finds itself exactly."""
    random_numbers = np.random.default_rng(0)
    rows = np.array(index.embeddings[random_numbers.choice(len(index), min(_QUERIES, len(index)), False)])
    rows += random_numbers.normal(0, 0.3 / rows.shape[1] ** 0.5, rows.shape).astype(np.float32)
    turned: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return turned


def rows(index: PictureIndex) -> dict[str, Any]:
    """Compare forms to store rows in: size, ten best, and time of all cosines."""
    full = np.array(index.embeddings)
    peak = np.abs(full).max(axis=1, keepdims=True)
    forms: dict[str, tuple[NDArray[Any], NDArray[np.float32] | None]] = {
        "float32": (full, None),
        "float16": (full.astype(np.float16), None),
        "int8, a scale a row": (np.rint(full / peak * 127).astype(np.int8), (peak / 127)[:, 0]),
    }
    queries = _queries(index)
    reference = [set(np.argsort(-(full @ each), kind="stable")[:_TOP].tolist()) for each in queries]
    told: dict[str, Any] = {}
    for name, (stored, scale) in forms.items():

        def similarity(query: NDArray[np.float32], stored: Any = stored, scale: Any = scale) -> Any:
            blocks = (stored[at : at + BLOCK_ROWS] for at in range(0, len(stored), BLOCK_ROWS))
            parts = [cosines(query[None], block.astype(np.float32, copy=False))[0] for block in blocks]
            found = np.concatenate(parts)
            return found if scale is None else found * scale

        best = [set(np.argsort(-similarity(each), kind="stable")[:_TOP].tolist()) for each in queries]
        overlap = [len(a & b) / _TOP for a, b in zip(best, reference, strict=True)]
        told[name] = {
            "bytes_a_picture": stored.nbytes // len(stored) + (0 if scale is None else 4),
            "top_10_overlap_mean": round(float(np.mean(overlap)), 4),
            "top_10_overlap_least": min(overlap),
            "top_10_the_same": sum(each == 1 for each in overlap),
            "time": said(measure(lambda: similarity(queries[0]), min_samples=100, max_duration_s=10)),
        }
    return told


def made_up(number: int, path: Path) -> dict[str, Any]:
    """Write an index of random rows, and query it."""
    draw = np.random.default_rng(0)
    embeddings = draw.standard_normal((number, _MADE_UP_DIM), np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    rows = {f"{row:06}": Entry(Stat(row, 0, 0), b"", each) for row, each in enumerate(embeddings)}
    write_index(path, ".", MadeWith("", "", "", "", _MADE_UP_DIM), rows)
    query = np.array(embeddings[number // 2])
    del embeddings, rows
    before_mb = _own_mb()
    began = time.perf_counter()
    opened = PictureIndex(path)
    opened_s = time.perf_counter()
    assert int(nearest(opened, query).argmax()) == number // 2
    first_s = time.perf_counter()
    return {
        "bytes": path.stat().st_size,
        "open_ms": round((opened_s - began) * 1e3, 3),
        "first_query_ms": round((first_s - opened_s) * 1e3, 3),
        "query": said(measure(lambda: nearest(opened, query), min_samples=100, max_duration_s=20)),
        "memory_beside_the_file_mb": round(_own_mb() - before_mb, 1),
    }


def _own_mb() -> float:
    """Return the memory of this process that is no file."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def bars(document: dict[str, Any], pictures: int, bar_ms: float) -> dict[str, dict[str, Any]]:
    """Return what was asked for, what was reached, and whether that passes."""
    killed, exactly = document["kills"], document["exact"]
    told = {
        f"{pictures:,} pictures indexed": (document["pictures"]["count"], pictures, 1),
        f"{KILLS} kills": (killed["kills"], KILLS, 1),
        "indexes damaged by a kill": (killed["damaged"], 0, -1),
        "after the last kill, the bytes of an index made at once": (
            int(killed["equal_to_one_made_at_once"]),
            1,
            1,
        ),
        "ten best as a matrix product has them, queries": (
            exactly["top_10_as_a_matrix_product"],
            exactly["queries"],
            1,
        ),
        "same answers from threads": (exactly["threads_with_the_same_answers"], exactly["threads"], 1),
    }
    for name, each in document["query"]["warm"].items():
        if name in _BARRED:
            told[f"query, {name}: median at most {bar_ms:g} ms"] = (each["p50_ms"], bar_ms, -1)
    return {
        name: {"reached": reached, "passed": sign * _first(reached) >= sign * limit}
        for name, (reached, limit, sign) in told.items()
    }


def _first(reached: Any) -> float:
    """Return a value, or the one that stands before its interval."""
    return float(reached[0] if isinstance(reached, list) else reached)


def main() -> int:
    """Measure, write everything, and say whether the bars were met."""
    parser = arguments("Index 10,000 pictures, kill the indexing, and time queries.", "search.json")
    parser.add_argument("--bar-ms", type=float, default=20.0)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        folder, path = work / "pictures", work / "index"
        drawn = ROOT / "build" / f"search-pictures-{chosen.pictures}"  # once, then kept
        if not (drawn / "done").exists():
            make_pictures(drawn / "pictures", chosen.pictures)
            (drawn / "done").touch()
        subprocess.run(["cp", "-r", str(drawn / "pictures"), str(folder)], check=True)
        os.environ["EDGECLIP_CACHE_DIR"] = str(work / "cache")  # what this run caches is of use to nobody
        size = sum(each.stat().st_size for each in folder.rglob("*.jpg"))
        print("indexing …", file=sys.stderr)
        # In a child, as kills are: a process with open engines must not fork.
        began = time.perf_counter()
        first = in_child(lambda: index(folder, path, chosen.bundle, chosen.variant))
        assert os.waitpid(first, 0)[1] == 0
        whole_s = time.perf_counter() - began
        began = time.perf_counter()
        assert os.waitpid(in_child(lambda: index(folder, path, chosen.bundle, chosen.variant)), 0)[1] == 0
        unchanged_s = time.perf_counter() - began
        print("kills …", file=sys.stderr)
        moved = work / "for-kills"
        subprocess.run(["cp", "-r", str(folder), str(moved)], check=True)
        killed = kills(moved, work, chosen.bundle, chosen.variant, whole_s)
        rows_made_up = {
            f"{number:,}": told_by_child(lambda number=number: made_up(number, work / "made-up"), work)
            for number in _MADE_UP
        }
        print("queries …", file=sys.stderr)
        opened = PictureIndex(path)
        picture = folder / opened.paths[0]
        bundle = Bundle.open(chosen.bundle)
        with (
            ZeroShotClassifier.open(bundle, variant=chosen.variant, options=OPTIONS) as classifier,
            Searcher(
                opened, bundle, variant=chosen.variant, options=OPTIONS, keep_text_tower=True
            ) as searcher,
        ):
            document = {
                "what": "picture search: indexing, kills, queries; times in ms with 95 % intervals",
                **model(classifier),
                "gate": bundle.manifest.background_bank is not None,
                "pictures": {"count": len(opened), "bytes": size},
                "index": {
                    "bytes": path.stat().st_size,
                    "seconds": round(whole_s, 2),
                    "pictures_a_second": round(len(opened) / whole_s, 1),
                    "unchanged_seconds": round(unchanged_s, 2),
                },
                "kills": killed,
                "query": {
                    "warm": warm(searcher, classifier, picture),
                    "cold": cold(path, chosen.bundle, picture, work),
                },
                "made_up": rows_made_up,
                "exact": exact(searcher, classifier, folder),
                "rows": rows(opened),
            }
        timed = document["query"]["warm"]
        document["bars"] = bars(document, chosen.pictures, chosen.bar_ms)
        write(chosen.output, document, show=False)
    for name, each in {**timed, **{f"cold: {k}": v for k, v in document["query"]["cold"].items()}}.items():
        print(f"{name:40} {each['p50_ms'][0]:8.2f} ms")
    print(document["index"], {k: v for k, v in killed.items() if k != "runs"}, document["exact"])
    print({name: {k: v for k, v in each.items() if k != "time"} for name, each in document["rows"].items()})
    for name, each in document["bars"].items():
        print(f"{'passed' if each['passed'] else 'FAILED'}: {name}: {each['reached']}")
    return 0 if all(each["passed"] for each in document["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
