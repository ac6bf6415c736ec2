"""What variants are compared on: pictures, texts and labels, and the golden file made of some of them.

Without pictures of the user's, the photographs that come with edgeclip are taken, each as a whole, mirrored
and in five crops. Labels are a hundred everyday names, drawn evenly from those of the embedded bundle. All of
it is decided by the model's preprocessing and languages alone, so that two exports compare the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import edgeclip
from edgeclip.bundle import Bundle, PreprocessSpec
from edgeclip.calibration.dataset import WHOLE, View
from edgeclip.data import read_samples
from edgeclip.errors import InputError
from edgeclip.label_sets import TEMPLATES, Label, LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.preprocess import Preprocess
from edgeclip.words import scripts_of

from .options import Offered

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.tokenizer import Tokenizer

__all__ = [
    "EVERYDAY",
    "PHOTOGRAPHS",
    "Expected",
    "Pictures",
    "Reference",
    "calibration_texts",
    "default_templates",
    "everyday",
    "golden_tensors",
    "reference_pictures",
    "reference_texts",
    "shipped_bank",
]

EVERYDAY: Final = "everyday"
PHOTOGRAPHS: Final = "photographs of edgeclip, cropped and flipped"
_BANK, _CHINESE_BANK = "imagenet-1k", "imagenet-1k-zh"
_NAMES = 100
_TEXTS, _CHINESE_TEXTS, _BARE = 128, 32, 8
_MOST, _ENOUGH = 256, 64  # pictures of the user's: more add time, fewer are cropped and flipped
_GOLDEN, _GOLDEN_BYTES = 16, 3_700_000

# Others than those that ranges are chosen on, `edgeclip.calibration.dataset.CROPS`.
_VIEWS: Final = (
    WHOLE,
    View(mirrored=True),
    View(0.0, 0.0, 0.6),
    View(0.4, 0.0, 0.6, mirrored=True),
    View(0.0, 0.4, 0.6, mirrored=True),
    View(0.4, 0.4, 0.6),
    View(0.2, 0.2, 0.6),
)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Prepared pictures.

    Attributes:
        names: what messages call them.
        pixels: ``(n, H, W, 3)`` uint8 RGB at tower size.
        whole: rows that are whole pictures.
        source: where they are from, without a path.
    """

    names: tuple[str, ...]
    pixels: NDArray[np.uint8]
    whole: tuple[int, ...]
    source: str


