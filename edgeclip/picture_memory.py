"""Memory of decoded pictures, kept for the next picture.

A decoded photograph of 12 megapixels takes 48 MB. Pillow asks the system for it each time and gives it back,
so that every page is fetched and cleared anew: a third of the time of decoding. Pillow can keep such memory
in blocks of 16 MB, and does not unless it is told to. That is a setting of the process: it is made while
somebody holds it here, unless somebody else has made it, and undone afterwards.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Any, Final

__all__ = ["PictureMemory"]

_BLOCKS: Final = 4  # of 16 MB: a picture of 12 megapixels takes three
# Reentrant, because what releases may be the garbage collector, at any point.
_lock = threading.RLock()
_holders = 0
_set_here = False


class PictureMemory:
    """Keep up to 64 MB between pictures, from the first call of :meth:`hold` to :meth:`release`.

    Safe from many threads. An object that goes releases what it holds.
    """

    def __init__(self) -> None:
        self._held: weakref.finalize[Any, Any] | None = None

    def hold(self) -> None:
        """Keep memory from now on; calling it again does nothing, after :meth:`release` neither."""
        if self._held is not None:
            return
        with _lock:
            if self._held is None:
                self._held = weakref.finalize(self, _release)
                _hold()

    def release(self) -> None:
        """Stop keeping memory, and give it back unless others hold it."""
        if self._held is not None:
            self._held()


def _hold() -> None:
    global _holders, _set_here
    from PIL import Image

    core: Any = Image.core  # type: ignore[attr-defined]  # documented, and not among its types
    _holders += 1
    if not _set_here and core.get_blocks_max() == 0 and "PILLOW_BLOCKS_MAX" not in os.environ:
        core.set_blocks_max(_BLOCKS)
        _set_here = True


def _release() -> None:
    global _holders, _set_here
    with _lock:
        _holders -= 1
        if _holders == 0 and _set_here:
            _set_here = False
            image: Any = sys.modules["PIL.Image"]
            if image.core.get_blocks_max() == _BLOCKS:  # nobody else has set it since
                image.core.set_blocks_max(0)  # frees what was kept
