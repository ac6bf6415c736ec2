"""Calibration sets: the pictures and texts that int8 ranges are chosen on, and how they are chosen.

Pictures come from a folder, a table, shards or a list; they are prepared as the model wants them, near copies
are set aside, and then some are taken: at random, in equal shares of their labels, or so that they cover what
the float model tells apart. What is taken depends on what is in the pictures, never on where they are, what
they are called or in which order they were found: rows stand in an order that a hash of their content and the
seed gives. The same Pillow makes the same rows of a picture; another one may differ in single levels.

Embeddings differ between processors in their last bits. What coverage compares are sums of rounded cosines,
and of equal ones the row of the lower hash is taken: machines choose differently only where two rows are all
but equally good. Who wants the very same rows keeps them (:meth:`CalibrationSet.write`).

    >>> pool = read_pool(SamplePool.of(Path("photos/")), PreprocessSpec())      # doctest: +SKIP
    >>> pool.choose(Selection("random", samples=64)).shape                     # doctest: +SKIP
    (64, 224, 224, 3)
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from edgeclip.bundle import PreprocessSpec
from edgeclip.data import Sample, captions_of, read_samples
from edgeclip.errors import CalibrationError, ConfigError, InputError
from edgeclip.labels import write_atomic
from edgeclip.preprocess import Preprocess
from edgeclip.tensors import map_tensors, write_tensors

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "CROPS",
    "FEW_PICTURES",
    "LEAST_SAMPLES",
    "METHODS",
    "POOL_PER_SAMPLE",
    "WHOLE",
    "CalibrationSet",
    "Embed",
    "Method",
    "Pool",
    "SamplePool",
    "Selection",
    "View",
    "choose_texts",
    "cover",
    "read_pool",
]

Method = Literal["coverage", "stratified", "random"]
METHODS: Final[tuple[str, ...]] = get_args(Method)
Embed: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.floating[Any]]]
"""Rows ``(n, H, W, 3)`` to embeddings ``(n, E)`` of the float model."""
LEAST_SAMPLES: Final = 16
FEW_PICTURES: Final = 64
"""Fewer pictures than this are cropped and flipped."""
POOL_PER_SAMPLE: Final = 4
"""Rows to choose each row from by coverage: embedding them costs what ranges over all of them would."""
_SPARE: Final = 1.25  # what random choices read beyond their samples, should some be near copies
_POOL_BYTES: Final = 512 << 20
_PEEK_BYTES: Final = 4096
_THUMBNAIL: Final = 16
_NEAR_LEVELS: Final = 2.0  # root of the mean square, over thumbnails
_COSINE_STEPS: Final = 1 << 16
_EMBED_ROWS: Final = 64
_SCHEMA: Final = "1"
_SUFFIX: Final = ".safetensors"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Selection:
    """How rows are taken from a pool.

    Attributes:
        method: ``"random"``; ``"stratified"``, equal shares of what tells pictures apart (the column
            ``superclass``, else the label, else the folder); ``"coverage"``, so that every row is near one of
            those taken, by the float model's embeddings.
        samples: rows at most, 16 or more.
        seed: another one gives other rows of the same pool.

    Raises:
        ConfigError: a value cannot be used.
    """

    method: Method = "coverage"
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"calibration selection: got {self.method!r}, expected one of {', '.join(METHODS)}."
            )
        if self.samples < LEAST_SAMPLES:
            raise ConfigError(f"calibration samples: got {self.samples}, expected at least {LEAST_SAMPLES}.")
        if self.seed < 0:
            raise ConfigError(f"calibration seed: got {self.seed}, expected 0 or more.")

    def rank(self, content: bytes) -> bytes:
        """Return a number, as bytes, that orders contents by this seed and nothing else."""
        return hashlib.blake2b(content, digest_size=16, key=str(self.seed).encode()).digest()


# --- sets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Rows by tower, in the order in which they were taken.

    Attributes:
        rows: ``image`` ``(n, H, W, 3)`` uint8 and, for models with a text tower, ``text`` ``(m, L)`` int32.
        sources: where those of each tower are from, without a path.
        selection: how they were chosen, as plain JSON values.
        tokenizer: digest of what made the text rows; empty where there are none.
    """

    rows: Mapping[str, NDArray[Any]]
    sources: Mapping[str, str]
    selection: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""

    @cached_property
    def digest(self) -> str:
        """Sha256 of the rows, their shapes and dtypes; it names the set in the manifest."""
        digest = hashlib.sha256()
        for name in sorted(self.rows):
            rows = np.ascontiguousarray(self.rows[name])
            digest.update(f"{name} {rows.dtype.name} {rows.shape}\n".encode())
            digest.update(rows.data)
        return digest.hexdigest()

    def feeds(self, spec: PreprocessSpec, *, float_input: bool) -> dict[str, NDArray[Any]]:
        """Return the rows as graphs take them.

        Args:
            spec: how the model wants pictures.
            float_input: pictures as float32 ``(n, 3, H, W)``, normalized.
        """
        feeds = dict(self.rows)
        if float_input:
            feeds["image"] = Preprocess(spec).normalize(feeds["image"])
        return feeds

    def to_dict(self) -> dict[str, Any]:
        """Return what the manifest says about it beside the digest."""
        return {"source": dict(self.sources), "selection": dict(self.selection)}

    def write(self, path: Path) -> None:
        """Write the set to one safetensors file; equal sets give equal bytes.

        Raises:
            InputError: the file cannot be written.
        """
        said = {
            "schema": _SCHEMA,
            "kind": "calibration",
            "digest": self.digest,
            "sources": json.dumps(dict(self.sources), sort_keys=True, ensure_ascii=False),
            "selection": json.dumps(dict(self.selection), sort_keys=True),
            "tokenizer": self.tokenizer,
        }
        write_atomic(path, write_tensors(self.rows, said))

    @classmethod
    def read(cls, path: Path) -> CalibrationSet:
        """Read what :meth:`write` wrote; the arrays stay in a memory map.

        Raises:
            InputError: it cannot be read, is no calibration set, or was changed.
        """
        where = f"calibration set {str(path)!r}"
        rows, said = map_tensors(path, where=where, error=InputError)
        if said.get("kind") != "calibration" or said.get("schema") != _SCHEMA:
            raise InputError(
                f"{where}: is {said.get('kind', 'unnamed')!r} of schema {said.get('schema')!r}, expected "
                f"'calibration' of schema {_SCHEMA!r}, as an export writes it with --keep-intermediate."
            )
        expected = {"image": ("uint8", 4), "text": ("int32", 2)}
        for name, array in rows.items():
            if (array.dtype.name, array.ndim) != expected.get(name):
                raise InputError(
                    f"{where}: holds {name!r} as {array.dtype.name} {array.shape}, expected pictures 'image' "
                    "as uint8 (n, H, W, 3) and texts 'text' as int32 (m, L)."
                )
        try:
            sources, selection = json.loads(said["sources"]), json.loads(said["selection"])
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{where}: its description cannot be read ({error!r}); make it again."
            ) from error
        read = cls(rows, sources, selection, said.get("tokenizer", ""))
        if read.digest != said.get("digest"):
            raise InputError(
                f"{where}: its rows have the digest {read.digest[:12]}…, expected "
                f"{said.get('digest', '')[:12]}…: it is damaged or was changed; make it again."
            )
        return read

    def check_fits(self, spec: PreprocessSpec, *, text: bool, tokenizer: str) -> None:
        """Refuse a set that was made for another model.

        Args:
            spec: how the model wants pictures.
            text: whether its text tower needs rows.
            tokenizer: digest of the model's tokenizer.

        Raises:
            CalibrationError: pictures are of another size, or texts of another tokenizer.
        """
        pixels, expected = self.rows.get("image"), (*spec.image_size_px, 3)
        if pixels is None or pixels.shape[1:] != expected:
            got = "no pictures" if pixels is None else f"pictures of {pixels.shape[1:]}"
            raise CalibrationError(
                f"calibration set {self.digest[:12]}…: has {got}, expected {expected}: it was made for "
                "another model; give pictures."
            )
        if text and (got := self.tokenizer or "no texts") != tokenizer:
            raise CalibrationError(
                f"calibration set {self.digest[:12]}…: its texts are of the tokenizer {got[:12]!r}, expected "
                f"{tokenizer[:12]!r}: it is of another model; export with --no-text, or give pictures."
            )

    @staticmethod
    def is_file(path: Path) -> bool:
        """Whether a path names such a file, by its suffix."""
        return path.suffix.lower() == _SUFFIX


