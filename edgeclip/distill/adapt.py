"""Unlabelled adaptation: rows of a label bank that fit the pictures they will meet.

The rows ``W0`` of a bank are texts, pictures of somebody's domain lie elsewhere. Given unit embeddings
``X (n, E)`` of unlabelled pictures of that domain:

1. *Soft labels.* ``q_ij`` is the softmax over labels of ``scale · x_i · w_j``, its columns scaled towards
   balance, so that labels which attract everything share: entropic optimal transport with a relaxed marginal
   (Chizat et al. 2018, "Scaling algorithms for unbalanced optimal transport problems"). The marginal aimed at
   lies between what the texts say and equal shares, for the pictures that somebody has are not balanced.
2. *Rows.* ``w_j ∝ (1 - strength) w0_j + strength · m_j`` with ``m_j`` the unit mean of the pictures, weighted
   by ``q_ij``. The texts stay in every row, as the residuals of TaskRes (Yu et al. 2023) and the penalty of
   TransCLIP (Zanella et al. 2024) keep them; here by construction, for rows of a bank have unit length.
3. From the new rows again, ``rounds`` times.

A teacher says the soft labels instead where there is one: here one round, and its word counts for more. In
PromptKD (Li et al. 2024) the student's image tower learns prompts and a projection by gradients, and class
vectors stay the teacher's; here pictures stay as the device sees them, and class vectors move.

Nothing is known about what is right. So :func:`adapt` fits halves of the pictures too, and
:class:`Judgement` says whether the result can be relied on: do the halves agree, do labels explain what
pictures differ in, do neighbours agree at least as much as before? All of that is blind to clear groups that
are not the labels; a witness, another model that looks at the same pictures, is not. Settings and thresholds
were chosen on OpenMoji, Noto, the tuning half of stamps and generated shapes (``docs/adapt.md``).

    >>> result = adapt(pictures, bank.embeddings, Self(scale))                                # doctest: +SKIP
    >>> result.judgement.reliable, result.rows
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from edgeclip.errors import ConfigError, InputError
from edgeclip.label_store import seal
from edgeclip.labels import LabelBank
from edgeclip.tensors import read_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "LEAST_A_LABEL",
    "STRENGTH",
    "TAUGHT_STRENGTH",
    "Adapted",
    "Fit",
    "Judgement",
    "Self",
    "Taught",
    "adapt",
    "adapted_bank",
    "ask_teacher",
    "bank_file",
    "check_labels",
    "first_labels",
    "posterior",
    "read_about",
    "soft_labels",
]

STRENGTH: Final = 0.3
"""Share of the pictures in a row, where the model teaches itself."""
TAUGHT_STRENGTH: Final = 0.7
"""The same where another model teaches it."""
LEAST_A_LABEL: Final = 2
"""Fewest pictures for each label offered: below it means of pictures are pictures."""
LEAST_EXPLAINED: Final = 0.35
"""Least share of what pictures differ in that their labels explain."""
LEAST_AGREEMENT: Final = 0.5
"""Least share of pictures that the rows of both halves give the same first label."""
LEAST_IN_USE: Final = 0.5
"""Least number of labels that come first for some picture, over that before."""
LEAST_FOLLOWED: Final = 0.02
"""Least gain, as a share of the pictures, in first labels that are the teacher's where it did not teach."""

_SWEEPS: Final = 60
_SETTLED: Final = 1e-5
_SMALLEST: Final = 1e-30
_LEAST_LOGIT: Final = -30.0
_NEIGHBOURS_OF: Final = 10_000
_ROWS_AT_ONCE: Final = 1024
_ABOUT: Final = "adapted"

Progress = Callable[[str], None]


