"""Pictures to adapt on, each embedded once by every model that has a say, and labelled ones to count on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgeclip.distill.adapt import first_labels
from edgeclip.errors import InputError
from edgeclip.evaluate.metrics import Share, share
from edgeclip.evaluate.offered import offer
from edgeclip.evaluate.paired import Paired, paired
from edgeclip.evaluate.passes import Chosen, Passes, check_left_out, choose
from edgeclip.evaluate.picture_sets import Picture, PictureSet
from edgeclip.evaluate.subjects import Subject
from edgeclip.labels import LabelBank
from edgeclip.runtime.host import usable_cores

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Checked", "Seen", "check", "labelled", "look_at"]

CHANCE: Final = 0.05
"""How likely chance alone may make labelled pictures right less often (McNemar) before it counts."""

Allowed = Callable[[int], int]
Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Seen:
    """Unlabelled pictures as models see them, each once.

    Attributes:
        rows: ``(n, E)`` unit embeddings by each model, in the order they were given.
        digests: of the pictures as the first one is given them.
        left_out: pictures that could not be read.
        duplicates: pictures that were there before.
    """

    rows: tuple[NDArray[np.float32], ...]
    digests: frozenset[bytes]
    left_out: int
    duplicates: int

    @property
    def digest(self) -> str:
        """The sha256 of all pictures, whatever their order."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()


def look_at(
    pictures: PictureSet,
    subjects: Sequence[Subject],
    *,
    allowed: Allowed,
    stored: NDArray[np.float32] | None = None,
    limit: int | None = None,
    on_progress: Progress = lambda _: None,
) -> Seen:
    """Embed every picture once by every model.

    Args:
        pictures: the set; labels in it are not looked at.
        subjects: the models.
        allowed: how many of so many pictures may be broken.
        stored: ``(m, T)`` embeddings of all pictures of the set by one model more, in their order.
        limit: pictures at most, spread over the set.
        on_progress: called with how far it is.

    Raises:
        InputError: too many cannot be read, or stored rows are of another number of pictures.
    """
    places = {picture.key: place for place, picture in enumerate(pictures)} if stored is not None else {}
    if stored is not None and len(stored) != len(places):
        raise InputError(
            f"teacher: has {len(stored):,} rows, {pictures.path!r} holds {len(places):,} pictures; expected "
            "a row for each, in their order."
        )
    chosen = choose(pictures, lambda picture: places.get(picture.key, 0), limit=limit, allowed=allowed)
    found: list[list[NDArray[np.float32]]] = []
    digests: set[bytes] = set()
    done = 0
    for said, uses, embedded in _passes(chosen, subjects, allowed, "pictures", on_progress):
        fresh = []
        for row, digest in enumerate(said):
            if digest not in digests:
                digests.add(digest)
                fresh.append(row)
        done += len(uses)
        if stored is not None:
            embedded = [*embedded, stored[list(uses)]]
        found.append([rows[fresh] for rows in embedded])
    rows = tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
    return Seen(rows, frozenset(digests), chosen.count - done, done - len(digests))


@dataclass(frozen=True)
class Checked:
    """How often labelled pictures are right.

    Attributes:
        before: by the bank as it was.
        after: by the adapted one.
        changes: what changed from one to the other.
        adapted_on: labelled pictures that the bank was adapted on, too, without their labels.
    """

    before: Share
    after: Share
    changes: Paired
    adapted_on: int

    @property
    def is_worse(self) -> bool:
        """Whether they are right less often than before, and chance does not explain it."""
        return self.changes.net_loss > 0 and self.changes.p_value < CHANCE

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        sides = {name: asdict(side) for name, side in (("before", self.before), ("after", self.after))}
        return {**sides, **self.changes.to_dict(), "adapted_on": self.adapted_on, "is_worse": self.is_worse}


def labelled(pictures: PictureSet, bank: LabelBank, allowed: Allowed) -> Chosen[int]:
    """Return the pictures of a set whose labels are offered, with the rows of these.

    Args:
        pictures: the set; its labels are names of the bank's, or numbers as `eval` takes them.
        bank: what is offered.
        allowed: how many of so many pictures may be of no use.

    Raises:
        InputError: nothing can be used, or too much cannot.
    """
    offered = offer([(None, bank.labels)])
    own = pictures.labels.names if pictures.numbered and pictures.labels is not None else None

    def usable(picture: Picture) -> int | str:
        said = picture.label
        if said is not None and own is not None and said.isdecimal() and int(said) < len(own):
            said = own[int(said)]
        column = None if said is None else offered.number(said)
        if column is None:
            return "has no label." if said is None else f"has the label {said[:80]!r}, which is not offered."
        return column

    return choose(pictures, usable, allowed=allowed)


def check(
    chosen: Chosen[int],
    subject: Subject,
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    seen: Seen,
    *,
    allowed: Allowed,
    on_progress: Progress = lambda _: None,
) -> Checked:
    """Return how often labelled pictures are right.

    Args:
        chosen: from :func:`labelled`.
        subject: what the rows belong to.
        before: ``(N, E)`` rows of the bank as it was.
        after: ``(N, E)`` the adapted ones.
        seen: what was adapted on.
        allowed: how many of so many pictures may be broken.
        on_progress: called with how far it is.

    Raises:
        InputError: too many cannot be read.
    """
    rows: list[NDArray[np.float32]] = []
    targets: list[int] = []
    again = 0
    for said, uses, (embedded,) in _passes(chosen, [subject], allowed, "labelled pictures", on_progress):
        rows.append(embedded)
        targets += uses
        again += sum(digest in seen.digests for digest in said)
    embeddings, wanted = np.concatenate(rows), np.array(targets, np.intp)
    right = [first_labels(embeddings, each) == wanted for each in (before, after)]
    return Checked(share(right[0]), share(right[1]), paired(*right), again)


def _passes(
    chosen: Chosen[int], subjects: Sequence[Subject], allowed: Allowed, what: str, on_progress: Progress
) -> Iterator[tuple[list[bytes], tuple[int, ...], list[NDArray[np.float32]]]]:
    """Yield digests, uses, and embeddings of each subject, batch by batch."""
    done = 0
    with Passes(subjects, workers=usable_cores()) as passes:
        for batch in passes.batches(chosen):
            embedded = [rows for _, rows in passes.embedded(batch)]
            done += len(batch.uses)
            on_progress(f"{what}: {done:,} of {chosen.count:,}")
            digests = [hashlib.sha256(pixels.tobytes()).digest() for pixels in batch.forms[0]]
            yield digests, batch.uses, embedded
        check_left_out(chosen.pictures, passes.left_out, chosen.count, allowed)
