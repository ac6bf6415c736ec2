"""edgeclip: a bundle, opened as its documentation says, its own labels in force."""

from __future__ import annotations

from edgeclip.classify import ZeroShotClassifier
from edgeclip.runtime.session import RuntimeOptions


class Peer:
    """A classifier; labels of the bundle unless others are added."""

    def __init__(
        self,
        *,
        threads: int,
        bundle: str,
        variant: str,
        fast_decode: bool = False,
        low_memory: bool = False,
        spinning: bool = False,
        keep_text_tower: bool = False,
    ) -> None:
        self.classifier = ZeroShotClassifier.open(
            bundle,
            variant=variant,
            fast_decode=fast_decode,
            keep_text_tower=keep_text_tower,
            options=RuntimeOptions(threads=threads, low_memory=low_memory, spinning=spinning),
        )
        self.names = None

    def classify(self, path: str) -> int | str:
        """Return the best label: its name, until somebody has asked for numbers."""
        label = self.classifier.classify(path, top_k=1)[0].label
        return label if self.names is None else self.names[label]

    def similarities(self, path: str) -> list[float]:
        names = self.classifier.bank.names
        self.names = {name: row for row, name in enumerate(names)}
        found = {each.label: each.similarity for each in self.classifier.classify(path, top_k=len(names))}
        return [found[name] for name in names]

    def texts(self, labels: list[str]) -> list[float]:
        """Offer labels that were never seen before, and no others, with one template."""
        self.classifier.set_labels(labels, templates="one")
        return self.classifier.bank.embeddings[0].tolist()

    def add_label(self, label: str) -> None:
        """Offer a label that was never seen before, next to a hundred of the bundle's, with one template."""
        if not hasattr(self, "base"):
            self.base = list(self.classifier.bank.names)[:100]
            # Caches the others; opens the tower, where it is kept.
            self.classifier.set_labels([*self.base, f"before {label}"], templates="one")
        runs = self.classifier.text_tower_runs
        self.classifier.set_labels([*self.base, label], templates="one")
        assert self.classifier.text_tower_runs == runs + 1, "the label was cached, or came in several calls"

    def tower(self, kind: str) -> None:
        """Run the image tower on a picture that is ready, through the session alone."""
        del kind
        if not hasattr(self, "ready"):
            import numpy as np

            session = self.classifier._session
            height, width = self.classifier.bundle.manifest.preprocess.image_size_px
            drawn = np.random.default_rng(0).integers(0, 256, (1, height, width, 3)).astype(np.uint8)
            self.ready = {next(iter(session.inputs)): drawn}
        self.classifier._session.run(self.ready)
