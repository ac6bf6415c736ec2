"""Write the generated pictures of ``edgeclip.shapes`` to a directory.

::

    images/train/000000.png …   images/held_out/000000.png …
    train.jsonl  held_out.jsonl  one picture a line: image, caption, caption_zh, label, label_zh, attributes
    labels.json                  the held-out combinations as labels, their Chinese names as aliases
    dataset.json                 what it is: schema, version, seed, counts, licence, digest

``edgeclip.data.read_samples`` reads the ``.jsonl`` files, ``edgeclip.label_sets.read_labels`` the labels. The
same settings give the same bytes on every machine, so PNG files are written here and not compressed: what a
deflate library makes of the same pixels depends on its version. A directory that is there is complete: it is
made under another name and renamed at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.resource_tracker
import os
import secrets
import shutil
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeclip.errors import ConfigError, InputError
from edgeclip.shapes import (
    LANGUAGES,
    VERSION,
    Combination,
    captions,
    check_size,
    held_out_combinations,
    label,
    ordered_combinations,
    render,
    training_combinations,
)
from edgeclip.storage import TEMPORARY_PREFIX, DirectoryLock, sync_directory

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ShapesReport", "encode_png", "write_shapes"]

SCHEMA = 1
LICENCE = "CC0-1.0"
MAX_PICTURES = 1_000_000  # the file names have six digits
_SPLITS: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")
_CHUNK = 64  # pictures a task


@dataclass(frozen=True)
class ShapesReport:
    """What was written, or found.

    Attributes:
        directory: where.
        status: ``"written"``, or ``"present"`` where the directory held this very set already.
        train: pictures of training combinations.
        held_out: pictures of held-out combinations.
        labels: held-out combinations.
        size_px: side of a picture.
        seed: of the set.
        digest: sha256 over the names and contents of all files.
    """

    directory: Path
    status: Literal["written", "present"]
    train: int
    held_out: int
    labels: int
    size_px: int
    seed: int
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"directory": str(self.directory)}


@dataclass(frozen=True)
class _Picture:
    name: str
    combination: Combination
    seed: int
    size_px: int


def write_shapes(
    directory: str | os.PathLike[str],
    *,
    train: int = 8_000,
    held_out: int = 2_000,
    size_px: int = 64,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ShapesReport:
    """Write a set of generated pictures; nothing is left behind where that fails or is interrupted.

    Each split goes through its combinations in a random order, and again in another one when it is through.

    Args:
        directory: to make. One that holds the same set is left as it is.
        train: pictures of training combinations.
        held_out: pictures of held-out combinations.
        size_px: side of the pictures.
        seed: another one gives other pictures, captions and order; the split of combinations stays.
        workers: processes that draw; more than one needs a ``__main__`` that can be imported.
        progress: called with pictures done and all pictures.

    Raises:
        ConfigError: a number is out of range.
        InputError: the directory holds something else, or cannot be written.
    """
    for name, value in (("train", train), ("held_out", held_out), ("workers", workers)):
        if not 1 <= value <= MAX_PICTURES:
            raise ConfigError(f"shapes: {name} is {value!r}, expected 1 to {MAX_PICTURES}.")
    check_size(size_px)
    target = Path(directory)
    described = {
        "schema": SCHEMA,
        "kind": "shapes",
        "version": VERSION,
        "seed": seed,
        "size_px": size_px,
        "train": {"pictures": train, "combinations": len(training_combinations())},
        "held_out": {"pictures": held_out, "combinations": len(held_out_combinations())},
        "languages": list(LANGUAGES),
        "licence": LICENCE,
    }
    digest = _digest_of(target, described)
    if digest is None:
        pictures = {
            split: list(islice(_plan(split, seed, size_px), count))
            for split, count in zip(_SPLITS, (train, held_out), strict=True)
        }
        with _new_directory(target) as folder:
            digest = _write(folder, pictures, described, seed, workers, progress)
        status: Literal["written", "present"] = "written"
    else:
        status = "present"
    return ShapesReport(
        directory=target,
        status=status,
        train=train,
        held_out=held_out,
        labels=len(held_out_combinations()),
        size_px=size_px,
        seed=seed,
        digest=digest,
    )


def _plan(split: str, seed: int, size_px: int) -> Iterator[_Picture]:
    for index, combination in enumerate(ordered_combinations(split == "held_out", seed)):
        # The upper half parts the sets of two seeds, the lower one the pictures of a set.
        yield _Picture(f"images/{split}/{index:06d}.png", combination, (seed << 32) + index, size_px)


def _digest_of(target: Path, described: dict[str, Any]) -> str | None:
    """Return the digest of a directory that holds this set; None where there is nothing.

    Raises:
        InputError: there is something else.
    """
    try:
        if not target.is_symlink() and (
            not target.exists() or (target.is_dir() and not any(target.iterdir()))
        ):
            return None
        said = json.loads((target / "dataset.json").read_bytes()) if target.is_dir() else None
    except (OSError, ValueError):
        said = None
    if isinstance(said, dict) and said.get("kind") == "shapes":
        differing = sorted(key for key in described if said.get(key) != described[key])
        if not differing:
            return str(said.get("digest"))
        raise InputError(
            f"{str(target)!r} holds generated pictures made with other settings ({', '.join(differing)}). "
            "Remove it, or choose another directory."
        )
    raise InputError(
        f"{str(target)!r} is there already and holds no generated pictures. Choose a directory that does not "
        "exist, or an empty one."
    )


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Give a directory beside ``target`` that takes its name at the end, or goes."""
    prefix = f"{TEMPORARY_PREFIX}{target.name}-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent, prefix)
        folder = target.parent / f"{prefix}{secrets.token_hex(8)}"
        folder.mkdir()
        lock = DirectoryLock(folder)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield folder
        lock.release()
        if target.is_dir():
            target.rmdir()  # empty: Windows renames onto nothing else
        folder.rename(target)
        sync_directory(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)  # gone already where all went well


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what a killed run left: directories whose lock nobody holds."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            DirectoryLock(folder).release()
            shutil.rmtree(folder)


