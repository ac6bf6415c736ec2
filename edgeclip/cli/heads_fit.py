"""``edgeclip heads fit``, ``add`` and ``remove``: classes of one's own, from a few pictures each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ._labelled import check_own, embed_labelled, labelled_options
from ._options import SCHEMA, ModelChoice, Notes, bundle_directory, prepare_stdout, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeclip.bundle import Bundle
    from edgeclip.evaluate.picture_sets import Picture, PictureSet
    from edgeclip.few_shot import FewShotHead, Method

__all__ = ["add", "fit", "remove"]

_MAX_NAMES_BYTES = 1 << 24
_FITTED_ON_CHARS = 120
_CHANCE = 0.05
_WORD = re.compile(r"[^\W\d_]{3}|[^\x00-\u024f\W]")  # three letters, or one of a script without spaces
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _data_options(command: _Command) -> _Command:
    """Add the options that say which pictures there are and what embeds them."""
    for option in reversed(
        (
            click.option(
                "--bundle",
                "bundle_path",
                default="default",
                show_default=True,
                metavar="BUNDLE",
                help="What embeds the pictures; the head belongs to its embedding space.",
            ),
            click.option(
                "--names",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="What the folders show: lines 'folder=name', or a JSON object. Folders of one name are "
                "one class.",
            ),
            click.option(
                "--shots", type=click.IntRange(min=1), help="Pictures a class at most, drawn by --seed."
            ),
            click.option(
                "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of draws."
            ),
            labelled_options,
        )
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class _Asked:
    """What :func:`_data_options` were given."""

    bundle_path: str
    names: Path | None
    shots: int | None
    seed: int
    max_left_out: str
    variant: str
    threads: int | None
    cache_dir: Path | None

    @property
    def model(self) -> ModelChoice:
        return ModelChoice(self.bundle_path, self.variant, "auto", "cpu", self.threads, self.cache_dir)


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Embedded pictures ``(N, E)``, their classes, and the text rows of the names where they were asked."""

    names: tuple[str, ...]
    rows: NDArray[np.float32]
    targets: NDArray[np.intp]
    zero_shot: NDArray[np.float32] | None
    scale: float
    left_out: int


