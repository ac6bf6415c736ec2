"""Tuning: what is considered, the search on simulated devices, real runs of tiny bundles, the profile."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import make_tiny_bundle
from tuned_profiles import put_profile, tuned_profile
from wrong_bundle import put_wrong_model

from edgeclip.bench import settings as settings_module
from edgeclip.bench import tune as tune_module
from edgeclip.bench.floor import Floor
from edgeclip.bench.settings import Setting, Single
from edgeclip.bench.tune import TunePlan, candidates, keep, tune
from edgeclip.bench.tune_report import TuneReport
from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.cache import COMPILED, HostCache
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import BackendError, BundleError, ConfigError, InputError
from edgeclip.runtime import choose_variant
from edgeclip.runtime.host import Host
from edgeclip.runtime.tuned import find_profile, forget_profile


def changed(path: Path, variant: str, **fields: Any) -> Bundle:
    with BundleWriter(path) as writer:
        writer.manifest["variants"][variant].update(fields)
        return writer.commit()


# --- the floor


@pytest.mark.parametrize(
    "said",
    ["fast", "top1_agreement", "top1_agreement=", "top1_agreement=high", "n=3", "accuracy.=1", "a=nan"],
)
def test_a_floor_that_cannot_be_read_is_an_error(said: str) -> None:
    with pytest.raises(ConfigError, match=f"floor: got {said!r}, expected 'golden', 'parity', or NUMBER"):
        Floor(("golden", said))


PARITY = {"status": "passed", "cosine_min": 0.9, "top1_agreement": 0.97, "max_abs": 0.02, "n": 16}


@pytest.mark.parametrize(
    ("floor", "parity", "why"),
    [
        ("golden", {}, None),
        ("parity", {}, None),
        (
            "parity",
            {"status": "unverified"},
            "the numbers of its image tower are unverified, and the floor is parity",
        ),
        (
            "parity",
            {"missed": {"cosine_min": 0.99}},
            "its image tower missed cosine_min (0.99), and the floor is parity",
        ),
        ("cosine_min=0.9", {}, None),
        ("cosine_min=0.95", {}, "its cosine_min is 0.9, and the floor is 0.95"),
        ("top1_agreement=0.98", {}, "its top1_agreement is 0.97, and the floor is 0.98"),
        ("max_abs=0.02", {}, None),
        ("max_abs=0.01", {}, "its max_abs is 0.02, and the floor is 0.01"),
        ("top5_agreement=0.5", {}, "its manifest does not tell its top5_agreement, and the floor is 0.5"),
        ("accuracy.en.top1=0.5", {}, None),
        ("accuracy.en.top1=0.6", {}, "its accuracy.en.top1 is 0.52, and the floor is 0.6"),
        ("accuracy.top1=0.6", {}, "its manifest does not tell its accuracy.top1, and the floor is 0.6"),
    ],
)
def test_what_is_below_the_floor_is_left_out_with_the_reason(
    floor: str, parity: dict[str, Any], why: str | None, tiny_bundle: Path
) -> None:
    fields = {"parity": {"image": {**PARITY, **parity}}, "accuracy": {"en": {"top1": 0.52}}}
    bundle = changed(tiny_bundle, "onnx-int8", **fields)
    plan = TunePlan(floor=Floor((floor,)), variants=("onnx-int8",))
    first, left_out = candidates(bundle, plan)
    assert left_out.get("onnx-int8") == why
    assert (first == ()) == (why is not None)


# --- what is considered


def test_every_variant_meets_every_engine_that_runs_it(tiny_bundle_session: Path) -> None:
    first, left_out = candidates(Bundle.open(tiny_bundle_session), TunePlan())
    assert first == (
        "onnx-int8 with ort",
        "onnx-int8 with openvino",
        "onnx-fp32 with ort",
        "onnx-fp32 with openvino",
    )
    assert left_out == {}


def test_what_cannot_run_here_is_left_out_with_the_reason(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeclip.runtime.session._has_module", lambda name: name == "onnxruntime")
    bundle = changed(tiny_bundle, "onnx-fp32", requires={"engine": ">=99"})
    first, left_out = candidates(bundle, TunePlan())
    assert first == ("onnx-int8 with ort",)
    assert left_out["onnx-fp32 with ort"].startswith("it needs ort >=99, this host has ")
    assert "the package 'openvino' is not installed" in left_out["onnx-int8 with openvino"]
    bundle = changed(tiny_bundle, "onnx-fp32", format="coreml")
    assert candidates(bundle, TunePlan())[1]["onnx-fp32"] == "no engine runs the format 'coreml'"


def test_a_variant_that_is_not_there_is_an_error(tiny_bundle_session: Path) -> None:
    with pytest.raises(BundleError, match="no variant 'onnx-fp64'"):
        candidates(Bundle.open(tiny_bundle_session), TunePlan(variants=("onnx-fp64",)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget_s": 1.0}, "budget: got 1 s, expected 5 to 86400"),
        ({"budget_s": float("nan")}, "budget: got nan s"),
        ({"threads": (2, 0)}, "threads: got 0, expected whole numbers of at least 1"),
        ({"goal": "throughput"}, "images: got none, expected picture files"),
        ({"device": "tpu"}, "device: got 'tpu'"),
    ],
)
def test_a_plan_that_cannot_be_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TunePlan(**fields)


# --- the search, on devices whose truth is known


class Device:
    """Makes settings as slow as a truth says, with noise, in no time."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, cores: int, truth: Callable[[Setting], float]
    ) -> None:
        self.noise = 0.02
        self.truth = truth
        self.random = random.Random(0)
        self.tried: dict[str, float] = {}
        host = replace(Host.here(), cores=cores)
        monkeypatch.setattr(Host, "here", classmethod(lambda _: host))
        monkeypatch.setattr(Single, "open", lambda setting: None)
        monkeypatch.setattr(Single, "turn", lambda setting: self.turn(setting))

    def turn(self, setting: Setting) -> float:
        true_s = self.tried.setdefault(setting.name, self.truth(setting))
        return true_s * self.random.lognormvariate(0, self.noise)


