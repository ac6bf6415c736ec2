"""``edgeclip export``, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Command, Result

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
from exported import PROBES, manifest_of, shape_pictures, write_pictures  # noqa: E402
from PIL import Image  # noqa: E402

from edgeclip.export.source import Source  # noqa: E402

PROBE = PROBES / "tinyclip"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("shapes") / "shapes")


@pytest.fixture(scope="module")
def graphs() -> dict[object, object]:
    return {}


@pytest.fixture
def export(
    capsys: pytest.CaptureFixture[str], graphs: dict[object, object], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """The command, which traces each tower once in this module."""
    trace = Source.trace

    def remembered(self: Source, tower: str, options: object) -> object:
        if tower not in graphs:
            graphs[tower] = trace(self, tower, options)  # type: ignore[arg-type]
        return graphs[tower]

    monkeypatch.setattr(Source, "trace", remembered)
    command = Command(capsys)
    return lambda *arguments: command("export", *arguments)


def test_a_probe_becomes_a_bundle(export: Run, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = export(PROBE, "-o", out, "--reference", pictures, "--threads", 1)
    assert done.code == 0, done.err
    first, second, header, image, text = done.out.splitlines()
    assert re.fullmatch(rf"probe-tinyclip -> {out}: [\d.]+ s, peak memory [\d,]+ MB", first)
    assert second == "compared with float32 on 64 pictures (shapes) and 140 texts"
    assert header.split() == [
        "variant", "tower", "MB", "max", "abs", "cosine", "min", "cosine", "mean", "top-1",
    ]  # fmt: skip
    assert (image.split()[:2], image.split()[-2:]) == (["onnx-fp32", "image"], ["100.0%", "passed"])
    assert (text.split()[:2], text.split()[-2:]) == (["onnx-fp32", "text"], ["-", "passed"])
    (remark,) = done.err.splitlines()
    assert remark == "edgeclip: the bundle's golden file holds pictures of 'shapes', at the size of the tower"


def test_json_is_one_document(export: Run, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = export(PROBE, "-o", out, "--reference", pictures, "--json", "--threads", 1)
    said = json.loads(done.out)
    assert (said["schema"], said["kind"], said["model"], said["basis"]) == (
        1, "export", "probe-tinyclip", "trained",
    )  # fmt: skip
    image = said["variants"]["onnx-fp32"]["towers"]["image"]
    assert image["numbers"]["max_abs"] <= 1e-4
    assert image["size_bytes"] > 100_000
    assert said["default_variants"] == ["onnx-fp32"]
    assert {"name", "seconds"} == set(said["steps"][0])
    assert said["versions"]["torch"]


def test_the_default_reference_is_edgeclips_photographs_and_alike_ones_are_said_to_be_so(
    export: Run, tmp_path: Path
) -> None:
    done = export(PROBE, "-o", tmp_path / "bundle", "--threads", 1)
    assert done.code == 0, done.err
    assert "112 pictures (photographs of edgeclip, cropped and flipped)" in done.out
    # A probe knows plain shapes alone: photographs all look the same to it.
    (remark,) = done.err.splitlines()
    assert "the reference embeddings are all alike (median cosine 0.9" in remark
    assert "centred cosine" in done.out


def test_what_another_processor_must_prove_is_said(export: Run, pictures: Path, tmp_path: Path) -> None:
    machine = os.uname().machine
    target = "arm64-dotprod" if machine == "x86_64" else "x86-vnni"
    name = f"onnx-fp32@{target}"
    arguments = [
        PROBE,
        "-o",
        tmp_path / "bundle",
        "--reference",
        pictures,
        "--threads",
        1,
        "--target",
        target,
    ]
    done = export(*arguments)
    assert done.code == 0, done.err
    *_, image, text, reason, proxy = done.out.splitlines()
    assert (image.split()[-1], text.split()[-1]) == ("unverified", "unverified")
    assert reason.startswith(f"{name}: unverified: it needs one of ")
    assert proxy.startswith(
        f"{name}: its numbers are of a stand-in: the same engine on {machine}, which has none"
    )
    done = export(*arguments, "--require-verified")
    assert (done.code, done.out) == (4, "")
    assert f"not verified: {name}, image tower: it needs one of " in done.err


def test_labels_are_taken_from_a_file_and_baked(export: Run, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "my things.txt").write_text("red circle\nblue square | azure box\n", encoding="utf-8")
    done = export(
        PROBE, "-o", tmp_path / "bundle", "--reference", pictures, "--labels", tmp_path / "my things.txt",
        "--templates", "bare", "--bake-labels", "--threads", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    said = manifest_of(tmp_path / "bundle")
    assert said["default_bank"] == "my-things"
    assert said["label_banks"]["my-things"]["templates"] == "bare"
    assert set(said["variants"]["onnx-fp32"]["towers"]) == {"image", "text", "classifier"}


def test_a_bank_of_the_embedded_bundle_can_be_named(export: Run, pictures: Path, tmp_path: Path) -> None:
    done = export(
        PROBE,
        "-o",
        tmp_path / "bundle",
        "--reference",
        pictures,
        "--labels",
        "imagenet-1k-zh",
        "--threads",
        1,
    )
    assert done.code == 0, done.err
    bank = manifest_of(tmp_path / "bundle")["label_banks"]["imagenet-1k-zh"]
    assert (bank["templates"], bank["language"], bank["labels"]) == ("zh", "zh", 999)


def test_a_failed_gate_ends_with_4_in_one_line(export: Run, pictures: Path, tmp_path: Path) -> None:
    done = export(PROBE, "-o", tmp_path / "bundle", "--reference", pictures, "--limit", "fp32:max_abs=1e-12")
    assert (done.code, done.out) == (4, "")
    assert done.err.count("\n") == 1
    assert "variant 'onnx-fp32', image tower: max_abs is " in done.err
    assert not (tmp_path / "bundle").exists()


def test_where_int8_disagrees_what_to_try_is_said(export: Run, pictures: Path, tmp_path: Path) -> None:
    done = export(
        PROBE, "-o", tmp_path / "bundle", "--variant", "onnx-int8", "--reference", pictures, "--threads", 1,
        "--no-text", "--limit", "int8:cosine_min=1",
    )  # fmt: skip
    assert (done.code, done.err.count("\n")) == (4, 1)
    for option in ("--calibration-data", "--int8-target cosine=0.995,top1=0.99", "--finish-int8 120"):
        assert option in done.err
    assert "--limit int8:cosine_min=…" in done.err


def test_how_int8_is_made_is_chosen_and_said(export: Run, pictures: Path, tmp_path: Path) -> None:
    said = {}
    for name, options in (
        ("default", ()),
        ("chosen", ("--int8-method", "percentile:99.9", "--int8-text", "full")),
    ):
        done = export(
            PROBE, "-o", tmp_path / name, "--variant", "onnx-int8", "--reference", pictures, "--threads", 1,
            "--limit", "int8:top1_agreement=0.5", *options,
        )  # fmt: skip
        assert done.code == 0, done.err
        said[name] = manifest_of(tmp_path / name)["variants"]["onnx-int8"]["calibration"]
    assert said["default"]["method"] == {"image": "minmax", "text": None}
    assert said["chosen"]["method"] == {"image": "percentile:99.9", "text": "percentile:99.9"}
    assert set(said["chosen"]["rows"]) == {"image", "text"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "onnx-int4"], "got 'onnx-int4', expected one of onnx-fp32"),
        (["--variant", "onnx-fp32@cuda-sm87"], "onnx files cannot serve 'cuda-sm87'"),
        (["--variant", "onnx-fp32", "--variant", "onnx-fp32"], "'onnx-fp32' is asked for twice"),
        (["--target", "toaster"], "got the target 'toaster'"),
        (["--opset", "16"], "opset: got 16, expected 17 to 24"),
        (["--static-batch", "0"], "static batch: got 0, expected 1 to 4096"),
        (["--bake-labels", "--variant", "openvino-fp16"], "none is asked for among openvino-fp16"),
        (["--limit", "fp32:max_abs"], "limit 'fp32:max_abs': expected PRECISION:NUMBER=LIMIT"),
        (["--limit", "fp32:speed=1"], "NUMBER one of max_abs"),
        (["--limit", "int8:cosine_mean=0.9"], "limit of 'int8': nothing that is asked for is called so"),
        (["--labels", "no-such-bank"], "'no-such-bank': there is no such file, and no bank"),
        (["--labels", "missing.txt"], "'missing.txt': there is no such file"),
        (["--reference", "nowhere"], "nowhere"),
        (["--variant", "onnx-int8", "--int8-method", "guess"], "'guess'"),
        (["--finish-int8", "5"], "finishing for int8: no int8 variant is asked for among onnx-fp32"),
        (["--model", "MobileCLIP2-S0"], "got model 'MobileCLIP2-S0'"),
        (
            [
                "--variant",
                "onnx-int8",
                "--calibration-selection",
                "stratified",
                "--calibration-samples",
                "20",
            ],
            "25 of 25 rows are of pictures without a label",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: list[str], message: str, export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = export(PROBE, "-o", "bundle", *arguments)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_that_is_not_there_is_one_sentence(export: Run, tmp_path: Path) -> None:
    done = export("no-such-model", "-o", tmp_path / "bundle")
    assert done.code == 1
    assert "checkpoint 'no-such-model': there is no such file or directory, and no model" in done.err


def test_bad_syntax_ends_with_2(export: Run, tmp_path: Path) -> None:
    assert export(PROBE).code == 2
    assert export(PROBE, "-o", tmp_path / "bundle", "--templates", "one").code == 2
    assert export(PROBE, "-o", tmp_path / "bundle", "--threads", "0").code == 2
    assert export(PROBE, "-o", tmp_path / "bundle", "--calibration-samples", "15").code == 2
    assert export(PROBE, "-o", tmp_path / "bundle", "--calibration-selection", "best").code == 2
    assert export(PROBE, "-o", tmp_path / "bundle", "--int8-text", "half").code == 2
    assert export(PROBE, "-o", tmp_path / "bundle", "--latency-table", "times.json").code == 2


@pytest.mark.parametrize("option", ["--reference", "--calibration-data"])
def test_missing_pictures_are_said_before_the_checkpoint_is_opened(
    export: Run, tmp_path: Path, option: str
) -> None:
    done = export(tmp_path / "nothing", "-o", tmp_path / "bundle", option, "nowhere")
    assert (done.code, "'nowhere': no such file or folder" in done.err) == (1, True)


@pytest.mark.parametrize("module", ["torch", "onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(
    module: str, export: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == module else find(name))
    done = export(PROBE, "-o", tmp_path / "bundle")
    assert done.code == 1
    assert f"needs the package '{module}', which is not installed" in done.err
    assert 'pip install "edgeclip[export]"' in done.err


_WITHOUT = """
import sys
for name in ("torch", "onnx", "onnxscript", "onnx_ir"):
    sys.modules[name] = None