class Fit(Protocol):
    """A way to make rows of pictures."""

    def __call__(
        self, pictures: NDArray[np.float32], rows: NDArray[np.float32], chosen: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Return ``(N, E)`` unit rows.

        Args:
            pictures: ``(n, E)`` unit rows, all of them.
            rows: ``(N, E)`` unit rows of the bank as it is.
            chosen: which pictures may be looked at.
        """
        ...


@dataclass(frozen=True)
class Self:
    """Rows from the model's own soft labels; see the module.

    Attributes:
        scale: multiplier of cosines.
        strength: share of the pictures in a row; 0 leaves the texts as they are.
        balance: 0 takes shares of labels as they come, 1 forces the marginal.
        rounds: how often labels and rows are made in turn.
    """

    scale: float
    strength: float = STRENGTH
    balance: float = 0.5
    rounds: int = 3

    def __post_init__(self) -> None:
        _check(self.strength, self.balance)
        if self.rounds < 1:
            raise ConfigError(f"adaptation: 'rounds' is {self.rounds}, expected at least 1.")

    def __call__(
        self, pictures: NDArray[np.float32], rows: NDArray[np.float32], chosen: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Return the rows, see :class:`Fit`."""
        seen = pictures[chosen]
        marginal = _marginal(posterior(seen, rows, self.scale))
        found = rows
        for _ in range(self.rounds):
            said = _shares(_logits(seen, found, self.scale), self.balance, marginal)
            found = _mixed(rows, (said.T @ seen).astype(np.float32), self.strength)
        return found


@dataclass(frozen=True, eq=False)
class Taught:
    """Rows from what a teacher says of the same pictures.

    Attributes:
        said: ``(n, N)`` a teacher's soft labels of all pictures.
        strength: share of the pictures in a row.
    """

    said: NDArray[np.floating[Any]]
    strength: float = TAUGHT_STRENGTH

    def __post_init__(self) -> None:
        _check(self.strength, 0.0)

    @classmethod
    def by(
        cls,
        pictures: NDArray[np.float32],
        rows: NDArray[np.float32],
        scale: float,
        *,
        balance: float = 0.5,
        strength: float = TAUGHT_STRENGTH,
    ) -> Taught:
        """Return what a teacher with these embeddings teaches.

        Args:
            pictures: ``(n, T)`` unit rows, the teacher's.
            rows: ``(N, T)`` unit rows of the same labels, the teacher's.
            scale: multiplier of its cosines.
            balance: as in :class:`Self`.
            strength: share of the pictures in a row of the student.
        """
        marginal = _marginal(posterior(pictures, rows, scale))
        return cls(_shares(_logits(pictures, rows, scale), balance, marginal), strength)

    def __call__(
        self, pictures: NDArray[np.float32], rows: NDArray[np.float32], chosen: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Return the rows, see :class:`Fit`."""
        return _mixed(rows, (self.said[chosen].T @ pictures[chosen]).astype(np.float32), self.strength)


def _check(strength: float, balance: float) -> None:
    for name, value in (("strength", strength), ("balance", balance)):
        if not 0 <= value <= 1:
            raise ConfigError(f"adaptation: {name!r} is {value}, expected 0 to 1.")


def posterior(
    pictures: NDArray[np.float32], rows: NDArray[np.float32], scale: float
) -> NDArray[np.floating[Any]]:
    """Return ``(n, N)`` the softmax of ``scale · cosine`` over labels."""
    return _shares(_logits(pictures, rows, scale), 0.0, None)


def soft_labels(
    logits: NDArray[np.floating[Any]], balance: float, marginal: NDArray[np.floating[Any]] | None
) -> NDArray[np.floating[Any]]:
    """Return soft labels whose shares are drawn to a marginal.

    ``q = diag(u) exp(logits) diag(v)`` with rows summing to 1 and ``v_j = (marginal_j / (exp(logits)ᵀu)_j) **
    balance``, found by taking turns.

    Args:
        logits: ``(n, N)``.
        balance: 0 to 1.
        marginal: ``(N,)`` shares; not asked where ``balance`` is 0.

    Returns:
        ``(n, N)`` rows that sum to 1, of the type of the logits.
    """
    return _shares(logits.copy(), balance, marginal)


def _logits(
    pictures: NDArray[np.float32], rows: NDArray[np.float32], scale: float
) -> NDArray[np.floating[Any]]:
    return pictures @ (np.float32(scale) * rows).T


def _shares(
    logits: NDArray[np.floating[Any]], balance: float, marginal: NDArray[np.floating[Any]] | None
) -> NDArray[np.floating[Any]]:
    """Return :func:`soft_labels` in the place of the logits: those of many pictures fill the memory."""
    kernel = logits
    kernel -= kernel.max(axis=1, keepdims=True)
    # A label that is near no picture must not make columns so large that the others vanish.
    np.maximum(kernel, _LEAST_LOGIT, out=kernel)
    np.exp(kernel, out=kernel)
    if balance and marginal is not None:
        columns = np.ones(kernel.shape[1], kernel.dtype)
        for _ in range(_SWEEPS):
            reached = kernel.T @ (1 / (kernel @ columns)) / len(kernel)
            found = np.asarray((marginal / np.maximum(reached, _SMALLEST)) ** balance, kernel.dtype)
            settled = bool(np.all(np.abs(found - columns) <= _SETTLED * columns))
            columns = found
            if settled:
                break
        kernel *= columns
    kernel /= kernel.sum(axis=1, keepdims=True)
    return kernel


def _marginal(said: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return shares half-way, as logarithms, between those of soft labels and equal ones."""
    shares: NDArray[np.floating[Any]] = np.sqrt(said.mean(axis=0))
    normalised: NDArray[np.floating[Any]] = shares / shares.sum()
    return normalised


def _mixed(rows: NDArray[np.float32], sums: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    """Return rows with a share of the direction of their pictures' sums."""
    mixed = (1 - strength) * rows + strength * _unit(sums)
    return _unit(mixed)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1), np.float32)


# --- can it be relied on? ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """What a bank makes of the pictures.

    Attributes:
        in_use: labels that come first for some picture.
        largest: share of the pictures of the commonest first label.
        balance: entropy of the shares of labels over that of equal shares, 0 to 1.
        doubt: mean entropy of a picture's scores over the largest possible, 0 to 1.
        neighbours: how often a picture and the most similar other one have the same first label: 0 as often
            as by chance, 1 always (Cohen 1960).
    """

    in_use: int
    largest: float
    balance: float
    doubt: float
    neighbours: float


@dataclass(frozen=True)
class Judgement:
    """Whether an adaptation can be relied on, from pictures without labels.

    Attributes:
        pictures: how many.
        labels: how many.
        changed: share of the pictures whose first label changed.
        agreement: share of the pictures with the same first label by the rows fitted on either half.
        explained: share of what pictures differ in that their labels explain: 1 less the squared distance to
            the mean of the label over that to the mean of all, means from the half that a picture is not in,
            corrected for the noise of means of few.
        before: what the bank as it was makes of the pictures.
        after: what the adapted one makes of them.
        follows_before: share of the pictures whose first label is the teacher's, where there is one.
        follows: the same after, by rows fitted on the half that a picture is not in.
        witness: share of the pictures that a model which has learnt nothing here expects to be right more
            than before: the mean of its soft labels of the first labels after, less before.
    """

    pictures: int
    labels: int
    changed: float
    agreement: float
    explained: float
    before: Side
    after: Side
    follows_before: float | None = None
    follows: float | None = None
    witness: float | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it cannot be relied on; nothing where it can.

        Where a teacher says what pictures show, it need not be seen in the student's embeddings, and few of
        them move rows far: then it is only asked whether the student follows where it was not taught.
        """
        found = []
        if self.follows is not None and self.follows_before is not None:
            if self.follows < self.follows_before + LEAST_FOLLOWED:
                found.append(
                    f"on pictures that it was not taught on, the bank has the teacher's first label for "
                    f"{self.follows:.1%}, for {self.follows_before:.1%} before, expected at least "
                    f"{LEAST_FOLLOWED:.1%} more"
                )
        elif self.explained < LEAST_EXPLAINED:
            found.append(
                f"labels explain {self.explained:.1%} of what the pictures differ in, expected at least "
                f"{LEAST_EXPLAINED:.1%}: the pictures differ in something else"
            )
        if self.follows is None and self.agreement < LEAST_AGREEMENT:
            found.append(
                f"rows of either half of the pictures agree on {self.agreement:.1%} of the first labels, "
                f"expected at least {LEAST_AGREEMENT:.1%}"
            )
        if self.witness is not None and self.witness < 0:
            found.append(f"the witness expects {-self.witness:.1%} fewer pictures to be right than before")
        if self.after.neighbours < self.before.neighbours:
            found.append(
                f"similar pictures agree less than before ({self.before.neighbours:.2f} -> "
                f"{self.after.neighbours:.2f}, 1 is always)"
            )
        if self.after.in_use < LEAST_IN_USE * self.before.in_use:
            found.append(
                f"{self.after.in_use} labels come first for some picture, {self.before.in_use} did before"
            )
        return tuple(found)

    @property
    def reliable(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {**asdict(self), "reliable": self.reliable, "reasons": list(self.reasons)}


@dataclass(frozen=True, eq=False)
class Adapted:
    """Adapted rows and what they are worth.

    Attributes:
        rows: ``(N, E)`` unit rows, fitted on all pictures.
        judgement: whether they can be relied on.
    """

    rows: NDArray[np.float32]
    judgement: Judgement


def adapt(
    pictures: NDArray[np.float32],
    rows: NDArray[np.float32],
    fit: Fit,
    *,
    scale: float,
    taught: Taught | None = None,
    witness: NDArray[np.floating[Any]] | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Adapted:
    """Fit rows on pictures, and on halves of them to see what they are worth.

    Args:
        pictures: ``(n, E)`` unit rows, no two of the same picture.
        rows: ``(N, E)`` unit rows of the bank.
        fit: :class:`Self`, :class:`Taught`, or learned prompts.
        scale: multiplier of cosines, for what is said about scores.
        taught: what a teacher says, where ``fit`` learns from one.
        witness: ``(n, N)`` soft labels by another model, whom ``fit`` does not learn from.
        seed: of the halves.
        on_progress: called with what is being done.

    Raises:
        InputError: shapes disagree, one label only, or fewer than two pictures a label.
    """
    count, labels = _checked(pictures, rows)
    if witness is not None and witness.shape != (count, labels):
        raise InputError(f"adaptation: got a witness of shape {witness.shape}, expected {(count, labels)}.")
    order = np.random.default_rng(seed).permutation(count)
    halves = [np.sort(part) for part in (order[: count // 2], order[count // 2 :])]
    say = on_progress or (lambda _: None)
    found = []
    for what, chosen in zip(
        ("all pictures", "one half", "the other half"), (np.arange(count), *halves), strict=True
    ):
        say(f"fitting on {what}")
        found.append(fit(pictures, rows, chosen))
    say("comparing")
    all_of_them, *of_halves = found
    nearest = _nearest(pictures)
    before, after = (first_labels(pictures, each) for each in (rows, all_of_them))
    by_half = [first_labels(pictures, each) for each in of_halves]
    follows_before = follows = None
    if taught is not None:
        wanted = taught.said.argmax(axis=1)
        unseen = before.copy()
        unseen[halves[1]], unseen[halves[0]] = by_half[0][halves[1]], by_half[1][halves[0]]
        follows_before, follows = float(np.mean(before == wanted)), float(np.mean(unseen == wanted))
    every = np.arange(count)
    return Adapted(
        all_of_them,
        Judgement(
            pictures=count,
            labels=labels,
            changed=float(np.mean(before != after)),
            agreement=float(np.mean(by_half[0] == by_half[1])),
            explained=_explained(pictures, halves, by_half, labels),
            before=_side(pictures, rows, scale, before, nearest),
            after=_side(pictures, all_of_them, scale, after, nearest),
            follows_before=follows_before,
            follows=follows,
            witness=None
            if witness is None
            else float(np.mean(witness[every, after] - witness[every, before])),
        ),
    )


def ask_teacher(
    pictures: NDArray[np.float32],
    rows: NDArray[np.float32],
    scale: float,
    *,
    strength: float = TAUGHT_STRENGTH,
    seed: int = 0,
) -> tuple[Taught, Judgement]:
    """Return what a teacher teaches, and how its own adaptation is judged.

    It adapts itself to the pictures first, where that can be relied on, and teaches as it is elsewhere.

    Args:
        pictures: ``(n, T)`` unit rows, the teacher's.
        rows: ``(N, T)`` unit rows of the labels, the teacher's.
        scale: multiplier of its cosines.
        strength: share of the pictures in a row of the student.
        seed: of the halves.

    Raises:
        InputError: as :func:`adapt`.
    """
    own = adapt(pictures, rows, Self(scale), scale=scale, seed=seed)
    said = own.rows if own.judgement.reliable else rows
    return Taught.by(pictures, said, scale, strength=strength), own.judgement


def check_labels(labels: int) -> None:
    """Raise where there are too few labels to adapt.

    Raises:
        InputError: fewer than two.
    """
    if labels < 2:
        raise InputError("adaptation: got 1 label, expected at least two: with one there is nothing to tell.")


def _checked(pictures: NDArray[np.float32], rows: NDArray[np.float32]) -> tuple[int, int]:
    if pictures.ndim != 2 or rows.ndim != 2 or pictures.shape[1] != rows.shape[1]:
        raise InputError(
            f"adaptation: got pictures of shape {pictures.shape} and labels of shape {rows.shape}, expected "
            "(n, E) and (N, E)."
        )
    count, labels = len(pictures), len(rows)
    check_labels(labels)
    if count < LEAST_A_LABEL * labels:
        raise InputError(
            f"adaptation: got {count:,} different pictures for {labels:,} labels, expected at least "
            f"{LEAST_A_LABEL * labels:,}, {LEAST_A_LABEL} a label. Give more pictures, or offer fewer labels."
        )
    return count, labels


def first_labels(pictures: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return ``(n,)`` the row that is most similar to each picture."""
    first = np.empty(len(pictures), np.intp)
    for start in range(0, len(pictures), _ROWS_AT_ONCE):
        part = pictures[start : start + _ROWS_AT_ONCE]
        first[start : start + len(part)] = (part @ rows.T).argmax(axis=1)
    return first


def _side(
    pictures: NDArray[np.float32],
    rows: NDArray[np.float32],
    scale: float,
    first: NDArray[np.intp],
    nearest: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> Side:
    labels = len(rows)
    said, doubt = np.zeros(labels), 0.0
    for start in range(0, len(pictures), _ROWS_AT_ONCE):
        part = posterior(pictures[start : start + _ROWS_AT_ONCE], rows, scale)
        said += part.sum(axis=0)
        doubt += float(_entropy(part).sum())
    shares = np.bincount(first, minlength=labels) / len(first)
    largest = np.log(labels)
    one, other = nearest
    same, chance = float(np.mean(first[one] == first[other])), float(np.sum(shares**2))
    return Side(
        in_use=int(np.count_nonzero(shares)),
        largest=float(shares.max()),
        balance=float(_entropy(said / len(first)) / largest),
        doubt=float(doubt / len(first) / largest),
        neighbours=(same - chance) / (1 - chance) if chance < 1 else 0.0,
    )


def _entropy(shares: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    total: NDArray[np.floating[Any]] = -(shares * np.log(np.maximum(shares, _SMALLEST))).sum(axis=-1)
    return total


def _nearest(pictures: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return pictures and the most similar other one of each; of at most 10,000, evenly spread."""
    some = np.linspace(0, len(pictures) - 1, min(len(pictures), _NEIGHBOURS_OF)).astype(np.intp)
    seen = pictures[some]
    nearest = np.empty(len(some), np.intp)
    for start in range(0, len(some), _ROWS_AT_ONCE):
        similarity = seen[start : start + _ROWS_AT_ONCE] @ seen.T
        similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -np.inf
        nearest[start : start + len(similarity)] = similarity.argmax(axis=1)
    return some, some[nearest]


def _explained(
    pictures: NDArray[np.float32],
    halves: list[NDArray[np.intp]],
    by_half: list[NDArray[np.intp]],
    labels: int,
) -> float:
    """Return ``Judgement.explained``; a mean of m pictures is off by an mth of the spread: left out."""
    within = total = 0.0
    for fitted, judged, first in ((halves[0], halves[1], by_half[0]), (halves[1], halves[0], by_half[1])):
        count = np.bincount(first[fitted], minlength=labels)
        sums = np.zeros((labels, pictures.shape[1]), np.float64)
        np.add.at(sums, first[fitted], pictures[fitted])
        overall = pictures[fitted].mean(axis=0, dtype=np.float64)
        means = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], overall)
        noise = 1 + 1 / np.where(count > 0, np.maximum(count, 1), len(fitted))
        for start in range(0, len(judged), _ROWS_AT_ONCE):
            part = judged[start : start + _ROWS_AT_ONCE]
            seen, label = pictures[part].astype(np.float64), first[part]
            within += float((((seen - means[label]) ** 2).sum(axis=1) / noise[label]).sum())
            total += float(((seen - overall) ** 2).sum() / (1 + 1 / len(fitted)))
    return 1 - within / total if total > 0 else 0.0


# --- as a bank ---------------------------------------------------------------------------------------------


def adapted_bank(bank: LabelBank, rows: NDArray[np.float32], space: str) -> LabelBank:
    """Return the bank with other rows.

    It names no text tower any more: vectors of texts are looked up by it, and these are none.

    Args:
        bank: as it was, perhaps without a space.
        rows: ``(N, E)``.
        space: embedding space of the pictures in them.
    """
    return LabelBank(bank.labels, rows, bank.templates, space=space, truncated=bank.truncated)


def bank_file(bank: LabelBank, about: Mapping[str, Any]) -> bytes:
    """Return the file of an adapted bank: an ordinary one that says in its metadata how it was made."""
    tensors, metadata = read_tensors(bank.to_bytes())
    said = json.dumps(about, ensure_ascii=False, sort_keys=True)
    return seal(tensors, {**metadata, _ABOUT: said})


def read_about(content: bytes) -> dict[str, Any] | None:
    """Return how an adapted bank was made; ``None`` where a bank file does not say that it was.

    Raises:
        InputError: the file is damaged.
    """
    _, metadata = read_tensors(content, where="label bank", error=InputError)
    if _ABOUT not in metadata:
        return None
    said: dict[str, Any] = json.loads(metadata[_ABOUT])
    return said
