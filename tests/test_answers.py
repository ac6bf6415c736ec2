"""Answers: what is asked, what is in force, and what comes of it with real bundles."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip import text_encoder
from edgeclip.answers import MAX_CONTEXTS, Answers, InForce, Rejection, crossed, in_context, of_bank
from edgeclip.bundle_labels import BundleLabels
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import BackendError, ConfigError, InputError
from edgeclip.few_shot import FewShotHead
from edgeclip.few_shot_fit import fit_head
from edgeclip.heads import ContextHead, LinearHead, TemperatureHead, cosines
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.runtime.session import RuntimeOptions

ONE_THREAD = RuntimeOptions(threads=1)
COLOURS = ["red", "green", "blue"]


def _unit(seed: int, rows: int, width: int = 16) -> np.ndarray:
    array = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


class Nearest:
    """A gate by the plain cosine, with a row of its own that takes a tenth of itself off."""

    method = "nearest"
    threshold = 0.2
    threshold_alone = 0.1
    rows = _unit(99, 1)

    def scores(self, own: np.ndarray, others: np.ndarray) -> np.ndarray:
        return self.alone(own, others).max(axis=1)

    def alone(self, own: np.ndarray, others: np.ndarray) -> np.ndarray:
        assert others.shape == (len(own), 1)
        return own.astype(np.float64) - 0.1 * others


def _bank(seed: int, names: int) -> LabelBank:
    labels = LabelSet.of([f"label {number}" for number in range(names)])
    return LabelBank(labels, _unit(seed, names), Templates.of("bare"))


# -- what is asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"reject": True, "multi": True}, "reject and multi together"),
        ({"threshold": 0.5}, "neither reject nor multi"),
        ({"reject": True, "threshold": float("nan")}, "threshold is nan"),
        ({"context": "on snow"}, "expected a list"),
        ({"context": ("on snow", " ")}, "entry 2: got ' '"),
        ({"context": ("{} on {}",)}, "at most one {}"),
        ({"context": ("on } snow",)}, "at most one {}"),
        ({"context": ("on\nsnow",)}, "printable"),
        ({"context": ("on snow", "on snow")}, "repeated"),
        ({"context": ("on snow", "{} on  snow")}, "repeated"),
        ({"context": ("{}",)}, "says nothing"),
        ({"context": tuple(map(str, range(MAX_CONTEXTS + 1)))}, "at most 100"),
    ],
)
def test_what_means_nothing_is_refused(asked: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Answers(**asked)


def test_a_context_follows_the_label_or_holds_it() -> None:
    templates = Templates.of(["a photo of a {}.", "{}"])
    assert in_context(templates, "on snow").texts == ("a photo of a {} on snow.", "{} on snow")
    assert in_context(templates, "blurred {}").texts == ("a photo of a blurred {}.", "blurred {}")


def test_groups_of_contexts_are_crossed() -> None:
    assert crossed([["on snow", "a wet {}"]]) == ("{} on snow", "a wet {}")
    assert crossed([["striped {}"], ["on snow", "at night"]]) == (
        "{} on snow",
        "{} at night",
        "striped {}",
        "striped {} on snow",
        "striped {} at night",
    )
    with pytest.raises(ConfigError, match="124 phrases, at most 100"):
        Answers(context=crossed([list("abcd")] * 3))


# -- heads -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 8), st.floats(0.5, 90))
def test_a_context_is_inferred_and_then_the_label(
    pictures: int, contexts: int, labels: int, scale: float
) -> None:
    """Against the two steps written out with probabilities."""
    products = cosines(_unit(1, pictures), _unit(2, contexts * labels))
    head = ContextHead(scale, contexts)
    logits = scale * products.astype(np.float64).reshape(pictures, contexts, labels)
    of_context = np.exp(logits).sum(axis=2)
    of_context /= of_context.sum(axis=1, keepdims=True)
    within = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    expected = (of_context[:, :, None] * within).sum(axis=1)
    similarity = head.similarity(products)
    for row, wanted in zip(similarity, expected, strict=True):
        order = np.argsort(-row)
        assert head(row, row[order].tolist()) == pytest.approx(wanted[order].tolist(), rel=1e-3, abs=1e-9)
    assert similarity.shape == (pictures, labels)
    weighted = (of_context[:, :, None] * logits / scale).sum(axis=1)  # of every label
    best = expected.argmax(axis=1)[:, None]
    np.testing.assert_allclose(
        np.take_along_axis(similarity, best, axis=1), np.take_along_axis(weighted, best, axis=1), atol=1e-6
    )


def test_one_context_changes_nothing() -> None:
    products = cosines(_unit(1, 4), _unit(2, 7))
    similarity = ContextHead(30.0, 1).similarity(products)
    np.testing.assert_allclose(similarity, products, atol=2e-7)


def test_a_linear_head_is_the_softmax_of_its_logits() -> None:
    bias = np.array([900.0, 901.0, -5.0], np.float32)
    similarity = LinearHead(bias).similarity(np.zeros((1, 3), np.float32))
    scores = LinearHead(bias)(similarity[0], [901.0, 900.0])
    assert scores == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])
    assert LinearHead(bias).score_kind == "linear"


# -- what is in force --------------------------------------------------------------------------------------


def test_a_gate_decides_and_never_ranks() -> None:
    bank, embeddings = _bank(3, 9), _unit(4, 200)
    plain = of_bank(bank, TemperatureHead(20.0), Answers(), None).answer(embeddings, 3)
    gated = of_bank(bank, TemperatureHead(20.0), Answers(reject=True), Nearest()).answer(embeddings, 3)
    expected = (embeddings @ bank.embeddings.T).max(axis=1) - 0.1 * (embeddings @ Nearest.rows.T)[:, 0]
    for free, judged, score in zip(plain, gated, expected, strict=True):
        assert free.rejection is None
        assert judged.rejection is not None
        assert judged.rejection.score == pytest.approx(float(score), abs=1e-6)
        assert judged.rejection.rejected == (judged.rejection.score < 0.2)
        assert judged.predictions == (() if judged.rejection.rejected else free.predictions)
    assert 0 < sum(not each.predictions for each in gated) < 200


def test_multi_gives_each_label_that_fits_by_itself() -> None:
    bank, embeddings = _bank(3, 9), _unit(4, 200)
    force = of_bank(bank, TemperatureHead(20.0), Answers(multi=True), Nearest())
    alone = embeddings @ bank.embeddings.T - 0.1 * (embeddings @ Nearest.rows.T)
    counts = []
    for said, wanted in zip(force.answer(embeddings, 4), alone, strict=True):
        fitting = sorted(np.flatnonzero(wanted >= 0.1), key=lambda each: -wanted[each])[:4]
        assert [each.label for each in said.predictions] == [bank.names[each] for each in fitting]
        scores = [float(wanted[each]) for each in fitting]
        assert [each.score for each in said.predictions] == pytest.approx(scores, abs=1e-6)
        assert said.rejection is not None
        assert said.rejection.rejected == (not fitting)
        counts.append(len(fitting))
    assert {0, 1, 2, 3} <= set(counts)
    assert force.score_kind == "nearest"


def test_rows_of_a_gate_without_any_are_not_copied() -> None:
    class Bare(Nearest):
        rows = np.empty((0, 16), np.float32)

    bank = _bank(3, 4)
    assert of_bank(bank, TemperatureHead(20.0), Answers(reject=True), Bare()).rows is bank.embeddings


def test_what_is_not_a_number_is_seen() -> None:
    nothing = np.full((1, 16), np.nan, np.float32)
    for answers, gate in (
        (Answers(), None),
        (Answers(reject=True), Nearest()),
        (Answers(multi=True), Nearest()),
    ):
        (said,) = of_bank(_bank(3, 4), TemperatureHead(20.0), answers, gate).answer(nothing, 2)
        assert said.is_nan


def test_scores_at_the_threshold_are_accepted() -> None:
    assert not Rejection(0.5, 0.5).rejected


# -- the facade --------------------------------------------------------------------------------------------


def test_answers_of_embeddings_equal_those_of_pictures(tiny_bundle_session: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), np.uint8)
    with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD) as classifier:
        classifier.set_labels(COLOURS)
        said = classifier.answer(classifier.embed_images(pictures), top_k=2)
        assert [list(each.predictions) for each in said] == classifier.classify(pictures, top_k=2)
        assert classifier.labels == tuple(COLOURS)
        width = classifier.bundle.manifest.model.embed_dim
        with pytest.raises(InputError, match=rf"float64 \(3, {width}\), expected float32 \(B, {width}\)"):
            classifier.answer(np.zeros((3, width)))
        with pytest.raises(InputError, match="expected float32"):
            classifier.answer(np.zeros(width, np.float32))
        with pytest.raises(BackendError, match="no numbers"):
            classifier.answer(np.full((1, width), np.nan, np.float32))


def test_labels_in_contexts_have_a_row_for_each(tiny_bundle_session: Path) -> None:
    asked = Answers(context=("on snow", "a blurred {}"))
    with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD, answers=asked) as classifier:
        classifier.set_labels(COLOURS, templates="{}!")
        force = classifier._labels_in_force()
        texts = [form.format(each) for form in ("{}!", "{} on snow!", "a blurred {}!") for each in COLOURS]
        np.testing.assert_allclose(force.rows, classifier.embed_texts(texts), atol=1e-6)
        picture = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
        said = classifier.classify(picture)
        assert sum(each.score for each in said) == pytest.approx(1)
        classifier.set_bundle_labels()
        assert len(classifier._labels_in_force().rows) == 3 * len(classifier.labels)
        with pytest.raises(ConfigError, match="finished label bank"):
            classifier.set_labels(classifier.bank)


@pytest.mark.parametrize("asked", [Answers(), Answers(context=("on snow",)), Answers(reject=True),
                                   Answers(multi=True, context=("on snow",))])  # fmt: skip
def test_no_pictures_have_no_answers(asked: Answers) -> None:
    with ZeroShotClassifier.open(options=ONE_THREAD, answers=asked) as classifier:
        classifier.set_labels(["cat", "dog"])
        assert classifier.answer(np.empty((0, classifier.bundle.manifest.model.embed_dim), np.float32)) == []
        assert classifier.classify([]) == []


def test_all_contexts_share_one_opening_of_the_text_tower(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    tower = text_encoder.open_tower
    monkeypatch.setattr(
        text_encoder, "open_tower", lambda *given, **named: opened.append(1) or tower(*given, **named)
    )
    asked = Answers(context=tuple(f"on ground {number}" for number in range(9)))
    with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD, answers=asked) as classifier:
        classifier.set_labels(COLOURS)
        assert (classifier.text_tower_runs, len(opened)) == (9, 1)  # names alone are in the bundle
        assert not classifier._labels.text_tower_is_open
        # What was encoded stays in memory, in every context: a label less costs nothing.
        shutil.rmtree(os.environ["EDGECLIP_CACHE_DIR"])
        classifier.set_labels(COLOURS[:2])
        assert (classifier.text_tower_runs, len(opened)) == (9, 1)
        assert classifier.labels == tuple(COLOURS[:2])


@pytest.mark.parametrize("kind", ["head", "bank"])
def test_what_is_set_stays_where_the_first_picture_waits_for_the_bundle_s_labels(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The first picture sets the default labels, unless somebody was quicker: never after them."""
    reading, go_on = threading.Event(), threading.Event()
    read = BundleLabels.bank

    def slowly(self: BundleLabels, name: str) -> LabelBank:
        reading.set()
        go_on.wait(10)
        return read(self, name)

    with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD) as classifier:
        classifier.set_labels(COLOURS)
        bank, model = classifier.bank, classifier.bundle.manifest.model
        head = fit_head(np.eye(3, model.embed_dim), range(3), ("x", "y", "z"), space=model.embedding_space)
        classifier._active = None  # as before the first picture
        monkeypatch.setattr(BundleLabels, "bank", slowly)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(lambda: classifier.labels)
            assert reading.wait(10)
            setting = pool.submit(classifier.set_head if kind == "head" else classifier.set_labels,
                                  head if kind == "head" else bank)  # fmt: skip
            wait([setting], timeout=0.2)
            go_on.set()
            first.result()
            setting.result()
        assert classifier.labels == (head.names if kind == "head" else bank.names)


