"""Rounding by moments: windows against torch's unfold, errors against brute force, pairs, memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.bundle import TensorEntry
from edgeclip.calibration.rounding import Moments, Windows, moments, round_to_moments
from edgeclip.errors import CalibrationError
from edgeclip.quantization import Scheme, neighbours, weight_steps

LIMIT = 127


def correlated(terms: int, seed: int = 0, groups: int = 1) -> NDArray[np.float64]:
    """Return second moments of inputs that rise and fall together."""
    rng = np.random.default_rng(seed)
    few = rng.normal(size=(groups, terms, max(1, terms // 4)))
    return np.asarray(few @ few.transpose(0, 2, 1) + 0.02 * np.eye(terms))


def errors(lost: NDArray[np.float64], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.einsum("goi,gij,goj->go", lost, moment, lost))


def drawn(shape: tuple[int, int, int], seed: int = 1) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return weight, (np.abs(weight).max(axis=2) / LIMIT).astype(np.float32)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_windows_are_those_of_torch(kernel: tuple[int, int], groups: int, stride: int, dilation: int) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(3, 6, 9, 8)).astype(np.float32)
    windows = Windows("x", (6, 9, 8), kernel, (stride, stride), (1, 2, 1, 2), (dilation, dilation), groups)
    found = windows.drawn(values.ravel(), 10**6, np.random.default_rng(0))
    unfold = torch.nn.Unfold(kernel, dilation=dilation, padding=(1, 2), stride=stride)
    wanted = unfold(torch.from_numpy(values)).numpy()  # (batch, channels * kernel, places)
    wanted = wanted.transpose(1, 0, 2).reshape(groups, windows.terms, -1)
    assert np.array_equal(found, wanted)
    assert windows.positions * len(values) == found.shape[2]


def test_positions_are_drawn_once_each() -> None:
    values = np.arange(4 * 50 * 3, dtype=np.float32)
    found = Windows("x", (50, 3)).drawn(values, 70, np.random.default_rng(0))
    assert found.shape == (1, 3, 70)
    assert len(np.unique(found[0, 0])) == 70
    assert (found[0, 1] == found[0, 0] + 1).all()


def test_it_comes_near_the_best_there_is() -> None:
    """All 3^6 neighbours of six weights are tried."""
    ratios = []
    for seed in range(20):
        weight, _ = drawn((1, 1, 6), seed)
        steps, moment = np.full((1, 1), 0.4, np.float32), correlated(6, seed)
        made = round_to_moments(weight, moment, steps, limit=LIMIT)
        nearest = np.rint(weight / 0.4)
        shifts = np.array(list(itertools.product((-1, 0, 1), repeat=6)))
        tried = nearest[0] + shifts
        lost = weight[0] - tried * steps[0, 0]
        best = np.einsum("ki,ij,kj->k", lost, moment[0], lost).min()
        got = errors(weight - made * steps[..., None].astype(np.float64), moment)[0, 0]
        worst = errors(weight - nearest * steps[..., None].astype(np.float64), moment)[0, 0]
        assert best <= got * (1 + 1e-9)
        assert got <= worst * (1 + 1e-9)
        ratios.append((got / best, worst / best))
    mean_got, mean_nearest = np.exp(np.log(ratios).mean(axis=0))
    assert mean_got < 1.5
    assert mean_nearest > 2 * mean_got


@pytest.mark.parametrize("shape", [(1, 40, 200), (30, 1, 25), (4, 6, 18)])
def test_errors_fall(shape: tuple[int, int, int]) -> None:
    weight, steps = drawn(shape)
    moment = correlated(shape[2], groups=shape[0])
    made = round_to_moments(weight, moment, steps, limit=LIMIT)
    wide = steps.astype(np.float64)[..., None]
    got = errors(weight - made * wide, moment)
    nearest = errors(weight - np.rint(weight / wide) * wide, moment)
    assert (got <= nearest * (1 + 1e-9)).all()
    assert got.mean() < 0.45 * nearest.mean()


def test_uncorrelated_inputs_give_nearest_levels() -> None:
    weight, steps = drawn((1, 8, 100))
    moment = np.diag(np.random.default_rng(0).uniform(0.5, 2, 100))[None]
    made = round_to_moments(weight, moment, steps, limit=LIMIT)
    assert np.array_equal(made, np.rint(weight / steps.astype(np.float64)[..., None]))


def test_inputs_that_never_vary_do_no_harm() -> None:
    weight, steps = drawn((2, 3, 9))
    moment = correlated(9, groups=2)
    moment[0] = 0
    moment[1, 4] = moment[1, :, 4] = 0
    made = round_to_moments(weight, moment, steps, limit=LIMIT)
    assert np.array_equal(made[0], np.rint(weight[0] / steps[0].astype(np.float64)[:, None]))
    assert np.abs(made).max() <= LIMIT


def test_moments_of_low_rank_are_damped_until_they_can_be_inverted() -> None:
    weight, steps = drawn((1, 4, 60))
    few = 1e6 * np.ones((1, 60, 1)) + 1e-6 * np.random.default_rng(0).normal(size=(1, 60, 1))
    moment = few @ few.transpose(0, 2, 1)
    moment[0, 0, 0] = -1e11  # as rounding leaves it where terms cancel
    made = round_to_moments(weight, moment, steps, limit=LIMIT)
    assert np.abs(made).max() <= LIMIT
    assert np.abs(made - weight / steps.astype(np.float64)[..., None]).max() < 60


@pytest.mark.parametrize(("channels", "positions"), [(64, 1), (7, 9), (8, 4)])
def test_pairs_keep_their_bound(channels: int, positions: int) -> None:
    """Two terms that an engine adds up in 16 bits: 255 times their sum fits."""
    weight = np.random.default_rng(3).normal(size=(600, channels, positions, 1)).astype(np.float32)
    steps = weight_steps(weight, 0, Scheme(fit_pairs=True))[None]
    terms, moment = channels * positions, correlated(channels * positions, 5)
    given = weight.reshape(1, 600, terms)
    met = neighbours(channels, positions)

    def largest(made: NDArray[np.int8]) -> int:
        rows = made[0].astype(int).reshape(600, channels, positions).transpose(0, 2, 1)
        running = rows.reshape(600, -1)
        filled = np.pad(rows, ((0, 0), (0, 0), (0, channels % 2))).reshape(600, -1)
        most = 0
        for each in (running, filled):
            each = np.pad(each, ((0, 0), (0, each.shape[1] % 2)))
            first, second = each[:, 0::2], each[:, 1::2]
            alike = first * second > 0
            most = max(most, int((np.abs(first + second) * alike).max()))
        return most

    free = round_to_moments(given, moment, steps, limit=LIMIT)
    bound = round_to_moments(given, moment, steps, limit=LIMIT, neighbours=met)
    assert largest(free) > 128
    assert largest(bound) <= 128
    wide = steps.astype(np.float64)[..., None]
    nearest = errors(given - np.rint(given / wide) * wide, moment).mean()
    assert errors(given - bound * wide, moment).mean() < 0.6 * nearest


def test_neighbours_are_mutual() -> None:
    for channels, positions in ((5, 1), (6, 9), (7, 9), (1, 25)):
        for way in neighbours(channels, positions):
            met = np.flatnonzero(way >= 0)
            assert (way[way[met]] == met).all()
            assert (way[met] != met).all()
    assert neighbours(3, 2).tolist() == [[2, 4, 0, 5, 1, 3], [2, 3, 0, 1, -1, -1]]


def test_centred_moments_are_covariances() -> None:
    values = np.random.default_rng(0).normal(2, 1, size=(1, 5, 400))
    seen = Moments(values @ values.transpose(0, 2, 1) / 400, values.mean(axis=2))
    assert np.allclose(seen.centred[0], np.cov(values[0], bias=True))


class _Same:
    """A graph that gives its input back, and the session of it."""

    digest = "same"
    inputs: ClassVar[dict[str, TensorEntry]] = {
        "x": TensorEntry(name="x", dtype="float32", shape=("batch", 4))
    }

    @contextlib.contextmanager
    def values(self, names: Sequence[str]) -> Iterator[_Same]:
        assert list(names) == ["x"]
        yield self

    def run(self, feeds: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        return {"0": feeds["x"].ravel()}


def test_moments_are_means_over_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(37, 4)).astype(np.float32)
    ((windows, found),) = moments(_Same(), rows, [Windows("x", (4,))] * 2, what="tower")  # type: ignore[arg-type]
    assert windows.terms == 4
    np.testing.assert_allclose(found.second[0], rows.T @ rows / 37, rtol=1e-5)
    np.testing.assert_allclose(found.first[0], rows.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(("value", "message"), [(1e25, "'x' is so large"), (np.inf, "'x' is not finite")])
def test_moments_that_are_not_finite_are_an_error(value: float, message: str) -> None:
    rows = np.ones((9, 4), np.float32)
    rows[5, 2] = value
    with pytest.raises(CalibrationError, match=f"tower: {message} for the calibration rows"):
        list(moments(_Same(), rows, [Windows("x", (4,))], what="tower"))  # type: ignore[arg-type]
