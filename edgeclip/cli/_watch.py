"""Files that say what is offered, the labels or a head, and are offered again whenever they change."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final

from edgeclip.errors import EdgeClipError, InputError

if TYPE_CHECKING:
    from edgeclip.classify import ZeroShotClassifier

    from ._options import LabelChoice

__all__ = ["Watch", "watch_of"]

# Files are looked at so often. What changed is read once it has been the same twice: its writer is done.
_POLL_S: Final = 0.5
# What could not be used is tried again after so long, unless it changes: the reason may lie elsewhere.
_AGAIN_S: Final = 5.0
_NO_FILE: Final = "no file"


class _StoppedError(Exception):
    """The watch ended while something was being offered."""


class Watch:
    """Offer what is in a file again whenever it changes.

    Make it before the file is read for the first time: what changes from then on is seen. A file that cannot
    be used is said once and tried again; what was offered before stays.

    Args:
        path: the file.
        what: its name in remarks, and of what stays: ``("label file", "labels")``.
        offer: reads the file, offers what is in it, and returns remarks. It is given a function to call now
            and then, which raises when the watch ends.
    """

    def __init__(
        self, path: Path, what: tuple[str, str], offer: Callable[[Callable[[], None]], Sequence[str]]
    ) -> None:
        self._path = path
        self._what = what
        self._offer = offer
        self._stop = threading.Event()
        self._said = ""
        self._read = self._look()  # the file as it was when it was read last, or before

    @contextmanager
    def running(self, say: Callable[[str], None]) -> Iterator[None]:
        """Watch in a thread of its own; leaving waits for it, at most for a batch of texts.

        Args:
            say: takes remarks, in that thread.
        """
        thread = threading.Thread(target=self._watch, args=(say,), name="edgeclip-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _watch(self, say: Callable[[str], None]) -> None:
        before: object = None
        failed: object = None
        again = 0.0
        while not self._stop.wait(_POLL_S):
            state = self._look()
            is_due = state != failed or monotonic() >= again
            if state == before != self._read and is_due:
                if self._offer_again(state, say):
                    self._read, failed = state, None
                else:
                    failed, again = state, monotonic() + _AGAIN_S
            before = state

    def _look(self) -> object:
        """Return what changes with the file, or why it cannot be told."""
        try:
            found = self._path.stat()
        except OSError as error:
            return error.errno
        if not stat.S_ISREG(found.st_mode):
            return _NO_FILE  # opening a pipe would wait for its other end
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

    def _offer_again(self, state: object, say: Callable[[str], None]) -> bool:
        """Offer what is in the file; ``False`` where that is to be tried again."""
        try:
            if state == _NO_FILE:
                raise InputError(f"{str(self._path)!r} is no file any more, expected one.")
            remarks = self._offer(self._heed)
        except _StoppedError:
            return False
        except (EdgeClipError, OSError) as error:
            what, stay = self._what
            said = f"the {what} is not used, and the {stay} stay: {' '.join(str(error).split())}"
            if said != self._said:
                say(said)
            self._said = said
            return False
        for remark in remarks:
            say(remark)
        self._said = ""
        return True

    def _heed(self) -> None:
        if self._stop.is_set():
            raise _StoppedError


def watch_of(classifier: ZeroShotClassifier, labels: LabelChoice, head: str | None) -> Watch | None:
    """Return a watch on what may change: the label file, or the file of a head.

    Args:
        classifier: what is in the file is offered to it.
        labels: may name a label file.
        head: a file or the name of one in the bundle, in place of labels.

    Returns:
        ``None`` where neither is a file; a pipe is read once.
    """
    path = labels.label_file if head is None else Path(head)
    if path is None or head in classifier.bundle.manifest.heads or not path.is_file():
        return None
    if head is None:
        return Watch(path, ("label file", "labels"), partial(_labels_again, classifier, labels))
    return Watch(path, ("head", "classes"), partial(_head_again, classifier, path))


def _labels_again(
    classifier: ZeroShotClassifier, choice: LabelChoice, heed: Callable[[], None]
) -> Sequence[str]:
    """Offer the labels of a file, unless it is they that are in force; return what there is to say."""
    from edgeclip.label_sets import LabelSet

    labels, bank = choice.read(), classifier.bank
    templates = choice.read_templates()
    is_same = isinstance(labels, LabelSet) and labels == bank.labels
    if labels is None or (is_same and templates in (None, bank.templates)):
        return ()
    return choice.offer(classifier, labels, templates, on_progress=lambda _: heed())


def _head_again(classifier: ZeroShotClassifier, path: Path, _: Callable[[], None]) -> Sequence[str]:
    classifier.set_head(path)
    return ()
