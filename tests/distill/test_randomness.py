"""Streams are functions of their name: the same everywhere, different for different names."""

from __future__ import annotations

import numpy as np
import pytest

from edgeclip.distill.randomness import Randomness, permutation, random_stream
from edgeclip.errors import ConfigError


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64, 65, 1000])
def test_an_order_holds_every_sample_once(count: int) -> None:
    order = permutation(count, seed=3, epoch=2)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_orders_are_the_ones_of_the_first_release() -> None:
    # Frozen: a checkpoint that is resumed must meet the order it was made with.
    assert permutation(10, seed=0, epoch=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert random_stream(1, 2, 3, "view").random(2).tolist() == [0.267757722696928, 0.02983377285818911]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [permutation(50, seed=seed, epoch=epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_every_place_is_equally_likely() -> None:
    count, epochs = 5, 4000
    places = np.stack([permutation(count, seed=1, epoch=epoch) for epoch in range(epochs)])
    seen = np.stack([(places == sample).mean(axis=0) for sample in range(count)])
    # 4 standard deviations of a share of 1/5 in 4000 draws
    assert np.abs(seen - 1 / count).max() < 4 * np.sqrt(0.16 / epochs)


def test_streams_with_different_names_differ() -> None:
    names = [(0, 0, 0, "view"), (1, 0, 0, "view"), (0, 1, 0, "view"), (0, 0, 1, "view"), (0, 0, 0, "caption")]
    drawn = [random_stream(*name).random() for name in names]  # type: ignore[arg-type]
    assert len(set(drawn)) == len(names)
    assert random_stream(*names[0]).random() == drawn[0]  # type: ignore[arg-type]
    assert Randomness(0, 0, 1).stream("view").random() == drawn[3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ((-1, 0, 0, "view"), "seed is -1"),
        ((0, 1 << 64, 0, "view"), "epoch is 18446744073709551616"),
        ((0, 0, 0, "luck"), "purpose is 'luck', expected one of order, replace"),
    ],
)
def test_names_out_of_range_are_errors(name: tuple[int, int, int, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        random_stream(*name)  # type: ignore[arg-type]


def test_too_many_samples_to_order_are_an_error() -> None:
    with pytest.raises(ConfigError, match="got 5000000000 samples"):
        permutation(5_000_000_000, seed=0, epoch=0)
