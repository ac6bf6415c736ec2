"""Shipped recipes at a size for tests: what their comments say, generated shapes, a probe as teacher."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from edgeclip.cli import cli
from edgeclip.distill.recipe import Recipe, parse_recipe
from edgeclip.distill.run import open_run
from edgeclip.distill.trainer import Progress, TrainOptions, train
from edgeclip.shape_files import write_shapes

PROBE = Path(__file__).parents[1] / "data" / "probes" / "vit"

# What makes a student fit the tokenizer of the probes, which writes both languages.
PROBE_TEXT = (
    "student.config.text.vocab_size=837",
    "student.config.text.context_length=24",
    "student.config.text.pad_id=834",
)
SMALL_IMAGE = (
    "student.config.image_size_px=[32, 32]",
    "student.config.image.dims=[24, 48]",
    "student.config.image.depths=[2, 2]",
    'student.config.image.mixers=["repmixer", "attention"]',
)


def text_of(name: str) -> str:
    return files("edgeclip.distill.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")


def recipe_of(name: str, *changes: str) -> Recipe:
    return parse_recipe(text_of(name).encode(), changes=changes)


def commands_of(name: str) -> list[list[str]]:
    """Return the commands in a recipe's comment as a shell would split them."""
    lines = [line.removeprefix("#") for line in text_of(name).splitlines() if line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in joined if line.startswith("     edgeclip ")]


def changes_of(command: list[str]) -> list[str]:
    """Return what a command's ``--set`` change."""
    return [command[at + 1] for at, word in enumerate(command) if word == "--set"]


def with_changes(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def short(*stages: int) -> list[str]:
    """Return what makes a command on 32 pictures take a moment."""
    sizes = ("samples=32", "batch_size=16", "schedule.warmup=0")
    return with_changes("validation=[]", *(f"stage.{stage}.{size}" for stage in stages for size in sizes))


def assert_commands_work(*commands: list[str]) -> None:
    for command in commands:
        said = CliRunner().invoke(cli, command[1:])
        assert said.exit_code == 0, said.output


def beside_probe(name: str, folder: Path, *changes: str) -> Recipe:
    """Return a recipe with the bilingual probe as teacher, and write the shapes it reads into a folder."""
    write_shapes(folder / "shapes", train=600, held_out=100, size_px=64)
    texts = (f"teacher.0.path={PROBE}", f"student.tokenizer={PROBE}", *PROBE_TEXT)
    return recipe_of(name, *texts, *SMALL_IMAGE, *changes)


def measured(recipe: Recipe, root: Path) -> dict[str, dict[str, float]]:
    """Return what the recipe measures of its student before the first step."""
    opened = open_run(recipe, root)
    student = opened.student
    model = student.model.eval()
    return {
        each.spec.name: dict(
            each.measure(model, student.config, student.tokenizer, device=torch.device("cpu"))
        )
        for each in opened.validations
    }


def trained(
    recipe: Recipe, root: Path, out: Path
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Run a recipe; return its last measurements and what every step said."""
    heard: list[Progress] = []
    result = train(recipe, TrainOptions(out, root), listen=heard.append)
    assert result.status == "finished"
    return (
        {name: dict(values) for name, values in result.validation.items()},
        [dict(each.entry) for each in heard if each.kind == "step"],
    )


def recall(values: dict[str, float], k: int) -> float:
    """Return the mean recall of both directions."""
    return (values[f"image_to_text_r{k}"] + values[f"text_to_image_r{k}"]) / 2
