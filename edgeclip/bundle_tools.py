"""What is done to whole bundles: describe, slim, compare, pack and unpack.

Slimming leaves out what a device does not need. Packed bundles are plain archives whose bytes depend on the
bundle alone; unpacking writes nothing that the manifest inside does not list, with the hash it lists.
Whatever is written appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgeclip.bundle import MANIFEST_NAME, Bundle, BundleWriter
from edgeclip.errors import BundleError, ConfigError, InputError
from edgeclip.manifest import named_strings, parse_manifest
from edgeclip.storage import TEMPORARY_PREFIX, sync_directory

__all__ = [
    "Difference",
    "NewBank",
    "describe_bundle",
    "diff_bundles",
    "pack_bundle",
    "slim_bundle",
    "unpack_bundle",
]

ARCHIVE_SUFFIXES = (".tar", ".zip")
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_HASH_TAG = re.compile(r"(\.[0-9a-f]{8})+(?=(\.[A-Za-z0-9]+)?(\.gz)?$)")


# --- describing --------------------------------------------------------------------------------------------


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return what a bundle is and holds, with sizes, as one JSON-ready document.

    A file that several variants share counts for each of them; ``size_bytes`` of the whole counts it once.
    """
    manifest = bundle.manifest
    sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
    raw = bundle.raw
    variants = {}
    for name, entry in manifest.variants.items():
        towers = {
            tower: {
                "size_bytes": sum(sizes[file] for file in set(part.files)),
                "model": part.model,
                "parity": raw["variants"][name].get("parity", {}).get(tower),
            }
            for tower, part in entry.towers.items()
        }
        rest = {key: value for key, value in raw["variants"][name].items() if key not in ("towers", "parity")}
        variants[name] = {**rest, "default": name in manifest.default_variants, "towers": towers}
    return {
        "schema": 1,
        "path": str(bundle.path),
        "digest": bundle.digest,
        "manifest_schema": str(manifest.schema),
        "size_bytes": sum(sizes.values()),
        "files": len(sizes),
        **{key: raw.get(key) for key in ("model", "preprocess", "tokenizer", "provenance")},
        "default_variants": list(manifest.default_variants),
        "variants": variants,
        "label_banks": {
            name: {**raw["label_banks"][name], "size_bytes": sizes[entry.file]}
            for name, entry in manifest.label_banks.items()
        },
        "default_bank": manifest.default_bank,
        "background_bank": manifest.background_bank,
        "heads": raw.get("heads", {}),
        "golden": None if manifest.golden is None else {"size_bytes": sizes[manifest.golden]},
    }


# --- comparing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One field in which two manifests differ; ``missing`` says in which of them it is absent."""

    field: str
    a: Any
    b: Any
    missing: str | None = None


def diff_bundles(a: Bundle, b: Bundle) -> list[Difference]:
    """Return where two bundles differ, by field; files are compared by their hashes and named without them.

    No file but the manifests is read. A field that is absent counts as different from one that holds null.
    """
    return list(_differences("", _comparable(a), _comparable(b)))


def _comparable(bundle: Bundle) -> Any:
    """Return the manifest with hash tags taken off the names of files, unless two names would be the same."""
    plain: dict[str, str] = {}
    for name in bundle.manifest.files:
        bare = _HASH_TAG.sub("", name)
        plain[name] = bare if bare not in plain.values() and bare not in bundle.manifest.files else name

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {plain.get(key, key): strip(item) for key, item in value.items()}
        if isinstance(value, list):
            return [strip(item) for item in value]
        return plain.get(value, value) if isinstance(value, str) else value

    return strip(bundle.raw)


def _differences(field: str, a: Any, b: Any) -> Iterator[Difference]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{field}.{key}" if field else key
            if key not in a:
                yield Difference(inner, None, b[key], missing="a")
            elif key not in b:
                yield Difference(inner, a[key], None, missing="b")
            else:
                yield from _differences(inner, a[key], b[key])
    elif a != b or isinstance(a, bool) != isinstance(b, bool):
        yield Difference(field, a, b)


# --- slimming ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewBank:
    """A label bank to take the place of those a bundle has.

    Attributes:
        name: its name in the manifest.
        content: the bank file.
        entry: the fields of its manifest entry but ``file``.
    """

    name: str
    content: bytes
    entry: dict[str, Any]


