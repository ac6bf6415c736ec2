"""Labels of a live classifier that change: what is encoded, kept in memory, written, and shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import colour_picture

from edgeclip import bundle_labels
from edgeclip.cache import cache_root
from edgeclip.classify import ZeroShotClassifier
from edgeclip.labels import LabelBank
from edgeclip.runtime.session import RuntimeOptions

NAMES = [f"thing {number}" for number in range(40)]
# Batches of other sizes may add in another order: a rounding or two of values below 1.
ROUNDING = 1e-6


def _open(bundle: Path) -> ZeroShotClassifier:
    return ZeroShotClassifier.open(bundle, options=RuntimeOptions(threads=1), keep_text_tower=True)


def _files(pattern: str) -> list[Path]:
    return sorted(cache_root().rglob(pattern))


def _without_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(folder / "file" / "below"))


def test_sets_in_memory_need_no_cache(
    tiny_bundle_session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_cache(monkeypatch, tmp_path)
    with _open(tiny_bundle_session) as classifier:
        classifier.set_labels(NAMES)
        runs, first = classifier.text_tower_runs, classifier.bank.embeddings
        classifier.set_labels([*NAMES[::-1], "red"])  # "red" is the bundle's
        classifier.set_labels(NAMES[5:9])
        assert classifier.text_tower_runs == runs
        assert classifier.bank.embeddings.tobytes() == first[5:9].tobytes()
        classifier.set_labels([*NAMES, "new"])
        assert classifier.text_tower_runs == runs + 1
        assert classifier.bank.embeddings[:-1].tobytes() == first.tobytes()


def test_vectors_are_those_of_a_fresh_classifier(
    tiny_bundle_session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [NAMES, [*NAMES[::2], "new"], [*NAMES, "very " * 40 + "long"], ["newer", *NAMES[::-1], "blue"]]
    with _open(tiny_bundle_session) as live:
        for labels in sets:
            live.set_labels(labels)
            folder = tmp_path / str(len(labels))
            folder.mkdir()
            with monkeypatch.context() as patch, _open(tiny_bundle_session) as fresh:
                _without_cache(patch, folder)
                fresh.set_labels(labels)
                np.testing.assert_allclose(live.bank.embeddings, fresh.bank.embeddings, atol=ROUNDING)
                assert live.bank.truncated == fresh.bank.truncated
                assert live.bank.names == fresh.bank.names


def test_other_templates_are_other_vectors(tiny_bundle_session: Path) -> None:
    with _open(tiny_bundle_session) as classifier:
        classifier.set_labels(NAMES[:2])
        first, runs = classifier.bank.embeddings, classifier.text_tower_runs
        classifier.set_labels(NAMES[:2], templates="the {}")
        assert classifier.text_tower_runs == runs + 1
        assert not np.allclose(classifier.bank.embeddings, first, atol=ROUNDING)
        classifier.set_labels(NAMES[:2])
        assert classifier.text_tower_runs == runs + 1
        assert classifier.bank.embeddings.tobytes() == first.tobytes()


def test_what_is_kept_in_memory_is_bounded(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_labels, "_RECENT_ROWS", 25)
    with _open(tiny_bundle_session) as classifier:
        sets = [NAMES[start : start + 10] for start in range(0, 40, 10)]
        for labels in (*sets, NAMES, *sets):
            classifier.set_labels(labels)
            recent = classifier._labels._recent
            assert recent[0] is classifier.bank
            assert len(recent) == 1 or sum(map(len, recent)) <= 25
        assert len(recent) == 2
        for number in range(6):
            classifier.set_labels([f"one {number}"])
        assert len(classifier._labels._recent) == bundle_labels._RECENT_BANKS
        runs = classifier.text_tower_runs
        classifier.set_labels(NAMES)  # forgotten, but in the store
        assert classifier.text_tower_runs == runs


def test_a_whole_bank_is_written_for_what_a_process_begins_with(tiny_bundle_session: Path) -> None:
    with _open(tiny_bundle_session) as classifier:
        classifier.set_labels(NAMES)
        classifier.set_labels([*NAMES, "new"])
        assert len(_files("bank-*")) == 1
        assert len(_files("vectors-*")) == 2
    for _ in range(2):  # from vectors, then from the bank
        with _open(tiny_bundle_session) as classifier:
            classifier.set_labels([*NAMES, "new"])
            assert classifier.text_tower_runs == 0
            assert len(_files("bank-*")) == 2
            classifier.set_labels(NAMES[1:])
            assert classifier.text_tower_runs == 0
            assert len(_files("bank-*")) == 2


def test_labels_are_in_force_before_they_are_written(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _open(tiny_bundle_session) as classifier:
        classifier.set_labels(NAMES)
        seen: list[tuple[str, int]] = []
        real = classifier._activate

        def spy(bank: LabelBank, name: str | None) -> None:
            real(bank, name)
            seen.append((classifier.bank.names[-1], len(_files("vectors-*"))))

        monkeypatch.setattr(classifier, "_activate", spy)
        classifier.set_labels([*NAMES, "new"])
        assert seen == [("new", 1)]
        assert len(_files("vectors-*")) == 2


@pytest.mark.parametrize("pattern", ["vectors-*", "bank-*", "*"])
def test_damage_is_not_met_while_live_and_repaired_after(tiny_bundle_session: Path, pattern: str) -> None:
    with _open(tiny_bundle_session) as classifier:
        classifier.set_labels(NAMES)
        first, runs = classifier.bank.embeddings.copy(), classifier.text_tower_runs
        for path in _files(pattern):
            if path.is_file():
                path.unlink()  # a new file: the old one may still be mapped
                path.write_bytes(b"damaged")
        classifier.set_labels(NAMES[1:])
        assert classifier.text_tower_runs == runs
        assert classifier.bank.embeddings.tobytes() == first[1:].tobytes()
    for expected in (pattern != "bank-*", False):
        with _open(tiny_bundle_session) as classifier:
            classifier.set_labels(NAMES[1:])
            assert bool(classifier.text_tower_runs) == expected
            np.testing.assert_allclose(classifier.bank.embeddings, first[1:], atol=ROUNDING)


_NEIGHBOUR = """
import sys
from edgeclip import ZeroShotClassifier
with ZeroShotClassifier.open(sys.argv[1]) as classifier:
    classifier.set_labels(["of another process", "red"])
    print(classifier.text_tower_runs)
