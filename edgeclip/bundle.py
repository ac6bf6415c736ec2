"""The deployment format: a directory of files named, sized and hashed by one ``manifest.json``.

Reading (:class:`Bundle`) parses the manifest only; a file is checked against its sha256 at its first use.
Nothing that the manifest does not list is read, and no name or link leads out of the directory. Writing
(:class:`BundleWriter`) puts content-addressed files in place first and replaces ``manifest.json`` last: that
is the commit point, so that a process killed at any moment leaves the complete old or the complete new
bundle.

The format is specified in ``docs/bundle-format.md`` and ``docs/manifest.schema.json``. No pickle, no code and
no network here; what a tower computes is the business of ``runtime/``.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import errno
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from edgeclip.errors import BundleError
from edgeclip.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    BankEntry,
    FileEntry,
    FileName,
    HeadEntry,
    Manifest,
    ModelEntry,
    Parity,
    PreprocessSpec,
    Requires,
    SchemaVersion,
    TensorEntry,
    TokenizerFiles,
    TowerEntry,
    VariantEntry,
    embedding_space,
    encode_manifest,
    named_strings,
    one_line,
    parse_manifest,
    some,
)
from edgeclip.storage import (
    TEMPORARY_PREFIX,
    DirectoryLock,
    hash_stream,
    open_inside,
    sync_directory,
    write_temporary,
)

__all__ = [
    "EMBEDDED",
    "MANIFEST_NAME",
    "SCHEMA",
    "BankEntry",
    "Bundle",
    "BundleWriter",
    "FileEntry",
    "HeadEntry",
    "Manifest",
    "ModelEntry",
    "Parity",
    "PreprocessSpec",
    "Requires",
    "SchemaVersion",
    "TensorEntry",
    "TokenizerFiles",
    "TowerEntry",
    "TowerFiles",
    "Variant",
    "VariantEntry",
    "embedding_space",
    "provenance_time",
    "stored_name",
]

EMBEDDED: Final = ("default", "nano")
"""Words for the bundles that come with edgeclip; a directory of such a name is ``./nano``."""

MAX_MANIFEST_BYTES = 8 << 20

# Engine settings a bundle may ask for: those that change how numbers are computed. Others make an engine read
# or write files, load code or take threads, and are the host's business.
SESSION_KEYS = frozenset(
    {
        # ONNX Runtime: onnxruntime_session_options_config_keys.h
        "mlas.disable_kleidiai",
        "mlas.enable_gemm_fastmath_arm64_bfloat16",
        "mlas.use_lut_gemm",
        "optimization.enable_cast_chain_elimination",
        "optimization.enable_gelu_approximation",
        "session.disable_double_qdq_remover",
        "session.disable_qdq_constant_folding",
        "session.disable_quant_qdq",
        "session.dynamic_block_base",
        "session.enable_dq_matmulnbits_fusion",
        "session.enable_quant_qdq_cleanup",
        "session.qdq_matmulnbits_accuracy_level",
        "session.qdqisint8allowed",
        "session.set_denormal_as_zero",
        "session.x64quantprecision",
        # OpenVINO
        "DYNAMIC_QUANTIZATION_GROUP_SIZE",
        "EXECUTION_MODE_HINT",
        "INFERENCE_PRECISION_HINT",
    }
)

# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerFiles:
    """One tower, ready to be opened: its files are on disk and their hashes are checked.

    ``digest`` is over the hashes of its files: the same network has the same digest in every bundle.
    ``bundle`` and ``bundle_digest`` say which bundle it was opened from, for messages and the host cache.
    """

    tower: str
    model: Path
    files: tuple[Path, ...]
    variant: str
    format: str
    precision: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    requires: Requires
    session_config: dict[str, str]
    digest: str
    bundle: Path | None = None
    bundle_digest: str | None = None


@dataclass(frozen=True)
class Variant:
    """One variant of an open bundle."""

    bundle: Bundle
    name: str
    entry: VariantEntry

    def tower(self, name: str) -> TowerFiles:
        """Check and return the files of the tower ``"image"`` or ``"text"``.

        Raises:
            BundleError: the variant has no such tower, or a file is missing or damaged.
        """
        entry = self._entry(name)
        self._check_session_config()
        files = tuple(self.bundle.file(file) for file in entry.files)
        if not entry.model.endswith(
            ".xml"
        ):  # OpenVINO's own form, which is opened with its weights beside it
            self._check_external_data(entry)
        return TowerFiles(
            tower=name,
            model=self.bundle.file(entry.model),
            files=files,
            variant=self.name,
            format=self.entry.format,
            precision=self.entry.precision,
            inputs=entry.inputs,
            outputs=entry.outputs,
            requires=self.entry.requires,
            session_config=dict(self.entry.session_config),
            digest=self.tower_digest(name),
            bundle=self.bundle.path,
            bundle_digest=self.bundle.digest,
        )

    def tower_digest(self, name: str) -> str:
        """Return the digest of a tower without reading its files: the manifest holds their hashes."""
        entry = self._entry(name)
        hashes = {file: self.bundle.manifest.files[file].sha256 for file in entry.files}
        ordered = [hashes.pop(entry.model), *sorted(hashes.values())]
        return hashlib.sha256("\n".join(ordered).encode()).hexdigest()

    def _check_session_config(self) -> None:
        unknown = sorted(set(self.entry.session_config) - SESSION_KEYS)
        if unknown:
            raise BundleError(
                f"{self.bundle.where}: variant {self.name!r} asks for the engine setting "
                f"{unknown[0][:100]!r}, "
                "which a bundle may not set: export it without, or update edgeclip."
            )

    def _check_external_data(self, entry: TowerEntry) -> None:
        """Refuse a graph that would make the engine read what is not among the tower's checked files."""
        if (entry.model, *entry.files) in self.bundle._graphs_checked:
            return
        from edgeclip.onnx_files import external_locations

        where = f"{self.bundle.where}: the graph {entry.model!r}"
        try:
            locations = external_locations(self.bundle.file(entry.model))
        except (OSError, ValueError) as error:
            raise BundleError(f"{where} cannot be read: {_reason(error)}: export it again.") from error
        folder = entry.model.rpartition("/")[0]
        for location in sorted(locations):
            if (f"{folder}/{location}" if folder else location) not in entry.files:
                raise BundleError(
                    f"{where} reads the file {location[:200]!r}, which is not among the tower's files "
                    f"{some(entry.files)}: export it again."
                )
        self.bundle._graphs_checked.add((entry.model, *entry.files))

    def _entry(self, name: str) -> TowerEntry:
        entry = self.entry.towers.get(name)
        if entry is None:
            raise BundleError(
                f"{self.bundle.where}: variant {self.name!r} has no {name!r} tower, only "
                f"{some(self.entry.towers)}: use a bundle that has it."
            )
        return entry


