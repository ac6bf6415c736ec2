"""Small tar shards and pictures, made with the standard library alone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, *, kind: str = "PNG", size_px: tuple[int, int] = (12, 16)) -> bytes:
    """Return a picture file of random pixels; the number decides which."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size_px, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_shard(
    path: Path,
    members: Mapping[str, bytes] | list[tuple[str, bytes]],
    *,
    mode: str = "w",
    layout: int = tarfile.PAX_FORMAT,
) -> Path:
    """Write a tar file with these members in this order."""
    entries = list(members.items()) if isinstance(members, Mapping) else members
    with tarfile.open(path, mode, format=layout) as archive:  # type: ignore[call-overload]
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_table(folder: Path, count: int, *, broken: frozenset[int] = frozenset()) -> Path:
    """Write pictures and a table of them with alt texts, rewrites and synthetic captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name = f"{number:03d}.png"
        content = picture(number)
        (folder / name).write_bytes(content[: len(content) // 2] if number in broken else content)
        rows.append(
            {
                "image": name,
                "caption": f"picture {number}",
                "caption_zh": f"第{number}张图片",
                "rewrites": [f"an image, number {number}", f"no. {number}"],
                "syn_text": [f"noise {number} {letter}" for letter in "abc"],
                "label": "even" if number % 2 == 0 else "odd",
            }
        )
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table
