"""``edgeclip bench --per-op``: where the time of towers goes, operator by operator."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._options import SCHEMA, Notes, bundle_directory, shown

if TYPE_CHECKING:
    from edgeclip.bench.op_tables import Level
    from edgeclip.bench.per_op import OpProfile
    from edgeclip.runtime.session import RuntimeOptions

__all__ = ["PerOpChoice", "per_op"]


@dataclass(frozen=True)
class PerOpChoice:
    """What is timed, and what is shown of it.

    Attributes:
        tower: which of the two.
        batch: inputs a call.
        runs: timed calls.
        most: rows of the table; all blocks and stages, and 20 kernels, where it is not given.
        level: what a row of the table is: ``"block"``, ``"stage"`` or ``"kernel"``.
    """

    tower: str = "image"
    batch: int = 1
    runs: int = 30
    most: int | None = None
    level: Level = "block"


def per_op(
    bundle: str,
    variants: tuple[str, ...],
    options: RuntimeOptions,
    choice: PerOpChoice,
    *,
    output: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Time every operator of the towers of a bundle and print what was found; ``trace`` gets a trace of it.

    Raises:
        EdgeClipError: as :func:`edgeclip.bench.per_op.profile_tower`.
    """
    from edgeclip.bench.op_tables import profile_table, side_by_side
    from edgeclip.bench.peaks import Peaks
    from edgeclip.bench.per_op import profile_tower
    from edgeclip.bench.trace import to_trace
    from edgeclip.bundle import Bundle
    from edgeclip.labels import write_atomic
    from edgeclip.runtime.choose import choose_variant

    notes = Notes()
    opened = Bundle.open(bundle_directory(bundle, notes))
    chosen = [
        choose_variant(opened, variant=name, options=options).variant
        for name in dict.fromkeys(variants or ("auto",))
    ]
    profiles: dict[str, OpProfile] = {}
    peaks = Peaks() if options.device == "cpu" else None
    try:
        for variant in chosen:

            def show(done: int, name: str = variant.name) -> None:
                notes.progress(f"{name}: call {done}")

            profiles[variant.name] = profile_tower(
                variant.tower(choice.tower),
                options=options,
                batch=choice.batch,
                runs=choice.runs,
                account=True,
                peaks=peaks,
                on_run=show,
            )
    finally:
        notes.done()
    document = {
        "schema": SCHEMA,
        "kind": "op-profiles",
        "bundle": str(opened.path),
        "digest": opened.digest,
        "profiles": [profile.to_dict() for profile in profiles.values()],
    }
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        if output is not None:
            write_atomic(output, (text + "\n").encode())
            notes.say(f"wrote {shown(output)}")
        if trace is not None:
            write_atomic(trace, (to_trace(profiles) + "\n").encode())
            notes.say(f"wrote {shown(trace)}: open it in ui.perfetto.dev or chrome://tracing")
    finally:  # what was measured is shown wherever it could not be written
        if as_json:
            click.echo(text)
        elif len(profiles) > 1 and choice.level != "kernel":
            click.echo(side_by_side(profiles, choice.level, most=choice.most))
        else:
            tables = [profile_table(each, choice.level, most=choice.most) for each in profiles.values()]
            click.echo("\n\n".join(tables))
