"""The tuned profile of a bundle on this device: which variant ``auto`` takes, how it is run, and until when.

``edgeclip tune`` writes it to the host cache, one small entry for each bundle, kind of host and device;
``edgeclip.runtime.choose`` reads it. What was measured on the way is another entry, which opening a bundle
does not read. A profile is stale, and then ignored and said to be, where engines or usable cores are no
longer those it was measured with, or where another edgeclip wrote it in a form that this one does not know.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from edgeclip.cache import HostCache
from edgeclip.runtime.choose import profile_name
from edgeclip.runtime.documents import Document
from edgeclip.runtime.host import Host, engine_versions

if TYPE_CHECKING:
    from edgeclip.bundle import Bundle
    from edgeclip.runtime.session import RuntimeOptions

__all__ = [
    "Found",
    "TunedProfile",
    "TunedSettings",
    "find_profile",
    "forget_profile",
    "hardware",
    "measurements_name",
]

Goal = Literal["latency", "throughput", "memory"]
AtLeastOne = Annotated[int, Meta(ge=1)]

_LARGEST_BYTES: Final = 1 << 20


class TunedSettings(Struct, frozen=True, kw_only=True):
    """How a variant is run: see :class:`~edgeclip.runtime.session.RuntimeOptions`.

    ``batch_size`` and ``workers`` are those of :meth:`ZeroShotClassifier.classify_stream`, where streams were
    tuned.
    """

    backend: str
    threads: AtLeastOne
    spinning: bool = False
    low_memory: bool = False
    batch_size: AtLeastOne | None = None
    workers: AtLeastOne | None = None

    def applied_to(self, options: RuntimeOptions, tower: str = "image") -> RuntimeOptions:
        """Return options with these settings where nobody asked for anything.

        Pictures were tuned. Of a text tower only the memory is: it is made for other inputs, and rarely open.
        """
        low_memory = self.low_memory if options.low_memory is None else options.low_memory
        if tower != "image":
            return replace(options, low_memory=low_memory)
        is_pinned = options.threads is not None or options.affinity is not None
        return replace(
            options,
            backend=self.backend if options.backend == "auto" else options.backend,
            threads=options.threads if is_pinned else self.threads,
            spinning=self.spinning if options.spinning is None else options.spinning,
            low_memory=low_memory,
        )

    def overruled_by(self, options: RuntimeOptions) -> str | None:
        """Return what was asked for so that nothing measured holds for it; ``None`` where all is well."""
        if options.backend not in ("auto", self.backend):
            return f"backend {options.backend!r} was asked for, and it is for {self.backend!r}"
        if options.providers is not None:
            return f"providers {', '.join(options.providers)} were asked for, and it was measured without"
        return None

    def __str__(self) -> str:
        said = [self.backend, f"{self.threads} thread{'' if self.threads == 1 else 's'}"]
        said += ["spinning"] if self.spinning else []
        said += ["low memory"] if self.low_memory else []
        said += [] if self.batch_size is None else [f"batch {self.batch_size}"]
        said += [] if self.workers is None else [f"{self.workers} decoding"]
        return ", ".join(said)


class TunedProfile(Document, frozen=True, kw_only=True):
    """What ``edgeclip tune`` chose for a bundle on a device.

    ``cores`` and ``engines`` are those that could be used when it was measured; ``hardware`` tells this kind
    of machine from others that share a cache. ``value`` is the median of what was optimised, in ``unit``,
    between ``low`` and ``high``; ``untuned`` the same of what ``auto`` takes without a profile.
    """

    schema: Literal[1] = 1
    kind: Literal["tuned-profile"] = "tuned-profile"
    goal: Goal
    variant: str
    settings: TunedSettings
    device: str
    floor: tuple[str, ...]
    why: str
    unit: str
    value: float
    low: float | None
    high: float | None
    untuned: float | None
    tried: int
    created: str
    bundle: str
    cores: AtLeastOne
    engines: dict[str, str]
    hardware: dict[str, Any]
    edgeclip: str

    def stale(self, host: Host) -> str | None:
        """Return why it no longer holds on a host with the engines installed here, ``None`` while it does."""
        now = engine_versions()
        for name in sorted({*self.engines, *now}):
            then, here = self.engines.get(name), now.get(name)
            if then != here:
                with_what = f"without {name}" if then is None else f"with {name} {then}"
                is_now = "it is not installed now" if here is None else f"{here} is installed now"
                return f"it was measured {with_what}, and {is_now}"
        if self.cores != host.cores:
            return f"it was measured on {self.cores} usable core(s), and {host.cores} can be used now"
        return None

    def __str__(self) -> str:
        return f"{self.variant} ({self.settings}), tuned for {self.goal} on {self.created[:10]}"


class Found(Struct, frozen=True):
    """A profile in the host cache.

    Attributes:
        profile: itself; ``None`` where it cannot be read.
        stale: why it is not used; ``None`` where it can be.
    """

    profile: TunedProfile | None
    stale: str | None


def measurements_name(device: str) -> str:
    """Return the name of the entry that holds what was measured for the profile of a device."""
    return profile_name(device).replace("profile", "tuning", 1)


def hardware(host: Host) -> dict[str, Any]:
    """Return what of a host tells its kind from others', engines aside."""
    return {
        "cpu": host.cpu_model,
        "isa": sorted(host.isa or ()),
        "gpus": list(host.gpus),
        "system": host.system,
        "machine": host.machine,
    }


