"""ZeroShotClassifier: pictures in, ranked labels out; the facade over bundle, towers and heads.

    >>> with ZeroShotClassifier.open() as classifier:
    ...     classifier.set_labels(["cat", "dog", "car"])
    ...     best = classifier.classify("photo.jpg")[0]
    ...     best.label, best.score, best.similarity

It knows no result files, no command line and no network; it prints nothing, installs no signal handlers and
changes no setting of the process, but for memory that Pillow keeps while it is open (`picture_memory.py`).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from time import perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard, cast, overload

import numpy as np

from .answers import Answer, Answers, InForce, Prediction, Rejection, in_context, of_bank, of_few_shot
from .bundle import Bundle
from .bundle_labels import BundleLabels
from .decode_ahead import Decoded, decode_ahead
from .errors import BackendError, BundleError, ConfigError, EdgeClipError, InputError
from .heads import temperature_head
from .label_sets import Label, LabelSet, Templates
from .labels import BankProgress, LabelBank
from .picture_memory import PictureMemory
from .preprocess import Preprocess
from .runtime.choose import choose_variant, open_tower
from .runtime.host import usable_cores
from .runtime.latency import NO_CLOCK
from .runtime.rows import fixed_batch, run_rows
from .runtime.session import DEFAULT_OPTIONS, RuntimeOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .few_shot import FewShotHead
    from .preprocess import Channels, ImageSource
    from .reject import Gate
    from .runtime.choose import VariantChoice
    from .runtime.latency import Clock
    from .runtime.session import OpenSession, Placement

__all__ = ["Answer", "Answers", "Embedded", "Outcome", "Prediction", "Rejection", "ZeroShotClassifier"]

_PLAIN = Answers()
_NOTHING = Answer(())
_CALL_BATCH = (
    8  # pictures a tower call when a list is classified: more costs memory and gains nothing on a CPU
)


@dataclass(frozen=True)
class Outcome:
    """What became of one picture of a stream: predictions, or the error that stands for them.

    Attributes:
        source: the picture as it was given.
        predictions: best first; empty when there is an error, or when no label fits and that was asked.
        error: why this picture could not be classified.
        timing_ms: stages of this picture, batched ones divided by the batch; ``None`` without a clock.
        batch: pictures that shared the tower call.
        rejection: whether any label fits; ``None`` where that was not asked.
    """

    source: Any
    predictions: tuple[Prediction, ...]
    error: EdgeClipError | None
    timing_ms: Mapping[str, float] | None
    batch: int
    rejection: Rejection | None = None


@dataclass(frozen=True, eq=False)
class Embedded:
    """What became of one picture of an embedding stream: see :class:`Outcome`."""

    source: Any
    embedding: NDArray[np.float32] | None  # (E,)
    error: EdgeClipError | None
    timing_ms: Mapping[str, float] | None
    batch: int


class ZeroShotClassifier:
    """Classify pictures against labels that may change at run time.

    Made by :meth:`open`. Safe to use from many threads at once: calls run side by side, and a change of
    labels waits for nobody. Not usable in a process forked after opening; it says so.

    Attributes:
        bundle: the bundle.
        choice: the variant in use, and why this one.
        answers: what is asked of each picture.
    """

    def __init__(
        self,
        bundle: Bundle,
        choice: VariantChoice,
        session: OpenSession,
        *,
        preprocess: Preprocess,
        options: RuntimeOptions,
        keep_text_tower: bool,
        answers: Answers,
        clock: Clock,
    ) -> None:
        self.bundle = bundle
        self.choice = choice
        self.answers = answers
        self._session = session
        self._preprocess = preprocess
        self._exact = Preprocess(preprocess.spec) if preprocess.fast_decode else preprocess
        wanted = choice.options_for(options, "image")
        self._memory = None if wanted.low_memory else PictureMemory()
        self._clock = clock
        self._active: InForce | None = None
        self._labels = BundleLabels(
            bundle, choice.variant, choice.options_for(options, "text"), keep_text_tower, clock
        )
        self._lock = threading.RLock()  # labels and text tower; never held while a picture is classified
        self._process = os.getpid()
        self._closed = False
        self._fresh = True  # no tower call yet
        (self._input,) = session.inputs
        (self._output,) = session.outputs
        self._one_batch = fixed_batch(session) is not None
        self._size = (*bundle.manifest.preprocess.image_size_px, 3)
        self._on_host = bundle.manifest.preprocess.applied == "host"

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle = "default",
        *,
        variant: str = "auto",
        keep_text_tower: bool = False,
        options: RuntimeOptions = DEFAULT_OPTIONS,
        fast_decode: bool = False,
        answers: Answers = _PLAIN,
        clock: Clock = NO_CLOCK,
    ) -> ZeroShotClassifier:
        """Open a bundle for classification; its default labels are in force until others are set.

        Args:
            bundle: a directory, ``"default"`` for the embedded bundle, ``"hf:organisation/name@revision"``
                for one on the hub (extra ``hub``; downloaded once), or an open bundle.
            variant: name of a variant; ``"auto"`` is that of the tuned profile of this device, else the first
                default one this host can run.
            keep_text_tower: keep the text tower open between changes of labels; costs its memory.
            options: backend, device, threads.
            fast_decode: decode large JPEGs at reduced scale: faster, similarities move in the third digit.
                Embeddings are exact whatever is chosen here.
            answers: what is asked of each picture, beside which label fits best.
            clock: where stages are timed.

        Raises:
            BundleError: the bundle or variant cannot be used.
            BackendError: no engine can run it here.
            InputError: a bundle of the hub cannot be downloaded.
        """
        with clock.span("open"):
            opened = bundle if isinstance(bundle, Bundle) else Bundle.open(_directory(bundle))
            choice = choose_variant(opened, variant=variant, options=options)
        with clock.span("compile"):
            session = open_tower(opened, choice, "image", options)
        if len(session.inputs) != 1 or len(session.outputs) != 1:
            session.close()
            raise BundleError(
                f"{opened.where}: the image tower has inputs {sorted(session.inputs)} and outputs "
                f"{sorted(session.outputs)}, expected one of each."
            )
        return cls(
            opened,
            choice,
            session,
            preprocess=Preprocess(opened.manifest.preprocess, fast_decode=fast_decode),
            options=options,
            keep_text_tower=keep_text_tower,
            answers=answers,
            clock=clock,
        )

    # -- labels ------------------------------------------------------------------------------------------

    def set_labels(
        self,
        labels: LabelSet | LabelBank | Iterable[str | Label] | Mapping[str, Any],
        *,
        templates: Templates | str | Sequence[str] | None = None,
        on_progress: Callable[[BankProgress], None] | None = None,
    ) -> None:
        """Offer these labels from now on; calls that are running finish with the old ones.

        A change costs what is new in it: the labels of the last sets stay in memory, at most 16,384 beside
        those in force. The text tower is opened only for labels whose embeddings are neither there nor in
        the host cache nor in the bundle's default bank, and closed again unless the classifier keeps it.
        New labels are in force before they are written to the host cache.

        Args:
            labels: names, a label set, or a finished bank.
            templates: a built-in name, a template or a list; ``None`` takes those of the bundle's own bank,
                of its Chinese one where every label holds a Chinese character.
            on_progress: called after each batch of texts encoded.

        Raises:
            InputError: a label is empty, overlong or repeated; a bank of another embedding space.
            ConfigError: templates that are unknown or have no place for the label; contexts for a finished
                bank; rejection, and the bundle brings nothing to judge by.
            BundleError: labels that must be encoded, and the bundle has no text tower.
        """
        self._check_usable()
        if isinstance(labels, LabelBank):
            if self.answers.context:
                raise ConfigError(
                    "context: a finished label bank has no texts to put into a context. Pass the labels "
                    "themselves."
                )
            with self._lock:
                self._activate(labels, None)
            return
        checked = LabelSet.of(labels)
        chosen = None if templates is None else Templates.of(templates)
        with self._lock:
            if self.answers.context:
                chosen = chosen or self._labels.templates_for(checked)
                self._activate_in_contexts(checked, chosen, None, on_progress)
            else:
                self._labels.build(checked, chosen, lambda bank: self._activate(bank, None), on_progress)

    def set_bundle_labels(self, language: str | None = None) -> None:
        """Offer the labels the bundle brings: its default ones, or those in a language such as ``"zh"``.

        Raises:
            ConfigError: it brings none, or none in that language; the message lists the languages it has.
        """
        self._check_usable()
        name = self._labels.bank_name(language)
        if name is None:
            raise ConfigError(
                f"{self.bundle.where}: has no default labels; call set_labels() or pass --labels."
            )
        with self._lock:
            bank = self._labels.bank(name)
            if self.answers.context:
                self._activate_in_contexts(bank.labels, bank.templates, name)
            else:
                self._activate(bank, name)

    def set_head(self, head: FewShotHead | str | os.PathLike[str]) -> None:
        """Answer with a head fitted on pictures, in place of labels; see `edgeclip heads fit`.

        Args:
            head: the head, its name in the bundle, or its file.

        Raises:
            InputError: the file cannot be read, or was fitted in another embedding space.
            BundleError: the head in the bundle is damaged.
            ConfigError: contexts are asked for, which a head has no texts for; or rejection, and the head
                was fitted without.
        """
        from .few_shot import FewShotHead, gate_of, read_head

        self._check_usable()
        if isinstance(head, FewShotHead):
            fitted = head
        elif isinstance(head, str) and head in self.bundle.manifest.heads:
            fitted = read_head(self.bundle, head)
        else:
            fitted = FewShotHead.open(head)
        self._check_space("head", fitted.space, fitted.weights.shape[1])
        if self.answers.context:
            raise ConfigError("context: a head fitted on pictures has no texts to put into a context.")
        gate = gate_of(fitted, self.answers.threshold) if self.answers.gated else None
        # The first picture may be waiting for the bundle's labels: they must not come after what was asked.
        with self._lock:
            self._active = of_few_shot(fitted, self.answers, gate)

    @property
    def bank(self) -> LabelBank:
        """The labels in force and their embeddings.

        Raises:
            ConfigError: no labels were set and the bundle brings none; or a head answers in their place.
        """
        bank = self._labels_in_force().bank
        if bank is None:
            raise ConfigError("a head fitted on pictures is in force, which has no label bank; see labels.")
        return bank

    @property
    def labels(self) -> tuple[str, ...]:
        """What may be predicted."""
        return self._labels_in_force().names

    @property
    def in_force(self) -> InForce:
        """What answers are made of now; a change of labels puts another one in its place."""
        return self._labels_in_force()

    @property
    def score_kind(self) -> str:
        """What ``Prediction.score`` is: ``"softmax"`` for the temperature head."""
        return self._labels_in_force().score_kind

    @property
    def placement(self) -> Placement:
        """Where the image tower runs, and why."""
        return self._session.chosen

    @property
    def text_tower_runs(self) -> int:
        """How often the text tower has run for this classifier; 0 when every label was cached."""
        return self._labels.text_tower_runs

    def label_warnings(self) -> list[str]:
        """Return sentences on labels that the model probably does not know, and on labels that were cut."""
        from .words import WordList, label_warnings

        bank = self.bank
        files = self.bundle.manifest.tokenizer
        words = None if files is None or files.words is None else WordList(self.bundle.read(files.words))
        warnings = label_warnings(bank.names, self.bundle.manifest.model.languages, _Knows(words))
        if bank.truncated:
            warnings.append(
                f"{len(bank.truncated)} of {len(bank)} labels are too long for the text tower and were cut, "
                f"first {bank.truncated[0][:40]!r}."
            )
        return warnings

    # -- pictures ----------------------------------------------------------------------------------------

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is an iterable of str, but one path to us
        self, images: ImageSource, *, top_k: int = ..., channels: Channels = ...
    ) -> list[Prediction]: ...
    @overload
    def classify(
        self, images: Iterable[ImageSource], *, top_k: int = ..., channels: Channels = ...
    ) -> list[list[Prediction]]: ...
    def classify(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        top_k: int = 5,
        channels: Channels = "rgb",
    ) -> list[Prediction] | list[list[Prediction]]:
        """Return the best labels of a picture, or of each picture of an iterable.

        Args:
            images: a path, the bytes of a file, a PIL picture or a uint8 array ``(H, W, 3)``; or an iterable
                of them, such as an array ``(B, H, W, 3)``.
            top_k: labels a picture, at least 1; fewer come back where fewer are offered.
            channels: order of the colours in arrays.

        Returns:
            Predictions, best first; for an iterable one such list a picture. It is empty for a picture that
            shows none of the labels, where that is asked (``answers``).

        Raises:
            InputError: a picture cannot be read; that ends the call (:meth:`classify_stream` goes on).
            BackendError: the tower failed, the classifier is closed, or the process was forked.
        """
        active, top_k = self._labels_in_force(), _checked_top_k(top_k)
        if self._is_ready(images, channels) and len(images) <= _CALL_BATCH:
            return [list(each.predictions) for each in self._said(self._embed(images), active, top_k)]
        if _is_one(images):
            pixels = self._pixels(images, channels, self._preprocess)
            return list(self._said(self._embed(pixels[None]), active, top_k)[0].predictions)
        results: list[list[Prediction]] = []
        for batch in self._batches(images, channels, self._preprocess):
            results += [list(each.predictions) for each in self._said(self._embed(batch), active, top_k)]
        return results

    def answer(self, embeddings: NDArray[np.float32], *, top_k: int = 5) -> list[Answer]:
        """Return what the labels in force say of unit embeddings ``(B, E)`` of pictures.

        Raises:
            InputError: another shape or dtype.
            BackendError: the classifier is closed, or the process was forked.
        """
        active, top_k = self._labels_in_force(), _checked_top_k(top_k)
        width = self.bundle.manifest.model.embed_dim
        if embeddings.ndim != 2 or embeddings.shape[1] != width or embeddings.dtype != np.float32:
            raise InputError(
                f"embeddings: got {embeddings.dtype} {embeddings.shape}, expected float32 (B, {width})."
            )
        return self._said(embeddings, active, top_k)

    def embed_images(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        channels: Channels = "rgb",
        exact: bool = True,
    ) -> NDArray[np.float32]:
        """Return unit embeddings, ``(E,)`` for one picture and ``(B, E)`` for an iterable.

        Args:
            images: as :meth:`classify` takes them.
            channels: order of the colours in arrays.
            exact: whatever was said of ``fast_decode``; otherwise as that says.

        Raises:
            InputError: a picture cannot be read.
            BackendError: the tower failed, the classifier is closed, or the process was forked.
        """
        self._check_usable()
        preprocess = self._exact if exact else self._preprocess
        if _is_one(images):
            single: NDArray[np.float32] = self._embed(self._pixels(images, channels, preprocess)[None])[0]
            return single
        rows = [self._embed(batch) for batch in self._batches(images, channels, preprocess)]
        return (
            np.concatenate(rows) if rows else np.empty((0, self.bundle.manifest.model.embed_dim), np.float32)
        )

    def embed_texts(self, texts: str | Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """Return unit embeddings of texts without templates: ``(E,)`` for one, ``(B, E)`` for several.

        Raises:
            InputError: a text is longer than the context and ``truncate`` is off.
            BundleError: the bundle has no text tower.
        """
        self._check_usable()
        one = isinstance(texts, str)
        several = [cast("str", texts)] if one else list(texts)
        with self._lock:
            embeddings, cut = self._labels.encode(several)
        if cut.any() and not truncate:
            row = int(np.argmax(cut))
            raise InputError(
                f"text {row} ({several[row][:40]!r}) is longer than the text tower reads. Shorten it or pass "
                "`truncate=True`."
            )
        return embeddings[0] if one else embeddings

    def classify_stream(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int = 5,
        channels: Channels = "rgb",
        batch_size: int | None = None,
        workers: int | None = None,
        ready: Callable[[], bool] | None = None,
    ) -> Iterator[Outcome]:
        """Yield an outcome for each picture, in order, decoding ahead while the tower runs.

        A picture that cannot be read becomes an outcome with an error; the others go on. The labels in force
        when the stream starts stay for its length.

        Args:
            images: pictures; drawn by the thread that consumes the stream, up to
                ``batch_size + 2 · workers`` ahead.
            top_k: labels a picture.
            channels: order of the colours in arrays.
            batch_size: pictures a tower call; the last one may be smaller. ``None`` is what the tuned profile
                says, else one.
            workers: decoding threads; ``None`` is what the tuned profile says, else one for each usable core.
                Decoders and tower then share the cores, and whichever is the bottleneck gets what the other
                leaves.
            ready: whether the next picture is there already. Where it is not, results at hand come first, in
                smaller batches if need be: for pipes and cameras, whose next picture may be long in coming.
        """
        active, top_k = self._labels_in_force(), _checked_top_k(top_k)
        timed = self._clock is not NO_CLOCK
        for group in self._stream(images, channels, batch_size, workers, ready, self._preprocess):
            began = perf_counter_ns()
            good = [item for item in group if item.embedding is not None]
            said: Iterator[Answer] = iter(())
            if good:
                said = iter(
                    self._said(np.stack([cast("Any", item.embedding) for item in good]), active, top_k)
                )
            head_ms = (perf_counter_ns() - began) / 1e6 / max(len(good), 1)
            for item in group:
                timing_ms = (
                    {**(item.timing_ms or {}), "head": head_ms} if timed and item.error is None else None
                )
                answer = next(said) if item.error is None else _NOTHING
                yield Outcome(
                    item.source, answer.predictions, item.error, timing_ms, item.batch, answer.rejection
                )

    def embed_stream(
        self,
        images: Iterable[ImageSource],
        *,
        channels: Channels = "rgb",
        batch_size: int | None = None,
        workers: int | None = None,
        ready: Callable[[], bool] | None = None,
    ) -> Iterator[Embedded]:
        """Yield the embedding of each picture, in order, as :meth:`classify_stream` does; always exact."""
        self._check_usable()
        for group in self._stream(images, channels, batch_size, workers, ready, self._exact):
            yield from group

    def close(self) -> None:
        """Close the towers. Calling it again does nothing; calls that are running finish."""
        self._closed = True
        self._session.close()
        self._labels.close()
        if self._memory is not None:
            self._memory.release()

    def __enter__(self) -> ZeroShotClassifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside: pictures --------------------------------------------------------------------------------

    def _pixels(self, source: Any, channels: Channels, preprocess: Preprocess) -> NDArray[np.uint8]:
        """Return the tower's input for one picture, ``(H, W, 3)`` uint8."""
        # An array of the tower's own size is resized onto itself: it goes through as it is.
        if (
            channels == "rgb"
            and isinstance(source, np.ndarray)
            and source.shape == self._size
            and source.dtype == np.uint8
        ):
            return source
        self._keep_memory()
        clock = self._clock
        with clock.span("decode"):
            image = preprocess.decode(source, channels=channels)
        with clock.span("resize"):
            return preprocess.resize(image)

    def _keep_memory(self) -> None:
        if self._memory is not None:
            self._memory.hold()

    def _is_ready(self, images: Any, channels: Channels) -> TypeGuard[NDArray[np.uint8]]:
        """Return whether this is a batch of pictures of the tower's own size, which no resizing changes."""
        return (
            type(images) is np.ndarray
            and images.shape[1:] == self._size
            and images.dtype == np.uint8
            and channels == "rgb"
            and len(images) > 0
        )

    def _batches(
        self, images: Any, channels: Channels, preprocess: Preprocess
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield tower inputs ``(b, H, W, 3)`` of at most ``_CALL_BATCH`` pictures."""
        if self._is_ready(images, channels):
            for start in range(0, len(images), _CALL_BATCH):
                yield images[start : start + _CALL_BATCH]
            return
        if not isinstance(images, Iterable):
            # one picture of a kind nobody knows: the decoder's message names what is possible
            yield self._pixels(images, channels, preprocess)[None]
            return
        source = iter(images)
        while group := list(islice(source, _CALL_BATCH)):
            yield np.stack([self._pixels(each, channels, preprocess) for each in group])

    def _embed(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return ``(B, E)`` float32 unit embeddings of tower inputs ``(B, H, W, 3)``."""
        feed: NDArray[Any] = self._preprocess.normalize(batch) if self._on_host else batch
        clock = self._clock
        if clock is NO_CLOCK:  # not even a context that does nothing
            return self._run(feed)
        first = clock.span("first_run", batch=len(batch)) if self._fresh else nullcontext()
        self._fresh = False
        with first, clock.span("image_tower", batch=len(batch)):
            return self._run(feed)

    def _run(self, feed: NDArray[Any]) -> NDArray[np.float32]:
        if self._one_batch:
            return run_rows(self._session, feed)
        embeddings: NDArray[np.float32] = self._session.run({self._input: feed})[self._output]
        return embeddings

    def _said(self, embeddings: NDArray[np.float32], active: InForce, top_k: int) -> list[Answer]:
        if self._clock is NO_CLOCK:
            return self._numbers(active.answer(embeddings, top_k))
        with self._clock.span("head", batch=len(embeddings)):
            return self._numbers(active.answer(embeddings, top_k))

    def _numbers(self, answers: list[Answer]) -> list[Answer]:
        """Return the answers, which a tower that gives no numbers has none of."""
        for each in answers:
            if each.is_nan:
                raise BackendError(
                    f"{self.bundle.where}: the image tower gave no numbers; run `edgeclip verify`."
                )
        return answers

    def _stream(
        self,
        images: Iterable[ImageSource],
        channels: Channels,
        batch_size: int | None,
        workers: int | None,
        ready: Callable[[], bool] | None,
        preprocess: Preprocess,
    ) -> Iterator[list[Embedded]]:
        """Yield groups of at most ``batch_size`` pictures, embedded, in order."""
        self._keep_memory()
        tuned = self.choice.settings
        if batch_size is None:
            batch_size = (tuned and tuned.batch_size) or 1
        if workers is None:
            workers = (tuned and tuned.workers) or usable_cores()
        groups = decode_ahead(
            images,
            preprocess,
            channels=channels,
            batch_size=batch_size,
            workers=workers,
            ready=ready,
            clock=self._clock,
        )
        with closing(groups):
            for group in groups:
                yield self._embed_group(group)

    def _embed_group(self, group: list[Decoded]) -> list[Embedded]:
        good = [decoded.pixels for decoded in group if decoded.pixels is not None]
        began = perf_counter_ns()
        rows = iter(self._embed(np.stack(good)) if good else ())
        tower_ms = (perf_counter_ns() - began) / 1e6 / max(len(good), 1)
        return [
            Embedded(decoded.source, None, decoded.error, None, len(good))
            if decoded.pixels is None
            else Embedded(
                decoded.source, next(rows), None, {**decoded.timing_ms, "image_tower": tower_ms}, len(good)
            )
            for decoded in group
        ]

    # -- inside: labels ----------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise BackendError(
                f"this classifier was opened in process {self._process} and does not work in its fork "
                f"{os.getpid()}. Open a classifier in each process."
            )
        if self._closed:
            raise BackendError("this classifier is closed. Open it again with ZeroShotClassifier.open().")

    def _labels_in_force(self) -> InForce:
        active = self._active
        if active is not None and not self._closed and os.getpid() == self._process:
            return active
        self._check_usable()
        with self._lock:
            if self._active is None:
                self.set_bundle_labels()
            return cast("InForce", self._active)

    def _activate(self, bank: LabelBank, name: str | None, contexts: Sequence[LabelBank] = ()) -> None:
        self._check_space("label bank", bank.space, bank.embeddings.shape[1])
        head = temperature_head(self.bundle, name)
        gate = self._gate(bank, name, head.scale) if self.answers.gated else None
        self._active = of_bank(bank, head, self.answers, gate, contexts)

    def _activate_in_contexts(
        self,
        labels: LabelSet,
        templates: Templates,
        name: str | None,
        on_progress: Callable[[BankProgress], None] | None = None,
    ) -> None:
        """Offer labels as they are and in each context."""
        forms = (templates, *(in_context(templates, phrase) for phrase in self.answers.context))
        banks: list[LabelBank] = []
        with self._labels.text_tower_held():
            for each in forms:
                self._labels.build(labels, each, banks.append, on_progress)
        self._activate(banks[0], name, banks[1:])

    def _gate(self, bank: LabelBank, name: str | None, scale: float) -> Gate:
        from .multi import multi_gate
        from .reject import open_gate

        if self.answers.multi:
            fitted = multi_gate(self.bundle, name, self.answers.threshold)
            if fitted is not None:
                return fitted
        background = self.bundle.manifest.background_bank
        return open_gate(
            self.bundle,
            bank,
            scale=scale,
            threshold=self.answers.threshold,
            background=None if background is None else self._labels.bank(background),
            encode=lambda texts: self._labels.encode(texts)[0],
        )

    def _check_space(self, what: str, space: str, width: int) -> None:
        model = self.bundle.manifest.model
        if space not in ("", model.embedding_space):
            raise InputError(
                f"{what} of embedding space {space[:12]!r}, but {self.bundle.where} is of "
                f"{model.embedding_space[:12]!r}. Build it with this bundle."
            )
        if width != model.embed_dim:
            raise InputError(
                f"{what} of {width} dimensions, but {self.bundle.where} has {model.embed_dim}. Build it with "
                "this bundle."
            )


class _Knows:
    """A word list for :func:`edgeclip.words.label_warnings`, without the tokenizer around it."""

    def __init__(self, words: Any) -> None:
        self.words = words


def _is_one(images: Any) -> bool:
    """Return whether this is one picture rather than an iterable of them."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview)):
        return True
    # Whoever holds a PIL picture has imported PIL; nobody else should pay for it.
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(images, pil.Image)


def _checked_top_k(top_k: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k: got {top_k!r}, expected a whole number of at least 1.")
    return top_k


def _directory(bundle: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return a bundle's directory; one on the hub is downloaded."""
    if isinstance(bundle, str) and bundle.startswith("hf:"):
        from edgeclip.hub import fetch_bundle

        return fetch_bundle(bundle)
    return bundle