def scaling(speedup: float, threads: int) -> float:
    """Return the time on some threads, as a share of that on one (Amdahl), with the cost of each thread."""
    return (1 - speedup) + speedup / threads + 0.01 * threads


@pytest.mark.parametrize("cores", [1, 2, 4, 16])
def test_the_search_is_within_5_percent_of_an_exhaustive_one(
    cores: int, tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    for seed in range(8):
        draw = random.Random(seed)
        names = ("onnx-int8", "onnx-fp32")
        base = {(name, engine): draw.uniform(0.01, 0.05) for name in names for engine in ("ort", "openvino")}
        parallel = {key: draw.uniform(0.3, 0.97) for key in base}
        spinning = draw.uniform(0.9, 1.2)

        def truth(
            setting: Setting, base: Any = base, parallel: Any = parallel, spinning: float = spinning
        ) -> float:
            it = setting.settings
            key = (setting.runner.variant.name, it.backend)
            time_s: float = base[key] * scaling(parallel[key], it.threads)
            return time_s * (spinning if it.spinning else 1)

        device = Device(monkeypatch, cores, truth)
        report = tune(bundle, TunePlan(seed=seed))
        monkeypatch.undo()
        counts = {count for count in (1, 2, 4, 8, 16, cores) if count <= cores}
        best_s = min(
            base[key]
            * scaling(parallel[key], count)
            * (min(1, spinning) if key[1] == "ort" and count > 1 else 1)
            for key in base
            for count in counts
        )
        assert device.tried[report.settings[0].name] <= 1.05 * best_s, seed


def test_what_is_hopeless_on_one_number_of_threads_is_not_tried_on_others(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Device(monkeypatch, 4, lambda setting: 0.08 if setting.runner.backend == "openvino" else 0.02)
    report = tune(Bundle.open(tiny_bundle_session), TunePlan())
    assert report.profile.settings.backend == "ort"
    why = report.not_tried["onnx-int8, openvino, 2 threads"]
    assert re.fullmatch(
        r"onnx-int8, openvino, 4 threads took [34]\.\d times as much as onnx-.*, ort, .*", why
    )


def test_among_equals_fewer_threads_then_the_order_of_the_bundle_decide(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, 2, lambda setting: 0.02)
    device.noise = 0.002
    report = tune(Bundle.open(tiny_bundle_session), TunePlan())
    profile = report.profile
    assert (profile.variant, profile.settings.threads, profile.settings.spinning) == ("onnx-int8", 1, False)
    assert "the best of " in profile.why


def test_the_gain_is_measured_against_what_auto_takes(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    put_profile(bundle, tuned_profile(bundle))  # has no say in it
    Device(monkeypatch, 2, lambda setting: 0.01 if setting.runner.variant.name == "onnx-fp32" else 0.03)
    report = tune(bundle, TunePlan())
    assert report.gain is not None
    assert report.gain.setting == "onnx-int8, ort, 2 threads"
    assert report.gain.ratio == pytest.approx(3, rel=0.1)
    assert report.gain.low <= report.gain.ratio <= report.gain.high
    assert "without a profile, auto takes onnx-int8, ort, 2 threads: " in report.to_text()


def test_what_auto_takes_anyway_stays_where_the_winner_is_not_better_in_the_end(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that became busy for one of them, and quiet again."""
    device = Device(
        monkeypatch, 2, lambda setting: 0.01 if setting.runner.variant.name == "onnx-fp32" else 0.02
    )
    real = tune_module.Race.compare

    def compare(race: Any, a: Any, b: Any, pairs: int) -> Any:
        device.tried |= {name: 0.01 for name in device.tried if name.startswith("onnx-int8")}
        device.tried |= {name: 0.02 for name in device.tried if name.startswith("onnx-fp32")}
        return real(race, a, b, pairs)

    monkeypatch.setattr(tune_module.Race, "compare", compare)
    report = tune(Bundle.open(tiny_bundle_session), TunePlan())
    assert report.settings[0].name == "onnx-int8, ort, 2 threads"
    assert (report.profile.variant, report.gain) == ("onnx-int8", None)
    assert re.match(
        r"what auto takes anyway, since onnx-fp32, .*, the best of the others, took (1\.9|2\.0)\d times",
        report.profile.why,
    )


def test_settings_for_which_there_is_no_time_are_named(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Device(monkeypatch, 2, lambda setting: 0.02)
    now = iter(range(1_000_000))
    monkeypatch.setattr(tune_module.time, "perf_counter", lambda: float(next(now)))
    report = tune(Bundle.open(tiny_bundle_session), TunePlan(budget_s=20))
    assert "the budget of 20 s has no room for it" in report.not_tried.values()
    assert report.undecided is not None
    assert "not tried within the budget" in report.undecided
    assert f"note:   {report.undecided}" in report.to_text()


# --- real runs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let turns be short: what is asserted here does not depend on what is measured."""
    monkeypatch.setattr(settings_module, "_TURN_S", 0.002)
    monkeypatch.setattr(settings_module, "_STREAM_S", 0.02)
    monkeypatch.setattr(settings_module, "_QUIET_S", 0.05)


def test_a_real_run_finds_a_setting_and_auto_takes_it(quick: None, tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    said: list[str] = []
    report = tune(bundle, TunePlan(budget_s=6, threads=(1,)), on_progress=said.append)
    profile = report.profile
    (chosen,) = [each for each in report.settings if each.chosen]
    assert chosen is report.settings[0]
    assert chosen.name == f"{profile.variant}, {profile.settings}"
    assert profile.tried == sum(each.ratio is not None for each in report.settings)
    assert {each.name for each in report.settings} <= {
        f"{variant}, {engine}, 1 thread"
        for variant in ("onnx-int8", "onnx-fp32")
        for engine in ("ort", "openvino")
    }
    for each in report.settings:
        assert all(turn > 0 for turn in each.turns)
        assert each.chosen or each.why or each.state == "left"
    assert report.seconds < 60
    assert all(line.endswith(" s left") for line in said)
    text = report.to_text()
    assert f"chosen: {chosen.name}: " in text
    assert TuneReport.from_json(report.to_json()) == report

    before = choose_variant(bundle)
    assert before.settings is None
    path = keep(bundle, report)
    assert path.is_file()
    assert list(Path(HostCache.open(COMPILED).directory or "").iterdir())
    choice = choose_variant(bundle)
    assert (choice.variant.name, choice.settings) == (profile.variant, profile.settings)
    with ZeroShotClassifier.open(bundle) as classifier:
        assert (classifier.placement.backend, classifier.placement.threads) == (profile.settings.backend, 1)
    assert forget_profile(bundle, Host.here(), "cpu") == 1
    assert choose_variant(bundle) == before


def test_what_is_tried_does_not_fill_the_host_cache(quick: None, tiny_bundle_session: Path) -> None:
    tune(Bundle.open(tiny_bundle_session), TunePlan(budget_s=5, threads=(1,), variants=("onnx-int8",)))
    assert list(Path(HostCache.open(COMPILED).directory or "").iterdir()) == []


def test_wrong_answers_are_left_out_with_the_reason(quick: None, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = put_wrong_model(tiny_bundle, tmp_path, "onnx-fp32")
    report = tune(bundle, TunePlan(budget_s=6, threads=(1,)))
    failed = {each.name: each.why for each in report.settings if each.state == "failed"}
    assert set(failed) == {"onnx-fp32, ort, 1 thread", "onnx-fp32, openvino, 1 thread"}
    for why in failed.values():
        assert why.startswith("its answers on this host are below the floor: max_abs is ")
    assert report.profile.variant == "onnx-int8"
    assert "left out:\n  onnx-fp32, ort, 1 thread" in report.to_text()


def test_when_nothing_reaches_the_floor_that_is_an_error(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    with pytest.raises(
        BackendError,
        match=r"it can be tuned here \(onnx-int8: its cosine_min is [01]\.?\d*, and the floor is 2; ",
    ):
        tune(bundle, TunePlan(floor=Floor(("cosine_min=2",)), variants=("onnx-int8", "onnx-fp32")))


def test_when_everything_answers_wrongly_that_is_an_error(
    quick: None, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = put_wrong_model(tiny_bundle, tmp_path, "onnx-fp32")
    with pytest.raises(
        BackendError, match=r"tuned here \(onnx-fp32, ort, 1 thread: its answers on this host"
    ):
        tune(bundle, TunePlan(budget_s=6, threads=(1,), variants=("onnx-fp32",)))


def test_a_bundle_without_labels_and_golden_file_is_tuned_too(quick: None, tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest |= {"golden": None, "default_bank": None}
        bundle = writer.commit()
    report = tune(bundle, TunePlan(budget_s=5, threads=(1,), variants=("onnx-fp32",)))
    assert report.profile.variant == "onnx-fp32"


def pictures(folder: Path, count: int = 4) -> tuple[Path, ...]:
    folder.mkdir()
    paths = tuple(folder / f"{number}.png" for number in range(count))
    for path in paths:
        Image.fromarray(np.full((40, 48, 3), 200, np.uint8)).save(path)
    return paths


def test_streams_are_tuned_with_batch_and_decoders(
    quick: None, tiny_bundle_session: Path, tmp_path: Path
) -> None:
    plan = TunePlan(
        goal="throughput",
        budget_s=8,
        threads=(1,),
        variants=("onnx-fp32",),
        images=pictures(tmp_path / "pictures"),
    )
    report = tune(Bundle.open(tiny_bundle_session), plan)
    settings = report.profile.settings
    assert settings.batch_size is not None
    assert settings.workers is not None
    assert report.profile.goal == "throughput"
    assert report.settings[0].turns
    names = [*(each.name for each in report.settings), *report.not_tried]
    assert any("batch 8" in name for name in names)


def test_a_picture_that_cannot_be_read_is_an_error_before_anything_is_measured(
    tiny_bundle_session: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.png").write_bytes(b"not a picture")
    plan = TunePlan(goal="throughput", images=(tmp_path / "torn.png",))
    with pytest.raises(InputError, match=r"torn\.png"):
        tune(Bundle.open(tiny_bundle_session), plan)


@pytest.mark.slow
def test_memory_is_that_of_processes_of_their_own(tiny_bundle_session: Path) -> None:
    plan = TunePlan(goal="memory", budget_s=30, threads=(1,), variants=("onnx-fp32",))
    report = tune(Bundle.open(tiny_bundle_session), plan)
    assert report.profile.unit == "MB"
    value = report.settings[0].value
    assert value is not None
    assert 20 < value < 500
    assert any("low memory" in each.name for each in report.settings)


def test_a_process_that_fails_is_named(tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "_CHILD", "raise SystemExit('no memory today')")
    plan = TunePlan(goal="memory", budget_s=10, threads=(1,), variants=("onnx-fp32",))
    with pytest.raises(BackendError, match="a process of its own ended with 1: no memory today"):
        tune(Bundle.open(tiny_bundle_session), plan)


def test_a_system_that_does_not_tell_memory_is_named(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "_CHILD", 'print(\'{"bytes": null, "s": 1.0}\')')
    plan = TunePlan(goal="memory", budget_s=10, threads=(1,), variants=("onnx-fp32",))
    with pytest.raises(BackendError, match="this system does not tell how much memory"):
        tune(Bundle.open(tiny_bundle_session), plan)


# --- keeping it


def report_of(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> TuneReport:
    with monkeypatch.context() as patched:
        Device(patched, Host.here().cores, lambda setting: 0.02)
        return tune(bundle, TunePlan())


def test_a_cache_that_cannot_be_written_is_an_error(
    tiny_bundle_session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    report = report_of(bundle, monkeypatch)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        BackendError, match=r"the host cache at '.*file/cache' cannot be written\. Set EDGECLIP"
    ):
        keep(bundle, report)


def test_a_disk_that_is_full_is_an_error(tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    report = report_of(bundle, monkeypatch)
    monkeypatch.setattr(HostCache, "put", lambda *arguments: False)
    with pytest.raises(BackendError, match="the tuned profile cannot be kept"):
        keep(bundle, report)
    assert find_profile(bundle, Host.here(), "cpu") is None


def test_forgetting_takes_what_older_engines_left_along(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    put_profile(bundle, tuned_profile(bundle))
    put_profile(bundle, tuned_profile(bundle), fingerprint="0123456789abcdef")
    put_profile(bundle, tuned_profile(bundle), device="gpu")
    assert forget_profile(bundle, Host.here(), "cpu") == 2
    assert find_profile(bundle, Host.here(), "cpu") is None
    assert find_profile(bundle, Host.here(), "gpu") is not None
    assert forget_profile(bundle, Host.here(), "cpu") == 0