def slim_bundle(
    source: Bundle,
    target: Path,
    *,
    variants: Sequence[str],
    bank: NewBank | None = None,
    drop_text: bool = False,
    force: bool = False,
) -> Bundle:
    """Write what goes on a device: some variants, and what they need. The time in the provenance is kept.

    Args:
        source: where from.
        target: where to: a directory that does not exist or is empty.
        variants: names of the variants to keep, in the order of the new ``default_variants``.
        bank: the label bank of the new bundle; ``None`` keeps those there are.
        drop_text: leave out text towers and tokenizer: the device then knows the labels of its banks only.
        force: replace a bundle that is at ``target``.

    A variant without a text tower of its own keeps the one it would be used with.

    Raises:
        BundleError: no such variant, no bank would remain beside no text tower, a damaged source, or a target
            that cannot be written or is in the way.
    """
    if not variants:
        raise ConfigError(f"{source.where}: no variant was named; it has {sorted(source.manifest.variants)}.")
    raw = _slimmed(source, list(dict.fromkeys(variants)), drop_text=drop_text)
    if drop_text and bank is None and not raw.get("label_banks"):
        raise BundleError(
            f"{source.where}: without text tower and label bank the result could classify nothing: "
            "give it labels, or keep the text tower."
        )
    _check_target(target, force=force)
    with BundleWriter(target, manifest={}) as writer:
        if bank is not None:
            file = writer.add(f"banks/{bank.name}.safetensors", bank.content)
            _replace_banks(raw, bank.name, {**bank.entry, "file": file})
        named = set(named_strings({key: value for key, value in raw.items() if key != "files"}))
        for name in source.manifest.files:
            if name in named:
                writer.add(name, source.file(name), exact=True)
        raw["files"] = {}
        writer.manifest = raw
        return writer.commit()


def _slimmed(source: Bundle, variants: list[str], *, drop_text: bool) -> dict[str, Any]:
    raw = copy.deepcopy(source.raw)
    kept = {name: raw["variants"][source.variant(name).name] for name in variants}
    if drop_text:
        for name, entry in kept.items():
            _drop_tower(entry, "text")
            if not entry["towers"]:
                raise BundleError(f"{source.where}: variant {name!r} has a text tower only: choose another.")
        raw["tokenizer"] = None
    elif not any("text" in entry["towers"] for entry in kept.values()):
        lender = _text_lender(source)
        if lender is None:
            raw["tokenizer"] = None
        else:
            kept[lender] = raw["variants"][lender]
            for tower in [tower for tower in kept[lender]["towers"] if tower != "text"]:
                _drop_tower(kept[lender], tower)
    raw["variants"] = kept
    raw["default_variants"] = variants
    raw.setdefault("provenance", {})["slimmed_from"] = source.digest
    return raw


def _drop_tower(entry: dict[str, Any], tower: str) -> None:
    for section in ("towers", "parity"):
        if isinstance(entry.get(section), dict):
            entry[section].pop(tower, None)


def _text_lender(source: Bundle) -> str | None:
    """Return the variant whose text tower serves variants without one, as the runtime chooses it."""
    manifest = source.manifest
    names = [*manifest.default_variants, *sorted(manifest.variants)]
    return next((name for name in names if "text" in manifest.variants[name].towers), None)