from edgeclip.cli import _run
sys.exit(_run(sys.argv[1:], debug=True))
"""


def _without_torch_and_onnx(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_help_and_the_check_of_the_bundle_need_neither_torch_nor_onnx(
    export: Run, pictures: Path, tmp_path: Path
) -> None:
    done = export(PROBE, "-o", tmp_path / "bundle", "--reference", pictures, "--bake-labels", "--threads", 1)
    assert done.code == 0, done.err
    checked = _without_torch_and_onnx("verify", tmp_path / "bundle", "--require-verified")
    assert checked.returncode == 0, checked.stderr
    assert [line.split()[:2] for line in checked.stdout.splitlines()[2:]] == [
        ["onnx-fp32", "classifier"],
        ["onnx-fp32", "image"],
        ["onnx-fp32", "text"],
    ]
    picture = tmp_path / "picture.png"
    Image.fromarray(shape_pictures(1)[0]).save(picture)
    classified = _without_torch_and_onnx("classify", picture, "--bundle", tmp_path / "bundle")
    assert classified.returncode == 0, classified.stderr
    assert _without_torch_and_onnx("export", "--help").returncode == 0


def test_labels_that_were_baked_in_do_not_outlive_their_bank(
    export: Run, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, slim = tmp_path / "bundle", tmp_path / "slim"
    export(PROBE, "-o", bundle, "--reference", pictures, "--bake-labels", "--threads", 1)
    command = Command(capsys)
    kept = command("bundle", "slim", bundle, "--variant", "onnx-fp32", "-o", slim)
    assert kept.code == 0, kept.err
    assert "classifier" in manifest_of(slim)["variants"]["onnx-fp32"]["towers"]
    shutil.rmtree(slim)
    other = command(
        "bundle", "slim", bundle, "--variant", "onnx-fp32", "-o", slim, "--labels", "red circle,blue square"
    )
    assert other.code == 0, other.err
    assert set(manifest_of(slim)["variants"]["onnx-fp32"]["towers"]) == {"image", "text"}
    assert command("verify", slim).code == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="no such limit")
@pytest.mark.parametrize(
    ("most_bytes", "what"),
    [
        (40_000, "the file 'golden.safetensors' cannot be written"),
        (400_000, "image.onnx' cannot be written"),
    ],
)
def test_where_there_is_no_room_nothing_is_left(most_bytes: int, what: str, tmp_path: Path) -> None:
    bundle, kept = tmp_path / "bundle", tmp_path / "kept"
    arguments = ["export", str(PROBE), "-o", str(bundle), "--keep-intermediate", str(kept), "--threads", "1"]
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most_bytes}, {most_bytes}))\n"
        f"from edgeclip.cli import main; main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert what in done.stderr
    assert "file too large" in done.stderr.lower()
    assert not bundle.exists()
    for path in (each for each in kept.rglob("*") if each.is_file()):
        assert path.suffix == ".onnx"
        onnx.load(path)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of another kind")
@pytest.mark.parametrize("wait_s", [1.5, 4.0])
def test_ctrl_c_ends_with_130_and_leaves_nothing(wait_s: float, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeclip", "export", str(PROBES / "mobileclip"), "-o", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(wait_s)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, ""), errors
    assert errors.splitlines()[-1] == "edgeclip: interrupted"
    assert "Traceback" not in errors
    assert not out.exists()
