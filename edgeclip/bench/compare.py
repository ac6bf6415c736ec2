"""Which of two targets is faster, measured in turns in fresh processes, with a verdict at a stated effect.

The plan: the budget is divided among launches (see :mod:`edgeclip.bench.verdict`), each a fresh process that
opens both targets and times them in turns on the same pictures. There are two looks at the
results, halfway and at the end, whose permitted errors are fixed before anything is measured; a verdict that
is clear halfway ends the comparison.

Launches come in pairs, of which one opens A first and the other B, drawn at random which: at each look both
orders are equally often there but for one launch at most, so that what the first to open has of it (its place
in memory, warm caches) cancels. Such an effect adds to how launches differ and so to the width of the
interval, which is computed as if orders had been drawn freely, and is too wide rather than too narrow.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct, field

from edgeclip import errors
from edgeclip.bench.compare_child import COMPARED, Failure, LabelsAsked, SideTold, Task, Told
from edgeclip.bench.report import END_TO_END
from edgeclip.bench.verdict import (
    MIN_LAUNCHES,
    Judgement,
    Launch,
    conclude,
)
from edgeclip.errors import BackendError, BundleError, ConfigError, EdgeClipError, InputError
from edgeclip.runtime.documents import Document
from edgeclip.runtime.host import UNAVAILABLE, Host, versions
from edgeclip.runtime.latency_report import Ms, Share, Unavailable
from edgeclip.tables import aligned

if TYPE_CHECKING:
    from edgeclip.bench.targets import Target

__all__ = [
    "BUNDLE_LABELS",
    "DEFAULT_BUDGET_S",
    "DEFAULT_EFFECT",
    "MAX_LAUNCHES",
    "BenchComparison",
    "ComparePlan",
    "LaunchEntry",
    "Progress",
    "RatioEntry",
    "SideEntry",
    "compare",
    "compare_schema",
    "run_launch",
]

SCHEMA_ID: Final = "urn:edgeclip:bench-comparison:1"
BUNDLE_LABELS: Final = LabelsAsked()
DEFAULT_EFFECT: Final = 0.05
DEFAULT_BUDGET_S: Final = 60.0
MAX_LAUNCHES: Final = 20
_LEAST_S: Final = 0.2
"""A launch measures at least so long."""
_START_SHARE: Final = 0.4
"""Starting processes takes at most this share of the budget, where fewer of them allow that."""
_MOST_S: Final = 1800.0
"""No larger budget is proposed."""
_TAIL_CHARS: Final = 300

Positive = Annotated[float, Meta(gt=0)]
Progress = Callable[[int, int], None]
"""Called after each launch with how many are done and how many there will be at most."""


@dataclass(frozen=True)
class ComparePlan:
    """What is compared, and how hard to look.

    Attributes:
        a: what is compared with.
        b: what the verdict is about.
        pictures: picture files, classified over and over.
        stage: ``end_to_end``, from the bytes of a file to labels, or one stage of it. ``tokenize`` and
            ``text_tower`` are timed on the names of the labels.
        labels: what is offered; those of each bundle, without.
        effect: smallest difference that matters, 0.05 for 5 %.
        budget_s: how long it may take in all.
        processes: launches; ``None`` for as many as the budget carries well.
        seed: of all that is random.

    Raises:
        ConfigError: a value is out of range.
        InputError: there are no pictures.
    """

    a: Target
    b: Target
    pictures: Sequence[Path]
    stage: str = END_TO_END
    labels: LabelsAsked = BUNDLE_LABELS
    effect: float = DEFAULT_EFFECT
    budget_s: float = DEFAULT_BUDGET_S
    processes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stage not in COMPARED:
            raise ConfigError(f"stage: got {self.stage!r}, expected one of {', '.join(COMPARED)}.")
        if not 0.001 <= self.effect <= 10:
            raise ConfigError(f"effect: got {self.effect!r}, expected 0.001 to 10, such as 0.05 for 5 %.")
        if not (math.isfinite(self.budget_s) and self.budget_s > 0):
            raise ConfigError(f"budget: got {self.budget_s!r} s, expected more than 0.")
        if self.processes is not None and self.processes < MIN_LAUNCHES:
            raise ConfigError(
                f"processes: got {self.processes!r}, expected at least {MIN_LAUNCHES} for an interval."
            )
        if not self.pictures:
            raise InputError("pictures: got none, expected at least one.")


# --- the document ------------------------------------------------------------------------------------------


class SideEntry(Struct, frozen=True, kw_only=True):
    """One of the two: what ran, and the median of its ``n`` samples in milliseconds a picture."""

    name: str
    bundle: str
    digest: str
    variant: str
    placement: dict[str, Any]
    batch: Annotated[int, Meta(ge=1)]
    labels: Annotated[int, Meta(ge=1)]
    n: Annotated[int, Meta(ge=1)]
    median_ms: Ms


class LaunchEntry(Struct, frozen=True, kw_only=True):
    """One fresh process. Samples are milliseconds a picture, turn after turn of ``units`` samples.

    ``blocks`` has the order of the turns of each block of four; ``ratio`` is what this launch says.
    """

    opened_first: Literal["a", "b"]
    blocks: tuple[Literal["abba", "baab"], ...]
    units: Annotated[int, Meta(ge=1)]
    start_s: Annotated[float, Meta(ge=0)]
    measured_s: Annotated[float, Meta(ge=0)]
    ratio: Positive
    a_samples_ms: tuple[Ms, ...]
    b_samples_ms: tuple[Ms, ...]
    steal_share: Share | Unavailable = UNAVAILABLE

    def samples(self) -> Launch:
        """Return the samples as :mod:`edgeclip.bench.verdict` takes them."""
        shape = (len(self.blocks), 2, self.units)
        return Launch(
            np.array(self.a_samples_ms, np.float64).reshape(shape),
            np.array(self.b_samples_ms, np.float64).reshape(shape),
            self.steal_share if isinstance(self.steal_share, float) else None,
        )


class RatioEntry(Struct, frozen=True, kw_only=True):
    """Time of b over time of a. ``confidence`` is that of this look; all looks together keep 98 %."""

    value: Positive
    low: Positive
    high: Positive
    confidence: Annotated[float, Meta(gt=0, lt=1)]


class BenchComparison(Document, frozen=True, kw_only=True):
    """Two targets, what was measured of them, and the verdict. Made by :func:`compare`."""

    schema: Literal[1] = 1
    kind: Literal["bench-comparison"] = "bench-comparison"
    created: str
    verdict: Literal["faster", "slower", "same", "inconclusive"]
    reasons: tuple[str, ...] = ()
    ratio: RatioEntry
    effect: Positive
    stage: str
    a: SideEntry
    b: SideEntry
    pictures: Annotated[int, Meta(ge=1)]
    pictures_digest: str
    budget_s: Positive
    used_s: Positive
    planned_launches: Annotated[int, Meta(ge=1)]
    launches: Annotated[tuple[LaunchEntry, ...], Meta(min_length=1)]
    drift: float | None
    steal_share: Share | Unavailable = UNAVAILABLE
    seed: int = 0
    host: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def sentence(self) -> str:
        """Return the verdict with what it rests on."""
        reach = f"{_change(self.ratio.low)} to {_change(self.ratio.high)}"
        if self.verdict == "same":
            return f"same: whatever B differs by is less than {_percent(self.effect)} ({reach})"
        if self.verdict != "inconclusive":
            return f"{self.verdict}: B takes {_change(self.ratio.value)} ({reach})"
        if self.reasons:
            return f"inconclusive: {'; '.join(self.reasons)}; measure again when the machine is quiet"
        enough_s = self._enough_s()
        advice = (
            f"--budget {enough_s:.0f}s may do"
            if enough_s <= _MOST_S
            else "measure on a machine that is quieter"
        )
        undecided = f"{reach} neither excludes a difference nor one of {_percent(self.effect)}"
        return f"inconclusive: {undecided}; {advice}"

    def to_table(self) -> str:
        """Return the comparison as text for a terminal."""
        rows = [("", "p50 ms", "n", "variant", "threads", "target")]
        for mark, side in (("A", self.a), ("B", self.b)):
            threads = str(side.placement.get("threads", "-"))
            rows.append((mark, f"{side.median_ms:.3f}", f"{side.n:,}", side.variant, threads, side.name))
        ratio = self.ratio
        drift = "-" if self.drift is None else f"{self.drift:+.1%}"
        steal = f"{self.steal_share:.1%}" if isinstance(self.steal_share, float) else self.steal_share
        measured = (
            f"B / A: {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f} at {ratio.confidence:.1%}), "
            f"{self.stage}, {len(self.launches)} processes, {self.used_s:.0f} s"
        )
        lines = [*aligned(rows, (1, 2, 4)), measured, f"drift {drift}, steal {steal}", self.sentence()]
        return "\n".join(lines)

    def _enough_s(self) -> float:
        """Return the budget with which the interval would be as narrow as a verdict needs, at most."""
        reach = math.log(self.ratio.high / self.ratio.low) / 2
        needed = math.log1p(self.effect) / 2
        more = self.used_s * max(1.5, (reach / needed) ** 2)
        return math.ceil(max(more, 2 * self.budget_s) / 10) * 10.0


def compare_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a comparison."""
    schema: dict[str, Any] = json.loads(msgspec.json.encode(msgspec.json.schema(BenchComparison)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "edgeclip bench comparison, schema 1",
        **schema,
    }


# --- measuring ---------------------------------------------------------------------------------------------

Launcher = Callable[[Task], Told]


def compare(
    plan: ComparePlan, *, on_progress: Progress | None = None, launcher: Launcher | None = None
) -> BenchComparison:
    """Compare two targets.

    Args:
        plan: what, and how hard to look.
        on_progress: called after each launch.
        launcher: does a task; a fresh process each time, without.

    Raises:
        ConfigError: the budget is too small for what opening the targets takes.
        EdgeClipError: a target cannot be opened or fails.
    """
    run = run_launch if launcher is None else launcher
    rng = random.Random(plan.seed)  # noqa: S311 - an order of measurements, not a secret
    order = random.Random(f"opened first, {plan.seed}")  # noqa: S311 - as above
    task = Task(
        a=asdict(plan.a),
        b=asdict(plan.b),
        stage=plan.stage,
        pictures=tuple(map(str, plan.pictures)),
        labels=plan.labels,
        measure_s=0.0,
        seed=rng.getrandbits(32),
    )
    run(task)  # engines may be compiled and labels encoded: for good, and not at the cost of the budget
    began = perf_counter()
    told: list[Told] = []
    starts_s: list[float] = []
    openings: list[Literal["a", "b"]] = []
    planned = plan.processes or MAX_LAUNCHES
    measure_s = max(_LEAST_S, plan.budget_s / planned / 2)
    while True:
        if not openings:
            openings = order.sample(("a", "b"), 2)
        task = msgspec.structs.replace(
            task, measure_s=measure_s, opened_first=openings.pop(), seed=rng.getrandbits(32)
        )
        launched = perf_counter()
        told.append(run(task))
        now = perf_counter()
        starts_s.append(max(0.0, now - launched - told[-1].measured_s))
        _check_same(told[0], told[-1])
        left_s = plan.budget_s - (now - began)
        if len(told) == 1:
            planned = _planned(plan, starts_s[0], told[0])
        if on_progress is not None:
            on_progress(len(told), planned)
        judgement = conclude(
            list(map(_samples, told)), planned, effect=plan.effect, seed=plan.seed, out_of_time=left_s <= 0
        )
        if judgement is not None:
            break
        each_s = left_s / (planned - len(told))
        measure_s = max(_LEAST_S, each_s - float(np.median(starts_s)))
    return _document(plan, told, starts_s, judgement, planned, perf_counter() - began)


def run_launch(task: Task) -> Told:
    """Do a task in a fresh process.

    Raises:
        EdgeClipError: what the process reports.
        BackendError: it ended without a report.
    """
    # The parent's path and not the folder at hand, which may hold files that are named like modules.
    program = "import sys; sys.path[:] = sys.argv[1:]; from edgeclip.bench.compare_child import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *sys.path],
        input=msgspec.json.encode(task),
        capture_output=True,
        check=False,
    )
    try:
        said: Told | Failure = msgspec.json.decode(done.stdout, type=Told | Failure)
    except msgspec.DecodeError as error:
        heard = " ".join(done.stderr.decode("utf-8", "replace").split())[-_TAIL_CHARS:]
        raise BackendError(
            f"a process ended with {done.returncode} and without a result ({heard or 'silently'}). "
            "Both targets must fit into memory together; bench each alone to see which fails."
        ) from error
    if isinstance(said, Failure):
        kind = getattr(errors, said.kind, EdgeClipError)
        raise kind(said.error) if kind is not errors.MissingExtraError else EdgeClipError(said.error)
    return said


