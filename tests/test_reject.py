"""Gates: scores against a direct formula, what means the same, damaged heads, real pictures."""

from __future__ import annotations

import csv
import gc
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip import reject
from edgeclip.answers import Answers
from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import BundleError, ConfigError
from edgeclip.label_sets import Label, LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.reject import (
    Gate,
    NegativesGate,
    NoGate,
    RejectHead,
    meaning,
    open_gate,
    read_background,
    read_reject_head,
)
from edgeclip.tensors import read_tensors, write_tensors


def unit(rows: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def bank_of(
    labels: Sequence[str | Label], rows: NDArray[np.float32] | None = None, dim: int = 48
) -> LabelBank:
    if rows is None:
        rows = unit(np.random.default_rng(len(labels)).normal(size=(len(labels), dim)))
    return LabelBank(LabelSet.of(list(labels)), rows, Templates.of("one"))


@pytest.fixture(scope="module")
def default() -> Bundle:
    return Bundle.open("default")


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return ZeroShotClassifier.open("default", answers=Answers(reject=True))


@pytest.fixture(scope="module")
def photos(repo: Path) -> Path:
    return repo / "edgeclip/assets/photos"


@pytest.fixture(scope="module")
def shown(photos: Path) -> list[tuple[Path, str]]:
    with (photos / "labels.csv").open(encoding="utf-8") as file:
        return [(photos / row["image"], row["label"]) for row in csv.DictReader(file)]


def with_head(bundle: Path, content: bytes, *, background: str | None = "colours") -> Bundle:
    with BundleWriter(bundle) as writer:
        heads = writer.manifest.setdefault("heads", {})
        heads["reject"] = {"kind": "reject", "file": writer.add("heads/reject.safetensors", content)}
        writer.manifest["background_bank"] = background
        return writer.commit()


# --- scores ------------------------------------------------------------------------------------------------


def test_negatives_are_the_weighted_log_odds_of_the_best_label() -> None:
    random = np.random.default_rng(0)
    own, others = (random.uniform(-1, 1, (4, n)).astype(np.float32) for n in (3, 50))
    gate = NegativesGate(np.zeros((50, 8), np.float32), 0.0, 0.0, scale=20.0, weight=0.7)
    expected = [
        20 * max(map(float, row)) - 0.7 * math.log(sum(math.exp(20 * float(each)) for each in rest))
        for row, rest in zip(own, others, strict=True)
    ]
    assert gate.scores(own, others) == pytest.approx(expected, abs=1e-5)
    assert gate.alone(own, others).max(axis=1) == pytest.approx(expected, abs=1e-5)
    assert gate.alone(own, others).shape == (4, 3)


def test_labels_together_stand_against_what_is_near_to_the_first() -> None:
    """Against the formula written out: with nearness, without it, and with kinds."""
    random = np.random.default_rng(1)
    rows, texts = unit(random.normal(size=(30, 8))), unit(random.normal(size=(3, 8)))
    own, others = (random.uniform(-1, 1, (4, n)).astype(np.float32) for n in (3, 30))
    for nearness in (0.0, 0.45):
        gate = NegativesGate(rows, 0.0, 0.0, 20.0, 0.3, texts=texts, nearness=nearness)
        expected = []
        for row, rest in zip(own.astype(np.float64), others.astype(np.float64), strict=True):
            near = rows.astype(np.float64) @ texts[row.argmax()]
            background = sum(math.exp(20 * (d + nearness * t)) for d, t in zip(rest, near, strict=True))
            expected.append(math.log(sum(math.exp(20 * c) for c in row)) - 0.3 * math.log(background))
        assert gate.scores(own, others) == pytest.approx(expected, abs=1e-4)
    kinds = ((1, np.array([0, 1])),)
    lifted = own.copy()
    lifted[:, 1] = np.maximum(own[:, 1], others[:, :2].max(axis=1))
    gate = NegativesGate(rows, 0.0, 0.0, 20.0, 0.3, kinds=kinds, texts=texts, nearness=0.45)
    bare = NegativesGate(rows[2:], 0.0, 0.0, 20.0, 0.3, texts=texts, nearness=0.45)
    assert gate.scores(own, others) == pytest.approx(bare.scores(lifted, others[:, 2:]), abs=1e-9)


def test_one_label_together_is_that_label_alone() -> None:
    random = np.random.default_rng(2)
    own, others = (random.uniform(-1, 1, (4, n)).astype(np.float32) for n in (1, 30))
    gate = NegativesGate(
        unit(random.normal(size=(30, 8))), 0.0, 0.0, 20.0, 0.3, texts=unit(random.normal(size=(1, 8)))
    )
    assert gate.scores(own, others) == pytest.approx(gate.alone(own, others)[:, 0], abs=1e-6)


def test_with_weight_one_two_labels_are_told_apart_by_their_odds() -> None:
    gate = NegativesGate(np.zeros((1, 8), np.float32), 0.0, 0.0, scale=10.0, weight=1.0)
    score = gate.scores(np.array([[0.3]], np.float32), np.array([[0.1]], np.float32))[0]
    assert 1 / (1 + math.exp(-score)) == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(1)))


