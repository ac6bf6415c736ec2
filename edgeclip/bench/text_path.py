"""The way from labels to their embeddings: with nothing cached, and with everything cached.

*Uncached* is tokenizing and encoding with the text tower held open; *cached* is what a second start does. The
cache is one of its own, in a folder that goes away.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from edgeclip.bench.report import stage_entry
from edgeclip.cache import HostCache
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.label_store import LabelStore
from edgeclip.labels import LabelBank, build_bank
from edgeclip.runtime.host import Host
from edgeclip.runtime.latency import LatencySamples, StageClock
from edgeclip.text_encoder import TextEncoder, text_variant

if TYPE_CHECKING:
    from edgeclip.bench.targets import Target
    from edgeclip.bundle import Bundle, Variant
    from edgeclip.runtime.latency_report import StageEntry

__all__ = ["MAX_LABELS", "TextPath"]

MAX_LABELS: Final = 16
"""Labels that are encoded at once: enough to fill a batch, few enough for slow devices."""


class TextPath:
    """Time labels of one target again and again. Made by :meth:`of`; :meth:`close` releases the tower."""

    def __init__(self, bundle: Bundle, encoder: TextEncoder, labels: LabelSet, templates: Templates) -> None:
        self._encoder = encoder
        self._labels = labels
        self._templates = templates
        self._clock = StageClock()
        self._folder = tempfile.TemporaryDirectory(prefix="edgeclip-text-")
        cache = HostCache.open(
            bundle.digest, Host.here().fingerprint(), root=Path(self._folder.name) / "cache"
        )
        self._store = LabelStore(cache, encoder.digest)
        self._taken_ms: dict[Literal["uncached", "cached"], list[float]] = {"uncached": [], "cached": []}
        self.spent_ns = 0

    @classmethod
    def of(cls, bundle: Bundle, image: Variant, target: Target, bank: LabelBank) -> TextPath | str:
        """Return what times the first labels of a bank, or the reason why there is nothing to time."""
        variant = text_variant(bundle, image, target.options())
        if variant is None:
            return "the bundle has no text tower"
        if bundle.manifest.tokenizer is None:
            return "the bundle has no tokenizer"
        encoder = TextEncoder(bundle, variant, options=target.options())
        return cls(bundle, encoder, LabelSet(bank.labels.labels[:MAX_LABELS]), bank.templates)

    @property
    def n(self) -> int:
        """How often it was timed."""
        return len(self._taken_ms["uncached"])

    def measure(self, *, timed: bool = True) -> None:
        """Encode all labels, then find them in the cache.

        Raises:
            EdgeClipError: the text tower cannot be opened or run.
        """
        clock = self._clock if timed else None
        began_ns = perf_counter_ns()
        build_bank(self._labels, self._templates, self._encoder, clock=clock)
        encoded_ns = perf_counter_ns()
        if not timed:
            build_bank(self._labels, self._templates, self._encoder, store=self._store)
            return
        found_ns = perf_counter_ns()
        build_bank(self._labels, self._templates, self._encoder, store=self._store)
        ended_ns = perf_counter_ns()
        self._taken_ms["uncached"].append((encoded_ns - began_ns) / 1e6)
        self._taken_ms["cached"].append((ended_ns - found_ns) / 1e6)
        self.spent_ns += ended_ns - began_ns

    def entries(self) -> tuple[dict[Literal["uncached", "cached"], StageEntry], dict[str, StageEntry]]:
        """Return both ways, and the stages tokenize and text_tower, for a report."""
        batch = len(self._labels)
        ways = {
            way: stage_entry(LatencySamples(np.array(taken), warmup=1, batch=batch))
            for way, taken in self._taken_ms.items()
            if taken
        }
        return ways, {name: stage_entry(samples) for name, samples in self._clock.samples().items()}

    def close(self) -> None:
        """Close the text tower and remove the cache."""
        self._encoder.close()
        self._folder.cleanup()
