from __future__ import annotations

import pytest

from edgeclip.tables import aligned


def test_columns_stand_below_each_other_and_numbers_end_at_the_right() -> None:
    rows = [("name", "ms", ""), ("a", "10.25", "slow"), ("long name", "3", "")]
    assert aligned(rows, right={1}) == [
        "name          ms",
        "a          10.25  slow",
        "long name      3",
    ]
    assert aligned(rows)[2] == "long name  3"
    assert aligned([]) == []


def test_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        aligned([("a", "b"), ("a",)])