def test_no_is_the_log_odds_of_the_first_label_against_its_denial() -> None:
    gate = NoGate(np.zeros((2, 8), np.float32), 0.0, 0.0, scale=10.0)
    own = np.array([[0.3, 0.5]], np.float32)
    others = np.array([[0.1, 0.6]], np.float32)
    assert gate.scores(own, others)[0] == pytest.approx(10 * (0.5 - 0.6), abs=1e-6)
    assert gate.alone(own, others)[0] == pytest.approx([2.0, -1.0], abs=1e-6)


@pytest.mark.parametrize("extreme", [-1.0, 1.0])
def test_scores_are_finite_at_the_ends(extreme: float) -> None:
    rows = np.zeros((1000, 8), np.float32)
    texts = np.eye(1000, 8, dtype=np.float32)
    gates: list[Gate] = [
        NegativesGate(rows, 0.0, 0.0, 100.0, 1.0),
        NegativesGate(texts, 0.0, 0.0, 100.0, 1.0, texts=texts, nearness=5.0),
        NoGate(rows, 0.0, 0.0, 100.0),
    ]
    own = np.full((2, 1000), -extreme, np.float32)
    for gate in gates:
        assert np.isfinite(gate.scores(own, np.full((2, 1000), extreme, np.float32))).all()


def test_thresholds_between_those_known_lie_along_the_logarithm() -> None:
    head = RejectHead(threshold=(-4.0, -1.0, 2.0), offered=(1, 5, 20))
    assert [head.least(labels) for labels in (1, 5, 20, 5000)] == pytest.approx([-4.0, -1.0, 2.0, 2.0])
    assert head.least(10) == pytest.approx(-1 + 3 * math.log(2) / math.log(4))
    assert head.near(20) == 0
    several = replace(head, together=(-4.0, -2.0, 0.0), nearness=0.1)
    assert [several.least(labels) for labels in (1, 5, 20)] == [-4.0, -2.0, 0.0]
    assert [several.least(labels, alone=True) for labels in (1, 5, 20)] == [-4.0, -1.0, 2.0]
    assert [several.near(labels) for labels in (1, 5, 20, 5000)] == pytest.approx(
        [0, 0.1 * math.log(5), 0.1 * math.log(20), 0.1 * math.log(20)]
    )


# --- what means the same -----------------------------------------------------------------------------------


def test_names_synonyms_and_names_in_other_languages_mean_the_same() -> None:
    background = bank_of(
        [
            Label("Teapot", aliases=(("zh", Label("茶壶")),)),
            Label("sofa", synonyms=("couch",)),
            "dog",
            "ｃａｔ",  # full width: another Unicode form of "cat"
        ]
    )

    def rows_of(*labels: str | Label) -> list[int]:
        same = meaning(bank_of(labels), background, overlap=1.1)
        assert same.shape == (len(labels), 4)
        return np.flatnonzero(same.any(axis=0)).tolist()

    assert rows_of("teapot") == rows_of("TEAPOT") == rows_of("茶壶") == [0]
    assert rows_of("couch") == rows_of(Label("settee", synonyms=("Sofa",))) == [1]
    assert rows_of(Label("chien", aliases=(("en", Label("dog")),))) == [2]
    assert rows_of("cat", "teapot") == [0, 3]
    assert rows_of("teapots", "couches", "Dogs") == [0, 1, 2]
    assert rows_of("tea") == []


def test_texts_that_are_nearer_than_the_overlap_mean_the_same() -> None:
    rows = unit(np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0]]))
    background, label = bank_of(["a", "b", "c"], rows), bank_of(["x"], rows[:1])
    assert meaning(label, background, 0.79).tolist() == [[True, True, False]]
    assert meaning(label, background, 0.81).tolist() == [[True, False, False]]


