"""``edgeclip embed``: pictures in, a file of embeddings out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    SCHEMA,
    ModelChoice,
    Notes,
    Pictures,
    batch_size_option,
    bundle_directory,
    check_output,
    model_choice,
    prepare_stdout,
    shown,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.classify import ZeroShotClassifier

__all__ = ["embed"]

_FORMATS = (".npy", ".safetensors", ".jsonl")


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write: .npy (keys in a .json beside it), .safetensors or .jsonl.",
)
@model_choice
@batch_size_option
@click.option("--strict", is_flag=True, help="Stop at the first picture that cannot be read; write nothing.")
@click.option(
    "--paths-from", metavar="FILE", help="Read more paths from a file, one a line; - is standard input."
)
@click.pass_context
def embed(
    ctx: click.Context,
    *,
    paths: tuple[Path, ...],
    output: Path,
    model: ModelChoice,
    batch_size: int | None,
    strict: bool,
    paths_from: str | None,
) -> None:
    """Write the unit-length embeddings of pictures, and of folders of them, to a file.

    Pictures are decoded exactly. Every file carries the paths as keys and the embedding space: embeddings of
    two spaces cannot be compared. A picture that cannot be read is reported and left out; the exit code is 1.

    Example: edgeclip embed photos/ -o embeddings.npy
    """
    if not paths and paths_from is None:
        raise click.UsageError("name a picture or a folder, or give --paths-from.")
    form = output.suffix.lower()
    if form not in _FORMATS:
        raise click.BadParameter(
            f"{str(output)!r} ends in {form!r}, expected {', '.join(_FORMATS)}.", param_hint="--output"
        )
    from edgeclip.classify import ZeroShotClassifier

    prepare_stdout()
    notes = Notes()
    _check_places(output)
    opened = bundle_directory(model.bundle, notes)
    with ZeroShotClassifier.open(opened, variant=model.variant, options=model.options()) as classifier:
        notes.on_choice(classifier.choice)
        keys, rows, failed = _embed(classifier, Pictures(paths, paths_from, notes), notes, batch_size, strict)
        space, width = (
            classifier.bundle.manifest.model.embedding_space,
            classifier.bundle.manifest.model.embed_dim,
        )
    _write(_files(output, keys, _matrix(rows, width), space))
    click.echo(f"{len(keys):,} embeddings of {width} dimensions in {shown(output)}")
    if failed:
        ctx.exit(1)


def _embed(
    classifier: ZeroShotClassifier, pictures: Pictures, notes: Notes, batch_size: int | None, strict: bool
) -> tuple[list[str], list[NDArray[Any]], int]:
    keys: list[str] = []
    rows: list[NDArray[Any]] = []
    failed = 0
    for each in classifier.embed_stream(pictures, batch_size=batch_size, ready=pictures.ready):
        key = pictures.next_key()
        if each.embedding is None:
            if strict and each.error is not None:
                raise each.error
            failed += 1
            notes.say(f"error: {' '.join(str(each.error).split())}")
            continue
        keys.append(key)
        rows.append(each.embedding)
        notes.progress(f"{len(keys):,} pictures")
    notes.done()
    return keys, rows, failed


def _matrix(rows: list[NDArray[Any]], width: int) -> NDArray[Any]:
    import numpy as np

    return np.stack(rows) if rows else np.empty((0, width), np.float32)


def _check_places(output: Path) -> None:
    """Refuse places that cannot be written to, before hours of work, and files that are not ours.

    Raises:
        InputError: the folder is missing, there stands something else than a file, or the name of the keys
            is that of another document.
    """
    from edgeclip.errors import InputError

    check_output("--output", output)
    beside = output.with_suffix(".json")
    if output.suffix.lower() == ".npy":
        check_output("beside --output", beside)
    if output.suffix.lower() == ".npy" and beside.exists():
        try:
            ours = "embedding_space" in json.loads(beside.read_bytes())
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise InputError(
                f"{str(beside)!r} is there and holds no keys of embeddings, so it is not replaced. "
                "Choose another -o."
            )


def _write(files: dict[Path, bytes]) -> None:
    """Write files, all of them before the first is renamed: a full disk leaves what was there.

    Raises:
        InputError: the disk refuses.
    """
    from edgeclip.errors import InputError
    from edgeclip.storage import write_temporary

    written: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            written[path] = write_temporary(path.parent, content)[0]
        for path, temporary in written.items():
            temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written ({error.strerror or error}). Check rights and room of its "
            "folder."
        ) from error
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _files(output: Path, keys: list[str], embeddings: NDArray[Any], space: str) -> dict[Path, bytes]:
    """Return the content of each file to write, the one that was asked for last."""
    form = output.suffix.lower()
    if form == ".safetensors":
        from edgeclip.tensors import write_tensors

        metadata = {
            "format": "edgeclip-embeddings",
            "schema": str(SCHEMA),
            "embedding_space": space,
            "keys": json.dumps(keys, ensure_ascii=False),
        }
        return {output: write_tensors({"embeddings": embeddings}, metadata)}
    if form == ".jsonl":
        lines = (
            json.dumps(
                {"schema": SCHEMA, "path": key, "embedding_space": space, "embedding": row},
                ensure_ascii=False,
            )
            for key, row in zip(keys, embeddings.tolist(), strict=True)
        )
        return {output: "".join(f"{line}\n" for line in lines).encode()}
    import io

    import numpy as np

    stream = io.BytesIO()
    np.save(stream, embeddings, allow_pickle=False)
    beside = {"schema": SCHEMA, "embedding_space": space, "shape": list(embeddings.shape), "keys": keys}
    document = json.dumps(beside, ensure_ascii=False, indent=1) + "\n"
    return {output.with_suffix(".json"): document.encode(), output: stream.getvalue()}
