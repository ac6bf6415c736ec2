"""``edgeclip bench --per-op``: where the time of towers goes, operator by operator."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._options import SCHEMA, Notes, bundle_directory, shown

if TYPE_CHECKING:
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
        most: rows of the table.
    """

    tower: str = "image"
    batch: int = 1
    runs: int = 30
    most: int = 20


def per_op(
    bundle: str,
    variants: tuple[str, ...],
    options: RuntimeOptions,
    choice: PerOpChoice,
    *,
    output: Path | None,
    as_json: bool,
) -> None:
    """Time every operator of the towers of a bundle and print what was found.

    Raises:
        EdgeClipError: as :func:`edgeclip.bench.per_op.profile_tower`.
    """
    from edgeclip.bench.per_op import profile_tower
    from edgeclip.bundle import Bundle
    from edgeclip.labels import write_atomic
    from edgeclip.runtime.choose import choose_variant

    notes = Notes()
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
                profile_tower(
                    variant.tower(choice.tower),
                    options=options,
                    batch=choice.batch,
                    runs=choice.runs,
                    on_run=show,
                )
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
        write_atomic(output, (text + "\n").encode())
        notes.say(f"wrote {shown(output)}")
    click.echo(text if as_json else "\n\n".join(each.to_table(most=choice.most) for each in profiles))
