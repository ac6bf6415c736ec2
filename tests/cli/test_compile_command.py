"""``edgeclip compile``, run as a user runs it. TensorRT-RTX builds for real, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command import Command
from PIL import Image
from tiny_bundle import colour_picture
from tuned_profiles import put_profile, tuned_profile

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.cache import COMPILED, HostCache
from edgeclip.runtime.choose import choose_variant, open_tower
from edgeclip.runtime.host import Host
from edgeclip.runtime.session import RuntimeOptions


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def add_tensorrt(directory: Path) -> None:
    with BundleWriter(directory) as writer:
        entry = dict(writer.manifest["variants"]["onnx-fp32"])
        writer.manifest["variants"]["tensorrt-fp32"] = {**entry, "format": "tensorrt", "requires": {}}
        writer.commit()


# --- ONNX Runtime


def test_the_optimised_graph_is_kept_once_and_used(run: Command, tiny_bundle: Path) -> None:
    result = run("compile", tiny_bundle)
    assert (result.code, result.err) == (0, "")
    image, text = result.out.splitlines()
    assert image.startswith("onnx-int8 image tower: built in ")
    assert text == "onnx-int8 text tower: nothing to compile for ort"
    kept = Path(image.rpartition(", ")[2])
    bundle = Bundle.open(tiny_bundle)
    assert kept.parent == HostCache.open(COMPILED).directory
    assert run("compile", tiny_bundle, "--tower", "image").out.startswith("onnx-int8 image tower: up to date")
    forced = run("compile", tiny_bundle, "--tower", "image", "--force")
    assert forced.out.startswith("onnx-int8 image tower: built in")
    with open_tower(bundle, choose_variant(bundle), "image") as session:
        assert "optimised graph from the cache" in session.chosen.reason


def test_json_is_one_document(run: Command, tiny_bundle: Path) -> None:
    said = json.loads(run("compile", tiny_bundle, "--variant", "onnx-fp32", "--json").out)
    assert (said["schema"], said["kind"], said["variant"]) == (1, "compile", "onnx-fp32")
    image = said["towers"]["image"]
    assert (image["backend"], image["up_to_date"]) == ("ort", False)
    assert Path(image["path"]).stat().st_size == image["size_bytes"]
    assert said["towers"]["text"]["path"] is None
    assert said["digest"] == Bundle.open(tiny_bundle).digest


def test_a_graph_that_cannot_be_kept_is_an_error(
    run: Command, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostCache, "put", lambda self, name, data: False)
    result = run("compile", tiny_bundle)
    assert result.code == 1
    assert "its optimised graph cannot be kept in '" in result.err


def test_no_cache_directory_is_said(
    run: Command, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path / "file" / "below"))
    result = run("compile", tiny_bundle)
    assert result.code == 1
    assert "no cache directory that can be written: set EDGECLIP_CACHE_DIR" in result.err


@pytest.mark.parametrize("command", ["classify", "embed", "eval", "verify"])
def test_what_was_compiled_into_a_directory_is_found_there(
    command: str, run: Command, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "compiled"
    assert run("compile", tiny_bundle, "--variant", "onnx-fp32", "-o", folder).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert any(name.startswith("graph-") for name in before)
    photos = tmp_path / "photos" / "red"
    photos.mkdir(parents=True)
    Image.fromarray(colour_picture("red")).save(photos / "0.png")
    arguments = {
        "classify": (photos, "--bundle", tiny_bundle, "--variant", "onnx-fp32"),
        "embed": (photos, "-o", tmp_path / "e.npy", "--bundle", tiny_bundle, "--variant", "onnx-fp32"),
        "eval": (tiny_bundle, "--data", photos.parent, "--variants", "onnx-fp32"),
        "verify": (tiny_bundle, "--variant", "onnx-fp32"),
    }[command]
    result = run(command, *arguments, "--cache-dir", folder)
    assert result.code == 0, result.err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    kept = list(folder.glob("graph-*.ort"))
    for path in kept:
        path.write_bytes(b"damaged")
    assert run(command, *arguments, "--cache-dir", folder).code == 0
    assert {path.read_bytes() for path in kept} != {b"damaged"}  # looked for there, and made again
    assert "does not exist" in run(command, *arguments, "--cache-dir", tmp_path / "nowhere").err


def test_what_a_tuned_profile_names_is_compiled_with_its_engine(run: Command, tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    bundle = Bundle.open(tiny_bundle)
    put_profile(bundle, tuned_profile(bundle, settings={"backend": "openvino", "threads": 1}))
    assert choose_variant(bundle).variant.name != bundle.manifest.default_variants[0]
    said = json.loads(run("compile", tiny_bundle, "--json").out)
    assert said["variant"] == "onnx-fp32"
    # Profiles are of pictures: the text tower is run as without one.
    assert {name: tower["backend"] for name, tower in said["towers"].items()} == {
        "image": "openvino",
        "text": "ort",
    }
    before = {path: path.stat().st_mtime_ns for path in HostCache.open(COMPILED).directory.iterdir()}
    with open_tower(bundle, choose_variant(bundle), "image") as session:
        assert session.chosen.backend == "openvino"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run("compile", tiny_bundle, "--tower", "image").out.startswith("onnx-fp32 image tower: up to date")
    asked = json.loads(run("compile", tiny_bundle, "--backend", "ort", "--json").out)
    assert asked["variant"] == bundle.manifest.default_variants[0]  # the profile is for another engine


# --- TensorRT


def test_engines_are_built_for_another_machine(run: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    add_tensorrt(tiny_bundle)
    arguments = ("compile", tiny_bundle, "--variant", "tensorrt-fp32", "--compute-capability", "8.6")
    folder = tmp_path / "engines"
    first = run(*arguments, "-o", folder, "--batch", "1,4")
    assert (first.code, first.err) == (0, "")
    assert [line.split(",")[0].rsplit(" ", 2)[0] for line in first.out.splitlines()] == [
        "tensorrt-fp32 image tower: built in",
        "tensorrt-fp32 text tower: built in",
    ]
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*.json"))]
    assert {record["batch"] for record in records} == {"1/1/4"}
    assert {record["compute_capability"] for record in records} == {"8.6"}
    for record in records:
        assert (folder / record["engine"]).stat().st_size == record["size_bytes"]
    again = run(*arguments, "-o", folder, "--batch", "1,4")
    assert all("up to date" in line for line in again.out.splitlines())
    other = run(*arguments, "-o", folder, "--tower", "image")  # other batches: 1/1/8
    assert "built in" in other.out
    assert "text" not in other.out


def test_building_for_another_machine_needs_a_place(run: Command, tiny_bundle: Path) -> None:
    result = run("compile", tiny_bundle, "--compute-capability", "8.6")
    assert result.code == 2
    assert "say where to with -o DIR" in result.err


def test_a_host_without_a_gpu_says_so(run: Command, tiny_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    if Host.here().gpus:
        pytest.skip("there is a GPU")
    add_tensorrt(tiny_bundle)
    result = run("compile", tiny_bundle, "--variant", "tensorrt-fp32")
    assert result.code == 1
    assert (
        "variant 'tensorrt-fp32' cannot be compiled here: it needs a GPU, and no NVIDIA driver" in result.err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "8"), "batches, compute capability and workspace are for TensorRT alone"),
        (("--workspace-mib", "64"), "batches, compute capability and workspace are for TensorRT alone"),
        (("--batch", "1,2,3"), "batch: got '1,2,3', expected N"),
        (("--variant", "onnx-fp8"), "no variant 'onnx-fp8'; it has"),
        (
            ("--backend", "tensorrt_rtx"),
            "cannot be compiled here: backend 'tensorrt_rtx' runs tensorrt files",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Command, tiny_bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    named = () if "--variant" in arguments else ("--variant", "onnx-int8")
    result = run("compile", tiny_bundle, *named, *arguments)
    assert result.code == 1
    assert message in result.err


def test_a_tower_a_variant_lacks_is_named(run: Command, tmp_path: Path) -> None:
    from tiny_bundle import make_tiny_bundle

    make_tiny_bundle(tmp_path / "b", text_tower=False)
    result = run("compile", tmp_path / "b", "--tower", "text")
    assert result.code == 1
    assert "has no 'text' tower" in result.err
    assert run("compile", tmp_path / "b").code == 0


# --- the environment


_WITHOUT = (
    "import sys\n"
    "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'openvino', 'nncf', 'tensorrt', "
    "'tensorrt_rtx', 'tensorrt_rtx_bindings', 'tensorrt_bindings'):\n"
    "    sys.modules[name] = None\n"
    "from edgeclip.cli import main\n"
    "main(sys.argv[1:])\n"
)


@pytest.mark.parametrize("command", ["compile", "verify"])
def test_help_and_work_need_no_torch_onnx_or_tensorrt(command: str, tiny_bundle_session: Path) -> None:
    for arguments in (("--help",), (str(tiny_bundle_session),)):
        result = subprocess.run(
            [sys.executable, "-c", _WITHOUT, command, *arguments], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout


def test_help_loads_click_only() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport io, contextlib\nfrom edgeclip.cli import _run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n    _run(['compile', '--help'], debug=False)\n"
        "print(' '.join({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert not loaded & {"numpy", "torch", "onnx", "onnxruntime", "tensorrt", "openvino", "msgspec"}


def test_options_stay_usable_after_compiling(tiny_bundle: Path) -> None:
    """Options are values: compiling changes none of them."""
    options = RuntimeOptions(threads=1)
    before = replace(options)
    bundle = Bundle.open(tiny_bundle)
    from edgeclip.runtime.compile import compile_variant

    compile_variant(bundle.variant("onnx-fp32"), options=options)
    assert options == before
