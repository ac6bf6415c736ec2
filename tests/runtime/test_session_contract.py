"""What every session promises, checked on every backend that runs here and on the public fake."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.bundle import Bundle
from edgeclip.errors import BackendError, InputError
from edgeclip.runtime import Placement, RuntimeOptions, Session, open_session
from edgeclip.runtime.session import BACKENDS, OpenSession
from edgeclip.testing import FakeSession

RUNNABLE = [
    name for name, backend in BACKENDS.items() if "onnx" in backend.formats and not backend.unavailable()
]
# A batch may be computed with other kernels than single rows; both are float32 sums of at most a few hundred.
BATCH_TOLERANCE = 1e-5


@pytest.fixture(params=[*RUNNABLE, "tensorrt on stand-ins", "fake"])
def opened(request: pytest.FixtureRequest, tiny_bundle_session: Path) -> Callable[[str], OpenSession]:
    """Return a function that opens an image or text tower on one backend."""

    def open_tower(tower: str) -> OpenSession:
        if request.param == "fake":
            return FakeSession(tower, image_size_px=(32, 32), context_length=16)  # type: ignore[arg-type]
        files = Bundle.open(tiny_bundle_session).variant("onnx-fp32").tower(tower)
        if request.param == "tensorrt on stand-ins":
            from fake_cuda import open_on_stand_ins

            return open_on_stand_ins(files)
        return open_session(files, options=RuntimeOptions(backend=request.param, threads=2))

    return open_tower


def pictures(n: int, seed: int = 0) -> dict[str, Any]:
    return {"image": np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)}


def test_a_session_says_what_it_takes_gives_and_where_it_runs(opened: Callable[[str], OpenSession]) -> None:
    with opened("image") as session:
        protocol: Session = session  # mypy checks that it is one
        spec = protocol.inputs["image"]
        assert (spec.dtype, spec.shape[1:]) == ("uint8", (32, 32, 3))
        assert isinstance(spec.shape[0], str)
        assert protocol.outputs["image_embedding"].dtype == "float32"
        assert isinstance(protocol.chosen, Placement)
        assert protocol.chosen.reason
        assert protocol.chosen.threads >= 1


def test_embeddings_are_unit_rows(opened: Callable[[str], OpenSession]) -> None:
    with opened("image") as session:
        embedding = session.run(pictures(3))["image_embedding"]
    assert embedding.shape == (3, 16)
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)


def test_a_text_tower_runs_too(opened: Callable[[str], OpenSession]) -> None:
    with opened("text") as session:
        result = session.run({"tokens": np.zeros((2, 16), np.int32)})
    assert result["text_embedding"].shape == (2, 16)


def test_a_batch_equals_its_single_rows(opened: Callable[[str], OpenSession]) -> None:
    feeds = pictures(5)
    with opened("image") as session:
        batch = session.run(feeds)["image_embedding"]
        singles = [session.run({"image": row[None]})["image_embedding"] for row in feeds["image"]]
    np.testing.assert_allclose(batch, np.concatenate(singles), atol=BATCH_TOLERANCE)


def test_arrays_that_are_not_contiguous_are_taken(opened: Callable[[str], OpenSession]) -> None:
    flipped = pictures(2)["image"][:, ::-1, :, ::-1]
    with opened("image") as session:
        expected = session.run({"image": flipped.copy()})["image_embedding"]
        np.testing.assert_array_equal(session.run({"image": flipped})["image_embedding"], expected)


def test_feeds_are_only_read(opened: Callable[[str], OpenSession]) -> None:
    feeds = pictures(2)
    before = feeds["image"].copy()
    feeds["image"].flags.writeable = False
    with opened("image") as session:
        session.run(feeds)
    np.testing.assert_array_equal(feeds["image"], before)


def test_results_belong_to_the_caller(opened: Callable[[str], OpenSession]) -> None:
    with opened("image") as session:
        first = session.run(pictures(2))["image_embedding"]
        kept = first.copy()
        second = session.run(pictures(2, seed=1))["image_embedding"]
        np.testing.assert_array_equal(first, kept)
        second[:] = 7  # writing is allowed and disturbs nobody
        np.testing.assert_array_equal(session.run(pictures(2))["image_embedding"], kept)


def test_results_outlive_the_session(opened: Callable[[str], OpenSession]) -> None:
    with opened("image") as session:
        first = session.run(pictures(64))["image_embedding"]
        kept = first.copy()
    del session
    gc.collect()
    _ = [np.full((64, 16), 9, np.float32) for _ in range(50)]
    np.testing.assert_array_equal(first, kept)


WRONG_FEEDS: list[tuple[dict[str, Any], str]] = [
    ({}, r"got the inputs no inputs, expected 'image'"),
    ({"picture": np.zeros((1, 32, 32, 3), np.uint8)}, r"got the inputs 'picture', expected 'image'"),
    (
        {**pictures(1), "mask": np.zeros(3, np.uint8)},
        r"got the inputs 'image', 'mask', expected 'image'",
    ),
    ({"image": [[1, 2]]}, r"image: got list, expected a numpy array of uint8 \(\w+, 32, 32, 3\)"),
    (
        {"image": np.zeros((1, 32, 32, 3), np.float32)},
        r"image: got dtype float32, expected uint8. Convert with `array.astype\('uint8'\)`",
    ),
    (
        {"image": np.zeros((1, 30, 32, 3), np.uint8)},
        r"image: got shape \(1, 30, 32, 3\), expected \(\w+, 32, 32, 3\)",
    ),
    ({"image": np.zeros((32, 32, 3), np.uint8)}, r"got shape \(32, 32, 3\).*`array\[None\]`"),
    ({"image": np.zeros((0, 32, 32, 3), np.uint8)}, r"got the empty shape \(0, 32, 32, 3\)"),
    ({"image": np.zeros((1, 3, 32, 32), np.uint8)}, r"got shape \(1, 3, 32, 32\)"),
]


@pytest.mark.parametrize(("feeds", "message"), WRONG_FEEDS, ids=range(len(WRONG_FEEDS)))
def test_wrong_feeds_are_named(
    opened: Callable[[str], OpenSession], feeds: dict[str, Any], message: str
) -> None:
    with opened("image") as session, pytest.raises(InputError, match=message):
        session.run(feeds)


def test_another_byte_order_is_another_dtype(opened: Callable[[str], OpenSession]) -> None:
    with opened("text") as session, pytest.raises(InputError, match=r"tokens: got dtype >i4, expected int32"):
        session.run({"tokens": np.zeros((1, 16), ">i4")})


def test_closing_twice_is_harmless_and_use_after_it_is_an_error(
    opened: Callable[[str], OpenSession],
) -> None:
    session = opened("image")
    session.close()
    session.close()
    assert "closed" in repr(session)
    with pytest.raises(BackendError, match=r"image tower: the session is closed"):
        session.run(pictures(1))


def test_leaving_the_context_closes_it_when_something_fails(opened: Callable[[str], OpenSession]) -> None:
    session = opened("image")
    with pytest.raises(KeyError), session:
        raise KeyError
    with pytest.raises(BackendError, match="closed"):
        session.run(pictures(1))


def test_many_threads_get_the_answers_of_one(opened: Callable[[str], OpenSession]) -> None:
    feeds = [pictures(1, seed=seed) for seed in range(8)]
    wrong: list[int] = []
    with opened("image") as session:
        expected = [session.run(feed)["image_embedding"] for feed in feeds]

        def work() -> None:
            for _ in range(10):
                for number, feed in enumerate(feeds):
                    if not np.array_equal(session.run(feed)["image_embedding"], expected[number]):
                        wrong.append(number)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_closing_while_others_run_ends_in_answers_or_the_closed_error(
    opened: Callable[[str], OpenSession],
) -> None:
    session = opened("image")
    feeds = pictures(4)
    expected = session.run(feeds)["image_embedding"]
    other: list[BaseException] = []
    started = threading.Barrier(5)

    def work() -> None:
        started.wait()
        try:
            while True:
                np.testing.assert_array_equal(session.run(feeds)["image_embedding"], expected)
        except BackendError:
            pass
        except BaseException as error:
            other.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    session.close()
    for thread in threads:
        thread.join(timeout=20)
    assert other == []


FORK = """
    import os, sys
    import numpy as np
    from edgeclip.errors import BackendError
    from edgeclip.runtime import RuntimeOptions, open_session
    from edgeclip.testing import FakeSession

    def make():
        if sys.argv[1] == "fake":
            return FakeSession()
        return open_session(sys.argv[2], options=RuntimeOptions(backend=sys.argv[1], threads=2))

    feeds = {"image": np.zeros((2, 32, 32, 3), np.uint8)}
    session = make()
    session.run(feeds)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            session.run(feeds)
            sys.exit(3)
        except BackendError as error:
            assert "after fork" in str(error) and str(parent) in str(error), error
        fresh = make()  # a session of its own works
        fresh.run(feeds)
        session.close()
        sys.exit(7)  # the ordinary way out, with every destructor
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    session.run(feeds)  # the parent goes on
    session.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("backend", [*RUNNABLE, "fake"])
def test_use_after_fork_is_an_error_and_nothing_hangs(backend: str, tiny_bundle_session: Path) -> None:
    model = Bundle.open(tiny_bundle_session).variant("onnx-fp32").tower("image").model
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORK), backend, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
