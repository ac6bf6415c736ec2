"""Temperatures: the fit against scipy's and torch's, and what is said about it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.confidence import LEAST_PICTURES, fit_scale, fit_temperature, reliability
from edgeclip.errors import ConfigError, InputError


def drawn(
    count: int, labels: int = 12, *, scale: float = 18.0, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return cosines, and labels that are right as often as the softmax at ``scale`` says."""
    random = np.random.default_rng(seed)
    cosines = np.clip(random.normal(0.1, 0.12, (count, labels)), -1, 1)
    chances = np.exp(scale * cosines)
    chances /= chances.sum(axis=1, keepdims=True)
    targets = np.array([random.choice(labels, p=row) for row in chances])
    return cosines, targets


def loss(scale: float, cosines: NDArray[np.float64], targets: NDArray[np.intp]) -> float:
    special = pytest.importorskip("scipy.special")
    logits = scale * cosines
    return float((special.logsumexp(logits, axis=1) - logits[np.arange(len(targets)), targets]).mean())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([2, 12, 80]), st.floats(3, 60))
def test_the_fit_is_the_minimum_that_scipy_finds(seed: int, labels: int, scale: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    cosines, targets = drawn(150, labels, scale=scale, seed=seed)
    found = optimize.minimize_scalar(
        loss, bounds=(1e-3, 100), args=(cosines, targets), method="bounded", options={"xatol": 1e-9}
    )
    ours = fit_scale(cosines, targets)
    assert ours == pytest.approx(found.x, rel=1e-5)
    assert loss(ours, cosines, targets) <= found.fun + 1e-12


def test_the_fit_is_the_minimum_that_torch_finds() -> None:
    torch = pytest.importorskip("torch")
    cosines, targets = drawn(400)
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_scale], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(
            log_scale.exp() * torch.from_numpy(cosines), torch.from_numpy(targets)
        )
        value.backward()
        return value

    optimizer.step(closure)
    assert fit_scale(cosines, targets) == pytest.approx(log_scale.exp().item(), rel=1e-6)


def test_the_scale_that_made_the_labels_is_found_again() -> None:
    cosines, targets = drawn(4_000, scale=18.0)
    fit = fit_temperature(cosines, targets, scale_before=60.0)
    assert fit.scale == pytest.approx(18.0, rel=0.05)
    assert fit.temperature == 1 / fit.scale
    assert fit.improves
    assert fit.after.error < 0.04 < fit.before.error
    assert fit.before.low <= fit.before.error <= fit.before.high
    assert fit.after.accuracy == fit.before.accuracy  # the order of labels does not depend on it
    assert fit.after.n == 4_000
    assert fit.labels == 12
    assert max(fit.fold_scales) - min(fit.fold_scales) < 2


def test_labels_that_are_always_right_ask_for_the_largest_scale() -> None:
    cosines, _ = drawn(60)
    assert fit_scale(cosines, cosines.argmax(axis=1)) == 100.0


def test_what_is_said_is_measured_on_other_pictures() -> None:
    # The best label is always right in one fold and seldom in the other: each is scored at the other's scale.
    cosines, _ = drawn(100)
    place = np.empty(100, np.intp)
    place[np.random.default_rng(0).permutation(100)] = np.arange(100) % 2
    ordered = cosines.argsort(axis=1)
    targets = np.where((place == 0) | (np.arange(100) % 5 == 0), ordered[:, -1], ordered[:, -2])
    fit = fit_temperature(cosines, targets, scale_before=10.0, folds=2)
    at_all = reliability(cosines, targets, np.full(100, fit.scale))
    assert fit.after.nll > at_all.nll + 0.5


def test_reliability_of_scores_is_that_of_sklearn_and_of_the_mean() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    cosines, targets = drawn(300)
    found = reliability(cosines, targets, np.full(300, 25.0))
    special = pytest.importorskip("scipy.special")
    scores = special.softmax(25.0 * cosines, axis=1)
    assert found.nll == pytest.approx(metrics.log_loss(targets, scores, labels=range(12)), rel=1e-9)
    assert found.score == pytest.approx(scores.max(axis=1).mean())
    assert found.accuracy == pytest.approx((scores.argmax(axis=1) == targets).mean())
    assert found.to_dict()["n"] == 300


def test_the_same_pictures_in_the_same_order_give_the_same_fit() -> None:
    cosines, targets = drawn(80)
    fits = [fit_temperature(cosines, targets, scale_before=10.0, seed=seed) for seed in (0, 0, 1)]
    assert fits[0] == fits[1]
    assert fits[0].fold_scales != fits[2].fold_scales
    assert fits[0].to_dict()["improves"] in (True, False)


def test_too_few_pictures() -> None:
    cosines, targets = drawn(LEAST_PICTURES - 1)
    with pytest.raises(InputError, match="got 49 labelled pictures, expected at least 50"):
        fit_temperature(cosines, targets, scale_before=10.0)


def test_one_label() -> None:
    cosines, _ = drawn(60)
    with pytest.raises(InputError, match="all 60 pictures have one label"):
        fit_temperature(cosines, np.full(60, 3), scale_before=10.0)


@pytest.mark.parametrize("folds", [1, 61])
def test_folds_out_of_range(folds: int) -> None:
    cosines, targets = drawn(60)
    with pytest.raises(ConfigError, match=f"got {folds}, expected 2 to 60"):
        fit_temperature(cosines, targets, scale_before=10.0, folds=folds)


def test_labels_that_do_not_belong_to_the_pictures() -> None:
    cosines, _ = drawn(60)
    with pytest.raises(InputError, match=rf"and all labels {cosines.mean():.4f}, expected more"):
        fit_scale(cosines, cosines.argmin(axis=1))


@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [
        ((3, 4), [0, 1], r"shape \(3, 4\) and targets of \(2,\)"),
        ((0, 4), [], r"shape \(0, 4\)"),
        ((2, 4), [0, 4], "not all columns 0 to 3"),
        ((2, 4), [0.5, 1.0], "targets of float64"),
    ],
)
def test_arrays_that_do_not_fit(shape: tuple[int, int], targets: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_scale(np.zeros(shape), targets)


def test_cosines_that_are_not_finite() -> None:
    cosines, targets = drawn(60)
    for row, value in itertools.product((7,), (np.nan, np.inf)):
        broken = cosines.copy()
        broken[row, 0] = value
        with pytest.raises(InputError, match="picture 7 are not finite"):
            fit_scale(broken, targets)
