"""Zero-shot image classification that fits a small device."""

from __future__ import annotations

__version__ = "0.1.0"
