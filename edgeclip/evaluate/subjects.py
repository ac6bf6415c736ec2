"""Whatever is evaluated: something that embeds pictures and texts into one space.

Here is the image tower of a bundle's variant, with the text tower that goes with it. An eager model is in
``edgeclip.distill.eager``, so that nothing here needs its framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgeclip.answers import Answers, InForce, in_context, of_bank
from edgeclip.bundle import Bundle, PreprocessSpec
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import BackendError, BundleError, ConfigError
from edgeclip.few_shot import FewShotHead
from edgeclip.heads import TemperatureHead
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import BankProgress, LabelBank
from edgeclip.runtime.session import DEFAULT_OPTIONS, RuntimeOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Asked", "BundleSubject", "Subject", "force_of_labels", "open_bundle"]

OnProgress = Callable[[BankProgress], None]
Asked = LabelSet | LabelBank | FewShotHead | str | None
"""What is offered: labels, encoded or not; a head fitted on pictures, its file or its name; ``None`` is what
a bundle offers by itself."""
_PLAIN = Answers()


class Subject(Protocol):
    """What is evaluated."""

    @property
    def name(self) -> str:
        """How the table calls it."""
        ...

    @property
    def preprocess(self) -> PreprocessSpec:
        """How pictures are prepared for it."""
        ...

    @property
    def scale(self) -> float:
        """Its own multiplier of cosines."""
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """What it is, as JSON values."""
        ...

    @property
    def answers(self) -> Answers:
        """What is asked of each picture, beside which label fits best."""
        ...

    def images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit embeddings ``(B, E)`` of prepared pictures ``(B, H, W, 3)`` uint8 RGB."""
        ...

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit embeddings ``(T, E)`` of texts, cut where they are too long."""
        ...

    def bank(
        self, labels: LabelSet, templates: Templates | None, on_progress: OnProgress | None = None
    ) -> LabelBank:
        """Return the bank of labels; ``None`` takes the templates it would use by itself."""
        ...

    def in_force(
        self, asked: Asked, templates: Templates | None, on_progress: OnProgress | None = None
    ) -> InForce:
        """Return what makes answers of embeddings where this is offered; templates are of labels."""
        ...

    def close(self) -> None:
        """Give back its memory."""
        ...


class BundleSubject:
    """One variant of a bundle, as :class:`~edgeclip.classify.ZeroShotClassifier` runs it; always exact.

    Args:
        name: as the table calls it.
        classifier: an open one; closed with this.
    """

    def __init__(self, name: str, classifier: ZeroShotClassifier) -> None:
        manifest, variant = classifier.bundle.manifest, classifier.choice.variant
        self.name = name
        self.preprocess = manifest.preprocess
        self.scale = float(manifest.model.scale)
        self.answers = classifier.answers
        placement = classifier.placement
        self.about: dict[str, Any] = {
            "kind": "bundle",
            "model": manifest.model.name,
            "embedding_space": manifest.model.embedding_space,
            "variant": variant.name,
            "format": variant.entry.format,
            "precision": variant.entry.precision,
            "backend": placement.backend,
            "device": placement.device,
            "threads": placement.threads,
            "embed_dim": manifest.model.embed_dim,
            "scale": self.scale,
            "licence": manifest.model.licence,
        }
        self._classifier = classifier

    def images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit embeddings, see :class:`Subject`."""
        return self._classifier.embed_images(pictures)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit embeddings, see :class:`Subject`.

        Raises:
            BundleError: the bundle has no text tower.
        """
        return self._classifier.embed_texts(list(texts), truncate=True)

    def bank(
        self, labels: LabelSet, templates: Templates | None, on_progress: OnProgress | None = None
    ) -> LabelBank:
        """Return the bank of labels, see :class:`Subject`; kept in the host cache.

        Raises:
            BundleError: labels must be encoded, and the bundle has no text tower.
        """
        self._classifier.set_labels(labels, templates=templates, on_progress=on_progress)
        return self._classifier.bank

    def in_force(
        self, asked: Asked, templates: Templates | None, on_progress: OnProgress | None = None
    ) -> InForce:
        """Return what the classifier itself answers with, see :class:`Subject`.

        Raises:
            BundleError: labels must be encoded, and the bundle has no text tower.
            ConfigError: what is asked needs something that the bundle or the head lacks.
            InputError: the head cannot be read, or is of another embedding space.
        """
        if asked is None:
            self._classifier.set_bundle_labels()
        elif isinstance(asked, LabelBank):
            self._classifier.set_labels(asked)
        elif isinstance(asked, LabelSet):
            self._classifier.set_labels(asked, templates=templates, on_progress=on_progress)
        else:
            self._classifier.set_head(asked)
        return self._classifier.in_force

    def close(self) -> None:
        """Close the towers."""
        self._classifier.close()


def force_of_labels(
    subject: Subject, asked: Asked, templates: Templates | None, on_progress: OnProgress | None = None
) -> InForce:
    """Return what a subject without a bundle answers with: labels, in contexts or not.

    Raises:
        ConfigError: something is asked that only bundles have.
    """
    answers = subject.answers
    if answers.gated or not isinstance(asked, LabelSet):
        raise ConfigError(
            f"{subject.name!r} is no bundle: it has nothing to reject by, no labels of its own, and no "
            "embedding space that heads and banks belong to. Export it first, or give labels and "
            "ask which is best."
        )
    bank = subject.bank(asked, templates, on_progress)
    contexts = [
        subject.bank(asked, in_context(bank.templates, phrase), on_progress) for phrase in answers.context
    ]
    return of_bank(bank, TemperatureHead(subject.scale), answers, None, contexts)


def open_bundle(
    path: str,
    *,
    variants: Sequence[str] = (),
    options: RuntimeOptions = DEFAULT_OPTIONS,
    answers: Answers = _PLAIN,
) -> tuple[list[BundleSubject], list[tuple[str, str]]]:
    """Return the variants of a bundle that have an image tower, opened, and those that cannot run here.

    Args:
        path: as :meth:`edgeclip.bundle.Bundle.open` takes it.
        variants: names; none takes all, and leaves out with the reason what this host cannot run.
        options: backend, device, threads.
        answers: what is asked of each picture, beside which label fits best.

    Raises:
        BundleError: the bundle is damaged, has no variant of a name, or none with an image tower.
        BackendError: a variant that was named cannot run here, or none can.
    """
    bundle = Bundle.open(path)
    names = list(variants) or [
        name for name, entry in bundle.manifest.variants.items() if "image" in entry.towers
    ]
    if not names:
        raise BundleError(f"{bundle.where}: none of its variants has an image tower.")
    opened: list[BundleSubject] = []
    skipped: list[tuple[str, str]] = []
    try:
        for name in names:
            try:
                classifier = ZeroShotClassifier.open(
                    bundle, variant=name, keep_text_tower=True, options=options, answers=answers
                )
            except BackendError as error:
                if variants:
                    raise
                skipped.append((f"{path}/{name}", " ".join(str(error).split())))
                continue
            opened.append(BundleSubject(f"{path}/{name}", classifier))
        if not opened:
            raise BackendError(f"{bundle.where}: none of its variants can run here: {skipped[0][1]}")
    except BaseException:
        for subject in opened:
            subject.close()
        raise
    return opened, skipped
