"""``edgeclip heads``: fitting the temperature of a label bank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import Command
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.heads import temperature_head
from edgeclip.tensors import read_tensors, write_tensors


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder a colour: 64 pictures, one in eight of which shows another colour."""
    folder = tmp_path_factory.mktemp("labelled")
    names = list(COLOURS)
    for number, name in enumerate(names):
        (folder / name).mkdir()
        for seed in range(8):
            shown = names[(number + 1) % len(names)] if seed == 0 else name
            Image.fromarray(colour_picture(shown, seed=seed, noise=30)).save(folder / name / f"{seed}.png")
    return folder


def test_a_dry_run_says_what_a_temperature_is_worth(run: Command, tiny_bundle: Path, labelled: Path) -> None:
    before = Bundle.open(tiny_bundle).digest
    result = run("heads", "temperature", tiny_bundle, "--data", labelled, "--json")
    assert result.code == 0
    said = json.loads(result.out)
    assert (said["schema"], said["kind"], said["bank"], said["written"]) == (
        1,
        "temperature",
        "colours",
        False,
    )
    assert (said["before"]["n"], said["labels"], said["left_out"]) == (64, 8, 0)
    assert said["scale_before"] == 20.0
    assert said["after"]["nll"] < said["before"]["nll"]
    assert said["before"]["accuracy"] == said["after"]["accuracy"] == pytest.approx(56 / 64)
    assert Bundle.open(tiny_bundle).digest == before
    shown = run("heads", "temperature", tiny_bundle, "--data", labelled)
    assert "bank 'colours': 64 pictures of 8 of its 8 labels, 87.5% right" in shown.out
    assert "nothing is written without --write" in shown.out


def test_a_stored_temperature_is_what_classify_scores_with(
    run: Command, tiny_bundle: Path, labelled: Path
) -> None:
    result = run("heads", "temperature", tiny_bundle, "--data", labelled, "--write", "--json")
    scale = json.loads(result.out)["scale"]
    bundle = Bundle.open(tiny_bundle)
    bundle.check_files()
    assert list(bundle.manifest.heads) == ["temperature-colours"]  # in place of the one that was there
    entry = bundle.manifest.heads["temperature-colours"]
    assert entry.fitted_on == f"{labelled.name}: 64 pictures of 8 labels"
    assert temperature_head(bundle, "colours").scale == pytest.approx(scale, rel=1e-6)
    _, about = read_tensors(bundle.read(entry.file), where="head")
    assert about["pictures"] == "64"
    picture = labelled / "red" / "1.png"
    predicted = json.loads(run("classify", picture, "--bundle", tiny_bundle, "--json", "--top-k", 8).out)
    rows = predicted["results"][0]["predictions"]
    logits = scale * np.array([row["similarity"] for row in rows])
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-3)


def test_other_heads_stay(run: Command, tiny_bundle: Path, labelled: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        heads = writer.manifest["heads"]
        file = writer.add("heads/other.safetensors", write_tensors({"scale": np.array([7], np.float32)}))
        heads["other"] = {"kind": "temperature", "file": file}
        heads["reject"] = {"kind": "reject", "file": file, "bank": "colours"}
        writer.commit()
    assert run("heads", "temperature", tiny_bundle, "--data", labelled, "--write").code == 0
    assert set(Bundle.open(tiny_bundle).manifest.heads) == {"other", "reject", "temperature-colours"}


def test_what_does_not_help_is_not_written(run: Command, tiny_bundle: Path, labelled: Path) -> None:
    assert run("heads", "temperature", tiny_bundle, "--data", labelled, "--write").code == 0
    digest = Bundle.open(tiny_bundle).digest
    again = run("heads", "temperature", tiny_bundle, "--data", labelled, "--write")
    assert again.code == 3
    assert "not better on held-out pictures, so nothing is written" in again.out
    assert Bundle.open(tiny_bundle).digest == digest


def test_errors(run: Command, tiny_bundle: Path, labelled: Path, tmp_path: Path) -> None:
    few = run("heads", "temperature", tiny_bundle, "--data", labelled, "--limit", "20")
    assert few.code == 1
    assert "got 20 labelled pictures, expected at least 50" in few.err
    other = run("heads", "temperature", tiny_bundle, "--data", labelled, "--bank", "pets")
    assert other.code == 1
    assert "has no label bank 'pets', expected one of 'colours'" in other.err
    shared = run("heads", "temperature", "default", "--data", labelled, "--write")
    assert shared.code == 1
    assert "bundle 'default' is part of the installation" in shared.err
    folder = tmp_path / "mauve"
    folder.mkdir()
    Image.fromarray(colour_picture("red")).save(folder / "a.png")
    unknown = run("heads", "temperature", tiny_bundle, "--data", tmp_path)
    assert unknown.code == 1
    assert "has the label 'mauve', which is not in the bank 'colours'" in unknown.err
