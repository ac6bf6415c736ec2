"""Samples of two things in, a verdict out: which one is faster, or why that cannot be told.

What is compared is measured in several fresh processes, *launches*, because what differs between two starts
of one program (where its code and buffers lie, which threads share a core) stays the same while it runs and
would otherwise look like a difference between the two. One launch says one number: the trimmed mean of the
log ratios of calls that followed each other closely on the same pictures. Samples close in time are alike,
so nothing is inferred from their number: the interval comes from how launches differ.

The interval is a symmetric bootstrap-t interval of the trimmed mean over launches (Wilcox, Introduction to
Robust Estimation and Hypothesis Testing, 3rd ed., §4.4), with the Tukey-McLaughlin standard error. One launch
in five on each side may be disturbed at will.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from edgeclip.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "CONFIDENCE",
    "MAX_DRIFT",
    "MAX_STEAL_SHARE",
    "MIN_LAUNCHES",
    "Interval",
    "Judgement",
    "Launch",
    "Verdict",
    "conclude",
    "interval",
    "judge",
    "judge_launches",
]

Verdict: TypeAlias = Literal["faster", "slower", "same", "inconclusive"]

CONFIDENCE: Final = 0.98
"""Of a whole comparison, all looks together: two identical things are called different in 2 % at most."""
MIN_LAUNCHES: Final = 8
"""Below it the resamples of the trimmed mean are too few different ones for a 98 % interval."""
MAX_STEAL_SHARE: Final = 0.05
MAX_DRIFT: Final = 0.25

_TRIM: Final = 0.2
_DRAWS: Final = 5_000
# Part of the launches after which there is an early look, and its share of the permitted errors.
_EARLY: Final = 0.5
_EARLY_ERRORS: Final = 0.2


@dataclass(frozen=True, eq=False)
class Launch:
    """What one fresh process measured.

    Attributes:
        a_ms: milliseconds a picture, ``(blocks, 2, units)``: in every block each side had two turns, and in
            each turn it handled the same ``units`` pictures or batches one after the other.
        b_ms: the same of the other side.
        steal_share: of the machine's time meanwhile; ``None`` where not told.
    """

    a_ms: NDArray[np.float64]
    b_ms: NDArray[np.float64]
    steal_share: float | None = None

    @property
    def log_ratio(self) -> float:
        """Trimmed mean over pictures and blocks of the log of ``b`` over ``a``."""
        pairs = _log(self.b_ms).mean(axis=1) - _log(self.a_ms).mean(axis=1)
        return float(_trimmed(pairs.reshape(1, -1))[0][0])

    @property
    def log_speed(self) -> float:
        """Trimmed mean of the log of all times: how fast the machine was."""
        return float(_trimmed(_log(np.stack([self.a_ms, self.b_ms])).reshape(1, -1))[0][0])


@dataclass(frozen=True)
class Interval:
    """Time of ``b`` over time of ``a``, and what covers it with ``confidence``."""

    ratio: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it stands on.

    Attributes:
        verdict: ``slower`` and ``faster`` are said of ``b``.
        interval: of the ratio.
        drift: change of the machine's speed from the first third of the launches to the last, 0.1 for 10 %
            slower; ``None`` below six launches.
        steal_share: of the machine's time; ``None`` where not told.
        reasons: what disturbed the run so much that no verdict is given.
    """

    verdict: Verdict
    interval: Interval
    drift: float | None = None
    steal_share: float | None = None
    reasons: tuple[str, ...] = ()


def interval(log_ratios: Sequence[float] | NDArray[np.float64], confidence: float, *, seed: int) -> Interval:
    """Return the trimmed mean of log ratios of launches as a ratio, with its bootstrap-t interval.

    Raises:
        ConfigError: fewer than eight launches.
    """
    logs = np.asarray(log_ratios, np.float64)
    if len(logs) < MIN_LAUNCHES:
        raise ConfigError(f"interval: got {len(logs)} launches, expected at least {MIN_LAUNCHES}.")
    (mean,), (error,) = _trimmed(logs[None])
    rng = np.random.default_rng(seed)
    means, errors = _trimmed(logs[rng.integers(len(logs), size=(_DRAWS, len(logs)))])
    # A resample of few different launches may have no spread: it counts as far away.
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(np.abs(means - mean) / errors, nan=0.0, posinf=math.inf)
    reach = float(np.quantile(t, confidence, method="higher")) * float(error) if error else 0.0
    low, ratio, high = (math.exp(max(-50.0, min(50.0, mean + side))) for side in (-reach, 0.0, reach))
    return Interval(ratio, low, high, confidence)


