"""Names of variants and targets."""

from __future__ import annotations

import pytest

from edgeclip.errors import ConfigError
from edgeclip.export.variants import FORMS, TARGETS, VariantSpec, parse_variants


def test_a_target_of_its_own_goes_before_the_default_one() -> None:
    first, second = parse_variants(["onnx-int8@arm64-dotprod", "onnx-int8"], target="x86-vnni")
    assert (first.name, second.name) == ("onnx-int8@arm64-dotprod", "onnx-int8@x86-vnni")
    assert second.target is not None
    assert second.target.requires.isa_any == ("avx512_vnni", "avx_vnni")
    assert parse_variants(["onnx-fp32, openvino-fp16"])[1] == VariantSpec.parse("openvino-fp16")
    assert VariantSpec.parse("onnx-fp32").target is None


@pytest.mark.parametrize(
    ("texts", "target", "said"),
    [
        (["onnx-int4"], None, "'onnx-int4'.*expected one of onnx-fp32"),
        (["onnx-int8@x86-avx3"], None, "'x86-avx3'.*x86-avx2"),
        (["onnx-int8"], "pi5", "'pi5'"),
        (["tensorrt-int8@x86-avx2"], None, "tensorrt files cannot serve 'x86-avx2'.*cuda-sm75"),
        (["onnx-fp32"], "cuda-sm87", "onnx files cannot serve 'cuda-sm87'"),
        (["onnx-fp32", "onnx-fp32"], None, "'onnx-fp32' is asked for twice"),
        ([" , "], None, "no variant"),
    ],
)
def test_names_that_cannot_be_used(texts: list[str], target: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_variants(texts, target=target)


def test_every_form_serves_some_target() -> None:
    for form in FORMS.values():
        assert any(form.format in target.formats for target in TARGETS.values())
