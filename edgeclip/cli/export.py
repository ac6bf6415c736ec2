"""``edgeclip export``: from a checkpoint to a verified bundle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edgeclip.cli._options import (
    Int8Choice,
    Notes,
    int8_options,
    is_there,
    prepare_stdout,
    shown,
    templates_of,
)
from edgeclip.tables import aligned

if TYPE_CHECKING:
    from edgeclip.export.options import ExportReport, Offered, Step

__all__ = ["export"]

_DEFAULT_VARIANT = "onnx-fp32"
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._@+-]+")


@click.command(
    epilog="Example: edgeclip export run/model --variant onnx-fp32 --variant openvino-fp16 -o bundle"
)
@click.argument("checkpoint", metavar="CHECKPOINT|MODEL")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME[@TARGET]",
    help="onnx-, openvino- or tensorrt- with fp32, fp16 or int8; repeat it.  [default: onnx-fp32, which runs "
    "wherever the base install does and needs no calibration]",
)
@click.option("--target", metavar="TARGET", help="Target of variants that name none, such as arm64-dotprod.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="Bundle to write, or to add to.",
)
@click.option("--model", metavar="NAME", help="Model of a weights file that does not tell which it is.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help="Pictures to compare on; 16 of them go into the bundle, scaled to the tower's size.  [default: "
    "edgeclip's photographs]",
)
@click.option(
    "--labels",
    metavar="FILE|NAME|A,B,…",
    help="Labels of the bundle: a file, or a bank of the embedded bundle.  [default: 100 everyday names]",
)
@click.option("--templates", metavar="NAME|FILE", help="Prompts around --labels.  [default: one, or zh]")
@click.option("--bake-labels", is_flag=True, help="Add a graph 'classifier' with the labels inside (ONNX).")
@click.option("--no-text", is_flag=True, help="No text tower: the bundle's labels are all it knows.")
@click.option("--float-input", is_flag=True, help="Pictures as float32 (B, 3, H, W), normalized by the host.")
@click.option("--static-batch", type=int, metavar="N", help="The one batch the towers take.  [default: any]")
@click.option("--opset", type=int, metavar="N", help="ONNX operator set, 17 to 24.  [default: 20]")
@int8_options(without_target="a fixed policy", pictures="other crops of the reference pictures")
@click.option(
    "--int8-method",
    metavar="METHOD",
    help="How int8 ranges are chosen: minmax, moving-average, percentile:99.99, entropy or mse.  [default: "
    "mse for convolutions, minmax for transformers]",
)
@click.option(
    "--int8-text",
    type=click.Choice(["full", "weights"]),
    default="weights",
    show_default=True,
    help="Compute text towers in int8 on CPUs, or store only their weights so.",
)
@click.option(
    "--finish-int8",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Train the image tower so many steps first, so that int8 costs it less; 120 are a good start.",
)
@click.option(
    "--keep-intermediate",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the float32 graphs and what was written on the way.",
)
@click.option(
    "--require-verified",
    is_flag=True,
    help="Fail where a variant cannot be run here as it will be: its engine, device or instruction sets are "
    "missing.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="PRECISION|VARIANT:NUMBER=LIMIT",
    help="Set a limit on purpose, as int8:cosine_mean=0.97; the bundle says which default was missed.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of every engine.  [default: usable cores]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def export(
    *,
    checkpoint: str,
    variants: tuple[str, ...],
    target: str | None,
    output: Path,
    model: str | None,
    reference: Path | None,
    labels: str | None,
    templates: str | None,
    bake_labels: bool,
    no_text: bool,
    float_input: bool,
    static_batch: int | None,
    opset: int | None,
    int8_method: str | None,
    int8_text: Literal["full", "weights"],
    finish_int8: int | None,
    keep_intermediate: Path | None,
    require_verified: bool,
    limits: tuple[str, ...],
    threads: int | None,
    as_json: bool,
    **int8: Any,
) -> None:
    """Export a model to a bundle: every variant is compared with the float32 model, or nothing is written.

    CHECKPOINT is a directory that training wrote, or a published weights file; MODEL is a name of `edgeclip
    models list` whose weights were pulled. Variants are added to a bundle of the same model, and replace
    those of their name. Ends with 4 where a variant is beyond its limits. Needs pip install
    "edgeclip[export]".

    \b
    targets  x86-avx2 x86-vnni arm64-neon arm64-dotprod intel-gpu intel-npu cuda-sm75 … cuda-sm120
    limits   max_abs cosine_min cosine_mean centred_cosine_mean top1_agreement
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    from edgeclip.calibration.ranges import RangeMethod
    from edgeclip.export.build import BuildOptions, Int8Settings
    from edgeclip.export.options import (
        OPSET,
        Checkpoint,
        ExportSettings,
        Gates,
        GraphOptions,
        LimitChange,
    )
    from edgeclip.export.variants import parse_variants

    prepare_stdout()
    notes = Notes()
    if templates is not None and labels is None:
        raise click.UsageError("--templates needs --labels.")
    choice = Int8Choice(**int8)
    if choice.latency_table is not None and choice.int8_target is None:
        raise click.UsageError("--latency-table needs --int8-target.")
    specs = parse_variants(variants or (_DEFAULT_VARIANT,), target=target)
    settings = ExportSettings(
        graph=GraphOptions(
            opset=OPSET if opset is None else opset,
            static_batch=static_batch,
            float_input=float_input,
            text=not no_text,
            bake_labels=bake_labels,
        ),
        references=choice.references(reference, None if labels is None else _offered(labels, templates)),
        build=BuildOptions(
            int8=None if choice.int8_target is None else choice.search(_reports_of(output), threads),
            quantization=Int8Settings(
                None if int8_method is None else RangeMethod.parse(int8_method), text=int8_text
            ),
        ),
        gates=Gates(tuple(map(LimitChange.parse, limits)), require_verified=require_verified),
        threads=threads,
        finish_int8=finish_int8 or 0,
        keep_intermediate=keep_intermediate,
    )
    settings.check(specs)
    from edgeclip.export.exporter import export_bundle

    def show(step: Step) -> None:
        notes.progress(step.name if step.seconds is None else f"{step.name}: {step.seconds:.1f} s")

    try:
        exported = export_bundle(Checkpoint(checkpoint, model), specs, output, settings, on_step=show)
    finally:
        notes.done()
    for remark in exported.report.remarks:
        notes.say(remark)
    if as_json:
        click.echo(json.dumps(exported.report.to_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(_table(exported.report))


def _reports_of(bundle: Path) -> Path:
    """Return the folder beside a bundle for reports of what stays float."""
    path = bundle.resolve()
    return path.parent / f"{path.name}-sensitivity"


def _offered(said: str, templates: str | None) -> Offered:
    """Return the labels that were asked for, and what their bank is called."""
    from edgeclip.errors import InputError
    from edgeclip.export.options import Offered
    from edgeclip.export.reference import shipped_bank
    from edgeclip.label_sets import parse_labels, read_labels

    prompts = None if templates is None else templates_of(templates)
    if is_there(said):
        name = _NOT_IN_A_NAME.sub("-", Path(said).stem).strip("-.") or "labels"
        return Offered(name, read_labels(said), prompts)
    if "," in said:
        return Offered("labels", parse_labels(said), prompts)
    known = None if Path(said).suffix else shipped_bank(said)
    if known is None:
        raise InputError(
            f"--labels {said!r}: there is no such file, and no bank of that name in the embedded bundle; "
            "expected a label file, imagenet-1k, imagenet-1k-zh, or names with commas between them."
        )
    return known if prompts is None else Offered(said, known.labels, prompts)


def _table(report: ExportReport) -> str:
    reference = report.reference
    texts = f" and {reference['texts']} texts" if reference["texts"] else ""
    took = sum(step.seconds or 0.0 for step in report.steps)
    peak = "" if report.peak_rss_bytes is None else f", peak memory {report.peak_rss_bytes / 1e6:,.0f} MB"
    lines = [
        f"{report.model} -> {shown(report.bundle)}: {took:.1f} s{peak}",
        f"compared with float32 on {reference['pictures']} pictures ({reference['source']}){texts}",
    ]
    cosine = "cosine mean" if report.basis == "trained" else "centred cosine"
    rows: list[tuple[str, ...]] = [("variant", "tower", "MB", "max abs", "cosine min", cosine, "top-1", "")]
    for name, variant in report.variants.items():
        for tower, said in variant.towers.items():
            numbers = said.numbers
            cells = ["-"] * 4
            if numbers is not None:
                mean = numbers.cosine_mean if said.basis == "trained" else numbers.centred_cosine_mean
                cells = [
                    f"{numbers.max_abs:.1e}",
                    f"{numbers.cosine_min:.6f}",
                    "-" if mean is None else f"{mean:.6f}",
                    "-" if numbers.top1_agreement is None else f"{numbers.top1_agreement:.1%}",
                ]
            missed = f" (missed {', '.join(said.missed)})" if said.missed else ""
            rows.append((name, tower, f"{said.size_bytes / 1e6:.1f}", *cells, said.status + missed))
    lines += aligned(rows, range(2, 7))
    for name, variant in report.variants.items():
        reasons = {said.reason for said in variant.towers.values() if said.reason}
        proxies = {said.proxy for said in variant.towers.values() if said.proxy}
        lines += [f"{name}: unverified: {reason}" for reason in sorted(reasons)]
        lines += [f"{name}: its numbers are of a stand-in: {proxy}" for proxy in sorted(proxies)]
    for name, variant in report.variants.items():
        for tower, choice in variant.choices.items():
            target = ",".join(f"{number}={limit:g}" for number, limit in choice["target"].items())
            stays = f"{len(choice['kept'])} of {choice['products']} products stay float for {target}"
            lines.append(f"{name}, {tower} tower: {stays}")
    return "\n".join(lines)
