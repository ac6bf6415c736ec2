"""Decisions on streams: the newest frame wins, counts add up, labels change, memory stays."""

from __future__ import annotations

import io
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import ConfigError, InputError
from edgeclip.frames import PictureSplitter, RawFormat, RawSplitter
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.stream import Ages, Decision, Frame, FrameReader, decide

NAMES = sorted(COLOURS)
SIDE_PX = 32
# Sums of float32 in double precision, rounded once.
ROUNDING = 1e-6


def _png(name: str, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(colour_picture(name, seed=seed)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def classifier(tiny_bundle_session: Path) -> Iterator[ZeroShotClassifier]:
    with ZeroShotClassifier.open(tiny_bundle_session, options=RuntimeOptions(threads=1)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _all_colours(classifier: ZeroShotClassifier) -> None:
    classifier.set_labels(NAMES)


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Yield a reading and a writing end; the test closes the writing end where the stream ends before."""
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)


def _best(decisions: list[Decision]) -> list[str]:
    return [each.answer.predictions[0].label for each in decisions]


def _file(tmp_path: Path, content: bytes) -> int:
    path = tmp_path / "stream"
    path.write_bytes(content)
    return os.open(path, os.O_RDONLY)


def test_every_frame_of_a_file_is_decided(classifier: ZeroShotClassifier, tmp_path: Path) -> None:
    descriptor = _file(tmp_path, b"--".join(map(_png, NAMES * 5)))
    with FrameReader(descriptor, PictureSplitter(), every_frame=True) as frames:
        decisions = list(decide(classifier, frames, top_k=2))
    os.close(descriptor)
    assert _best(decisions) == NAMES * 5
    assert [each.frame.counts.frames for each in decisions] == list(range(1, 41))
    assert {each.frame.counts.dropped for each in decisions} == {0}
    assert frames.counts.skipped_bytes == 2 * 39
    assert all(len(each.answer.predictions) == 2 for each in decisions)


def test_the_latest_frame_wins_and_the_last_is_decided(classifier: ZeroShotClassifier) -> None:
    with _pipe() as (reading, writing), FrameReader(reading, PictureSplitter()) as frames:
        for name in NAMES:
            os.write(writing, _png(name))
        os.close(writing)
        while not frames._ended:
            time.sleep(0.01)
        (decision,) = decide(classifier, frames)
    assert _best([decision]) == [NAMES[-1]]
    assert (decision.frame.counts.frames, decision.frame.counts.dropped) == (8, 7)


def test_a_slow_reader_of_every_frame_holds_the_writer_back() -> None:
    form = RawFormat(400, 400)
    with _pipe() as (reading, writing), FrameReader(reading, RawSplitter(form), every_frame=True) as frames:
        sent = threading.Event()

        def write() -> None:
            for value in range(6):
                rest = memoryview(bytes([value]) * form.size_bytes)
                while rest:
                    rest = rest[os.write(writing, rest) :]
            sent.set()
            os.close(writing)

        threading.Thread(target=write).start()
        assert not sent.wait(0.3)
        taken = []
        while (frame := frames.take()) is not None:
            taken.append(frame.data[0])
    assert taken == list(range(6))
    assert frames.counts.dropped == 0


def test_decisions_keep_their_distance(classifier: ZeroShotClassifier) -> None:
    with _pipe() as (reading, writing), FrameReader(reading, PictureSplitter()) as frames:

        def write() -> None:
            for number in range(50):
                os.write(writing, _png(NAMES[number % 8]))
                time.sleep(0.01)
            os.close(writing)

        threading.Thread(target=write).start()
        at, decisions = [], []
        for decision in decide(classifier, frames, every_s=0.1):
            at.append(time.perf_counter())
            decisions.append(decision)
    between = np.diff(at[:-1])  # the last frame is decided when the stream ends
    assert between.min() > 0.05
    assert 0.09 < np.median(between) < 0.2
    assert decisions[-1].frame.counts.frames == 50
    assert decisions[-1].frame.counts.dropped == 50 - len(decisions)


@pytest.mark.parametrize("smooth", [1, 3, 100])
def test_smoothing_is_the_unit_mean_of_the_last_embeddings(
    classifier: ZeroShotClassifier, tmp_path: Path, smooth: int
) -> None:
    order = ["red", "red", "blue", "blue", "blue", "green"]
    pictures = [_png(name, seed) for seed, name in enumerate(order)]
    descriptor = _file(tmp_path, b"".join(pictures))
    with FrameReader(descriptor, PictureSplitter(), every_frame=True) as frames:
        decisions = list(decide(classifier, frames, smooth=smooth, top_k=8))
    os.close(descriptor)
    embeddings = np.stack([classifier.embed_images(each) for each in pictures]).astype(np.float64)
    for number, decision in enumerate(decisions):
        mean = embeddings[max(0, number + 1 - smooth) : number + 1].mean(axis=0)
        mean /= np.linalg.norm(mean)
        assert decision.smoothed == min(number + 1, smooth)
        for said in decision.answer.predictions:
            row = classifier.bank.names.index(said.label)
            assert abs(said.similarity - mean @ classifier.bank.embeddings[row]) < ROUNDING


def test_labels_that_change_are_told_and_answer_at_once(classifier: ZeroShotClassifier) -> None:
    with _pipe() as (reading, writing), FrameReader(reading, PictureSplitter()) as frames:
        decisions = decide(classifier, frames)
        seen = []
        for labels in (NAMES, ["blue", "red"], ["green", "red"], ["green", "red"]):
            classifier.set_labels(labels)
            os.write(writing, _png("red"))
            decision = next(decisions)
            seen.append((decision.labels_version, decision.labels))
        os.close(writing)
        assert list(decisions) == []
    # The second change is to the labels of the third: another set, of the same names.
    assert [version for version, _ in seen] == [1, 2, 3, 4]
    assert [list(names) for _, names in seen] == [NAMES, ["blue", "red"], ["green", "red"], ["green", "red"]]


def test_the_version_is_that_of_the_labels_that_answered(classifier: ZeroShotClassifier) -> None:
    sets = [["red", "blue"], ["red", "green", "black"]]
    stop = threading.Event()

    def swap() -> None:
        number = 0
        while not stop.is_set():
            classifier.set_labels(sets[number % 2])
            number += 1

    with _pipe() as (reading, writing), FrameReader(reading, PictureSplitter(), every_frame=True) as frames:
        swapper = threading.Thread(target=swap)
        writer = threading.Thread(target=lambda: [os.write(writing, _png("red")) for _ in range(300)])
        swapper.start()
        writer.start()
        versions = []
        for decision in decide(classifier, frames, top_k=8):
            answered = sorted(each.label for each in decision.answer.predictions)
            assert answered == sorted(decision.labels)
            versions.append(decision.labels_version)
            if len(versions) == 300:
                os.close(writing)
        stop.set()
        swapper.join()
        writer.join()
    assert versions == sorted(versions)
    assert versions[-1] > 3


def test_a_broken_frame_is_left_out_and_told(classifier: ZeroShotClassifier, tmp_path: Path) -> None:
    whole = _png("red")
    header = whole.index(b"IDAT")
    broken = whole[: header + 4] + bytes(whole[header + 4] ^ 0xFF for _ in range(40)) + whole[header + 44 :]
    content = whole + broken + _png("blue")
    told: list[Frame] = []
    descriptor = _file(tmp_path, content)
    with FrameReader(descriptor, PictureSplitter(), every_frame=True) as frames:
        decisions = list(decide(classifier, frames, smooth=2, on_broken=lambda frame, _: told.append(frame)))
    assert _best(decisions)[0] == "red"
    assert [each.frame.counts.frames for each in decisions] == [1, 3]
    assert [frame.counts.frames for frame in told] == [2]
    assert frames.counts.frames == 3
    os.lseek(descriptor, 0, os.SEEK_SET)
    with (
        FrameReader(descriptor, PictureSplitter(), every_frame=True) as frames,
        pytest.raises(InputError, match=r"picture of \d+ bytes: cannot be decoded"),
    ):
        list(decide(classifier, frames))
    os.close(descriptor)


def test_raw_frames_are_classified(classifier: ZeroShotClassifier, tmp_path: Path) -> None:
    content = b"".join(colour_picture(name)[..., ::-1].tobytes() for name in NAMES)
    descriptor = _file(tmp_path, content + b"tail")
    splitter = RawSplitter(RawFormat(SIDE_PX, SIDE_PX, "bgr"))
    with FrameReader(descriptor, splitter, every_frame=True) as frames:
        assert _best(list(decide(classifier, frames))) == NAMES
    os.close(descriptor)
    assert frames.counts.inside
    assert (frames.counts.cut, frames.counts.skipped_bytes) == (1, 4)


def test_a_pipe_that_does_not_block_is_waited_for(classifier: ZeroShotClassifier) -> None:
    with _pipe() as (reading, writing), FrameReader(reading, PictureSplitter()) as frames:
        os.set_blocking(reading, False)
        decisions = decide(classifier, frames)
        for name in ("red", "blue"):
            time.sleep(0.05)
            os.write(writing, _png(name))
            assert _best([next(decisions)]) == [name]
        os.close(writing)
        assert list(decisions) == []


def test_a_pipe_of_a_high_number_is_waited_for(classifier: ZeroShotClassifier) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with _pipe() as (reading, writing), FrameReader(reading, PictureSplitter()) as frames:
            assert reading > 1024  # more than select() takes
            os.set_blocking(reading, False)
            decisions = decide(classifier, frames)
            time.sleep(0.05)
            os.write(writing, _png("red"))
            assert _best([next(decisions)]) == ["red"]
            os.close(writing)
    finally:
        for each in others:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_stream_that_cannot_be_read(classifier: ZeroShotClassifier, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with (
        FrameReader(descriptor, PictureSplitter()) as frames,
        pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"),
    ):
        list(decide(classifier, frames))
    os.close(descriptor)


def test_a_descriptor_that_is_closed(classifier: ZeroShotClassifier) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with (
        FrameReader(reading, PictureSplitter()) as frames,
        pytest.raises(InputError, match=r"cannot be read \(Bad file descriptor\)"),
    ):
        list(decide(classifier, frames))
    os.close(writing)


def test_leaving_does_not_wait_for_bytes() -> None:
    with _pipe() as (reading, writing):
        began = time.perf_counter()
        with FrameReader(reading, PictureSplitter()):
            pass
        assert time.perf_counter() - began < 1
        os.close(writing)


def test_a_file_that_gets_the_number_of_a_closed_one_is_not_read(tmp_path: Path) -> None:
    class Waiting(RawSplitter):
        asked, go = threading.Event(), threading.Event()

        def space(self) -> memoryview:
            self.asked.set()
            self.go.wait()
            return super().space()

    with _pipe() as (reading, writing):
        descriptor = os.dup(reading)
        with FrameReader(descriptor, Waiting(RawFormat(4, 4))):
            Waiting.asked.wait()  # it is about to read
        os.close(descriptor)
        assert _file(tmp_path, b"not yours") == descriptor
        Waiting.go.set()
        os.close(writing)
        while any(each.name == "edgeclip-frames" and each.is_alive() for each in threading.enumerate()):
            time.sleep(0.01)
    assert os.read(descriptor, 99) == b"not yours"
    os.close(descriptor)


def test_a_broken_frame_takes_no_turn(classifier: ZeroShotClassifier) -> None:
    broken = bytearray(_png("red"))
    at = broken.index(b"IDAT") + 4
    broken[at : at + 40] = bytes(40)
    told: list[int] = []
    with _pipe() as (reading, writing), FrameReader(reading, PictureSplitter()) as frames:
        os.write(writing, broken)
        decisions = decide(
            classifier, frames, every_s=3600, on_broken=lambda frame, _: told.append(frame.counts.frames)
        )
        threading.Timer(0.2, os.write, (writing, _png("blue"))).start()
        decision = next(decisions)
        os.close(writing)
    assert told == [1]
    assert decision.frame.counts.frames == 2


@pytest.mark.parametrize(("every_s", "smooth"), [(-1.0, 1), (float("nan"), 1), (0.0, 0)])
def test_settings_that_cannot_be(classifier: ZeroShotClassifier, every_s: float, smooth: int) -> None:
    with pytest.raises(ConfigError, match=f"every {every_s!r} s over {smooth} frames"):
        next(decide(classifier, FrameReader(0, PictureSplitter()), every_s=every_s, smooth=smooth))


def test_quantiles_of_ages_are_within_a_percent() -> None:
    drawn = np.random.default_rng(0).lognormal(2, 1, 5000)
    ages = Ages()
    for each in drawn:
        ages.add(float(each))
    for share in (0.01, 0.5, 0.9, 0.99):
        expected = float(np.quantile(drawn, share, method="inverted_cdf"))
        assert abs(ages.quantile_ms(share) / expected - 1) < 0.0101
    assert ages.longest_ms == drawn.max()
    assert np.isnan(Ages().quantile_ms(0.5))
