"""Labelled pictures of the commands that fit heads: chosen, embedded by the bundle, with what each is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ._options import cache_dir_option, threads_option, together, variant_option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeclip.bundle import Bundle
    from edgeclip.evaluate.picture_sets import Picture, PictureSet

    from ._options import ModelChoice, Notes

__all__ = ["bank_of", "check_own", "embed_labelled", "labelled_options", "store_for_bank"]

_FITTED_ON_CHARS = 120

T = TypeVar("T")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def labelled_options(command: _Command) -> _Command:
    """Add the options that all commands have which fit heads on labelled pictures."""
    return together(
        click.option(
            "--max-left-out",
            default="1%",
            show_default=True,
            metavar="N|N%",
            help="Pictures that may be unlabelled or broken.",
        ),
        variant_option,
        threads_option,
        cache_dir_option,
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    )(command)


def check_own(bundle_path: str) -> None:
    """Refuse to write into a bundle of the installation.

    Raises:
        ConfigError: it is one; the message says how to get a copy.
    """
    from edgeclip.bundle import EMBEDDED
    from edgeclip.errors import ConfigError

    if bundle_path in EMBEDDED:
        raise ConfigError(
            f"bundle {bundle_path!r} is part of the installation, which every program shares: copy it with "
            f"`edgeclip bundle slim {bundle_path} -o DIR` and write there."
        )


def bank_of(opened: Bundle, asked: str | None) -> str:
    """Return the name of the label bank that was asked for, else of the bundle's default one.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    from edgeclip.errors import ConfigError

    banks = opened.manifest.label_banks
    name = asked or opened.manifest.default_bank
    if name is None or name not in banks:
        raise ConfigError(
            f"{opened.where}: has no label bank {asked or 'by default'!r}, expected one of "
            f"{', '.join(map(repr, banks)) or 'none'}; what is fitted belongs to a bank."
        )
    return name


def store_for_bank(opened: Bundle, bank: str, *, kind: str, name: str, content: bytes, said: str) -> None:
    """Store a head that belongs to a bank, in place of every other one of its kind that does.

    Args:
        opened: a bundle of one's own.
        bank: the bank.
        kind: of the head, as the manifest names it.
        name: what the head is called, before the name of the bank.
        content: the head's file.
        said: what it was fitted on; of a long text the end.
    """
    from edgeclip.bundle import BundleWriter

    with BundleWriter(opened.path) as writer:
        stored: dict[str, Any] = writer.manifest.setdefault("heads", {})
        for key in [key for key, each in stored.items() if (each["kind"], each.get("bank")) == (kind, bank)]:
            del stored[key]
        stored[f"{name}-{bank}"] = {
            "kind": kind,
            "file": writer.add(f"heads/{name}-{bank}.safetensors", content),
            "bank": bank,
            "fitted_on": said[-_FITTED_ON_CHARS:],
        }
        writer.commit()


def embed_labelled(
    opened: Bundle,
    pictures: PictureSet,
    usable: Callable[[Picture], T | str],
    model: ModelChoice,
    limit: int | None,
    max_left_out: str,
    notes: Notes,
) -> tuple[NDArray[np.float32], list[T], int]:
    """Return embeddings ``(N, E)``, what each picture is for, and how many pictures are left out.

    Args:
        opened: the bundle, whose image tower runs.
        pictures: the set.
        usable: what a picture is for; a text says why it is for nothing.
        model: how it runs.
        limit: pictures at most, spread over the set.
        max_left_out: pictures that may be of no use or broken, ``"3"`` or ``"1%"``.
        notes: progress.

    Raises:
        InputError: nothing can be used, or too much cannot.
    """
    import numpy as np

    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.distill.samples import BrokenLimit
    from edgeclip.evaluate.passes import Passes, check_left_out, choose
    from edgeclip.evaluate.subjects import BundleSubject
    from edgeclip.runtime.host import usable_cores

    allowed = BrokenLimit.parse(max_left_out).allowed
    chosen = choose(pictures, usable, limit=limit, allowed=allowed)
    rows: list[NDArray[np.float32]] = []
    uses: list[T] = []
    subject = BundleSubject(
        str(opened.path), ZeroShotClassifier.open(opened, variant=model.variant, options=model.options())
    )
    try:
        with Passes([subject], workers=usable_cores()) as passes:
            for batch in passes.batches(chosen):
                for _, embedded in passes.embedded(batch):
                    rows.append(embedded)
                uses += batch.uses
                notes.progress(f"pictures: {len(uses):,} of {chosen.count:,}")
            unread = tuple(passes.left_out)
    finally:
        notes.done()
        subject.close()
    check_left_out(pictures, unread, chosen.count, allowed)
    return np.concatenate(rows), uses, len(chosen.left_out) + len(unread)