def _unwritable(target: Path, error: OSError) -> InputError:
    return InputError(
        f"{str(target)!r} cannot be written ({error.strerror or error}). Check its permissions and the space "
        "left."
    )


def _write(
    folder: Path,
    pictures: dict[Literal["train", "held_out"], list[_Picture]],
    described: dict[str, Any],
    seed: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> str:
    hashes: dict[str, str] = {}

    def put(name: str, content: str) -> None:
        encoded = content.encode("utf-8")
        (folder / name).write_bytes(encoded)
        hashes[name] = hashlib.sha256(encoded).hexdigest()

    for split in _SPLITS:
        (folder / "images" / split).mkdir(parents=True)
        put(f"{split}.jsonl", "".join(_row(picture, seed) for picture in pictures[split]))
    labels = [
        {"name": label(combination, "en"), "aliases": {"zh": label(combination, "zh")}}
        for combination in held_out_combinations()
    ]
    put("labels.json", json.dumps({"labels": labels}, indent=1, ensure_ascii=False) + "\n")
    every = [picture for split in _SPLITS for picture in pictures[split]]
    chunks = [(folder, every[start : start + _CHUNK]) for start in range(0, len(every), _CHUNK)]
    with _mapped(workers) as run:
        for drawn in run(_draw, chunks):
            hashes.update(drawn)
            if progress is not None:
                progress(min(len(hashes) - 3, len(every)), len(every))
    digest = hashlib.sha256(
        "".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes)).encode()
    ).hexdigest()
    put("dataset.json", json.dumps(described | {"digest": digest}, indent=1) + "\n")
    return digest


def _row(picture: _Picture, seed: int) -> str:
    combination = picture.combination
    row = {
        "image": picture.name,
        "caption": captions(combination, "en", picture.seed)[0],
        "caption_zh": captions(combination, "zh", picture.seed)[0],
        "label": label(combination, "en"),
        "label_zh": label(combination, "zh"),
        **asdict(combination),
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


_Chunk = tuple[Path, list[_Picture]]
_Draw = Callable[[_Chunk], dict[str, str]]


@contextmanager
def _mapped(workers: int) -> Iterator[Callable[[_Draw, Sequence[_Chunk]], Iterator[dict[str, str]]]]:
    """Give ``map``, in this process or in several; an interrupt ends them all."""
    if workers == 1:
        yield map
        return
    with _interrupts_held_back():
        # spawn: as on every system, and safe whatever threads this process has
        pool = multiprocessing.get_context("spawn").Pool(workers, _leave_interrupts_to_parent)
    with pool:  # terminates on the way out
        yield pool.imap


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Deliver an interrupt afterwards; processes started meanwhile never see one."""
    if sys.platform == "win32":
        yield
        return
    # Started by the first spawned process, it would lift the mask.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw(chunk: _Chunk) -> dict[str, str]:
    """Write pictures; return the sha256 of each file by name."""
    folder, pictures = chunk
    hashes = {}
    for picture in pictures:
        content = encode_png(render(picture.combination, picture.seed, size_px=picture.size_px))
        (folder / picture.name).write_bytes(content)
        hashes[picture.name] = hashlib.sha256(content).hexdigest()
    return hashes


def encode_png(pixels: NDArray[Any]) -> bytes:
    """Return a PNG file of ``(H, W, 3)`` uint8 RGB, without compression: the same bytes everywhere.

    Source: PNG specification, third edition, §5; deflate's stored blocks are RFC 1951, §3.2.4.
    """
    height, width, _ = pixels.shape
    filtered = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter type 0: none
    blocks = [filtered[start : start + 0xFFFF] for start in range(0, len(filtered), 0xFFFF)]
    deflated = b"".join(
        struct.pack("<BHH", index == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for index, block in enumerate(blocks)
    )
    data = b"\x78\x01" + deflated + struct.pack(">I", zlib.adler32(filtered))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
