"""Options and small parts that the commands which run a model share."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import click

if TYPE_CHECKING:
    from edgeclip.answers import Answers
    from edgeclip.calibration.dataset import Method
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.data import Sample
    from edgeclip.export.build import Int8Search
    from edgeclip.export.options import Offered, References
    from edgeclip.labels import BankProgress, LabelBank, LabelSet, Templates
    from edgeclip.runtime.choose import VariantChoice
    from edgeclip.runtime.session import RuntimeOptions

__all__ = [
    "BANK_SUFFIXES",
    "SCHEMA",
    "AnswerChoice",
    "Int8Choice",
    "LabelChoice",
    "ModelChoice",
    "Notes",
    "Pictures",
    "answer_options",
    "batch_size_option",
    "bundle_directory",
    "cache_dir_option",
    "check_output",
    "duration",
    "form_option",
    "int8_options",
    "is_there",
    "label_options",
    "model_choice",
    "model_options",
    "output_options",
    "prepare_stdout",
    "quiet_broken_pipe",
    "shown",
    "stdout_of_results",
    "templates_of",
    "threads_option",
    "together",
    "variant_option",
    "workload_options",
]

SCHEMA = 1
BACKENDS = ("auto", "ort", "openvino", "tensorrt", "tensorrt_rtx", "eager")
BANK_SUFFIXES = (".safetensors", ".npy")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def together(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Return what adds options to a command, to be shown in this order."""

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def form_option(form: str, what: str, *more: str) -> Callable[[_Command], _Command]:
    """Return the option ``--FORM`` (with ``more`` names) for results in that form, as the argument ``form``.

    Two forms at once are an error of syntax; with none the argument is ``None``.
    """

    def take(context: click.Context, option: click.Parameter, given: bool) -> None:
        chosen = context.params.get("form")
        if given and chosen is not None:
            raise click.UsageError(f"--{chosen} and --{form} ask for two forms of the results; give one.")
        context.params["form"] = form if given else chosen

    return click.option(*more, f"--{form}", is_flag=True, expose_value=False, callback=take, help=what)


def cache_dir_option(command: _Command) -> _Command:
    """Add the option that says where compiled towers are."""
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        metavar="DIR",
        help="Where compiled towers are, as 'compile -o DIR' made them.  [default: the host cache]",
    )(command)


def variant_option(command: _Command) -> _Command:
    """Add the option that says which variant of a bundle runs."""
    return click.option("--variant", default="auto", show_default=True, help="Variant of the bundle.")(
        command
    )


def threads_option(command: _Command) -> _Command:
    """Add the option that says how many threads towers have."""
    return click.option(
        "--threads", type=click.IntRange(min=1), help="Threads of the towers.  [default: usable cores]"
    )(command)


