"""``edgeclip eval``: how good models are, bundles and checkpoints in one table."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    BANK_SUFFIXES,
    SCHEMA,
    AnswerChoice,
    LabelChoice,
    Notes,
    answer_options,
    bundle_directory,
    cache_dir_option,
    check_output,
    is_there,
    prepare_stdout,
    quiet_broken_pipe,
    templates_of,
    threads_option,
)

if TYPE_CHECKING:
    from edgeclip.answers import Answers
    from edgeclip.evaluate.comparison import Settings
    from edgeclip.evaluate.offered import Instead, Offered
    from edgeclip.evaluate.picture_sets import PictureSet
    from edgeclip.evaluate.results import Comparison
    from edgeclip.evaluate.subjects import Subject
    from edgeclip.label_sets import LabelSet

__all__ = ["eval_"]

_ARGUMENTS = "edgeclip.arguments"
_FOR_LANGUAGE = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


class _Recorded(click.Command):
    """A command that remembers its arguments: they are part of what it reports."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments, then parse them."""
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


@click.command("eval", cls=_Recorded)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--data", required=True, metavar="DATA", help="Folder a class, table, shards or clip_benchmark set."
)
@click.option(
    "--labels",
    multiple=True,
    metavar="[LANG=]FILE|A,B,…",
    help="Labels offered; one file for each language, one with aliases, or a bank from 'labels build' or "
    "'adapt'.  [default: those of the data]",
)
@click.option("--language", "languages", multiple=True, metavar="LANG", help="Aliases to offer; repeat it.")
@click.option(
    "--templates",
    multiple=True,
    metavar="[LANG=]NAME|FILE",
    help="Prompts around labels.  [default: those of the data, else of the first model]",
)
@click.option(
    "--own-labels", is_flag=True, help="Offer the bundles' own labels, as 'classify' does without any."
)
@answer_options
@click.option(
    "--task",
    type=click.Choice(["zero-shot", "retrieval"]),
    help="What is measured.  [default: what the data say, else zero-shot]",
)
@click.option(
    "--captions", multiple=True, metavar="KIND", help="Kinds for retrieval; repeat it.  [default: all]"
)
@click.option("--corruptions", metavar="all|NAME,…", help="Also measure corrupted pictures.")
@click.option("--severities", default="1-5", show_default=True, metavar="A-B|A,B,…", help="Of corruptions.")
@click.option("--ood", metavar="DATA", help="Pictures of none of the labels, to be told from the others.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Pictures at most, spread over the data.  [default: all]"
)
@click.option(
    "--variants", multiple=True, metavar="all|NAME", help="Variants of bundles; repeat it.  [default: all]"
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Pictures a tower call."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@threads_option
@cache_dir_option
@click.option(
    "--max-left-out",
    default="1%",
    show_default=True,
    metavar="N|N%",
    help="Pictures that may be unlabelled or broken.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the corruptions.")
@click.option("--per-class", is_flag=True, help="Also show every label.")
@click.option("--json", "json_to", metavar="FILE|-", help="Write one JSON document.")
@click.pass_context
def eval_(
    ctx: click.Context,
    *,
    models: tuple[str, ...],
    data: str,
    labels: tuple[str, ...],
    languages: tuple[str, ...],
    templates: tuple[str, ...],
    own_labels: bool,
    head: str | None,
    reject: bool,
    multi: bool,
    threshold: float | None,
    context: tuple[str, ...],
    task: str | None,
    captions: tuple[str, ...],
    corruptions: str | None,
    severities: str,
    ood: str | None,
    limit: int | None,
    variants: tuple[str, ...],
    batch_size: int,
    device: str,
    threads: int | None,
    cache_dir: Path | None,
    max_left_out: str,
    seed: int,
    per_class: bool,
    json_to: str | None,
) -> None:
    """Measure how good models are, all on the same pictures, a row a model.

    A MODEL is a bundle ("default", "nano", a directory, hf:ORG/NAME@REV), whose variants are a row each; a
    checkpoint of ours; or NAME:FILE, a published weights file of a model in `edgeclip models`. The last two
    need torch. The first row is the reference of "agree": the share of pictures on which both say the same.

    \b
    zero-shot  top-1 and top-5, mean recall of the classes, calibration error (ECE)
    retrieval  recall at 1, 5 and 10, of texts by pictures and of pictures by texts

    With --head, --context, --reject and --multi the answers are those of 'classify'. --reject also asks for
    every picture without its own label among those offered. With --multi a picture may have several labels,
    separated by '|'.

    Example: edgeclip eval default --data shapes/held_out.jsonl --labels shapes/labels.json --limit 200
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    began = time.perf_counter()
    from edgeclip.evaluate.picture_sets import open_set

    prepare_stdout()
    notes = Notes()
    pictures = open_set(data)
    task = task or pictures.task or "zero-shot"
    zero_shot_only = {
        "--labels": labels,
        "--language": languages,
        "--templates": templates,
        "--own-labels": own_labels,
        "--head": head,
        "--reject": reject,
        "--multi": multi,
        "--threshold": threshold is not None,
        "--context": context,
        "--corruptions": corruptions,
        "--ood": ood,
        "--per-class": per_class,
    }
    misplaced = next((name for name, given in zero_shot_only.items() if given and task == "retrieval"), None)
    if misplaced is not None:
        raise click.UsageError(f"{misplaced} means nothing for retrieval.")
    if captions and task != "retrieval":
        raise click.UsageError("--captions means nothing for zero-shot.")
    check_output("--json", Path(json_to) if json_to not in (None, "-") else None)
    asked = AnswerChoice(head, reject, multi, threshold, context)
    asked.check(
        LabelChoice(next(iter(labels), None), None, next(iter(templates), None), next(iter(languages), None))
    )
    if own_labels and (head or labels or languages or templates):
        raise click.UsageError(
            "--own-labels are the bundles'; leave out head, labels, templates and language."
        )
    bank = next((said for said in labels if Path(said).suffix.lower() in BANK_SUFFIXES), None)
    if bank is not None and (len(labels) > 1 or languages or templates or context):
        raise click.UsageError(
            "a label bank brings its own templates and language, and has no texts to put into a context."
        )
    answers = asked.answers()
    chosen, levels = _corruptions(corruptions), _severities(severities)
    settings = _settings(limit, batch_size, max_left_out, notes)
    # What is cheap to find wrong is looked at before a model is opened.
    offered, instead = None, _instead(bank, head, own_labels)
    if task != "retrieval" and instead is None:
        offered = _offered(pictures, labels, languages, templates, multi, notes)
    others = None if ood is None else open_set(ood)
    opened = _Models(notes, variants, device, threads, cache_dir, answers)
    try:
        for said in models:
            opened.add(said)
        from edgeclip.evaluate.comparison import compare_retrieval, compare_zero_shot
        from edgeclip.evaluate.offered import offer_instead

        if instead is not None:
            names = opened.subjects[0].in_force(instead.asked, None).names
            brought = pictures.labels if pictures.numbered else None
            offered = offer_instead(instead, names, numbered=brought)
        if offered is None:
            comparison = compare_retrieval(opened.subjects, pictures, kinds=captions, settings=settings)
        else:
            comparison = compare_zero_shot(
                opened.subjects,
                pictures,
                offered,
                corruptions=chosen,
                severities=levels,
                ood=others,
                per_class=per_class,
                seed=seed,
                settings=settings,
            )
    finally:
        notes.done()
        opened.close()
    document = _document(comparison, opened, ctx.meta[_ARGUMENTS], time.perf_counter() - began)
    try:
        _print(comparison, document, json_to, per_class)
    except BrokenPipeError:
        quiet_broken_pipe()  # the reader has what it wanted


# --- what is asked -----------------------------------------------------------------------------------------


def _corruptions(said: str | None) -> tuple[str, ...]:
    from edgeclip.evaluate.corruptions import CORRUPTIONS

    if said is None:
        return ()
    names = list(CORRUPTIONS) if said == "all" else [name.strip() for name in said.split(",")]
    unknown = next((name for name in names if name not in CORRUPTIONS), None)
    if unknown is not None:
        raise click.BadParameter(
            f"{unknown!r} is not one of all, {', '.join(CORRUPTIONS)}.", param_hint="--corruptions"
        )
    return tuple(dict.fromkeys(names))


def _severities(said: str) -> tuple[int, ...]:
    match = re.fullmatch(r"([1-5])-([1-5])", said)
    if match is not None and match[1] <= match[2]:
        return tuple(range(int(match[1]), int(match[2]) + 1))
    if re.fullmatch(r"[1-5](,[1-5])*", said) is None:
        raise click.BadParameter(f"{said!r}: expected 1 to 5, as in 1-5 or 1,3,5.", param_hint="--severities")
    return tuple(sorted({int(each) for each in said.split(",")}))


def _settings(limit: int | None, batch_size: int, max_left_out: str, notes: Notes) -> Settings:
    from edgeclip.distill.samples import BrokenLimit
    from edgeclip.evaluate.comparison import Settings
    from edgeclip.runtime.host import usable_cores

    return Settings(
        limit=limit,
        batch_size=batch_size,
        workers=usable_cores(),
        allowed=BrokenLimit.parse(max_left_out).allowed,
        progress=_Watch(notes),
        on_encoding=notes.on_encoding,
    )


class _Watch:
    """Progress with an estimate of what is left."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._what, self._began, self._at = "", 0.0, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if what != self._what:  # what comes next took its first step before this clock was set
            self._what, self._began, self._at = what, now, done
        rate = (now - self._began) / max(1, done - self._at)
        left = f", {rate * (total - done):.0f} s left" if done > self._at else ""
        self._notes.progress(f"{what}: {done:,} of {total:,}{left}")


def _instead(bank: str | None, head: str | None, own_labels: bool) -> Instead | None:
    from edgeclip.evaluate.offered import Instead
    from edgeclip.labels import LabelBank

    if bank is not None:
        return Instead("bank", bank, LabelBank.open(bank))
    if head is not None:
        return Instead("head", head)
    return Instead("own") if own_labels else None


def _offered(
    pictures: PictureSet,
    labels: Sequence[str],
    languages: Sequence[str],
    templates: Sequence[str],
    several: bool,
    notes: Notes,
) -> Offered:
    from edgeclip.errors import InputError
    from edgeclip.evaluate.offered import offer, repeated_names
    from edgeclip.label_sets import LabelSet

    given: list[tuple[str | None, LabelSet]] = [
        (language, _labels(said)) for language, said in map(_for_language, labels)
    ]
    if languages and len(given) > 1:
        raise click.UsageError("--language takes aliases of one file; leave it out or give one --labels.")
    brought = pictures.labels
    if not given:
        given = [(None, brought or LabelSet.of(_labels_found(pictures, several)))]
    elif pictures.numbered and brought is not None and len(given[0][1]) != len(brought):
        raise InputError(
            f"--labels: got {len(given[0][1]):,}, expected {len(brought):,} in the order of "
            f"{pictures.path!r}, whose pictures have numbers for labels."
        )
    repeated = repeated_names(given[0][1])
    if repeated:
        notes.say(
            f"{len(repeated)} names stand for several labels, which cannot be told apart, first "
            f"{repeated[0]!r}; the first one wins"
        )
    prompts = [(language, templates_of(said)) for language, said in map(_for_language, templates)]
    if pictures.templates is not None and not prompts:
        prompts = [(None, pictures.templates)]
    return offer(given, languages=languages, templates=prompts, numbered=pictures.numbered)


def _labels(said: str) -> LabelSet:
    from edgeclip.label_sets import parse_labels, read_labels

    return parse_labels(said) if "," in said and not is_there(said) else read_labels(said)


def _labels_found(pictures: PictureSet, several: bool) -> list[str]:
    from edgeclip.errors import InputError

    said = [picture.label for picture in pictures if picture.label is not None]
    found = {name.strip() for label in said for name in (label.split("|") if several else [label])}
    if not found:
        raise InputError(
            f"{pictures.path!r}: no picture has a label; expected a folder a class, a column 'label' or .cls "
            "files, or --task retrieval for pictures with captions."
        )
    return sorted(found)


def _for_language(said: str) -> tuple[str | None, str]:
    match = _FOR_LANGUAGE.fullmatch(said)
    return (match[1], match[2]) if match is not None and not is_there(said) else (None, said)


# --- who is asked ------------------------------------------------------------------------------------------


@dataclass
class _Models:
    """The models, opened one after the other.

    Attributes:
        notes: where variants that cannot run are named.
        variants: of bundles.
        device: where everything runs.
        threads: of towers.
        cache_dir: where compiled towers are, in place of the host cache.
        answers: what is asked of each picture.
        subjects: what was opened.
        skipped: variants that cannot run here, and why.
    """

    notes: Notes
    variants: tuple[str, ...]
    device: str
    threads: int | None
    cache_dir: Path | None
    answers: Answers
    subjects: list[Subject] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, said: str) -> None:
        """Open what an argument names."""
        from edgeclip.bundle import EMBEDDED
        from edgeclip.errors import InputError

        path, colon, file = Path(said), *said.partition(":")[1:]
        if said in EMBEDDED or said.startswith("hf:") or (path / "manifest.json").is_file():
            self._bundle(said)
        elif (path / "config.json").is_file() or path.is_file():
            self._eager(said, said, None)
        elif colon and Path(file).is_file():
            self._eager(said, file, said.partition(":")[0])
        elif path.is_dir():
            inside = path / "model"
            hint = f" Did you mean {str(inside)!r}?" if (inside / "config.json").is_file() else ""
            raise InputError(
                f"model {said!r} holds neither manifest.json (a bundle) nor config.json (a checkpoint).{hint}"
            )
        else:
            from edgeclip.bundle import EMBEDDED

            embedded = ", ".join(map(repr, EMBEDDED))
            missing = file if colon and Path(file).parent.is_dir() else said
            raise InputError(
                f"model {said!r}: {missing!r} is not there; expected {embedded}, the directory of a "
                "bundle or checkpoint, or NAME:FILE for a published file."
            )

    def _bundle(self, said: str) -> None:
        from edgeclip.evaluate.subjects import open_bundle
        from edgeclip.runtime.session import RuntimeOptions

        opened, skipped = open_bundle(
            bundle_directory(said, self.notes),
            variants=[] if "all" in self.variants else self.variants,
            options=RuntimeOptions(device=self.device, threads=self.threads, cache_dir=self.cache_dir),
            answers=self.answers,
        )
        self.subjects += opened
        self.skipped += skipped
        for name, reason in skipped:
            self.notes.say(f"{name} is left out: {reason}")

    def _eager(self, said: str, path: str, model: str | None) -> None:
        import importlib.util

        from edgeclip.errors import MissingExtraError

        if importlib.util.find_spec("torch") is None:
            raise MissingExtraError(f"evaluating {said!r}", extra="train", module="torch")
        from edgeclip.distill.eager import open_eager
        from edgeclip.runtime.host import usable_cores

        threads = self.threads or usable_cores()
        self.subjects.append(
            open_eager(path, model=model, device=self.device, threads=threads, answers=self.answers)
        )

    def close(self) -> None:
        """Close them."""
        for subject in self.subjects:
            subject.close()