@click.command()
@click.argument("data", metavar="DATA")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="HEAD",
    help="Write the head here.  [default: only say what it is worth]",
)
@click.option("--write", metavar="NAME", help="Store it in the bundle under this name, too.")
@click.option(
    "--method",
    type=click.Choice(("blend", "gda", "mean")),
    help="blend: words and pictures; gda: pictures alone, with their covariance; mean: nearest class mean.  "
    "[default: blend]",
)
@click.option(
    "--zero-shot/--no-zero-shot",
    default=True,
    help="Use the class names as words, '_' as a space; without, names are just names.",
)
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Parts that pictures are held out in, to say how often the head is right.",
)
@_data_options
def fit(
    *,
    data: str,
    output: Path | None,
    write: str | None,
    method: Method | None,
    zero_shot: bool,
    folds: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a head for classes of your own.

    DATA holds a folder a class, from one picture each; it may also be a table or shards with labels. No
    training: closed form, less than a second after the pictures are embedded. How often the head is right is
    measured on pictures that it was not fitted on, beside the class names alone. Classify with 'classify
    --head HEAD'.

    Example: edgeclip heads fit parts/ -o parts.head
    """
    from edgeclip.bundle import Bundle
    from edgeclip.errors import ConfigError
    from edgeclip.few_shot_fit import fit_head, held_out

    prepare_stdout()
    notes, asked = Notes(), _Asked(**options)
    if method == "blend" and not zero_shot:
        raise ConfigError("--method blend uses the class names as words: leave out --no-zero-shot.")
    words = zero_shot and method in (None, "blend")
    _check_output(output)
    opened = Bundle.open(bundle_directory(asked.bundle_path, notes))
    if write is not None:
        _check_writable(opened, asked.bundle_path, write)
    labelled = _labelled(opened, data, asked, words, notes, least=2)
    what: dict[str, Any] = {
        "zero_shot": labelled.zero_shot,
        "scale": labelled.scale,
        "method": method or ("blend" if words else "gda"),
    }
    space = opened.manifest.model.embedding_space
    head = fit_head(labelled.rows, labelled.targets, labelled.names, space=space, **what)
    outside = held_out(labelled.rows, labelled.targets, labelled.names, folds=folds, seed=asked.seed, **what)
    if output is not None:
        head.save(output)
    if write is not None:
        _store(
            opened, write, head, f"{Path(data).name}: {len(labelled.rows)} pictures of {len(head)} classes"
        )
    worth = None
    if outside is not None:
        worth = _worth(outside.logits, labelled.targets[outside.places], outside.zero_shot)
        worth["accepted"] = float(outside.accepted.mean()) if len(outside.accepted) else None
    document = {
        **_about(head, "fit", output, opened),
        "left_out": labelled.left_out,
        "folds": folds,
        "held_out": worth,
        "stored": write,
    }
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
        return
    lines = [_counts(head, labelled.left_out), *_worth_lines(worth, folds)]
    if output is not None:
        lines.append(_written(output, head))
    if write is not None:
        lines.append(f"stored as {write!r} in {shown(opened.path)}")
    if output is None and write is None:
        lines.append("nothing is written without -o or --write")
    click.echo("\n".join(lines))


@click.command()
@click.argument("data", metavar="DATA")
@click.option(
    "--to", "source", type=click.Path(path_type=Path), required=True, metavar="HEAD", help="Head to extend."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="HEAD",
    help="Write the new head here.  [default: in place of the old one]",
)
@_data_options
def add(*, data: str, source: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Add classes, or further pictures of known classes, to a head.

    The pictures it was fitted on are not needed. The head becomes the one that all pictures together give.

    Example: edgeclip heads add more/ --to parts.head
    """
    import numpy as np

    from edgeclip.bundle import Bundle
    from edgeclip.errors import ConfigError
    from edgeclip.few_shot import FewShotHead
    from edgeclip.few_shot_fit import extended

    prepare_stdout()
    notes, asked = Notes(), _Asked(**options)
    target = output or source
    _check_output(target)
    head = FewShotHead.open(source)
    opened = Bundle.open(bundle_directory(asked.bundle_path, notes))
    space = opened.manifest.model.embedding_space
    if head.space != space:
        raise ConfigError(
            f"{str(source)!r} belongs to the embedding space {head.space[:12]!r}, bundle "
            f"{asked.bundle_path!r} has {space[:12]!r}: name the bundle it was fitted with by --bundle."
        )
    labelled = _labelled(opened, data, asked, head.zero_shot is not None, notes, least=1)
    longer = extended(head, labelled.rows, labelled.targets, labelled.names, zero_shot=labelled.zero_shot)
    longer.save(target)
    fresh = [name for name in labelled.names if name not in head.names]
    if as_json:
        document = {**_about(longer, "add", target, opened), "left_out": labelled.left_out, "added": fresh}
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
        return
    pictures = np.bincount(labelled.targets)
    said = [
        f"{name!r} {count} picture{'s' if count > 1 else ''}{' (new)' if name in fresh else ''}"
        for name, count in zip(labelled.names, pictures.tolist(), strict=True)
    ]
    click.echo(
        "\n".join(["added: " + ", ".join(said), _counts(longer, labelled.left_out), _written(target, longer)])
    )


@click.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    metavar="HEAD",
    help="Head to shorten.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="HEAD",
    help="Write the new head here.  [default: in place of the old one]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def remove(*, name: str, source: Path, output: Path | None, as_json: bool) -> None:
    """Take the class NAME out of a head. It becomes the one that the pictures of the others give.

    Example: edgeclip heads remove "bent nail" --from parts.head
    """
    from edgeclip.few_shot import FewShotHead
    from edgeclip.few_shot_fit import without_class

    prepare_stdout()
    target = output or source
    _check_output(target)
    shorter = without_class(FewShotHead.open(source), name)
    shorter.save(target)
    if as_json:
        click.echo(
            json.dumps({**_about(shorter, "remove", target), "removed": name}, ensure_ascii=False, indent=2)
        )
    else:
        click.echo("\n".join([f"removed: {name!r}", _counts(shorter, 0), _written(target, shorter)]))


# --- pictures ----------------------------------------------------------------------------------------------


def _labelled(
    opened: Bundle, data: str, asked: _Asked, words: bool, notes: Notes, *, least: int
) -> _Labelled:
    """Embed what a set holds, after everything about its classes has been checked."""
    import numpy as np

    from edgeclip.errors import ConfigError, InputError
    from edgeclip.evaluate.picture_sets import open_set

    pictures = open_set(data)
    renamed = {} if asked.names is None else _read_names(asked.names)
    numbers: dict[str, list[int]] = {}
    for number, picture in enumerate(pictures):
        if picture.label is not None:
            numbers.setdefault(_said(pictures, picture.label), []).append(number)
    _check_folders(Path(data), pictures, numbers)
    unknown = next((label for label in renamed if label not in numbers), None)
    if unknown is not None:
        raise InputError(
            f"{str(asked.names)!r} names {unknown!r}, but {data!r} has no pictures of it; it has "
            f"{', '.join(map(repr, list(numbers)[:20])) or 'none with a label'}."
        )
    named = {
        label: renamed.get(label, label.replace("_", " ").strip() if words else label) for label in numbers
    }
    names = tuple(dict.fromkeys(named.values()))
    if len(names) < least:
        found = ", ".join(map(repr, names)) or "no picture has a label"
        raise ConfigError(
            f"{data!r} holds {len(names)} classes ({found}), expected at least {least}: a folder for each."
        )
    texts, scale = (
        (_texts(opened, names, asked, notes), opened.manifest.model.scale) if words else (None, 1.0)
    )
    if asked.shots is not None:
        pictures = _drawn(pictures, named, numbers, asked.shots, asked.seed)
    places = {label: names.index(name) for label, name in named.items()}

    def usable(picture: Picture) -> int | str:
        if picture.label is None:
            return "has no label; expected a column 'label' or a folder a class."
        return places[_said(pictures, picture.label)]

    rows, uses, left_out = embed_labelled(
        opened, pictures, usable, asked.model, None, asked.max_left_out, notes
    )
    targets = np.array(uses, np.intp)
    missing = np.flatnonzero(np.bincount(targets, minlength=len(names)) == 0)
    if len(missing):
        raise InputError(
            f"{data!r}: no picture of the class {names[int(missing[0])]!r} can be read; give it others."
        )
    return _Labelled(names, rows, targets, texts, scale, left_out)


def _said(pictures: PictureSet, label: str) -> str:
    """Return the name of a label; sets of numbered classes bring their names."""
    if not pictures.numbered or pictures.labels is None:
        return label
    names = pictures.labels.names
    return names[int(label)] if label.isdecimal() and int(label) < len(names) else label


def _check_folders(path: Path, pictures: PictureSet, numbers: Mapping[str, list[int]]) -> None:
    """Refuse folders without a picture: somebody meant them to be classes."""
    from edgeclip.errors import InputError

    if pictures.parts != (path,) or not path.is_dir():
        return
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in numbers:
            raise InputError(
                f"{str(folder)!r} holds no pictures, expected some of the class {folder.name!r}; "
                "give it some, or remove the folder."
            )


def _drawn(
    pictures: PictureSet,
    named: Mapping[str, str],
    numbers: Mapping[str, list[int]],
    shots: int,
    seed: int,
) -> PictureSet:
    """Return so many pictures of each class at most, drawn at random."""
    import numpy as np

    from edgeclip.evaluate.picture_sets import PictureSet

    @dataclass(frozen=True)
    class Some(PictureSet):
        numbers: frozenset[int] = frozenset()

        def __iter__(self) -> Iterator[Picture]:
            for number, picture in enumerate(super().__iter__()):
                if number in self.numbers:
                    yield picture

    random = np.random.default_rng(seed)
    of_class: dict[str, list[int]] = {}
    for label, found in numbers.items():
        of_class.setdefault(named[label], []).extend(found)
    kept: set[int] = set()
    for found in of_class.values():
        kept.update(random.permutation(found)[:shots].tolist())
    given = {each.name: getattr(pictures, each.name) for each in fields(pictures)}
    return Some(**given, numbers=frozenset(kept))


def _texts(opened: Bundle, names: tuple[str, ...], asked: _Asked, notes: Notes) -> NDArray[np.float32]:
    """Return text rows of class names, with the bundle's templates."""
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.errors import BundleError, ConfigError
    from edgeclip.label_sets import LabelSet

    empty = [name for name in names if _WORD.search(name) is None]
    if empty:
        notes.say(
            f"the class name {empty[0]!r} says little to a model; say what it shows with --names FILE, or "
            "fit without words: --no-zero-shot"
        )
    options = asked.model.options()
    with ZeroShotClassifier.open(opened, variant=asked.variant, options=options) as classifier:
        try:
            classifier.set_labels(LabelSet.of(list(names)), on_progress=notes.on_encoding)
        except BundleError as error:
            raise ConfigError(f"{str(error).rstrip('.')}; or fit without words: --no-zero-shot.") from error
        finally:
            notes.done()
        for warning in classifier.label_warnings():
            notes.say(warning)
        return classifier.bank.embeddings


def _read_names(path: Path) -> dict[str, str]:
    """Return names by folder.

    Raises:
        InputError: unreadable, not of one of the two forms, or a folder is named twice.
    """
    from edgeclip.errors import InputError

    try:
        if path.stat().st_size > _MAX_NAMES_BYTES:
            raise InputError(f"{str(path)!r}: larger than {_MAX_NAMES_BYTES} bytes, expected names.")
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"{str(path)!r} cannot be read: {reason}.") from error
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r}: not JSON ({error}).") from error
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        wrong = next((line for line in lines if "=" not in line), None)
        if wrong is not None:
            raise InputError(f"{str(path)!r}: got the line {wrong[:80]!r}, expected 'folder=name'.")
        pairs = [tuple(line.split("=", 1)) for line in lines]
    names: dict[str, str] = {}
    for folder, name in pairs:
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{str(path)!r}: folder {folder!r} is named {name!r}, expected a text.")
        if folder.strip() in names:
            raise InputError(f"{str(path)!r}: folder {folder.strip()!r} is named twice.")
        names[folder.strip()] = " ".join(name.split())
    return names


