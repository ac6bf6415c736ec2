"""``edgeclip index`` and ``edgeclip search``: what they print, and how they end."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import Command
from PIL import Image
from tiny_bundle import COLOURS, colour_picture, make_tiny_bundle

from edgeclip.index_file import PictureIndex

OLD_NS = 1_700_000_000_000_000_000


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in COLOURS:
        path = folder / f"{name}.png"
        Image.fromarray(colour_picture(name)).save(path)
        os.utime(path, ns=(OLD_NS, OLD_NS))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tiny_bundle_session: Path) -> Any:
    command = Command(capsys)
    return lambda name, *rest: command(name, *rest, "--bundle", tiny_bundle_session, "--threads", 1)


def edgeclip(*arguments: object, **more: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edgeclip", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **more)


# --- index -------------------------------------------------------------------------------------------------


def test_index_says_what_it_did(run, photos: Path) -> None:
    first = run("index", photos)
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith(f"8 pictures in {photos}/.edgeclip-index: 8 embedded (")
    (photos / "red.png").rename(photos / "rose.png")
    (photos / "blue.png").unlink()
    second = run("index", photos)
    assert f"7 pictures in {photos}/.edgeclip-index: 1 moved or copied, 2 removed (" in second.out
    assert "7 pictures in" in (third := run("index", photos)).out
    assert ": nothing new (" in third.out


def test_index_as_json(run, photos: Path) -> None:
    (photos / "bad.png").write_bytes(b"x")
    (photos / os.fsdecode(b"bad-\xe9.png")).write_bytes(b"x")
    result = run("index", photos, "--json")
    assert result.code == 1
    document = json.loads(result.out)
    assert document["schema"] == 1
    assert (document["pictures"], document["embedded"], document["variant"]) == (8, 8, "onnx-int8")
    assert list(document["unreadable"]) == document["failed_now"] == [r"bad-\xe9.png", "bad.png"]
    assert rf"error: '{photos}/bad-\xe9.png': begins with b'x'" in result.err
    assert f"error: '{photos}/bad.png': begins with b'x'" in result.err


def test_a_broken_picture_is_said_once(run, photos: Path) -> None:
    bad = photos / "bad.png"
    bad.write_bytes(b"x")
    os.utime(bad, ns=(OLD_NS, OLD_NS))
    assert run("index", photos).code == 1
    again = run("index", photos)
    assert (again.code, again.err) == (0, "")
    assert "1 unreadable" in again.out
    assert run("index", photos, "--verify").code == 1


def test_a_folder_that_cannot_be_listed_is_a_warning(
    run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "inner").mkdir()
    (photos / "red.png").rename(photos / "inner" / "red.png")
    run("index", photos)
    listed = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "inner":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("edgeclip.data.os.scandir", refuse)
    said = f"edgeclip: warning: folder '{photos}/inner' cannot be listed (Permission denied)"
    kept, rebuilt = run("index", photos), run("index", photos, "--rebuild")
    assert (kept.code, kept.err) == (0, f"{said}; what the index has of it stays\n")
    assert kept.out.startswith("8 pictures")
    assert (rebuilt.code, rebuilt.err) == (0, f"{said}\n")
    assert rebuilt.out.startswith("7 pictures")


def test_index_keeps_the_variant_it_was_made_with(run, photos: Path) -> None:
    assert run("index", photos, "--variant", "onnx-fp32").code == 0
    assert run("index", photos).code == 0  # auto would be int8
    assert PictureIndex(photos / ".edgeclip-index").made_with.variant == "onnx-fp32"
    refused = run("index", photos, "--variant", "onnx-int8")
    assert refused.code == 1
    assert "their embeddings do not mix" in refused.err
    assert run("index", photos, "--rebuild").code == 0
    assert PictureIndex(photos / ".edgeclip-index").made_with.variant == "onnx-int8"


def test_a_damaged_index_is_repaired_with_a_word(run, photos: Path) -> None:
    run("index", photos)
    path = photos / ".edgeclip-index"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    refused = run("search", "red", photos)
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert "damaged" in refused.err
    assert "edgeclip index" in refused.err
    repaired = run("index", photos)
    assert repaired.code == 0
    assert "repaired: picture index" in repaired.err
    assert run("search", "red", photos).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "there is no such folder"),
        (["photos/red.png"], "is no folder"),
        (["photos", "-o", "photos/red.png"], "is there and no picture index, so it is not replaced"),
        (["photos", "-o", "none/index"], "cannot be written"),
    ],
)
def test_index_refusals(
    run, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(photos.parent)
    result = run("index", *arguments)
    assert result.code == 1
    assert message in result.err


def test_no_pictures(run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("index", tmp_path / "empty")
    assert (result.code, result.err) == (0, "edgeclip: no pictures found\n")
    assert run("search", "red", tmp_path / "empty").err == "edgeclip: the index holds no pictures\n"


def test_ctrl_c_ends_with_130_and_the_work_is_kept(tiny_bundle_session: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(2000):
        Image.fromarray(colour_picture("red", seed=seed)).save(folder / f"{seed:04}.png")
    journal = folder / ".edgeclip-index.journal"
    command = [sys.executable, "-m", "edgeclip", "index", str(folder), "--bundle", str(tiny_bundle_session)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and (not journal.exists() or journal.stat().st_size < 5000):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert [line for line in err.splitlines() if line] == [
        "edgeclip: what is indexed so far is kept: the same command goes on",
        "edgeclip: interrupted",
    ]
    result = edgeclip("index", folder, "--bundle", tiny_bundle_session, "--json")
    document = json.loads(result.stdout)
    assert document["pictures"] == 2000
    assert document["resumed"] > 10
    assert document["embedded"] + document["resumed"] == 2000


# --- search ------------------------------------------------------------------------------------------------


def test_paths_one_a_line_for_pipes(run, photos: Path, tiny_bundle_session: Path) -> None:
    run("index", photos)
    result = run("search", "red", photos, "--top-k", 2)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == f"{photos}/red.png"
    assert len(lines) == 2
    assert "8 pictures are too few to tell what stands out" in result.err
    null = edgeclip("search", "red", "--top-k", 2, "-0", "--bundle", tiny_bundle_session, cwd=photos)
    assert null.stdout.split(b"\0")[0] == b"red.png"
    assert null.stdout.endswith(b"\0")


def test_a_table_for_people(run, photos: Path) -> None:
    run("index", photos)
    result = run("search", "red", photos, "--top-k", 2, "--table")
    lines = result.out.splitlines()
    assert lines[0].split() == ["cosine", "picture"]
    assert lines[1].endswith(f"{photos}/red.png")


def test_forms_for_programs(run, photos: Path) -> None:
    run("index", photos)
    document = json.loads(run("search", "red|green", photos, "--json", "--top-k", 3).out)
    assert document["schema"] == 1
    assert (document["score_kind"], document["query_kind"], document["pictures"]) == ("cosine", "words", 8)
    assert document["cutoff"] is None
    assert {Path(row["path"]).stem for row in document["results"][:2]} == {"red", "green"}
    rows = [json.loads(line) for line in run("search", "red", photos, "--jsonl").out.splitlines()]
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert all(row["schema"] == 1 for row in rows)
    table = list(csv.reader(io.StringIO(run("search", "red", photos, "--csv", "--top-k", 1).out)))
    assert table[0] == ["path", "rank", "similarity", "relevance"]
    assert table[1][:2] == [f"{photos}/red.png", "1"]


def test_a_picture_as_query(run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("index", photos, "-o", tmp_path / "index")
    other = tmp_path / "reddish.png"
    Image.fromarray(colour_picture("red", seed=4)).save(other)
    found = run("search", other, tmp_path / "index", "--top-k", 1)
    assert (found.code, found.out, found.err) == (0, f"{photos}/red.png\n", "")
    monkeypatch.chdir(tmp_path)
    itself = run("search", "photos/red.png", "index", "--top-k", 8).out.splitlines()
    assert len(itself) == 7
    assert "photos/red.png" not in itself
    assert "photos/blue.png" in itself


def test_a_picture_of_the_index_is_found_by_its_path_there_without_the_image_tower(
    run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("index", photos)
    here = run("search", photos / "red.png", photos, "-k", 3)

    def refuse(*rest: Any, **more: Any) -> None:
        raise AssertionError("its embedding is in the index")

    monkeypatch.setattr("edgeclip.classify.ZeroShotClassifier.open", refuse)
    monkeypatch.chdir(photos.parent.parent)
    assert run("search", "red.png", photos, "-k", 3).out == here.out != ""


def test_a_folder_below_is_searched_in_the_index_above(run, photos: Path, monkeypatch) -> None:
    inner = photos / "2024" / "inner"
    inner.mkdir(parents=True)
    for name in ("red", "blue"):
        (photos / f"{name}.png").rename(inner / f"{name}.png")
    (photos / "empty").mkdir()
    run("index", photos)
    found = run("search", "red", inner.parent, "--json")
    document = json.loads(found.out)
    assert [row["path"] for row in document["results"]] == [f"{inner}/red.png", f"{inner}/blue.png"]
    assert (document["pictures"], document["index"]) == (2, f"{photos}/.edgeclip-index")
    assert [row["rank"] for row in document["results"]] == [1, 2]
    monkeypatch.chdir(inner)
    assert run("search", "red", "-k", 1).out == "red.png\n"
    assert run("search", "red.png").out == "blue.png\n"
    assert "no pictures of empty/" in run("search", "red", photos / "empty").err
    assert "has a cosine of 1" in run("search", "red", "--min-score", 1).err


def test_more_is_said_only_where_more_is_relevant(run, repo: Path, tmp_path: Path, capsys) -> None:
    command, index = Command(capsys), tmp_path / "index"
    assert command("index", repo / "edgeclip" / "assets" / "photos", "-o", index).code == 0
    assert command("search", "cat", index, "-k", 1).err == ""
    assert json.loads(command("search", "animal", index, "-k", 1, "--json").out)["more"] is True
    assert json.loads(command("search", "cat", index, "-k", 1, "--json").out)["more"] is False
    said = command("search", "animal", index, "-k", 1)
    assert said.err == "edgeclip: more pictures are relevant than these: --top-k gives them\n"


def test_least_cosine_and_everything(run, photos: Path) -> None:
    run("index", photos)
    rows = json.loads(run("search", "red", photos, "--json", "--all").out)["results"]
    assert len(rows) == 8
    least = rows[1]["similarity"] - 1e-4
    assert len(run("search", "red", photos, "--min-score", least).out.splitlines()) == 2
    nothing = run("search", "red", photos, "--min-score", 1)
    assert (nothing.code, nothing.out) == (0, "")
    assert nothing.err == "edgeclip: nothing in 8 pictures has a cosine of 1\n"


def test_pictures_that_are_gone_are_said(run, photos: Path) -> None:
    run("index", photos)
    (photos / "red.png").unlink()
    result = run("search", "red", photos, "--top-k", 1)
    assert result.out == f"{photos}/red.png\n"
    assert "1 of these are no longer there" in result.err


def test_odd_names_come_out_as_they_are(run, photos: Path, tiny_bundle_session: Path) -> None:
    odd = os.fsdecode(b"line\nfeed-\xe9.png")
    (photos / "red.png").rename(photos / odd)
    run("index", photos)
    plain = edgeclip("search", "red", photos, "--top-k", 1, "-0", "--bundle", tiny_bundle_session)
    assert plain.stdout == os.fsencode(photos / odd) + b"\0"
    said = json.loads(run("search", "red", photos, "--top-k", 1, "--json").out)
    assert said["results"][0]["path"].endswith(r"line\nfeed-\xe9.png")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["red", "none"], 1, "there is none. Make it with `edgeclip index DIR`"),
        (["red", "photos/red.png"], 1, "cannot be read as safetensors"),
        (["none.png", "photos"], 1, "'none.png': no such picture"),
        (["", "photos"], 1, "says nothing, expected words"),
        (["red", "photos", "--all", "--min-score", "0.3"], 2, "--all and --min-score"),
        (["photos", "red"], 2, "the query comes first: edgeclip search 'red' 'photos'"),
        (["./photos", "photos"], 1, "'./photos' is a folder, expected words or the path of a picture"),
        (["photos/red.png", "photos", "--language", "en"], 2, "are for words; the query is a picture"),
        (["red", "photos", "--language", "fr"], 1, "brings no labels in language 'fr'"),
    ],
)
def test_search_refusals(
    run, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    run("index", photos)
    monkeypatch.chdir(photos.parent)
    result = run("search", *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_another_bundle_is_refused(run, photos: Path, tmp_path: Path, capsys) -> None:
    run("index", photos)
    make_tiny_bundle(tmp_path / "other", seed=1)
    result = Command(capsys)("search", "red", photos, "--bundle", tmp_path / "other")
    assert result.code == 1
    assert "was made with model 'tiny-colours'" in result.err


def test_the_embedded_bundle_finds_what_photographs_show(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, index = Command(capsys), tmp_path / "index"
    photos = repo / "edgeclip" / "assets" / "photos"
    assert command("index", photos, "-o", index).code == 0
    for words, names in (("a cat", ["cat"]), ("猫", ["cat"]), ("castle", ["castle"]), ("a red car", [])):
        result = command("search", words, index)
        assert [Path(line).stem for line in result.out.splitlines()] == names, words
        assert result.code == 0
    assert "nothing in 16 pictures shows 'a red car' by its cut-off" in result.err
    document = json.loads(command("search", "castle", index, "--json").out)
    assert document["cutoff"]["method"] == "background"
    assert document["results"][0]["relevance"] > 0.9