def batch_size_option(command: _Command) -> _Command:
    """Add the option that says how many pictures a stream gives to the tower at once."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Pictures a tower call.  [default: what 'edgeclip tune' found, else 1]",
    )(command)


def model_options(command: _Command) -> _Command:
    """Add the options that say which model runs where."""
    return together(
        click.option(
            "--bundle",
            default="default",
            show_default=True,
            metavar="DIR|hf:ORG/NAME@REV",
            help="Bundle to use: a directory, one on the hub, or an embedded one, 'default' or 'nano'.",
        ),
        variant_option,
        click.option(
            "--backend",
            type=click.Choice(BACKENDS),
            default="auto",
            show_default=True,
            help="Inference engine.",
        ),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            help="cpu, cuda or cuda:N; with OpenVINO also gpu, gpu:N, npu and auto.",
        ),
        threads_option,
        cache_dir_option,
        click.option(
            "--allow",
            multiple=True,
            type=click.Choice(("unsafe-isa", "unverified")),
            help="Lift a guard: run int8 made for other instruction sets, or unverified variants as they "
            "are. Repeatable.",
        ),
    )(command)


def label_options(command: _Command) -> _Command:
    """Add the options that say which labels are offered."""
    return together(
        click.option("--labels", metavar="A,B,…", help="Labels, separated by commas; synonyms after '|'."),
        click.option(
            "--label-file",
            type=click.Path(path_type=Path),
            help="Labels: text, one a line; JSON; or a bank from 'labels build'.",
        ),
        click.option(
            "--templates",
            metavar="NAME|FILE",
            help="Prompt templates: bare, one, openai-7, openai-80, zh, a file, or text with one {}.  "
            "[default: the bundle's]",
        ),
        click.option("--language", metavar="CODE", help="Use the aliases of the labels in this language."),
    )(command)


def answer_options(command: _Command) -> _Command:
    """Add the options that say what is asked of each picture."""
    return together(
        click.option(
            "--head",
            metavar="FILE|NAME",
            help="Answer with a head from 'heads fit', a file or one in the bundle, in place of labels.",
        ),
        click.option(
            "--reject", is_flag=True, help="Give no label to pictures that show none of those offered."
        ),
        click.option(
            "--multi", is_flag=True, help="Judge each label by itself: none, one or several may fit."
        ),
        click.option(
            "--threshold",
            type=float,
            metavar="SCORE",
            help="Score from which a label fits, with --reject or --multi.  [default: the bundle's]",
        ),
        click.option(
            "--context",
            multiple=True,
            metavar="A,B,…",
            help="What pictures may show of the labels, as in 'on snow,indoors,a blurred {}': inferred "
            "for each picture first. Repeatable, for what is independent of it, as in 'at night'.",
        ),
    )(command)


def workload_options(command: _Command) -> _Command:
    """Add the options that say what a benchmark classifies: pictures, and labels that are offered."""
    return click.option(
        "--images",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Pictures to classify.  [default: the demonstration photographs]",
    )(label_options(command))


def output_options(command: _Command) -> _Command:
    """Add the options that say where the document of a benchmark goes."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the JSON document here, too.",
    )(click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command))


def int8_options(*, without_target: str, pictures: str) -> Callable[[_Command], _Command]:
    """Return what adds the options that say what int8 has to keep, and on which pictures that is judged.

    Args:
        without_target: what is done where no target is given.
        pictures: those that are taken where none are given.
    """
    return together(
        click.option(
            "--calibration-data",
            type=click.Path(path_type=Path),
            metavar="DIR|FILE",
            help="Pictures that int8 ranges are chosen on, or a calibration set that `export "
            f"--keep-intermediate` left.  [default: {pictures}]",
        ),
        click.option(
            "--calibration-samples",
            type=click.IntRange(min=16),
            metavar="N",
            help="Pictures, and texts, that int8 ranges are chosen on at most.  [default: 64 and 256]",
        ),
        click.option(
            "--calibration-selection",
            type=click.Choice(("coverage", "stratified", "random")),
            help="How they are chosen: so that they cover what the float model tells apart, in equal shares "
            "of their labels, or at random.  [default: coverage]",
        ),
        click.option(
            "--calibration-seed",
            type=click.IntRange(min=0),
            metavar="N",
            help="Another one chooses others.  [default: 0]",
        ),
        click.option(
            "--int8-target",
            metavar="NUMBER=LIMIT,…",
            help="Leave products in float until int8 reaches cosine=…, centred=… and top1=… on calibration "
            f"rows.  [default: {without_target}]",
        ),
        click.option(
            "--latency-table",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="What products take on the device, from `edgeclip bench --per-op`.  [default: measured "
            "here]",
        ),
    )


@dataclass(frozen=True)
class Int8Choice:
    """What :func:`int8_options` were given."""

    calibration_data: Path | None
    calibration_samples: int | None
    calibration_selection: Method | None
    calibration_seed: int | None
    int8_target: str | None
    latency_table: Path | None

    def references(self, pictures: Path | None = None, offered: Offered | None = None) -> References:
        """Return where inputs come from.

        Args:
            pictures: to compare on.
            offered: labels.

        Raises:
            InputError: pictures are not there, which is said before a model is opened.
        """
        from edgeclip.errors import InputError
        from edgeclip.export.options import METHOD, References

        for path in (pictures, self.calibration_data):
            if path is not None and not path.exists():
                raise InputError(f"{str(path)!r}: no such file or folder. Check the path of the pictures.")
        return References(
            pictures=pictures,
            calibration=self.calibration_data,
            calibration_samples=self.calibration_samples,
            calibration_selection=self.calibration_selection or METHOD,
            calibration_seed=self.calibration_seed or 0,
            offered=offered,
        )

    def search(self, folder: Path | None, threads: int | None) -> Int8Search:
        """Return what is asked of the choice of products that stay float.

        Raises:
            ConfigError: the target cannot be read.
        """
        from edgeclip.calibration.sensitivity import Int8Target
        from edgeclip.export.build import Int8Search

        target = None if self.int8_target is None else Int8Target.parse(self.int8_target)
        return Int8Search(target, self.latency_table, folder, threads)


