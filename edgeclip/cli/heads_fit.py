"""``edgeclip heads fit``, ``add`` and ``remove``: classes of one's own, from a few pictures each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ._labelled import check_own, embed_labelled, labelled_options
from ._options import SCHEMA, ModelChoice, Notes, bundle_directory, check_output, prepare_stdout, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeclip.bundle import Bundle
    from edgeclip.few_shot import FewShotHead, Method
    from edgeclip.few_shot_fit import HeldOut

__all__ = ["add", "fit", "remove"]

_FITTED_ON_CHARS = 120
_CHANCE = 0.05
_SAME = 1 - 1e-6  # cosine
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


_changed_output = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="HEAD",
    help="Write the new head here.  [default: in place of the old one]",
)


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
    training: once the pictures are embedded, a closed form in less than a second for a hundred classes. How
    often the head is right is measured on pictures that it was not fitted on, beside the class names alone.
    Classify with 'classify --head HEAD'.

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
    check_output("-o", output)
    opened = Bundle.open(bundle_directory(asked.bundle_path, notes))
    if write is not None:
        _check_writable(opened, asked.bundle_path, write)
    labelled = _labelled(opened, data, asked, words, notes, least=2)
    model = opened.manifest.model
    given = labelled.rows, labelled.targets, labelled.names
    what: dict[str, Any] = {"zero_shot": labelled.zero_shot, "scale": model.scale, "method": method}
    head = fit_head(*given, space=model.embedding_space, **what)
    outside = held_out(*given, folds=folds, seed=asked.seed, **what)
    if output is not None:
        head.save(output)
    if write is not None:
        _store(
            opened, write, head, f"{Path(data).name}: {len(labelled.rows)} pictures of {len(head)} classes"
        )
    worth = None if outside is None else _worth(outside, labelled.targets)
    lines = [_counts(head, labelled.left_out), *_worth_lines(worth, folds)]
    if output is not None:
        lines.append(_written(output, head))
    if write is not None:
        lines.append(f"stored as {write!r} in {shown(opened.path)}")
    if output is None and write is None:
        lines.append("nothing is written without -o or --write")
    said = {
        "bundle": str(opened.path),
        "left_out": labelled.left_out,
        "folds": folds,
        "held_out": worth,
        "stored": write,
    }
    _print("fit", head, output, said, lines, as_json)


@click.command()
@click.argument("data", metavar="DATA")
@click.option(
    "--to", "source", type=click.Path(path_type=Path), required=True, metavar="HEAD", help="Head to extend."
)
@_changed_output
@_data_options
def add(*, data: str, source: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Add classes, or further pictures of known classes, to a head.

    The pictures it was fitted on are not needed. The head becomes the one that all pictures together give.

    Example: edgeclip heads add more/ --to parts.head
    """
    from edgeclip.bundle import Bundle
    from edgeclip.errors import ConfigError
    from edgeclip.few_shot import FewShotHead
    from edgeclip.few_shot_fit import extended

    prepare_stdout()
    notes, asked, target = Notes(), _Asked(**options), output or source
    head = FewShotHead.open(source)
    check_output("-o" if output else "HEAD", target)
    opened = Bundle.open(bundle_directory(asked.bundle_path, notes))
    space = opened.manifest.model.embedding_space
    if head.space != space:
        raise ConfigError(
            f"{str(source)!r} belongs to the embedding space {head.space[:12]!r}, bundle "
            f"{asked.bundle_path!r} has {space[:12]!r}: name the bundle it was fitted with by --bundle."
        )
    labelled = _labelled(opened, data, asked, head.zero_shot is not None, notes, least=1)
    again = _known(head, labelled)
    if again:
        pictures = f"{again:,} of these pictures seem" if again > 1 else "one of these pictures seems"
        notes.say(f"{pictures} to be in {str(source)!r} already and will count twice")
    longer = extended(head, labelled.rows, labelled.targets, labelled.names, zero_shot=labelled.zero_shot)
    longer.save(target)
    fresh = [name for name in labelled.names if name not in head.names]
    added = []
    for place, name in enumerate(labelled.names):
        count = int((labelled.targets == place).sum())
        added.append(f"{name!r} {count} picture{'s' if count > 1 else ''}{' (new)' if name in fresh else ''}")
    lines = ["added: " + ", ".join(added), _counts(longer, labelled.left_out), _written(target, longer)]
    said = {"bundle": str(opened.path), "left_out": labelled.left_out, "added": fresh}
    _print("add", longer, target, said, lines, as_json)


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
@_changed_output
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def remove(*, name: str, source: Path, output: Path | None, as_json: bool) -> None:
    """Take the class NAME out of a head. It becomes the one that the pictures of the others give.

    Example: edgeclip heads remove "bent nail" --from parts.head
    """
    from edgeclip.few_shot import FewShotHead
    from edgeclip.few_shot_fit import without_class

    prepare_stdout()
    target = output or source
    shorter = without_class(FewShotHead.open(source), name)
    shorter.save(target)
    lines = [f"removed: {name!r}", _counts(shorter, 0), _written(target, shorter)]
    _print("remove", shorter, target, {"removed": name}, lines, as_json)


