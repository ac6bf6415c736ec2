"""``edgeclip reinforce``: what it prints, how it ends, and what other commands make of its shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Command

torch = pytest.importorskip("torch")
from reinforced_shards import PROBES, WIDTH, make_shapes  # noqa: E402
from train_runs import recipe_text  # noqa: E402

from edgeclip.distill.reinforcement import read_reinforcement  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

VIT, TINY = PROBES / "vit", PROBES / "tinyclip"
QUICK = ("--augmentations", 2, "--rand-augment", 0, "--crop-scale", 0.8, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("data"), train=16, held_out=4, per_shard=8)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    command = Command(capsys)
    return lambda *arguments: command(*arguments)


def test_shards_are_made_inspected_checked_and_trained_on(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "dr"
    arguments = ("reinforce", folder / "shards", "--teacher", f"big={VIT}", "--teacher", TINY, *QUICK,
                 "--captions", folder / "captions.jsonl", "-o", out)  # fmt: skip
    tried = run(*arguments, "--dry-run")
    assert tried.code == 0, tried.err
    assert tried.out.startswith("16 samples in 2 shards (dry-run), would be about ")
    assert not out.exists()
    made = run(*arguments)
    assert (made.code, made.err) == (0, "")
    first, second, third, fourth = made.out.splitlines()
    assert first.startswith("16 samples in 2 shards (written), ")
    assert first.endswith(f" MB, in {out} (0 left out)")
    numbers = 8 * 2 * WIDTH * 2 / 1024  # two views, six texts
    assert second.endswith(f"({numbers:.1f} KiB of numbers, 2 views)")
    assert third == "teachers: big in columns 0 to 95, tinyclip in columns 96 to 191"
    assert fourth == "16 samples got further captions"
    again = run(*arguments)
    assert again.out.startswith("16 samples in 2 shards (present), ")

    inspected = run("data", "inspect", out)
    assert "npz 8, paug.json 8, png 8" in inspected.out
    assert (
        "stored by teachers: 2 views and embeddings of 192 columns (first of 16 looked at)" in inspected.out
    )
    said = json.loads(run("data", "inspect", out, "--json").out)
    assert said["looked_at"]["stored"] == {"samples": 16, "views": 2, "columns": 192}
    assert run("data", "validate", out).code == 0

    text = recipe_text(folder).replace('paths = ["shapes/train.jsonl"]', f'paths = ["{out}"]')
    text = text.replace('kind = "info-nce"', 'kind = "affinity"\nteachers = ["big", "tinyclip"]')
    text += "".join(f'[[teacher]]\nkind = "stored"\nname = "{name}"\n' for name in ("big", "tinyclip"))
    recipe = folder / "stored.toml"
    recipe.write_text(text, encoding="utf-8")
    trained = run("train", recipe, "-o", tmp_path / "run", "--set", "stage.0.samples=16",
                  "--set", "stage.0.batch_size=8", "--set", "stage.0.schedule.warmup=0")  # fmt: skip
    assert trained.code == 0, trained.err
    assert trained.out.startswith("finished: 2 steps")


def test_captions_that_fit_no_sample_are_said(run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "others.jsonl").write_text('{"key": "nobody", "captions": ["a cat"]}\n')
    made = run("reinforce", folder / "shards", "--teacher", TINY, *QUICK,
               "--captions", tmp_path / "others.jsonl", "-o", tmp_path / "dr")  # fmt: skip
    assert "0 samples got further captions; 'edgeclip data inspect' shows a key" in made.out


def test_damaged_reinforcement_is_found(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "dr"
    assert run("reinforce", folder / "shards", "--teacher", TINY, *QUICK, "-o", out).code == 0
    shard = out / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b"param_aug")
    content[at : at + 9] = b"param_bug"
    shard.write_bytes(content)
    checked = run("data", "validate", out)
    assert checked.code == 1
    assert f"damaged: {shard}: is not what reinforcement.json says (sha256 " in checked.out
    assert "paug.json: 'param_aug' is None, expected a list of one view or more" in checked.out
    shard.unlink()
    assert f"damaged: {shard}: is missing" in run("data", "validate", out).out
    (out / "shard-000001.reinforced.json").unlink()
    manifest = out / "reinforcement.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    assert "not all of 2 shards were made" in run("data", "validate", out).out


def test_processes_share_the_shards(
    run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dr"
    arguments = ("reinforce", folder / "shards", "--teacher", TINY, *QUICK, "-o", out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    first = run(*arguments)
    assert first.out.startswith("8 samples in 1 shard (written)")
    assert first.out.endswith("not all shards are there yet\n")
    monkeypatch.setenv("RANK", "1")
    second = run(*arguments)
    assert (second.code, second.out) == (0, "")
    assert second.err.startswith("edgeclip: process 1: 8 samples in 1 shard (written)")
    manifest = read_reinforcement(out)
    assert manifest is not None
    assert manifest.complete
    monkeypatch.setenv("RANK", "one")
    assert "RANK='one'" in run(*arguments).err


def test_teachers_come_from_a_file_with_their_scales(run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "teachers.toml"
    file.write_text(
        f'[[teacher]]\nkind = "checkpoint"\nname = "first"\npath = "{VIT}"\nscale = 70\n'
        f'[[teacher]]\nkind = "checkpoint"\nname = "second"\npath = "{TINY}"\nscale = 60\n',
        encoding="utf-8",
    )
    done = run("reinforce", folder / "shards", "--teachers", file, *QUICK, "-o", tmp_path / "dr", "--json")
    said = json.loads(done.out)
    assert (said["schema"], said["status"], said["complete"], said["samples"]) == (1, "written", True, 16)
    assert said["teachers"] == {"first": [0, 96], "second": [96, 192]}
    manifest = read_reinforcement(tmp_path / "dr")
    assert manifest is not None
    assert [teacher.scale for teacher in manifest.teachers] == [70, 60]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give --teacher or --teachers"),
        (["--teacher", "nowhere"], 1, "nowhere"),
        (["--teacher", "n" * 300], 1, "nnn"),
        (["--teacher", "open-clip:ViT-L-14"], 1, "expected open-clip:MODEL:FILE"),
        (["--teacher", "MobileCLIP-S0:nothing.pt"], 1, "nothing.pt"),
        (["--teachers", "nothing.toml"], 1, "'nothing.toml' cannot be read"),
        (
            ["--teachers", "bad.toml"],
            1,
            r"teachers 'bad.toml': holds ['stage'], expected [[teacher]] tables alone",
        ),
        (["--teachers", "worse.toml"], 1, "unknown field `scales`"),
        (["--teacher", str(TINY), "--captions", "none.jsonl"], 1, "captions 'none.jsonl' cannot be read"),
        (["--teacher", str(TINY), "--crop-scale", "2", "3"], 1, "scale is (2.0, 3.0)"),
        (["--teacher", str(TINY), "--max-broken", "many"], 1, "'many'"),
    ],
)
def test_errors_are_one_line(
    run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("stage = []\n")
    (tmp_path / "worse.toml").write_text(
        '[[teacher]]\nkind = "checkpoint"\nname = "a"\npath = "b"\nscales = 1\n'
    )
    done = run("reinforce", folder / "shards", *arguments, "-o", "out")
    assert done.code == code
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_interrupted_it_leaves_nothing_half_written(folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeclip", "reinforce", folder / "shards", "--teacher", VIT,
         "--augmentations", "300", "-o", tmp_path / "out"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    staging = tmp_path / "out" / ".edgeclip-tmp-shard-000000.tar" / "shard.tar"
    deadline = time.monotonic() + 60
    while not staging.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.split() == ["edgeclip:", "interrupted"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["reinforcement.json"]
