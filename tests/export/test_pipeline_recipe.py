"""Pipeline recipes: strict, and one sentence names the key, what was found and what was expected."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from edgeclip.calibration.sensitivity import Int8Target
from edgeclip.cli.export import export
from edgeclip.errors import ConfigError
from edgeclip.export.pipeline_recipe import (
    CalibrationSpec,
    PipelineRecipe,
    SizeGate,
    parse_pipeline,
    recipe_variants,
)

SHIPPED = ("ci-smoke", "cpu-int8", "intel-openvino", "jetson", "raspberry-pi5", "rtx")
KEYS = {
    "calibration_data": "data",
    "calibration_samples": "samples",
    "calibration_selection": "selection",
    "calibration_seed": "seed",
    "int8_method": "method",
    "int8_text": "text",
    "int8_target": "int8_target",
    "latency_table": "latency_table",
    "finish_int8": "finish_int8",
}
PLAIN = """
schema = 1
kind = "pipeline"
name = "plain"

[model]
checkpoint = "run/model"

[export]
variants = ["onnx-fp32", "onnx-int8@x86-avx2"]
"""


def parse(text: str, *changes: str, **how: Any) -> PipelineRecipe:
    return parse_pipeline(text.encode(), changes=changes, **how)


def with_gate(text: str) -> str:
    return f"{PLAIN}\n[[gate]]\n{text}"


def test_a_plain_recipe_is_read() -> None:
    recipe = parse(with_gate('kind = "size"\nmax_mb = 3'))
    assert recipe.model.checkpoint == "run/model"
    ((section, specs),) = recipe_variants(recipe)
    assert [spec.name for spec in specs] == ["onnx-fp32", "onnx-int8@x86-avx2"]
    assert section.static_batch is None
    assert recipe.gate == (SizeGate(name="size 0", max_mb=3),)


def test_changes_are_applied_before_anything_is_checked() -> None:
    recipe = parse(PLAIN, "export.variants=['onnx-fp16']", "bench.threads=1", "model.checkpoint=other/model")
    assert recipe.export is not None
    assert recipe.bench is not None
    assert (recipe.export.variants, recipe.bench.threads) == (("onnx-fp16",), 1)
    assert recipe.model.checkpoint == "other/model"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_want_nothing_but_a_checkpoint(name: str) -> None:
    content = files("edgeclip.export.recipes").joinpath(f"{name}.toml").read_bytes()
    with pytest.raises(ConfigError, match=r"\[model\]: got neither.*--set model.checkpoint=run/model"):
        parse_pipeline(content)
    recipe = parse_pipeline(content, changes=["model.checkpoint=x"])
    assert recipe.name == name
    assert content.decode().startswith("# ")
    assert b"What to change" in content or b"change" in content
    assert parse_pipeline(content, for_gates=True).gate == recipe.gate


def test_there_are_no_other_shipped_recipes() -> None:
    found = files("edgeclip.export.recipes").iterdir()
    names = sorted(
        each.name[:-5]
        for each in found
        if each.name.endswith(".toml") and b'kind = "pipeline"' in each.read_bytes()
    )
    assert tuple(names) == SHIPPED


def test_sections_are_further_exports_into_the_same_bundle() -> None:
    text = (
        PLAIN + '\n[[export.section]]\nvariants = ["openvino-fp16"]\ntarget = "intel-npu"\nstatic_batch = 1\n'
    )
    _, (section, specs) = recipe_variants(parse(text))
    assert [spec.name for spec in specs] == ["openvino-fp16@intel-npu"]
    assert section.static_batch == 1


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("kind = 'pipeline'", [], "expected schema = 1"),
        (PLAIN.replace('"pipeline"', '"train"'), [], "expected kind = 'pipeline'"),
        (PLAIN, ["export.variant=1"], r"\[export\]: Object contains unknown field `variant`; known are "),
        (PLAIN, ["colour=1"], "unknown field `colour`"),
        (PLAIN, ["export.opset=16"], r"\[export\]: opset: got 16, expected 17 to 24"),
        (PLAIN, ["export.opset='new'"], r"'opset' is 'new': expected `int`"),
        (PLAIN, ["export.variants=[]"], r"'variants' is \[\]"),
        (PLAIN, ["export.variants=['onnx-fp8']"], r"\[export\]: variant 'onnx-fp8': got 'onnx-fp8'"),
        (PLAIN, ["export.target='cuda-sm87'"], "onnx files cannot serve 'cuda-sm87'"),
        (PLAIN, ["export.limits=['int8:cosine=1']"], "limit 'int8:cosine=1': expected PRECISION"),
        (PLAIN, ["export.limits=['fp16:cosine_min=0.9']"], "limit of 'fp16': nothing that is asked for"),
        (
            PLAIN + '\n[[export.section]]\nvariants = ["onnx-fp32"]\n',
            [],
            "variant 'onnx-fp32' stands in two sections",
        ),
        (PLAIN, ["bench.variants=['onnx-fp16']"], r"\[bench\]: 'variants' has 'onnx-fp16', expected some of"),
        (PLAIN, ["calibration.method='best'"], r"\[calibration\]: 'method': int8 method 'best': expected"),
        (PLAIN, ["calibration.text='half'"], r"\[calibration\]: .*[Ii]nvalid enum value 'half'"),
        (
            PLAIN,
            ["calibration.int8_target='cosine=2'"],
            r"\[calibration\]: 'int8_target': int8 target 'cosine=2': expected NAME=LIMIT",
        ),
        (PLAIN, ["calibration.int8_target=0.99"], r"'int8_target' is 0.99: expected `str"),
        (
            PLAIN,
            ["calibration.int8_target='cosine=0.99'", "export.variants=['onnx-fp16']"],
            r"\[calibration\]: int8 target cosine=0.99: no int8 variant .* among onnx-fp16; add onnx-int8",
        ),
        (
            PLAIN,
            ["calibration.latency_table='times.json'"],
            r"\[calibration\]: 'latency_table' needs 'int8_target'",
        ),
        (PLAIN, ["calibration.finish_int8=0"], r"'finish_int8' is 0: expected `int` >= 1"),
        (
            PLAIN,
            ["calibration.finish_int8=4", "export.variants=['onnx-fp32']"],
            r"\[calibration\]: finishing for int8: no int8 variant .* among onnx-fp32; add onnx-int8",
        ),
        (PLAIN, ["calibration.selection='best'"], r"\[calibration\]: .*[Ii]nvalid enum value 'best'"),
        (PLAIN, ["calibration.seed=-1"], r"'seed' is -1: expected `int` >= 0"),
        (PLAIN, ["bench.batch=0"], r"'batch' is 0: expected `int` >= 1"),
        (PLAIN, ["model.bundle=b"], r"\[model\]: got \['bundle', 'checkpoint'\]"),
        (PLAIN.replace("checkpoint", "bundle"), [], r"got 'bundle' beside \[export\]"),
        (PLAIN.partition("[export]")[0], [], r"'checkpoint' without \[export\]"),
        (PLAIN, ["gate=[{kind='speed'}]"], r"\[\[gate\]\] 0: .*[Ii]nvalid value 'speed'"),
        (with_gate("max_mb = 1"), [], "missing required field `kind`"),
        (with_gate('kind = "size"\nmax_mb = 0'), [], r"'max_mb' is 0: expected `float` > 0"),
        (with_gate('kind = "size"\nmax_mb = nan'), [], "'max_mb' is nan"),
        (
            with_gate('kind = "size"\nmax_mb = 1\nvariants = ["x"]'),
            [],
            "names the variant 'x', expected one of",
        ),
        (with_gate('kind = "licence"\nallow = []'), [], r"'allow' is \[\]"),
        (
            with_gate('kind = "accuracy"\ndata = "d"\nvariant = "onnx-fp32"'),
            [],
            "got neither 'min' nor 'max_drop'",
        ),
        (
            with_gate('kind = "accuracy"\ndata = "d"\nvariant = "onnx-fp32"\nmax_drop = 0.1\nagainst = "y"'),
            [],
            "names the variant 'y'",
        ),
        (
            with_gate('kind = "latency"\nvariant = "onnx-fp32"\nbaseline = "onnx-fp32"'),
            [],
            "'baseline' is 'onnx-fp32', the variant itself",
        ),
        (
            with_gate(
                'kind = "size"\nname = "s"\nmax_mb = 1\n[[gate]]\nkind = "size"\nname = "s"\nmax_mb = 2'
            ),
            [],
            r"the names \['s'\] stand twice",
        ),
        (PLAIN, ["export"], "--set 'export': expected key=value, such as model.checkpoint=run/model"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(text: str, changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(text, *changes)
    assert "\n" not in str(caught.value)


def test_every_choice_about_int8_reaches_the_export(tmp_path: Path) -> None:
    recipe = parse(
        PLAIN,
        "calibration.int8_target='cosine=0.99,top1=0.98'",
        "calibration.latency_table='times.json'",
        "calibration.finish_int8=120",
        "calibration.method='percentile:99.9'",
        "calibration.text='full'",
        "calibration.selection='stratified'",
        "calibration.seed=7",
        "calibration.samples=32",
    )
    calibration = recipe.calibration
    ((_, specs),) = recipe_variants(recipe)
    build = calibration.build(specs, tmp_path, reports=tmp_path / "r", threads=3)
    assert build.int8 is not None
    assert build.int8.target == Int8Target(cosine=0.99, top1=0.98)
    assert (build.int8.latency_table, build.int8.folder) == (tmp_path / "times.json", tmp_path / "r")
    assert build.int8.threads == 3
    assert (str(build.quantization.method), build.quantization.text) == ("percentile:99.9", "full")
    assert (calibration.selection, calibration.seed, calibration.samples) == ("stratified", 7, 32)
    assert calibration.finish_int8 == 120
    assert calibration.build([spec for spec in specs if spec.name == "onnx-fp32"]).int8 is None


def test_every_option_about_int8_has_a_key() -> None:
    words = ("int8", "calibration", "latency", "accuracy")
    said = {str(option.name) for option in export.params}
    assert {name for name in said if any(word in name for word in words)} == set(KEYS)
    assert set(KEYS.values()) == set(CalibrationSpec.__struct_fields__)


def test_an_eager_reference_needs_a_checkpoint() -> None:
    text = """
schema = 1
kind = "pipeline"
name = "finished"
[model]
bundle = "b"
[[gate]]
kind = "accuracy"
data = "d"
variant = "onnx-int8"
max_drop = 0.1
"""
    with pytest.raises(ConfigError, match="'max_drop' against 'eager' needs"):
        parse(text)
    assert parse(text, "gate.0.against=onnx-fp32").gate
