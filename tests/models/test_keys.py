"""Key maps read and write the same table, and say exactly what does not fit."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor  # noqa: E402

from edgeclip.errors import InputError  # noqa: E402
from edgeclip.models.keys import Constant, KeyMap, KeyMismatchError, KeyPair  # noqa: E402

MAP = KeyMap(
    (
        KeyPair("plain", "a.plain"),
        KeyPair("matrix", "a.matrix", transposed=True),
        KeyPair("scale", "a.scale", theirs_shape=(3, 1, 1)),
        KeyPair("qkv", ("q", "k", "v")),
        KeyPair("batches", "a.batches"),
    ),
    (
        Constant("a.bias", (4,)),
        Constant("a.ids", (1, 7), value=None),
        Constant("a.maybe", (2,), value=1.0, required=False),
    ),
)
SHAPES = {"plain": (2, 3), "matrix": (3, 5), "scale": (3,), "qkv": (6, 2), "batches": ()}


@pytest.fixture
def ours() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items() if key != "batches"
    }
    return state | {"batches": torch.tensor(7)}


def test_round_trip_is_bit_identical(ours: dict[str, Tensor]) -> None:
    theirs = MAP.to_theirs(ours)
    assert set(theirs) == {"a.plain", "a.matrix", "a.scale", "q", "k", "v", "a.batches", "a.bias"}
    assert theirs["a.matrix"].shape == (5, 3)
    assert theirs["a.scale"].shape == (3, 1, 1)
    assert all(value.is_contiguous() for value in theirs.values())
    assert torch.equal(theirs["a.bias"], torch.zeros(4))
    back = MAP.to_ours(theirs, SHAPES, where="x")
    assert set(back) == set(ours)
    for key, value in ours.items():
        assert torch.equal(back[key], value)
        assert back[key].dtype == value.dtype


def test_prefixes_stand_before_every_key(ours: dict[str, Tensor]) -> None:
    prefixed = MAP.prefixed(ours="tower.", theirs="visual.")
    theirs = prefixed.to_theirs({f"tower.{key}": value for key, value in ours.items()})
    assert all(key.startswith("visual.") for key in theirs)
    assert set((MAP + prefixed).to_theirs(ours | {f"tower.{key}": ours[key] for key in ours})) == {
        key.removeprefix("visual.") for key in theirs
    } | set(theirs)


def test_everything_that_does_not_fit_is_listed(ours: dict[str, Tensor]) -> None:
    theirs = MAP.to_theirs(ours)
    del theirs["a.plain"], theirs["k"]
    theirs["surprise"] = torch.zeros(1)
    theirs["a.scale"] = torch.zeros(4)
    theirs["a.bias"] = torch.ones(4)
    with pytest.raises(KeyMismatchError) as caught:
        MAP.to_ours(theirs, SHAPES, where="file 'x.pt'")
    message = str(caught.value)
    assert message.startswith(
        "file 'x.pt': the weights do not fit: missing keys ['a.plain', 'k'], unexpected"
    )
    assert "unexpected keys ['surprise']" in message
    assert "'a.scale' is (4,) instead of (3, 1, 1)" in message
    assert "'a.bias' is not 0 throughout" in message
    assert caught.value.differences.count == 5


def test_long_lists_are_cut_in_the_message_and_whole_on_the_exception() -> None:
    long = KeyMap(tuple(KeyPair(f"k{i:02}", f"t{i:02}") for i in range(30)))
    with pytest.raises(KeyMismatchError, match=r"'t19', … and 10 more\], unexpected keys \[\]") as caught:
        long.to_ours({}, {f"k{i:02}": () for i in range(30)}, where="x")
    assert len(caught.value.differences.missing) == 30
    assert isinstance(caught.value, InputError)


def test_parts_of_different_widths_are_named(ours: dict[str, Tensor]) -> None:
    theirs = MAP.to_theirs(ours) | {"k": torch.zeros(2, 9)}
    with pytest.raises(
        KeyMismatchError, match=r"\('q', 'k', 'v'\) have shapes \[\(2, 2\), \(2, 9\), \(2, 2\)\]"
    ):
        MAP.to_ours(theirs, SHAPES, where="x")


def test_parts_that_are_too_few_rows_are_named(ours: dict[str, Tensor]) -> None:
    theirs = MAP.to_theirs(ours) | {"k": torch.zeros(1, 2)}
    with pytest.raises(KeyMismatchError, match=r"'q \+ k \+ v' is \(5, 2\) instead of \(6, 2\)"):
        MAP.to_ours(theirs, SHAPES, where="x")


def test_constant_of_another_shape_is_named(ours: dict[str, Tensor]) -> None:
    theirs = MAP.to_theirs(ours) | {"a.bias": torch.zeros(3)}
    with pytest.raises(KeyMismatchError, match=r"'a.bias' is \(3,\) instead of \(4,\)"):
        MAP.to_ours(theirs, SHAPES, where="x")


def test_optional_and_empty_constants_may_be_there_or_not(ours: dict[str, Tensor]) -> None:
    theirs = MAP.to_theirs(ours)
    assert "a.ids" not in theirs
    assert "a.maybe" not in theirs
    MAP.to_ours(theirs | {"a.ids": torch.arange(9), "a.maybe": torch.ones(2)}, SHAPES, where="x")
    with pytest.raises(KeyMismatchError, match=r"'a\.maybe' is not 1 throughout"):
        MAP.to_ours(theirs | {"a.maybe": torch.zeros(2)}, SHAPES, where="x")


def test_tensors_without_content_are_compared_by_shape(ours: dict[str, Tensor]) -> None:
    theirs = {key: value.to("meta") for key, value in MAP.to_theirs(ours).items()}
    found = MAP.to_ours(theirs, SHAPES, where="x")
    assert {key: tuple(value.shape) for key, value in found.items()} == SHAPES
    assert MAP.compare(theirs, SHAPES).count == 0
