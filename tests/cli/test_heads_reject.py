"""``edgeclip heads reject``: fitting the head that gives no label to what none fits."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.bundle import Bundle
from edgeclip.cli.heads_reject import reject
from edgeclip.errors import EdgeClipError
from edgeclip.reject import read_background, read_reject_head


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder a colour, of eight pictures each."""
    folder = tmp_path_factory.mktemp("labelled")
    for name in COLOURS:
        (folder / name).mkdir()
        for seed in range(8):
            Image.fromarray(colour_picture(name, seed=seed, noise=30)).save(folder / name / f"{seed}.png")
    return folder


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """Return a label file of general names: the colours and others."""
    path = tmp_path / "general.txt"
    path.write_text("\n".join([*COLOURS, "night", "snow", "sky", "fire", "grass"]), encoding="utf-8")
    return path


def run(*words: object) -> Result:
    result = CliRunner().invoke(reject, [str(word) for word in words], standalone_mode=False)
    if result.exception is not None and not isinstance(
        result.exception, EdgeClipError | click.ClickException
    ):
        raise result.exception
    return result


def test_a_head_is_fitted_stored_and_used(tiny_bundle: Path, labelled: Path, general: Path) -> None:
    before = Bundle.open(tiny_bundle).digest
    dry = run(tiny_bundle, "--data", labelled, "--background", general)
    assert "64 pictures of 8 labels" in dry.output
    assert "nothing is written without --write" in dry.output
    assert Bundle.open(tiny_bundle).digest == before
    result = run(tiny_bundle, "--data", labelled, "--background", general, "--write", "--json")
    said = json.loads(result.stdout)
    assert (said["schema"], said["kind"], said["method"], said["pictures"]) == (1, "reject", "negatives", 64)
    assert (result.return_value, said["written"]) == (0, True)
    assert said["auroc"]["5"]["gate"] > said["auroc"]["5"]["softmax"]
    assert [each["offered"] for each in said["rates"]] == [1, 2, 5]
    bundle = Bundle.open(tiny_bundle)
    bundle.check_files()
    head, background = read_reject_head(bundle), read_background(bundle)
    assert head.threshold == pytest.approx(said["threshold"], rel=1e-6)
    assert head.together == pytest.approx(said["together"], rel=1e-6)
    assert f"threshold {said['together'][0]:.2f} for 1, {said['together'][1]:.2f} for 2" in dry.output
    assert background.names[-2:] == ("fire", "grass")
    assert bundle.manifest.heads["reject"].fitted_on == f"{labelled.name}: 64 pictures of 8 labels"
    again = run(tiny_bundle, "--data", labelled, "--write", "--json")  # with the background that is there now
    assert json.loads(again.stdout)["threshold"] == pytest.approx(said["threshold"], abs=0.05)
    assert len(read_background(Bundle.open(tiny_bundle))) == len(background)


def test_denials_are_a_method_that_says_what_it_is_worth(tiny_bundle: Path, labelled: Path) -> None:
    result = run(tiny_bundle, "--data", labelled, "--method", "no", "--denial", "no {}", "--write", "--json")
    said = json.loads(result.stdout)
    assert said["method"] == "no"
    assert said["written"] == (result.return_value == 0)
    bundle = Bundle.open(tiny_bundle)
    if said["written"]:
        assert read_reject_head(bundle).templates == ("no {}",)
    else:
        assert "reject" not in bundle.manifest.heads


def test_a_head_keeps_the_rows_of_the_one_it_replaces(tmp_path: Path, repo: Path) -> None:
    import shutil

    from edgeclip.cli.heads_reject import _with_rows_of
    from edgeclip.reject import RejectHead

    shutil.copytree(Bundle.open("default").path, tmp_path / "copy")
    opened = Bundle.open(tmp_path / "copy")
    head = _with_rows_of(opened, RejectHead(weight=0.5))
    before = read_reject_head(opened)
    assert head.weight == 0.5
    assert (head.bank_rows == before.bank_rows).all()  # type: ignore[union-attr]
    assert head.more is before.more


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "20"], "got 20 pictures of .* names, expected at least 50 and 6"),
        (["--denial", "no {}"], "--denial: only --method no has denials"),
        (["--method", "no", "--denial", "nothing"], "expected exactly one {}"),
        (["--method", "no", "--background", "general.txt"], "--background: --method no compares labels"),
        (["--false-accepts", "1.5"], "1.5 is not in the range"),
        (["--background", "missing.txt"], "label file 'missing.txt' cannot be read"),
    ],
)
def test_errors(tiny_bundle: Path, labelled: Path, words: list[str], said: str) -> None:
    result = run(tiny_bundle, "--data", labelled, *words)
    assert result.exception is not None
    with pytest.raises(type(result.exception), match=said):
        raise result.exception


def test_the_embedded_bundle_is_not_written(labelled: Path) -> None:
    result = run("default", "--data", labelled, "--write")
    assert "bundle 'default' is part of the installation" in str(result.exception)
