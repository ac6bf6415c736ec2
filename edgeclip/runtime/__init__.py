"""Running towers on an inference engine, and measuring it. Names are loaded when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeclip.runtime.choose import VariantChoice, choose_variant, open_tower
    from edgeclip.runtime.host import Host
    from edgeclip.runtime.latency import (
        NO_CLOCK,
        LatencySamples,
        RatioInterval,
        StageClock,
        compare_interleaved,
        measure,
    )
    from edgeclip.runtime.latency_report import LatencyReport
    from edgeclip.runtime.parity import ParityLimits, ParityNumbers, compare_embeddings, golden_check
    from edgeclip.runtime.session import Placement, RuntimeOptions, Session, TensorSpec, open_session

__all__ = [
    "NO_CLOCK",
    "Host",
    "LatencyReport",
    "LatencySamples",
    "ParityLimits",
    "ParityNumbers",
    "Placement",
    "RatioInterval",
    "RuntimeOptions",
    "Session",
    "StageClock",
    "TensorSpec",
    "VariantChoice",
    "choose_variant",
    "compare_embeddings",
    "compare_interleaved",
    "golden_check",
    "measure",
    "open_session",
    "open_tower",
]

_NAMES_OF_MODULE = {
    "choose": ("VariantChoice", "choose_variant", "open_tower"),
    "host": ("Host",),
    "latency": (
        "NO_CLOCK",
        "LatencySamples",
        "RatioInterval",
        "StageClock",
        "compare_interleaved",
        "measure",
    ),
    "latency_report": ("LatencyReport",),
    "parity": ("ParityLimits", "ParityNumbers", "compare_embeddings", "golden_check"),
    "session": ("Placement", "RuntimeOptions", "Session", "TensorSpec", "open_session"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = value
    return value
