"""Measure a bundle zero-shot on the stamps, and write one row a picture.

The pictures are test only: ``edgeclip data fetch stamps``. Candidates are always all 200 names of a language;
a name goes through the templates, the unit vectors are averaged, and the picture is compared by cosine: the
form in which the bundle is used. Intervals are 95 %, bootstrap over names.

    python benchmarks/eval_stamps.py --stamps DATA            # DATA: the -o of `edgeclip data fetch stamps`
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.bundle import Bundle
from edgeclip.export.recipes.stamps import candidates, figures, ranks, read_stamps
from edgeclip.fetch import materials
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import build_bank
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.choose import choose_variant
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.session import RuntimeOptions, open_session
from edgeclip.text_encoder import TextEncoder

HERE = Path(__file__).parent
_BATCH = 16
_TOP = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--stamps", type=Path, help="where `edgeclip data fetch stamps` put its package")
    parser.add_argument("--templates", default="one", help="English templates; Chinese are always `zh`")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "eval_stamps.json")
    options = parser.parse_args(arguments)
    package = materials("stamps", options.stamps)["tuxpaint-stamps-default"]
    stamps = read_stamps(HERE / "data" / "stamps.jsonl")
    bundle = Bundle.open(options.bundle)
    run_options = RuntimeOptions(threads=2)
    variant = choose_variant(bundle, variant=options.variant, options=run_options).variant
    preprocess = Preprocess(bundle.manifest.preprocess)
    pictures = np.stack([preprocess(stamp.path(package)) for stamp in stamps])
    with open_session(variant.tower("image"), options=run_options) as session:
        name = next(iter(session.inputs))
        embeddings = np.concatenate(
            [
                next(iter(session.run({name: pictures[start : start + _BATCH]}).values()))
                for start in range(0, len(pictures), _BATCH)
            ]
        )
    encoder = TextEncoder(bundle, variant, options=run_options)
    languages: dict[str, Any] = {}
    for language, templates in (("en", options.templates), ("zh", "zh")):
        names = candidates(stamps, language)
        bank = build_bank(LabelSet.of(names), Templates.of(templates), encoder)
        rank = ranks(embeddings, bank.embeddings, names, [stamp.name(language) for stamp in stamps])
        best = np.argsort(-(embeddings @ bank.embeddings.T), axis=1, kind="stable")[:, :_TOP]
        languages[language] = {
            "templates": templates,
            "candidates": len(names),
            "figures": figures(stamps, rank, language),
            "pictures": [
                {
                    "file": stamp.file,
                    "name": stamp.name(language),
                    "kind": stamp.kind,
                    "split": stamp.split,
                    "rank": int(rank[row]),
                    "top5": [names[index] for index in best[row]],
                }
                for row, stamp in enumerate(stamps)
            ],
        }
        for split in ("tune", "report"):
            said = languages[language]["figures"][f"{split}/all"]
            print(
                f"{language} {split}: top-1 {said['top1']:.3f} {said['top1_interval']}, "
                f"top-5 {said['top5']:.3f} {said['top5_interval']}, n {said['n']}"
            )
    encoder.close()
    result = {
        "schema": 1,
        "command": "python benchmarks/eval_stamps.py " + " ".join(_portable(sys.argv[1:])),
        "bundle": {"name": bundle.manifest.model.name, "digest": bundle.digest, "variant": variant.name},
        "versions": versions(),
        "host": Host.here().to_dict(),
        "languages": languages,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _portable(arguments: list[str]) -> list[str]:
    """Name directories of this machine by their last part only."""
    return [Path(each).name if "/" in each else each for each in arguments]


if __name__ == "__main__":
    sys.exit(main())
