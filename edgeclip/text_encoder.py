"""Texts to unit embeddings: tokenizer and text tower of one bundle, opened when the first text comes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from .bundle import Bundle, Variant
from .errors import BundleError
from .runtime.choose import open_tower, unmet
from .runtime.host import Host
from .runtime.latency import NO_CLOCK
from .runtime.rows import run_texts
from .runtime.session import DEFAULT_OPTIONS, RuntimeOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .runtime.latency import Clock
    from .runtime.session import OpenSession
    from .tokenizer import Tokenizer

__all__ = ["TEXTS_A_CALL", "TextEncoder", "even_parts", "open_tokenizer", "text_variant"]

TEXTS_A_CALL: Final = 32
"""Most texts a call of the text tower: more at once is no faster on a CPU and costs memory, fewer cost light
towers time. Parts are even, so that no call is a small rest. Measured: docs/experiments.md, 2026-11-23."""


class TextEncoder:
    """Encode texts with one bundle's text tower. Safe from many threads: they take turns.

    Nothing is read before the first text, so that an encoder whose labels are all cached costs nothing.

    Args:
        bundle: the bundle.
        variant: whose text tower; as :func:`text_variant` chooses it.
        options: how the tower is run.

    Attributes:
        runs: how often the text tower has run.
    """

    def __init__(
        self, bundle: Bundle, variant: Variant, *, options: RuntimeOptions = DEFAULT_OPTIONS
    ) -> None:
        self.variant = variant
        self.space = bundle.manifest.model.embedding_space
        self.embed_dim = bundle.manifest.model.embed_dim
        self.runs = 0
        self._bundle = bundle
        self._options = options
        self._lock = threading.RLock()
        self._tokenizer: Tokenizer | None = None
        self._session: OpenSession | None = None

    @property
    def digest(self) -> str:
        """Digest of text tower and tokenizer: equal digests give equal embeddings of equal texts."""
        files = self._bundle.manifest.tokenizer
        if files is None:
            raise BundleError(f"{self._bundle.where}: holds a text tower but no tokenizer; export it again.")
        # Hashes of the files, not of the opened tokenizer: a warm start must not parse its merges.
        hashes = [self._bundle.manifest.files[name].sha256 for name in (files.config, files.merges)]
        return hashlib.sha256("\n".join([self.variant.tower_digest("text"), *hashes]).encode()).hexdigest()

    @property
    def is_open(self) -> bool:
        """Whether the text tower is loaded."""
        return self._session is not None

    def encode(
        self, texts: Sequence[str], *, clock: Clock | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return ``(B, E)`` float32 unit embeddings, and whether each text was cut at the context length.

        Raises:
            BundleError: the bundle has no tokenizer, or a damaged one.
            BackendError: the text tower does not load or run.
        """
        clock = NO_CLOCK if clock is None else clock
        with self._lock:
            session, tokenizer = self._open()
            embeddings = np.empty((len(texts), self.embed_dim), np.float32)
            truncated = np.zeros(len(texts), np.bool_)
            done = 0
            for size in even_parts(len(texts), TEXTS_A_CALL):
                start, done = done, done + size
                batch = texts[start:done]
                with clock.span("tokenize", batch=len(batch)):
                    tokens = tokenizer(batch, truncate=True)
                    # Only a row without padding can have been cut.
                    for row in np.flatnonzero(tokens[:, -1] != tokenizer.config.special.pad).tolist():
                        truncated[start + row] = tokenizer.count(batch[row]) > tokenizer.context_length
                with clock.span("text_tower", batch=len(batch)):
                    lengths = tokenizer.config.lengths(tokens)
                    out = run_texts(session, tokens, lengths, batch=TEXTS_A_CALL)
                self.runs += 1
                if out.shape != (len(batch), self.embed_dim):
                    raise BundleError(
                        f"{self._bundle.where}: the text tower gave {out.shape}, expected "
                        f"({len(batch)}, {self.embed_dim}); export it again."
                    )
                embeddings[start:done] = out
        return embeddings, truncated

    def close(self) -> None:
        """Close tokenizer and text tower; the next text opens them again."""
        with self._lock:
            session, self._session, self._tokenizer = self._session, None, None
            if session is not None:
                session.close()

    def _open(self) -> tuple[OpenSession, Tokenizer]:
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self._bundle)
        if self._session is None:
            self._session = open_tower(self._bundle, self.variant, "text", self._options)
        return self._session, self._tokenizer


def even_parts(count: int, most: int) -> list[int]:
    """Return the sizes of the fewest parts of at most ``most`` each, as equal as can be: 100, 64 → 50, 50."""
    parts = -(-count // most)
    return [(count + part) // parts for part in range(parts)]


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """Return the tokenizer of a bundle.

    Raises:
        BundleError: it has none, or a damaged one.
    """
    from .tokenizer import Tokenizer

    files = bundle.manifest.tokenizer
    if files is None:
        raise BundleError(f"{bundle.where}: has no tokenizer, so it cannot encode texts.")
    words = None if files.words is None else bundle.read(files.words)
    return Tokenizer.from_bytes(bundle.read(files.config), bundle.read(files.merges), words)


def text_variant(bundle: Bundle, image: Variant, options: RuntimeOptions = DEFAULT_OPTIONS) -> Variant | None:
    """Return the variant whose text tower goes with an image tower; ``None`` in bundles without text towers.

    That is its own, else the first default variant that has one and runs here; the first that has one where
    none does, so that opening it says why.
    """
    if "text" in image.entry.towers:
        return image
    names = dict.fromkeys((*bundle.manifest.default_variants, *sorted(bundle.manifest.variants)))
    having = [each for each in map(bundle.variant, names) if "text" in each.entry.towers]
    host = Host.here()
    runs = (each for each in having if unmet(each, options=options, host=host) is None)
    return next(runs, having[0] if having else None)
