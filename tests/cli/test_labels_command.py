"""``edgeclip labels``: building, continuing, inspecting."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import Command

from edgeclip.bundle import Bundle
from edgeclip.labels import LabelBank


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def build(run: Command, tiny_bundle_session: Path):
    return lambda *arguments: run("labels", "build", "--bundle", tiny_bundle_session, *arguments)


def test_build_and_inspect(build, run: Command, tiny_bundle_session: Path, tmp_path: Path) -> None:
    output = tmp_path / "bank.safetensors"
    result = build("--labels", "red|crimson,blue,green", "--templates", "openai-7", "-o", output)
    assert result.code == 0
    assert result.out == f"3 labels × 16 dimensions, templates 'openai-7' in {output}\n"
    bank = LabelBank.open(output)
    assert bank.names == ("red", "blue", "green")
    assert bank.labels.labels[0].synonyms == ("crimson",)
    assert bank.space == Bundle.open(tiny_bundle_session).manifest.model.embedding_space
    shown = run("labels", "inspect", output)
    assert "labels: red, blue, green" in shown.out
    document = json.loads(run("labels", "inspect", output, "--json").out)
    assert (document["schema"], document["embed_dim"], document["templates"]["name"]) == (1, 16, "openai-7")
    similarity = bank.embeddings @ bank.embeddings.T
    expected = sorted((float(similarity[a, b]) for a, b in ((0, 1), (0, 2), (1, 2))), reverse=True)
    assert [pair["similarity"] for pair in document["closest"]] == pytest.approx(expected, abs=1e-5)


def test_half_precision_is_half_the_size(build, tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        assert (
            build("--labels", "red,blue", "--dtype", dtype, "-o", tmp_path / f"{dtype}.safetensors").code == 0
        )
    half, full = (LabelBank.open(tmp_path / f"{dtype}.safetensors") for dtype in ("float16", "float32"))
    np.testing.assert_allclose(half.embeddings, full.embeddings, atol=5e-4)
    assert (tmp_path / "float16.safetensors").stat().st_size < (
        tmp_path / "float32.safetensors"
    ).stat().st_size


def test_building_again_encodes_nothing(
    build, run: Command, tiny_bundle_session: Path, tmp_path: Path
) -> None:
    from edgeclip.classify import ZeroShotClassifier

    labels = ",".join(f"label {number}" for number in range(50))
    assert "in the cache of this host" in build("--labels", labels).out
    with ZeroShotClassifier.open(tiny_bundle_session) as classifier:
        classifier.set_labels(labels.split(","))
        assert classifier.text_tower_runs == 0


def test_many_close_labels(build, run: Command, tmp_path: Path) -> None:
    output = tmp_path / "bank.safetensors"
    build("--labels", ",".join(f"label {number}" for number in range(1500)), "-o", output)
    bank = LabelBank.open(output)
    similarity = bank.embeddings @ bank.embeddings.T
    best = np.sort(similarity[np.triu_indices(len(bank), 1)])[-5:][::-1]
    closest = json.loads(run("labels", "inspect", output, "--json").out)["closest"]
    assert [pair["similarity"] for pair in closest] == pytest.approx(best.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give --labels or --label-file"),
        (["--labels", "a", "-o", "x.npy"], 2, "does not end in .safetensors"),
        (["--labels", "a", "-o", "/none/x.safetensors"], 1, "cannot be written"),
        (["--label-file", "/none.txt"], 1, "cannot be read"),
    ],
)
def test_refusals(build, arguments: list[str], code: int, message: str) -> None:
    result = build(*arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_inspecting_what_is_no_bank(run: Command, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    result = run("labels", "inspect", tmp_path / "x.safetensors")
    assert (result.code, result.out) == (1, "")
    assert "x.safetensors" in result.err