def test_rows_that_mean_a_label_are_left_out(default: Bundle, classifier: ZeroShotClassifier) -> None:
    background = read_background(default)
    left: dict[str, set[str]] = {}
    for name in ("teapot", "茶壶", "zeppelin hangar"):
        classifier.set_labels([name])
        gate = open_gate(default, classifier.bank, scale=1.0)
        kept = {row.tobytes() for row in gate.rows}
        left[name] = {
            label for label, row in zip(background.names, background.embeddings, strict=True)
            if row.tobytes() not in kept
        }  # fmt: skip
    assert "teapot" in left["teapot"]
    assert "teapot" in left["茶壶"]
    assert "teapot" not in left["zeppelin hangar"]
    assert all(len(names) < 20 for names in left.values())


# --- heads -------------------------------------------------------------------------------------------------


def test_a_head_comes_back_from_its_file() -> None:
    labels = LabelSet.of([Label("red panda", aliases=(("zh", Label("小熊猫")),)), "kite", "map"])
    rows = unit(np.random.default_rng(1).normal(size=(3, 47)))  # an odd number: half a byte is left
    head = RejectHead(
        "negatives",
        20.0,
        (-3.5, 1.25),
        (1, 20),
        0.75,
        0.5,
        bank_rows=np.array([4, 0, 2]),
        more=(labels, rows),
        together=(-3.5, 0.25),
        nearness=0.125,
    )
    content = head.to_bytes({"false_accepts": "0.05"})
    assert content == head.to_bytes({"false_accepts": "0.05"})
    back = RejectHead.from_bytes(content, embed_dim=47)
    assert (back.method, back.scale, back.threshold, back.offered, back.weight, back.overlap) == (
        "negatives", 20.0, (-3.5, 1.25), (1, 20), 0.75, 0.5,
    )  # fmt: skip
    assert (back.together, back.nearness) == ((-3.5, 0.25), 0.125)
    assert back.bank_rows is not None
    assert back.bank_rows.tolist() == [4, 0, 2]
    assert back.more is not None
    assert back.more[0] == labels
    # Half a step of four bits is a fourteenth of the largest number of a row.
    steps = np.abs(rows).max(axis=1, keepdims=True) / 14
    assert (np.abs(back.more[1] - rows) <= 1.1 * steps).all()
    assert np.linalg.norm(back.more[1], axis=1) == pytest.approx(1, abs=1e-6)
    assert (back.more[1] * rows).sum(axis=1) == pytest.approx(1, abs=0.02)
    no = RejectHead("no", 20.0, templates=("a photo without {}.", "no {}."))
    assert RejectHead.from_bytes(no.to_bytes(), embed_dim=47).templates == no.templates


def test_the_background_is_the_rows_used_and_those_of_the_head() -> None:
    bank = bank_of(["a", "b", "c", "d"])
    more = LabelSet.of(["e"]), unit(np.ones((1, 48)))
    head = RejectHead(bank_rows=np.array([3, 1]), more=more)
    joined = head.background(bank)
    assert joined.names == ("d", "b", "e")
    assert (joined.embeddings[:2] == bank.embeddings[[3, 1]]).all()
    assert RejectHead().background(bank) is bank
    for wrong in (RejectHead(bank_rows=np.array([4])), RejectHead(bank_rows=np.array([-1]))):
        with pytest.raises(BundleError, match="has 4 rows, but the `reject` head names others"):
            wrong.background(bank)
    with pytest.raises(BundleError, match="label 'a' is repeated"):
        RejectHead(more=(LabelSet.of(["a"]), more[1])).background(bank)


