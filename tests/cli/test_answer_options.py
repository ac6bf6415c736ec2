"""Every two of the options that say what is asked of a picture go together, or are refused in a sentence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command

from edgeclip.classify import ZeroShotClassifier
from edgeclip.few_shot_fit import fit_head

PHOTOS = Path(__file__).parents[2] / "edgeclip/assets/photos"
PICTURES = [PHOTOS / "cat.jpg", PHOTOS / "koala.jpg"]
NAMES = ("cat", "dog", "pet")
OPTIONS = {
    "reject": ("--reject",),
    "multi": ("--multi",),
    "context": ("--context", "on snow,indoors"),
    "head": ("--head",),
    "min-confidence": ("--min-confidence", "0.5"),
    "top-k": ("--top-k", "2"),
}
REFUSED = {
    ("reject", "multi"): "--reject and --multi cannot be given together; --multi rejects, too.",
    ("context", "head"): "--context needs labels; a head has no texts to put into a context.",
    ("multi", "min-confidence"): "--min-confidence is of scores that are shared out; with --multi, "
    "--threshold.",
}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "own.head"
    with ZeroShotClassifier.open() as classifier:
        names = ("cat", "castle", "crab")
        images = classifier.embed_images([PHOTOS / f"{name}.jpg" for name in names])
        classifier.set_labels(names)
        model = classifier.bundle.manifest.model
        texts = classifier.bank.embeddings
        fit_head(
            np.concatenate([images, images]), [0, 1, 2] * 2, names, space=model.embedding_space,
            zero_shot=texts, scale=model.scale,
        ).save(path)  # fmt: skip
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids=" ".join)
def test_every_pair_works_or_is_refused(run: Command, head: Path, pair: tuple[str, str]) -> None:
    arguments: list[Any] = [each for name in pair for each in OPTIONS[name]]
    if "head" in pair:
        arguments.insert(arguments.index("--head") + 1, head)
    else:
        arguments += ["--labels", ",".join(NAMES)]
    done = run("classify", *PICTURES, *arguments, "--jsonl")
    refusal = REFUSED.get(pair)
    if refusal is not None:
        assert (done.code, done.out) == (2, "")
        assert done.err.endswith(f"Error: {refusal}\n")
        return
    assert (done.code, done.err) == (0, "")
    cat, koala = (json.loads(line) for line in done.out.splitlines())
    asked = set(pair)
    assert cat["predictions"][0]["label"] == "cat"
    kinds = {"multi": "class-cosines" if "head" in asked else "negatives", "head": "linear"}
    kind = next((kinds[name] for name in ("multi", "head") if name in asked), "softmax")
    for said in (cat, koala):
        assert said["score_kind"] == kind
        assert ("rejected" in said) == ("rejection" in said) == bool(asked & {"reject", "multi"})
        assert len(said["predictions"]) <= (2 if "top-k" in asked else 3)
        if "min-confidence" in asked:
            assert all(each["score"] >= 0.5 for each in said["predictions"])
        if "multi" in asked:
            assert all(each["score"] >= said["rejection"]["threshold"] for each in said["predictions"])
    if asked & {"reject", "multi"}:
        assert not cat["rejected"]
        assert koala["rejected"]
        assert koala["predictions"] == []


def test_multi_gives_no_more_than_asked_for(run: Command) -> None:
    everything = ("--labels", "cat,dog,pet,car,house,tree,sky", "--multi", "--threshold", "-99", "--jsonl")
    for top_k in (1, 5, 7):
        said = json.loads(run("classify", PICTURES[0], *everything, "--top-k", top_k).out)
        assert len(said["predictions"]) == top_k