# --- pictures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A part of a picture.

    Attributes:
        left: where it begins, as share of the width.
        top: the same of the height.
        side: of both sides, as share.
        mirrored: left and right change places.
    """

    left: float = 0.0
    top: float = 0.0
    side: float = 1.0
    mirrored: bool = False

    def of(self, image: Image.Image) -> Image.Image:
        """Return that part of a picture; the picture itself where it is all of it."""
        from PIL import Image as Pillow

        if self.side < 1:
            width, height = image.size
            x, y = round(self.left * width), round(self.top * height)
            right, bottom = x + max(1, round(self.side * width)), y + max(1, round(self.side * height))
            image = image.crop((x, y, right, bottom))
        return image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image


WHOLE: Final = View()
CROPS: Final = (
    View(0.05, 0.05, 0.9, mirrored=True),
    View(0.1, 0.0, 0.8),
    View(0.1, 0.2, 0.8, mirrored=True),
    View(0.0, 0.15, 0.7),
    View(0.3, 0.15, 0.7, mirrored=True),
    View(0.0, 0.3, 0.45),
    View(0.55, 0.3, 0.45, mirrored=True),
    View(0.3, 0.55, 0.45),
)
"""Views of few pictures; others than those that exports are compared on."""


@dataclass(frozen=True)
class SamplePool:
    """Pictures that rows can be made of.

    Attributes:
        samples: gives all of them, in any order, the same ones whenever it is called.
        source: what they are called in the manifest, without a path.
        few: views of each where there are fewer than 64 pictures.
        many: views of each where there are more.
    """

    samples: Callable[[], Iterable[Sample]]
    source: str
    few: tuple[View, ...] = (WHOLE, *CROPS)
    many: tuple[View, ...] = (WHOLE,)

    @classmethod
    def of(cls, path: Path) -> SamplePool:
        """Return the pictures of a folder (its folders are their labels), table or shard."""
        return cls(lambda: read_samples([path], folder_labels=True), path.name)

    def captions(self, selection: Selection, most: int) -> list[str]:
        """Return captions of the pictures, each once, at most so many, drawn by the seed."""
        return _drawn(_captions(self.samples()), selection, most)


@dataclass(frozen=True, eq=False)
class Pool:
    """Rows to choose from, near copies set aside.

    Attributes:
        pixels: ``(n, H, W, 3)`` uint8 RGB, in the order of their hashes.
        strata: what each is a picture of; ``None`` where nothing says so.
        source: where they are from, without a path.
        pictures: there were in all.
        copies: rows that were set aside as near copies of others.
    """

    pixels: NDArray[np.uint8]
    strata: tuple[str | None, ...]
    source: str
    pictures: int
    copies: int = 0

    @classmethod
    def of(
        cls,
        pixels: NDArray[np.uint8],
        selection: Selection,
        source: str,
        strata: Sequence[str | None] = (),
        *,
        pictures: int | None = None,
        most: int | None = None,
    ) -> Pool:
        """Return prepared rows as a pool, those of the least hashes where there are more than wanted.

        Near copies (a mean difference of two levels at 16 x 16 pixels) stay only to fill up to 16 rows: a
        camera that looks at one place has nothing else to offer.

        Args:
            pixels: ``(n, H, W, 3)``, in any order.
            selection: its seed counts.
            source: where they are from, without a path.
            strata: what each is a picture of.
            pictures: they are of; as many if missing.
            most: rows to keep.
        """
        strata = strata or (None,) * len(pixels)
        ranks = [selection.rank(row.tobytes()) for row in pixels]
        order = sorted(range(len(pixels)), key=lambda row: (ranks[row], strata[row] or ""))
        first, copies = _distinct(pixels, order)
        kept = (first + copies[: max(0, LEAST_SAMPLES - len(first))])[:most]
        return cls(
            pixels[kept],
            tuple(strata[row] for row in kept),
            source,
            len(pixels) if pictures is None else pictures,
            len(copies),
        )

    def choose(
        self,
        selection: Selection,
        embed: Embed | None = None,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> NDArray[np.uint8]:
        """Return the rows that a selection takes, ``(n, H, W, 3)``; all where there are no more.

        Args:
            selection: how, and how many.
            embed: of the float model; coverage needs it.
            on_progress: told how many rows have been embedded, and of how many.

        Raises:
            InputError: stratified, and pictures have no label.
            CalibrationError: embeddings cannot be used.
        """
        count = min(selection.samples, len(self.pixels))
        if selection.method == "stratified":
            places = self._equal_shares(count)
        elif selection.method == "random" or count == len(self.pixels):
            places = list(range(count))
        else:
            if embed is None:
                raise CalibrationError("coverage needs embeddings of the float model: give `embed`.")
            places = cover(_embedded(self.pixels, embed, on_progress), count)
        return self.pixels[places]

    def described(self, selection: Selection) -> dict[str, Any]:
        """Return what the manifest says about a choice of these rows."""
        return {
            "method": selection.method,
            "seed": selection.seed,
            "pictures": self.pictures,
            "pool": len(self.pixels),
            "near_copies": self.copies,
        }

    def _equal_shares(self, count: int) -> list[int]:
        groups: dict[str, list[int]] = {}
        for place, stratum in enumerate(self.strata):
            if stratum is None:
                missing = self.strata.count(None)
                raise InputError(
                    f"stratified calibration on {self.source!r}: {missing} of {len(self.strata)} rows are of "
                    "pictures without a label; expected a column 'superclass' or 'label', or folders named "
                    "after what is in them. Choose coverage or random otherwise."
                )
            groups.setdefault(stratum, []).append(place)
        return list(itertools.islice(_in_turn(groups[name] for name in sorted(groups)), count))


def read_pool(
    source: SamplePool,
    spec: PreprocessSpec,
    selection: Selection,
    *,
    most: int | None = None,
    workers: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pool:
    """Prepare the pictures that a selection may choose from.

    The pictures are gone through twice: once to draw as many as are needed by a few bytes of each, once to
    decode those. Held are rows at the size of the tower, never originals.

    Args:
        source: the pictures.
        spec: how the model wants them.
        selection: what the rows are for.
        most: rows at most; by default four times the samples for coverage, a few more than the samples
            otherwise. Rows never take more than 512 MiB.
        workers: threads that decode.
        on_progress: told how many pictures have been prepared, and of how many.

    Raises:
        InputError: there are fewer than two pictures, or one cannot be read.
    """
    height, width = spec.image_size_px
    if most is None:
        share = POOL_PER_SAMPLE if selection.method == "coverage" else _SPARE
        most = round(selection.samples * share)
    most = max(LEAST_SAMPLES, min(most, _POOL_BYTES // (height * width * 3)))
    found, total = _found(source, selection, most)
    if total < 2:
        raise InputError(
            f"calibration on {source.source!r}: holds {total} pictures, expected at least 2 to choose from."
        )
    # Many pictures with few views tell more than few pictures with many views.
    views = (source.few if total < FEW_PICTURES else source.many)[: -(-most // len(found))]
    wanted = set(found)
    pixels = np.empty((len(wanted) * len(views), height, width, 3), np.uint8)
    strata: list[str | None] = []
    prepare = Preprocess(spec)

    def prepared(sample: Sample) -> list[NDArray[np.uint8]]:
        image = prepare.decode(sample.source)
        return [prepare.resize(view.of(image)) for view in views]

    chosen = (sample for place, sample in enumerate(source.samples()) if place in wanted)
    with ThreadPoolExecutor(workers) as threads:
        while part := list(itertools.islice(chosen, 2 * workers)):
            for sample, rows in zip(part, threads.map(prepared, part), strict=True):
                pixels[len(strata) : len(strata) + len(views)] = rows
                strata += [_stratum(sample)] * len(views)
            on_progress(len(strata) // len(views), len(wanted))
    return Pool.of(pixels[: len(strata)], selection, source.source, strata, pictures=total, most=most)


def _found(source: SamplePool, selection: Selection, most: int) -> tuple[list[int], int]:
    """Return the places of the pictures to read, those drawn first in front, and how many there are."""
    total = 0

    def ranked() -> Iterator[tuple[bytes, int, str | None]]:
        nonlocal total
        for place, sample in enumerate(source.samples()):
            total += 1
            yield selection.rank(_peeked(sample)), place, _stratum(sample)

    if selection.method != "stratified":
        drawn = heapq.nsmallest(most, ranked())
    else:
        groups: dict[str, list[tuple[bytes, int, str | None]]] = {}
        for entry in ranked():
            groups.setdefault(entry[2] or "", []).append(entry)
            if len(group := groups[entry[2] or ""]) > 2 * most:
                group[:] = heapq.nsmallest(most, group)
        drawn = list(itertools.islice(_in_turn(sorted(groups[name]) for name in sorted(groups)), most))
    return [place for _, place, _ in drawn], total


def _peeked(sample: Sample) -> bytes:
    """Return a few bytes that tell the content of a file: its size and some from its middle."""
    if isinstance(sample.source, bytes):
        size, middle = len(sample.source), sample.source[len(sample.source) // 2 :][:_PEEK_BYTES]
    else:
        try:
            with sample.source.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(size // 2)
                middle = stream.read(_PEEK_BYTES)
        except (OSError, ValueError) as error:
            raise InputError(
                f"calibration picture {sample.key!r}: cannot be read ({error}); leave it out or repair it."
            ) from error
    return size.to_bytes(8, "little") + middle


def _stratum(sample: Sample) -> str | None:
    said = sample.columns.get("superclass")
    return said if isinstance(said, str) and said else sample.label


def _distinct(pixels: NDArray[np.uint8], order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the rows that are no near copy of an earlier one of an order, and the others."""
    thumbnails = np.stack([_thumbnail(pixels[row]) for row in order])
    limit = _NEAR_LEVELS**2 * thumbnails.shape[1]
    squares = (thumbnails**2).sum(axis=1)
    first: list[int] = []  # places in the order
    for place in range(len(order)):
        distances = squares[first] + squares[place] - 2 * (thumbnails[first] @ thumbnails[place])
        if not (distances <= limit).any():
            first.append(place)
    kept = set(first)
    return [order[place] for place in first], [row for place, row in enumerate(order) if place not in kept]