class Bundle:
    """An open bundle: its manifest in memory, its files read and checked when asked for.

    Opening reads ``manifest.json`` and nothing else. Safe to share between threads; never writes.

    Attributes:
        path: the directory, absolute.
        manifest: the typed manifest.
        manifest_bytes: content of ``manifest.json``.
        raw: the manifest as parsed, with the fields this version does not know. Not to be modified.
        digest: sha256 of ``manifest.json``.
        where: how messages name this bundle.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.where = f"bundle {str(path)!r}"
        self.manifest_bytes = data
        self.raw, self.manifest = parse_manifest(data, self.where)
        self.digest = hashlib.sha256(data).hexdigest()
        self._root = os.path.realpath(path)
        self._checked: dict[str, Path] = {}
        self._graphs_checked: set[tuple[str, ...]] = set()
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | os.PathLike[str] = "default") -> Bundle:
        """Open a bundle directory, or one that comes with edgeclip by its word in :data:`EMBEDDED`.

        Raises:
            BundleError: no such directory, no manifest, or a manifest that cannot be used.
        """
        if path in EMBEDDED:
            directory = Path(__file__).parent / "assets" / path
            if not (directory / MANIFEST_NAME).is_file():
                raise BundleError(
                    f"this installation of edgeclip has no embedded bundle {str(path)!r}: install edgeclip "
                    "from a wheel, or name a bundle directory."
                )
        else:
            directory = Path(path)
        return cls(directory.absolute(), _read_manifest(directory))

    def file(self, name: str) -> Path:
        """Return the path of a listed file, its size and sha256 checked at the first call (about 1 GB/s).

        Raises:
            BundleError: the manifest does not list it, or it is missing, damaged, or outside the directory.
        """
        with self._lock:
            checked = self._checked.get(name)
            own = self._locks.setdefault(name, threading.Lock())
        if checked is not None:
            return checked
        entry = self._entry(name)
        with own:
            if name not in self._checked:
                path, stream = self._open(name)
                with stream, self._translated(name):
                    self._compare(name, entry, os.fstat(stream.fileno()).st_size)
                    self._compare(name, entry, *hash_stream(stream))
                self._checked[name] = path
        return self._checked[name]

    def read(self, name: str) -> bytes:
        """Return the content of a listed file; what is returned is what was checked.

        Raises:
            BundleError: as :meth:`file`.
        """
        entry = self._entry(name)
        path, stream = self._open(name)
        with stream, self._translated(name):
            self._compare(name, entry, os.fstat(stream.fileno()).st_size)
            data = stream.readall()
        known = name in self._checked
        self._compare(name, entry, len(data), None if known else hashlib.sha256(data).hexdigest())
        self._checked[name] = path
        return data

    def variant(self, name: str) -> Variant:
        """Return a variant by its name.

        Raises:
            BundleError: there is no such variant; the message lists those there are.
        """
        entry = self.manifest.variants.get(name)
        if entry is None:
            raise BundleError(f"{self.where}: no variant {name!r}; it has {some(self.manifest.variants)}.")
        return Variant(self, name, entry)

    def check_files(self) -> None:
        """Check every listed file.

        Raises:
            BundleError: the first file that is missing or damaged.
        """
        for name in self.manifest.files:
            self.file(name)

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(
                f"{self.where}: its manifest does not list the file {name!r}, so it is not read."
            )
        return entry

    def _open(self, name: str) -> tuple[Path, FileIO]:
        with self._translated(name):
            return open_inside(self._root, name)

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise BundleError(
                f"{self.where}: the file {name!r} is missing: copy or export the bundle again."
            ) from error
        except (OSError, MemoryError) as error:
            raise BundleError(f"{self.where}: the file {name!r} cannot be read: {_reason(error)}.") from error

    def _compare(self, name: str, entry: FileEntry, size_bytes: int, sha256: str | None = None) -> None:
        if size_bytes != entry.size_bytes:
            problem = f"has {size_bytes} bytes, the manifest says {entry.size_bytes}"
        elif sha256 is not None and sha256 != entry.sha256:
            problem = f"has sha256 {sha256[:16]}…, the manifest says {entry.sha256[:16]}…"
        else:
            return
        raise BundleError(
            f"{self.where}: the file {name!r} is damaged: it {problem}: copy or export the bundle again."
        )


def _read_manifest(directory: Path) -> bytes:
    where = f"bundle {str(directory)!r}"
    try:
        if not directory.is_dir():
            kind = "is a file" if directory.exists() else "does not exist"
            embedded = " or ".join(map(repr, EMBEDDED))
            raise BundleError(f"{where}: {kind}, expected a directory with a {MANIFEST_NAME}, or {embedded}.")
        _, stream = open_inside(os.path.realpath(directory), MANIFEST_NAME)
        with stream:
            data = bytearray()
            while len(data) <= MAX_MANIFEST_BYTES and (block := stream.read(MAX_MANIFEST_BYTES)):
                data += block
    except FileNotFoundError as error:
        raise BundleError(
            f"{where}: has no {MANIFEST_NAME}, so it is not a bundle (or its writing never ended)."
        ) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} cannot be read: {_reason(error)}.") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{where}: {MANIFEST_NAME} has more than {MAX_MANIFEST_BYTES} bytes, which no bundle needs."
        )
    return bytes(data)


def _reason(error: BaseException) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return said[:1].lower() + said[1:]


# --- writing -----------------------------------------------------------------------------------------------

_TAGGED = re.compile(r"((?:\.[0-9a-f]{8})+)(?=(\.[A-Za-z0-9]+)?(\.gz)?$)")


def stored_name(name: str, *sha256s: str) -> str:
    """Return the name under which :class:`BundleWriter` stores a file: with 8 digits of its hash.

    ``onnx-int8/image.onnx`` becomes ``onnx-int8/image.1a2b3c4d.onnx``; a tag that is already there is
    replaced. Use it where another file must name this one, as an ONNX graph names its external data.
    Files that are called alike carry the hashes of all of them: see :meth:`BundleWriter.add_alike`.
    """
    folder, slash, base = name.rpartition("/")
    stem, suffixes = _TAGGED.sub("", base), ""
    for suffix in (r"\.gz$", r"\.[A-Za-z0-9]+$"):
        if (match := re.search(suffix, stem)) and match.start():
            stem, suffixes = stem[: match.start()], match.group() + suffixes
    tags = "".join(f".{sha256[:8]}" for sha256 in sha256s)
    return f"{folder}{slash}{stem}{tags}{suffixes}"


def provenance_time() -> str:
    """Return the time for ``provenance`` in UTC: ``SOURCE_DATE_EPOCH`` where set, else now.

    Raises:
        BundleError: ``SOURCE_DATE_EPOCH`` is not a number of seconds.
    """
    utc = datetime.timezone.utc
    said = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        now = datetime.datetime.fromtimestamp(int(said), utc) if said else datetime.datetime.now(utc)
    except (ValueError, OverflowError, OSError) as error:
        raise BundleError(
            f"SOURCE_DATE_EPOCH is {said!r}, expected a whole number of seconds since 1970: correct or "
            "unset it."
        ) from error
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


class BundleWriter:
    """Write a new bundle, or change an existing one, so that a kill at any moment leaves a complete bundle.

    Files go to disk as they are added, under names no committed manifest uses for other content;
    :meth:`commit` replaces ``manifest.json``, and that is the moment the new bundle exists. Files only the
    previous manifest used stay until the next write, so that processes that hold it open keep working. One
    writer a directory, held by a lock that the system releases with the process. A context manager: leaving
    it without :meth:`commit` takes back what was added.

    Args:
        path: a directory to be made, or an existing bundle.
        manifest: what to start from; without, the existing bundle's.

    Attributes:
        path: the directory, absolute.
        manifest: the document to be written; edit it freely. :meth:`commit` fills in ``schema``, ``files``
            and ``provenance.time`` (a time in a manifest that was given is kept). ``files`` will hold what
            was added and those older files that some field still names.

    Raises:
        BundleError: the directory cannot be written, has another writer, or holds a bundle that this version
            cannot read.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, manifest: dict[str, Any] | Manifest | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self.where = f"bundle {str(self.path)!r}"
        self._added: dict[str, dict[str, Any]] = {}
        self._created: set[str] = set()
        self._folders: set[Path] = set()
        self._lock: DirectoryLock | None = None
        self._made_directory = not self.path.exists()
        with self._translated("cannot be written"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(self.path)
        try:
            self._previous = self._existing()
            self.manifest = self._first_draft(manifest)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, content: bytes | os.PathLike[str], *, exact: bool = False) -> str:
        """Store a file and return its name in the bundle, which carries 8 digits of its hash.

        Args:
            name: relative posix path, as ``onnx-int8/image.onnx``.
            content: its bytes, or the path of a file to copy.
            exact: keep the name as it is, for a copy from another bundle whose files may name one another.

        Raises:
            BundleError: a name that cannot be used, an unreadable source, a full disk or read-only directory.
        """
        return self._add(name, content, name if exact else None)

    def add_alike(self, files: Mapping[str, bytes | os.PathLike[str]]) -> dict[str, str]:
        """Store files of which one is found by the name of another, as OpenVINO finds the weights of a graph.

        ``image.xml`` and ``image.bin`` become ``image.1a2b3c4d.5e6f7a8b.xml`` and ``….bin``: both names carry
        both hashes, so that files of which either differs are stored beside them.

        Args:
            files: content by name; the names differ in their suffixes alone.

        Returns:
            Names in the bundle by name.

        Raises:
            BundleError: as :meth:`add`.
        """
        hashes = []
        for name, content in files.items():
            with self._translated(f"the file {name!r} cannot be read"):
                hashes.append(_hash(content))
        return {name: self._add(name, content, stored_name(name, *hashes)) for name, content in files.items()}

    def _add(self, name: str, content: bytes | os.PathLike[str], stored: str | None) -> str:
        """Store a file under a name, its own with 8 digits of its hash where that is ``None``; return it."""
        self._open_or_raise()
        try:
            parts = msgspec.convert(name, FileName).split("/")
        except msgspec.ValidationError as error:
            raise BundleError(
                f"{self.where}: the name {name!r} cannot be used: expected a relative path whose parts have "
                "letters, digits and ._@+- only."
            ) from error
        folder = self.path.joinpath(*parts[:-1])
        with self._translated(f"the file {name!r} cannot be written"):
            if not folder.exists():
                self._folders.add(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if os.path.realpath(folder) != str(Path(os.path.realpath(self.path), *parts[:-1])):
                raise OSError(errno.EPERM, "its folder is a link")
            temporary, size_bytes, sha256 = write_temporary(folder, content)
            try:
                stored = stored_name(name, sha256) if stored is None else stored
                self._check_collision(stored, sha256)
                target = self.path.joinpath(*stored.split("/"))
                if not target.exists():
                    self._created.add(stored)
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        self._added[stored] = {"sha256": sha256, "size_bytes": size_bytes}
        return stored

    def draft(self) -> Bundle:
        """Return what :meth:`commit` would make, opened and not committed: to try what was added.

        It can be used while this writer is open.

        Raises:
            BundleError: the manifest cannot be used.
        """
        self._open_or_raise()
        return Bundle(self.path, self._encoded())

    def commit(self) -> Bundle:
        """Make what was added and said the bundle, release the lock and return it opened.

        Raises:
            BundleError: the manifest cannot be used, or the disk refuses; the old bundle is intact, and the
                writer can be used further.
        """
        self._open_or_raise()
        return self._commit(self._encoded())

    def commit_copy(self, manifest: bytes) -> Bundle:
        """Commit a manifest byte by byte, so that the copy of a bundle has the digest of the original.

        Raises:
            BundleError: as :meth:`commit`, and where what was added is not what the manifest lists.
        """
        self._open_or_raise()
        return self._commit(manifest)

    def _commit(self, data: bytes) -> Bundle:
        _, manifest = parse_manifest(data, self.where)
        self._check_present(manifest)
        with self._translated("cannot be written"):
            self._sweep(keep={*self._previous.get("files", {}), *manifest.files})
            for folder in {self.path.joinpath(*name.split("/")[:-1]) for name in manifest.files}:
                sync_directory(folder)
            sync_directory(self.path)
            self._replace_manifest(data)
            sync_directory(self.path)
            if self._made_directory:
                sync_directory(self.path.parent)
                self._made_directory = False
        self.close()
        return Bundle.open(self.path)

    def close(self) -> None:
        """Release the lock; without a :meth:`commit` before, remove what was added."""
        if self._lock is None:
            return
        for name in self._created:
            path = self.path.joinpath(*name.split("/"))
            with contextlib.suppress(OSError):
                path.unlink()
        for folder in self._folders:
            with contextlib.suppress(OSError):
                while folder != self.path:
                    folder.rmdir()  # ends the loop where something is in it
                    folder = folder.parent
        self._created.clear()
        self._folders.clear()
        self._lock.release()
        self._lock = None
        if self._made_directory:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def _replace_manifest(self, data: bytes) -> None:
        temporary, _, _ = write_temporary(self.path, data)
        # Given up before the rename, so that an interrupt right after it takes nothing back.
        created, self._created = self._created, set()
        try:
            temporary.replace(self.path / MANIFEST_NAME)
        except OSError:
            self._created = created
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def _open_or_raise(self) -> None:
        if self._lock is None:
            raise BundleError(
                f"{self.where}: this writer has ended: make a new BundleWriter for further changes."
            )

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise BundleError(
                f"{self.where}: another process is writing it: wait for it to end and try again."
            ) from error
        except FileExistsError as error:
            raise BundleError(f"{self.where}: {what}: a file is there, expected a directory.") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise BundleError(f"{self.where}: {what}: {_reason(error)}.") from error

    def _existing(self) -> dict[str, Any]:
        if not os.path.lexists(self.path / MANIFEST_NAME):
            return {}
        raw, _ = parse_manifest(_read_manifest(self.path), self.where)
        return raw

    def _first_draft(self, given: dict[str, Any] | Manifest | None) -> dict[str, Any]:
        if isinstance(given, Manifest):
            return cast("dict[str, Any]", msgspec.to_builtins(given))
        if given is not None:
            return copy.deepcopy(given)
        draft = copy.deepcopy(self._previous)
        if isinstance(draft.get("provenance"), dict):
            draft["provenance"].pop("time", None)
        return draft

    def _check_collision(self, stored: str, sha256: str) -> None:
        known = self._added.get(stored) or self._previous.get("files", {}).get(stored)
        if known is not None and known["sha256"] != sha256:
            raise BundleError(
                f"{self.where}: two files would both be called {stored!r}, as their hashes agree in 8 "
                "digits: "
                "choose another name for one."
            )

    def _encoded(self) -> bytes:
        self.manifest.setdefault("schema", {"major": SCHEMA.major, "minor": SCHEMA.minor})
        self.manifest.setdefault("min_reader", {"major": SCHEMA.major, "minor": 0})
        provenance = self.manifest.setdefault("provenance", {})
        if isinstance(provenance, dict):
            provenance.setdefault("time", provenance_time())
        try:
            self.manifest["files"] = self._referenced_files()
            return encode_manifest(self.manifest)
        except (TypeError, ValueError, RecursionError) as error:
            raise BundleError(
                f"{self.where}: the manifest cannot be written as JSON: {one_line(error)}."
            ) from error

    def _referenced_files(self) -> dict[str, Any]:
        known: dict[str, Any] = dict(self._previous.get("files", {}))
        given = self.manifest.get("files")
        if isinstance(given, dict):
            known.update(given)
        named = set(named_strings({key: value for key, value in self.manifest.items() if key != "files"}))
        return {**{name: entry for name, entry in known.items() if name in named}, **self._added}

    def _check_present(self, manifest: Manifest) -> None:
        for name, entry in manifest.files.items():
            known = self._added.get(name) or self._previous.get("files", {}).get(name)
            if known is None:
                raise BundleError(f"{self.where}: the manifest names {name!r}, which was not added.")
            if known != {"sha256": entry.sha256, "size_bytes": entry.size_bytes}:
                raise BundleError(
                    f"{self.where}: the file {name!r} was added with {known['size_bytes']} bytes and sha256 "
                    f"{known['sha256'][:16]}…, the manifest says {entry.size_bytes} and {entry.sha256[:16]}…."
                )
            if name not in self._added and not self.path.joinpath(*name.split("/")).is_file():
                raise BundleError(f"{self.where}: the file {name!r} is missing: add it again.")

    def _sweep(self, keep: set[str]) -> None:
        """Remove what earlier writes left: all that is temporary, and files that carry their own hash."""
        for base, _, names in os.walk(self.path, topdown=False):
            folder = Path(base)
            parts = folder.relative_to(self.path).parts
            is_temporary = any(part.startswith(TEMPORARY_PREFIX) for part in parts)
            for name in names:
                path = folder / name
                if path.relative_to(self.path).as_posix() not in keep and (is_temporary or _is_ours(path)):
                    path.unlink(missing_ok=True)
            if folder != self.path:
                with contextlib.suppress(OSError):  # something is in it
                    folder.rmdir()


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if path.name.startswith(TEMPORARY_PREFIX):
        return True
    tag = _TAGGED.search(path.name)
    if tag is None:
        return False
    with FileIO(
        path, "r"
    ) as stream:  # somebody else's file may look like ours by its name, not by its content
        return hash_stream(stream)[1][:8] in tag.group(1).split(".")


def _hash(content: bytes | os.PathLike[str]) -> str:
    """Return the sha256 of bytes or of a file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with FileIO(os.fspath(content), "r") as stream:
        return hash_stream(stream)[1]