def damaged(**change: Any) -> bytes:
    """Return a sound head with some tensors or metadata replaced; ``None`` takes one out."""
    rows = unit(np.ones((1, 48)))
    content = RejectHead(
        "negatives", 20.0, (0.0, 1.0), (1, 5), 0.7, 0.6, more=(LabelSet.of(["x"]), rows),
        together=(0.0, 0.5), nearness=0.1,
    ).to_bytes()  # fmt: skip
    tensors, metadata = read_tensors(content)
    everything: Mapping[str, Any] = {**tensors, **metadata, **change}
    return write_tensors(
        {key: value for key, value in everything.items() if isinstance(value, np.ndarray)},
        {key: value for key, value in everything.items() if isinstance(value, str)},
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "votes"}, "rejects by method 'votes', expected one of 'negatives', 'no'"),
        ({"method": None}, "rejects by method ''"),
        ({"threshold": None}, "expected a finite float tensor 'threshold' of 2"),
        ({"threshold": np.array([np.nan, 0], np.float32)}, "expected a finite float tensor 'threshold' of 2"),
        ({"offered": None}, "'offered' is None, expected rising numbers from 1"),
        ({"offered": np.array([5, 1])}, r"'offered' is \[5 1\], expected rising numbers from 1"),
        ({"offered": np.array([0, 1])}, r"'offered' is \[0 1\], expected rising numbers from 1"),
        ({"offered": np.array([1, 2, 5])}, "expected a finite float tensor 'threshold' of 3"),
        ({"weight": np.array([1, 2], np.float32)}, "expected a finite float tensor 'weight' of 1"),
        ({"overlap": np.array(1, np.int32)}, "expected a finite float tensor 'overlap' of 1"),
        ({"scale": np.array(0, np.float32)}, "scale is 0, expected above 0 and at most 100"),
        ({"scale": np.array(101, np.float32)}, "scale is 101, expected above 0"),
        ({"bank_rows": np.zeros(2, np.float32)}, "'bank_rows' is float32"),
        ({"more": np.zeros((1, 23), np.uint8)}, r"'more' is uint8 \(1, 23\).*expected uint8 \(1, 24\)"),
        ({"more": np.full((1, 24), 0x88, np.uint8)}, "has a row without direction"),
        ({"more_scales": np.array([np.nan], np.float32)}, "has a row without direction"),
        ({"more": None}, r"'more' is float64 \(0,\) with scales \(1,\), expected uint8"),
        ({"more_scales": None}, r"'more' is uint8 \(1, 24\) with scales \(0,\), expected uint8"),
        ({"together": np.zeros(3, np.float32)}, "expected a finite float tensor 'together' of 2"),
        ({"nearness": None}, "expected a finite float tensor 'nearness' of 1"),
        ({"nearness": np.array(-0.1, np.float32)}, "nearness is -0.1 for up to 5 labels, expected 0 to 3.1"),
        ({"nearness": np.array(4, np.float32)}, "nearness is 4 for up to 5 labels, expected 0 to 3.1"),
        ({"labels": "["}, "line 1: not JSON"),
        ({"labels": None}, "line 1: not JSON"),
        ({"method": "no", "templates": "[]"}, "got an empty list"),
        ({"method": "no", "templates": '["no"]'}, "expected exactly one {}"),
        ({"method": "no"}, "got an empty list"),
    ],
)
def test_a_damaged_head_is_told(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=f"reject head: .*{said}"):
        RejectHead.from_bytes(damaged(**change), embed_dim=48)
    assert RejectHead.from_bytes(damaged(), embed_dim=48).weight == pytest.approx(0.7)


# --- bundles -----------------------------------------------------------------------------------------------


def test_a_bundle_without_head_or_background_says_what_to_do(tiny_bundle: Path) -> None:
    labels = bank_of(["red"], dim=Bundle.open(tiny_bundle).manifest.model.embed_dim)
    with pytest.raises(ConfigError, match=r"has no head of kind 'reject'.*edgeclip heads reject BUNDLE"):
        open_gate(Bundle.open(tiny_bundle), labels, scale=20.0)
    bundle = with_head(tiny_bundle, RejectHead(scale=20.0).to_bytes(), background=None)
    with pytest.raises(ConfigError, match="has no background bank, so it cannot tell that no label fits"):
        open_gate(bundle, labels, scale=20.0)
    with pytest.raises(ConfigError, match="has no background bank"):
        read_background(bundle)