# --- output ------------------------------------------------------------------------------------------------


def _check_output(output: Path | None) -> None:
    """Refuse what cannot be written, before pictures are embedded."""
    from edgeclip.errors import InputError

    if output is None:
        return
    if output.exists() and not output.is_file():
        what = "folder" if output.is_dir() else "device or pipe"
        raise InputError(f"{str(output)!r} is a {what}, expected the name of a file for the head.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{str(output.parent)!r}: no such folder, so {output.name!r} cannot be written.")


def _check_writable(opened: Bundle, bundle_path: str, name: str) -> None:
    """Refuse what cannot be stored in a bundle, before pictures are embedded."""
    from edgeclip.errors import ConfigError
    from edgeclip.few_shot import KIND

    check_own(bundle_path)
    if re.fullmatch(r"[A-Za-z0-9_@+-][A-Za-z0-9._@+-]{0,63}", name) is None:
        raise ConfigError(f"--write: got {name!r}, expected a name of up to 64 letters, digits, '-' and '_'.")
    there = opened.manifest.heads.get(name)
    if there is not None and there.kind != KIND:
        raise ConfigError(f"{opened.where}: head {name!r} is of kind {there.kind!r}; take another name.")


def _store(opened: Bundle, name: str, head: FewShotHead, fitted_on: str) -> None:
    """Store a head in its bundle, in place of a few-shot head of this name."""
    from edgeclip.bundle import BundleWriter
    from edgeclip.few_shot import KIND

    with BundleWriter(opened.path) as writer:
        stored: dict[str, Any] = writer.manifest.setdefault("heads", {})
        stored[name] = {
            "kind": KIND,
            "file": writer.add(f"heads/{name}.safetensors", head.to_bytes()),
            "fitted_on": fitted_on[-_FITTED_ON_CHARS:],
        }
        writer.commit()


