"""The exceptions edgeclip raises. Every one carries the exit code the command line ends with.

::

    EdgeClipError                      exit code 1
    ├── ConfigError                    an option, recipe or setting that cannot be used
    ├── MissingExtraError              a package that belongs to an optional extra is not installed
    ├── BundleError                    a bundle that is damaged, incomplete or of an unknown schema
    ├── InputError (ValueError)        a picture, text, array or file given by the user
    ├── CalibrationError               a calibration set or range that cannot be used
    ├── ExportError                    a model that cannot be traced, converted or written
    │   └── ParityError                two forms of one model disagree; exit code 4
    └── BackendError                   an inference engine failed
        └── BackendUnavailableError    the backend, provider or device asked for is not here

Messages say what failed, what we got, what was expected and what to do. Exceptions of other libraries are
translated where they enter, with ``raise … from``.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "CalibrationError",
    "ConfigError",
    "EdgeClipError",
    "ExportError",
    "InputError",
    "MissingExtraError",
    "ParityError",
]


class EdgeClipError(Exception):
    """Base of every error raised on purpose by edgeclip."""

    exit_code: ClassVar[int] = 1


class ConfigError(EdgeClipError):
    """Report an option, recipe or setting that cannot be used."""


class MissingExtraError(EdgeClipError):
    """Report that a command needs an optional extra that is not installed.

    Args:
        what: the command or feature that needs it, as the user names it.
        extra: name of the extra, as in ``pip install "edgeclip[extra]"``.
        module: the module that could not be imported.
    """

    def __init__(self, what: str, *, extra: str, module: str) -> None:
        super().__init__(
            f"{what} needs the package {module!r}, which is not installed: "
            f'run pip install "edgeclip[{extra}]".'
        )
        self.extra = extra
        self.module = module


class BundleError(EdgeClipError):
    """Report a bundle that is damaged, incomplete or of an unknown schema."""


class InputError(EdgeClipError, ValueError):
    """Report a picture, text, array or file that cannot be used."""


class CalibrationError(EdgeClipError):
    """Report a calibration set or range that cannot be used."""


class ExportError(EdgeClipError):
    """Report a model that cannot be traced, converted or written."""


class ParityError(ExportError):
    """Report that two forms of one model disagree beyond the limits."""

    exit_code: ClassVar[int] = 4


class BackendError(EdgeClipError):
    """Report that an inference engine failed to load or to run a tower."""


class BackendUnavailableError(BackendError):
    """Report that the backend, provider or device asked for is not available here."""
