"""``edgeclip search``: pictures of an index, by words or by another picture."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    SCHEMA,
    ModelChoice,
    Notes,
    bundle_directory,
    form_option,
    model_choice,
    quiet_broken_pipe,
    shown,
    stdout_of_results,
    templates_of,
)
from .index import indexed_variant

if TYPE_CHECKING:
    from edgeclip.bundle import Bundle
    from edgeclip.index_file import PictureIndex
    from edgeclip.search import Found

__all__ = ["search"]


@click.command()
@click.argument("query")
@click.argument("where", metavar="[DIR|INDEX]", default=".", type=click.Path(path_type=Path))
@model_choice
@click.option(
    "--templates",
    metavar="NAME|FILE",
    help="Prompt templates: bare, one, openai-7, openai-80, zh, a file, or text with one {}.  "
    "[default: the bundle's]",
)
@click.option(
    "--language", metavar="CODE", help="Take the templates of this language.  [default: that of the words]"
)
@click.option(
    "-k", "--top-k", type=click.IntRange(min=1), default=20, show_default=True, help="Pictures at most."
)
@click.option("--all", "everything", is_flag=True, help="Give the nearest, relevant or not.")
@click.option(
    "--min-score",
    type=click.FloatRange(-1, 1),
    help="Give what has this cosine at least, in place of the cut-off.",
)
@form_option("json", "Print one JSON document.")
@form_option("jsonl", "Print one JSON object a picture.")
@form_option("csv", "Print CSV, one row a picture.")
@form_option("paths", "Print paths, one a line.  [default in a pipe]")
@form_option("null", "Print paths, each ended by a null byte.", "-0")
@form_option("table", "Print a table.  [default on a terminal]")
def search(
    *,
    query: str,
    where: Path,
    model: ModelChoice,
    templates: str | None,
    language: str | None,
    top_k: int,
    everything: bool,
    min_score: float | None,
    form: str | None,
) -> None:
    """Find pictures of a folder that `edgeclip index` has indexed, by words or by a picture.

    QUERY is a picture where it is the path of one, else words; synonyms after '|'. Words bring what is
    relevant, nearest first: nothing, if the folder has nothing of it. A picture brings the nearest, itself
    left out. A folder without an index of its own is searched in that of a folder above it. In a pipe, paths
    come one a line.

    Example: edgeclip search "a red car" photos/ -0 | xargs -0 cp -t cars/
    """
    if everything and min_score is not None:
        raise click.UsageError("--all and --min-score cannot be given together.")
    if templates is not None and language is not None:
        raise click.UsageError("--templates and --language cannot be given together.")
    if os.path.isdir(query) and not where.exists():  # noqa: PTH112  # Path.is_dir raises for long names
        raise click.UsageError(f"the query comes first: edgeclip search {str(where)!r} {query!r}")
    from edgeclip.bundle import Bundle
    from edgeclip.index_file import PictureIndex

    results = stdout_of_results()
    notes = Notes()
    path, below = _indexed(where)
    opened_index = PictureIndex(path)
    base = where if where.is_dir() else _near(opened_index.root)
    picture = _picture(query, base)
    if picture is not None and (templates or language):
        raise click.UsageError("--templates and --language are for words; the query is a picture.")
    opened = Bundle.open(bundle_directory(model.bundle, notes))
    asked = _Asked(query, picture, top_k, everything, min_score, below)
    found = _find(asked, opened_index, opened, model, notes, templates, language)
    paths = [base / each.path.removeprefix(below) for each in found.matches]
    result = _Result(asked, opened_index, found, paths)
    try:
        result.write(form or ("table" if results.isatty() else "paths"))
    except BrokenPipeError:
        quiet_broken_pipe()
    result.remark(notes)


def _indexed(where: Path) -> tuple[Path, str]:
    """Return the index for a folder or of a file, and how the paths that are meant begin."""
    from edgeclip.index_file import index_path

    path = index_path(where)
    if where.is_dir() and not path.exists():
        whole = where.resolve()
        for folder in whole.parents:
            above = index_path(folder)
            if os.path.isfile(above):  # noqa: PTH113  # Path.is_file raises where it may not look
                return above, f"{whole.relative_to(folder).as_posix()}/"
    return path, ""


@dataclass(frozen=True)
class _Asked:
    """What was asked for."""

    query: str
    picture: Path | None
    top_k: int
    everything: bool
    min_score: float | None
    below: str

    @property
    def cut(self) -> bool:
        """Whether relevance decides."""
        return self.picture is None and not self.everything and self.min_score is None


def _picture(query: str, base: Path) -> Path | None:
    """Return the picture that a query is the path of, from here or in the indexed folder; ``None`` for words.

    Raises:
        InputError: it can only be the path of a picture, and there is none.
    """
    from edgeclip.data import PICTURE_SUFFIXES
    from edgeclip.errors import InputError

    from ._options import is_there

    path = Path(query)
    is_picture = path.suffix.lower() in PICTURE_SUFFIXES
    if is_picture or os.sep in query or (os.altsep or os.sep) in query:
        for found in (path, base / path):
            if not is_there(str(found)):
                continue
            if found.is_dir():
                raise InputError(f"{query!r} is a folder, expected words or the path of a picture.")
            return found
    if is_picture:
        raise InputError(f"{query!r}: no such picture. Check the path, or leave out the ending for words.")
    return None


def _find(
    asked: _Asked,
    index: PictureIndex,
    bundle: Bundle,
    model: ModelChoice,
    notes: Notes,
    templates: str | None,
    language: str | None,
) -> Found:
    from edgeclip.search import Searcher

    variant = indexed_variant(index.path, bundle, model.variant)
    options = model.options()
    with Searcher(index, bundle, variant=variant, options=options) as searcher:
        if asked.picture is not None:
            embedding = index.embedding_of(asked.picture)
            if embedding is None:
                from edgeclip.classify import ZeroShotClassifier

                with ZeroShotClassifier.open(bundle, variant=variant, options=options) as classifier:
                    embedding = classifier.embed_images(asked.picture)
            found = searcher.by_embedding(
                embedding, top_k=asked.top_k, leave_out=asked.picture, below=asked.below
            )
        else:
            chosen = None if templates is None else templates_of(templates)
            words = searcher.encode(asked.query, templates=chosen, language=language)
            for warning in searcher.warnings(words):
                notes.say(warning)
            found = searcher.by_text(words, top_k=asked.top_k, cut=asked.cut, below=asked.below)
    least = asked.min_score
    if least is None:
        return found
    return replace(found, matches=tuple(each for each in found.matches if each.similarity >= least))


def _near(folder: Path) -> Path:
    """Return a folder as a short path where it lies below the current one."""
    said = os.path.relpath(folder)
    return folder if said.startswith(os.pardir) else Path(said)


@dataclass(frozen=True)
class _Result:
    """What was found, and how it is written."""

    asked: _Asked
    index: PictureIndex
    found: Found
    paths: list[Path]

    def write(self, form: str) -> None:
        """Write it to standard output."""
        if form in ("paths", "null"):
            end = b"\0" if form == "null" else b"\n"
            sys.stdout.flush()
            content = b"".join(os.fsencode(path) + end for path in self.paths)
            stream = getattr(sys.stdout, "buffer", None)
            if stream is None:  # somebody's own stream of text
                sys.stdout.write(os.fsdecode(content))
            else:
                stream.write(content)
        elif form == "json":
            sys.stdout.write(json.dumps(self._document(), ensure_ascii=False, indent=2) + "\n")
        elif form == "jsonl":
            kind = {"schema": SCHEMA, "score_kind": "cosine"}
            for row in self._rows():
                sys.stdout.write(json.dumps({**kind, **row}, ensure_ascii=False) + "\n")
        elif form == "csv":
            table = csv.writer(sys.stdout, lineterminator="\n")
            table.writerow(["path", "rank", "similarity", "relevance"])
            table.writerows(
                [row["path"], row["rank"], row["similarity"], row.get("relevance", "")]
                for row in self._rows()
            )
        else:
            self._table()
        sys.stdout.flush()

    def remark(self, notes: Notes) -> None:
        """Say on stderr what the list does not."""
        count, asked = len(self.paths), self.asked
        gone = sum(not os.path.lexists(path) for path in self.paths)
        if gone:
            notes.say(f"{gone} of these are no longer there: run `edgeclip index` again")
        if not self._considered:
            notes.say("the index holds no pictures" + (f" of {asked.below}" if asked.below else ""))
        elif not count:
            what = f"nothing in {self._considered:,} picture{'' if self._considered == 1 else 's'}"
            if asked.cut:
                notes.say(f"{what} shows {asked.query!r} by its cut-off; --all gives the nearest")
            else:
                notes.say(what + ("" if asked.min_score is None else f" has a cosine of {asked.min_score:g}"))
        elif asked.cut and self.found.cutoff is None:
            notes.say(
                f"{len(self.index):,} pictures are too few to tell what stands out, and the bundle has no "
                "gate: these are the nearest"
            )
        elif self.found.more:
            notes.say("more pictures are relevant than these: --top-k gives them")

    @property
    def _considered(self) -> int:
        """How many pictures were looked at."""
        return sum(path.startswith(self.asked.below) for path in self.index.paths)

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "path": shown(path),
                "rank": rank,
                "similarity": _rounded(each.similarity),
                **({} if each.relevance is None else {"relevance": _rounded(each.relevance)}),
            }
            for rank, (path, each) in enumerate(zip(self.paths, self.found.matches, strict=True), start=1)
        ]

    def _document(self) -> dict[str, Any]:
        made, cutoff = self.index.made_with, self.found.cutoff
        return {
            "schema": SCHEMA,
            "score_kind": "cosine",
            "query": shown(self.asked.query),
            "query_kind": "words" if self.asked.picture is None else "picture",
            "index": shown(self.index.path),
            "model": made.model,
            "embedding_space": made.space,
            "variant": made.variant,
            "pictures": self._considered,
            "cutoff": None if cutoff is None else {"method": cutoff.method, "least": _rounded(cutoff.least)},
            "more": self.found.more,
            "results": self._rows(),
        }

    def _table(self) -> None:
        from edgeclip.tables import aligned

        titles = ["cosine", *(["relevance"] if self.found.cutoff else []), "picture"]
        lines = [
            [f"{each[name]:.3f}" for name in ("similarity", "relevance") if name in each] + [each["path"]]
            for each in self._rows()
        ]
        if lines:
            click.echo("\n".join(aligned([titles, *lines], range(len(titles) - 1))))


def _rounded(value: float) -> float:
    """Return a value to the six digits that float32 carries."""
    return float(f"{value:.6g}")
