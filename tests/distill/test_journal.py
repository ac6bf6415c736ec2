from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from edgeclip.distill.journal import Journal
from edgeclip.errors import ConfigError, InputError

DIGEST = "a" * 64


def journal(directory: Path, **changes: Any) -> Journal:
    said: dict[str, Any] = {"recipe_digest": DIGEST, "data": {"train": "1"}, "recipe": "# mine\n", **changes}
    return Journal(directory, **said)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_knows_its_recipe_and_data(tmp_path: Path) -> None:
    journal(tmp_path / "run").close()
    assert (tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8") == "# mine\n"
    journal(tmp_path / "run", recipe="# formatted otherwise\n").close()
    assert (tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8") == "# mine\n"
    with pytest.raises(ConfigError, match=r"another recipe .digest aaaaaaaa, now bbbbbbbb"):
        journal(tmp_path / "run", recipe_digest="b" * 64)
    with pytest.raises(ConfigError, match=r"the data \['train'\] are others"):
        journal(tmp_path / "run", data={"train": "2"})


def test_lines_after_the_state_are_removed_and_cut_ones_too(tmp_path: Path) -> None:
    found = journal(tmp_path)
    for step in (1, 2, 3):
        found.log({"step": step})
        found.skipped({"step": step})
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    found.rewind(2)
    assert lines(tmp_path / "log.jsonl") == lines(tmp_path / "skipped.jsonl") == [{"step": 1}, {"step": 2}]
    found.log({"step": 3})
    assert len(lines(tmp_path / "log.jsonl")) == 3
    found.close()


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    first = journal(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path.name}.*another process trains there"):
        journal(tmp_path)
    first.close()
    journal(tmp_path).close()


def test_restart_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    found = journal(tmp_path)
    found.log({"step": 1})
    found.states.mkdir()
    found.model.mkdir()
    found.close()
    (tmp_path / "notes.txt").write_text("mine")
    journal(tmp_path, recipe_digest="b" * 64, restart=True).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "recipe.toml", "run.json"]


def test_a_beginning_that_was_killed_is_a_beginning(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("# half")
    journal(tmp_path).close()
    assert (tmp_path / "recipe.toml").read_text() == "# mine\n"


@pytest.mark.parametrize("content", ["", "[]", '{"recipe": 1}', "{"])
def test_a_damaged_run_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run.json is damaged .*--restart"):
        journal(tmp_path)
    journal(tmp_path, restart=True).close()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file.*cannot be written: "):
        journal(tmp_path / "file")
    found = journal(tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").mkdir()
    with pytest.raises(InputError, match=r"log.jsonl cannot be written: "):
        found.log({"step": 1})
    found.close()
