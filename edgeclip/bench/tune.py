"""Tune a bundle for this device: variants, engines, threads, spinning, memory, batches, above a floor.

Every setting is measured as it is used, see :mod:`edgeclip.bench.settings`. What is optimised is one of

* ``latency``: one picture after another, decoded and scaled already, from pixels to the best label;
* ``throughput``: a stream of picture files, decoding included, time a picture;
* ``memory``: peak resident memory of a fresh process that classifies one picture.

The search is a race (:mod:`edgeclip.bench.race`) in stages: every variant on every engine that runs it, then
other numbers of threads, then what changes little. Nothing here writes a profile but :func:`keep`.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from edgeclip import __version__
from edgeclip.bench.floor import Floor
from edgeclip.bench.race import Entry, Race, Rules
from edgeclip.bench.settings import Bench, Fresh, Runner, Setting, Single, Streamed
from edgeclip.bench.tune_report import (
    UNITS,
    GainEntry,
    TuneReport,
    setting_entry,
    undecided,
    why_chosen,
)
from edgeclip.cache import HostCache, cache_root
from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.choose import choose_variant, open_tower, profile_name, unmet, unprovable
from edgeclip.runtime.host import Host, cpu_times, engine_versions, versions
from edgeclip.runtime.session import BACKENDS, RuntimeOptions, parse_device, resolve_backend
from edgeclip.runtime.tuned import Goal, TunedProfile, TunedSettings, hardware, measurements_name

if TYPE_CHECKING:
    from edgeclip.bundle import Bundle

__all__ = ["TunePlan", "candidates", "check_cache", "keep", "runners_of", "thread_counts", "tune"]


_Change = Callable[[TunedSettings, Runner], "TunedSettings | None"]
_COMPARED: Final = {"latency": 12, "throughput": 12, "memory": 2}
_BATCHES: Final = (4, 8, 16)
_HALF_HOPELESS: Final = 2.0  # what is twice as slow on one number of threads is not tried on others
_RULES: Final = {
    "latency": Rules(),
    "throughput": Rules(),
    # Memory hardly varies, and every turn is a process.
    "memory": Rules(needed=2, hopeless=((1, 1.1),), rounds=3),
}


# --- what may be chosen -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TunePlan:
    """What is tuned for what, and how long.

    Attributes:
        goal: what is optimised.
        floor: what a variant must keep.
        budget_s: seconds in all, at least 5.
        device: as in :class:`~edgeclip.runtime.session.RuntimeOptions`.
        variants: names; empty for all.
        threads: numbers to try; empty for powers of two up to the usable cores, and these.
        images: picture files of the stream, for ``throughput``.
        seed: of the order.

    Raises:
        ConfigError: a value cannot be used.
    """

    goal: Goal = "latency"
    floor: Floor = field(default_factory=Floor)
    budget_s: float = 90.0
    device: str = "cpu"
    variants: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    images: tuple[Path, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 5 <= self.budget_s <= 86_400:
            raise ConfigError(f"budget: got {self.budget_s:g} s, expected 5 to 86400.")
        if any(number < 1 for number in self.threads):
            raise ConfigError(f"threads: got {min(self.threads)}, expected whole numbers of at least 1.")
        if self.goal == "throughput" and not self.images:
            raise ConfigError("images: got none, expected picture files to stream for throughput.")
        parse_device(self.device)


def candidates(bundle: Bundle, plan: TunePlan) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return what would be tried first, and what is left out and why; measures nothing.

    Raises:
        BundleError: a variant that the plan names is not in the bundle.
    """
    runners, left_out = runners_of(bundle, plan)
    return tuple(runner.name for runner in runners), left_out


