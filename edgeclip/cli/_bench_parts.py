"""What the bench commands do alike: read pictures and labels, check where results go, and show them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import click

from ._options import LabelChoice, Notes, shown

if TYPE_CHECKING:
    from edgeclip.bench.compare_child import LabelsAsked
    from edgeclip.bench.workload import Workload

__all__ = [
    "ARGUMENTS",
    "Shown",
    "command_line",
    "labels_asked",
    "pictures_of",
    "show_document",
    "sources_of",
    "workload_of",
]

ARGUMENTS: Final = "edgeclip.arguments"
"""Where the context keeps what stood behind ``edgeclip bench``."""


class Shown(Protocol):
    """A document that is a table for people and JSON for programs."""

    def to_json(self) -> str:
        """Return it as JSON."""
        ...

    def to_table(self) -> str:
        """Return it as text for a terminal."""
        ...


def command_line() -> str:
    """Return what the user typed, for the report."""
    return shlex.join(["edgeclip", "bench", *click.get_current_context().meta[ARGUMENTS]])


def pictures_of(images: Path | None, notes: Notes) -> tuple[Path, ...]:
    """Return the pictures of ``--images``; the demonstration photographs, without.

    Raises:
        InputError: there are none.
    """
    from edgeclip.bench.workload import DEMO, MAX_PICTURES, picture_files

    pictures = picture_files(DEMO if images is None else images)
    if images is not None and len(pictures) == MAX_PICTURES:
        notes.say(f"the first {MAX_PICTURES} pictures of {shown(images)} are used")
    return pictures


def workload_of(images: Path | None, offered: LabelChoice, notes: Notes) -> Workload:
    """Return the pictures and labels that were asked for.

    Raises:
        InputError: there are no pictures, or a label cannot be used.
    """
    from edgeclip.bench.workload import Workload

    pictures = pictures_of(images, notes)
    pictures_source, labels_source = sources_of(images, offered)
    return Workload(
        pictures,
        pictures_source,
        offered.read(),
        offered.read_templates(),
        labels_source,
        language=offered.language,
    )


def labels_asked(offered: LabelChoice) -> LabelsAsked:
    """Return the labels that were asked for, as another process takes them.

    Raises:
        InputError: one cannot be used.
    """
    from edgeclip.bench.compare_child import LabelsAsked
    from edgeclip.label_sets import LabelSet

    said, templates = offered.read(), offered.read_templates()
    if not isinstance(said, LabelSet):  # a bank is read once more where it is used
        return LabelsAsked(language=offered.language, bank=None if said is None else str(offered.label_file))
    return LabelsAsked(
        labels=tuple(label.to_json() for label in said.labels),
        templates=None if templates is None else templates.texts,
    )


def sources_of(images: Path | None, offered: LabelChoice) -> tuple[str, str]:
    """Return how a report calls where its pictures and its labels come from."""
    pictures = (
        "demonstration photographs" if images is None else f"pictures of {shown(images.name or images)}"
    )
    if offered.labels is not None:
        return pictures, "--labels"
    return pictures, "bundle" if offered.label_file is None else shown(offered.label_file.name)


def show_document(found: Shown, output: Path | None, notes: Notes, *, as_json: bool) -> None:
    """Print a document, and write it to a file where one is named.

    Raises:
        InputError: the file cannot be written; the document is printed nevertheless.
    """
    from edgeclip.labels import write_atomic

    text = found.to_json()
    try:
        if output is not None:
            write_atomic(output, (text + "\n").encode())
            notes.say(f"wrote {shown(output)}")
    finally:
        click.echo(text if as_json else found.to_table())