def _planned(plan: ComparePlan, start_s: float, first: Told) -> int:
    """Return how many launches the budget carries.

    Raises:
        ConfigError: too few for an interval, or fewer than were asked for.
    """
    least_s = start_s + max(_LEAST_S, first.measured_s / len(first.blocks))
    count = plan.processes
    if count is None:
        count = min(MAX_LAUNCHES, max(MIN_LAUNCHES, int(_START_SHARE * plan.budget_s / max(start_s, 1e-3))))
    if count * least_s > plan.budget_s:
        raise ConfigError(
            f"budget: got {plan.budget_s:g} s, expected at least {math.ceil(1.2 * count * least_s)} s: "
            f"{count} processes are needed, and each takes {least_s:.1f} s to open both targets and use them."
        )
    return count


def _check_same(first: Told, now: Told) -> None:
    for before, after in ((first.a, now.a), (first.b, now.b)):
        what = [(side.digest, side.variant, side.placement.get("backend")) for side in (before, after)]
        if what[0] != what[1]:
            raise BundleError(
                f"bundle {after.bundle!r} changed while it was compared: got variant {after.variant!r} of "
                f"{after.digest[:12]} on {what[1][2]!r}, expected {before.variant!r} of {before.digest[:12]} "
                f"on {what[0][2]!r}. Compare again."
            )