def judge(found: Interval, effect: float) -> Verdict:
    """Return what an interval says about ``b``.

    * ``same``: all of it lies within the effect, so whatever difference there is, is smaller;
    * ``slower``, ``faster``: all of it lies on one side of 1, and it reaches beyond the effect there. The
      ratio itself is then beyond half the effect;
    * ``inconclusive``: neither.

    Args:
        found: the interval.
        effect: smallest difference that matters, 0.05 for 5 %.
    """
    if 1 / (1 + effect) < found.low and found.high < 1 + effect:
        return "same"
    if found.low > 1:
        return "slower"
    if found.high < 1:
        return "faster"
    return "inconclusive"


def judge_launches(
    launches: Sequence[Launch], *, effect: float, confidence: float = CONFIDENCE, seed: int = 0
) -> Judgement:
    """Return the verdict of launches; a run that was disturbed is inconclusive.

    Raises:
        ConfigError: fewer than eight launches.
    """
    found = interval([launch.log_ratio for launch in launches], confidence, seed=seed)
    drift = _drift([launch.log_speed for launch in launches])
    shares = [launch.steal_share for launch in launches if launch.steal_share is not None]
    steal_share = float(np.mean(shares)) if shares else None
    reasons = []
    if steal_share is not None and steal_share > MAX_STEAL_SHARE:
        reasons.append(f"the hypervisor gave {steal_share:.0%} of the time to others")
    if drift is not None and abs(math.log1p(drift)) > math.log1p(MAX_DRIFT):
        reasons.append(f"the machine's times changed by {drift:+.0%} meanwhile")
    verdict = "inconclusive" if reasons else judge(found, effect)
    return Judgement(verdict, found, drift, steal_share, tuple(reasons))


def conclude(
    launches: Sequence[Launch],
    planned: int,
    *,
    effect: float,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    out_of_time: bool = False,
) -> Judgement | None:
    """Return the judgement with which a comparison ends after these launches; ``None`` if it goes on.

    There are two looks, halfway and at the end. Their permitted errors are fixed beforehand and add up to
    those of the whole at most, however the looks depend on each other (Bonferroni). There is no early look
    where it would see fewer than eight launches.

    Args:
        launches: so far.
        planned: how many there were to be.
        effect: see :func:`judge`.
        confidence: of the whole comparison.
        seed: of the bootstrap.
        out_of_time: end here in any case, once there are eight launches.
    """
    early = math.ceil(_EARLY * planned)
    early = planned if early < MIN_LAUNCHES else early
    last = len(launches) >= planned or (out_of_time and len(launches) >= MIN_LAUNCHES)
    if not last and len(launches) != early:
        return None
    spent = 1.0 if early == planned else 1 - _EARLY_ERRORS if last else _EARLY_ERRORS
    judgement = judge_launches(launches, effect=effect, confidence=1 - (1 - confidence) * spent, seed=seed)
    return judgement if last or judgement.verdict != "inconclusive" else None


def _drift(log_speeds: Sequence[float]) -> float | None:
    third = len(log_speeds) // 3
    if third < 2:
        return None
    return math.expm1(float(np.median(log_speeds[-third:]) - np.median(log_speeds[:third])))


def _trimmed(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the trimmed mean of each row, and its standard error from the winsorized variance."""
    ordered = np.sort(rows, axis=-1)
    n = ordered.shape[-1]
    cut = int(_TRIM * n)
    kept = n - 2 * cut
    means = ordered[:, cut : n - cut].mean(axis=-1)
    if kept < 2:
        return means, np.zeros(len(rows))
    winsorized = np.clip(ordered, ordered[:, cut, None], ordered[:, n - cut - 1, None])
    return means, np.sqrt((n - 1) * winsorized.var(axis=-1, ddof=1) / (kept * (kept - 1)))


def _log(times_ms: NDArray[np.float64]) -> NDArray[np.float64]:
    logs: NDArray[np.float64] = np.log(np.maximum(times_ms, 1e-9))  # 1e-9: one picosecond, never a zero
    return logs
