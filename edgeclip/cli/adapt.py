"""``edgeclip adapt``: fit a label bank to unlabelled pictures of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._labelled import labelled_options
from ._options import (
    SCHEMA,
    LabelChoice,
    ModelChoice,
    Notes,
    bundle_directory,
    check_output,
    label_options,
    prepare_stdout,
    shown,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.distill.adapt import Adapted, Fit, Self, Side, Taught
    from edgeclip.distill.adapt_pictures import Checked, Seen
    from edgeclip.distill.learned_prompts import PromptTower
    from edgeclip.evaluate.metrics import Share
    from edgeclip.evaluate.subjects import BundleSubject
    from edgeclip.labels import LabelBank

__all__ = ["adapt"]

EXIT_INCONCLUSIVE = 3
_FOREIGN_SCALE = 100.0
_WITNESSES = {"nano": "default"}
_NOBODY = "none"


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
    "--witness",
    metavar="BUNDLE|none",
    help="Another bundle, at least as good, that looks at the pictures too: where it finds the new answers "
    "less likely than the old ones, the bank cannot be relied on. It teaches nothing.  [default: 'default' "
    "for 'nano' without a teacher, else none]",
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
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the halves, and of the pictures that say when prompts are learnt.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Pictures at most, spread over the data.")
@click.option(
    "--check",
    "labelled",
    metavar="DATA",
    help="Pictures labelled with the names offered, such as a folder each: accuracy before and after.",
)
@click.option("--force", is_flag=True, help="Write the bank even where it cannot be relied on.")
@labelled_options
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
    labelled: str | None,
    limit: int | None,
    max_left_out: str,
    force: bool,
    variant: str,
    threads: int | None,
    cache_dir: Path | None,
    as_json: bool,
    output: Path,
    **options: Any,
) -> int:
    """Make a label bank that fits pictures of your own, without a label on them.

    The pictures are seen as BUNDLE sees them on the device, and what is learnt is an ordinary bank for
    'classify --label-file': it costs nothing at run time. Which labels came first before and after, and
    whether halves of the pictures lead to the same, is said. Exit code 3 where the result cannot be relied
    on; nothing is written then without --force.
    """
    asked = _Asked(**options)
    asked.check()
    _check_output(output)
    offered = LabelChoice(labels, label_file, templates, language)
    offered.check(required=True)
    from edgeclip.distill import adapt as adaptation
    from edgeclip.distill import adapt_pictures
    from edgeclip.distill.samples import BrokenLimit
    from edgeclip.evaluate.picture_sets import open_set
    from edgeclip.labels import write_atomic

    prepare_stdout()
    notes = Notes()
    pictures = open_set(images)
    checked = None if labelled is None else open_set(labelled)
    allowed = BrokenLimit.parse(max_left_out).allowed
    choice = ModelChoice(bundle_path, variant, "auto", "cpu", threads, cache_dir)
    on_labelled = None
    try:
        with _subject(choice, notes) as (subject, classifier):
            offered.apply(classifier, notes)
            bank, space = classifier.bank, str(subject.about["embedding_space"])
            adaptation.check_labels(len(bank))
            to_check = None if checked is None else adapt_pictures.labelled(checked, bank, allowed)
            tower = _prompt_tower(asked, bank, threads) if asked.method == "prompts" else None
            with _other(asked, bank, choice, notes) as other:
                subjects = [subject] if other is None or other.subject is None else [subject, other.subject]
                seen = adapt_pictures.look_at(
                    pictures,
                    subjects,
                    allowed=allowed,
                    stored=None if other is None else other.rows,
                    limit=limit,
                    on_progress=notes.progress,
                )
            found, about = _adapted(asked, subject.scale, bank, other, seen, tower, notes)
            if to_check is not None:
                on_labelled = adapt_pictures.check(
                    to_check,
                    subject,
                    bank.embeddings,
                    found.rows,
                    seen,
                    allowed=allowed,
                    on_progress=notes.progress,
                )
    finally:
        notes.done()
    reasons = list(found.judgement.reasons)
    if on_labelled is not None and on_labelled.is_worse:
        reasons.append("labelled pictures are right less often than before")
    about["reasons"] = reasons
    written = not reasons or force
    if written:
        made = adaptation.adapted_bank(bank, found.rows, space)
        write_atomic(output, adaptation.bank_file(made, about))
    if as_json:
        document = {
            "schema": SCHEMA,
            "kind": "adapt",
            **about,
            "reliable": not reasons,
            "labels": len(bank),
            "embedding_space": space,
            "left_out": seen.left_out,
            "duplicates": seen.duplicates,
            "judgement": found.judgement.to_dict(),
            "check": None if on_labelled is None else on_labelled.to_dict(),
            "written": written,
        }
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        click.echo(_summary(found, seen, on_labelled, about))
        if written:
            click.echo(f"written to {shown(output)}{', by force' if reasons else ''}")
        else:
            click.echo("cannot be relied on, so nothing is written (--force writes it)")
    return 0 if written else EXIT_INCONCLUSIVE


def _check_output(output: Path) -> None:
    """Refuse what cannot be written, before anything is done."""
    if output.suffix.lower() != ".safetensors":
        raise click.BadParameter(f"{str(output)!r} does not end in .safetensors.", param_hint="--output")
    check_output("--output", output)


@dataclass(frozen=True)
class _Asked:
    """What was asked for, of how rows are made and judged."""

    method: str
    teacher: str | None
    teacher_bank: Path | None
    teacher_scale: float | None
    witness: str | None
    checkpoint: str | None
    model: str | None
    strength: float | None
    seed: int

    def check(self) -> None:
        """Refuse combinations that mean nothing, before anything heavy is loaded."""
        if self.method == "prompts" and self.checkpoint is None:
            raise click.UsageError("--method prompts needs --checkpoint, what the bundle was exported from.")
        if self.method != "prompts" and (self.checkpoint is not None or self.model is not None):
            raise click.UsageError("--checkpoint and --model belong to --method prompts.")
        if self.teacher is None and (self.teacher_bank is not None or self.teacher_scale is not None):
            raise click.UsageError("--teacher-bank and --teacher-scale need --teacher.")
        if self.is_stored and self.teacher_bank is None:
            raise click.UsageError("--teacher FILE.npy needs --teacher-bank, the labels in its space.")
        if self.teacher is not None and self.witness not in (None, _NOBODY):
            raise click.UsageError(
                "--witness and --teacher cannot be given together: the teacher is asked already."
            )
        if self.teacher is not None and self.method == "prompts" and self.strength is not None:
            raise click.UsageError("--strength means nothing to prompts that learn from a teacher.")

    @property
    def is_stored(self) -> bool:
        """Whether the teacher is a file of embeddings."""
        return self.teacher is not None and self.teacher.lower().endswith(".npy")


@contextmanager
def _subject(choice: ModelChoice, notes: Notes) -> Iterator[tuple[BundleSubject, ZeroShotClassifier]]:
    """Open a bundle as it runs on the device."""
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.evaluate.subjects import BundleSubject

    opened = ZeroShotClassifier.open(
        bundle_directory(choice.bundle, notes), variant=choice.variant, options=choice.options()
    )
    with closing(BundleSubject(choice.bundle, opened)) as subject:
        yield subject, opened


# --- a teacher, or a witness -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Other:
    """Another model that says what the pictures show.

    Attributes:
        subject: it, if it looks at the pictures itself.
        rows: its embeddings of all pictures of the set, if it did before.
        labels: ``(N, T)`` its rows of the labels.
        scale: multiplier of its cosines.
        about: what the bank will say of it.
    """

    subject: BundleSubject | None
    rows: NDArray[np.float32] | None
    labels: NDArray[np.float32]
    scale: float
    about: dict[str, Any]


@contextmanager
def _other(asked: _Asked, bank: LabelBank, choice: ModelChoice, notes: Notes) -> Iterator[_Other | None]:
    """Open the teacher or the witness, and bring its labels into the order of the bank's.

    Raises:
        InputError: its bank holds other labels, is of another space, or as wide as its rows are not.
    """
    from edgeclip.errors import InputError
    from edgeclip.labels import LabelBank

    own = None if asked.teacher_bank is None else LabelBank.open(asked.teacher_bank)
    if own is not None and set(own.names) != set(bank.names):
        missing = sorted(set(bank.names) ^ set(own.names))
        raise InputError(
            f"teacher bank {shown(asked.teacher_bank)!r}: holds other labels than are offered, first "
            f"{missing[0]!r}; build it with the same labels."
        )
    said = asked.teacher or asked.witness or _WITNESSES.get(choice.bundle, _NOBODY)
    if said == _NOBODY:
        yield None
    elif own is not None and asked.is_stored:
        rows = _read_rows(Path(said))
        if rows.shape[1] != own.embeddings.shape[1]:
            raise InputError(
                f"teacher {shown(said)!r} has rows of {rows.shape[1]}, its bank of "
                f"{own.embeddings.shape[1]} dimensions; they must be of one model."
            )
        about = {"name": Path(said).name, "rows": len(rows)}
        yield _Other(None, rows, _ordered(own, bank), asked.teacher_scale or _FOREIGN_SCALE, about)
    else:
        with _subject(replace(choice, bundle=said, variant="auto", cache_dir=None), notes) as (subject, _):
            space = subject.about["embedding_space"]
            if own is None:
                own = subject.bank(bank.labels, bank.templates, notes.on_encoding)
                notes.done()
            elif own.space and own.space != space:
                raise InputError(
                    f"teacher bank {shown(asked.teacher_bank)!r} is of another embedding space than the "
                    f"teacher {shown(said)!r}; build it with this bundle."
                )
            about = {name: subject.about[name] for name in ("embedding_space", "variant")}
            about = {"name": subject.about["model"], **about}
            yield _Other(subject, None, _ordered(own, bank), asked.teacher_scale or subject.scale, about)


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


# --- rows --------------------------------------------------------------------------------------------------


def _adapted(
    asked: _Asked,
    scale: float,
    bank: LabelBank,
    other: _Other | None,
    seen: Seen,
    tower: PromptTower | None,
    notes: Notes,
) -> tuple[Adapted, dict[str, Any]]:
    """Return the adapted rows, and what the bank will say of how they were made.

    A teacher adapts itself to the pictures first, where that can be relied on.
    """
    from edgeclip.distill import adapt as adaptation

    targets: Self | Taught
    teacher = witness = said = taught = None
    if other is not None and asked.teacher is not None:
        strength = adaptation.TAUGHT_STRENGTH if asked.strength is None else asked.strength
        taught, judged = adaptation.ask_teacher(
            seen.rows[1], other.labels, other.scale, strength=strength, seed=asked.seed
        )
        targets, teacher = taught, {**other.about, "adapted_itself": judged.reliable}
    else:
        strength = adaptation.STRENGTH if asked.strength is None else asked.strength
        targets = adaptation.Self(scale, strength=strength)
        if other is not None:
            said, witness = adaptation.posterior(seen.rows[1], other.labels, other.scale), other.about
    fit: Fit = targets
    if tower is not None:
        from edgeclip.distill.learned_prompts import LearnedPrompts

        fit = LearnedPrompts(tower, targets, scale, seed=asked.seed)
    found = adaptation.adapt(
        seen.rows[0],
        bank.embeddings,
        fit,
        scale=scale,
        taught=taught,
        witness=said,
        seed=asked.seed,
        on_progress=notes.progress,
    )
    return found, {
        "method": asked.method,
        "strength": None if tower is not None and taught is not None else strength,
        "seed": asked.seed,
        "pictures": found.judgement.pictures,
        "pictures_sha256": seen.digest,
        "teacher": teacher,
        "witness": witness,
    }


def _prompt_tower(asked: _Asked, bank: LabelBank, threads: int | None) -> PromptTower:
    """Return the text tower of the checkpoint, ready for prompts.

    Raises:
        MissingExtraError: torch is not installed.
        ConfigError: it is not the checkpoint of the bundle.
    """
    from edgeclip.errors import MissingExtraError
    from edgeclip.runtime.host import usable_cores

    try:
        from edgeclip.distill.learned_prompts import open_prompt_tower
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "--method prompts", extra="train", module=(error.name or "torch").partition(".")[0]
        ) from error
    checkpoint = asked.checkpoint or ""
    tower = open_prompt_tower(
        checkpoint, bank.labels, bank.templates, model=asked.model, threads=threads or usable_cores()
    )
    tower.check(bank.embeddings, where=f"checkpoint {shown(checkpoint)!r}")
    return tower


# --- what is said ------------------------------------------------------------------------------------------


def _summary(found: Adapted, seen: Seen, checked: Checked | None, about: dict[str, Any]) -> str:
    judged = found.judgement
    counts = [f"{judged.pictures:,} pictures, {judged.labels:,} labels"]
    counts += [f"{seen.duplicates:,} seen twice"] if seen.duplicates else []
    counts += [f"{seen.left_out:,} not readable"] if seen.left_out else []
    lines = ["; ".join(counts)]
    teacher, witness = about["teacher"], about["witness"]
    if teacher is not None:
        itself = "adapted to the pictures first" if teacher["adapted_itself"] else "as it is"
        lines.append(f"teacher {teacher['name']}, {itself}")
    if judged.follows is not None and judged.follows_before is not None:
        lines.append(
            f"teacher's first label: {judged.follows_before:.1%} of the pictures before, "
            f"{judged.follows:.1%} of those not taught on"
        )
    if judged.witness is not None:
        lines.append(f"witness expects:      {judged.witness:+.1%} of the pictures right ({witness['name']})")
    lines += [
        f"first label changed:  {judged.changed:.1%} of the pictures",
        f"halves agree on:      {judged.agreement:.1%} of the first labels",
        f"labels explain:       {judged.explained:.1%} of what pictures differ in",
        _side("before", judged.before),
        _side("after", judged.after),
    ]
    if checked is not None:
        changes = checked.changes
        again = f"; {checked.adapted_on:,} of them were adapted on" if checked.adapted_on else ""
        lines.append(
            f"labelled pictures:    {_accuracy(checked.before)} -> {_accuracy(checked.after)} of "
            f"{changes.n:,}; {changes.wrong_to_right} gained, {changes.right_to_wrong} lost, "
            f"p {changes.p_value:.2g} (McNemar){again}"
        )
    return "\n".join([*lines, *(f"reason: {each}" for each in about["reasons"])])


def _side(what: str, side: Side) -> str:
    return (
        f"{what + ':':21} labels in use {side.in_use:,}, the commonest for {side.largest:.1%}; balance "
        f"{side.balance:.2f}, doubt {side.doubt:.2f}, neighbours agree {side.neighbours:.2f}"
    )


def _accuracy(figure: Share) -> str:
    return f"{figure.value:.1%} [{figure.low:.1%}, {figure.high:.1%}]"
