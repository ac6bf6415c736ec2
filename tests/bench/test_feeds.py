"""Inputs of towers whose numbers do not matter have a size wherever a tower leaves it open."""

from __future__ import annotations

import pytest

from edgeclip.bench.feeds import TEXT_LENGTH, example_feeds
from edgeclip.runtime.session import TensorSpec


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (TensorSpec("image", "uint8", ("B", 8, 8, 3)), (5, 8, 8, 3)),
        (TensorSpec("tokens", "int32", ("B", 77)), (5, 77)),
        (TensorSpec("tokens", "int32", ("batch", "length")), (5, TEXT_LENGTH)),
        (TensorSpec("tokens", "int32", (1, 12)), (1, 12)),
    ],
)
def test_only_the_first_free_axis_is_the_batch(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    feed = example_feeds({spec.name: spec}, 5)[spec.name]
    assert feed.shape == shape
    assert feed.dtype == spec.dtype
