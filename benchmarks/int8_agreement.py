"""How well int8 keeps the answers of float32: the default model and trained probes, against their bars.

*Agreement*: the share of unlabelled pictures (`agreement_pictures.py`) whose best label is float32's. 200
names are those of the stamps; 20 names are drawn from them, 100 times with seed 0, and a picture counts
by the share of its draws. Two figures: `bundle` is what a user gets, the variant's own text tower and
image tower against those of float32; `image` lets both compare with the labels of the float32 text tower.

*Margin*: scores are the softmax of cosines over all names offered, at the scale that the embedded bundle
scores with (what `edgeclip classify` prints); a margin is float32's first score less its second.

*Intervals* are 95 %: Wilson's, which takes pictures for independent, and a bootstrap over photographs, which
does not (crops of one photograph agree or disagree together). A lower bound is the smaller one of both.

*Net losses*: right in float32 and wrong in int8, less the reverse, over pictures of the labelled sets, with
McNemar's exact p. Sets of fewer than 100 pictures are reported and count in the pool only.

    python benchmarks/int8_agreement.py                  # default model and probes, both engines
    python benchmarks/int8_agreement.py --forms onnx-int8 --no-probes   # what is there of the probes stays
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from agreement_pictures import Labelled, Unlabelled, calibration_pixels, labelled_sets, unlabelled
from default_graphs import (
    Built,
    build_variant,
    float_files,
    float_graphs,
    preprocess_spec,
    scale,
    tokenizer,
)
from numpy.typing import NDArray
from written import ROOT, commit, write

from edgeclip.bundle import Bundle, TowerFiles
from edgeclip.evaluate.metrics import wilson_interval
from edgeclip.evaluate.paired import clustered_mean, paired
from edgeclip.export.options import Checkpoint, GraphOptions
from edgeclip.export.reference import calibration_texts
from edgeclip.export.source import open_source
from edgeclip.label_sets import Templates
from edgeclip.runtime.parity import compare_embeddings
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import OpenSession, RuntimeOptions, open_session
from edgeclip.shapes import captions, held_out_combinations, label, render, training_combinations
from edgeclip.tokenizer import Tokenizer

EMBEDDED = "embedded onnx-int8"
FORMS = (EMBEDDED, "onnx-int8", "openvino-int8")
PROBES = ("mobileclip", "tinyclip", "vit")
BARS = {
    "cosine_mean": 0.99,
    "top1_of_200": 0.97,
    "top1_of_200_low": 0.96,
    "top1_of_200_clear": 0.995,
    "top1_of_20": 0.985,
    "top1_of_20_low": 0.975,
    "net_loss": 0.01,
    "size": 0.30,
    "probe_top1": 0.98,
}
CLEAR_MARGIN = 0.1
LEAST_GATED = 100
_DRAWN, _DRAWS = 20, 100
_KEPT = ROOT / "build" / "agreement-pictures"
_PROBE_PICTURES, _PROBE_ROWS = 1000, 256

Vectors = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Towers:
    """Both towers of a form, open."""

    sessions: Mapping[str, OpenSession]
    tokenizer: Tokenizer

    def images(self, pixels: NDArray[np.uint8]) -> Vectors:
        """Return embeddings ``(n, E)``."""
        return run_rows(self.sessions["image"], pixels)

    def texts(self, texts: Sequence[str]) -> Vectors:
        """Return embeddings ``(m, E)``."""
        return run_rows(self.sessions["text"], self.tokenizer(texts, truncate=True))

    def bank(self, names: Sequence[str], templates: str) -> Vectors:
        """Return the mean over templates of each name, scaled to unit length."""
        parts = [
            self.texts([template.replace("{}", name) for name in names])
            for template in Templates.of(templates).texts
        ]
        return unit(np.sum(parts, axis=0))


def unit(rows: Vectors) -> Vectors:
    lengths: Vectors = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / lengths


@contextmanager
def opened(
    files: Mapping[str, TowerFiles | Path], words: Tokenizer, options: RuntimeOptions
) -> Iterator[Towers]:
    sessions = {tower: open_session(file, options=options) for tower, file in files.items()}
    try:
        yield Towers(sessions, words)
    finally:
        for session in sessions.values():
            session.close()


# --- figures -----------------------------------------------------------------------------------------------


def agreement_of(same: NDArray[Any], photographs: NDArray[np.str_]) -> dict[str, Any]:
    """Return a mean agreement with both intervals."""
    value = float(np.mean(same))
    low, high = wilson_interval(round(value * len(same)), len(same))
    found: dict[str, Any] = {
        "value": _rounded(value),
        "n": len(same),
        "wilson": [_rounded(low), _rounded(high)],
    }
    if len(set(photographs.tolist())) > 1:
        clustered = clustered_mean(same, photographs.tolist())
        found["photographs"] = clustered.clusters
        found["clustered"] = [_rounded(clustered.low), _rounded(clustered.high)]
        low = min(low, clustered.low)
    return {**found, "low": _rounded(low)}


def compare_unlabelled(
    pictures: Unlabelled,
    reference: tuple[Vectors, Vectors],
    other: tuple[Vectors, Vectors],
    multiplier: float,
) -> dict[str, Any]:
    """Return agreement of two pairs of picture and label embeddings."""
    ours, theirs = (images @ bank.T for images, bank in (reference, other))
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    margin = margins(ours, multiplier)
    clear = margin >= CLEAR_MARGIN
    drawn = drawn_agreement(ours, theirs)
    kinds = {
        kind: agreement_of(same[pictures.kinds == kind], pictures.photographs[pictures.kinds == kind])
        for kind in sorted(set(pictures.kinds.tolist()))
    }
    changed = margin[~same]
    return {
        "top1_of_200": agreement_of(same, pictures.photographs),
        "top1_of_200_clear": agreement_of(same[clear], pictures.photographs[clear]),
        "top1_of_20": agreement_of(drawn, pictures.photographs),
        "by_kind": kinds,
        "margin_where_changed": {
            "median": _rounded(float(np.median(changed))) if len(changed) else None,
            "largest": _rounded(float(changed.max())) if len(changed) else None,
        },
        "median_margin": _rounded(float(np.median(margin))),
    }


def margins(similarity: Vectors, multiplier: float) -> NDArray[np.float64]:
    """Return first less second softmax score of each row."""
    logits = multiplier * similarity.astype(np.float64)
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    best = np.sort(scores, axis=1)[:, -2:]
    found: NDArray[np.float64] = best[:, 1] - best[:, 0]
    return found


def drawn_agreement(ours: Vectors, theirs: Vectors) -> NDArray[np.float64]:
    """Return for each picture the share of draws of 20 names on which both agree."""
    random = np.random.default_rng(0)
    shares = np.zeros(len(ours))
    for _ in range(_DRAWS):
        names = random.choice(ours.shape[1], _DRAWN, replace=False)
        shares += ours[:, names].argmax(axis=1) == theirs[:, names].argmax(axis=1)
    return shares / _DRAWS


def compare_labelled(
    sets: Sequence[Labelled], reference: Mapping[str, tuple[Vectors, Vectors]], other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what int8 lost and gained on each set, and on all of them together.

    The Chinese names of the stamps are of pictures that the English ones are of: they are not in the pool.
    """
    hits: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
    for each in sets:
        first, second = (
            (images @ bank.T).argmax(axis=1) == each.targets
            for images, bank in (reference[each.name], other[each.name])
        )
        hits[each.name] = first, second
    pool = [name for name in hits if name != "stamps-zh"]
    joined = tuple(np.concatenate([hits[name][side] for name in pool]) for side in (0, 1))
    found = {"pooled": {"sets": pool, **_changes(*joined)}}
    return found | {name: _changes(*both) for name, both in hits.items()}


