"""``edgeclip data make-shards``, ``inspect`` and ``validate``: what they print and how they end."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from command import Command
from tar_shards import make_shard, make_table, picture

pytest.importorskip("webdataset")


@pytest.fixture
def data(capsys: pytest.CaptureFixture[str]):
    command = Command(capsys)
    return lambda *arguments: command("data", *arguments)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return make_table(tmp_path / "files", 7)


def test_a_table_becomes_shards_that_are_inspected_and_valid(data, table: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    made = data("make-shards", table, "-o", shards, "--samples-per-shard", 4)
    assert (made.code, made.err) == (0, "")
    digest = made.out.rpartition("digest ")[2].strip(")\n")
    # a deflate library of another version makes pictures of another size
    first, second = (path.stat().st_size / 1000 for path in sorted(shards.glob("*.tar")))
    size = f"{first + second:.1f} kB"
    median = statistics.median(path.stat().st_size for path in table.parent.glob("*.png"))
    assert made.out == f"7 samples in 2 shards, {size}, in {shards} (0 left out, digest {digest})\n"

    again = data("make-shards", table, "-o", shards, "--samples-per-shard", 4)
    assert again.out.startswith(f"7 samples in 2 shards, 2 of them there already, {size}, in ")

    inspected = data("inspect", shards)
    assert inspected.code == 0
    assert inspected.out.splitlines() == [
        f"{shards}/shard-000000.tar: 4 samples, {first:.1f} kB (cls 4, json 4, png 4, syn.json 4, txt 4)",
        f"{shards}/shard-000001.tar: 3 samples, {second:.1f} kB (cls 3, json 3, png 3, syn.json 3, txt 3)",
        f"7 samples in 2 shards, {size}, digest {digest}",
        (
            "captions of 7 samples: alt in 7 (1.0 each), label in 7 (1.0 each), rewrite in 7 (2.0 each), "
            f"synthetic in 7 (3.0 each), zh in 7 (1.0 each); a picture has {median} bytes (median)"
        ),
        "first sample: shard-000000.tar/000000000",
        "  zh: 第0张图片",
        "  rewrite: an image, number 0",
        "  synthetic: noise 0 a",
        "  alt: picture 0",
        "  label: even",
    ]

    validated = data("validate", shards, "--workers", 2)
    assert (validated.code, validated.err) == (0, "")
    assert validated.out == (
        "7 samples: 0 broken, 0 without a caption; samples with captions: alt 7, label 7, rewrite 7, "
        "synthetic 7, zh 7; damaged files: 0\n"
    )


def test_json_documents(data, table: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    (table.parent / "002.png").write_bytes(b"x")
    made = json.loads(data("make-shards", table, "-o", shards, "--json", "--size-limit", "1MiB").out)
    assert {key: made[key] for key in ("schema", "status", "shards", "samples", "kept", "directory")} == {
        "schema": 1,
        "status": "written",
        "shards": 1,
        "samples": 6,
        "kept": 0,
        "directory": str(shards),
    }
    assert [(one["index"], one["key"]) for one in made["broken"]] == [(2, "002.png")]
    inspected = json.loads(data("inspect", shards, "--json").out)
    assert (inspected["samples"], inspected["digest"]) == (6, made["digest"])
    assert inspected["shards"][0]["extensions"]["png"] == 6
    assert inspected["looked_at"]["captions"]["synthetic"] == {"samples": 6, "mean": 3.0}
    validated = json.loads(data("validate", shards, "--json").out)
    assert validated == {
        "schema": 1,
        "ok": True,
        "samples": 6,
        "broken": [],
        "damaged": {},
        "without_caption": 0,
        "captions": {"alt": 6, "label": 6, "rewrite": 6, "synthetic": 6, "zh": 6},
    }


def test_samples_left_out_are_named_on_stderr(data, table: Path, tmp_path: Path) -> None:
    (table.parent / "002.png").write_bytes(b"x")
    made = data("make-shards", table, "-o", tmp_path / "shards")
    assert made.code == 0
    assert made.err.startswith("edgeclip: left out: 002.png: 002.png: is no picture of a known format")
    assert "6 samples in 1 shard, " in made.out
    assert "(1 left out, " in made.out


def test_samples_without_captions_are_said(data, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.png").write_bytes(picture(number))
    (tmp_path / "photos/1.txt").write_text("a text", encoding="utf-8")
    made = data("make-shards", tmp_path / "photos", "-o", tmp_path / "shards")
    assert made.code == 0
    assert made.err == (
        "edgeclip: 2 samples without any caption; training needs texts (--help says where they are looked "
        "for)\n"
    )


def test_too_many_broken_samples_end_with_one_line(data, table: Path, tmp_path: Path) -> None:
    (table.parent / "002.png").write_bytes(b"x")
    made = data("make-shards", table, "-o", tmp_path / "shards", "--max-broken", 0)
    assert (made.code, made.out) == (1, "")
    assert made.err.startswith(
        "edgeclip: error: 1 of 7 samples cannot be used, 0 are allowed; the last one is"
    )
    assert made.err.endswith("Mend them, or raise --max-broken.\n")


def test_validate_lists_what_is_broken_and_fails_above_the_limit(data, tmp_path: Path) -> None:
    good = picture(1)
    shard = make_shard(tmp_path / "s.tar", {"a.png": good, "b.png": good[:300], "c.png": b"\x1b[31m"})
    found = data("validate", shard)
    assert found.code == 1
    lines = found.out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("broken: s.tar/b: ")
    assert lines[1].startswith("broken: s.tar/c: ")
    assert lines[2] == (
        "3 samples: 2 broken, 1 without a caption; samples with captions: none; damaged files: 0"
    )
    assert data("validate", shard, "--max-broken", 2).code == 0
    assert data("validate", shard, "--max-broken", "50%").code == 0
    assert data("validate", shard, "--max-broken", "10%").code == 1


def test_validate_fails_where_a_shard_is_damaged(data, table: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    data("make-shards", table, "-o", shards)
    shard = shards / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    found = data("validate", shards, "--max-broken", "100%")
    assert found.code == 1
    assert f"damaged: {shard}: is not " in found.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "gone.tar"], "shard 'gone.tar': no such file. Check the path."),
        (["validate", "gone"], "'gone': no such file or folder. Check the path."),
        (["make-shards", "gone.csv", "-o", "out"], "'gone.csv': no such file or folder. Check the path."),
        (
            ["validate", "gone", "--max-broken", "some"],
            "limit of broken samples is 'some', expected a count such as 10 or a share such as 1%.",
        ),
    ],
)
def test_errors_are_one_line(data, arguments: list[str], message: str) -> None:
    found = data(*arguments)
    assert (found.code, found.out, found.err) == (1, "", f"edgeclip: error: {message}\n")


@pytest.mark.parametrize("size", ["big", "-1", "0", "5 XB"])
def test_sizes_that_mean_nothing_are_refused(data, size: str) -> None:
    found = data("make-shards", "x.csv", "-o", "out", f"--size-limit={size}")
    assert found.code == 2
    assert f"{size!r} is no size: expected a number of bytes, or one with KB, MB, GB" in found.err


def test_inspect_and_validate_do_not_load_torch(table: Path, tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": picture(1)})
    code = (
        "import sys; from edgeclip.cli import _run\n"
        f"codes = [_run(['data', name, {str(shard)!r}], debug=False) for name in ('inspect', 'validate')]\n"
        "assert codes == [0, 0]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_broken_file_is_named_once(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zeros").mkdir()
    (tmp_path / "zeros/1.jpg").touch()
    found = data("validate", "zeros")
    assert (found.code, found.out.splitlines()) == (
        1,
        [
            "broken: 'zeros/1.jpg': is empty, expected a picture file. Replace it.",
            "1 sample: 1 broken, 0 without a caption; samples with captions: none; damaged files: 0",
        ],
    )
