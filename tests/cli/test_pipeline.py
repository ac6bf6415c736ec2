"""``edgeclip pipeline``, run as CI runs it: exit codes, output, and the templates to copy."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Command
from wrong_bundle import put_wrong_model

from edgeclip.bundle import Bundle
from edgeclip.export.device_report import device_report
from edgeclip.export.timing import Effort
from edgeclip.runtime.session import RuntimeOptions

PROBE = Path(__file__).parents[1] / "data" / "probes" / "vit"
CI = Path(__file__).parents[2] / "docs" / "ci"
# No module of torch or onnx may be imported, and no socket used: ends the process with code 99.
GUARD = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "onnx_ir", "openvino", "nncf"):
            refuse(f"import of {name}")
def refuse(what):
    sys.stderr.write(f"refused: {what}\\n")
    sys.stderr.flush()
    os._exit(99)
sys.meta_path.insert(0, Finder())
sys.addaudithook(lambda event, arguments: event.startswith("socket.") and event != "socket.gethostname"
                 and refuse(event))
"""
RECIPES = ("ci-smoke", "cpu-int8", "intel-openvino", "jetson", "raspberry-pi5", "rtx")
RECIPE = """
schema = 1
kind = "pipeline"
name = "tiny"
[model]
bundle = "tiny-bundle"
[[gate]]
name = "pi"
kind = "device-report"
device = "pi"
variant = "onnx-int8"
p50_ms = 1000
[[gate]]
name = "size"
kind = "size"
max_mb = 1
"""


@pytest.fixture
def pipeline(capsys: pytest.CaptureFixture[str]) -> Any:
    command = Command(capsys)
    return lambda *arguments: command("pipeline", *arguments)


@pytest.fixture
def recipe(tiny_bundle: Path) -> Path:
    path = tiny_bundle.parent / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def pi(tiny_bundle: Path) -> Path:
    options = RuntimeOptions(threads=1)
    report = device_report(
        Bundle.open(tiny_bundle), "onnx-int8", device="pi", options=options, effort=Effort(40, 0.0)
    )
    path = tiny_bundle.parent / "pi.json"
    path.write_text(report.to_json(), encoding="utf-8")
    return path


