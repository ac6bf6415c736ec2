"""How much `edgeclip tune` leaves on the table: its choice against the best of an exhaustive sweep.

The sweep opens every setting there is (variants, engines, numbers of threads, spinning) and lets all of them
run rounds, each once a round in random order. Tuning runs several times, each with another seed, in a process
of its own. Then every setting that it chose meets the best of the sweep in pairs of turns of their own: the
best of many looks better in the sweep than it is. Regret is that ratio less one. Needs a quiet machine. With
two cores and the default model in six variants: about 10 minutes, and some more to export them first.

Bars: regret at most 5 %, found in under 2 minutes.

    python benchmarks/tune_regret.py
    python benchmarks/tune_regret.py --bundle my-bundle --runs 3 --rounds 20
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from written import ROOT, write

from edgeclip.bench.race import Entry, Race
from edgeclip.bench.settings import Bench, Setting, Single
from edgeclip.bench.tune import TunePlan, runners_of, thread_counts
from edgeclip.bench.tune_report import TuneReport
from edgeclip.bundle import Bundle
from edgeclip.errors import EdgeClipError
from edgeclip.runtime.host import Host, cpu_times
from edgeclip.runtime.tuned import TunedSettings

MAX_REGRET, MAX_S = 0.05, 120.0
CHECKPOINT = ROOT / "tests" / "data" / "default-checkpoint"
FORMS = [f"{form}-{precision}" for form in ("onnx", "openvino") for precision in ("fp32", "fp16", "int8")]


def exported(folder: Path) -> Path:
    """Export the default model in every form that a CPU runs."""
    variants = [word for form in FORMS for word in ("--variant", form)]
    command = ["export", str(CHECKPOINT), *variants, "--no-text", "-o", str(folder / "bundle")]
    subprocess.run([sys.executable, "-m", "edgeclip", *command], check=True)
    return folder / "bundle"


def tuned(bundle: Path, budget_s: float, seed: int, folder: Path) -> TuneReport:
    """Tune in a process of its own, with a host cache of its own."""
    code = (
        "import sys; from pathlib import Path; from edgeclip.bundle import Bundle; "
        "from edgeclip.bench.tune import TunePlan, tune; "
        "plan = TunePlan(budget_s=float(sys.argv[2]), seed=int(sys.argv[3])); "
        "print(tune(Bundle.open(sys.argv[1]), plan).to_json())"
    )
    arguments = [str(bundle), str(budget_s), str(seed)]
    environment = {**os.environ, "EDGECLIP_CACHE_DIR": str(folder / f"cache-{seed}")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, check=True
    )
    return TuneReport.from_json(done.stdout)


def all_settings(bench: Bench) -> list[Setting]:
    """Return every setting that tuning for latency may choose, opened, and name those that do not open."""
    plan, cores = TunePlan(), Host.here().cores
    settings: list[Setting] = []
    runners, left_out = runners_of(bench.bundle, plan)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    for runner in runners:
        for count in thread_counts(plan, cores):
            base = TunedSettings(backend=runner.backend, threads=count)
            spins = [False, True] if runner.backend == "ort" and count > 1 else [False]
            settings += [
                Single(bench, runner, msgspec.structs.replace(base, spinning=spinning)) for spinning in spins
            ]
    return [setting for setting in settings if opens(setting)]


def opens(setting: Setting) -> bool:
    """Open a setting, and say why where it does not."""
    try:
        setting.open()
    except EdgeClipError as error:
        setting.close()
        print(f"left out: {setting.name}: {error}")
        return False
    return True


def sweep(settings: Sequence[Setting], rounds: int) -> dict[str, list[float]]:
    """Return seconds by setting, a turn each a round."""
    order, draw = list(settings), random.Random(0)
    turns: dict[str, list[float]] = {setting.name: [] for setting in settings}
    for setting in settings:
        setting.turn()
    for number in range(rounds):
        draw.shuffle(order)
        for setting in order:
            turns[setting.name].append(setting.turn())
        print(f"\rsweep: round {number + 1} of {rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return turns


def regret_of(chosen: Setting, best: Setting, pairs: int) -> dict[str, Any]:
    """Return how much longer the chosen setting takes than the best, less one."""
    if chosen is best:
        return {"regret": 0.0, "low": 0.0, "high": 0.0, "pairs": 0}
    found = Race[Setting](lambda: 3600.0).compare(Entry(chosen), Entry(best), pairs)
    if found is None:
        raise SystemExit(f"--pairs: got {pairs}, expected at least 6.")
    regret, low, high = (round(value - 1, 5) for value in (found.median, found.low, found.high))
    return {"regret": regret, "low": low, "high": high, "pairs": found.n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="instead of the default model, exported in six variants")
    parser.add_argument("--runs", type=int, default=5, help="of tune, each with another seed")
    parser.add_argument("--budget", type=float, default=90.0, help="of each, in seconds")
    parser.add_argument("--rounds", type=int, default=40, help="of the sweep")
    parser.add_argument("--pairs", type=int, default=40, help="of each choice and the best of the sweep")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "tune_regret.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        os.environ["EDGECLIP_CACHE_DIR"] = str(folder / "cache")
        path = options.bundle or exported(folder)
        bundle = Bundle.open(path)
        reports = []
        for seed in range(options.runs):
            began = time.perf_counter()
            reports.append(tuned(path, options.budget, seed, folder))
            said = f"{reports[-1].profile.variant}, {reports[-1].profile.settings}"
            print(f"tune, seed {seed}: {said} ({time.perf_counter() - began:.0f} s)")
        ticks, began = cpu_times(), time.perf_counter()
        settings = all_settings(Bench(bundle, "cpu", folder))
        for setting in settings:
            stack.callback(setting.close)
        by_name = {setting.name: setting for setting in settings}
        turns = sweep(settings, options.rounds)
        swept_s = time.perf_counter() - began
        medians = {name: float(np.median(taken)) for name, taken in turns.items()}
        best = by_name[min(medians, key=lambda name: medians[name])]
        runs: list[dict[str, Any]] = []
        for seed, report in enumerate(reports):
            name = f"{report.profile.variant}, {report.profile.settings}"
            regret = regret_of(by_name[name], best, options.pairs)
            runs.append({"seed": seed, "chosen": name, "seconds": round(report.seconds, 2), **regret})
        after = cpu_times()
        steal = None if ticks is None or after is None else round(after.steal_share_since(ticks), 4)
    for name in sorted(medians, key=lambda name: medians[name]):
        print(f"{medians[name] * 1e3:9.3f} ms  {name}{'  (best)' if name == best.name else ''}")
    for run in runs:
        print(
            f"seed {run['seed']}: {run['chosen']} in {run['seconds']:.0f} s: regret {run['regret']:.1%} "
            f"({run['low']:.1%} to {run['high']:.1%})"
        )
    worst_s = max(run["seconds"] for run in runs)
    passed = {
        "regret": all(run["regret"] <= MAX_REGRET for run in runs),
        "seconds": worst_s < MAX_S,
    }
    print(f"sweep {swept_s:.0f} s; bars: {json.dumps(passed)}")
    write(
        options.output,
        {
            "what": __doc__.splitlines()[0],
            "bundle_digest": bundle.digest,
            "model": bundle.manifest.model.name,
            "budget_s": options.budget,
            "best": best.name,
            "runs": runs,
            "sweep": {
                "rounds": options.rounds,
                "seconds": round(swept_s, 1),
                "median_ms": {name: round(value * 1e3, 4) for name, value in medians.items()},
                "turns_ms": {name: [round(each * 1e3, 4) for each in taken] for name, taken in turns.items()},
            },
            "steal_share": steal,
            "bars": {"max_regret": MAX_REGRET, "max_s": MAX_S, "passed": passed},
        },
        show=False,
    )
    if not all(passed.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
