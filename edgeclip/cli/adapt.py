"""``edgeclip adapt``: fit a label bank to unlabelled pictures of one's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    SCHEMA,
    LabelChoice,
    ModelChoice,
    Notes,
    bundle_directory,
    cache_dir_option,
    label_options,
    prepare_stdout,
    shown,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeclip.distill.adapt import Adapted, Fit, Self, Side, Taught
    from edgeclip.evaluate.passes import Chosen
    from edgeclip.evaluate.picture_sets import Picture, PictureSet
    from edgeclip.evaluate.subjects import BundleSubject
    from edgeclip.labels import LabelBank

__all__ = ["adapt"]

EXIT_INCONCLUSIVE = 3
_FOREIGN_SCALE = 100.0
_SURE = 0.05


@click.command(
    epilog='Example: edgeclip adapt default --images camera/ --labels "cat,dog,fox" -o pets.safetensors'
)
@click.argument("bundle_path", metavar="BUNDLE")
@click.option(
    "--images",
    required=True,
    metavar="DATA",
    help="Unlabelled pictures of the domain: a folder, table or shards. Labels in it are not looked at.",
)
@label_options
@click.option(
    "--method",
    type=click.Choice(["vectors", "prompts"]),
    default="vectors",
    show_default=True,
    help="Move the labels themselves, or learn the words before them (extra train; --checkpoint).",
)
@click.option(
    "--teacher",
    metavar="BUNDLE|FILE.npy",
    help="Who says what the pictures show: another bundle, or its embeddings of the pictures, a row each in "
    "their order.  [default: the bundle itself]",
)
@click.option(
    "--teacher-bank",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Labels in the space of the teacher.  [default: its text tower encodes them]",
)
@click.option(
    "--teacher-scale",
    type=click.FloatRange(min=0, min_open=True, max=100),
    help="Multiplier of the teacher's cosines.  [default: the bundle's; 100 for .npy]",
)
@click.option(
    "--checkpoint",
    metavar="DIR|FILE",
    help="What BUNDLE was exported from, whose text tower prompts are learned through.",
)
@click.option("--model", metavar="NAME", help="Name of the model, where --checkpoint is a published file.")
@click.option(
    "--strength",
    type=click.FloatRange(min=0, max=1),
    help="Share of the pictures in a label.  [default: 0.3; 0.7 with a teacher]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the halves.")
@click.option("--limit", type=click.IntRange(min=1), help="Pictures at most, spread over the data.")
@click.option(
    "--max-left-out",
    default="1%",
    show_default=True,
    metavar="N|N%",
    help="Pictures that may be broken.",
)
@click.option(
    "--check",
    "labelled",
    metavar="DATA",
    help="Pictures labelled with the names offered: accuracy before and after.",
)
@click.option("--force", is_flag=True, help="Write the bank even where it cannot be relied on.")
@click.option("--variant", default="auto", show_default=True, help="Variant of the bundle.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the towers.  [default: usable cores]")
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The bank, a .safetensors file.",
)
def adapt(
    *,
    bundle_path: str,
    images: str,
    labels: str | None,
    label_file: Path | None,
    templates: str | None,
    language: str | None,
    method: str,
    teacher: str | None,
    teacher_bank: Path | None,
    teacher_scale: float | None,
    checkpoint: str | None,
    model: str | None,
    strength: float | None,
    seed: int,
    limit: int | None,
    max_left_out: str,
    labelled: str | None,
    force: bool,
    variant: str,
    threads: int | None,
    cache_dir: Path | None,
    as_json: bool,
    output: Path,
) -> int:
    """Make a label bank that fits pictures of your own, without a label on them.

    The pictures are seen as BUNDLE sees them on the device, and what is learnt is an ordinary bank for
    'classify --label-file': it costs nothing at run time. Which labels came first before and after, and
    whether halves of the pictures lead to the same, is said. Exit code 3 where the result cannot be relied
    on; nothing is written then without --force.
    """
    _check_options(method, checkpoint, model, teacher, teacher_bank, teacher_scale, output)
    offered = LabelChoice(labels, label_file, templates, language)
    offered.check(required=True)
    from edgeclip.distill import adapt as adaptation
    from edgeclip.evaluate.picture_sets import open_set
    from edgeclip.labels import write_atomic

    prepare_stdout()
    notes = Notes()
    pictures = open_set(images)
    checked = None if labelled is None else open_set(labelled)
    choice = ModelChoice(bundle_path, variant, "auto", "cpu", threads, cache_dir)
    with _subject(choice, notes) as subject:
        bank = _bank(subject, offered, notes)
        asked = _Teacher(teacher, teacher_bank, teacher_scale)
        with asked.opened(subject, bank, choice, notes) as taught_by:
            seen = _embed(
                pictures, [subject, *taught_by.subjects], taught_by.rows, limit, max_left_out, notes
            )
            targets, about_teacher = _targets(seen, taught_by, subject.scale, strength, seed)
            fit: Fit = targets
            if method == "prompts":
                fit = _prompts(checkpoint or "", model, bank, targets, subject.scale, seed, threads)
            found = adaptation.adapt(
                seen.rows,
                bank.embeddings,
                fit,
                scale=subject.scale,
                taught=targets if isinstance(targets, adaptation.Taught) else None,
                seed=seed,
                on_progress=notes.progress,
            )
            notes.done()
        on_labelled = None
        if checked is not None:
            on_labelled = _check(checked, subject, bank, found, max_left_out, notes)
    reasons = list(found.judgement.reasons)
    if on_labelled is not None and on_labelled["is_worse"]:
        reasons.append("labelled pictures are right less often than before")
    about = {
        "method": method,
        "strength": targets.strength,
        "seed": seed,
        "pictures": found.judgement.pictures,
        "pictures_sha256": seen.digest,
        "teacher": about_teacher,
        "reasons": reasons,
    }
    if not reasons or force:
        content = adaptation.bank_file(adaptation.adapted_bank(bank, found.rows), about)
        write_atomic(output, content)
    written = not reasons or force
    if as_json:
        document = {
            "schema": SCHEMA,
            "kind": "adapt",
            **about,
            "reliable": not reasons,
            "labels": len(bank),
            "embedding_space": bank.space,
            "left_out": seen.left_out,
            "duplicates": seen.duplicates,
            "judgement": found.judgement.to_dict(),
            "check": on_labelled,
            "written": written,
        }
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        click.echo(_summary(found, seen, on_labelled, reasons, about_teacher))
        if written:
            click.echo(f"written to {shown(output)}{', by force' if reasons else ''}")
        else:
            click.echo("cannot be relied on, so nothing is written (--force writes it)")
    return 0 if written else EXIT_INCONCLUSIVE


def _check_options(
    method: str,
    checkpoint: str | None,
    model: str | None,
    teacher: str | None,
    teacher_bank: Path | None,
    teacher_scale: float | None,
    output: Path,
) -> None:
    """Refuse combinations that mean nothing, before anything heavy is loaded."""
    from edgeclip.errors import InputError

    if output.suffix.lower() != ".safetensors":
        raise click.BadParameter(f"{str(output)!r} does not end in .safetensors.", param_hint="--output")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{str(output)!r} cannot be written: there is no folder {str(output.parent)!r}.")
    if method == "prompts" and checkpoint is None:
        raise click.UsageError("--method prompts needs --checkpoint, what the bundle was exported from.")
    if method != "prompts" and (checkpoint is not None or model is not None):
        raise click.UsageError("--checkpoint and --model belong to --method prompts.")
    if teacher is None and (teacher_bank is not None or teacher_scale is not None):
        raise click.UsageError("--teacher-bank and --teacher-scale need --teacher.")
    if _is_rows(teacher) and teacher_bank is None:
        raise click.UsageError("--teacher FILE.npy needs --teacher-bank, the labels in its space.")


def _is_rows(teacher: str | None) -> bool:
    return teacher is not None and teacher.lower().endswith(".npy")


@contextmanager
def _subject(choice: ModelChoice, notes: Notes) -> Iterator[BundleSubject]:
    """Open a bundle as it runs on the device."""
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.evaluate.subjects import BundleSubject

    opened = ZeroShotClassifier.open(
        bundle_directory(choice.bundle, notes), variant=choice.variant, options=choice.options()
    )
    with closing(BundleSubject(choice.bundle, opened)) as subject:
        yield subject


def _bank(subject: BundleSubject, offered: LabelChoice, notes: Notes) -> LabelBank:
    from edgeclip.errors import InputError
    from edgeclip.labels import LabelBank

    read = offered.read()
    if read is None:
        raise click.UsageError("give --labels or --label-file.")
    if not isinstance(read, LabelBank):
        found = subject.bank(read, offered.read_templates(), notes.on_encoding)
        notes.done()
        return found
    space = subject.about["embedding_space"]
    if read.space != space:
        raise InputError(
            f"label bank {shown(offered.label_file)!r} is of the embedding space "
            f"{read.space[:16] or 'not stated'!r}, the bundle's is {space[:16]!r}; build it again with this "
            "bundle."
        )
    return read


# --- the teacher -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Teacher:
    """What was asked for as a teacher."""

    said: str | None
    bank: Path | None
    scale: float | None

    @contextmanager
    def opened(
        self, student: BundleSubject, bank: LabelBank, choice: ModelChoice, notes: Notes
    ) -> Iterator[_TaughtBy]:
        """Open it, and bring its labels into the order of the student's.

        Raises:
            InputError: its bank holds other labels, is of another space, or as wide as its rows are not.
        """
        from dataclasses import replace

        from edgeclip.errors import InputError
        from edgeclip.labels import LabelBank

        own = None if self.bank is None else LabelBank.open(self.bank)
        if own is not None and set(own.names) != set(bank.names):
            missing = sorted(set(bank.names) ^ set(own.names))
            raise InputError(
                f"teacher bank {shown(self.bank)!r}: holds other labels than are offered, first "
                f"{missing[0]!r}; build it with the same labels."
            )
        if self.said is None:
            yield _TaughtBy([], None, None, 0.0, None)
        elif own is not None and _is_rows(self.said):
            rows = _read_rows(Path(self.said))
            if rows.shape[1] != own.embeddings.shape[1]:
                raise InputError(
                    f"teacher {shown(self.said)!r} has rows of {rows.shape[1]}, its bank of "
                    f"{own.embeddings.shape[1]} dimensions; they must be of one model."
                )
            about = {"name": Path(self.said).name, "rows": len(rows)}
            yield _TaughtBy([], rows, _ordered(own, bank), self.scale or _FOREIGN_SCALE, about)
        else:
            asked = replace(choice, bundle=self.said, variant="auto", cache_dir=None)
            with _subject(asked, notes) as subject:
                if own is None:
                    own = subject.bank(bank.labels, bank.templates, notes.on_encoding)
                    notes.done()
                elif own.space and own.space != subject.about["embedding_space"]:
                    raise InputError(
                        f"teacher bank {shown(self.bank)!r} is of another embedding space than the teacher "
                        f"{shown(self.said)!r}; build it with this bundle."
                    )
                about = {
                    "name": subject.about["model"],
                    "embedding_space": subject.about["embedding_space"],
                    "variant": subject.about["variant"],
                }
                yield _TaughtBy([subject], None, _ordered(own, bank), self.scale or subject.scale, about)


@dataclass(frozen=True, eq=False)
class _TaughtBy:
    """A teacher, open.

    Attributes:
        subjects: it, if it looks at the pictures itself.
        rows: its embeddings of all pictures of the set, if it did before.
        labels: ``(N, T)`` its rows of the labels.
        scale: multiplier of its cosines.
        about: what the bank will say of it.
    """

    subjects: list[BundleSubject]
    rows: NDArray[np.float32] | None
    labels: NDArray[np.float32] | None
    scale: float
    about: dict[str, Any] | None


def _targets(
    seen: _Seen, teacher: _TaughtBy, scale: float, strength: float | None, seed: int
) -> tuple[Self | Taught, dict[str, Any] | None]:
    """Return who says what the pictures show, and what the bank will say of a teacher.

    A teacher adapts itself to the pictures first, where that can be relied on.
    """
    from edgeclip.distill.adapt import STRENGTH, TAUGHT_STRENGTH, Self, ask_teacher

    if seen.teacher is None or teacher.labels is None or teacher.about is None:
        return Self(scale, strength=STRENGTH if strength is None else strength), None
    wanted = TAUGHT_STRENGTH if strength is None else strength
    taught, judged = ask_teacher(seen.teacher, teacher.labels, teacher.scale, strength=wanted, seed=seed)
    return taught, {**teacher.about, "adapted_itself": judged.reliable}


def _ordered(own: LabelBank, like: LabelBank) -> NDArray[np.float32]:
    """Return rows in the order of another bank's names."""
    place = {name: row for row, name in enumerate(own.names)}
    rows: NDArray[np.float32] = own.embeddings[[place[name] for name in like.names]]
    return rows


