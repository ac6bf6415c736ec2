"""JSON documents of a kind and schema, refused in one sentence where they are another's."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from edgeclip.errors import InputError

__all__ = ["Document"]

_Document = TypeVar("_Document", bound="Document")
_SCHEMA = 1


class Document(Struct, frozen=True, kw_only=True):
    """A document whose fields ``schema`` and ``kind`` say what it is; a subclass gives both as literals."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        said: dict[str, Any] = json.loads(self.to_json())
        return said

    def to_json(self) -> str:
        """Return it as one JSON document."""
        return json.dumps(msgspec.to_builtins(self), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls: type[_Document], raw: Any) -> _Document:
        """Read it.

        Raises:
            InputError: it is of another kind or of an unknown schema, or a field is wrong.
        """
        kind, what = _kind(cls)
        if not isinstance(raw, dict) or raw.get("kind") != kind:
            raise InputError(f"{what}: got another document, expected one of kind {kind!r}.")
        if raw.get("schema") != _SCHEMA:
            raise InputError(
                f"{what}: got schema {raw.get('schema')!r}, expected {_SCHEMA}. Update edgeclip to read it."
            )
        try:
            return msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise InputError(f"{what} cannot be read: {error}.") from error

    @classmethod
    def from_json(cls: type[_Document], text: str | bytes) -> _Document:
        """Read it from a JSON document; errors as :meth:`from_dict`."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{_kind(cls)[1]} is not valid JSON: {error}.") from error
        return cls.from_dict(raw)


def _kind(document: type[Document]) -> tuple[str, str]:
    """Return the kind of a document, as it stands in it and in words."""
    kind = str(next(field.default for field in msgspec.structs.fields(document) if field.name == "kind"))
    return kind, kind.replace("-", " ")
