"""``edgeclip verify``, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wrong_bundle import put_wrong_model

from edgeclip.bundle import Bundle, BundleWriter, Variant
from edgeclip.cli import _run
from edgeclip.errors import BackendUnavailableError
from edgeclip.export import verify as export_verify
from edgeclip.runtime import ort
from edgeclip.runtime.choose import with_cache
from edgeclip.runtime.host import Host
from edgeclip.runtime.session import RuntimeOptions


def verify(*arguments: str | Path) -> int:
    return _run(["verify", *map(str, arguments)], debug=False)


def test_a_good_bundle_is_shown_and_ends_with_0(
    tiny_bundle_session: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(tiny_bundle_session) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert "9 of 9 files are as the manifest says" in lines[0]
    assert lines[1].split()[:5] == ["variant", "tower", "n", "max", "abs"]
    assert [line.split()[:3] for line in lines[2:]] == [
        ["onnx-fp32", "image", "16"],
        ["onnx-fp32", "text", "8"],
        ["onnx-int8", "image", "16"],
        ["onnx-int8", "text", "8"],
    ]
    assert all(line.endswith("passed") for line in lines[2:])
    assert shown.err == ""


def test_one_variant_can_be_named(tiny_bundle_session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tiny_bundle_session, "--variant", "onnx-int8", "--threads", "1") == 0
    assert "onnx-fp32" not in capsys.readouterr().out


def test_json_is_one_document(tiny_bundle_session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tiny_bundle_session, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["schema"], said["kind"], said["files"], said["damaged"]) == (1, "verify", 9, [])
    int8 = said["variants"]["onnx-int8"]
    assert int8["status"] == "passed"
    assert int8["towers"]["image"]["bank"] == "colours"
    assert int8["towers"]["image"]["cosine_mean"] > 0.99
    assert said["host"]["fingerprint"]


def test_wrong_numbers_end_with_4_and_name_variant_number_limit_and_row(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_wrong_model(tiny_bundle, tmp_path)
    assert verify(tiny_bundle) == 4
    shown = capsys.readouterr()
    assert "FAILED" in shown.out
    assert shown.err.count("\n") == 1
    for words in ("onnx-int8: image cosine_mean is ", "expected at least 0.99 (worst row "):
        assert words in shown.err


def test_a_damaged_file_ends_with_1_and_is_named(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model,) = tiny_bundle.glob("onnx-int8/image.*.onnx")
    content = bytearray(model.read_bytes())
    content[100] ^= 1
    model.write_bytes(content)
    assert verify(tiny_bundle) == 1
    shown = capsys.readouterr()
    assert "8 of 9 files" in shown.out
    assert "onnx-int8: not run: " in shown.out
    assert model.name in shown.err
    assert "is damaged" in shown.err


def test_every_damaged_file_is_listed(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in tiny_bundle.glob("onnx-*/image.*.onnx"):
        model.unlink()
    assert verify(tiny_bundle) == 1
    shown = capsys.readouterr()
    assert shown.out.count("is missing") >= 2
    assert "(2 files are damaged)" in shown.err


def test_an_engine_that_is_not_here_is_not_run_and_fails_only_where_that_counts(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["variants"]["onnx-int8"]["requires"] = {"isa_any": ["an_isa_of_the_future"]}
        writer.commit()
    assert verify(tiny_bundle) == 0
    assert "onnx-int8: not run: it needs one of an_isa_of_the_future" in capsys.readouterr().out
    assert verify(tiny_bundle, "--require-verified") == 4
    assert "not verified here (onnx-int8: it needs one of an_isa_of_the_future" in capsys.readouterr().err
    assert verify(tiny_bundle, "--variant", "onnx-int8") == 1
    assert "'onnx-int8' cannot be run here" in capsys.readouterr().err


def test_without_golden_file_nothing_is_run(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["golden"] = None
        writer.commit()
    assert verify(tiny_bundle) == 0
    assert "not run: the bundle has no golden file" in capsys.readouterr().out
    assert verify(tiny_bundle, "--require-verified") == 4


def test_a_model_that_does_not_load_fails_the_gate(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with BundleWriter(tiny_bundle) as writer:
        entry = writer.manifest["variants"]["onnx-int8"]["towers"]["image"]
        stored = writer.add("onnx-int8/image.onnx", b"\x08\x09")  # protobuf, but no graph
        entry.update(model=stored, files=[stored])
        writer.commit()
    assert verify(tiny_bundle) == 4
    assert "ONNX Runtime" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-directory"], "does not exist"),
        (["{bundle}", "--variant", "onnx-int4"], "no variant 'onnx-int4'"),
    ],
)
def test_what_is_not_there_ends_with_1(
    tiny_bundle_session: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(*[argument.format(bundle=tiny_bundle_session) for argument in arguments]) == 1
    assert words in capsys.readouterr().err


def test_bad_syntax_ends_with_2(tiny_bundle_session: Path) -> None:
    assert verify(tiny_bundle_session, "--threads", "0") == 2


def test_a_device_nobody_has_is_named(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tiny_bundle, "--device", "quantum") == 1
    assert "device: got 'quantum', expected 'cpu'" in capsys.readouterr().err


def test_variants_are_checked_by_the_backend_that_was_asked_for(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(ort, "load", lambda *_, **__: pytest.fail("ONNX Runtime was opened"))
    assert verify(tiny_bundle_session, "--backend", "openvino", "--variant", "onnx-fp32") == 0
    assert capsys.readouterr().out.count("passed") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--device", "npu"],
            "with backend 'auto' on device 'npu' (onnx-fp32, onnx-int8: ort does not run on npu).",
        ),
        (["--backend", "tensorrt"], "with backend 'tensorrt' on device 'cpu' (onnx-fp32, onnx-int8: backend"),
        (
            ["--device", "npu", "--variant", "onnx-fp32"],
            "'onnx-fp32' cannot be run here: ort does not run on",
        ),
    ],
)
def test_what_was_asked_for_and_runs_nothing_is_an_error(
    tiny_bundle_session: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(tiny_bundle_session, *arguments) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_an_openvino_device_that_is_not_here_is_named(
    tiny_bundle_session: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    openvino = pytest.importorskip("openvino")
    if "NPU" in openvino.Core().available_devices:
        pytest.skip("this host has an NPU")
    assert verify(tiny_bundle_session, "--backend", "openvino", "--device", "npu") == 1
    assert "onnx-fp32, onnx-int8: device 'npu' is not here: OpenVINO sees CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "device"), [([], "cuda"), (["--device", "cpu"], "cpu"), (["--device", "cuda:1"], "cuda:1")]
)
def test_tensorrt_runs_on_its_gpu_unless_another_device_is_named(
    tiny_bundle: Path, arguments: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["variants"]["onnx-int8"]["format"] = "tensorrt"
        writer.commit()
    asked: dict[str, str] = {}

    def unmet(variant: Variant, *, options: RuntimeOptions, host: Host) -> str:
        asked[variant.name] = options.device
        return "not today"

    monkeypatch.setattr(export_verify, "unmet", unmet)
    verify(tiny_bundle, *arguments)
    assert asked == {"onnx-fp32": arguments[-1] if arguments else "cpu", "onnx-int8": device}


def test_what_was_not_compiled_is_not_run_and_what_was_is_found(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path | None] = []

    def golden_check(*_: object, options: RuntimeOptions) -> None:
        seen.append(options.cache_dir)
        raise BackendUnavailableError("it was not compiled for GPU on this host. Run edgeclip compile.")

    monkeypatch.setattr(export_verify, "unmet", lambda *_, **__: None)
    monkeypatch.setattr(export_verify, "golden_check", golden_check)
    assert verify(tiny_bundle, "--backend", "openvino", "--device", "gpu", "--variant", "onnx-fp32") == 1
    assert "cannot be run here: it was not compiled for GPU" in capsys.readouterr().err
    assert seen == [
        with_cache(Bundle.open(tiny_bundle).variant("onnx-fp32"), "image", RuntimeOptions()).cache_dir
    ]
    assert seen != [None]