def _about(head: FewShotHead, kind: str, path: Path | None, opened: Bundle | None = None) -> dict[str, Any]:
    from dataclasses import asdict

    said: dict[str, Any] = {"schema": SCHEMA, "kind": f"few-shot {kind}"}
    if opened is not None:
        said["bundle"] = str(opened.path)
    counts = head.statistics.counts.tolist()
    return {
        **said,
        "head": None if path is None else str(path),
        "classes": [
            {"name": name, "pictures": count} for name, count in zip(head.names, counts, strict=True)
        ],
        "settings": asdict(head.settings),
    }


def _worth(
    logits: NDArray[np.float32], targets: NDArray[np.intp], zero_shot: NDArray[np.float32] | None
) -> dict[str, Any]:
    """Return how often a head is right on pictures that it has not seen, and words alone on the same."""
    import numpy as np

    from edgeclip.evaluate.metrics import expected_calibration_error, share
    from edgeclip.evaluate.paired import paired

    scores = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    scores /= scores.sum(axis=1, keepdims=True)
    right = logits.argmax(axis=1) == targets
    accuracy = share(right)
    said: dict[str, Any] = {
        "pictures": len(targets),
        "accuracy": accuracy.value,
        "interval": [accuracy.low, accuracy.high],
        "calibration_error": expected_calibration_error(scores.max(axis=1), right),
        "mean_score": float(scores.max(axis=1).mean()),
        "zero_shot": None,
    }
    if zero_shot is not None:
        before = zero_shot.argmax(axis=1) == targets
        alone = share(before)
        said["zero_shot"] = {
            "accuracy": alone.value,
            "interval": [alone.low, alone.high],
            "mcnemar_p": paired(before, right).p_value,
        }
    return said


