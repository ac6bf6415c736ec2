"""How often `edgeclip bench compare` is wrong, and how often it sees a slow-down of 5 %.

Four parts:

* record: launches of the bundle against itself, alone on the machine and beside a load that comes and goes
  (a program for each core, busy and idle for random times), as long and as many as a comparison of 60 s has.
* simulate: comparisons of 60 s drawn from what was recorded. Runs of neighbouring launches are drawn, and in
  them runs of neighbouring blocks, so that what lies close in time stays together. A and B, which are the
  same thing, change places at random, so that nothing differs in truth. Once as they are, once
  with every time of B 5 % longer, once with a constant added to B that is 5 % of the median. The launches of
  the machine at rest are also drawn with its speed drifting by 20 %, and with spikes on one call in 20.
* known: launches drawn from distributions whose spread over processes is known, normal and with the long
  tails of Student's t with 3 degrees of freedom: which spread a machine may have.
* live: whole comparisons, of the bundle against itself and against itself with a busy wait after every call
  that takes 5 % of the processor time of the call (one thread), with a shorter budget.

Bars, at the default budget: false alarms (faster or slower where nothing differs) at most 2 %, also beside a
load; slow-downs of 5 % seen in at least 90 % where the machine is ours alone.

    python benchmarks/compare_power.py              # about 75 minutes, on a machine that does nothing else
    python benchmarks/compare_power.py --quick      # about 10 minutes: shows that it works, no more
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from written import ROOT, write

from edgeclip.bench.compare import MAX_LAUNCHES, ComparePlan, compare, run_launch
from edgeclip.bench.compare_child import LabelsAsked, Task, Told, launch
from edgeclip.bench.targets import Target, open_target, parse_target
from edgeclip.bench.verdict import Launch, conclude
from edgeclip.runtime.latency import Clock

EFFECT = 0.05
MAX_FALSE_ALARMS, MIN_SEEN = 0.02, 0.90
RESULTS = ROOT / "benchmarks" / "results"
PHOTOS = ROOT / "edgeclip" / "assets" / "photos"
VERDICTS = ("same", "slower", "faster", "inconclusive")
_NEIGHBOURS = 4  # launches that are drawn together
_BLOCKS = 5  # blocks that are drawn together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="default,threads=1")
    parser.add_argument("--output", type=Path, default=RESULTS / "compare_power.json")
    parser.add_argument("--launches", type=int, default=120, help="recorded with and without load, each")
    parser.add_argument("--comparisons", type=int, default=2000, help="simulated for each number")
    parser.add_argument("--live", type=int, default=60, help="live comparisons of each kind; 0 for none")
    parser.add_argument("--live-budget", type=float, default=25.0, metavar="SECONDS")
    parser.add_argument("--recorded", type=Path, help="take launches from this result and record none")
    parser.add_argument("--known-only", action="store_true", help="nothing but distributions; any machine")
    parser.add_argument("--quick", action="store_true", help="16 launches, 200 simulated, 3 live of 20 s")
    parser.add_argument("--slowed-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.slowed_child:
        slowed_child()
        return
    if options.quick:
        options.launches, options.comparisons, options.live, options.live_budget = 16, 200, 3, 20.0
    if options.known_only:
        write(options.output, {"effect": EFFECT, "known": simulate_known(options.comparisons)})
        return
    target = parse_target(options.target)
    if options.recorded is None:
        recorded = {"alone": record(target, options.launches)}
        with coming_and_going_load():
            recorded["beside a load"] = record(target, options.launches)
    else:
        recorded = json.loads(options.recorded.read_text(encoding="utf-8"))["recorded"]
    found: dict[str, Any] = {
        "measures": "verdicts of `edgeclip bench compare` where nothing differs and where B is slower",
        "bar": f"at 60 s: false alarms ≤ {MAX_FALSE_ALARMS:.0%}, 5 % seen ≥ {MIN_SEEN:.0%}",
        "passed": None,
        "target": options.target,
        "effect": EFFECT,
        "budget_s": 60,
        "spread": {name: spread(rows) for name, rows in recorded.items()},
        "simulated": None,
        "known": None,
        "live": None,
        "recorded": recorded,
    }
    write(options.output, found, show=False)  # what took long is kept whatever follows
    simulated = found["simulated"] = simulate(recorded, options.comparisons)
    found["known"] = simulate_known(options.comparisons)
    found["passed"] = all(
        kinds["nothing differs"]["false_alarms"] <= MAX_FALSE_ALARMS
        and (
            not scene.startswith("alone")
            or all(kind["slower"] >= MIN_SEEN for kind in list(kinds.values())[1:])
        )
        for scene, kinds in simulated.items()
    )
    write(options.output, found, show=False)
    if options.live:
        found["live"] = check_live(target, options.live, options.live_budget)
        write(options.output, found, show=False)
    print(json.dumps({name: found[name] for name in ("spread", "simulated", "known", "live")}, indent=1))


# --- recording ---------------------------------------------------------------------------------------------


def record(target: Target, count: int) -> list[dict[str, Any]]:
    """Return launches of a target against itself, as long as those of a comparison of 60 s."""
    rows: list[dict[str, Any]] = []
    measure_s = 1.5
    for number in range(count):
        began = time.perf_counter()
        told = run_launch(task(target, measure_s, seed=number))
        start_s = time.perf_counter() - began - told.measured_s
        if number == 0:
            planned = min(MAX_LAUNCHES, max(8, int(0.4 * 60 / start_s)))
            measure_s = max(0.2, 60 / planned - start_s)
        rows.append(
            {
                "blocks": len(told.blocks),
                "units": told.units,
                "opened_first": told.opened_first,
                "start_s": round(start_s, 3),
                "planned": planned,
                "steal_share": told.steal_share,
                "a_ms": [round(ms, 4) for ms in told.a.samples_ms],
                "b_ms": [round(ms, 4) for ms in told.b.samples_ms],
            }
        )
        print(f"\rrecorded {number + 1} of {count} launches", end="", file=sys.stderr)
    print(file=sys.stderr)
    return rows


def task(target: Target, measure_s: float, seed: int) -> Task:
    return Task(
        a=asdict(target),
        b=asdict(target),
        stage="end_to_end",
        pictures=tuple(map(str, sorted(PHOTOS.glob("*.jpg")))),
        labels=LabelsAsked(),
        measure_s=measure_s,
        opened_first="b" if seed % 2 else "a",  # balanced, as comparisons are
        seed=seed,
    )


@contextmanager
def coming_and_going_load() -> Iterator[None]:
    """Keep each core busy for random times, half of the time."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=busy_at_times, args=(seed,), daemon=True)
        for seed in range(multiprocessing.cpu_count())
    ]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def busy_at_times(seed: int) -> None:
    """Multiply matrices and sleep in turns, each for half a second on average, now and then for long."""
    rng = random.Random(seed)
    matrix = np.random.default_rng(seed).standard_normal((256, 256))
    while True:
        until = time.perf_counter() + rng.lognormvariate(-1.2, 1.0)
        while time.perf_counter() < until:
            matrix = np.tanh(matrix @ matrix)
        time.sleep(rng.lognormvariate(-1.2, 1.0))


