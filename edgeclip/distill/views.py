"""The member ``.paug.json`` of a reinforced sample: the parameters of its stored views.

DataCompDR's layout: ``{"param_aug": [view, …]}``, a view as `Augmentation.to_json` writes it. Row ``i`` of
the sample's image embeddings is the teacher's of view ``i``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from edgeclip.distill.augment import (
    Augmentation,
    HorizontalFlip,
    Parameters,
    RandAugment,
    RandomResizedCrop,
    Transform,
)
from edgeclip.errors import ConfigError, InputError

__all__ = ["VIEWS_EXTENSION", "list_views", "view_of", "views_to_json"]

VIEWS_EXTENSION = "paug.json"
_FIELD = "param_aug"
_MAX_OPERATIONS = 64


def views_to_json(augmentation: Augmentation, views: Sequence[Parameters]) -> bytes:
    """Return the member for these views. Numbers come back exactly as they are.

    Raises:
        InputError: parameters of another augmentation.
    """
    return msgspec.json.encode({_FIELD: [augmentation.to_json(view) for view in views]})


def list_views(member: bytes, *, where: str = "paug.json") -> list[Any]:
    """Return the views that a member says, as JSON has them: nothing in them has been checked.

    Args:
        member: JSON. ``param_aug`` may also be a string that holds the list as JSON, as in tables made of
            DataCompDR's shards. Other fields are left alone.
        where: names the member in errors.

    Raises:
        InputError: no such JSON, or no view.
    """
    said = _parse(member, where)
    listed = said.get(_FIELD) if isinstance(said, dict) else None
    if isinstance(listed, str):
        listed = _parse(listed, where)
    if not isinstance(listed, list) or not listed:
        raise InputError(
            f"{where}: {_FIELD!r} is {_shorten(listed)}, expected a list of one view or more. "
            "Reinforce the sample again."
        )
    return listed


def view_of(crop: RandomResizedCrop, said: object, *, where: str) -> tuple[Augmentation, Parameters]:
    """Return one listed view with the augmentation it is of.

    What follows the crop is known by its form: true or false is a flip, a list of pairs is RandAugment, and
    ``null`` a transform that was left out. So foreign sets need no description.

    Args:
        crop: how the view is made; its size may be another than the teacher's.
        said: the view, as :func:`list_views` gives it.
        where: names it in errors.

    Raises:
        InputError: it is no view.
    """
    entries: list[Any] = said if isinstance(said, list) else [said]
    steps = [entries[0], *(entry for entry in entries[1:] if entry is not None)] if entries else []
    kinds: list[Transform] = [
        crop,
        *(
            RandAugment(num_ops=len(entry)) if isinstance(entry, list) and entry else HorizontalFlip()
            for entry in steps[1:]
        ),
    ]
    most = max((kind.num_ops for kind in kinds if isinstance(kind, RandAugment)), default=0)
    if len(steps) != len(set(map(type, kinds))) or len(kinds) > 3 or most > _MAX_OPERATIONS:
        raise InputError(
            f"{where}: is {_shorten(said)}, expected a crop, a flip and operations ({_MAX_OPERATIONS} at "
            "most). Draw it again."
        )
    try:
        augmentation = Augmentation(tuple(kinds))
        return augmentation, augmentation.from_json(steps)
    except (InputError, ConfigError) as error:
        raise InputError(f"{where}: {error}") from error


def _parse(text: bytes | str, where: str) -> object:
    try:
        parsed: object = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise InputError(
            f"{where}: is not JSON ({error}), expected an object with {_FIELD!r}. Reinforce the sample again."
        ) from error
    return parsed


def _shorten(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 80 else said[:77] + "..."