@dataclass(frozen=True)
class ModelChoice:
    """What :func:`model_options` were given."""

    bundle: str
    variant: str
    backend: str
    device: str
    threads: int | None
    cache_dir: Path | None
    allow: tuple[str, ...] = ()

    def options(self) -> RuntimeOptions:
        """Return them as runtime options."""
        from edgeclip.runtime.session import RuntimeOptions

        return RuntimeOptions(
            backend=self.backend,
            device=self.device,
            threads=self.threads,
            cache_dir=self.cache_dir,
            allow=frozenset(self.allow),
        )


def model_choice(command: _Command) -> _Command:
    """Add :func:`model_options`, and hand what they were given to the command as one, ``model``."""
    names = [each.name for each in fields(ModelChoice)]

    @wraps(command)
    def with_model(*arguments: Any, **options: Any) -> Any:
        model = ModelChoice(**{name: options.pop(name) for name in names})
        return command(*arguments, model=model, **options)

    return model_options(cast("_Command", with_model))


@dataclass(frozen=True)
class AnswerChoice:
    """What :func:`answer_options` were given."""

    head: str | None
    reject: bool
    multi: bool
    threshold: float | None
    context: tuple[str, ...]

    def check(self, labels: LabelChoice) -> None:
        """Refuse combinations that mean nothing, before anything heavy is loaded."""
        if self.reject and self.multi:
            raise click.UsageError("--reject and --multi cannot be given together; --multi rejects, too.")
        if self.threshold is not None and not (self.reject or self.multi):
            raise click.UsageError("--threshold needs --reject or --multi.")
        if self.head is None:
            return
        if labels.is_given or labels.templates or labels.language:
            raise click.UsageError("--head brings its own classes; leave out labels, templates and language.")
        if self.context:
            raise click.UsageError("--context needs labels; a head has no texts to put into a context.")

    def answers(self) -> Answers:
        """Return what is asked of each picture.

        Raises:
            ConfigError: a context is empty or repeated.
        """
        from edgeclip.answers import Answers, crossed

        groups = []
        for said in self.context:
            phrases = [each.strip() for each in said.replace("，", ",").split(",")]
            if len(phrases) > 1 and not phrases[-1]:
                phrases.pop()  # a trailing comma is no context
            groups.append(phrases)
        one = Answers(context=tuple(each for group in groups for each in group))  # checked one by one
        context = one.context if len(groups) < 2 else crossed(groups)
        return Answers(self.reject, self.multi, self.threshold, context)


@dataclass(frozen=True)
class LabelChoice:
    """What :func:`label_options` were given."""

    labels: str | None
    label_file: Path | None
    templates: str | None
    language: str | None

    def check(self, *, required: bool = False) -> None:
        """Refuse combinations that mean nothing, before anything heavy is loaded."""
        given = self.is_given
        if self.labels is not None and self.label_file is not None:
            raise click.UsageError("--labels and --label-file cannot be given together.")
        if required and not given:
            raise click.UsageError("give --labels or --label-file.")
        if not given and self.templates:
            raise click.UsageError("--templates needs --labels or --label-file.")
        if self.is_bank and (self.templates or self.language):
            raise click.UsageError("a label bank brings its own templates and language.")

    @property
    def is_given(self) -> bool:
        """Whether there are any; otherwise the bundle's are offered."""
        return self.labels is not None or self.label_file is not None

    @property
    def is_bank(self) -> bool:
        """Whether the label file is a finished bank."""
        return self.label_file is not None and self.label_file.suffix.lower() in BANK_SUFFIXES

    def read(self) -> LabelSet | LabelBank | None:
        """Return the labels, a finished bank, or ``None`` where none were given."""
        from edgeclip.label_sets import parse_labels, read_labels

        if self.labels is not None:
            labels = parse_labels(self.labels)
        elif self.label_file is None:
            return None
        elif self.is_bank:
            from edgeclip.labels import LabelBank

            return LabelBank.open(self.label_file)
        else:
            labels = read_labels(self.label_file)
        return labels if self.language is None else labels.in_language(self.language)

    def read_templates(self) -> Templates | None:
        """Return the templates, if any were given."""
        return None if self.templates is None else templates_of(self.templates)

    def apply(self, classifier: ZeroShotClassifier, notes: Notes) -> None:
        """Set the labels of a classifier and say what there is to say about them."""
        labels = self.read()
        if labels is None:
            classifier.set_bundle_labels(self.language)
            count = len(classifier.bank)
            notes.say(
                f"no labels given, so the bundle's own {count:,} are used; "
                'offer yours with --labels "cat,dog,car" or --label-file'
            )
            return
        for warning in self.offer(classifier, labels, self.read_templates(), on_progress=notes.on_encoding):
            notes.say(warning)
        notes.done()

    def offer(
        self,
        classifier: ZeroShotClassifier,
        labels: LabelSet | LabelBank,
        templates: Templates | None,
        *,
        on_progress: Callable[[BankProgress], None],
    ) -> list[str]:
        """Set labels that were read, and return what there is to say about them."""
        classifier.set_labels(labels, templates=templates, on_progress=on_progress)
        return classifier.label_warnings()