# --- pictures ----------------------------------------------------------------------------------------------


def _labelled(
    opened: Bundle, data: str, asked: _Asked, words: bool, notes: Notes, *, least: int
) -> _Labelled:
    """Embed what a set holds, after everything about its classes has been checked."""
    import numpy as np

    from edgeclip.errors import InputError
    from edgeclip.evaluate.own_classes import OwnClasses, read_names

    renamed = {} if asked.names is None else read_names(asked.names)
    found = OwnClasses.of(data, renamed, as_words=words, shots=asked.shots, seed=asked.seed, least=least)
    texts = _texts(opened, found.names, asked, notes) if words else None
    rows, places, left_out = embed_labelled(
        opened, found.pictures, found.place, asked.model, None, asked.max_left_out, notes
    )
    missing = set(range(len(found.names))).difference(places)
    if missing:
        raise InputError(
            f"{data!r}: no picture of the class {found.names[min(missing)]!r} can be read; give it others."
        )
    return _Labelled(found.names, rows, np.array(places, np.intp), texts, left_out)


def _known(head: FewShotHead, labelled: _Labelled) -> int:
    """Return how many pictures are as like one of their class in the head as a picture is like itself."""
    count = 0
    for place, name in enumerate(labelled.names):
        if name in head.names:
            alike = labelled.rows[labelled.targets == place] @ head.statistics.rows[head.names.index(name)].T
            count += int((alike.max(axis=1) > _SAME).sum())
    return count


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


# --- output ------------------------------------------------------------------------------------------------


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


def _print(
    kind: str, head: FewShotHead, path: Path | None, said: dict[str, Any], lines: list[str], as_json: bool
) -> None:
    if not as_json:
        click.echo("\n".join(lines))
        return
    counts = head.statistics.counts.tolist()
    document = {
        "schema": SCHEMA,
        "kind": f"few-shot {kind}",
        "head": None if path is None else str(path),
        "classes": [
            {"name": name, "pictures": count} for name, count in zip(head.names, counts, strict=True)
        ],
        "settings": asdict(head.settings),
        **said,
    }
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


def _worth(outside: HeldOut, targets: NDArray[np.intp]) -> dict[str, Any]:
    """Return how often a head is right on pictures that it has not seen, and words alone on the same."""
    import numpy as np

    from edgeclip.evaluate.metrics import expected_calibration_error, share
    from edgeclip.evaluate.paired import paired

    def right_of(scores: NDArray[np.float32]) -> tuple[NDArray[np.bool_], dict[str, Any]]:
        right = scores.argmax(axis=1) == targets[outside.places]
        found = share(right)
        return right, {"accuracy": found.value, "interval": [found.low, found.high]}

    logits = outside.logits.astype(np.float64)
    highest = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    right, accuracy = right_of(outside.logits)
    alone = None
    if outside.zero_shot is not None:
        before, of_words = right_of(outside.zero_shot)
        alone = {**of_words, "mcnemar_p": paired(before, right).p_value}
    return {
        "pictures": len(right),
        **accuracy,
        "calibration_error": expected_calibration_error(highest, right),
        "mean_score": float(highest.mean()),
        "zero_shot": alone,
        "accepted": float(outside.accepted.mean()) if len(outside.accepted) else None,
    }


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
