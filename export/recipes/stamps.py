"""The zero-shot test on cut-out photographs: candidates, ranks, figures with intervals, temperature.

The pictures are the Debian package ``tuxpaint-stamps-default`` (fetched, never shipped); the labels are ours,
``benchmarks/data/stamps.jsonl``. Candidates are always all names of the set. Choices are made on the half
``tune``; the half ``report`` is quoted.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import InputError

__all__ = ["Stamp", "candidates", "figures", "fit_scale", "of_half", "ranks", "read_stamps"]

_FOLDER = "usr/share/tuxpaint"
_DRAWS = 10_000


@dataclass(frozen=True)
class Stamp:
    """One picture: file, names, how ImageNet covers the English name (``kind``), half (``split``).

    ``coarse`` is the superclass, where it has one.
    """

    file: str
    en: str
    zh: str
    kind: str
    split: str
    coarse: str | None = None

    def name(self, language: str) -> str:
        """Return the name in ``"en"`` or ``"zh"``."""
        return self.en if language == "en" else self.zh

    def path(self, package: Path) -> Path:
        """Return the picture's path in the unpacked package."""
        return package / _FOLDER / self.file


def read_stamps(path: Path) -> tuple[Stamp, ...]:
    """Return the labelled pictures of ``stamps.jsonl``.

    Raises:
        InputError: the file is missing or a line is malformed.
    """
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return tuple(
            Stamp(row["file"], row["en"], row["zh"], row["kind"], row["split"], row.get("coarse"))
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"stamps: {str(path)!r} cannot be read ({error}).") from error


def of_half(stamps: Sequence[Stamp], half: str, language: str) -> list[Stamp]:
    """Return the pictures of a half that are judged.

    A name that stands for pictures of both halves, as some Chinese ones do, was seen in the half ``tune``:
    its pictures are left out of the half ``report``.
    """
    seen = {stamp.name(language) for stamp in stamps if stamp.split != half} if half == "report" else set()
    return [stamp for stamp in stamps if stamp.split == half and stamp.name(language) not in seen]


def candidates(stamps: Iterable[Stamp], language: str) -> tuple[str, ...]:
    """Return the different names in one language, sorted."""
    return tuple(sorted({stamp.name(language) for stamp in stamps}))


def ranks(
    embeddings: NDArray[np.float32], bank: NDArray[np.float32], names: Sequence[str], truth: Sequence[str]
) -> NDArray[np.int64]:
    """Return the rank of each picture's own name, 1 being the best; ties count against it."""
    similarity = embeddings @ bank.T
    row = {name: index for index, name in enumerate(names)}
    own = similarity[np.arange(len(truth)), [row[name] for name in truth]]
    return np.asarray((similarity >= own[:, None]).sum(axis=1), np.int64)


def figures(
    stamps: Sequence[Stamp], rank: NDArray[np.int64], language: str, *, seed: int = 0
) -> dict[str, Any]:
    """Return top-1 and top-5 by half and kind of name, with 95 % intervals (bootstrap over names).

    Which pictures of a half are judged is told by :func:`of_half`.
    """
    result: dict[str, Any] = {}
    for split in ("tune", "report"):
        judged = set(of_half(stamps, split, language))
        for kind in ("all", "exact", "ancestor", "outside"):
            chosen = [
                index for index, stamp in enumerate(stamps) if stamp in judged and kind in ("all", stamp.kind)
            ]
            names = [stamps[index].name(language) for index in chosen]
            result[f"{split}/{kind}"] = _with_interval(rank[chosen], names, seed=seed)
    return result


def _with_interval(rank: NDArray[np.int64], names: Sequence[str], *, seed: int) -> dict[str, Any]:
    if not names:
        return {"n": 0, "names": 0}
    groups: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        groups[name].append(index)
    sizes = np.array([len(members) for members in groups.values()])
    said: dict[str, Any] = {"n": len(rank), "names": len(groups)}
    draws = np.random.default_rng(seed).integers(0, len(groups), (_DRAWS, len(groups)))
    for top in (1, 5):
        hits = np.array([(rank[members] <= top).sum() for members in groups.values()])
        means = hits[draws].sum(axis=1) / sizes[draws].sum(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        said[f"top{top}"] = round(float((rank <= top).mean()), 4)
        said[f"top{top}_interval"] = [round(float(low), 4), round(float(high), 4)]
    return said


def fit_scale(similarity: NDArray[np.float32], own: NDArray[np.int64]) -> float:
    """Return the multiplier of the cosines, in [1, 100], with the least mean negative log likelihood.

    Args:
        similarity: ``(n, N)`` cosines.
        own: ``(n,)`` columns of the right names.
    """
    best = (np.inf, 1.0)
    for scale in np.exp(np.linspace(0, np.log(100), 400)):
        logits = scale * similarity.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        loss = float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(own)), own]))
        best = min(best, (loss, float(scale)))
    return best[1]
