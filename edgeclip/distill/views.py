"""The member ``.paug.json`` of a reinforced sample: the parameters of its stored views.

DataCompDR's layout: ``{"param_aug": [view, …]}``, a view as `Augmentation.to_json` writes it. Row ``i`` of
the sample's image embeddings is the teacher's of view ``i``.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgeclip.distill.augment import Augmentation, Parameters
from edgeclip.errors import InputError

__all__ = ["views_from_json", "views_to_json"]

_FIELD = "param_aug"


def views_to_json(augmentation: Augmentation, views: Sequence[Parameters]) -> bytes:
    """Return the member for these views. Numbers come back exactly as they are.

    Raises:
        InputError: parameters of another augmentation.
    """
    return msgspec.json.encode({_FIELD: [augmentation.to_json(view) for view in views]})


def views_from_json(
    augmentation: Augmentation, member: bytes, *, where: str = "paug.json"
) -> tuple[Parameters, ...]:
    """Return the views that a member says, in its order.

    Args:
        augmentation: what they were drawn with; the size of its views may be another.
        member: JSON. ``param_aug`` may also be a string that holds the list as JSON, as in tables made of
            DataCompDR's shards. Other fields are left alone.
        where: names the member in errors.

    Raises:
        InputError: no such JSON, no view, or a view that `Augmentation.from_json` refuses.
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
    views: list[Parameters] = []
    try:
        views.extend(augmentation.from_json(view) for view in listed)
    except InputError as error:
        raise InputError(f"{where}: view {len(views)} of {len(listed)}: {error}") from error
    return tuple(views)


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
