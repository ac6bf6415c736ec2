"""The labels one bundle can offer: the banks it brings, and banks made with its text tower."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from .bundle import Bundle, Variant
from .cache import HostCache
from .errors import BundleError, ConfigError, InputError
from .label_sets import LabelSet, Templates
from .label_store import LabelStore
from .labels import BankProgress, LabelBank, build_bank
from .runtime.host import Host
from .text_encoder import TextEncoder, text_variant
from .words import scripts_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .runtime.latency import Clock
    from .runtime.session import RuntimeOptions

__all__ = ["BundleLabels"]

DEFAULT_TEMPLATES = "one"

_RECENT_BANKS: Final = 4  # of the same templates
_RECENT_ROWS: Final = 16_384  # 32 MiB at E = 512


class BundleLabels:
    """Make and read label banks for one open bundle. Safe from many threads: they take turns.

    The last banks made stay in memory, so that a set which differs by a few labels costs these labels alone:
    the newest whatever its size (it is in force anyway), and up to three older ones of the same templates
    while all of them together have at most 16,384 rows.

    Args:
        bundle: the bundle.
        image: variant of the image tower, whose own text tower is preferred.
        options: how the text tower is run.
        keep_text_tower: leave it open after use.
        clock: where tokenizing and the text tower are timed.
    """

    def __init__(
        self, bundle: Bundle, image: Variant, options: RuntimeOptions, keep_text_tower: bool, clock: Clock
    ) -> None:
        self._bundle = bundle
        self._keep_text_tower = keep_text_tower
        self._clock = clock
        self._lock = threading.RLock()
        self._banks: dict[str, LabelBank] = {}
        self._recent: list[LabelBank] = []  # newest first
        self._store: LabelStore | None = None
        variant = text_variant(bundle, image, options)
        self._encoder = None if variant is None else TextEncoder(bundle, variant, options=options)

    @property
    def text_tower_runs(self) -> int:
        """How often the text tower has run."""
        return 0 if self._encoder is None else self._encoder.runs

    @property
    def text_tower_is_open(self) -> bool:
        """Whether the text tower is loaded."""
        return self._encoder is not None and self._encoder.is_open

    def bank_name(self, language: str | None = None) -> str | None:
        """Return the name of the bundle's default bank, or of its first one in a language.

        Raises:
            ConfigError: no bank is in that language.
        """
        manifest = self._bundle.manifest
        if language is None:
            return manifest.default_bank
        for name in sorted(manifest.label_banks, key=lambda each: (each != manifest.default_bank, each)):
            if manifest.label_banks[name].language == language:
                return name
        languages = sorted({entry.language for entry in manifest.label_banks.values() if entry.language})
        raise ConfigError(
            f"{self._bundle.where}: brings no labels in language {language!r}; it has "
            f"{', '.join(languages) or 'none'}. Pass your own with --labels."
        )

    def bank(self, name: str) -> LabelBank:
        """Return a bank of the bundle, read at the first call.

        Raises:
            BundleError: its file is damaged.
        """
        with self._lock:
            if name not in self._banks:
                entry = self._bundle.manifest.label_banks[name]
                try:
                    bank = LabelBank.from_bytes(
                        self._bundle.read(entry.file), source=f"{self._bundle.where}: label bank {name!r}"
                    )
                except InputError as error:
                    raise BundleError(str(error)) from error
                if self._encoder is not None and not bank.tower and entry.variant is not None:
                    made_with = self._bundle.variant(entry.variant)
                    same = made_with.tower_digest("text") == self._encoder.variant.tower_digest("text")
                    bank = replace(bank, tower=self._encoder.digest) if same else bank
                self._banks[name] = bank
            return self._banks[name]

    def build(
        self,
        labels: LabelSet,
        templates: Templates | None,
        use: Callable[[LabelBank], None],
        on_progress: Callable[[BankProgress], None] | None = None,
    ) -> None:
        """Make the bank of a label set, of recent banks, the host cache and the bundle's as far as they go.

        Args:
            labels: the labels.
            templates: ``None`` takes those of the bundle's own bank of the labels' language.
            use: takes the bank, before what was encoded is written to the host cache.
            on_progress: called after each batch of texts encoded.

        Raises:
            BundleError: labels must be encoded, and the bundle has no text tower.
        """
        name = self._bank_like(labels)
        templates = templates or self._templates_of(name)
        if self._encoder is None:
            use(self._without_text_tower(labels, templates, name))
            return
        with self._lock:
            if self._store is None:
                cache = HostCache.open(self._bundle.digest, Host.here().fingerprint())
                self._store = LabelStore(cache, self._encoder.digest)
            try:
                bank = build_bank(
                    labels,
                    templates,
                    self._encoder,
                    recent=self._recent,
                    store=self._store,
                    known=None if name is None else lambda: self.bank(name),
                    use=use,
                    on_progress=on_progress,
                    clock=self._clock,
                )
            finally:
                self._leave_text_tower()
            self._remember(bank)

    @contextmanager
    def text_tower_held(self) -> Iterator[None]:
        """Let what is encoded within this block share one opening of the text tower."""
        with self._lock:
            before, self._keep_text_tower = self._keep_text_tower, True
            try:
                yield
            finally:
                self._keep_text_tower = before
                self._leave_text_tower()

    def templates_for(self, labels: LabelSet) -> Templates:
        """Return the templates of the bundle's own bank of the labels' language."""
        return self._templates_of(self._bank_like(labels))

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return embeddings of texts as they stand, and which of them were cut.

        Raises:
            BundleError: the bundle has no text tower.
        """
        if self._encoder is None:
            raise BundleError(f"{self._bundle.where}: has no text tower, so it cannot encode texts.")
        with self._lock:
            try:
                return self._encoder.encode(texts, clock=self._clock)
            finally:
                self._leave_text_tower()

    def close(self) -> None:
        """Close the text tower."""
        if self._encoder is not None:
            self._encoder.close()

    def _remember(self, bank: LabelBank) -> None:
        recent, alike = list[LabelBank](), Counter[str]()
        for each in (bank, *self._recent):
            alike[each.templates.digest] += 1
            if alike[each.templates.digest] <= _RECENT_BANKS:
                recent.append(each)
        while len(recent) > 1 and sum(map(len, recent)) > _RECENT_ROWS:
            recent.pop()
        self._recent = recent

    def _leave_text_tower(self) -> None:
        if not self._keep_text_tower:
            self.close()

    def _bank_like(self, labels: LabelSet) -> str | None:
        """Return the bank whose language fits: a Chinese one where every label holds a Han character."""
        manifest = self._bundle.manifest
        if all("han" in scripts_of(name) for name in labels.names):
            for name in sorted(manifest.label_banks):
                if (manifest.label_banks[name].language or "").startswith("zh"):
                    return name
        return manifest.default_bank

    def _templates_of(self, name: str | None) -> Templates:
        if name is None:
            return Templates.of(DEFAULT_TEMPLATES)
        said = self._bundle.manifest.label_banks[name].templates
        # Only the bank's file spells out templates that are no built-in set.
        return self.bank(name).templates if said == "custom" else Templates.of(said)

    def _without_text_tower(self, labels: LabelSet, templates: Templates, name: str | None) -> LabelBank:
        """Return rows of the bundle's bank; a slimmed bundle can offer nothing else."""
        bank = None if name is None else self.bank(name)
        rows = {} if bank is None else {label.name: row for row, label in enumerate(bank.labels.labels)}
        missing = [label.name for label in labels.labels if label.name not in rows]
        if bank is None or missing or templates.digest != bank.templates.digest:
            what = (
                f"label {missing[0]!r} is not in its bank"
                if missing
                else "these templates are not its bank's"
            )
            raise BundleError(
                f"{self._bundle.where}: has no text tower, and {what}. Use a bundle with a text tower, or "
                "build the bank there with `edgeclip labels build`."
            )
        chosen = [rows[label.name] for label in labels.labels]
        return replace(bank, labels=labels, embeddings=bank.embeddings[chosen], truncated=())
