"""Many threads, changing labels: every answer is one that a single thread gives."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_bundle import COLOURS, colour_picture

from edgeclip.classify import Prediction, ZeroShotClassifier
from edgeclip.runtime.session import RuntimeOptions

LABEL_SETS = (
    ["red", "green", "blue"],
    ["white", "black"],
    ["dark red", "sea green", "sky blue", "yellow"],
    ["cyan", "magenta", "yellow", "black", "white"],
)
Key = frozenset[str]


def _answers(classifier: ZeroShotClassifier, rounds: int, threads: int, swaps: int) -> int:
    """Hammer a classifier and return how many answers were checked against the serial ones."""
    pictures = [colour_picture(name) for name in COLOURS]
    serial: dict[tuple[int, Key], list[Prediction]] = {}
    for labels in LABEL_SETS:
        classifier.set_labels(labels)
        for number, picture in enumerate(pictures):
            serial[number, frozenset(labels)] = classifier.classify(picture, top_k=5)
    start = threading.Barrier(threads + 1)
    seen: set[Key] = set()
    stopped: list[int] = []
    swapped = threading.Event()

    def work(seed: int) -> int:
        call = 0
        try:
            start.wait()
            while call < rounds or not swapped.is_set():  # a busy machine may starve either side
                number = (call * 7 + seed) % len(pictures)
                answer = classifier.classify(pictures[number], top_k=5)
                labels = frozenset(each.label for each in answer)
                # exactly the serial answer of one whole label set: labels, scores, similarities
                assert answer == serial[number, labels]
                seen.add(labels)
                call += 1
        finally:
            stopped.append(seed)
        return call

    def swap() -> int:
        start.wait()
        count = 0
        try:
            while (
                count < swaps or len(stopped) < threads
            ):  # so many at least, and all the while there are calls
                classifier.set_labels(LABEL_SETS[count % len(LABEL_SETS)])
                count += 1
                if count == swaps:
                    swapped.set()
        finally:
            swapped.set()
        return count

    with ThreadPoolExecutor(threads + 1) as pool:
        swapping = pool.submit(swap)
        checked = sum(pool.map(work, range(threads)))
        assert swapping.result() >= swaps
    assert len(seen) > 1
    return checked


def test_threads_get_the_serial_answers(tiny_bundle_session: Path) -> None:
    with ZeroShotClassifier.open(tiny_bundle_session, options=RuntimeOptions(threads=1)) as classifier:
        assert _answers(classifier, rounds=100, threads=4, swaps=40) >= 400


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_sixteen_threads_with_a_hundred_swaps(tiny_bundle_session: Path, threads: int) -> None:
    options = RuntimeOptions(threads=threads)
    with ZeroShotClassifier.open(tiny_bundle_session, options=options, keep_text_tower=True) as classifier:
        assert _answers(classifier, rounds=1000, threads=16, swaps=100) >= 16_000


def test_threads_may_encode_labels_at_once(tiny_bundle_session: Path) -> None:
    with ZeroShotClassifier.open(tiny_bundle_session, options=RuntimeOptions(threads=1)) as classifier:

        def work(seed: int) -> None:
            for number in range(5):
                classifier.set_labels([f"label {seed} {number}", "red"])
                assert classifier.classify(colour_picture("red"))[0].label

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert classifier.text_tower_runs == 40  # "red" came from the bundle, each other label once
