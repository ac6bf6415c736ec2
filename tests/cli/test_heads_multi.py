"""``edgeclip heads multi``: fitting the threshold of a bank's labels."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from command import Command
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.multi import METHOD, multi_gate
from edgeclip.tensors import write_tensors


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a table of pictures with two colours, one in each half."""
    folder = tmp_path_factory.mktemp("several")
    with (folder / "several.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label"])
        for seed in (0, 1):
            for left, right in itertools.permutations(COLOURS, 2):
                halves = [colour_picture(name, seed=seed, noise=20) for name in (left, right)]
                half = halves[0].shape[1] // 2
                picture = np.concatenate([halves[0][:, :half], halves[1][:, half:]], axis=1)
                name = f"{left}-{right}-{seed}.png"
                Image.fromarray(picture).save(folder / name)
                rows.writerow([name, f"{left}|{right}"])
    return folder / "several.csv"


def test_a_new_threshold_takes_the_place_of_every_other_of_the_bank(
    run: Command, tiny_bundle: Path, table: Path
) -> None:
    with BundleWriter(tiny_bundle) as writer:
        old = write_tensors({"threshold": np.array([9.0], np.float32)}, {"method": METHOD})
        file = writer.add("heads/older.safetensors", old)
        writer.manifest["heads"]["by-hand"] = {"kind": "reject", "file": file, "bank": "colours"}
        writer.commit()
    said = run("heads", "multi", tiny_bundle, "--data", table, "--write")
    assert said.code == 0, said.err
    assert f"stored in {tiny_bundle}" in said.out
    bundle = Bundle.open(tiny_bundle)
    assert [name for name, each in bundle.manifest.heads.items() if each.kind == "reject"] == [
        "multi-colours"
    ]
    gate = multi_gate(bundle, "colours")
    assert gate is not None
    assert gate.threshold < 9


def test_a_threshold_is_fitted_stored_and_used(run: Command, tiny_bundle: Path, table: Path) -> None:
    dry = run("heads", "multi", tiny_bundle, "--data", table)
    assert "112 pictures, 2 of 8 labels each" in dry.out
    result = run("heads", "multi", tiny_bundle, "--data", table, "--write", "--json")
    said = json.loads(result.out)
    assert (said["schema"], said["kind"], said["bank"], said["pictures"]) == (1, "multi", "colours", 112)
    if not said["improves"]:  # the tower of the tests is too weak to tell: then nothing may be written
        assert (result.code, said["written"]) == (3, False)
        pytest.fail(f"two colours are not told: {said['f1']}, first alone {said['first_alone']}")
    assert result.code == 0
    assert dry.code == 0
    assert "nothing is written without --write" in dry.out
    bundle = Bundle.open(tiny_bundle)
    bundle.check_files()
    assert bundle.manifest.heads["multi-colours"].fitted_on == "several.csv: 112 pictures"
    shown = run("classify", table.parent / "red-blue-0.png", "--bundle", tiny_bundle, "--multi", "--json")
    document = json.loads(shown.out)
    assert document["score_kind"] == "standardized"
    (picture,) = document["results"]
    assert picture["rejection"]["threshold"] == pytest.approx(said["threshold"], rel=1e-5)
    assert all(each["score"] >= said["threshold"] - 1e-5 for each in picture["predictions"])
    assert run("heads", "multi", tiny_bundle, "--data", table, "--write").code == 0  # in place of the first
    assert [each for each in Bundle.open(tiny_bundle).manifest.heads if "multi" in each] == ["multi-colours"]


def test_errors(run: Command, tiny_bundle: Path, table: Path) -> None:
    single = table.with_name("single.csv")
    single.write_text(table.read_text(encoding="utf-8").replace("|", " "), encoding="utf-8")
    unknown = run("heads", "multi", tiny_bundle, "--data", single)
    assert unknown.code == 1
    assert "which is not in the bank 'colours'" in unknown.err
    other = run("heads", "multi", tiny_bundle, "--data", table, "--bank", "pets")
    assert other.code == 1
    assert "no label bank 'pets', expected one of 'colours'" in other.err
    shared = run("heads", "multi", "default", "--data", table, "--write")
    assert shared.code == 1
    assert "part of the installation" in shared.err
    few = run("heads", "multi", tiny_bundle, "--data", table, "--limit", "20")
    assert few.code == 1
    assert "got 20 pictures" in few.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--reject", "--multi"), "cannot be given together"),
        (("--threshold", "0.3"), "needs --reject or --multi"),
        (("--multi", "--min-confidence", "0.5"), "with --multi, --threshold"),
        (("--head", "x", "--labels", "cat"), "leave out labels"),
        (("--head", "x", "--context", "on snow"), "--context needs labels"),
    ],
)
def test_what_cannot_be_asked_together(run: Command, options: tuple[str, ...], said: str) -> None:
    result = run("classify", "picture.jpg", *options)
    assert result.code == 2
    assert said in result.err