def _counts(head: FewShotHead, left_out: int) -> str:
    counts = head.statistics.counts
    low, high = int(counts.min()), int(counts.max())
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    also = f"; {left_out:,} left out" if left_out else ""
    return f"{len(head):,} classes, {int(counts.sum()):,} pictures, {each} a class{also}"


def _worth_lines(worth: dict[str, Any] | None, folds: int) -> list[str]:
    if worth is None:
        return [
            "every class has one picture, so that none can be held out to say how often the head is right"
        ]

    def figure(of: dict[str, Any]) -> str:
        low, high = of["interval"]
        return f"{of['accuracy']:.1%} right [{low:.1%}, {high:.1%}]"

    scores = f"mean score {worth['mean_score']:.1%}, calibration error {worth['calibration_error']:.1%}"
    lines = [f"held out in {folds} parts, {worth['pictures']:,} pictures: {figure(worth)}, {scores}"]
    alone = worth["zero_shot"]
    if alone is not None:
        lines.append(f"by the names alone: {figure(alone)}")
        if alone["accuracy"] > worth["accuracy"] and alone["mcnemar_p"] < _CHANCE:
            lines.append(
                "the names alone are right more often: classify with --labels, or give more pictures"
            )
    return lines


def _written(path: Path, head: FewShotHead) -> str:
    return f"{shown(path)}: {path.stat().st_size / 1e3:,.0f} kB; classify with --head {shown(path)}"
