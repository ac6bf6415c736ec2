"""Zero-shot image classification that fits a small device.

    >>> from edgeclip import ZeroShotClassifier
    >>> with ZeroShotClassifier.open() as classifier:
    ...     classifier.set_labels(["cat", "dog", "car"])
    ...     classifier.classify("photo.jpg")[0].label

Importing this package loads the standard library only; each name below is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgeclip.bundle import Bundle
    from edgeclip.classify import Prediction, ZeroShotClassifier
    from edgeclip.errors import (
        BackendError,
        BackendUnavailableError,
        BundleError,
        CalibrationError,
        ConfigError,
        EdgeClipError,
        ExportError,
        InputError,
        MissingExtraError,
        ParityError,
    )
    from edgeclip.labels import LabelBank, LabelSet
    from edgeclip.preprocess import Preprocess
    from edgeclip.runtime.session import RuntimeOptions, Session, open_session
    from edgeclip.tokenizer import Tokenizer

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "Bundle",
    "BundleError",
    "CalibrationError",
    "ConfigError",
    "EdgeClipError",
    "ExportError",
    "InputError",
    "LabelBank",
    "LabelSet",
    "MissingExtraError",
    "ParityError",
    "Prediction",
    "Preprocess",
    "RuntimeOptions",
    "Session",
    "Tokenizer",
    "ZeroShotClassifier",
    "__version__",
    "open_session",
]

_HOME = {
    "Bundle": "edgeclip.bundle",
    "LabelBank": "edgeclip.labels",
    "LabelSet": "edgeclip.labels",
    "Prediction": "edgeclip.classify",
    "Preprocess": "edgeclip.preprocess",
    "RuntimeOptions": "edgeclip.runtime.session",
    "Session": "edgeclip.runtime.session",
    "Tokenizer": "edgeclip.tokenizer",
    "ZeroShotClassifier": "edgeclip.classify",
    "open_session": "edgeclip.runtime.session",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'edgeclip' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOME.get(name, "edgeclip.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