def _samples(told: Told) -> Launch:
    shape = (len(told.blocks), 2, told.units)
    return Launch(
        np.array(told.a.samples_ms, np.float64).reshape(shape),
        np.array(told.b.samples_ms, np.float64).reshape(shape),
        told.steal_share,
    )


def _document(
    plan: ComparePlan,
    told: Sequence[Told],
    starts_s: Sequence[float],
    judgement: Judgement,
    planned: int,
    used_s: float,
) -> BenchComparison:
    found = judgement.interval
    digest = hashlib.sha256()
    for picture in plan.pictures:
        digest.update(hashlib.sha256(picture.read_bytes()).digest())
    return BenchComparison(
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        verdict=judgement.verdict,
        reasons=judgement.reasons,
        ratio=RatioEntry(value=found.ratio, low=found.low, high=found.high, confidence=found.confidence),
        effect=plan.effect,
        stage=plan.stage,
        a=_side(plan.a, [each.a for each in told]),
        b=_side(plan.b, [each.b for each in told]),
        pictures=len(plan.pictures),
        pictures_digest=digest.hexdigest(),
        budget_s=plan.budget_s,
        used_s=used_s,
        planned_launches=planned,
        launches=tuple(
            LaunchEntry(
                opened_first=each.opened_first,
                blocks=each.blocks,
                units=each.units,
                start_s=start_s,
                measured_s=each.measured_s,
                ratio=math.exp(_samples(each).log_ratio),
                a_samples_ms=each.a.samples_ms,
                b_samples_ms=each.b.samples_ms,
                steal_share=UNAVAILABLE if each.steal_share is None else each.steal_share,
            )
            for each, start_s in zip(told, starts_s, strict=True)
        ),
        drift=judgement.drift,
        steal_share=UNAVAILABLE if judgement.steal_share is None else judgement.steal_share,
        seed=plan.seed,
        host=Host.here().to_dict(),
        versions=versions(),
    )


def _side(target: Target, told: Sequence[SideTold]) -> SideEntry:
    samples = [ms for each in told for ms in each.samples_ms]
    return SideEntry(
        name=target.name,
        bundle=told[0].bundle,
        digest=told[0].digest,
        variant=told[0].variant,
        placement=told[0].placement,
        batch=target.batch,
        labels=told[0].labels,
        n=len(samples),
        median_ms=float(np.median(samples)),
    )


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.1%}" if ratio < 2 else f"{ratio:.2f} times"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
