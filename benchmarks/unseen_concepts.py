"""Whether the default model's recipe tells drawings of things it never saw drawn, in a style it never saw.

One emoji in five, chosen by a hash of its code, is taken out of the materials: neither its drawings nor its
names and tags are learnt as an emoji's (a dictionary, a list or a class may still hold the word). The recipe
is then trained as ever, seed 0, and asked for the right one of ten names, all of them of emoji that were left
out, none a flag, shown as Twemoji draws them. A figure of the recipe, not of the file that ships, which has
seen all emoji. About 20 minutes on one thread with the sentence vectors of another build in WORK, else 35.

    python benchmarks/unseen_concepts.py --materials DATA --work WORK
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from default_model import mean_figure
from written import ROOT, write

from edgeclip.distill.eager import EagerSubject
from edgeclip.export.recipes import default_data, default_pictograms
from edgeclip.export.recipes.build_default import Build, build
from edgeclip.export.recipes.emoji import Pictogram, read_pictograms
from edgeclip.export.recipes.nano_eval import Question, judged
from edgeclip.fetch import materials
from edgeclip.models.checkpoints import load_checkpoint, read_checkpoint_info
from edgeclip.tokenizer import Tokenizer

LEFT_OUT = 5  # one in so many


def is_left_out(code: str) -> bool:
    """Tell whether an emoji is one that training must not see."""
    bare = code.replace("-fe0f", "")
    return hashlib.sha256(bare.encode()).digest()[0] % LEFT_OUT == 0


def _read_rest(emojibase: Path, styles: Sequence[Path]) -> tuple[Pictogram, ...]:
    return tuple(each for each in read_pictograms(emojibase, styles) if not is_left_out(each.code))


def train(data: Path | None, work: Path) -> Path:
    """Train on what is left; return the checkpoint."""
    plan = Build(work=work, out=work / "none", data=data, until="checkpoint")
    with (
        patch.object(default_data, "read_pictograms", _read_rest),
        patch.object(default_pictograms, "read_pictograms", _read_rest),
    ):
        build(plan)
    return work / "checkpoint"


def main() -> int:
    """Train, ask, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--materials", type=Path, help="where `edgeclip data fetch` put its sets")
    parser.add_argument("--work", type=Path, required=True, help="of this benchmark alone")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/unseen_concepts.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    drawings = materials("pictograms", options.materials)["emoji-datasource-twitter"] / "img/twitter/64"
    packages = materials("default-model", options.materials)
    emojibase = packages["emojibase-data"]
    left_out = [
        each
        for each in read_pictograms(emojibase, (drawings,))
        if is_left_out(each.code) and not each.is_flag
    ]
    questions = [Question(each.files[0], each.code, each.english, each.chinese) for each in left_out]
    checkpoint = train(options.materials, options.work)
    figures: dict[str, Any] = {}
    rows: dict[str, list[str]] = {}
    config = read_checkpoint_info(checkpoint).config
    model = load_checkpoint(checkpoint, external=packages)
    with closing(EagerSubject(config.name, model, config, Tokenizer.open(checkpoint))) as subject:
        for language in ("en", "zh"):
            said = judged(subject, questions, language, 10)
            for part in ("all", "things"):
                chosen = [
                    row
                    for row, each in zip(said["rows"], left_out, strict=True)
                    if part == "all" or each.is_thing
                ]
                ways = np.array([row["10-way"] for row in chosen])
                figures[f"{language} {part} 10-way"] = mean_figure(ways, [row["name"] for row in chosen])
            rows[language] = ["\t".join(map(str, row.values())) for row in said["rows"]]
    columns = "emoji, its name, the rank of that among all left out, share of 10-way draws won"
    write(options.output, {"columns": columns, "figures": figures, "rows": rows}, show=False)
    for name, figure in figures.items():
        print(name, figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