def test_a_head_of_a_label_bank_is_no_gate(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        file = writer.add("heads/reject.safetensors", RejectHead().to_bytes())
        writer.manifest.setdefault("heads", {})["several"] = {
            "kind": "reject",
            "file": file,
            "bank": "colours",
        }
        bundle = writer.commit()
    with pytest.raises(ConfigError, match="has no head of kind 'reject'"):
        read_reject_head(bundle)


def test_thresholds_and_scale_are_the_heads_unless_given(tiny_bundle: Path) -> None:
    bundle = with_head(tiny_bundle, RejectHead(threshold=(-2.0, 1.0), offered=(1, 2), weight=0.5).to_bytes())
    background = read_background(bundle)
    assert len(background) == 8
    labels = bank_of(["x", "y"], dim=background.embeddings.shape[1])
    gate = open_gate(bundle, labels, scale=17.0)
    assert isinstance(gate, NegativesGate)
    assert (gate.scale, gate.weight, gate.method) == (17.0, 0.5, "negatives")
    assert (gate.threshold, gate.threshold_alone) == (1.0, -2.0)
    given = open_gate(bundle, labels, scale=17.0, threshold=3.0, background=background)
    assert (given.threshold, given.threshold_alone) == (3.0, 3.0)
    assert (given.rows == gate.rows).all()
    with pytest.raises(ConfigError, match="rejection threshold: got nan, expected a finite number"):
        open_gate(bundle, labels, scale=17.0, threshold=math.nan)
    with pytest.raises(ConfigError, match="the 8 labels offered cover all 8 names of its background"):
        open_gate(bundle, background, scale=17.0)


def test_files_are_read_once_and_forgotten_with_the_bundle(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_head(tiny_bundle, RejectHead(scale=20.0).to_bytes())
    read: list[str] = []
    reading = Bundle.read
    monkeypatch.setattr(Bundle, "read", lambda self, name: (read.append(name), reading(self, name))[1])
    labels = bank_of(["x"], dim=bundle.manifest.model.embed_dim)
    for _ in range(3):
        open_gate(bundle, labels, scale=20.0)
    assert len(read) == len(set(read)) == 2
    kept = len(reject._KEPT)
    del bundle
    gc.collect()
    assert len(reject._KEPT) == kept - 1


def test_heads_from_before_judge_by_the_best_label(tiny_bundle: Path) -> None:
    head = RejectHead(scale=20.0, threshold=(-2.0, 1.0), offered=(1, 2), weight=0.5)
    bundle = with_head(tiny_bundle, head.to_bytes())
    labels = bank_of(["x", "y"], dim=bundle.manifest.model.embed_dim)
    gate = open_gate(bundle, labels, scale=20.0)
    random = np.random.default_rng(3)
    own, others = (random.uniform(-1, 1, (4, n)).astype(np.float32) for n in (2, len(gate.rows)))
    assert gate.scores(own, others) == pytest.approx(gate.alone(own, others).max(axis=1), abs=1e-6)
    assert gate.threshold == 1.0


def test_a_label_with_kinds_asks_no_more_of_the_others(tiny_bundle: Path) -> None:
    """The threshold of a label by itself is that of its own kinds, whoever else is offered."""
    head = RejectHead(
        scale=20.0, threshold=(-2.0, 3.0), offered=(1, 2), kinds={"many": (0, 1, 2, 3)}, overlap=1.1
    )
    bundle = with_head(tiny_bundle, head.to_bytes())
    labels = bank_of(["many", "few"], dim=bundle.manifest.model.embed_dim)
    gate = open_gate(bundle, labels, scale=20.0)
    assert isinstance(gate, NegativesGate)
    random = np.random.default_rng(3)
    own, others = (random.uniform(-1, 1, (4, n)).astype(np.float32) for n in (2, len(gate.rows)))
    bare = replace(gate, handicaps=0.0).alone(own, others)
    asked = [head.least(1 + reject.KIND_COUNTS * 4), head.least(1)]
    assert asked[1] < asked[0] == gate.threshold_alone
    assert gate.alone(own, others) - gate.threshold_alone == pytest.approx(bare - asked, abs=1e-9)
    given = open_gate(bundle, labels, scale=20.0, threshold=0.5)
    assert given.alone(own, others) == pytest.approx(bare, abs=1e-9)


def test_the_names_of_a_background_are_read_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_head(tiny_bundle, RejectHead(scale=20.0).to_bytes())
    labels = bank_of(["x"], dim=bundle.manifest.model.embed_dim)
    read: list[str] = []
    phrases = reject._phrases
    monkeypatch.setattr(reject, "_phrases", lambda label: (read.append(label.name), phrases(label))[1])
    for _ in range(3):
        open_gate(bundle, labels, scale=20.0)
    assert len([name for name in read if name != "x"]) == len(read_background(bundle))
    kept = len(reject._BY_PHRASE)
    del bundle
    gc.collect()
    assert len(reject._BY_PHRASE) == kept - 1


def test_many_threads_read_the_names_of_one_background() -> None:
    background = bank_of([f"name {row}" for row in range(2000)])
    labels = bank_of([f"NAME {row}" for row in range(5)])
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: meaning(labels, background, 1.1), range(64)))
    assert all((np.argwhere(same) == [[row, row] for row in range(5)]).all() for same in found)


