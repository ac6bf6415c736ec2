"""How well the small model does, in float32 and as int8, on pictures of kinds it was not trained on.

5-way and 200-way on the stamps (cut-out photographs: the right name, and four drawn from the other 199, or
all of them), 10-way and all names on emoji of a style nobody trained on. One row a picture. The report half
of the stamps is looked at only if asked for. The default model answers the same questions, and image towers
of bundles are timed against its own, in turns, on one thread.

    python benchmarks/nano.py --materials DATA --model BUNDLE --model WORK/run-0/model

A model is a bundle (each of its variants) or a checkpoint. ``figures`` are over all models of one name and
precision, such as seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from default_model import mean_figure
from written import ROOT, ratio, write

from edgeclip.bench.feeds import example_feeds
from edgeclip.bundle import Bundle
from edgeclip.evaluate.subjects import Subject, open_bundle
from edgeclip.export.recipes.nano_eval import judged, pictogram_questions, stamp_questions
from edgeclip.export.recipes.stamps import candidates, read_stamps
from edgeclip.fetch import materials
from edgeclip.runtime.choose import choose_variant, open_tower
from edgeclip.runtime.latency import compare_interleaved
from edgeclip.runtime.session import RuntimeOptions

LANGUAGES = ("en", "zh")
BESIDE = "default"
ONE_THREAD = RuntimeOptions(threads=1)


def measured(
    subject: Subject, data: Path | None, halves: Sequence[str], languages: Sequence[str]
) -> dict[str, Any]:
    """Return everything about one model."""
    stamps = read_stamps(ROOT / "benchmarks/data/stamps.jsonl")
    package = materials("stamps", data)["tuxpaint-stamps-default"]
    emojibase = materials("default-model", data)["emojibase-data"]
    drawings = materials("pictograms", data)["emoji-datasource-twitter"] / "img/twitter/64"
    found: dict[str, Any] = {}
    for language in languages:
        names = candidates(stamps, language)
        for half in halves:
            questions = stamp_questions(stamps, package, half, language)
            found[f"stamps-{half}-{language}"] = judged(subject, questions, language, 5, names=names)
        unseen = pictogram_questions(emojibase, drawings)
        found[f"twitter-{language}"] = judged(subject, unseen, language, 10)
    return found


def opened(path: str, threads: int) -> list[Subject]:
    """Return the variants of a bundle, or a checkpoint."""
    if (Path(path) / "config.json").is_file():
        from edgeclip.distill.eager import open_eager

        return [open_eager(path, threads=threads)]
    return list(open_bundle(path, options=RuntimeOptions(threads=threads))[0])


def timed(bundle: str, seconds: float) -> dict[str, Any]:
    """Return how long one picture takes in the image tower of the default model (a) and of a bundle (b)."""
    calls = []
    with ExitStack() as open_towers:
        for path in (BESIDE, bundle):
            opened = Bundle.open(path)
            tower = open_tower(opened, choose_variant(opened, options=ONE_THREAD), "image", ONE_THREAD)
            session = open_towers.enter_context(tower)
            calls.append(partial(session.run, example_feeds(session.inputs)))
        found = compare_interleaved(*calls, min_duration_s=seconds, max_duration_s=2 * seconds)
    sizes = [
        sum(file.size_bytes for file in Bundle.open(path).manifest.files.values())
        for path in (BESIDE, bundle)
    ]
    return {
        "a": BESIDE,
        "b": Path(bundle).name,
        **ratio(found),
        "a_size_bytes": sizes[0],
        "b_size_bytes": sizes[1],
        "a_samples_ms": [round(each, 4) for each in found.a.samples_ms.tolist()],
        "b_samples_ms": [round(each, 4) for each in found.b.samples_ms.tolist()],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, say it in a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--materials", type=Path, help="where `edgeclip data fetch` put its sets")
    parser.add_argument("--model", action="append", required=True, help="a bundle or a checkpoint; repeat it")
    parser.add_argument("--half", action="append", choices=("tune", "report"), help="[default: tune]")
    parser.add_argument("--language", action="append", choices=LANGUAGES, help="[default: both]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing a bundle")
    parser.add_argument("--quiet", action="store_true", help="do not write the file")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/nano.json")
    options = parser.parse_args(arguments)
    models: list[dict[str, Any]] = []
    for path in [*options.model, BESIDE]:
        for subject in opened(path, options.threads):
            with closing(subject):
                found = measured(
                    subject, options.materials, options.half or ["tune"], options.language or LANGUAGES
                )
            about = {key: value for key, value in subject.about.items() if key != "threads"}
            models.append({"name": "/".join(Path(subject.name).parts[-2:]), "about": about, "sets": found})
            for name, said in found.items():
                way = next(key for key in said if key.endswith("-way"))
                rows = said["rows"]
                whole = mean_figure(np.array([row[way] for row in rows]), [row["name"] for row in rows])
                said[f"{way}-interval"] = [round(whole[end] / 100, 4) for end in ("low", "high")]
                print(
                    f"{models[-1]['name']:40} {name:18} {way} {said[way]:.3f} top-1 {said['top1']:.3f} "
                    f"top-5 {said['top5']:.3f} (n {said['pictures']}, {said['names']} names)",
                    file=sys.stderr,
                )
    if not options.quiet:
        for model in models:
            for said in model["sets"].values():
                said["rows"] = ["\t".join(map(str, row.values())) for row in said["rows"]]
        bundles = [path for path in options.model if not (Path(path) / "config.json").is_file()]
        latency = [timed(path, options.seconds) for path in bundles]
        columns = "rows: picture, its name, the rank of that among all, share of n-way draws won"
        said = {"columns": columns, "figures": _spread(models), "latency": latency, "models": models}
        write(options.output, said, show=False)
    return 0


def _spread(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, least and largest of every figure over the models of one name and precision."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        groups.setdefault(f"{model['about']['model']}/{model['about']['precision']}", []).append(
            model["sets"]
        )
    found: dict[str, Any] = {}
    for group, of_one in sorted(groups.items()):
        for name in of_one[0]:
            for key, value in of_one[0][name].items():
                if isinstance(value, float):
                    values = [sets[name][key] for sets in of_one]
                    found[f"{group}/{name}/{key}"] = {
                        "mean": round(statistics.mean(values), 4),
                        "least": min(values),
                        "most": max(values),
                        "models": len(values),
                    }
    return found


if __name__ == "__main__":
    sys.exit(main())