def test_a_bundle_that_cannot_reject_says_so(tiny_bundle_session: Path) -> None:
    with (
        ZeroShotClassifier.open(
            tiny_bundle_session, options=ONE_THREAD, answers=Answers(reject=True)
        ) as classifier,
        pytest.raises(ConfigError, match="heads reject"),
    ):
        classifier.set_labels(COLOURS)


def test_in_force_is_what_it_was_made_of() -> None:
    bank = _bank(1, 3)
    force = of_bank(bank, TemperatureHead(9.0), Answers(), None)
    assert isinstance(force, InForce)
    assert force.rows is bank.embeddings
    assert (force.names, force.score_kind, force.bank) == (bank.names, "softmax", bank)


def test_sixteen_threads_get_the_answers_of_one_set_of_labels(repo: Path) -> None:
    """A gate, its rows and its labels or head change together, whatever the other threads do meanwhile."""
    photos = repo / "edgeclip/assets/photos"
    with ZeroShotClassifier.open(options=ONE_THREAD, answers=Answers(reject=True)) as classifier:
        embeddings = classifier.embed_images([photos / f"{name}.jpg" for name in ("cat", "castle", "koala")])
        model = classifier.bundle.manifest.model
        head = fit_head(np.repeat(embeddings, 2, axis=0), [0, 0, 1, 1, 2, 2], ("x", "y", "z"),
                        space=model.embedding_space)  # fmt: skip
        sets = [("cat", "dog"), head, ("teapot",), ("castle", "crab", "sheep")]

        def offer(labels: tuple[str, ...] | FewShotHead) -> None:
            if isinstance(labels, tuple):
                classifier.set_labels(labels)
            else:
                classifier.set_head(labels)

        expected = []
        for labels in sets:
            offer(labels)
            expected.append(classifier.answer(embeddings))
        done = threading.Event()

        def swap() -> None:
            try:
                for turn in range(60):
                    offer(sets[turn % len(sets)])
            finally:
                done.set()

        def ask(_: int) -> set[int]:
            said = [classifier.answer(embeddings)]
            while not done.is_set():
                said.append(classifier.answer(embeddings))
            assert all(each in expected for each in said)
            return {expected.index(each) for each in said}

        with ThreadPoolExecutor(17) as pool:
            asking = [pool.submit(ask, number) for number in range(16)]
            pool.submit(swap).result()
            seen = set().union(*(each.result() for each in asking))
        assert len(seen) > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_says_that_it_cannot_answer(tiny_bundle_session: Path) -> None:
    with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD) as classifier:
        classifier.set_labels(COLOURS)
        nothing = np.zeros((1, classifier.bundle.manifest.model.embed_dim), np.float32)
        child = os.fork()
        if child == 0:
            try:
                classifier.answer(nothing)
            except BackendError as error:
                os._exit(0 if "does not work in its fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