def _read_rows(path: Path) -> NDArray[np.float32]:
    import numpy as np

    from edgeclip.errors import InputError
    from edgeclip.evaluate.metrics import unit_rows

    try:
        rows = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's header parser raises whatever it stumbles over
        raise InputError(f"teacher {shown(path)!r} cannot be read as a .npy file: {error}.") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f" or not rows.size:
        raise InputError(f"teacher {shown(path)!r}: expected floats (n, T), a row a picture.")
    return np.asarray(unit_rows(f"teacher {shown(path)!r}", rows), np.float32)


# --- pictures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Seen:
    """Pictures as towers see them.

    Attributes:
        rows: ``(n, E)`` unit embeddings, each picture once.
        teacher: ``(n, T)`` the teacher's.
        digest: of the prepared pictures, whatever their order.
        left_out: pictures that could not be read.
        duplicates: pictures that were there before.
    """

    rows: NDArray[np.float32]
    teacher: NDArray[np.float32] | None
    digest: str
    left_out: int
    duplicates: int


def _embed(
    pictures: PictureSet,
    subjects: list[BundleSubject],
    stored: NDArray[np.float32] | None,
    limit: int | None,
    max_left_out: str,
    notes: Notes,
) -> _Seen:
    """Embed every picture once with every subject; rows of a teacher that are stored are looked up.

    Raises:
        InputError: too many cannot be read, or stored rows are of another number of pictures.
    """
    import numpy as np

    from edgeclip.distill.samples import BrokenLimit
    from edgeclip.errors import InputError
    from edgeclip.evaluate.passes import choose

    places = {picture.key: place for place, picture in enumerate(pictures)} if stored is not None else {}
    if stored is not None and len(stored) != len(places):
        raise InputError(
            f"teacher: has {len(stored):,} rows, {pictures.path!r} holds {len(places):,} pictures; expected "
            "a row for each, in their order."
        )
    allowed = BrokenLimit.parse(max_left_out).allowed
    chosen = choose(pictures, lambda picture: places.get(picture.key, 0), limit=limit, allowed=allowed)
    found: list[list[NDArray[np.float32]]] = [
        [] for _ in range(1 + (len(subjects) > 1 or stored is not None))
    ]
    digests: set[bytes] = set()
    done = 0
    for forms, uses, embedded in _passes(subjects, chosen, allowed, notes, "pictures"):
        fresh = []
        for row, pixels in enumerate(forms):
            digest = hashlib.sha256(pixels.tobytes()).digest()
            if digest not in digests:
                digests.add(digest)
                fresh.append(row)
        done += len(uses)
        if stored is not None:
            embedded = [*embedded, stored[list(uses)]]
        for rows, part in zip(found, embedded, strict=True):
            rows.append(part[fresh])
    return _Seen(
        np.concatenate(found[0]),
        np.concatenate(found[1]) if len(found) > 1 else None,
        hashlib.sha256(b"".join(sorted(digests))).hexdigest(),
        chosen.count - done,
        done - len(digests),
    )