@dataclass(frozen=True, eq=False)
class Reference:
    """Inputs of both towers."""

    pictures: Pictures
    texts: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Sha256 of pixels and texts."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pictures.pixels).data)
        digest.update(json.dumps(self.texts).encode())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return what the manifest says about it."""
        return {
            "pictures": len(self.pictures.names),
            "source": self.pictures.source,
            "texts": len(self.texts),
            "digest": self.digest,
        }


@dataclass(frozen=True, eq=False)
class Expected:
    """What eager float32 makes of a reference: unit embeddings ``(n, E)`` and ``(m, E)``."""

    image: NDArray[np.float32]
    text: NDArray[np.float32] | None


# --- pictures ----------------------------------------------------------------------------------------------


def reference_pictures(spec: PreprocessSpec, given: Path | None = None) -> Pictures:
    """Return the pictures to compare on.

    Args:
        spec: how the model wants them.
        given: a folder, table or shards; the photographs that come with edgeclip without.

    Raises:
        InputError: it is not there, holds fewer than two pictures, or one cannot be read.
    """
    if given is None:
        return _prepared(spec, _photographs(), _VIEWS, PHOTOGRAPHS)
    found = _listed(given)
    return _prepared(spec, found, _VIEWS if len(found) < _ENOUGH else (WHOLE,), given.name)


def _photographs() -> list[tuple[str, Any]]:
    folder = Path(edgeclip.__file__).parent / "assets" / "photos"
    return [(path.name, path) for path in sorted(folder.glob("*.jpg"))]


def _listed(given: Path) -> list[tuple[str, Any]]:
    found = [(sample.key, sample.source) for sample in read_samples([given])]
    if len(found) < 2:
        count = f"{len(found)} picture" if len(found) == 1 else f"{len(found)} pictures"
        raise InputError(f"{str(given)!r}: holds {count}, expected at least 2 to compare on.")
    return [found[row] for row in _evenly(len(found), _MOST)]


def _prepared(
    spec: PreprocessSpec, found: Sequence[tuple[str, Any]], views: Sequence[View], source: str
) -> Pictures:
    prepare = Preprocess(spec)
    names: list[str] = []
    rows: list[NDArray[np.uint8]] = []
    whole: list[int] = []
    for name, file in found:
        image = prepare.decode(file)
        for number, view in enumerate(views):
            if view == WHOLE:
                whole.append(len(rows))
            rows.append(prepare.resize(view.of(image)))
            names.append(name if view == WHOLE else f"{name} (view {number})")
    return Pictures(tuple(names), np.stack(rows), tuple(whole), source)


# --- labels and texts --------------------------------------------------------------------------------------


def shipped_bank(name: str) -> Offered | None:
    """Return a bank of the embedded bundle with its templates, ``None`` where it has no such bank."""
    bundle = Bundle.open("default")
    entry = bundle.manifest.label_banks.get(name)
    if entry is None:
        return None
    bank = LabelBank.from_bytes(bundle.read(entry.file), source=f"label bank {name!r}")
    return Offered(name, bank.labels, bank.templates)


def everyday(languages: Sequence[str]) -> Offered:
    """Return a hundred everyday names in a language of the model, with their names in its others."""
    chinese = "zh" in languages and "en" not in languages
    bank = _names(chinese=chinese)
    chosen = []
    for row in _evenly(len(bank.labels), _NAMES):
        label = bank.labels.labels[row]
        aliases = tuple((language, alias) for language, alias in label.aliases if language in languages)
        chosen.append(Label(label.name, aliases=aliases))
    return Offered(EVERYDAY, LabelSet(tuple(chosen)), bank.templates)


def _names(*, chinese: bool) -> Offered:
    bank = shipped_bank(_CHINESE_BANK if chinese else _BANK)
    assert bank is not None
    return bank


def default_templates(labels: LabelSet) -> Templates:
    """Return the templates a bundle would take: ``zh`` where every label is Chinese, else ``one``."""
    chinese = all("han" in scripts_of(name) for name in labels.names)
    return Templates.of("zh" if chinese else "one")


def reference_texts(labels: LabelSet, templates: Templates, languages: Sequence[str]) -> tuple[str, ...]:
    """Return texts to compare on: labels in templates, some bare, some in Chinese where that is known."""
    every = [text for label in labels.labels for phrase in label.texts(templates.texts) for text in phrase]
    texts = [every[row] for row in _evenly(len(every), _TEXTS)]
    texts += [labels.names[row] for row in _evenly(len(labels), _BARE)]
    if "zh" in languages and templates.name != "zh":
        texts += _chinese_texts()
    return tuple(dict.fromkeys(texts))


def _chinese_texts() -> Iterator[str]:
    names = _names(chinese=True).labels
    for number, row in enumerate(_evenly(len(names), _CHINESE_TEXTS)):
        yield TEMPLATES["zh"][number % len(TEMPLATES["zh"])].replace("{}", names.names[row])


def calibration_texts(languages: Sequence[str]) -> tuple[str, ...]:
    """Return texts to choose ranges on: everyday names in a template each, no name among those that judge."""
    chinese = "zh" in languages and "en" not in languages
    names = _names(chinese=chinese).labels
    templates = TEMPLATES["zh" if chinese else "openai-7"]
    judging = set(_evenly(len(names), _NAMES))
    return tuple(
        templates[row % len(templates)].replace("{}", name)
        for row, name in enumerate(names.names)
        if row not in judging
    )


# --- golden ------------------------------------------------------------------------------------------------


def golden_tensors(
    reference: Reference, expected: Expected, tokenizer: Tokenizer, bank: LabelBank
) -> dict[str, NDArray[Any]]:
    """Return what a golden file holds: a few inputs of a reference and what eager float32 makes of them.

    Sixteen pictures, fewer of large ones: at most 4 MB in all.
    """
    pixels, whole = reference.pictures.pixels, reference.pictures.whole
    count = max(1, min(_GOLDEN, _GOLDEN_BYTES // pixels[0].nbytes))
    others = [row for row in range(len(pixels)) if row not in set(whole)]
    rows = [whole[place] for place in _evenly(len(whole), count)]
    rows = sorted(rows + [others[place] for place in _evenly(len(others), count - len(rows))])
    embeddings = expected.image[rows]
    similarity = embeddings @ bank.embeddings.T
    tensors: dict[str, NDArray[Any]] = {
        "images": pixels[rows],
        "image_embedding": embeddings,
        "bank_top5": np.argsort(-similarity, axis=1, kind="stable")[:, :5].astype(np.int32),
    }
    if expected.text is not None:
        said = _evenly(len(reference.texts), _GOLDEN)
        tensors["tokens"] = tokenizer([reference.texts[row] for row in said], truncate=True)
        tensors["text_embedding"] = expected.text[said]
    return tensors


def _evenly(total: int, most: int) -> list[int]:
    """Return at most ``most`` of ``total`` rows, spread evenly, the first one among them."""
    if total <= most:
        return list(range(total))
    return [row * total // most for row in range(most)]
