"""What the default model's text tower learns from, and how: texts with target embeddings, then distillation.

Every *entry* is a text with the embedding it should have (``default_space.py``) and a weight that says how
often it is drawn. Entries are put into prompt templates on the fly; the target does not depend on the
template, so the tower learns to look through it. Chinese comes from MIT-licensed lists only: the 1,000 class
names and the names of emoji.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from edgeclip.errors import InputError
from edgeclip.label_sets import TEMPLATES
from edgeclip.models.text import BagTextTower
from edgeclip.tokenizer import Tokenizer

from .default_space import ClassNames, Concepts, Floats, Space, unit
from .minilm import MiniLM

__all__ = [
    "OWN_TEMPLATES",
    "Entries",
    "SentenceCache",
    "TextRecipe",
    "build_entries",
    "read_emoji_names",
    "train_text_tower",
]

_log = logging.getLogger(__name__)


class SentenceCache:
    """Sentence vectors kept in a directory: the teacher takes ten minutes."""

    def __init__(self, directory: Path, teacher: Callable[[], MiniLM]) -> None:
        self._directory = directory
        self._make_teacher = teacher
        self._teacher: MiniLM | None = None

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return unit vectors ``(n, 384)`` of texts."""
        unique = sorted(set(texts))
        key = hashlib.sha256("\0".join(unique).encode()).hexdigest()[:16]
        path = self._directory / f"minilm-{key}.npy"
        if path.is_file():
            vectors: Floats = np.load(path)
        else:
            self._teacher = self._teacher or self._make_teacher()
            _log.info("running the teacher on %d texts", len(unique))
            vectors = self._teacher.encode(unique)
            self._directory.mkdir(parents=True, exist_ok=True)
            np.save(path, vectors.astype(np.float16))
        row = {text: index for index, text in enumerate(unique)}
        return unit(np.asarray(vectors, np.float32)[[row[text] for text in texts]])