def runners_of(bundle: Bundle, plan: TunePlan) -> tuple[list[Runner], dict[str, str]]:
    """Return variants on engines above the floor, in the bundle's order, and what is left out and why.

    Raises:
        BundleError: a variant that the plan names is not in the bundle.
    """
    names = dict.fromkeys((*bundle.manifest.default_variants, *sorted(bundle.manifest.variants)))
    chosen = [bundle.variant(name) for name in plan.variants or names]
    order = list(names)
    host = Host.here()
    runners, left_out = [], {}
    for variant in chosen:
        why = plan.floor.refuses(variant.entry)
        if why is None and "image" not in variant.entry.towers:
            why = "it has no image tower"
        if why is None:
            why = unprovable(variant, RuntimeOptions(device=plan.device))
        if why is not None:
            left_out[variant.name] = why
            continue
        backends = [name for name, backend in BACKENDS.items() if variant.entry.format in backend.formats]
        if not backends:
            left_out[variant.name] = f"no engine runs the format {variant.entry.format!r}"
        for backend in backends:
            options = RuntimeOptions(backend=backend, device=plan.device)
            problem = unmet(variant, options=options, host=host)
            if problem is None:
                runners.append(Runner(variant, backend, order.index(variant.name)))
            else:
                left_out[f"{variant.name} with {backend}"] = problem
    return runners, left_out


# --- the search -------------------------------------------------------------------------------------------


