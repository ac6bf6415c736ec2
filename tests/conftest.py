"""Fixtures shared by all tests, and the path on which tests/tools is found."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "tools"))

# Engines and BLAS libraries must not fight over two cores while tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Tests that use onnxruntime without our backend must not let it report to its makers either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Nothing in the tests may ask a hub for weights.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _heeded_interrupts() -> Iterator[None]:
    """Let Ctrl-C count: what a shell script starts in the background ignores it, and so do its children."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _own_host_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a host cache of its own, so that no run sees what another one left."""
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: tiny matrices are faster so, and tests share the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Return the root of the checkout."""
    return TESTS.parent


@pytest.fixture(scope="session")
def tiny_bundle_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny real bundle that tests only read."""
    from tiny_bundle import make_tiny_bundle

    directory = tmp_path_factory.mktemp("tiny") / "bundle"
    make_tiny_bundle(directory)
    return directory


@pytest.fixture
def tiny_bundle(tiny_bundle_session: Path, tmp_path: Path) -> Path:
    """Return a private copy of the tiny bundle that a test may damage."""
    import shutil

    target = tmp_path / "tiny-bundle"
    shutil.copytree(tiny_bundle_session, target)
    return target
