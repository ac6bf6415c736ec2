"""``edgeclip tune``, and what other commands say of profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import Command
from tuned_profiles import put_profile, tuned_profile

from edgeclip.bench import settings
from edgeclip.bench.settings import Single
from edgeclip.bench.tune_report import TuneReport
from edgeclip.bundle import Bundle
from edgeclip.runtime.host import Host
from edgeclip.runtime.tuned import find_profile


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_TURN_S", 0.002)


ONE = ("--threads", "1", "--variant", "onnx-fp32", "--budget", "5")


def test_a_run_says_what_it_chose_and_keeps_it(quick: None, run: Command, tiny_bundle: Path) -> None:
    result = run("tune", tiny_bundle, *ONE)
    assert result.code == 0
    assert "chosen: onnx-fp32, " in result.out
    assert "profile.json; variant auto takes it from now on" in result.out
    shown = run("tune", tiny_bundle, "--show")
    assert shown.code == 0
    assert shown.out.startswith("onnx-fp32 (")
    assert "every turn is in " in shown.out
    again = run("tune", tiny_bundle, *ONE)
    assert "it replaces onnx-fp32 (" in again.out
    assert run("tune", tiny_bundle, "--forget").out == "removed\n"
    assert run("tune", tiny_bundle, "--forget").out == "there was none\n"
    gone = run("tune", tiny_bundle, "--show")
    assert (gone.code, "it has no tuned profile for cpu here" in gone.err) == (1, True)


def test_json_is_the_report(quick: None, run: Command, tiny_bundle: Path) -> None:
    result = run("tune", tiny_bundle, *ONE, "--json", "--floor", "parity")
    assert result.code == 0
    report = TuneReport.from_json(result.out)
    assert report.profile.floor == ("golden", "parity")
    shown = json.loads(run("tune", tiny_bundle, "--show", "--json").out)
    assert (shown["stale"], shown["profile"]["variant"]) == (None, "onnx-fp32")
    assert json.loads(run("tune", tiny_bundle, "--forget", "--json").out)["removed"] == 1


def test_a_dry_run_measures_and_writes_nothing(
    run: Command, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Single, "open", None)
    result = run("tune", tiny_bundle, "--dry-run", "--floor", "cosine_min=0.9999")
    assert result.code == 0
    assert "would tune for latency on cpu in at most 90 s" in result.out
    assert "  onnx-fp32 with ort\n" in result.out
    assert "left out: onnx-int8: its cosine_min is 0." in result.out
    document = json.loads(run("tune", tiny_bundle, "--dry-run", "--json").out)
    assert document["would_try"][0] == "onnx-int8 with ort"
    none = run("tune", tiny_bundle, "--dry-run", "--floor", "cosine_min=2")
    assert "  nothing\n" in none.out
    assert find_profile(Bundle.open(tiny_bundle), Host.here(), "cpu") is None


def test_a_stale_profile_is_shown_as_such(run: Command, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    put_profile(bundle, {**tuned_profile(bundle), "cores": 99})
    result = run("tune", tiny_bundle, "--show")
    assert "stale, so not used: it was measured on 99 usable core(s), and" in result.out
    assert json.loads(run("tune", tiny_bundle, "--show", "--json").out)["stale"].startswith("it was measured")
    put_profile(bundle, b"{")
    assert "stale, so not used: it is not JSON" in run("tune", tiny_bundle, "--show").out


def test_ctrl_c_leaves_the_profile_there_was(
    run: Command, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)

    def interrupted(setting: Single) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Single, "turn", interrupted)
    assert run("tune", tiny_bundle, *ONE).code == 130
    assert find_profile(bundle, Host.here(), "cpu") is None
    put_profile(bundle, tuned_profile(bundle))
    before = find_profile(bundle, Host.here(), "cpu")
    assert run("tune", tiny_bundle, *ONE).code == 130
    assert find_profile(bundle, Host.here(), "cpu") == before


def test_a_cache_that_cannot_be_written_is_said_before_time_is_spent(
    run: Command, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(Single, "open", None)
    result = run("tune", tiny_bundle)
    assert result.code == 1
    assert "error: the tuned profile cannot be kept: the host cache at" in result.err
    assert "Set EDGECLIP_CACHE_DIR" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--dry-run", "--show"), 2, "--dry-run, --show and --forget exclude each other"),
        (("--threads", "two"), 2, "got 'two', expected whole numbers with commas between them"),
        (("--threads", "0"), 1, "threads: got 0, expected whole numbers of at least 1"),
        (("--floor", "good"), 1, "floor: got 'good', expected 'golden', 'parity', or NUMBER=LIMIT"),
        (("--budget", "1"), 1, "budget: got 1 s, expected 5 to 86400"),
        (("--for", "fun"), 2, "fun"),
        (("--images", "."), 2, "--images is for --for throughput"),
        (("--variant", "onnx-fp64"), 1, "no variant 'onnx-fp64'"),
        (("--device", "tpu"), 1, "device: got 'tpu'"),
        (("--device", "cuda"), 1, "no setting of it can be tuned here ("),
    ],
)
def test_bad_input_is_one_sentence(
    run: Command, arguments: tuple[str, ...], code: int, message: str, tiny_bundle_session: Path
) -> None:
    result = run("tune", tiny_bundle_session, *arguments)
    assert result.code == code
    assert message in " ".join(result.err.split())


def test_a_folder_without_pictures_is_one_sentence(run: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("tune", tiny_bundle, "--for", "throughput", "--images", tmp_path / "empty")
    assert result.code == 1
    assert "empty': got no picture files, expected some in the folder" in result.err


# --- what other commands say


def test_classify_says_that_a_profile_is_stale(run: Command, tiny_bundle: Path, repo: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    picture = repo / "edgeclip" / "assets" / "photos" / "frying_pan.jpg"
    arguments = ("classify", picture, "--bundle", tiny_bundle, "--json")
    put_profile(bundle, tuned_profile(bundle))
    result = run(*arguments)
    assert (json.loads(result.out)["variant"], "profile" in result.err) == ("onnx-fp32", False)
    put_profile(bundle, {**tuned_profile(bundle), "cores": 99})
    result = run(*arguments)
    assert json.loads(result.out)["variant"] == "onnx-int8"
    assert "the tuned profile is not used: it was measured on 99 usable core(s), and" in result.err
    assert "run `edgeclip tune` again" in result.err


def checks(run: Command, bundle: Path) -> dict[str, dict[str, Any]]:
    document = json.loads(run("doctor", "--bundle", bundle, "--json").out)
    return {check["name"]: check for check in document["checks"]}


def test_doctor_and_cache_mention_profiles(run: Command, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    check = checks(run, tiny_bundle)["tuned profile"]
    assert (check["state"], check["detail"].startswith("none, so")) == ("ok", True)
    put_profile(bundle, tuned_profile(bundle))
    found = checks(run, tiny_bundle)
    said = "onnx-fp32 (ort, 1 thread), tuned for latency on 2026-11-22"
    assert found["tuned profile"]["detail"] == said
    assert found["bundle"]["detail"].startswith("onnx-fp32 gives the right answers here")
    put_profile(bundle, {**tuned_profile(bundle), "cores": 99})
    check = checks(run, tiny_bundle)["tuned profile"]
    assert (check["state"], check["suggestion"]) == ("problem", f"run edgeclip tune {tiny_bundle}")
    assert check["detail"].startswith("it is not used: it was measured on 99 usable core(s)")
    assert "1 tuned profile" in run("cache", "info").out
    (entry,) = [
        entry for entry in json.loads(run("cache", "info", "--json").out)["bundles"] if entry["profiles"]
    ]
    assert entry["bundle"] == bundle.digest[:16]
