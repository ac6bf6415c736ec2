"""The stored parameters of a sample's views come back, in the published layout and as tables hold it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgeclip.distill.augment import DATACOMPDR, HorizontalFlip, RandAugment, RandomResizedCrop
from edgeclip.distill.views import list_views, view_of, views_to_json
from edgeclip.errors import InputError

VIEW = [[3, 5, 20, 30], [[1, -0.09000000357627869], [13, 0.0]]]


def test_views_come_back_exactly() -> None:
    rng = np.random.default_rng(0)
    views = tuple(DATACOMPDR.sample(rng, (480, 640)) for _ in range(30))
    member = views_to_json(DATACOMPDR, views)
    assert tuple(map(DATACOMPDR.from_json, list_views(member))) == views
    assert list(json.loads(member)) == ["param_aug"]


@pytest.mark.parametrize("listed", [[VIEW, VIEW], json.dumps([VIEW, VIEW])])
def test_the_published_layout_and_that_of_tables_are_read(listed: object) -> None:
    member = json.dumps({"param_aug": listed, "uid": "0"}).encode()
    assert list_views(member) == [VIEW, VIEW]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"", r"shard/7\.paug\.json: is not JSON \("),
        (b'{"param_aug": [NaN]}', r"is not JSON \("),
        (b"\xff\xfe", r"is not JSON \("),
        (b"[" * 100_000, r"is not JSON \("),
        (b"[]", "'param_aug' is None, expected a list"),
        (b'{"param_aug": []}', r"'param_aug' is \[\], expected a list"),
        (b'{"param_aug": "["}', r"is not JSON \("),
        (b'{"param_aug": "3"}', "'param_aug' is 3, expected a list"),
        (json.dumps({"param_aug": '"' + "x" * 200 + '"'}).encode(), r"'param_aug' is 'x+\.\.\., expected"),
    ],
)
def test_members_that_hold_no_views_are_refused(member: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list_views(member, where="shard/7.paug.json")


CROP = RandomResizedCrop((32, 32))


@pytest.mark.parametrize(
    ("view", "kinds"),
    [
        (VIEW, [RandAugment]),
        (VIEW[:1], []),
        ([VIEW[0], None], []),
        ([VIEW[0], True], [HorizontalFlip]),
        ([VIEW[0], False, VIEW[1]], [HorizontalFlip, RandAugment]),
        ([VIEW[0], None, VIEW[1][:1]], [RandAugment]),
    ],
)
def test_what_follows_the_crop_is_known_by_its_form(view: list[object], kinds: list[type]) -> None:
    augmentation, parameters = view_of(CROP, view, where="s/7, view 0")
    assert [type(transform) for transform in augmentation.transforms[1:]] == kinds
    assert augmentation.to_json(parameters) == [entry for entry in view if entry is not None]
    assert augmentation.size_px == (32, 32)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (7, "s/7, view 0: .*four integers"),
        ([], r"s/7, view 0: is \[\], expected a crop"),
        ([None, True], "s/7, view 0: .*four integers"),
        ([VIEW[0], []], "true or false"),
        ([VIEW[0], "flip"], "true or false"),
        ([VIEW[0], True, False], "expected a crop, a flip and operations"),
        ([VIEW[0], VIEW[1], True], "RandomResizedCrop first"),
        ([VIEW[0], [[99, 0.0]]], "operation is 99"),
        ([VIEW[0], [[1, 0.0]] * 65], r"operations \(64 at most\)"),
        ([VIEW[0], True, VIEW[1], VIEW[1]], "expected a crop, a flip and operations"),
    ],
)
def test_views_that_are_none_are_refused(view: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        view_of(CROP, view, where="s/7, view 0")
    assert list_views(json.dumps({"param_aug": [view]}).encode()) == [view]
