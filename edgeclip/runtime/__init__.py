"""Running towers on an inference engine, and measuring it. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeclip.runtime.session import Placement, RuntimeOptions, Session, TensorSpec, open_session

__all__ = ["Placement", "RuntimeOptions", "Session", "TensorSpec", "open_session"]

_HOME = dict.fromkeys(["Placement", "RuntimeOptions", "Session", "TensorSpec", "open_session"], "session")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