def _replace_banks(raw: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
    banks = raw.get("label_banks", {})
    background = raw.get("background_bank")
    kept = {key: value for key, value in banks.items() if key == background and key != name}
    raw["label_banks"] = {**kept, name: entry}
    raw["default_bank"] = name
    raw["background_bank"] = background if background in kept else None
    # A head fitted on a bank that is gone says nothing about the new one: the model's own scale takes over.
    heads = raw.get("heads", {})
    raw["heads"] = {key: head for key, head in heads.items() if head.get("bank") in (None, *kept)}
    # A graph with the labels of such a bank inside would go on to offer them.
    for variant in raw["variants"].values():
        baked = variant.get("parity", {}).get("classifier", {}).get("bank")
        if baked is not None and baked not in kept:
            _drop_tower(variant, "classifier")


# --- packing -----------------------------------------------------------------------------------------------


def pack_bundle(bundle: Bundle, archive: Path, *, force: bool = False) -> int:
    """Write a bundle as a ``.tar`` or ``.zip`` archive whose bytes depend on the bundle alone.

    The manifest comes first, then the listed files in the order of their names, uncompressed (weights hardly
    compress), every file checked on the way.

    Returns:
        The size of the archive in bytes.

    Raises:
        BundleError: a damaged file, or an archive that cannot be written.
        ConfigError: another suffix, or a file that is in the way and ``force`` is not given.
    """
    if archive.suffix.lower() not in ARCHIVE_SUFFIXES:
        raise ConfigError(f"the archive {str(archive)!r} should end in .tar or .zip.")
    if os.path.lexists(archive) and not force:
        raise ConfigError(f"{str(archive)!r} exists: choose another name, or pass --force to replace it.")
    write = _write_tar if archive.suffix.lower() == ".tar" else _write_zip
    temporary = archive.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}{archive.suffix.lower()}")
    try:
        with temporary.open("xb") as stream:
            write(stream, _members(bundle))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(archive)
        sync_directory(archive.parent)
    except OSError as error:
        raise BundleError(f"the archive {str(archive)!r} cannot be written: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return archive.stat().st_size


def _members(bundle: Bundle) -> Iterator[tuple[str, bytes]]:
    yield MANIFEST_NAME, bundle.manifest_bytes
    for name in sorted(bundle.manifest.files):
        yield name, bundle.read(name)


def _write_tar(stream: BinaryIO, members: Iterator[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)  # mode 0644, no owner, no time
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _write_zip(stream: BinaryIO, members: Iterator[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
            entry.create_system = 3  # POSIX, wherever this runs
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content)


def unpack_bundle(archive: Path, target: Path, *, force: bool = False) -> Bundle:
    """Unpack a packed bundle; the result has the digest of the bundle that was packed.

    Only what the manifest lists is written, under the names it allows, checked against its hashes; the
    archive may hold the bundle in one folder, and other files, which are left out. Links are never followed
    or made.

    Args:
        archive: ``.tar``, ``.tar.gz`` and the like, or ``.zip``.
        target: a directory that does not exist or is empty.
        force: replace a bundle that is at ``target``.

    Raises:
        InputError: not an archive, damaged, or without a manifest.
        BundleError: a manifest or file that cannot be used, or a target that cannot be written or is in the
            way.
    """
    from edgeclip.archives import Limits, read_members

    where = f"archive {str(archive)!r}"
    if not archive.is_file():
        raise InputError(f"{where}: no such file. Check the path.")
    name = archive.name.lower()
    if not name.endswith((".tar", ".tgz", ".zip")) and ".tar." not in name:
        raise InputError(f"{where} is no packed bundle: expected a name that ends in .zip, .tar or .tar.*.")
    folder, data = _find_manifest(archive, where)
    _, manifest = parse_manifest(data, where)
    _check_target(target, force=force)
    sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
    # What is larger than the manifest says is refused before it is read.
    limits = Limits(len(sizes), max(sizes.values(), default=0), sum(sizes.values()))
    patterns = [glob.escape(folder) + name for name in sizes]
    with BundleWriter(target, manifest={}) as writer:
        for name, content in read_members(archive, patterns, limits=limits) if sizes else ():
            writer.add(name.removeprefix(folder), content, exact=True)
        return writer.commit_copy(data)


def _find_manifest(archive: Path, where: str) -> tuple[str, bytes]:
    from edgeclip.archives import Limits, read_members
    from edgeclip.bundle import MAX_MANIFEST_BYTES

    limits = Limits(100, MAX_MANIFEST_BYTES, 100 * MAX_MANIFEST_BYTES)
    found = dict(read_members(archive, [MANIFEST_NAME, f"*/{MANIFEST_NAME}"], limits=limits))
    outermost = min(found, key=lambda name: (name.count("/"), name), default=None)
    if outermost is None:
        raise InputError(f"{where} holds no {MANIFEST_NAME}, so it is not a packed bundle.")
    return outermost.removesuffix(MANIFEST_NAME), found[outermost]


def _check_target(target: Path, *, force: bool) -> None:
    """Refuse to write over anything but nothing, or with ``force`` a bundle."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise BundleError(f"{str(target)!r} is not a directory: choose another place for the bundle.")
    is_bundle = (target / MANIFEST_NAME).is_file()
    if is_bundle and not force:
        raise BundleError(f"there is a bundle at {str(target)!r}: choose another place, or pass --force.")
    if not is_bundle and any(target.iterdir()):
        raise BundleError(f"{str(target)!r} is not empty and no bundle: choose another place for the bundle.")
