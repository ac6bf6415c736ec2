"""``edgeclip bench``: where the time of a bundle goes. So far operator by operator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._options import BACKENDS, SCHEMA, Notes, bundle_directory, prepare_stdout, shown

if TYPE_CHECKING:
    from edgeclip.bench.per_op import OpProfile

__all__ = ["bench"]


@click.command(
    epilog="Example: edgeclip bench --per-op my-bundle --variant onnx-fp32 --variant onnx-int8 --threads 1"
)
@click.argument("bundle", default="default", metavar="[BUNDLE]")
@click.option(
    "--per-op",
    is_flag=True,
    required=True,
    expose_value=False,
    help="Time every operator of the towers.",
)
@click.option(
    "--variant", "variants", multiple=True, help="Variants, each on its own.  [default: the one of auto]"
)
@click.option(
    "--tower", type=click.Choice(["image", "text"]), default="image", show_default=True, help="Which tower."
)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Engine.")
@click.option("--device", default="cpu", show_default=True, help="cpu; with OpenVINO also gpu and npu.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the tower.  [default: usable cores]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Inputs a call.")
@click.option("--runs", type=click.IntRange(min=1), default=30, show_default=True, help="Timed calls.")
@click.option("--most", type=click.IntRange(min=1), default=20, show_default=True, help="Rows to show.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the JSON document here, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench(
    *,
    bundle: str,
    variants: tuple[str, ...],
    tower: str,
    backend: str,
    device: str,
    threads: int | None,
    batch: int,
    runs: int,
    most: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Say where the time of the towers of BUNDLE goes, operator by operator.

    ONNX Runtime and OpenVINO time their own kernels, which slows small ones down: the time of a call without
    that stands beside them. Inputs are noise. BUNDLE is a directory, or hf:ORG/NAME@REV; without, the
    embedded bundle.
    """
    from edgeclip.bench.per_op import profile_tower
    from edgeclip.bundle import Bundle
    from edgeclip.errors import InputError
    from edgeclip.runtime.choose import choose_variant
    from edgeclip.runtime.session import RuntimeOptions

    prepare_stdout()
    if output is not None and not output.resolve().parent.is_dir():
        raise InputError(f"--output {str(output)!r}: there is no directory {str(output.parent)!r}; make it.")
    notes = Notes()
    options = RuntimeOptions(backend=backend, device=device, threads=threads)
    opened = Bundle.open(bundle_directory(bundle, notes))
    chosen = [
        choose_variant(opened, variant=name, options=options).variant
        for name in dict.fromkeys(variants or ("auto",))
    ]
    profiles: list[OpProfile] = []
    try:
        for variant in chosen:

            def show(done: int, name: str = variant.name) -> None:
                notes.progress(f"{name}: call {done}")

            profiles.append(
                profile_tower(variant.tower(tower), options=options, batch=batch, runs=runs, on_run=show)
            )
    finally:
        notes.done()
    document = {
        "schema": SCHEMA,
        "kind": "op-profiles",
        "bundle": str(opened.path),
        "digest": opened.digest,
        "profiles": [profile.to_dict() for profile in profiles],
    }
    text = json.dumps(document, indent=2, ensure_ascii=False)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
        notes.say(f"wrote {shown(output)}")
    click.echo(text if as_json else "\n\n".join(profile.to_table(most=most) for profile in profiles))
