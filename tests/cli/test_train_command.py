from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from command import Command

torch = pytest.importorskip("torch")
from train_runs import STAGE, log, make_data, recipe_text  # noqa: E402

from edgeclip.cli.train import train as train_command  # noqa: E402
from edgeclip.distill.ranks import Ranks  # noqa: E402
from edgeclip.distill.recipe import load_recipe  # noqa: E402
from edgeclip.distill.run import open_run  # noqa: E402

SHORT = ("--set", "stage.0.samples=128", "--set", "stage.0.batch_size=32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"), train=64, held_out=8)
    (folder / "tiny.toml").write_text(recipe_text(folder), encoding="utf-8")
    return folder


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]):
    command = Command(capsys)
    return lambda *arguments: command("train", *arguments)


def test_a_recipe_is_trained_once(train, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = train(folder / "tiny.toml", "-o", out, *SHORT)
    assert (done.code, done.out) == (0, f"finished: 4 steps; model in {out / 'model'} (Apache-2.0)\n")
    (line,) = done.err.splitlines()
    assert line.startswith("edgeclip: step 4 of 4: loss ")
    assert (out / "recipe.toml").read_text(encoding="utf-8").startswith("# --set stage.0.samples=128\n")
    assert load_recipe(out / "recipe.toml").name == "tiny"
    again = train(folder / "tiny.toml", "-o", out, *SHORT)
    assert (again.code, again.out) == (0, done.out.replace("finished", "finished before"))


def test_a_person_sees_a_bar(train, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    stage = STAGE.replace('name = "contrastive"', 'name = "[/b]"')  # no markup of the bar's
    validation = '[[validation]]\nname = "pairs"\ndata = "held_out"\nevery = 2\n'
    recipe = folder / "watched.toml"
    recipe.write_text(recipe_text(folder, stage, validation), encoding="utf-8")
    done = train(recipe, "-o", tmp_path / "run", *SHORT)
    assert done.code == 0, done.err
    assert "4/4" in done.err
    assert "[/b]: loss" in done.err
    assert "step 4: pairs: image_to_text_r1" in done.err
    assert done.out.startswith("finished: 4 steps")


def test_json_tells_all(train, folder: Path, tmp_path: Path) -> None:
    done = train(folder / "tiny.toml", "-o", tmp_path / "run", *SHORT, "--json", "--log-every", 3)
    said = json.loads(done.out)
    assert (said["schema"], said["status"], said["steps"], said["of"]) == (1, "finished", 4, 4)
    assert said["model"] == str(tmp_path / "run" / "model")
    assert [entry["step"] for entry in log(tmp_path / "run")] == [3, 4]


def test_a_dry_run_writes_nothing_and_says_what_would_be_done(train, folder: Path, tmp_path: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = train(folder / "tiny.toml", "-o", tmp_path / "run", *SHORT, "--dry-run")
    assert done.code == 0
    assert not (tmp_path / "run").exists()
    assert sorted(folder.rglob("*")) == before
    model = open_run(load_recipe(folder / "tiny.toml"), folder).student.model
    count = sum(p.numel() for p in model.parameters())
    head, row = done.out.splitlines()
    assert head.split() == [
        "stage",
        "steps",
        "batch",
        "samples",
        "trained",
        "frozen",
        "similarities",
        "teachers",
    ]
    assert row.split() == ["contrastive", "4", "32", "64", f"{count:,}", "0", "0.0", "MB", "-"]
    as_json = train(folder / "tiny.toml", "-o", tmp_path / "run", *SHORT, "--dry-run", "--json")
    assert json.loads(as_json.out)["stages"][0]["trained"] == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.toml"], "recipe 'nothing.toml' cannot be read: No such file"),
        (
            ["plain-clp"],
            "no recipe is called 'plain-clp': expected a .toml file or one of ",
        ),
        (["plain-clip", "--set", "stage.0.bach=2"], "unknown field `bach`"),
        (["plain-clip"], "'shapes/train.jsonl'"),
        (["plain-clip", "--dry-run"], "'shapes/train.jsonl'"),
        (["mobileclip", "--dry-run"], "'dr'"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = train(*arguments, "-o", "run")
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "lines"), [(0, 2), (1, 0)])
def test_only_the_first_rank_prints_a_dry_run(
    rank: int, lines: int, train, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Ranks(2, rank, torch.device("cpu"))
    monkeypatch.setattr("edgeclip.distill.run.ranks", lambda _: nullcontext(place))  # without the other one
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    done = train(folder / "tiny.toml", "-o", tmp_path / "run", *SHORT, "--dry-run")
    assert (done.code, done.out.count("\n")) == (0, lines)


def test_a_folder_called_like_a_built_in_recipe_does_not_hide_it(
    train, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain-clip").mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "shapes", "shapes")
    done = train("plain-clip", "-o", "plain-clip", *SHORT, "--dry-run", "--set", "stage.0.schedule.warmup=0")
    assert done.code == 0, done.err


def test_without_torch_the_extra_is_named(
    train, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = train(folder / "tiny.toml", "-o", tmp_path / "run")
    assert done.code == 1
    assert (
        "needs the package 'torch', which is not installed: run pip install \"edgeclip[train]\"" in done.err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for hosts without a GPU")
def test_a_missing_gpu_is_an_error(train, folder: Path, tmp_path: Path) -> None:
    done = train(folder / "tiny.toml", "-o", tmp_path / "run", "--device", "cuda")
    assert (done.code, "device is 'cuda', but torch sees no GPU" in done.err) == (1, True)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of another kind")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, train, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [folder / "tiny.toml", "-o", out, "--set", "stage.0.samples=64000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeclip", "train", *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    done = log(out)[-1]["step"]
    assert said == f"stopped and saved at step {done:,} of 2,000; the same command goes on ({out})\n"
    assert (out / "states" / f"step-{done:08d}").is_dir()


def test_built_in_recipes_are_valid() -> None:
    from edgeclip.distill import recipes

    found = sorted(Path(recipes.__file__).parent.glob("*.toml"))
    assert [load_recipe(path).name for path in found] == [path.stem for path in found]
    names = {path.stem for path in found}
    assert names >= {
        "plain-clip", "mobileclip", "mobileclip2", "clip-kd", "dc-clip", "tinyclip", "lightclip",
    }  # fmt: skip
    told = re.sub(r"\s+", " ", train_command.help or "")
    assert [name for name in names if f" {name}," not in told and f" {name}." not in told] == []


@pytest.mark.slow
def test_the_plain_recipe_runs_on_generated_shapes(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeclip.shape_files import write_shapes

    monkeypatch.chdir(tmp_path)
    write_shapes("shapes", train=128, held_out=16)
    done = train(
        "plain-clip", "-o", "run", "--set", "stage.0.samples=32", "--set", "stage.0.batch_size=16",
        "--set", "stage.0.schedule.warmup=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "held-out-labels: top1" in done.err


@pytest.mark.slow
def test_the_distillation_recipe_fits_its_student_and_a_teacher(
    train, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(folder / "tiny.toml", "-o", folder / "teacher_run", *SHORT).code == 0
    monkeypatch.chdir(folder)
    done = train(
        "mobileclip", "-o", tmp_path / "run", "--dry-run",
        "--set", 'data.train.paths=["shapes/train.jsonl"]', "--set", "data.train.crop_scale=[0.08, 1.0]",
        "--set", 'teacher=[{kind="checkpoint", name="teacher", path="teacher_run/model"}]',
        "--set", 'stage.0.loss=[{kind="affinity", teachers=["teacher"]}]',
        "--set", "stage.0.texts=1", "--set", "stage.0.batch_size=4",
    )  # fmt: skip
    assert done.code == 0, done.err
    row = done.out.splitlines()[1].split()
    assert (row[0], row[1], row[-1]) == ("distil", "3,200,000", "teacher")
    assert int(row[4].replace(",", "")) > 50_000_000
