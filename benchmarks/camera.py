"""A camera with damage in its stream, and labels that change: what ``edgeclip classify -`` makes of it.

One process plays the camera: 30 JPEG frames a second of 640 × 480, made of the demonstration photographs and
written into a pipe in real time; between them multipart headers, random bytes, and frames that break off.
Another runs ``edgeclip classify - --jsonl`` with a label file, which is replaced or written over again and
again; its cache is empty at the start, so new labels are encoded beside the stream. Written down are:

* ``rss_kb``: resident memory, once a second; ``growth_mb`` from minute 1 to the end (means of ten samples),
  ``most_growth_mb`` to the largest sample in between.
* ``age_ms``: what the lines say: from a frame's last byte in memory to its line. ``end_to_end_ms``: from the
  return of the camera's last write of the frame to the arrival of its line here. The bar is two frame times
  and one inference, which is timed before, frame after frame, alone.
* frames and garbage as sent and as counted, the time between two decisions, label sets that answered.

Intervals of percentiles resample blocks of 300 neighbours, as ages of neighbours are alike.

    nice python benchmarks/camera.py            # ten minutes; writes its part of docs/streams.md, too
    python benchmarks/camera.py --seconds 12 --changes 3 --output FILE.json
    python benchmarks/camera.py --docs          # only writes that part, from what was measured last
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from written import ROOT, arguments, model, write

from edgeclip.classify import ZeroShotClassifier

FRAMES_A_SECOND = 30
MAX_GROWTH_MB = 2.0
SIZE_PX = (640, 480)
COMMAND = ["-m", "edgeclip", "classify", "-"]
DOCS = ROOT / "docs" / "streams.md"
MARKS = ("<!-- written by benchmarks/camera.py -->\n", "<!-- until here -->\n")
_CUT_EVERY = 90
_FIRST_CHANGE_S = 3.0
_BLOCK, _DRAWS = 300, 1000
_MB = 1024 / 1e6  # of what /proc calls kB
_CHANGE_S = 2.0  # new labels are in force by then


def frames() -> list[bytes]:
    """Return JPEG files: each demonstration photograph in four crops."""
    found = []
    for path in sorted((ROOT / "edgeclip" / "assets" / "photos").glob("*.jpg")):
        picture = Image.open(path).convert("RGB")
        for step in range(4):
            left, top = (side * step // 20 for side in picture.size)
            crop = picture.crop((left, top, left + picture.width * 4 // 5, top + picture.height * 4 // 5))
            stream = io.BytesIO()
            crop.resize(SIZE_PX).save(stream, "JPEG", quality=85)
            found.append(stream.getvalue())
    return found


def garbage(rng: random.Random) -> bytes:
    """Return what may stand between two frames, and begins none."""
    kind = rng.randrange(4)
    if kind == 0:
        return b""
    if kind == 1:
        return b"\r\n--frame\r\nContent-Type: image/jpeg\r\nX-Timestamp: %d\r\n\r\n" % rng.randrange(10**9)
    if kind == 2:
        return bytes(rng.randrange(1, 64))
    drawn = rng.randbytes(rng.randrange(1, 4000))
    return drawn.replace(b"\xff\xd8", b"\xff\x00") + b"."


def camera(seconds: float, log: Path) -> None:
    """Write frames to standard output in real time, and what was sent to ``log``."""
    rng, pictures = random.Random(0), frames()
    sent_ns: list[int] = []
    other_bytes = cut = late = 0
    began = time.perf_counter()
    for number in range(round(seconds * FRAMES_A_SECOND)):
        wait_s = began + number / FRAMES_A_SECOND - time.perf_counter()
        late += wait_s < -1 / FRAMES_A_SECOND
        if wait_s > 0:
            time.sleep(wait_s)
        picture = pictures[number // 8 % len(pictures)]
        before = garbage(rng)
        if number % _CUT_EVERY == _CUT_EVERY // 2:
            before += picture[: rng.randrange(1000, len(picture) - 2)]
            cut += 1
        other_bytes += len(before)
        try:
            rest = memoryview(before + picture)
            while rest:
                rest = rest[os.write(1, rest) :]
        except BrokenPipeError:  # whoever watches says why
            break
        sent_ns.append(time.perf_counter_ns())
    sent = {"sent_ns": sent_ns, "other_bytes": other_bytes, "cut": cut, "late": late}
    log.write_text(json.dumps(sent), encoding="utf-8")


def inference_ms(classifier: ZeroShotClassifier, pictures: list[bytes]) -> list[float]:
    """Return the time from bytes to answer of each frame, after one round of warming up."""
    samples = []
    for picture in [*pictures, *pictures]:
        began = time.perf_counter_ns()
        classifier.answer(classifier.embed_images(picture, exact=False)[None])
        samples.append((time.perf_counter_ns() - began) / 1e6)
    return samples[len(pictures) :]


class Watched:
    """What is seen of the process from outside while it runs."""

    def __init__(self, process: subprocess.Popen[bytes], labels: Path, every_s: float, changes: int) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []  # when, what
        self.remarks: list[str] = []
        self.rss_kb: list[int] = []
        self.changed_ns: list[int] = []
        self._process = process
        self._labels = labels
        self._every_s, self._changes = every_s, changes
        self._ended = threading.Event()

    def watch(self) -> None:
        """Read its output until it ends."""
        others = [threading.Thread(target=each) for each in (self._remarks, self._memory, self._relabel)]
        for other in others:
            other.start()
        try:
            for line in self._process.stdout:  # type: ignore[union-attr]
                self.lines.append((time.perf_counter_ns(), json.loads(line)))
            self._process.wait()
        finally:
            self._ended.set()
            for other in others:
                other.join()

    def _remarks(self) -> None:
        self.remarks += [line.decode().strip() for line in self._process.stderr]  # type: ignore[union-attr]

    def _memory(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        while not self._ended.wait(1.0):
            try:
                said = status.read_text(encoding="ascii")
            except OSError:
                return
            rss = [line.split()[1] for line in said.splitlines() if line.startswith("VmRSS")]
            self.rss_kb += [int(each) for each in rss] if self.lines else []

    def _relabel(self) -> None:
        while not self.lines:
            if self._ended.wait(0.05):
                return
        self._ended.wait(_FIRST_CHANGE_S)
        for number in range(self._changes):
            if number and self._ended.wait(self._every_s):
                return
            write_labels(self._labels, number + 1, whole=number % 2 == 0)
            self.changed_ns.append(time.perf_counter_ns())


def write_labels(path: Path, number: int, *, whole: bool) -> None:
    """Write label set ``number``: ten old names and ten new ones; over the old file or in its place."""
    names = ["castle", "cat", "coffee", "dog", "koala", "panda", "parrot", "sheep", "car", "teapot"]
    text = "\n".join([*names, *(f"thing {number} {each}" for each in range(10))]) + "\n"
    if not whole:
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def quantiles(samples: Sequence[float]) -> dict[str, Any]:
    """Return percentiles of samples, with intervals of 95 % for two of them."""
    values = np.array(samples)
    found: dict[str, Any] = {
        name: round(float(np.quantile(values, share)), 3)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("longest", 1.0))
    }
    blocks = np.array_split(values, min(len(values), max(20, len(values) // _BLOCK)))
    rng = np.random.default_rng(0)
    drawn = [
        np.quantile(np.concatenate([blocks[each] for each in draw]), (0.5, 0.99))
        for draw in rng.integers(0, len(blocks), (_DRAWS, len(blocks)))
    ]
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0).round(3).tolist()
    for place, name in enumerate(("p50", "p99")):
        found[f"{name}_interval"] = [low[place], high[place]]
    return found


def judged(watched: Watched, sent: dict[str, Any], each_ms: list[float], code: int) -> dict[str, Any]:
    """Return the figures, raw samples and verdicts."""
    arrived_ns = np.array([at_ns for at_ns, _ in watched.lines])
    lines = [line for _, line in watched.lines]
    last = lines[-1]
    ages = [line["age_ms"] for line in lines]
    end_to_end = [(at - sent["sent_ns"][line["frame"] - 1]) / 1e6 for at, line in watched.lines]
    dropped = np.diff([0, *(line["dropped"] for line in lines)])
    changing = np.zeros(len(lines), bool)
    for changed_ns in watched.changed_ns:
        changing |= (arrived_ns >= changed_ns) & (arrived_ns <= changed_ns + _CHANGE_S * 1e9)
    bar_ms = 2e3 / FRAMES_A_SECOND + float(np.median(each_ms))
    rss_kb = watched.rss_kb
    start = 60 if len(rss_kb) > 120 else len(rss_kb) // 4
    early_kb = float(np.mean(rss_kb[start : start + 10]))
    growth_mb = float(np.mean(rss_kb[-10:]) - early_kb) * _MB
    tail = next((said for said in reversed(watched.remarks) if " decided, " in said), "")
    versions = sorted({line["labels_version"] for line in lines})
    checks = {
        "exit code 0": code == 0,
        f"memory grew by less than {MAX_GROWTH_MB} MB": growth_mb < MAX_GROWTH_MB,
        "99 of 100 ages within two frame times and an inference": np.quantile(ages, 0.99) <= bar_ms,
        "every frame sent was found": last["frame"] == len(sent["sent_ns"]),
        "every frame found was decided or dropped": last["frame"] == len(lines) + last["dropped"],
        "garbage was counted exactly": last["skipped_bytes"] == sent["other_bytes"],
        "every set of labels answered": versions == list(range(1, len(watched.changed_ns) + 2)),
    }
    return {
        "checks": {name: bool(passed) for name, passed in checks.items()},
        "frames": {
            "sent": len(sent["sent_ns"]),
            "found": last["frame"],
            "decided": len(lines),
            "dropped": last["dropped"],
            "dropped_while_labels_changed": int(dropped[changing].sum()),
            "camera_late": sent["late"],
        },
        "garbage_bytes": {"sent": sent["other_bytes"], "skipped": last["skipped_bytes"]},
        "frames_cut_off_sent": sent["cut"],
        "summary": tail.partition(": ")[2],
        "label_changes": len(watched.changed_ns),
        "label_sets_that_answered": len(versions),
        "answering_after_change_ms": _answering(watched),
        "growth_mb": round(growth_mb, 3),
        "most_growth_mb": round((max(rss_kb[start:]) - early_kb) * _MB, 3),
        "bar_ms": round(bar_ms, 3),
        "ages_within_bar_share": round(float(np.mean(np.array(ages) <= bar_ms)), 5),
        "inference_ms": quantiles(each_ms),
        "age_ms": quantiles(ages),
        "end_to_end_ms": quantiles(end_to_end),
        "gap_between_decisions_ms": quantiles((np.diff(arrived_ns) / 1e6).tolist()),
        "samples": {
            "rss_kb": rss_kb,
            "inference_ms": [round(each, 3) for each in each_ms],
            "frame": [line["frame"] for line in lines],
            "arrived_ms": ((arrived_ns - arrived_ns[0]) / 1e6).round(2).tolist(),
            "changed_ms": ((np.array(watched.changed_ns) - arrived_ns[0]) / 1e6).round(2).tolist(),
            "age_ms": [round(each, 2) for each in ages],
            "end_to_end_ms": [round(each, 2) for each in end_to_end],
        },
    }


def _answering(watched: Watched) -> list[float]:
    """Return the time from each change of the file to the first answer of a later set of labels."""
    found = []
    for version, changed_ns in zip(count(2), watched.changed_ns):
        at = next((ns for ns, line in watched.lines if line["labels_version"] >= version), None)
        found += [] if at is None else [round((at - changed_ns) / 1e6, 1)]
    return found


def measured(document: dict[str, Any]) -> str:
    """Return what was measured as it stands in the documentation."""
    samples, frames = document["samples"], document["frames"]
    ages, ends = quantiles(samples["age_ms"]), quantiles(samples["end_to_end_ms"])
    gaps, answering = document["gap_between_decisions_ms"], document["answering_after_change_ms"]
    rows = {
        "frames": f"{frames['sent']:,} sent, {frames['found']:,} found: {frames['decided']:,} decided, "
        f"{frames['dropped']:,} dropped for newer ones",
        "garbage": f"{document['garbage_bytes']['sent']:,} bytes sent, "
        f"{document['garbage_bytes']['skipped']:,} skipped",
        "age of the frame at its line": _said(ages),
        "from the camera's write to the line's arrival": _said(ends),
        "bar: two frame times and an inference": f"{document['bar_ms']:.1f} ms; "
        f"{document['ages_within_bar_share']:.2%} of ages are within",
        "time between two decisions": f"{gaps['p50']:.1f} ms in the median, {gaps['longest']:.0f} ms at most",
        "labels": f"{document['label_sets_that_answered']} of {1 + document['label_changes']} sets answered, "
        f"{min(answering, default=0) / 1e3:.1f} to {max(answering, default=0) / 1e3:.1f} s after the file "
        "changed",
        "resident memory": f"{max(samples['rss_kb']) * _MB:.0f} MB at most; {document['growth_mb']:.2f} MB "
        "more at the end than after a minute",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {said} |" for name, said in rows.items())])
    failed = [name for name, passed in document["checks"].items() if not passed]
    return (
        f"A camera of {document['frames_a_second']} frames a second ({SIZE_PX[0]} × {SIZE_PX[1]}, MJPEG) for "
        f"{document['seconds'] / 60:.3g} minutes, with {document['garbage_bytes']['sent'] / 1e6:.1f} MB of "
        f"garbage and {document['frames_cut_off_sent']} frames that break off in its stream, the embedded "
        "bundle, and a label file with ten new labels replaced or written over "
        f"{document['label_changes']} times:\n\n{table}\n\n"
        f"*{document['variant']} on {document['backend']} with {document['threads']} threads; "
        f"{document['host']['cpu_model']}, {document['host']['cores']} cores, load average "
        f"{document['load_average'][2]:.1f} over the last quarter of an hour; one run; intervals of 95 %; "
        f"bars failed: {', '.join(failed) or 'none'}. "
        "[Data](../benchmarks/results/camera.json), [method](../benchmarks/camera.py).*\n"
    )


def _said(found: dict[str, Any]) -> str:
    cells = [
        f"{found[name]:.1f} ms [{found[f'{name}_interval'][0]:.1f}, {found[f'{name}_interval'][1]:.1f}]"
        for name in ("p50", "p99")
    ]
    return f"{cells[0]} in the median, {cells[1]} at the 99th percentile, {found['longest']:.0f} ms at most"


def documented(text: str, said: str) -> str:
    """Return a page with what stands between the marks replaced."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}{said}{MARKS[1]}{after}"