def spread(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Say how launches differ, and how much of that differences within launches explain.

    ``within`` is the standard deviation of a launch's ratio that its own blocks let expect, from halves of a
    launch; ``between`` is what is seen over launches.
    """
    launches = [launch_of(row) for row in rows]
    ratios = np.array([each.log_ratio for each in launches])
    halves = np.array(
        [
            part(each, np.arange(0, len(each.a_ms), 2)).log_ratio
            - part(each, np.arange(1, len(each.a_ms), 2)).log_ratio
            for each in launches
            if len(each.a_ms) > 1
        ]
    )
    neighbours = np.corrcoef(ratios[:-1], ratios[1:])[0, 1]
    opened = np.array([1 if row["opened_first"] == "a" else -1 for row in rows])
    return {
        "launches": len(rows),
        "median_ms": round(float(np.median(np.concatenate([each.a_ms.ravel() for each in launches]))), 4),
        "mean_log_ratio": round(float(ratios.mean()), 5),
        "between": round(float(robust_sd(ratios)), 5),
        "within": round(float(robust_sd(halves) / 2), 5),
        "correlation_of_neighbours": round(float(neighbours), 3),
        "opened_first_log_ratio": round(float((ratios * opened).mean()), 5),
        "steal_share": round(float(np.mean([row["steal_share"] or 0.0 for row in rows])), 4),
    }


def robust_sd(values: NDArray[np.float64]) -> float:
    """Return 1.4826 times the median distance from the median."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


# --- simulating --------------------------------------------------------------------------------------------


def simulate(recorded: dict[str, list[dict[str, Any]]], count: int) -> dict[str, Any]:
    """Return the verdicts of simulated comparisons by scene and kind."""
    found = {}
    scenes = {**{name: (name, None) for name in recorded}}
    scenes["alone, drifting by 20 %"] = ("alone", drifting)
    scenes["alone, one call in 20 a spike"] = ("alone", spiky)
    for scene, (name, change) in scenes.items():
        launches = [launch_of(row) for row in recorded[name]]
        planned = int(np.median([row["planned"] for row in recorded[name]]))
        typical = float(np.median(np.concatenate([each.a_ms.ravel() for each in launches])))
        kinds = {
            "nothing differs": lambda each: each,
            "every time 5 % longer": lambda each: replace(each, b_ms=each.b_ms * (1 + EFFECT)),
            "5 % of the median added": lambda each, typical=typical: replace(
                each, b_ms=each.b_ms + EFFECT * typical
            ),
        }
        found[scene] = {}
        for kind, slow in kinds.items():
            rng = np.random.default_rng([len(scene), len(kind)])
            verdicts = []
            for number in range(count):
                drawn = drawn_launches(launches, planned, rng)
                drawn = drawn if change is None else change(drawn, rng)
                verdicts.append(verdict([slow(each) for each in drawn], number))
                if number % 50 == 0:
                    print(f"\r{scene}, {kind}: {number} of {count}\x1b[K", end="", file=sys.stderr)
            found[scene][kind] = rates(verdicts)
        print(file=sys.stderr)
    return found


def simulate_known(count: int) -> dict[str, Any]:
    """Return verdicts by distribution, number of processes and standard deviation of their ratios."""
    found: dict[str, Any] = {}
    distributions = {
        "normal": lambda rng, n: rng.standard_normal(n),
        "t of 3": lambda rng, n: rng.standard_t(3, n) / math.sqrt(3),
    }
    for name, draw in distributions.items():
        for processes in (20, 8):
            for percent in (2, 4, 6):
                rng = np.random.default_rng([percent, processes])
                kinds = {"nothing differs": 0.0, "5 % slower": math.log1p(EFFECT)}
                row = f"{name}, {processes} processes, {percent} %"
                found[row] = {}
                for kind, shift in kinds.items():
                    verdicts = [
                        verdict(
                            [
                                Launch(np.ones((1, 2, 1)), np.full((1, 2, 1), math.exp(log)))
                                for log in shift + percent / 100 * draw(rng, processes)
                            ],
                            number,
                        )
                        for number in range(count)
                    ]
                    found[row][kind] = rates(verdicts)
                print(f"\rknown: {row}\x1b[K", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def verdict(launches: Sequence[Launch], seed: int) -> tuple[str, int]:
    """Return what a comparison that meets these launches ends with, and after how many."""
    for done in range(1, len(launches) + 1):
        judgement = conclude(launches[:done], len(launches), effect=EFFECT, seed=seed)
        if judgement is not None:
            return judgement.verdict, done
    raise AssertionError("a comparison ends with its last launch")


def drawn_launches(launches: Sequence[Launch], count: int, rng: np.random.Generator) -> list[Launch]:
    """Return launches drawn in runs of neighbours, and in each of them blocks drawn in runs."""
    drawn: list[Launch] = []
    while len(drawn) < count:
        start = rng.integers(len(launches))
        for step in range(min(_NEIGHBOURS, count - len(drawn))):
            chosen = launches[(start + step) % len(launches)]
            blocks = len(chosen.a_ms)
            starts = rng.integers(blocks, size=math.ceil(blocks / _BLOCKS))
            places = ((starts[:, None] + np.arange(_BLOCKS)) % blocks).ravel()[:blocks]
            one = part(chosen, places)
            drawn.append(replace(one, a_ms=one.b_ms, b_ms=one.a_ms) if rng.random() < 0.5 else one)
    return drawn


def part(whole: Launch, places: NDArray[np.intp]) -> Launch:
    return replace(whole, a_ms=whole.a_ms[places], b_ms=whole.b_ms[places])


def drifting(launches: Sequence[Launch], rng: np.random.Generator) -> list[Launch]:
    """Return launches of a machine that gets slower or faster by 20 % on the way."""
    way = np.linspace(0, 0.2 * rng.choice((-1, 1)), len(launches))
    return [
        replace(each, a_ms=each.a_ms * (1 + slower), b_ms=each.b_ms * (1 + slower))
        for each, slower in zip(launches, way, strict=True)
    ]


def spiky(launches: Sequence[Launch], rng: np.random.Generator) -> list[Launch]:
    """Return launches in which one call in 20 takes two to ten times as long."""

    def struck(times_ms: NDArray[np.float64]) -> NDArray[np.float64]:
        hit = rng.random(times_ms.shape) < 0.05
        longer: NDArray[np.float64] = np.where(hit, rng.uniform(2, 10, times_ms.shape), 1.0)
        return times_ms * longer

    return [replace(each, a_ms=struck(each.a_ms), b_ms=struck(each.b_ms)) for each in launches]


def launch_of(row: dict[str, Any]) -> Launch:
    shape = (row["blocks"], 2, row["units"])
    return Launch(np.reshape(row["a_ms"], shape), np.reshape(row["b_ms"], shape), row["steal_share"])


def rates(verdicts: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return the share of each verdict, with intervals (Wilson) for the two that have a bar."""
    names = [name for name, _ in verdicts]
    n = len(names)
    alarms = sum(name in ("slower", "faster") for name in names)
    return {
        "n": n,
        **{name: names.count(name) / n for name in VERDICTS},
        "false_alarms": alarms / n,
        "false_alarms_interval": wilson(alarms, n),
        "slower_interval": wilson(names.count("slower"), n),
        "mean_launches": float(np.mean([launches for _, launches in verdicts])),
    }


def wilson(hits: int, n: int, z: float = 1.96) -> list[float]:
    """Return the 95 % score interval of a share."""
    middle = (hits + z * z / 2) / (n + z * z)
    reach = z * math.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    return [round(max(0.0, middle - reach), 5), round(min(1.0, middle + reach), 5)]


# --- live --------------------------------------------------------------------------------------------------


def check_live(target: Target, count: int, budget_s: float) -> dict[str, Any]:
    """Return the verdicts of real comparisons with nothing and with a busy wait between the two."""
    launchers = {"nothing differs": run_launch, "busy wait of 5 %": run_slowed_launch}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in launchers}
    for number in range(count):
        for kind, launcher in launchers.items():
            plan = ComparePlan(target, target, sorted(PHOTOS.glob("*.jpg")), budget_s=budget_s, seed=number)
            said = compare(plan, launcher=launcher)
            found[kind].append(
                {
                    "verdict": said.verdict,
                    "ratio": round(said.ratio.value, 5),
                    "low": round(said.ratio.low, 5),
                    "high": round(said.ratio.high, 5),
                    "launches": len(said.launches),
                    "used_s": round(said.used_s, 1),
                    "drift": None if said.drift is None else round(said.drift, 4),
                    "steal_share": said.steal_share,
                }
            )
            print(f"\rlive {number + 1} of {count}, {kind}: {said.verdict}\x1b[K", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {
        "budget_s": budget_s,
        **{
            kind: {
                **rates([(each["verdict"], each["launches"]) for each in runs]),
                "comparisons": runs,
            }
            for kind, runs in found.items()
        },
    }


def run_slowed_launch(asked: Task) -> Told:
    """Do a task in a fresh process in which B waits after every call."""
    import subprocess

    done = subprocess.run(
        [sys.executable, __file__, "--slowed-child"],
        input=msgspec.json.encode(asked),
        capture_output=True,
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=Told)


def slowed_child() -> None:
    """Do the task of standard input with a B that takes 5 % longer."""
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)

    def open_side(target: Target, clock: Clock) -> Any:
        classifier = open_target(replace(target, fast_decode=False), clock)
        if not target.fast_decode:
            return classifier
        classify = classifier.classify

        def slowed(*arguments: Any, **named: Any) -> Any:
            # Time of the processor: beside others, waiting by the wall clock costs several times as much.
            began = time.thread_time()
            result = classify(*arguments, **named)
            until = began + (time.thread_time() - began) * (1 + EFFECT)
            while time.thread_time() < until:
                pass
            return result

        classifier.classify = slowed
        return classifier

    # Both are one target: the one that is to be slowed is marked by a setting that is not passed on.
    marked = msgspec.structs.replace(asked, b={**asked.b, "fast_decode": True})
    sys.stdout.buffer.write(msgspec.json.encode(launch(marked, open_side)))


if __name__ == "__main__":
    main()