def tune(
    bundle: Bundle,
    plan: TunePlan,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> TuneReport:
    """Search the best setting of a bundle on this device; writes no profile.

    Args:
        bundle: an open bundle.
        plan: what is optimised, and how long.
        on_progress: told what runs.

    Raises:
        BackendError: no setting can be run here, or an engine failed on the way.
        BundleError: the bundle is damaged, or lacks a variant that the plan names.
        InputError: a picture of the plan cannot be read.
    """
    began = time.perf_counter()
    runners, left_out = runners_of(bundle, plan)
    if not runners:
        raise _nothing(bundle, left_out)
    if plan.goal == "throughput":
        preprocess = Preprocess(bundle.manifest.preprocess)
        for image in plan.images:
            preprocess.decode(image)
    ticks = cpu_times()

    def left_of(share: float) -> float:
        return share * plan.budget_s - (time.perf_counter() - began)

    def show(name: str) -> None:
        if on_progress is not None:
            on_progress(f"{name}, {max(0.0, left_of(1)):.0f} s left")

    shares = [0.7]
    with tempfile.TemporaryDirectory(prefix="edgeclip-tune-") as scratch:
        search = _Search(
            Bench(bundle, plan.device, Path(scratch), plan.images),
            plan,
            Race(lambda: left_of(shares[-1]), rules=_RULES[plan.goal], seed=plan.seed, on_turn=show),
        )
        try:
            search.enter_all(runners)
            shares.append(0.92)
            search.race.settle()
            winner = search.race.winner()
            if winner is None:
                raise _nothing(bundle, {**left_out, **search.failures()})
            shares.append(1.0)
            winner, gain = search.compare_with_untuned(winner)
        finally:
            search.race.close()
    after = cpu_times()
    steal = None if ticks is None or after is None else after.steal_share_since(ticks)
    return search.report(winner, gain, left_out, time.perf_counter() - began, steal)


def _nothing(bundle: Bundle, reasons: dict[str, str]) -> BackendError:
    said = "; ".join(f"{name}: {why.rstrip('.')}" for name, why in reasons.items())
    return BackendError(
        f"{bundle.where}: no setting of it can be tuned here ({said}). Lower the floor, or export other "
        "variants."
    )


@dataclass
class _Search:
    """The stages of the search, and what they left."""

    bench: Bench
    plan: TunePlan
    race: Race[Setting]
    not_tried: dict[str, str] = field(default_factory=dict)
    first: dict[Runner, Entry[Setting]] = field(default_factory=dict)
    seen: set[tuple[str, str]] = field(default_factory=set)
    late: int = 0
    kept: str | None = None

    def enter_all(self, runners: Sequence[Runner]) -> None:
        """Let settings enter, stage by stage; what a stage is depends on who is left."""
        plan, cores = self.plan, Host.here().cores
        counts = thread_counts(plan, cores)
        usual = cores if cores in counts else max(counts)
        # Small towers are slow on very many threads: the first look is at a moderate number.
        moderate = max(count for count in counts if count <= max(4, min(counts)))
        is_memory = plan.goal == "memory"
        base = TunedSettings(
            backend="",
            threads=usual,
            batch_size=1 if plan.goal == "throughput" else None,
            workers=cores if plan.goal == "throughput" else None,
        )
        self._enter(runners[0], base)
        for runner in runners:
            settings = msgspec.structs.replace(base, threads=moderate, low_memory=is_memory)
            entry = self._enter(runner, settings)
            if entry is not None and entry.state in ("left", "slower"):
                self.first[runner] = entry
        for runner, entry in sorted(self.first.items(), key=lambda item: item[1].relative):
            for count in counts:
                settings = msgspec.structs.replace(base, threads=count, low_memory=is_memory)
                self._enter(runner, settings, self._hopeless(entry))
        for change in self._small_changes(plan, cores):
            for entry in self.race.left:
                setting = entry.contender
                changed = change(setting.settings, setting.runner)
                if changed is not None:
                    self._enter(setting.runner, changed)

    def _small_changes(self, plan: TunePlan, cores: int) -> Iterator[_Change]:
        """Yield what is tried of everybody who is left by then."""
        if plan.goal == "memory":
            yield lambda it, _: msgspec.structs.replace(it, low_memory=not it.low_memory)
            return
        if parse_device(plan.device)[0] == "cpu":
            yield _spinning
        if plan.goal == "throughput":
            for batch in _BATCHES:
                yield _setting(batch_size=batch)
            for workers in sorted({1, max(1, cores // 2), 2 * cores} - {cores}):
                yield _setting(workers=workers)

    def _hopeless(self, first: Entry[Setting]) -> str | None:
        leader = self.race.leader
        if leader is None or first.relative <= _HALF_HOPELESS * leader.relative:
            return None
        times = first.relative / leader.relative
        return f"{first.name} took {times:.1f} times as much as {leader.name}"

    def _enter(
        self, runner: Runner, settings: TunedSettings, hopeless: str | None = None
    ) -> Entry[Setting] | None:
        """Let a setting enter that is new, unless there is a reason not to."""
        settings = msgspec.structs.replace(settings, backend=runner.backend)
        kind = {"latency": Single, "throughput": Streamed, "memory": Fresh}[self.plan.goal]
        setting = kind(self.bench, runner, settings)
        key = (runner.variant.name, str(settings))
        if key in self.seen:
            return next((entry for entry in self.race.entries if entry.name == setting.name), None)
        self.seen.add(key)
        if hopeless is None and self.race.entries and self.race.is_over:
            self.late += 1
            hopeless = f"the budget of {self.plan.budget_s:g} s has no room for it"
        if hopeless is not None:
            self.not_tried[setting.name] = hopeless
            return None
        return self.race.enter(setting)

    def failures(self) -> dict[str, str]:
        """Return who could not run, and why."""
        return {entry.name: entry.why for entry in self.race.entries if entry.state == "failed"}

    def compare_with_untuned(self, winner: Entry[Setting]) -> tuple[Entry[Setting], GainEntry | None]:
        """Measure the winner against what ``auto`` takes without a profile, if that is another setting.

        Returns:
            Who was better in that, and by how much if it is the winner.
        """
        untuned = self.race.entries[0]
        if untuned is winner or untuned.state not in ("left", "slower"):
            return winner, None
        if not self._is_what_auto_takes(untuned.contender):
            return winner, None
        found = self.race.compare(untuned, winner, _COMPARED[self.plan.goal])
        if found is None:
            return winner, None
        untuned.relative = winner.relative * found.median
        is_gentler = winner.contender.rank < untuned.contender.rank
        if found.median < (1 / (1 + self.race.rules.tie) if is_gentler else 1):
            self.kept = (
                f"what auto takes anyway, since {winner.name}, the best of the others, took "
                f"{1 / found.median:.2f} times as much in the end ({1 / found.high:.2f} to "
                f"{1 / found.low:.2f}, {found.n} pairs)"
            )
            return untuned, None
        gain = GainEntry(setting=untuned.name, ratio=found.median, low=found.low, high=found.high, n=found.n)
        return winner, gain

    def _is_what_auto_takes(self, setting: Setting) -> bool:
        runner = setting.runner
        options = RuntimeOptions(device=self.plan.device)
        try:
            choice = choose_variant(self.bench.bundle, options=options, tuned=False)
            backend, _ = resolve_backend(choice.variant.entry.format, options)
        except BackendUnavailableError:
            return False
        same = (choice.variant.name, backend) == (runner.variant.name, runner.backend)
        return same and setting.settings.threads == Host.here().cores

    def report(
        self,
        winner: Entry[Setting],
        gain: GainEntry | None,
        left_out: dict[str, str],
        seconds: float,
        steal_share: float | None,
    ) -> TuneReport:
        """Return everything that was found."""
        bundle, plan, host = self.bench.bundle, self.plan, Host.here()
        settings = [setting_entry(entry, winner, plan.goal) for entry in self.race.entries]
        settings.sort(key=lambda each: (not each.chosen, each.ratio is None, each.ratio or 0.0))
        setting = winner.contender
        chosen = next(each for each in settings if each.chosen)
        untuned = next((each for each in settings if gain is not None and each.name == gain.setting), None)
        tried = sum(each.ratio is not None for each in settings)
        profile = TunedProfile(
            goal=plan.goal,
            variant=setting.runner.variant.name,
            settings=setting.settings,
            device=plan.device,
            floor=plan.floor.said,
            why=self.kept or why_chosen(winner, self.race, tried),
            unit=UNITS[plan.goal],
            value=chosen.value or 0.0,
            low=chosen.low,
            high=chosen.high,
            untuned=None if untuned is None else untuned.value,
            tried=tried,
            created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            bundle=bundle.digest,
            cores=host.cores,
            engines=engine_versions(),
            hardware=hardware(host),
            edgeclip=__version__,
        )
        return TuneReport(
            model=bundle.manifest.model.name,
            profile=profile,
            gain=gain,
            settings=tuple(settings),
            not_tried=self.not_tried,
            left_out=left_out,
            undecided=undecided(winner, self.race, self.late),
            budget_s=plan.budget_s,
            seconds=seconds,
            steal_share=steal_share,
            host=host.to_dict(),
            versions=versions(),
        )


def _spinning(settings: TunedSettings, runner: Runner) -> TunedSettings | None:
    """OpenVINO's threads do not spin; a single one has nobody to wait for."""
    if runner.backend != "ort" or settings.threads == 1:
        return None
    return msgspec.structs.replace(settings, spinning=True)


def _setting(**changes: int) -> _Change:
    return lambda settings, _: msgspec.structs.replace(settings, **changes)


def thread_counts(plan: TunePlan, cores: int) -> tuple[int, ...]:
    """Return the numbers of threads that are tried."""
    if plan.threads:
        return tuple(sorted(set(plan.threads)))
    if parse_device(plan.device)[0] != "cpu":
        return (cores,)
    powers = (1 << power for power in range(cores.bit_length()))
    return tuple(sorted({*(power for power in powers if power <= cores), cores}))


# --- the profile ------------------------------------------------------------------------------------------


def check_cache(bundle: Bundle) -> HostCache:
    """Return the host cache of a bundle.

    Raises:
        BackendError: nothing can be kept in it.
    """
    cache = HostCache.open(bundle.digest, Host.here().fingerprint())
    if not cache.writable:
        raise BackendError(_cannot_keep(cache))
    return cache


def keep(bundle: Bundle, report: TuneReport) -> Path:
    """Write profile and measurements to the host cache, from where ``auto`` takes them.

    The image tower is opened once as they say, so that what is compiled for it is in the cache, too.

    Raises:
        BackendError: they cannot be written.
    """
    cache = check_cache(bundle)
    device = report.profile.device
    name = profile_name(device)
    written = cache.put(measurements_name(device), report.to_json().encode())
    if not written or not cache.put(name, json.dumps(report.profile.to_dict()).encode()):
        raise BackendError(_cannot_keep(cache))
    options = RuntimeOptions(device=device)
    open_tower(bundle, choose_variant(bundle, options=options), "image", options).close()
    return cache.path(name)


def _cannot_keep(cache: HostCache) -> str:
    where = cache_root() if cache.directory is None else cache.directory
    return (
        f"the tuned profile cannot be kept: the host cache at {str(where)!r} cannot be written. Set "
        "EDGECLIP_CACHE_DIR to a directory that can be, or look with --dry-run."
    )