def read_emoji_names(emojibase: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return English name, Chinese name and Chinese tags of every emoji that shows a thing or a being.

    Raises:
        InputError: the unpacked package ``emojibase-data`` is missing or damaged.
    """
    try:
        english = json.loads((emojibase / "en" / "data.json").read_text("utf-8"))
        listed = json.loads((emojibase / "zh" / "data.json").read_text("utf-8"))
        chinese = {entry["hexcode"]: entry for entry in listed}
        things = (3, 4, 5, 6, 7)  # animals and nature, food, travel and places, activities, objects
        return [
            (entry["label"], other["label"], tuple(other.get("tags", ())))
            for entry in english
            if entry.get("group") in things and (other := chinese.get(entry["hexcode"])) is not None
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"emoji names: cannot read {str(emojibase)!r} ({error}); run `edgeclip data fetch default-model`."
        ) from error


@dataclass(frozen=True)
class Entries:
    """Texts to learn from.

    Attributes:
        texts: the texts.
        targets: ``(n, E)`` float16 unit embeddings.
        weights: ``(n,)`` how often each is drawn, relative.
        languages: ``"en"`` or ``"zh"`` each; which templates it goes into.
        templated: whether it goes into templates at all (glosses do not).
    """

    texts: tuple[str, ...]
    targets: NDArray[np.float16]
    weights: Floats
    languages: tuple[str, ...]
    templated: NDArray[np.bool_]


@dataclass(frozen=True)
class _Draft:
    text: str
    q: Floats
    meaning: str  # the text whose sentence vector is the second part
    gloss: Floats  # added to it, may be zeros
    weight: float
    language: str = "en"
    templated: bool = True


def build_entries(
    concepts: Concepts,
    names: ClassNames,
    emoji: Sequence[tuple[str, str, tuple[str, ...]]],
    space: Space,
    cache: SentenceCache,
) -> Entries:
    """Return everything the text tower learns from: names, glosses, class names, emoji names."""
    drafts = [
        *_class_drafts(concepts, names),
        *_wordnet_drafts(concepts),
        *_emoji_drafts(concepts, emoji, cache),
        *_gloss_drafts(concepts),
    ]
    meanings = cache.encode([draft.meaning for draft in drafts])
    glosses = np.stack([draft.gloss for draft in drafts])
    targets = np.empty((len(drafts), space.table.shape[1]), np.float16)
    for start in range(0, len(drafts), 4096):
        part = slice(start, start + 4096)
        q = np.stack([draft.q for draft in drafts[part]])
        targets[part] = space.embed_texts(q, unit(meanings[part] + 0.3 * glosses[part]))
    return Entries(
        tuple(draft.text for draft in drafts),
        targets,
        np.array([draft.weight for draft in drafts], np.float32),
        tuple(draft.language for draft in drafts),
        np.array([draft.templated for draft in drafts]),
    )


def _class_drafts(concepts: Concepts, names: ClassNames) -> Iterable[_Draft]:
    for index, english in enumerate(names.english):
        q = np.zeros(1000, np.float32)
        q[index] = 1
        gloss = concepts.gloss_of_synset(names.offsets[index])
        shared = concepts.of_name(english)  # two classes of one name share it
        yield _Draft(english, q if shared is None else shared, english, gloss, 8.0)
        for other in names.others[index]:
            if other.lower() != english.lower() and concepts.of_name(other) is None:
                yield _Draft(other, q, other, gloss, 3.0)
        yield _Draft(names.chinese[index], q, english, gloss, 10.0, language="zh")


def _wordnet_drafts(concepts: Concepts) -> Iterable[_Draft]:
    wordnet = concepts.wordnet
    seen: set[str] = set()
    for offset in concepts.offsets:
        for lemma in wordnet.synsets[offset].lemmas:
            name = lemma.lower()
            if name in seen:
                continue
            seen.add(name)
            q = concepts.of_name(name)
            meanings = concepts.meanings(name)
            if q is None or not meanings:
                continue
            weight = _name_weight(concepts, name, lemma, [kind for kind, _ in meanings])
            gloss = concepts.gloss_of_name(name)
            yield _Draft(name, q, name, gloss, weight)
            if weight >= 2 and not name.endswith("s"):
                yield _Draft(_plural(name), q, name, gloss, 0.2 * weight)


def _name_weight(concepts: Concepts, name: str, lemma: str, kinds: Sequence[int]) -> float:
    """Weigh a name by how common it is and by whether the picture side can know it."""
    synsets = concepts.wordnet.synsets
    count = sum(
        tagged
        for kind in kinds
        for each, tagged in zip(synsets[kind].lemmas, synsets[kind].counts, strict=True)
        if each.lower() == name
    )
    weight = 1 + math.log1p(count)
    if any(concepts.covers(kind) for kind in kinds):
        weight *= 2
    if " " not in name:
        weight *= 1.5
    if lemma[0].isupper():  # scientific and family names
        weight *= 0.3
    if synsets[kinds[0]].lexical_file in (18, 27, 15):  # persons, substances, places
        weight *= 0.5
    return weight


def _plural(name: str) -> str:
    if name.endswith(("sh", "ch", "x", "z")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2:-1] not in "aeiou" else name + "s"


_MOST_EMOJI_A_TAG = 4  # tags of more emoji are topics, not names


def _emoji_drafts(
    concepts: Concepts, emoji: Sequence[tuple[str, str, tuple[str, ...]]], cache: SentenceCache
) -> Iterable[_Draft]:
    vectors = cache.encode([english for english, _, _ in emoji])
    tagged: dict[str, list[tuple[Floats, str]]] = {}
    for (english, chinese, tags), vector in zip(emoji, vectors, strict=True):
        q = concepts.of_name(english)
        if q is None:
            q = concepts.of_vector(vector)
            yield _Draft(english, q, english, np.zeros_like(vector), 2.0)
        yield _Draft(chinese, q, english, concepts.gloss_of_name(english), 8.0, language="zh")
        for tag in tags:
            tagged.setdefault(tag, []).append((q, english))
    named = {chinese for _, chinese, _ in emoji}
    for tag, found in tagged.items():
        if tag in named or len(found) > _MOST_EMOJI_A_TAG:
            continue
        for q, english in found:
            gloss = concepts.gloss_of_name(english)
            yield _Draft(tag, q, english, gloss, 3.0 / len(found), language="zh")


def _gloss_drafts(concepts: Concepts) -> Iterable[_Draft]:
    synsets = concepts.wordnet.synsets
    for offset, text in zip(concepts.offsets, concepts.gloss_texts(), strict=True):
        covered = concepts.covers(offset)
        gloss = concepts.gloss_of_synset(offset)
        q = concepts.of_synset(offset)
        yield _Draft(synsets[offset].gloss, q, text, gloss, 0.5 if covered else 0.1, templated=False)


# Training
# ------------------------------------------------------------------------------------------------------------

_ADJECTIVES = (
    "a", "the", "my", "big", "small", "large", "little", "old", "new", "young", "red", "green", "blue",
    "white", "black", "brown", "yellow", "grey", "orange", "pink", "wild", "wooden", "metal", "plastic",
    "cute", "beautiful", "single", "two", "three", "some", "many", "fresh", "dirty", "clean", "shiny",
    "long", "short", "striped", "colorful", "real", "common", "typical", "modern", "antique", "broken",
    "empty", "baby", "adult", "photo of",
)  # fmt: skip
OWN_TEMPLATES = {
    "en": (
        "a photo of a {}.",
        "a picture of a {}.",
        "an image of a {}.",
        "a {} on a white background.",
        "this is a {}.",
        "there is a {} in the picture.",
        "a cut-out photo of a {}.",
        "close-up of {}",
    ),
    "zh": ("一张{}的图片。", "白色背景上的{}。", "这是{}。", "图中有一个{}。"),
}


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """How the text tower is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: texts a step.
        learning_rate: peak; linear warm-up over 2 %, then a cosine to 2 % of it.
        weight_decay: decoupled, on everything but norms and biases.
        bare_share: share of texts without a template.
        drop_share: share of names of three pieces or more that lose one, so that no piece carries a name
            alone.
        adjective_share: share of names with a word before them that does not change their meaning.
        match_weight: weight of the term that compares similarities to picture vectors.
        match_scale: multiplier of the cosines in it.
        match_pictures: picture vectors in it, drawn anew each step.
        bfloat16: matrix products in bfloat16 (twice as fast where the processor has it).
        seed: of initialization and of the order of texts.
    """

    steps: int = 2500
    batch_size: int = 1024
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    bare_share: float = 0.4
    drop_share: float = 0.2
    adjective_share: float = 0.1
    match_weight: float = 0.1
    match_scale: float = 20.0
    match_pictures: int = 256
    bfloat16: bool = True
    seed: int = 0


class _Sampler:
    """Draws batches of token rows and targets; templates are put around the ids of a text."""

    def __init__(
        self, entries: Entries, tokenizer: Tokenizer, recipe: TextRecipe, cn_templates: Sequence[str]
    ) -> None:
        self._recipe = recipe
        self._pad = tokenizer.config.special.pad
        self._length = tokenizer.context_length
        self._ids = [tokenizer.encode(text)[: self._length] for text in entries.texts]
        english = [*TEMPLATES["openai-80"], *OWN_TEMPLATES["en"] * 6]
        chinese = [*TEMPLATES["zh"] * 4, *OWN_TEMPLATES["zh"] * 4, *cn_templates]
        self._frames = {
            language: [
                tuple(tokenizer.encode(half) for half in template.split("{}")) for template in templates
            ]
            for language, templates in (("en", english), ("zh", chinese))
        }
        self._adjectives = [tokenizer.encode(word) for word in _ADJECTIVES]
        self._entries = entries
        cumulative = np.cumsum(entries.weights.astype(np.float64))
        self._cumulative = cumulative / cumulative[-1]
        self._random = np.random.default_rng(recipe.seed)

    def __call__(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return one batch as a few parts of similar length: ``(tokens, targets)`` each."""
        recipe, random = self._recipe, self._random
        rows = np.searchsorted(self._cumulative, random.random(recipe.batch_size))
        chance = random.random((recipe.batch_size, 3))
        pick = random.integers(0, 1 << 30, (recipe.batch_size, 3))
        drawn = []
        for index, row in enumerate(rows.tolist()):
            ids = self._ids[row]
            language = self._entries.languages[row]
            if self._entries.templated[row]:
                if len(ids) >= 3 and chance[index, 2] < recipe.drop_share:
                    lost = pick[index, 2] % len(ids)
                    ids = ids[:lost] + ids[lost + 1 :]
                if chance[index, 1] < recipe.adjective_share and language == "en":
                    ids = self._adjectives[pick[index, 1] % len(self._adjectives)] + ids
                if chance[index, 0] > recipe.bare_share:
                    frames = self._frames[language]
                    before, after = frames[pick[index, 0] % len(frames)]
                    ids = before + ids + after
            drawn.append((ids[: self._length], row))
        drawn.sort(key=lambda pair: len(pair[0]))
        parts = []
        for part in np.array_split(np.arange(len(drawn)), 2):
            chosen = [drawn[index] for index in part]
            tokens = np.full((len(chosen), max(2, len(chosen[-1][0]))), self._pad, np.int64)
            for index, (ids, _) in enumerate(chosen):
                tokens[index, : len(ids)] = ids
            targets = self._entries.targets[[row for _, row in chosen]].astype(np.float32)
            parts.append((torch.from_numpy(tokens), torch.from_numpy(targets)))
        return parts


def train_text_tower(
    tower: BagTextTower,
    entries: Entries,
    tokenizer: Tokenizer,
    recipe: TextRecipe,
    *,
    pictures: Floats,
    chinese_templates: Sequence[str] = (),
    on_eval: Callable[[int], None] | None = None,
    eval_every: int = 1000,
) -> None:
    """Train ``tower`` in place: cosine to targets, equal similarities to ``pictures`` (n, E)."""
    sampler = _Sampler(entries, tokenizer, recipe, chinese_templates)
    decayed = [p for p in tower.parameters() if p.ndim > 1]
    plain = [p for p in tower.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    warm_up = max(1, recipe.steps // 50)

    def schedule(step: int) -> float:
        progress = step / recipe.steps
        return min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    against = torch.from_numpy(pictures)
    generator = torch.Generator().manual_seed(recipe.seed)
    tower.train()
    started = time.perf_counter()
    running = [0.0, 0.0]
    for step in range(1, recipe.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        seen = against[torch.randint(len(against), (recipe.match_pictures,), generator=generator)]
        for tokens, target in sampler():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
                embedding = tower(tokens)
            embedding = F.normalize(embedding.float(), dim=-1)
            distance = 1 - (embedding * target).sum(-1).mean()
            scale = recipe.match_scale
            match = F.kl_div(
                F.log_softmax(scale * embedding @ seen.T, dim=-1),
                F.log_softmax(scale * target @ seen.T, dim=-1),
                reduction="batchmean",
                log_target=True,
            )
            share = len(tokens) / recipe.batch_size
            loss = share * (distance + recipe.match_weight * match)
            torch.autograd.backward(loss)
            running[0] += share * distance.item()
            running[1] += share * match.item()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            _log.info(
                "step %d: cosine distance %.4f, match %.4f, %.0f texts/s",
                step,
                running[0] / 100,
                running[1] / 100,
                step * recipe.batch_size / (time.perf_counter() - started),
            )
            running = [0.0, 0.0]
        if on_eval is not None and step % eval_every == 0:
            tower.eval()
            on_eval(step)
            tower.train()
    tower.eval()