def main() -> None:
    """Run camera and command side by side, judge, and write."""
    parser = arguments(__doc__.partition("\n")[0], "camera.json")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--play", type=Path, help="be the camera, and write what was sent here")
    parser.add_argument("--docs", action="store_true", help="only write what was measured into the docs")
    given = parser.parse_args()
    is_documented = given.output == parser.get_default("output")
    if given.docs:
        said = measured(json.loads(given.output.read_text(encoding="utf-8")))
        DOCS.write_text(documented(DOCS.read_text(encoding="utf-8"), said), encoding="utf-8")
        return
    if given.play is not None:
        with contextlib.suppress(KeyboardInterrupt):
            camera(given.seconds, given.play)
        return
    with ZeroShotClassifier.open(given.bundle, variant=given.variant) as classifier:
        ran = model(classifier)
        each_ms = inference_ms(classifier, frames())
    with tempfile.TemporaryDirectory() as folder:
        labels, log = Path(folder) / "labels.txt", Path(folder) / "sent.json"
        write_labels(labels, 0, whole=True)
        command = [*COMMAND, "--bundle", given.bundle, "--variant", given.variant]
        play = [__file__, "--seconds", str(given.seconds), "--play", str(log)]
        source = subprocess.Popen([sys.executable, *play], stdout=subprocess.PIPE)
        process = subprocess.Popen(
            [sys.executable, *command, "--label-file", str(labels), "--jsonl"],
            stdin=source.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "EDGECLIP_CACHE_DIR": folder},
        )
        source.stdout.close()  # type: ignore[union-attr]  # the other process reads it
        between_s = (given.seconds - 3 * _FIRST_CHANGE_S) / max(given.changes, 1)
        watched = Watched(process, labels, between_s, given.changes)
        try:
            watched.watch()
            source.wait()
        except KeyboardInterrupt:
            for child in (source, process):
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
            sys.exit("stopped")
        if not watched.lines or not watched.rss_kb:
            sys.exit("too few decisions were made: " + " ".join(watched.remarks))
        result = judged(watched, json.loads(log.read_text(encoding="utf-8")), each_ms, process.returncode)
    document = {
        "what": "camera",
        **ran,
        "seconds": given.seconds,
        "frames_a_second": FRAMES_A_SECOND,
        **result,
    }
    write(given.output, document, show=False)
    said = measured(json.loads(given.output.read_text(encoding="utf-8")))
    if is_documented:
        DOCS.write_text(documented(DOCS.read_text(encoding="utf-8"), said), encoding="utf-8")
    print(
        said,
        *(f"{'passed' if passed else 'FAILED'}: {name}" for name, passed in result["checks"].items()),
        sep="\n",
    )
    sys.exit(not all(result["checks"].values()))


if __name__ == "__main__":
    main()