# --- what is said ------------------------------------------------------------------------------------------


def _document(
    comparison: Comparison, opened: _Models, arguments: Sequence[str], wall_s: float
) -> dict[str, Any]:
    from edgeclip.bundle import provenance_time
    from edgeclip.runtime.host import Host, versions

    return {
        "schema": SCHEMA,
        "kind": "evaluation",
        "command": ["edgeclip", "eval", *arguments],
        "time": provenance_time(),
        "wall_s": round(wall_s, 3),
        "versions": versions(),
        "host": Host.here().to_dict(),
        "not_run": [{"name": name, "reason": reason} for name, reason in opened.skipped],
        **comparison.to_dict(),
    }


def _print(comparison: Comparison, document: dict[str, Any], json_to: str | None, per_class: bool) -> None:
    from edgeclip.evaluate.tables import comparison_table, per_class_table
    from edgeclip.labels import write_atomic

    text = json.dumps(document, ensure_ascii=False, indent=1)
    if json_to == "-":
        click.echo(text)
        return
    try:
        if json_to is not None:
            write_atomic(Path(json_to), (text + "\n").encode("utf-8", "backslashreplace"))
    finally:  # what was measured is shown wherever it could not be written
        click.echo(comparison_table(comparison))
        if per_class:
            click.echo("\n" + per_class_table(comparison))
