"""Shards with stored teachers, made for tests: ours with probes as teachers, and DataCompDR's by hand."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tar_shards import make_shard
from train_runs import CONTEXT, EMBED, SIZE_PX, TEXT, VIT

from edgeclip.distill.recipe import CheckpointTeacher, Recipe, TeacherSpec, parse_recipe
from edgeclip.distill.reinforce import ReinforceReport, reinforce
from edgeclip.distill.reinforce_plan import ReinforceOptions, open_plan
from edgeclip.distill.samples import open_samples
from edgeclip.distill.shards import write_shards
from edgeclip.shape_files import write_shapes
from edgeclip.tokenizer import Tokenizer, train_bpe

PROBES = Path(__file__).parents[1] / "data" / "probes"
WIDTH = 96  # of each probe's embedding


def probe(name: str, *, called: str | None = None, scale: float = 100.0) -> CheckpointTeacher:
    return CheckpointTeacher(name=called or name, path=str(PROBES / name), scale=scale)


def make_shapes(folder: Path, *, train: int, held_out: int = 48, per_shard: int = 64) -> Path:
    """Write pictures, a tokenizer for their captions, shards, and captions by made-up captioners."""
    write_shapes(folder / "shapes", train=train, held_out=held_out, size_px=SIZE_PX, seed=1)
    rows = [
        json.loads(line)
        for line in (folder / "shapes" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    words = [text for row in rows for text in (row["caption"], row["label"], f"a picture: {row['label']}")]
    train_bpe(words, vocab_size=600, context_length=CONTEXT).to_files(folder / "tokenizer")
    write_shards(
        open_samples([folder / "shapes" / "train.jsonl"]), folder / "shards", samples_per_shard=per_shard
    )
    lines = [
        {
            "key": f"{number:09d}",
            "captions": [row["label"], f"a picture: {row['label']}"],
            "synthetic_first": row["label"],
            "synthetic_second": [f"a picture: {row['label']}"],
        }
        for number, row in enumerate(rows)
    ]
    (folder / "captions.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return folder


def make_reinforced(
    folder: Path, out: str, teachers: Sequence[TeacherSpec], *, rank: int = 0, world: int = 1, **options: Any
) -> ReinforceReport:
    """Reinforce the shards of :func:`make_shapes`."""
    said = {"augmentations": 3, "crop_scale": (0.8, 1.0), "rand_augment": 0, **options}
    plan = open_plan([folder / "shards"], teachers, ReinforceOptions(**said), root=folder)
    return reinforce(plan, folder / out, rank=rank, world=world)


def shipped(folder: Path, name: str, *changes: str) -> Recipe:
    """Return a built-in recipe with a student of a few thousand parameters, for the data of a folder."""
    text = files("edgeclip.distill.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    tokenizer = Tokenizer.open(folder / "tokenizer")
    student = TEXT.format(
        vocab=tokenizer.vocab_size, pad=tokenizer.config.special.pad, context=CONTEXT, embed=EMBED
    )
    before, rest = text.split("[student]\n")
    rest = rest[rest.index("[data.train]") :]
    validation = """
[data.held_out]
paths = ["shapes/held_out.jsonl"]
[[validation]]
name = "pairs"
data = "held_out"
"""
    whole = f'{before}[student]\ntokenizer = "tokenizer"\n{VIT}{student}\n{rest}{validation}'
    return parse_recipe(whole.encode(), changes=changes)


def apple_sample(
    key: str,
    picture: bytes,
    caption: str,
    synthetic: Sequence[str],
    views: list[Any],
    arrays: Mapping[str, NDArray[np.float32]],
    *,
    form: str,
    with_picture: bool = True,
) -> list[tuple[str, bytes]]:
    """Return the members of a sample as apple/DataCompDR-12M (npz) and its bf16 form (pth.gz) have them."""
    buffer = io.BytesIO()
    if form == "npz":
        np.savez_compressed(buffer, **arrays)
        stored = buffer.getvalue()
    else:
        torch.save({name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}, buffer)
        stored = gzip.compress(buffer.getvalue())
    members = {
        "json": json.dumps({"uid": key, "sha256": "0" * 64}).encode(),
        form: stored,
        "paug.json": json.dumps({"param_aug": views}).encode(),
        "syn.json": json.dumps({"syn_text": list(synthetic)}).encode(),
        "url.txt": b"https://example.org/picture.jpg",
    }
    if with_picture:
        members |= {"jpg": picture, "txt": caption.encode()}
    return [(f"{key}.{name}", members[name]) for name in sorted(members)]


def jpeg(pixels: NDArray[np.uint8], *, orientation: int = 1) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def apple_shard(path: Path, samples: Sequence[list[tuple[str, bytes]]]) -> Path:
    return make_shard(path, [member for sample in samples for member in sample])