def _changes(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, Any]:
    said = paired(first, second).to_dict()
    accuracy = {"float": _rounded(float(first.mean())), "int8": _rounded(float(second.mean()))}
    return {
        **said,
        "net_loss": _rounded(said["net_loss"]),
        "mcnemar_p": _rounded(said["mcnemar_p"]),
        "top1": accuracy,
    }


def _cosines(reference: Vectors, other: Vectors) -> dict[str, Any]:
    numbers = compare_embeddings(reference, other)
    rows = np.sum(unit(reference) * unit(other), axis=1)
    return {
        "mean": _rounded(numbers.cosine_mean),
        "p01": _rounded(float(np.quantile(rows, 0.01))),
        "min": _rounded(numbers.cosine_min),
        "max_abs": _rounded(numbers.max_abs),
        "n": numbers.n,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


# --- default model -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Seen:
    """What a form makes of everything."""

    pictures: Vectors
    texts: Vectors
    banks: Mapping[str, Vectors]
    labelled: Mapping[str, Vectors]


def see(towers: Towers, pictures: Unlabelled, sets: Sequence[Labelled], texts: Sequence[str]) -> Seen:
    return Seen(
        towers.images(pictures.pixels),
        towers.texts(texts),
        {each.name: towers.bank(each.candidates, each.templates) for each in sets},
        {
            each.name: towers.images(each.pixels)
            if each.name != "stamps-zh"
            else np.zeros((0, 0), np.float32)
            for each in sets
        },
    )


def default_rows() -> dict[str, NDArray[Any]]:
    """Return what ranges are chosen on: pictures for calibration, and everyday names in templates."""
    texts = [*calibration_texts(["en"]), *calibration_texts(["zh"])]
    return {
        "image": calibration_pixels(preprocess_spec()),
        "text": tokenizer()(texts, truncate=True),
    }


def compare_default(forms: Sequence[str], options: RuntimeOptions) -> dict[str, Any]:
    pictures, sets = unlabelled(preprocess_spec()), labelled_sets(preprocess_spec())
    texts = list(dict.fromkeys(name for each in sets for name in each.candidates))
    reference = _float_seen(pictures, sets, texts, options)
    rows = default_rows()
    fp32_bytes = sum(path.stat().st_size for path in float_files().values())
    found: dict[str, Any] = {}
    for form in forms:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            files, sizes, about = _files_of(form, rows, Path(folder))
            seconds = time.perf_counter() - started
            with opened(files, tokenizer(), options) as towers:
                other = see(towers, pictures, sets, texts)
        found[form] = _judged(pictures, sets, reference, other, sizes, fp32_bytes)
        found[form] |= {"quantization": about, "seconds_to_make": round(seconds, 1)}
        _say(form, found[form])
    return {
        "model": "default model",
        "unlabelled": {
            "pictures": len(pictures.pixels),
            "photographs": len(set(pictures.photographs.tolist())),
            "digest": pictures.digest,
        },
        "labelled": {each.name: len(each.pixels) for each in sets},
        "left_out": "photographs of scikit-image: they are for calibration and demonstration",
        "calibration": {tower: len(each) for tower, each in rows.items()},
        "scale": scale(),
        "fp32_bytes": fp32_bytes,
        "forms": found,
    }


def _files_of(
    form: str, rows: Mapping[str, NDArray[Any]], work: Path
) -> tuple[dict[str, TowerFiles | Path], dict[str, int], Any]:
    if form == EMBEDDED:
        variant = Bundle.open("default").variant("onnx-int8")
        towers = {tower: variant.tower(tower) for tower in ("image", "text")}
        sizes = {tower: sum(file.stat().st_size for file in each.files) for tower, each in towers.items()}
        return dict(towers), sizes, dict(variant.entry.calibration or {})
    built = build_variant(form, rows, work, float_graphs())
    return _opening(built), {tower: each.size_bytes for tower, each in built.items()}, _about(built)


def _opening(built: Mapping[str, Built]) -> dict[str, TowerFiles | Path]:
    return {tower: each.files for tower, each in built.items()}


def _about(built: Mapping[str, Built]) -> Any:
    return next(iter(built.values())).calibration


def _float_seen(
    pictures: Unlabelled, sets: Sequence[Labelled], texts: Sequence[str], options: RuntimeOptions
) -> Seen:
    """Return what float32 makes of everything; kept, as it is the same for every form."""
    digest = hashlib.sha256(pictures.digest.encode())
    for path in float_files().values():
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for each in sets:
        digest.update(each.name.encode() + np.ascontiguousarray(each.pixels).data)
        digest.update(repr((each.candidates, each.templates)).encode())
    kept = _KEPT / f"float-{digest.hexdigest()[:16]}.npz"
    if not kept.is_file():
        with opened(float_files(), tokenizer(), options) as towers:
            seen = see(towers, pictures, sets, texts)
        arrays = {"pictures": seen.pictures, "texts": seen.texts}
        arrays |= {f"bank {name}": rows for name, rows in seen.banks.items()}
        arrays |= {f"labelled {name}": rows for name, rows in seen.labelled.items()}
        np.savez(kept, **arrays)
    with np.load(kept) as stored:
        return Seen(
            stored["pictures"],
            stored["texts"],
            {each.name: stored[f"bank {each.name}"] for each in sets},
            {each.name: stored[f"labelled {each.name}"] for each in sets},
        )


def _judged(
    pictures: Unlabelled,
    sets: Sequence[Labelled],
    reference: Seen,
    other: Seen,
    sizes: Mapping[str, int],
    fp32_bytes: int,
) -> dict[str, Any]:
    multiplier = scale()
    bank, own_bank = reference.banks["stamps-en"], other.banks["stamps-en"]
    whole = compare_unlabelled(pictures, (reference.pictures, bank), (other.pictures, own_bank), multiplier)
    image = compare_unlabelled(pictures, (reference.pictures, bank), (other.pictures, bank), multiplier)
    losses = compare_labelled(sets, _pairs(reference, sets), _pairs(other, sets))
    cosine = {
        "image": _cosines(reference.pictures, other.pictures),
        "text": _cosines(reference.texts, other.texts),
    }
    size = {**sizes, "share_of_fp32": _rounded(sum(sizes.values()) / fp32_bytes)}
    found = {"cosine": cosine, "bundle": whole, "image": image, "labelled": losses, "size_bytes": size}
    return {**found, "bars": bars(found)}


def _pairs(seen: Seen, sets: Sequence[Labelled]) -> dict[str, tuple[Vectors, Vectors]]:
    return {
        each.name: (
            seen.labelled["stamps-en" if each.name == "stamps-zh" else each.name],
            seen.banks[each.name],
        )
        for each in sets
    }


def bars(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return each bar with what was reached: by the worse of both figures, on all that is gated."""
    both = (found["bundle"], found["image"])

    def least(name: str, key: str) -> float:
        return min(float(each[name][key]) for each in both)

    gated = {name: said["net_loss"] for name, said in found["labelled"].items() if said["n"] >= LEAST_GATED}
    worst = max(gated, key=lambda name: gated[name])
    reached = {
        "cosine_mean": min(found["cosine"][tower]["mean"] for tower in ("image", "text")),
        "top1_of_200": least("top1_of_200", "value"),
        "top1_of_200_low": least("top1_of_200", "low"),
        "top1_of_200_clear": least("top1_of_200_clear", "value"),
        "top1_of_20": least("top1_of_20", "value"),
        "top1_of_20_low": least("top1_of_20", "low"),
        "net_loss": gated["pooled"],
        "size": found["size_bytes"]["share_of_fp32"],
    }
    said: dict[str, Any] = {}
    for name, value in reached.items():
        is_most = name in ("net_loss", "size")
        passed = value <= BARS[name] if is_most else value >= BARS[name]
        said[name] = {"bar": BARS[name], "reached": value, "passed": bool(passed)}
    said["net_loss"]["worst_set"] = {worst: gated[worst]}
    return said


def _say(form: str, found: Mapping[str, Any]) -> None:
    print(form)
    for name, said in found["bars"].items():
        print(f"  {'ok  ' if said['passed'] else 'MISS'} {name:20} {said['reached']:.4f} (bar {said['bar']})")


# --- probes ------------------------------------------------------------------------------------------------


def compare_probes(forms: Sequence[str], options: RuntimeOptions) -> dict[str, Any]:
    """Return agreement of the trained probes: ranges chosen on shapes of training, judged on others."""
    held_out, training = held_out_combinations(), training_combinations()
    pictures = np.stack([render(held_out[row % len(held_out)], 1000 + row) for row in range(_PROBE_PICTURES)])
    step = len(training) // _PROBE_ROWS
    chosen = [training[row * step] for row in range(_PROBE_ROWS)]
    seen = np.stack([render(each, row) for row, each in enumerate(chosen)])
    said = [captions(each, ("en", "zh")[row % 2], row)[0] for row, each in enumerate(chosen)]
    result: dict[str, Any] = {}
    for probe in PROBES:
        checkpoint = ROOT / "tests" / "data" / "probes" / probe
        source = open_source(Checkpoint(str(checkpoint)))
        words = source.tokenizer
        graphs = {tower: source.trace(tower, GraphOptions()) for tower in ("image", "text")}
        names = [label(each, "en") for each in held_out]
        rows = {"image": seen, "text": words(said, truncate=True)}
        result[probe] = _probe(graphs, words, forms, rows, pictures, names, options)
        print(probe, {form: (each["cosine"], each["top1"]) for form, each in result[probe].items()})
    return result


def _probe(
    graphs: Mapping[str, onnx.ModelProto],
    words: Tokenizer,
    forms: Sequence[str],
    rows: Mapping[str, NDArray[Any]],
    pictures: NDArray[np.uint8],
    names: Sequence[str],
    options: RuntimeOptions,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {tower: Path(folder) / f"{tower}.onnx" for tower in graphs}
        for tower, graph in graphs.items():
            paths[tower].write_bytes(graph.SerializeToString())
        with opened(paths, words, options) as towers:
            images, bank = towers.images(pictures), towers.bank(names, "bare")
        for form in forms:
            if form == EMBEDDED:
                continue
            built = build_variant(form, rows, Path(folder) / form, graphs)
            with opened(_opening(built), words, options) as towers:
                others, own = towers.images(pictures), towers.bank(names, "bare")
            top = {}
            for which, pair in (("bundle", (others, own)), ("image", (others, bank))):
                same = (images @ bank.T).argmax(axis=1) == (pair[0] @ pair[1].T).argmax(axis=1)
                low, high = wilson_interval(int(same.sum()), len(same))
                top[which] = {
                    "value": _rounded(float(same.mean())),
                    "wilson": [_rounded(low), _rounded(high)],
                }
            cosine = {"image": _cosines(images, others), "text": _cosines(bank, own)}
            reached = min(each["value"] for each in top.values())
            mean = min(each["mean"] for each in cosine.values())
            found[form] = {
                "cosine": cosine,
                "top1": top,
                "labels": len(names),
                "pictures": len(pictures),
                "bars": {
                    "cosine_mean": {
                        "bar": BARS["cosine_mean"],
                        "reached": mean,
                        "passed": mean >= BARS["cosine_mean"],
                    },
                    "probe_top1": {
                        "bar": BARS["probe_top1"],
                        "reached": reached,
                        "passed": reached >= BARS["probe_top1"],
                    },
                },
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help=f"of {', '.join(map(repr, FORMS))}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probes", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--default", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "int8_agreement.json"
    )
    asked = parser.parse_args()
    options = RuntimeOptions(threads=asked.threads)
    made: dict[str, Any] = {}
    if asked.default:
        made["default"] = compare_default(asked.forms, options)
    if asked.probes:
        made["probes"] = {"models": compare_probes(asked.forms, options)}
    parts: dict[str, Any] = {}
    if asked.output.is_file():  # what was not measured now stays, and says when it was
        known = json.loads(asked.output.read_text(encoding="utf-8"))
        parts = {name: known[name] for name in ("default", "probes") if name in known}
    for name, part in made.items():
        parts[name] = {"commit": commit(), "threads": asked.threads, **part}
    write(asked.output, {"bars": BARS, **parts})


if __name__ == "__main__":
    main()
