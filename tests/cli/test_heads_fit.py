"""``edgeclip heads fit``, ``add`` and ``remove``: from folders of pictures to predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import Command
from PIL import Image
from tiny_bundle import COLOURS, colour_picture, make_tiny_bundle

from edgeclip.bundle import Bundle
from edgeclip.few_shot import FewShotHead, read_head

NAMES = list(COLOURS)[:4]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def draw(folder: Path, shown: str, count: int, *, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        Image.fromarray(colour_picture(shown, seed=seed, noise=30)).save(folder / f"{seed}.png")


@pytest.fixture(scope="module")
def swapped_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder a class, 6 pictures each, in which words mislead: each name shows the next colour."""
    folder = tmp_path_factory.mktemp("swapped")
    for number, name in enumerate(NAMES):
        draw(folder / name, NAMES[(number + 1) % len(NAMES)], 6)
    return folder


@pytest.fixture
def swapped(swapped_session: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swapped_session, tmp_path / "swapped"))


def test_pictures_overrule_names(run: Command, tiny_bundle: Path, swapped: Path, tmp_path: Path) -> None:
    path = tmp_path / "my.head"
    result = run("heads", "fit", swapped, "-o", path, "--bundle", tiny_bundle, "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert (said["schema"], said["kind"], said["left_out"]) == (1, "few-shot fit", 0)
    assert said["classes"] == [{"name": name, "pictures": 6} for name in sorted(NAMES)]
    held_out = said["held_out"]
    assert held_out["pictures"] == 24
    assert held_out["zero_shot"]["accuracy"] < 0.2
    assert held_out["accuracy"] > 0.9
    assert held_out["interval"][0] < held_out["accuracy"] <= held_out["interval"][1]
    shown = tmp_path / "shown"
    draw(shown, NAMES[1], 1, first=99)
    predicted = run("classify", shown, "--bundle", tiny_bundle, "--head", path, "--json", "--top-k", 4)
    rows = json.loads(predicted.out)["results"][0]["predictions"]
    assert rows[0]["label"] == NAMES[0]
    assert sum(row["score"] for row in rows) == pytest.approx(1)


def test_what_is_said_to_people(run: Command, tiny_bundle: Path, swapped: Path, tmp_path: Path) -> None:
    (swapped / NAMES[0] / "broken.png").write_bytes(b"\x89PNG no more")
    path = tmp_path / "my.head"
    result = run("heads", "fit", swapped, "-o", path, "--bundle", tiny_bundle)
    assert result.code == 0
    first, second, third, last = result.out.splitlines()
    assert first == "4 classes, 24 pictures, 6 a class; 1 left out"
    assert second.startswith("held out in 5 parts, 24 pictures: ")
    assert third.startswith("by the names alone: ")
    assert last == f"{path}: {path.stat().st_size / 1000:,.0f} kB; classify with --head {path}"
    dry = run("heads", "fit", swapped, "--bundle", tiny_bundle, "--shots", "1")
    assert "4 classes, 4 pictures, 1 a class" in dry.out
    assert "every class has one picture, so that none can be held out" in dry.out
    assert "nothing is written without -o or --write" in dry.out


def test_the_same_pictures_give_the_same_bytes(
    run: Command, tiny_bundle: Path, swapped: Path, tmp_path: Path
) -> None:
    for name in ("a.head", "b.head"):
        asked = ("heads", "fit", swapped, "-o", tmp_path / name, "--bundle", tiny_bundle, "--shots", "4")
        assert run(*asked).code == 0
    assert (tmp_path / "a.head").read_bytes() == (tmp_path / "b.head").read_bytes()
    assert run("heads", "fit", swapped, "-o", tmp_path / "c.head", "--bundle", tiny_bundle).code == 0
    assert FewShotHead.open(tmp_path / "c.head").statistics.counts.tolist() == [6] * 4


def test_classes_come_and_go(run: Command, tiny_bundle: Path, swapped: Path, tmp_path: Path) -> None:
    whole, grown = tmp_path / "whole.head", tmp_path / "grown.head"
    assert run("heads", "fit", swapped, "-o", whole, "--bundle", tiny_bundle).code == 0
    last = sorted(NAMES)[-1]
    later = tmp_path / "later"
    later.mkdir()
    shutil.move(swapped / last, later / last)
    assert run("heads", "fit", swapped, "-o", grown, "--bundle", tiny_bundle).code == 0
    shorter = grown.read_bytes()
    shutil.rmtree(swapped)
    added = run("heads", "add", later, "--to", grown, "--bundle", tiny_bundle)
    assert added.code == 0, added.err
    assert f"added: {last!r} 6 pictures (new)\n4 classes, 24 pictures, 6 a class" in added.out
    assert grown.read_bytes() == whole.read_bytes()
    assert "already" not in added.err
    twice = run("heads", "add", later, "--to", grown, "-o", tmp_path / "twice.head", "--bundle", tiny_bundle)
    assert f"6 of these pictures seem to be in {str(grown)!r} already and will count twice" in twice.err
    kept = tmp_path / "kept.head"
    removed = run("heads", "remove", last, "--from", grown, "-o", kept, "--json")
    assert json.loads(removed.out)["removed"] == last
    assert kept.read_bytes() == shorter
    assert grown.read_bytes() == whole.read_bytes()
    unknown = run("heads", "remove", "mauve", "--from", grown)
    assert unknown.code == 1
    assert "has no class 'mauve', expected one of " in unknown.err


def test_names_say_what_folders_show(run: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    for number, name in enumerate(NAMES[:3]):
        draw(tmp_path / "data" / str(number), name, 3)
    asked = ("heads", "fit", tmp_path / "data", "--bundle", tiny_bundle, "--json")
    plain = run(*asked)
    assert "the class name '0' says little to a model" in plain.err
    without = json.loads(run(*asked, "--no-zero-shot").out)
    assert without["settings"]["method"] == "gda"
    assert without["held_out"]["zero_shot"] is None
    names = tmp_path / "names.txt"
    names.write_text(f"0={NAMES[0]}\n1={NAMES[1]}\n2={NAMES[1]}\n", encoding="utf-8")
    said = json.loads(run(*asked, "--names", names).out)
    assert said["classes"] == [{"name": NAMES[0], "pictures": 3}, {"name": NAMES[1], "pictures": 6}]
    names.write_text(json.dumps({"7": "x"}), encoding="utf-8")
    assert "a name is given for '7', but" in run(*asked, "--names", names).err
    names.write_text("just words\n", encoding="utf-8")
    assert "got the line 'just words', expected 'folder=name'" in run(*asked, "--names", names).err
    names.write_text('{"0": "a", "0": "b"}', encoding="utf-8")
    assert "folder '0' is named twice" in run(*asked, "--names", names).err


def test_a_head_in_a_bundle(run: Command, tiny_bundle: Path, swapped: Path) -> None:
    asked = ("heads", "fit", swapped, "--bundle", tiny_bundle, "--write")
    other = next(iter(Bundle.open(tiny_bundle).manifest.heads))
    assert run(*asked, "parts").code == 0
    bundle = Bundle.open(tiny_bundle)
    bundle.check_files()
    assert bundle.manifest.heads["parts"].fitted_on == "swapped: 24 pictures of 4 classes"
    head = read_head(bundle)
    assert set(head.names) == set(NAMES)
    taken = run(*asked, other)
    assert taken.code == 1
    assert "is of kind 'temperature'; take another name" in taken.err
    shared = run("heads", "fit", swapped, "--write", "parts")
    assert shared.code == 1
    assert "bundle 'default' is part of the installation" in shared.err


def test_data_that_cannot_be_used(
    run: Command, tiny_bundle: Path, swapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: object) -> str:
        result = run("heads", *arguments, "--bundle", tiny_bundle)
        assert result.code == 1
        assert result.err.count("\n") == 1
        return result.err

    assert "nowhere': no such file or folder" in said("fit", tmp_path / "nowhere")
    (swapped / "forgotten").mkdir()
    assert "forgotten' holds no pictures, expected some of the class 'forgotten'" in said("fit", swapped)
    (swapped / "forgotten").rmdir()
    assert "there is no directory 'nowhere'" in said("fit", swapped, "-o", "nowhere/my.head")
    assert "this is a directory, expected the name of a file" in said("fit", swapped, "-o", tmp_path)
    assert "'/dev/null': this is a device or pipe" in said("fit", swapped, "-o", "/dev/null")
    assert "leave out --no-zero-shot" in said("fit", swapped, "--no-zero-shot", "--method", "blend")
    single = tmp_path / "single"
    draw(single / "red", "red", 3)
    assert "holds 1 class ('red'), expected at least 2" in said("fit", single)
    (single / "_").mkdir()
    Image.new("RGB", (8, 8)).save(single / "_" / "a.png")
    monkeypatch.setattr("edgeclip.cli.heads_fit.embed_labelled", None)  # names are refused before
    assert "got the class name '', expected" in said("fit", single)
    monkeypatch.undo()
    shutil.rmtree(single / "_")
    (single / "blue").mkdir()
    (single / "blue" / "a.png").write_bytes(b"no picture")
    broken = said("fit", single, "--max-left-out", "50%")
    assert "no picture of the class 'blue' can be read" in broken
    path = tmp_path / "no.head"
    path.write_bytes(b"something else")
    assert "no.head' cannot be read as safetensors" in said("add", swapped, "--to", path)


def test_a_head_of_another_embedding_space_is_refused(
    run: Command, tiny_bundle: Path, swapped: Path, tmp_path: Path
) -> None:
    path, other = tmp_path / "my.head", tmp_path / "other"
    assert run("heads", "fit", swapped, "-o", path, "--bundle", tiny_bundle).code == 0
    before = path.read_bytes()
    make_tiny_bundle(other, seed=5)
    result = run("heads", "add", swapped, "--to", path, "--bundle", other)
    assert result.code == 1
    assert "belongs to the embedding space" in result.err
    assert path.read_bytes() == before
    classified = run("classify", swapped / NAMES[0], "--bundle", other, "--head", path)
    assert classified.code == 1
    assert "embedding space" in classified.err