def test_without_the_device_it_is_3_and_with_it_0(
    pipeline: Any, recipe: Path, tiny_bundle: Path, pi: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = pipeline("run", recipe, "-o", out)
    assert said.code == 3
    lines = said.out.splitlines()
    assert lines[0].split() == ["gate", "verdict", "of", "got", "expected"]
    assert [line.split()[:2] for line in lines[1:] if not line.startswith(" ")][:3] == [
        ["numbers", "passed"],
        ["pi", "inconclusive"],
        ["size", "passed"],
    ]
    assert "pi: onnx-int8 on pi: there is no report at all" in said.out
    assert lines[-1] == f"tiny: inconclusive; see {out / 'summary.md'}"
    assert "edgeclip: verify: done, 2 variants" in said.err
    assert pipeline("run", recipe, "-o", out, "--inconclusive", "pass").code == 0
    assert pipeline("run", recipe, "-o", out, "--inconclusive", "fail").code == 4
    judged = pipeline("gate", recipe, "-o", out, "--report", pi)
    assert judged.code == 0
    assert judged.out.splitlines()[-1] == f"tiny: passed; see {out / 'summary.md'}"
    by_bundle = pipeline("gate", recipe, "--bundle", tiny_bundle, "--report", pi)
    assert (by_bundle.code, by_bundle.out.splitlines()[-1]) == (0, "tiny: passed")
    assert pipeline("gate", recipe, "--bundle", tiny_bundle).code == 3


def test_a_failed_gate_is_4(pipeline: Any, recipe: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    small = pipeline("run", recipe, "-o", tmp_path / "out", "--set", "gate.1.max_mb=0.001")
    assert small.code == 4
    assert re.search(r"size +failed +onnx-fp32 +0\.\d\d MB +at most 0\.001 MB", small.out)
    put_wrong_model(tiny_bundle, tmp_path)
    wrong = pipeline("run", recipe, "-o", tmp_path / "out")
    assert wrong.code == 4
    assert "numbers: onnx-int8: on this host: image cosine_mean is" in wrong.out


def test_json_is_the_report(pipeline: Any, recipe: Path, tmp_path: Path) -> None:
    said = pipeline("run", recipe, "-o", tmp_path / "out", "--json")
    document = json.loads(said.out)
    assert (document["kind"], document["exit_code"], said.code) == ("pipeline-report", 3, 3)
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())


def test_only_recipes_are_offered_as_such(pipeline: Any) -> None:
    said = pipeline("run", "nothing", "-o", "out")
    listed = said.err.partition("one of ")[2].strip(" .\n").split(", ")
    assert listed == ["ci-smoke", "cpu-int8", "intel-openvino", "jetson", "raspberry-pi5", "rtx"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "no-such-recipe", "-o", "out"], 1, "no recipe is called 'no-such-recipe': expected a .toml"),
        (["run", "missing.toml", "-o", "out"], 1, "recipe 'missing.toml' cannot be read"),
        (["run", "ci-smoke", "-o", "out"], 1, "[model]: got neither, expected 'checkpoint' or 'bundle'"),
        (["run", "ci-smoke"], 2, "Missing option '-o'"),
        (["run", "{recipe}", "-o", "out", "--set", "gate.1.max_gb=1"], 1, "unknown field `max_gb`"),
        (["run", "{recipe}", "-o", "out", "--inconclusive", "maybe"], 2, "'maybe' is not one of"),
        (["gate", "{recipe}"], 2, "give --bundle or -o"),
        (["gate", "{recipe}", "-o", "a", "--bundle", "b"], 2, "give --bundle or -o"),
        (["gate", "{recipe}", "-o", "nowhere"], 1, "report.json' cannot be used"),
        (["gate", "{recipe}", "--bundle", "default", "--report", "nowhere.json"], 1, "'nowhere.json' cannot"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    pipeline: Any, recipe: Path, arguments: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    said = pipeline(*[argument.format(recipe=recipe) for argument in arguments])
    assert (said.code, words in said.err) == (code, True), said.err
    if code == 1:
        assert said.err.count("\n") == 1


def test_ctrl_c_ends_with_130_and_leaves_the_folder_usable(
    pipeline: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **how: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("edgeclip.export.pipeline_measure.verify_bundle", interrupt)
        assert pipeline("run", recipe, "-o", out).code == 130
    assert list(out.iterdir()) == []
    assert pipeline("run", recipe, "-o", out, "--inconclusive", "pass").code == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_of_every_shipped_recipe(
    pipeline: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes" / "images" / "held_out").mkdir(parents=True)
    for file in ("held_out.jsonl", "labels.json"):
        (tmp_path / "shapes" / file).write_text("")
    before = sorted(tmp_path.rglob("*"))
    said = pipeline("run", name, "--set", f"model.checkpoint={PROBE}", "-o", "out", "--dry-run", "--json")
    assert said.code == 0, said.err
    stages = json.loads(said.out)["stages"]
    assert {stage["name"] for stage in stages} >= {"checkpoint", "export", "verify", "gate"}
    assert sorted(tmp_path.rglob("*")) == before
    table = pipeline("run", name, "--set", f"model.checkpoint={PROBE}", "-o", "out", "--dry-run")
    assert len(table.out.splitlines()) == len(stages) + 1


def test_help_names_every_shipped_recipe(pipeline: Any) -> None:
    said = " ".join(pipeline("run", "--help").out.split())
    for name in RECIPES:
        assert re.search(rf"\b{name}\b", said)


def test_judging_needs_neither_torch_nor_onnx_nor_a_network(
    recipe: Path, tiny_bundle: Path, pi: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    for arguments in (
        ["run", str(recipe), "-o", out, "--inconclusive", "pass"],
        ["gate", str(recipe), "-o", out, "--report", str(pi)],
    ):
        code = f"{GUARD}\nfrom edgeclip.cli import main\nmain({['pipeline', *arguments]!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# --- templates ---------------------------------------------------------------------------------------------


def scripts(path: Path) -> Iterator[str]:
    """Yield the shell scripts of a template, as the YAML reader gives them."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, job in document.get("jobs", document).items():
        if not isinstance(job, dict) or name in ("on", "env"):
            continue
        for step in job.get("steps", ()):
            if "run" in step:
                yield step["run"]
        if "script" in job:
            yield "\n".join(job["script"])


def commands(path: Path) -> list[list[str]]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    variables = document.get("env") or document["variables"]
    found = []
    for script in scripts(path):
        for name, value in variables.items():
            script = script.replace(f"${name}", value)
        for line in script.replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("edgeclip "):
                found.append(shlex.split(line.partition(" || ")[0].partition(" > ")[0])[1:])
    return found


TEMPLATES = ("github-actions.yml", "gitlab-ci.yml")


def test_the_github_template_is_a_workflow() -> None:
    workflow = yaml.safe_load((CI / TEMPLATES[0]).read_text(encoding="utf-8"))
    # YAML 1.1 takes the key "on" for true
    assert True in workflow
    jobs = workflow["jobs"]
    assert list(jobs) == ["pipeline", "device", "gate"]
    for name, job in jobs.items():
        assert "runs-on" in job
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
        assert (name == "pipeline") == ("needs" not in job)
    text = (CI / TEMPLATES[0]).read_text()
    for words in ("GITHUB_STEP_SUMMARY", "junit.xml", "actions/upload-artifact", "if: always()"):
        assert words in text


def test_the_gitlab_template_is_a_pipeline() -> None:
    document = yaml.safe_load((CI / TEMPLATES[1]).read_text(encoding="utf-8"))
    jobs = {name: job for name, job in document.items() if isinstance(job, dict) and "script" in job}
    assert list(jobs) == ["export", "on-device", "gate"]
    assert set(document["stages"]) == {job["stage"] for job in jobs.values()}
    for name in ("export", "gate"):
        assert jobs[name]["artifacts"]["reports"]["junit"].endswith("junit.xml")


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_command_of_a_template_is_one(
    pipeline: Any, capsys: pytest.CaptureFixture[str], template: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = Command(capsys)
    found = commands(CI / template)
    assert {tuple(words[:2]) for words in found} >= {("pipeline", "run"), ("pipeline", "gate")}
    for words in found:
        options = [word for word in words if word.startswith("-")]
        names = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
        depth = 2 if names[:1] == ["pipeline"] else 1
        said = command(*words[:depth], "--help")
        assert said.code == 0
        for option in options:
            assert re.search(rf"(^|\s|,){re.escape(option)}\b", said.out), (option, words)
        if words[:2] == ["pipeline", "run"]:
            at = words.index("--set") + 1
            assert words[at].startswith("model.checkpoint=")
            words[at] = f"model.checkpoint={PROBE}"
            assert command(*words, "--dry-run").code == 0


def test_the_device_script_of_the_templates_writes_a_report_that_gates_read(
    pipeline: Any, recipe: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page says to run on a device, run here."""
    page = (CI / "device-report.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tiny_bundle.parent)
    (tiny_bundle.parent / "bundle").symlink_to(tiny_bundle)
    script = script.replace("raspberry-pi5", "pi").replace("onnx-int8@arm64-dotprod", "onnx-int8")
    exec(compile(script, "device-report.md", "exec"), {"__name__": "__main__"})  # noqa: S102
    (written,) = tiny_bundle.parent.glob("*.json")
    assert pipeline("gate", recipe, "--bundle", tiny_bundle, "--report", written).code == 0