def test_a_bank_of_names_is_no_bank_of_denials(tiny_bundle: Path) -> None:
    """A background of general names holds the labels themselves; only their denials stand against them."""
    head = RejectHead("no", 20.0, templates=("a photo without {}.",))
    bundle = with_head(tiny_bundle, head.to_bytes())
    background = read_background(bundle)
    labels = bank_of(background.names[:2], dim=background.embeddings.shape[1])
    with pytest.raises(ConfigError, match="judges labels against their denials"):
        open_gate(bundle, labels, scale=9.0, background=background)


def test_denials_are_encoded_or_found_in_a_bank(tiny_bundle: Path) -> None:
    head = RejectHead("no", 20.0, (0.5, 0.75), (1, 2), templates=("a photo without {}.", "no {} here"))
    bundle = with_head(tiny_bundle, head.to_bytes(), background=None)
    dim = bundle.manifest.model.embed_dim
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        asked.extend(texts)
        return unit(np.arange(1, len(texts) * dim + 1, dtype=np.float64).reshape(len(texts), dim))

    labels = bank_of(["red", "sky"], dim=dim)
    gate = open_gate(bundle, labels, scale=9.0, encode=encode)
    assert isinstance(gate, NoGate)
    assert asked == ["a photo without red.", "no red here", "a photo without sky.", "no sky here"]
    expected = unit(encode(asked[:4]).reshape(2, 2, dim).mean(axis=1))
    assert gate.rows == pytest.approx(expected, abs=1e-6)
    assert (gate.scale, gate.threshold_alone) == (20.0, 0.5)
    assert gate.threshold == 0.75
    stored = replace(bank_of(["sky", "sea", "red"], dim=dim), templates=Templates.of(head.templates))
    carried = open_gate(bundle, labels, scale=9.0, background=stored)
    assert (carried.rows == stored.embeddings[[2, 0]]).all()
    with pytest.raises(ConfigError, match="judges labels against their denials, and nothing here can encode"):
        open_gate(bundle, labels, scale=9.0)


# --- the default bundle on photographs ---------------------------------------------------------------------


def test_no_photograph_shows_a_teapot(classifier: ZeroShotClassifier, shown: list[tuple[Path, str]]) -> None:
    for label in ("teapot", "茶壶"):
        classifier.set_labels([label])
        rejected = [not classifier.classify(path) for path, _ in shown]
        assert np.mean(rejected) >= 0.9


def test_the_right_name_alone_is_accepted(
    classifier: ZeroShotClassifier, shown: list[tuple[Path, str]]
) -> None:
    accepted = []
    for path, label in shown:
        classifier.set_labels([label])
        found = classifier.classify(path)
        assert [each.label for each in found] in ([], [label])
        accepted.append(bool(found))
    assert np.mean(accepted) >= 0.8


def test_the_default_background_is_general_names_in_both_languages(default: Bundle) -> None:
    background, head = read_background(default), read_reject_head(default)
    assert 500 < len(background) < 1000
    assert {"teapot", "umbrella", "castle"} <= set(background.names)
    assert all(dict(label.aliases)["zh"] for label in background.labels.labels)
    assert head.method == "negatives"
    assert head.offered == (1, 2, 5, 10, 20, 50, 100)
    assert list(head.threshold) == sorted(head.threshold)
    assert list(head.together) == sorted(head.together)
    assert head.together[0] == pytest.approx(head.threshold[0], abs=1e-4)  # one label is one label
    assert head.nearness > 0
    entry = default.manifest.heads["reject"]
    _, metadata = read_tensors(default.read(entry.file))
    assert metadata["false_accepts"] == "0.05"