"""


def test_what_another_process_encodes_is_noticed(tiny_bundle_session: Path) -> None:
    with _open(tiny_bundle_session) as classifier:
        classifier.set_labels(NAMES)
        classifier.set_labels([*NAMES, "new"])  # every chunk there is has been seen
        runs = classifier.text_tower_runs
        command = [sys.executable, "-c", _NEIGHBOUR, str(tiny_bundle_session)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split() == ["1"]
        classifier.set_labels([*NAMES, "of another process"])
        assert classifier.text_tower_runs == runs


_FORK = """
import json, os, sys
from edgeclip import BackendError, ZeroShotClassifier
classifier = ZeroShotClassifier.open(sys.argv[1], keep_text_tower=True)
names = [f"thing {number}" for number in range(40)]
classifier.set_labels(names)
classifier.set_labels([*names, "new"])
before = classifier.bank
child = os.fork()
if not child:
    try:
        classifier.set_labels([*names, "of the child"])
    except BackendError as error:
        print(json.dumps("fork" in str(error)), flush=True)
    with ZeroShotClassifier.open(sys.argv[1]) as own:
        own.set_labels([*names, "of the child"])
        print(json.dumps([own.text_tower_runs, own.bank.embeddings[:40].tolist() ==
                          before.embeddings[:40].tolist()]), flush=True)
    os._exit(0)
os.waitpid(child, 0)
runs = classifier.text_tower_runs
assert classifier.bank is before
classifier.set_labels(["of the child", *names])
print(json.dumps([classifier.text_tower_runs - runs, len(classifier.bank)]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_shares_vectors_through_the_store_alone(tiny_bundle_session: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORK, str(tiny_bundle_session)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [True, [1, True], [0, 41]]


def test_eight_threads_change_labels_at_once(tiny_bundle_session: Path) -> None:
    with _open(tiny_bundle_session) as classifier:
        classifier.set_labels(NAMES)
        expected = dict(zip(NAMES, classifier.bank.embeddings.copy(), strict=True))
        runs = classifier.text_tower_runs

        def work(seed: int) -> None:
            for number in range(10):
                classifier.set_labels([*NAMES[seed : seed + 20], f"shared {number}", f"own {seed}"])
                answer = classifier.classify(colour_picture("red"), top_k=50)
                assert len(answer) == 22
                assert all(each.similarity == each.similarity for each in answer)
                bank = classifier.bank
                for name, row in zip(bank.names[:20], bank.embeddings, strict=False):
                    assert row.tobytes() == expected[name].tobytes()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        # Eighteen new labels, each encoded once: in eighteen runs, or fewer where two came together.
        assert classifier.text_tower_runs - runs <= 18
        again = classifier.text_tower_runs
        classifier.set_labels([f"shared {number}" for number in range(10)])
        assert classifier.text_tower_runs == again