def find_profile(bundle: Bundle, host: Host, device: str) -> Found | None:
    """Return the profile of a bundle on a device of this kind of host; ``None`` where there is none.

    One small read where there is one. Where there is none for the engines that are installed, a look at the
    neighbouring folders finds one that older or newer engines left.
    """
    cache = HostCache.open(bundle.digest, host.fingerprint())
    data = cache.get(profile_name(device))
    if data is not None:
        return _read(data, host)
    return next((found for _, found in _left_behind(cache, host, device)), None)


def forget_profile(bundle: Bundle, host: Host, device: str) -> int:
    """Remove the profile of a bundle on a device, and those that other engines left; return how many."""
    cache = HostCache.open(bundle.digest, host.fingerprint())
    names = (profile_name(device), measurements_name(device))
    holding = [cache] if cache.get(names[0]) is not None else []
    holding += [other for other, _ in _left_behind(cache, host, device)]
    for each in holding:
        for name in names:
            each.remove(name)
    return sum(each.get(names[0]) is None for each in holding)


def _read(data: bytes, host: Host) -> Found:
    if len(data) > _LARGEST_BYTES:
        return Found(None, f"it has {len(data):,} bytes, which no profile has")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return Found(None, "it is not JSON")
    if not isinstance(raw, dict) or raw.get("schema") != 1:
        said = raw.get("schema") if isinstance(raw, dict) else None
        return Found(None, f"it is of schema {said!r}, and this edgeclip reads 1")
    try:
        profile = msgspec.convert(raw, TunedProfile)
    except msgspec.ValidationError as error:
        return Found(None, f"it cannot be read ({error})")
    return Found(profile, profile.stale(host))


def _left_behind(cache: HostCache, host: Host, device: str) -> list[tuple[HostCache, Found]]:
    """Return profiles of this hardware in folders of other engines, newest first."""
    if cache.directory is None:
        return []
    found = []
    here = hardware(host)
    for path in cache.directory.parent.glob(f"*/{profile_name(device)}"):
        other = HostCache(path.parent, writable=cache.writable)
        data = None if path.parent == cache.directory else other.get(path.name)
        each = None if data is None else _read(data, host)
        if each is not None and each.profile is not None and each.profile.hardware == here:
            why = each.stale or "it was measured with other engines"
            found.append((other, Found(each.profile, why)))
    return sorted(found, key=lambda pair: pair[1].profile.created if pair[1].profile else "", reverse=True)
