"""Reading recipes strictly: TOML in, typed tables out, or one sentence with the place and what was found.

Shared by recipes of every kind; knows the keys of none.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import Struct

from edgeclip.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "convert",
    "find_recipe",
    "mapping",
    "parse_tables",
    "parse_toml",
    "read_recipe_file",
    "tables",
]

SCHEMA = 1
_MAX_BYTES = 1 << 20


def find_recipe(said: str, package: str) -> tuple[bytes, Path, str]:
    """Return the text of a recipe, the folder its paths are relative to, and its name in messages.

    Args:
        said: a ``.toml`` file, or the name of a recipe that comes with edgeclip, whose paths are relative to
            the working directory.
        package: where the latter are.

    Raises:
        ConfigError: there is no such recipe, or it cannot be read.
    """
    path = Path(said)
    if path.suffix == ".toml" or path.is_file():
        return read_recipe_file(path), path.parent, f"recipe {said!r}"
    folder = files(package)
    # Names of recipes have hyphens; tables with an underscore in their name lie beside them and are none.
    names = sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml") and "_" not in entry.name
    )
    if said not in names:
        raise ConfigError(
            f"no recipe is called {said!r}: expected a .toml file or one of {', '.join(names)}."
        )
    return (folder / f"{said}.toml").read_bytes(), Path(), f"recipe {said!r}"


def read_recipe_file(path: Path) -> bytes:
    """Return the content of a recipe's file, at most a byte more than a recipe may have.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error.strerror or error}.") from error


def parse_tables(
    content: bytes,
    *,
    where: str,
    kind: str,
    changes: Iterable[str] = (),
    example: str = "stage.0.batch_size=64",
) -> dict[str, Any]:
    """Return the tables of a recipe without its first lines, ``schema`` and ``kind``.

    Args:
        content: TOML text.
        where: the recipe, as messages name it.
        kind: what the recipe has to be.
        changes: ``key=value`` with dotted keys and TOML values, applied before anything is checked.
        example: of a change, for messages.

    Raises:
        ConfigError: too large, not TOML, of another schema or kind, or a change that leads nowhere.
    """
    said = parse_toml(content, where=where, what="is it a recipe")
    for change in changes:
        _apply(said, change, where, example)
    for key, expected in (("schema", SCHEMA), ("kind", kind)):
        if said.pop(key, None) != expected:
            raise ConfigError(f"{where}: expected {key} = {expected!r} among the first lines.")
    return said


def parse_toml(content: bytes, *, where: str, what: str) -> dict[str, Any]:
    """Return what TOML text says.

    Raises:
        ConfigError: it is too large, or not TOML.
    """
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{where}: larger than {_MAX_BYTES} bytes; {what}?")
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid TOML: {error}.") from error


def convert(value: Any, kind: Any, where: str) -> Any:
    """Return a value as a typed table.

    Raises:
        ConfigError: a key is unknown, or a value is of a wrong type or out of range; the message names it.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_plain_message(str(error), value, kind)}") from error


def _plain_message(said: str, value: Any, kind: Any) -> str:
    """Return msgspec's message with the value that was found, and the keys that are known."""
    message, _, place = said.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    found, structs = value, _structs(kind, value)
    for key in re.sub(r"\[.*?\]", "", path).split(".") if path else []:
        types = [one.type for each in structs for one in msgspec.structs.fields(each) if one.name == key]
        found = found.get(key) if isinstance(found, Mapping) else found
        structs = [each for one in types for each in _structs(one, found)]
    if "unknown field" in message:
        known = sorted({name for each in structs for name in each.__struct_fields__})
        return f"{f'{path!r}: ' if path else ''}{message}; known are {known}."
    got = f"{path!r} is {found!r}" if path else f"got {found!r}"
    return f"{got[:300]}: {message[0].lower()}{message[1:]}."


def _structs(kind: Any, value: Any) -> list[type[Struct]]:
    """Return the tables among the types that a value may have: of several, those of its ``kind``."""
    structs = [one for one in get_args(kind) or (kind,) if isinstance(one, type) and issubclass(one, Struct)]
    tag = value.get("kind") if isinstance(value, Mapping) else None
    return [one for one in structs if one.__struct_config__.tag == tag] or structs


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Return a value that is a table.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: got {value!r}, expected a table.")
    return value


def tables(value: Any, where: str) -> list[Any]:
    """Return a value that is an array of tables.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, list):
        raise ConfigError(f"{where}: got {value!r}, expected an array of tables.")
    return value


def _apply(said: dict[str, Any], change: str, where: str, example: str) -> None:
    """Set one dotted key to a TOML value, in place."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {change!r}: expected key=value, such as {example}.")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except ValueError:
        value = text.strip()  # a bare word is a string
    at: Any = said
    parts = key.strip().split(".")
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise ConfigError(
                    f"--set {change!r}: {'.'.join(parts[:index])!r} has the entries 0 to {len(at) - 1}, "
                    f"not {part!r}."
                )
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                at = at.setdefault(part, {})
        else:
            raise ConfigError(
                f"--set {change!r}: {'.'.join(parts[:index])!r} is {at!r} in {where}, not a table."
            )
