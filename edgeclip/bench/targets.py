"""One thing to time: a variant of a bundle on one engine and device, with threads and pictures a call.

    PATH[#VARIANT][,backend=openvino][,device=cpu][,threads=2][,batch=8][,decode=fast]

is how a target is written on the command line, and how its name reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from edgeclip.errors import ConfigError
from edgeclip.runtime.latency import NO_CLOCK
from edgeclip.runtime.session import RuntimeOptions

if TYPE_CHECKING:
    from pathlib import Path

    from edgeclip.bundle import Bundle
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.runtime.latency import Clock

__all__ = ["Target", "open_target", "parse_target"]


@dataclass(frozen=True)
class Target:
    """One thing to time.

    Attributes:
        bundle: a directory, ``"default"``, or ``"hf:organisation/name@revision"``.
        variant: its name; ``"auto"`` is the one that this host would take.
        backend: as in :class:`~edgeclip.runtime.session.RuntimeOptions`.
        device: as there.
        threads: as there; pictures of a batch are decoded by as many.
        batch: pictures a call, at least 1.
        fast_decode: decode large JPEGs at reduced scale.

    Raises:
        ConfigError: a value cannot be used.
    """

    bundle: str = "default"
    variant: str = "auto"
    backend: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    batch: int = 1
    fast_decode: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ConfigError(f"batch: got {self.batch!r}, expected a whole number of at least 1.")
        self.options()

    @property
    def name(self) -> str:
        """The target as :func:`parse_target` reads it, without what is as usual."""
        return f"{self.bundle}{'' if self.variant == 'auto' else f'#{self.variant}'}{self._settings()}"

    @property
    def short_name(self) -> str:
        """The name without the bundle: targets of one bundle are told apart by it."""
        return f"{self.variant}{self._settings()}"

    def options(self, cache_dir: Path | None = None) -> RuntimeOptions:
        """Return how its towers are run."""
        return RuntimeOptions(
            backend=self.backend, device=self.device, threads=self.threads, cache_dir=cache_dir
        )

    def _settings(self) -> str:
        usual = Target()
        said = {
            "backend": self.backend,
            "device": self.device,
            "threads": self.threads,
            "batch": self.batch,
            "decode": "fast" if self.fast_decode else "exact",
        }
        defaults = {"decode": "exact", **{name: getattr(usual, name) for name in said if name != "decode"}}
        return "".join(f",{name}={value}" for name, value in said.items() if value != defaults[name])


def _decode(text: str) -> bool:
    if text not in ("exact", "fast"):
        raise ValueError
    return text == "fast"


@dataclass(frozen=True)
class _Setting:
    """How a word behind a comma is read: the field it sets, and what is expected of it."""

    sets: str
    expected: str
    read: Callable[[str], Any] = str


_SETTINGS: Final = {
    "variant": _Setting("variant", "a name"),
    "backend": _Setting("backend", "a backend"),
    "device": _Setting("device", "a device"),
    "threads": _Setting("threads", "a whole number of at least 1", int),
    "batch": _Setting("batch", "a whole number of at least 1", int),
    "decode": _Setting("fast_decode", "exact or fast", _decode),
}


def parse_target(text: str) -> Target:
    """Read a target: ``PATH[#VARIANT][,NAME=VALUE]…``.

    Args:
        text: for instance ``"my-bundle#onnx-int8,threads=2"``. Commas in a path stay part of it: settings
            are what follows the last piece that is none. A ``#`` in a path needs another one behind it.

    Raises:
        ConfigError: a setting is unknown, repeated or has no such value, or there is no path.
    """
    where, *pieces = text.split(",")
    while pieces and "=" not in pieces[0]:
        where = f"{where},{pieces.pop(0)}"
    # A device may be a list with commas: "hetero:gpu,cpu" goes on until the next name.
    settings: list[tuple[str, str]] = []
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if equals:
            settings.append((name.strip(), value.strip()))
        elif settings and settings[-1][0] == "device":
            settings[-1] = ("device", f"{settings[-1][1]},{piece.strip()}")
        else:
            raise ConfigError(f"target {text!r}: got {piece!r} among the settings, expected NAME=VALUE.")
    bundle, mark, variant = where.rpartition("#")
    if not mark:
        bundle, variant = where, "auto"
    if not bundle or not variant:
        raise ConfigError(
            f"target {text!r}: got no {'variant' if bundle else 'bundle'}, expected PATH#VARIANT."
        )
    target = Target(bundle, variant)
    changes: dict[str, Any] = {}
    for name, value in settings:
        setting = _SETTINGS.get(name)
        if setting is None:
            raise ConfigError(f"target {text!r}: got {name!r}, expected one of {', '.join(_SETTINGS)}.")
        if setting.sets in changes or (name == "variant" and mark):
            raise ConfigError(f"target {text!r}: got {name!r} twice, expected it once.")
        try:
            changes[setting.sets] = setting.read(value)
        except ValueError:
            raise ConfigError(
                f"target {text!r}: got {name}={value!r}, expected {setting.expected}."
            ) from None
    return replace(target, **changes)


def open_target(
    target: Target,
    clock: Clock = NO_CLOCK,
    *,
    bundle: Bundle | None = None,
    keep_text_tower: bool = False,
) -> ZeroShotClassifier:
    """Open a target as its user would; its stages are timed by ``clock``.

    Args:
        target: what to open.
        clock: where stages are timed.
        bundle: the bundle, where it is open already.
        keep_text_tower: keep the text tower open between changes of labels.

    Raises:
        EdgeClipError: as :meth:`~edgeclip.classify.ZeroShotClassifier.open`.
    """
    from edgeclip.classify import ZeroShotClassifier

    return ZeroShotClassifier.open(
        target.bundle if bundle is None else bundle,
        variant=target.variant,
        keep_text_tower=keep_text_tower,
        options=target.options(),
        fast_decode=target.fast_decode,
        clock=clock,
    )
