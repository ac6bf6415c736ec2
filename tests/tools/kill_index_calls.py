"""End processes that index a folder at each call that changes a file, and check what the index holds then.

``kill_index_calls.py FOLDER``, an empty one. Each call ends the process once before it does anything and once
half-way: a write after half of its bytes, another call when it is done. So ends a first index, and an update
with pictures that are new, changed, moved and gone. Every time the index opens, is sound, and is the old one
or the new one; the next run leaves the new one and nothing beside it. Prints the number of processes that
were ended; exits with a traceback where something was wrong.

The embedder is no tower: what an index keeps is of no matter here.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgeclip.index import update_index
from edgeclip.index_file import MadeWith, PictureIndex

MADE = MadeWith("s" * 64, "onnx-int8", "t" * 64, "model", 16)
OLD_S = 1_700_000_000
CALLS = ("open", "write", "ftruncate", "fsync", "replace", "unlink")
_ENDED = 9
_WRITE = os.write


class Digests:
    """Embeds a picture as a digest of its bytes."""

    def embed_stream(self, images: Iterable[Path], *, batch_size: int | None = None) -> Iterator[Any]:
        for path in images:
            row = np.frombuffer(hashlib.blake2b(path.read_bytes(), digest_size=16).digest(), np.uint8).astype(
                np.float32
            )
            yield SimpleNamespace(embedding=row / np.linalg.norm(row), error=None)


def update(pictures: Path, index: Path) -> None:
    """Bring an index up to date."""
    update_index(pictures, Digests(), MADE, path=index)


def end_at(number: int, half: bool) -> None:
    """Let this process end at one of its calls, before it or half-way."""
    calls = 0

    def ending(call: Callable[..., Any], half_way: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != number:
                return call(*arguments, **more)
            if half:
                half_way(*arguments, **more)
            os._exit(_ENDED)

        return instead

    for name in CALLS:
        call = getattr(os, name)
        setattr(os, name, ending(call, _write_half if name == "write" else call))
    opened = Path.open

    def open_(path: Path, *arguments: Any, **more: Any) -> Any:
        file = opened(path, *arguments, **more)
        if isinstance(file, io.FileIO) and file.writable():  # the index itself

            def write_half(content: bytes) -> None:
                file.write(bytes(content)[: len(content) // 2])

            return _Ending(file, ending(file.write, write_half))
        return file

    Path.open = open_  # type: ignore[method-assign, assignment]


def _write_half(file: int, content: bytes) -> None:
    _WRITE(file, content[: len(content) // 2])


class _Ending:
    """An open file that writes otherwise."""

    def __init__(self, file: io.FileIO, write: Callable[..., Any]) -> None:
        self.file, self.write, self.fileno = file, write, file.fileno

    def __enter__(self) -> _Ending:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def in_child(work: Callable[[], object]) -> int:
    """Run something in a fork and return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(index: Path) -> dict[str, bytes]:
    """Return each embedding by path, of an index that must be sound; ``{}`` for none."""
    if not index.exists():
        return {}
    opened = PictureIndex(index)
    opened.check()
    return {path: row.tobytes() for path, row in zip(opened.paths, opened.embeddings, strict=True)}


def put(path: Path, content: str) -> None:
    """Write a picture whose time of change is long ago."""
    path.write_text(content, encoding="utf-8")
    os.utime(path, (OLD_S, OLD_S))


def main(folder: Path) -> int:
    """End processes at each call; return how many."""
    pictures, index = folder / "pictures", folder / "index"
    pictures.mkdir()
    for number in range(5):
        put(pictures / f"{number}.jpg", f"picture {number}")
    update(pictures, folder / "before")
    (pictures / "0.jpg").unlink()
    (pictures / "1.jpg").rename(pictures / "moved.jpg")
    put(pictures / "2.jpg", "another picture")
    put(pictures / "new.jpg", "a new picture")
    update(pictures, folder / "after")
    new, ended = state(folder / "after"), 0
    for first in (True, False):
        old = {} if first else state(folder / "before")
        for half in (False, True):
            number, code = 0, _ENDED
            while code == _ENDED:
                number += 1
                for left in folder.glob("index*"):
                    left.unlink()
                if not first:
                    shutil.copy(folder / "before", index)

                def run(number: int = number, half: bool = half) -> None:
                    end_at(number, half)
                    update(pictures, index)

                code = in_child(run)
                found = state(index)
                assert found in (old, new), (number, half, sorted(found))
                ended += code == _ENDED
                if code == _ENDED:
                    assert in_child(lambda: update(pictures, index)) == 0
                assert state(index) == new
                assert [path.name for path in folder.glob("index*")] == ["index"]
            assert code == 0
    return ended


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