def test_committed_figures_are_of_the_head_that_ships(default: Bundle, repo: Path) -> None:
    result = json.loads((repo / "benchmarks/results/rejection.json").read_text("utf-8"))
    head, measured = read_reject_head(default), result["head"]
    assert (measured["scale"], measured["weight"], measured["overlap"]) == (
        head.scale,
        head.weight,
        head.overlap,
    )
    for key in ("threshold", "together", "offered"):
        assert measured[key] == list(getattr(head, key))
    assert measured["nearness"] == head.nearness
    goals = result["goals"]["least"]
    for shown in ("stamps report en", "stamps report zh", "twitter en", "twitter zh"):
        for offered in ("of 5", "of 20"):
            gate = result["sets"][shown][offered]["gate"]
            assert gate["auroc"]["value"] >= goals[f"gate {offered}"]
            assert gate["gain"]["value"] >= goals[f"gain {offered}"]
    photographs = result["demo photographs"]
    assert photographs["teapot"]["rejected"] >= 0.9 * photographs["teapot"]["pictures"]
    assert photographs["right name"]["rejected"] <= 0.2 * photographs["right name"]["pictures"]


# -- kinds -------------------------------------------------------------------------------------------------


def test_kinds_stand_on_the_side_of_their_label() -> None:
    """Against the formula written out: kinds lift their label and leave the background."""
    rng = np.random.default_rng(5)
    own = rng.uniform(-0.2, 0.5, (6, 3)).astype(np.float32)
    others = rng.uniform(-0.2, 0.9, (6, 8)).astype(np.float32)
    kinds = ((0, np.array([0, 2])), (2, np.array([1, 2])))
    gate = NegativesGate(np.zeros((8, 4), np.float32), 0.0, 0.0, 20.0, 0.4, kinds=kinds)
    lifted = own.astype(np.float64)
    lifted[:, 0] = np.maximum(own[:, 0], np.maximum(others[:, 0], others[:, 2]))
    lifted[:, 2] = np.maximum(own[:, 2], np.maximum(others[:, 1], others[:, 2]))
    expected = 20 * lifted - 0.4 * np.log(np.exp(20.0 * others[:, 3:]).sum(axis=1, keepdims=True))
    before = own.copy()
    np.testing.assert_allclose(gate.alone(own, others), expected, rtol=1e-5)
    np.testing.assert_allclose(gate.scores(own, others), expected.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(own, before)


def test_kinds_survive_the_file_and_damaged_ones_are_named() -> None:
    head = RejectHead(kinds={"dog": (0, 3), "狗": (0, 3)})
    content = head.to_bytes()
    assert RejectHead.from_bytes(content, embed_dim=4).kinds == head.kinds
    tensors, metadata = read_tensors(content, where="head")
    for damaged in (b"no zlib", zlib.compress(b"[1]"), zlib.compress(b'{"dog": [-1]}')):
        tensors["kinds"] = np.frombuffer(damaged, np.uint8)
        with pytest.raises(BundleError, match="its kinds are damaged"):
            RejectHead.from_bytes(write_tensors(tensors, metadata), embed_dim=4)


@pytest.mark.parametrize(
    ("label", "other"), [("dog", "bird"), ("a dog", "the bird"), ("dogs", "birds"), ("狗", "鸟")]
)
def test_a_german_shepherd_is_a_dog_and_no_bird(label: str, other: str, photos: Path) -> None:
    picture = photos / "dog.jpg"
    with ZeroShotClassifier.open(answers=Answers(reject=True)) as classifier:
        classifier.set_labels([label])
        assert [each.label for each in classifier.classify(picture)] == [label]
        classifier.set_labels([other])
        assert classifier.classify(picture) == []


def test_every_kind_is_a_row_and_more_kinds_ask_for_more() -> None:
    bundle = Bundle.open("default")
    head, background = read_reject_head(bundle), read_background(bundle)
    assert {"dog", "bird", "vehicle", "fruit", "狗", "鸟"} <= set(head.kinds)
    assert max(row for rows in head.kinds.values() for row in rows) < len(background)
    names = {background.names[row] for row in head.kinds["dog"]}
    assert "German Shepherd Dog" in names
    with ZeroShotClassifier.open(answers=Answers(reject=True)) as classifier:
        least = []
        for label in ("teapot", "dog", "animal"):
            classifier.set_labels([label])
            gate = classifier._labels_in_force().gate
            assert gate is not None
            least.append(gate.threshold)
    assert least[0] < least[1] < least[2]


def test_a_kind_that_is_offered_too_still_lifts(photos: Path) -> None:
    with ZeroShotClassifier.open(answers=Answers(multi=True)) as classifier:
        classifier.set_labels(["dog", "German Shepherd Dog", "cat"])
        said = {each.label for each in classifier.classify(photos / "dog.jpg")}
    assert said == {"dog", "German Shepherd Dog"}