class Notes:
    """Remarks and progress on stderr; progress only where a person watches.

    A remark that cannot be written is lost: a log on a full disk is no reason to end.
    """

    _LONG_S = 5.0

    def __init__(self) -> None:
        self._watched = sys.stderr is not None and sys.stderr.isatty()
        self._open_line = False
        self._estimated = False

    def say(self, text: str) -> None:
        """Write one remark."""
        self.done()
        self._write(f"edgeclip: {text}\n")

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError):
            click.echo(text, err=True, nl=False)

    def on_choice(self, choice: VariantChoice) -> None:
        """Say why the tuned profile of this device is not used, where there is one that is not."""
        for name, why in choice.skipped:
            if name == "tuned profile":
                self.say(f"the tuned profile is not used: {why}")

    def progress(self, text: str) -> None:
        """Rewrite the progress line."""
        if self._watched:
            # \x1b[K clears what a longer line left behind
            self._write(f"\r{text}\x1b[K")
            self._open_line = True

    def done(self) -> None:
        """End the progress line."""
        if self._open_line:
            self._write("\r\x1b[K")
            self._open_line = False

    def on_download(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Show how far a download is."""
        share = f" of {total_bytes / 1e6:,.0f}" if total_bytes else ""
        self.progress(f"{name}: {done_bytes / 1e6:,.0f}{share} MB")

    def on_encoding(self, progress: BankProgress) -> None:
        """Announce an encoding of labels that will take long, then show how far it is."""
        remaining_s = progress.remaining_s or 0.0
        if not self._estimated and remaining_s > self._LONG_S:
            self.say(
                f"encoding {progress.labels:,} labels ({progress.texts:,} texts) takes about "
                f"{duration(remaining_s)}; they are kept, and a run that is stopped continues there"
            )
        self._estimated = True
        self.progress(
            f"encoded {progress.labels_done:,} of {progress.labels:,} labels, {duration(remaining_s)} left"
        )


def is_there(said: str) -> bool:
    """Return whether a text is a path that exists; one too long for a path is none."""
    return os.path.exists(said)  # noqa: PTH110  # Path.exists raises where a name is too long


def templates_of(said: str) -> Templates:
    """Return templates: those of a built-in name or a file, or a template itself."""
    from edgeclip.label_sets import TEMPLATES, Templates

    is_file = said not in TEMPLATES and "{}" not in said and (Path(said).suffix or is_there(said))
    return Templates.read(said) if is_file else Templates.of(said)


def bundle_directory(said: str, notes: Notes) -> str:
    """Return what ``Bundle.open`` takes for a bundle argument, downloading ``hf:organisation/name@revision``.

    Raises:
        EdgeClipError: as ``edgeclip.hub.fetch_bundle``.
    """
    if not said.startswith("hf:"):
        return said
    from edgeclip.hub import fetch_bundle

    try:
        return str(fetch_bundle(said, say=notes.say, progress=notes.on_download))
    finally:
        notes.done()


def duration(seconds: float) -> str:
    """Return a time for people: seconds, or minutes where they are many."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class Pictures:
    """The pictures a command was given, as sources for a stream of the classifier; iterate it once.

    Args:
        paths: pictures, folders, tables and shards.
        paths_from: a file with more paths, ``-`` for standard input. It is read by a thread of its own, so
            that results come while its writer is still looking.
        notes: where folders that cannot be listed are named.
    """

    def __init__(self, paths: Iterable[Path], paths_from: str | None, notes: Notes) -> None:
        self._paths = paths
        self._paths_from = paths_from
        self._notes = notes
        self._keys: deque[str] = deque()
        self._queue: SimpleQueue[Sample | BaseException | None] = SimpleQueue()
        if paths_from is not None:
            threading.Thread(target=self._feed, name="edgeclip-paths", daemon=True).start()

    def __iter__(self) -> Iterator[Path | bytes]:
        """Yield sources; :meth:`next_key` follows in the same order."""
        samples = self._samples() if self._paths_from is None else self._queued()
        for sample in samples:
            self._keys.append(sample.key)
            yield sample.source

    def ready(self) -> bool:
        """Return whether the next picture is known already."""
        return self._paths_from is None or not self._queue.empty()

    def next_key(self) -> str:
        """Return the key of the next picture whose result is at hand."""
        return shown(self._keys.popleft())

    def _queued(self) -> Iterator[Sample]:
        while (sample := self._queue.get()) is not None:
            if isinstance(sample, BaseException):
                raise sample
            yield sample

    def _samples(self) -> Iterator[Sample]:
        from edgeclip.data import read_path_list, read_samples

        yield from read_samples(self._paths, missing="yield", skipped=self._skipped)
        if self._paths_from == "-":
            # By descriptor, unbuffered: a thread waiting inside sys.stdin aborts the interpreter at its exit.
            with open(0, "rb", buffering=0, closefd=False) as stream:
                yield from self._listed(read_path_list(stream), read_samples)
        elif self._paths_from is not None:
            yield from self._listed(read_path_list(self._paths_from), read_samples)

    def _listed(self, paths: Iterable[Path], read: Callable[..., Iterator[Sample]]) -> Iterator[Sample]:
        for path in paths:
            yield from read([path], missing="yield", skipped=self._skipped)

    def _skipped(self, folder: Path, reason: str) -> None:
        self._notes.say(f"warning: folder {shown(folder)!r} cannot be listed ({reason}) and is left out")

    def _feed(self) -> None:
        try:
            for sample in self._samples():
                self._queue.put(sample)
        except BaseException as error:  # raised again where the pictures are used
            self._queue.put(error)
        self._queue.put(None)


def shown(path: object) -> str:
    """Return a path as text that terminals and JSON can carry: odd bytes and control characters escaped."""
    text = os.fsencode(str(path)).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def prepare_stdout() -> None:
    """Let names that the encoding of stdout lacks be escaped instead of ending the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("edgeclip-json", _as_json)
        sys.stdout.reconfigure(errors="edgeclip-json")


def _as_json(error: UnicodeError) -> tuple[str, int]:
    """Escape as JSON does, which is what most of it is; Python's own escapes are none of JSON's."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def stdout_of_results() -> TextIO:
    """Return standard output, prepared, where results are all that a command is for.

    Raises:
        InputError: it is closed.
    """
    prepare_stdout()
    if sys.stdout is not None:
        return sys.stdout
    from edgeclip.errors import InputError

    raise InputError(
        "standard output is closed, expected a terminal, pipe or file for results. To throw them away, "
        f"write to {os.devnull}."
    )


def check_output(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Args:
        option: that names it.
        path: of the file; ``None`` asks for none.

    Raises:
        InputError: its folder is missing or closed, or there stands something else than a file.
    """
    from edgeclip.errors import InputError

    if path is None:
        return
    where, folder = f"{option} {str(path)!r}", path.resolve().parent
    if os.path.exists(path) and not path.is_file():  # noqa: PTH110  # Path.exists raises where a name is too long
        what = "directory" if path.is_dir() else "device or pipe"
        raise InputError(f"{where}: this is a {what}, expected the name of a file.")
    if not folder.is_dir():
        raise InputError(f"{where}: there is no directory {str(path.parent)!r}; make it.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{where}: nothing can be written to {str(path.parent)!r}.")


def quiet_broken_pipe() -> None:
    """Let the interpreter end in silence after the reader of stdout has gone (``| head``)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