def _passes(
    subjects: list[BundleSubject], chosen: Chosen[int], allowed: Any, notes: Notes, what: str
) -> Iterator[tuple[NDArray[np.uint8], tuple[int, ...], list[NDArray[np.float32]]]]:
    """Yield pixels, uses and embeddings of each subject."""
    from edgeclip.evaluate.passes import Passes, check_left_out
    from edgeclip.runtime.host import usable_cores

    done = 0
    try:
        with Passes(subjects, workers=usable_cores()) as passes:
            for batch in passes.batches(chosen):
                embedded = [rows for _, rows in passes.embedded(batch)]
                done += len(batch.uses)
                notes.progress(f"{what}: {done:,} of {chosen.count:,}")
                yield batch.forms[0], batch.uses, embedded
            check_left_out(chosen.pictures, passes.left_out, chosen.count, allowed)
    finally:
        notes.done()


def _check(
    pictures: PictureSet,
    subject: BundleSubject,
    bank: LabelBank,
    found: Adapted,
    max_left_out: str,
    notes: Notes,
) -> dict[str, Any]:
    """Return how often labelled pictures are right before and after."""
    import numpy as np

    from edgeclip.distill.adapt import first_labels
    from edgeclip.distill.samples import BrokenLimit
    from edgeclip.evaluate.metrics import share
    from edgeclip.evaluate.paired import paired
    from edgeclip.evaluate.passes import choose

    columns = {name: row for row, name in enumerate(bank.names)}

    def usable(picture: Picture) -> int | str:
        if picture.label not in columns:
            return f"has the label {str(picture.label)[:80]!r}, which is not offered."
        return columns[picture.label]

    allowed = BrokenLimit.parse(max_left_out).allowed
    chosen = choose(pictures, usable, allowed=allowed)
    rows: list[NDArray[np.float32]] = []
    targets: list[int] = []
    for _, uses, (embedded,) in _passes([subject], chosen, allowed, notes, "labelled pictures"):
        rows.append(embedded)
        targets += uses
    embeddings, own = np.concatenate(rows), np.array(targets, np.intp)
    before, after = (first_labels(embeddings, each) == own for each in (bank.embeddings, found.rows))
    changes = paired(before, after)
    accuracy = {}
    for name, hits in (("before", before), ("after", after)):
        counted = share(hits)
        accuracy[name] = {"value": counted.value, "low": counted.low, "high": counted.high}
    return {
        **accuracy,
        **changes.to_dict(),
        "is_worse": changes.net_loss > 0 and changes.p_value < _SURE,
    }