def _thumbnail(row: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return means over a grid, as whole levels, ``(768,)``."""
    edges = [np.unique(np.arange(_THUMBNAIL) * side // _THUMBNAIL) for side in row.shape[:2]]
    sums = np.add.reduceat(np.add.reduceat(row, edges[0], axis=0, dtype=np.int64), edges[1], axis=1)
    sizes = [np.diff(edge, append=side) for edge, side in zip(edges, row.shape[:2], strict=True)]
    means: NDArray[np.float64] = np.rint(sums / (sizes[0][:, None, None] * sizes[1][:, None])).ravel()
    return means


# --- coverage ----------------------------------------------------------------------------------------------


def cover(embeddings: NDArray[np.floating[Any]], count: int) -> list[int]:
    """Return rows that all are near to, the one first that gains most (facility location, k-medians).

    Each row taken raises the sum over all rows of the cosine to the nearest one taken as far as any single
    row does (Nemhauser et al. 1978; gains are looked up as by Minoux 1978). The prefix of a choice is the
    choice of fewer. Cosines are rounded to 2⁻¹⁶; of equal gains the first row is taken.

    Args:
        embeddings: ``(n, E)``.
        count: rows to take, at most ``n``.
    """
    rows = embeddings.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    near = np.rint(rows @ rows.T * _COSINE_STEPS).astype(np.int32)
    best = np.full(len(rows), -_COSINE_STEPS, np.int32)

    def gain(row: int) -> int:
        return int(np.maximum(near[row] - best, 0).sum(dtype=np.int64))

    chosen: list[int] = []
    # What a row gains only falls as others are taken: the top that was looked up anew is the best.
    heap = [(-gain(row), row, 0) for row in range(len(rows))]
    heapq.heapify(heap)
    while len(chosen) < count:
        _, row, known = heap[0]
        if known < len(chosen):
            heapq.heapreplace(heap, (-gain(row), row, len(chosen)))
            continue
        heapq.heappop(heap)
        chosen.append(row)
        best = np.maximum(best, near[row])
    return chosen


def _embedded(
    pixels: NDArray[np.uint8], embed: Embed, on_progress: Callable[[int, int], None]
) -> NDArray[np.floating[Any]]:
    parts = []
    for start in range(0, len(pixels), _EMBED_ROWS):
        part = pixels[start : start + _EMBED_ROWS]
        got = np.asarray(embed(part))
        if got.ndim != 2 or len(got) != len(part) or not np.isfinite(got).all():
            finite = "finite" if np.isfinite(got).all() else "not finite"
            raise CalibrationError(
                f"coverage: embeddings of {len(part)} pictures are {got.shape}, {finite}; expected "
                f"({len(part)}, E), finite: the float model is broken, or the pictures are."
            )
        parts.append(got)
        on_progress(start + len(part), len(pixels))
    return np.concatenate(parts)


# --- texts -------------------------------------------------------------------------------------------------


def choose_texts(groups: Iterable[Iterable[str]], selection: Selection, most: int) -> list[str]:
    """Return texts in equal shares of groups, drawn by the seed, each once.

    Args:
        groups: such as captions, and labels in templates; what one lacks the others give.
        selection: its seed counts.
        most: texts at most.
    """
    drawn = [_drawn(group, selection, most) for group in groups]
    return list(itertools.islice(dict.fromkeys(_in_turn(drawn)), most))


def _captions(samples: Iterable[Sample]) -> Iterator[str]:
    for sample in samples:
        for texts in captions_of(sample.columns).values():
            yield from texts
        if sample.caption:
            yield sample.caption


def _drawn(texts: Iterable[str], selection: Selection, most: int) -> list[str]:
    """Return those of the least hashes, each once, without holding all of them."""
    ranked = ((selection.rank(text.encode()), text) for text in texts)
    kept: dict[str, bytes] = {}
    for rank, text in ranked:
        kept[text] = rank
        if len(kept) > 2 * most + 1024:
            kept = dict(heapq.nsmallest(most, kept.items(), key=lambda entry: entry[1]))
    return [text for text, _ in heapq.nsmallest(most, kept.items(), key=lambda entry: entry[1])]


def _in_turn(groups: Iterable[Iterable[_T]]) -> Iterator[_T]:
    """Yield the first of each group, then the second, until all are empty."""
    left = [iter(group) for group in groups]
    while left:
        still = []
        for group in left:
            for each in group:
                yield each
                still.append(group)
                break
        left = still
