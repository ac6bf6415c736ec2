"""``edgeclip compile``: build engines, blobs and optimised graphs of a variant on this host."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import BACKENDS, SCHEMA, Notes, bundle_directory, prepare_stdout, shown, threads_option

if TYPE_CHECKING:
    from edgeclip.bundle import Bundle, Variant
    from edgeclip.runtime.choose import VariantChoice
    from edgeclip.runtime.compile import CompiledTower
    from edgeclip.runtime.session import RuntimeOptions

__all__ = ["compile_"]

_RUNNABLE = tuple(name for name in BACKENDS if name != "eager")


@click.command("compile", epilog="Example: edgeclip compile default --variant onnx-int8 -o compiled")
@click.argument("bundle", default="default", metavar="[BUNDLE]")
@click.option("--variant", default="auto", show_default=True, help="Variant to compile.")
@click.option(
    "--tower",
    type=click.Choice(["image", "text", "all"]),
    default="all",
    show_default=True,
    help="Which towers.",
)
@click.option("--backend", type=click.Choice(_RUNNABLE), default="auto", show_default=True, help="Engine.")
@click.option(
    "--device",
    help="cpu, cuda or cuda:N; for OpenVINO gpu, gpu:N or npu too.  [default: cuda for TensorRT, else cpu]",
)
@threads_option
@click.option(
    "--batch",
    metavar="N|OPT,MAX|MIN/OPT/MAX",
    help="Batches a TensorRT engine is for.  [default: 1/1/8 of pictures, 1/16/64 of texts]",
)
@click.option(
    "--compute-capability",
    metavar="X.Y|any",
    help="Build for GPUs of another machine; needs TensorRT-RTX and -o.",
)
@click.option("--workspace-mib", type=click.IntRange(min=1), help="Memory of the GPU TensorRT may work with.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Keep it in this directory instead of the host cache; other commands take it as --cache-dir.",
)
@click.option("--force", is_flag=True, help="Make it again although it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def compile_(
    *,
    bundle: str,
    variant: str,
    tower: str,
    backend: str,
    device: str | None,
    threads: int | None,
    batch: str | None,
    compute_capability: str | None,
    workspace_mib: int | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compile a variant of BUNDLE for this host, so that opening it is quick.

    TensorRT variants run only after it: it builds their engines, which takes seconds to minutes and holds
    for this GPU and this version of TensorRT. OpenVINO keeps its blobs, ONNX Runtime its optimised graphs.
    What is there already is left alone. "auto" is what the tuned profile names, made for its engine. BUNDLE
    is a directory, or hf:ORG/NAME@REV; without, the embedded bundle.
    """
    if compute_capability is not None and output is None:
        raise click.UsageError("--compute-capability builds for another machine: say where to with -o DIR.")
    began = time.perf_counter()
    from edgeclip.bundle import Bundle
    from edgeclip.runtime.compile import EngineChoices, compile_variant
    from edgeclip.runtime.trt_build import BatchRange

    prepare_stdout()
    notes = Notes()
    choices = EngineChoices(
        batch=None if batch is None else BatchRange.parse(batch),
        compute_capability=compute_capability,
        workspace_bytes=None if workspace_mib is None else workspace_mib << 20,
    )
    opened = Bundle.open(bundle_directory(bundle, notes))
    options = _options(opened, variant, backend, device, threads)
    choice = _choice(opened, variant, options)
    chosen = choice.variant
    if output is not None:
        from dataclasses import replace

        output.mkdir(parents=True, exist_ok=True)
        options = replace(options, cache_dir=output)
    started = time.perf_counter()

    def on_progress(of: str, said: str) -> None:
        notes.progress(f"{chosen.name} {of} tower: {said}, {time.perf_counter() - started:.0f} s")

    try:
        compiled = compile_variant(
            choice,
            towers=None if tower == "all" else (tower,),
            options=options,
            choices=choices,
            force=force,
            on_progress=on_progress,
        )
    finally:
        notes.done()
    if as_json:
        document = _document(opened, chosen, compiled, time.perf_counter() - began)
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    for each in compiled:
        click.echo(f"{chosen.name} {each.tower} tower: {_said(each)}")


def _options(
    bundle: Bundle, variant: str, backend: str, device: str | None, threads: int | None
) -> RuntimeOptions:
    from edgeclip.runtime.session import RuntimeOptions

    if device is None:
        named = bundle.manifest.variants.get(variant)
        device = "cuda" if named is not None and named.format == "tensorrt" else "cpu"
    return RuntimeOptions(backend=backend, device=device, threads=threads)


def _choice(bundle: Bundle, name: str, options: RuntimeOptions) -> VariantChoice:
    from edgeclip.runtime.choose import VariantChoice, choose_variant

    if name != "auto":  # it may be for another host: whether it runs is for the compiler to say
        return VariantChoice(bundle.variant(name), f"variant {name} was asked for")
    return choose_variant(bundle, options=options)


def _said(compiled: CompiledTower) -> str:
    prepared = compiled.prepared
    if prepared.path is None:
        return f"nothing to compile for {compiled.backend}"
    size = f"{prepared.size_bytes / 1e6:,.1f} MB"
    done = "up to date" if prepared.up_to_date else f"built in {prepared.seconds:.1f} s"
    return f"{done}, {size}, {shown(prepared.path)}"


def _document(
    bundle: Bundle, variant: Variant, compiled: tuple[CompiledTower, ...], seconds: float
) -> dict[str, Any]:
    from edgeclip.runtime.host import Host, versions

    return {
        "schema": SCHEMA,
        "kind": "compile",
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "variant": variant.name,
        "towers": {
            each.tower: {
                "backend": each.backend,
                "path": None if each.prepared.path is None else str(each.prepared.path),
                "size_bytes": each.prepared.size_bytes,
                "seconds": each.prepared.seconds,
                "up_to_date": each.prepared.up_to_date,
            }
            for each in compiled
        },
        "seconds": seconds,
        "host": Host.here().to_dict(),
        "versions": versions(),
    }