# --- prompts -----------------------------------------------------------------------------------------------


def _prompts(
    checkpoint: str,
    model: str | None,
    bank: LabelBank,
    targets: Self | Taught,
    scale: float,
    seed: int,
    threads: int | None,
) -> Fit:
    """Return learned prompts through the text tower of a checkpoint.

    Raises:
        MissingExtraError: torch is not installed.
        ConfigError: it is not the checkpoint of the bundle.
    """
    from edgeclip.errors import MissingExtraError
    from edgeclip.runtime.host import usable_cores

    try:
        from edgeclip.distill.learned_prompts import LearnedPrompts, open_prompt_tower
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "--method prompts", extra="train", module=(error.name or "torch").partition(".")[0]
        ) from error
    tower = open_prompt_tower(
        checkpoint, bank.labels, bank.templates, model=model, threads=threads or usable_cores()
    )
    tower.check(bank.embeddings, where=f"checkpoint {shown(checkpoint)!r}")
    return LearnedPrompts(tower, targets, scale, seed=seed)


# --- what is said ------------------------------------------------------------------------------------------


def _summary(
    found: Adapted,
    seen: _Seen,
    checked: dict[str, Any] | None,
    reasons: list[str],
    teacher: dict[str, Any] | None,
) -> str:
    judged = found.judgement
    extra = [
        f"{count:,} {what}"
        for count, what in ((seen.duplicates, "seen twice"), (seen.left_out, "not readable"))
        if count
    ]
    lines = [
        f"{judged.pictures:,} pictures, {judged.labels:,} labels{'; ' if extra else ''}{', '.join(extra)}",
    ]
    if teacher is not None:
        itself = "adapted to the pictures first" if teacher["adapted_itself"] else "as it is"
        lines.append(f"teacher {teacher['name']}, {itself}")
    if judged.follows is not None and judged.follows_before is not None:
        lines.append(
            f"teacher's first label: {judged.follows_before:.1%} of the pictures before, "
            f"{judged.follows:.1%} of those not taught on"
        )
    lines += [
        f"first label changed:  {judged.changed:.1%} of the pictures",
        f"halves agree on:      {judged.agreement:.1%} of the first labels",
        f"labels explain:       {judged.explained:.1%} of what pictures differ in",
        _side("before", judged.before),
        _side("after", judged.after),
    ]
    if checked is not None:
        lines.append(
            f"labelled pictures:    {_accuracy(checked['before'])} -> {_accuracy(checked['after'])} of "
            f"{checked['n']:,}; {checked['wrong_to_right']} gained, {checked['right_to_wrong']} lost, "
            f"p {checked['mcnemar_p']:.2g} (McNemar)"
        )
    return "\n".join([*lines, *(f"reason: {each}" for each in reasons)])


def _side(what: str, side: Side) -> str:
    return (
        f"{what + ':':21} labels in use {side.in_use:,}, the commonest for {side.largest:.1%}; balance "
        f"{side.balance:.2f}, doubt {side.doubt:.2f}, neighbours agree {side.neighbours:.2f}"
    )


def _accuracy(figure: dict[str, float]) -> str:
    return f"{figure['value']:.1%} [{figure['low']:.1%}, {figure['high']:.1%}]"
