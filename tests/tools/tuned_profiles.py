"""Tuned profiles for tests: one that holds here, with single fields changed, put where opening looks."""

from __future__ import annotations

import json
from typing import Any

from edgeclip.bundle import Bundle
from edgeclip.cache import HostCache
from edgeclip.runtime.choose import profile_name
from edgeclip.runtime.host import Host, engine_versions
from edgeclip.runtime.tuned import TunedProfile, TunedSettings, hardware


def tuned_profile(
    bundle: Bundle, variant: str = "onnx-fp32", *, settings: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Return a profile that holds on this host, as JSON values."""
    host = Host.here()
    profile = TunedProfile(
        goal="latency",
        variant=variant,
        settings=TunedSettings(**{"backend": "ort", "threads": 1, **(settings or {})}),
        device="cpu",
        floor=("golden",),
        why="the fastest of 2",
        unit="ms",
        value=1.5,
        low=1.4,
        high=1.6,
        untuned=2.0,
        tried=2,
        created="2026-11-22T12:00:00Z",
        bundle=bundle.digest,
        cores=host.cores,
        engines=engine_versions(),
        hardware=hardware(host),
        edgeclip="0.1.0",
    )
    return {**profile.to_dict(), **changes}


def put_profile(
    bundle: Bundle, profile: dict[str, Any] | bytes, *, fingerprint: str | None = None, device: str = "cpu"
) -> None:
    """Put a profile into the host cache of this test."""
    data = profile if isinstance(profile, bytes) else json.dumps(profile).encode()
    cache = HostCache.open(bundle.digest, fingerprint or Host.here().fingerprint())
    assert cache.put(profile_name(device), data)
