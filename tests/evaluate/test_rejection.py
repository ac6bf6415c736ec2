"""Fitting of "none of these": draws, scores against the gate itself, thresholds that hold on other names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.errors import InputError
from edgeclip.evaluate import rejection
from edgeclip.evaluate.rejection import Shown, draw_sets, fit_no, fit_reject, rates_at
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.reject import KIND_COUNTS, NegativesGate, NoGate, meaning


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def bank(prefix: str, rows: NDArray[np.float32]) -> LabelBank:
    return LabelBank(LabelSet.of([f"{prefix}{row}" for row in range(len(rows))]), rows, Templates.of("one"))


@pytest.fixture(scope="module")
def world() -> tuple[LabelBank, LabelBank, NDArray[np.float32], NDArray[np.intp]]:
    """Names, a background that holds half of them under other words, and 200 pictures of the names."""
    random = np.random.default_rng(0)
    names = unit(random.normal(size=(40, 32)))
    general = unit(np.concatenate([names[:20], random.normal(size=(60, 32))]))
    own = np.arange(200) % 40
    pictures = unit(names[own] + random.normal(size=(200, 32)) * random.uniform(0.1, 0.3, (200, 1)))
    return bank("name", names), bank("general", general), pictures, own


def test_draws_share_all_names_but_one() -> None:
    own = np.array([3, 0, 4])
    for having, without in draw_sets(own, 6, 4, 50):
        assert having.shape == without.shape == (3, 4)
        assert (having[:, :-1] == without[:, :-1]).all()
        assert (having[:, -1] == own).all()
        assert not (without == own[:, None]).any()
        assert all(len(set(row)) == 4 for row in [*having.tolist(), *without.tolist()])
    with pytest.raises(InputError, match="got 6 of 6 names, expected 1 to 5"):
        next(draw_sets(own, 6, 6, 1))


def test_scores_are_those_of_the_gates(world: Any) -> None:
    labels, general, pictures, own = world
    same = meaning(labels, general, 0.6)
    shown = Shown(pictures @ labels.embeddings.T, own, pictures @ general.embeddings.T, same, 20.0)
    sets = np.tile([1, 5, 30], (len(own), 1))
    kept = ~same[[1, 5, 30]].any(axis=0)
    assert 0 < kept.sum() < len(general)
    gate = NegativesGate(general.embeddings[kept], 0.0, 0.0, 20.0, 0.4)
    expected = gate.scores(shown.cosines[:, [1, 5, 30]], pictures @ gate.rows.T)
    assert shown.negatives(0.4)(sets) == pytest.approx(expected, abs=1e-4)
    together = replace(shown, texts=labels.embeddings @ general.embeddings.T)
    gate = replace(gate, texts=labels.embeddings[[1, 5, 30]], nearness=0.2 * math.log(3))
    expected = gate.scores(shown.cosines[:, [1, 5, 30]], pictures @ gate.rows.T)
    assert together.together(0.4, 0.2)(sets) == pytest.approx(expected, abs=1e-4)
    assert together.together(0.4, 0.2, most=2)(sets) != pytest.approx(expected, abs=1e-4)
    denials = Shown(shown.cosines, own, shown.cosines[:, ::-1], same, 20.0)
    no = NoGate(labels.embeddings, 0.0, 0.0, 20.0)
    others = denials.others[:, [1, 5, 30]]
    assert denials.against_denials(sets) == pytest.approx(
        no.scores(shown.cosines[:, [1, 5, 30]], others), abs=1e-4
    )


def test_what_a_picture_shows_can_be_taken_from_the_background(world: Any) -> None:
    labels, general, pictures, own = world
    same = meaning(labels, general, 0.6)
    shown = Shown(pictures @ labels.embeddings.T, own, pictures @ general.embeddings.T, same, 20.0)
    sets = np.full((len(own), 1), 39)
    less = shown.background(sets) - shown.background(sets, unnamed=True)
    assert (less >= 0).all()
    assert less[own < 20].mean() > 1  # their names are there, under other words
    assert less[own >= 20].mean() < 0.2


def test_a_fit_holds_its_share_on_other_names(world: Any) -> None:
    labels, general, pictures, own = world
    fit = fit_reject(labels, general, pictures, own, scale=20.0, false_accepts=0.1)
    assert fit.improves
    assert fit.offered == (1, 2, 5, 10, 20)
    assert list(fit.threshold) == sorted(fit.threshold)
    for rates in fit.rates:
        assert rates.false_accepts == pytest.approx(0.1, abs=0.05)
    assert fit.rates[0].true_accepts > 0.9
    assert fit.head().least(5) == pytest.approx(fit.together[2])
    assert fit.head().least(5, alone=True) == pytest.approx(fit.threshold[2])
    assert fit.to_dict()["threshold"] == list(fit.threshold)


def test_scores_with_kinds_are_those_of_the_gate(world: Any) -> None:
    labels, general, pictures, own = world
    same = meaning(labels, general, 0.6)
    kinds = np.zeros_like(same)
    kinds[1, 60:63] = kinds[5, 62:70] = True
    texts = labels.embeddings @ general.embeddings.T
    others = pictures @ general.embeddings.T
    shown = Shown(pictures @ labels.embeddings.T, own, others, same, 20.0, texts, kinds=kinds)
    names = [1, 5, 30]
    sets = np.tile(names, (len(own), 1))
    lifted = np.flatnonzero(kinds[names].any(axis=0))
    kept = np.flatnonzero(~(same[names] | kinds[names]).any(axis=0))
    rows = np.concatenate([lifted, kept])
    gate = NegativesGate(
        general.embeddings[rows], 0.0, 0.0, 20.0, 0.4,
        kinds=((0, np.arange(3)), (1, np.arange(2, 10))),
        texts=labels.embeddings[names], nearness=0.2 * math.log(3 + 11 * KIND_COUNTS),
    )  # fmt: skip
    expected = gate.scores(shown.cosines[:, names], others[:, rows])
    assert shown.counted(sets) == pytest.approx(3 + 11 * KIND_COUNTS)
    assert shown.together(0.4, 0.2)(sets) == pytest.approx(expected, abs=1e-4)


def test_folds_hold_whole_names_of_like_number(world: Any) -> None:
    """Six names fill all five folds, however the draw falls, and no name is on both sides."""
    own = np.arange(60) % 6
    scores = np.stack([own, own]).astype(np.float64)
    for seed in range(20):
        rates = rejection._held_out({5: (scores, scores)}, own, 0.2, seed)
        assert np.isfinite([rates[0].threshold, rates[0].true_accepts]).all()


def test_nearness_is_for_names_that_are_near_to_each_other(world: Any) -> None:
    """Of names drawn at random none is near to another; of breeds and species all are."""
    labels, general, pictures, own = world
    assert fit_reject(labels, general, pictures, own, scale=20.0).nearness == 0
    random = np.random.default_rng(1)
    sorts = unit(random.normal(size=(15, 32)))
    names = unit(np.repeat(sorts, 4, axis=0) + 0.15 * random.normal(size=(60, 32)))
    own = np.arange(240) % 60
    shown = unit(names[own] + random.normal(size=(240, 32)) * random.uniform(0.1, 0.5, (240, 1)))
    clusters = unit(np.concatenate([names, random.normal(size=(60, 32))]))
    fit = fit_reject(bank("name", names), bank("general", clusters), shown, own, scale=20.0)
    assert fit.nearness > 0


def test_denials_that_say_nothing_are_no_improvement(world: Any) -> None:
    labels, _, pictures, own = world
    denials = np.roll(labels.embeddings, 7, axis=0)
    assert not fit_no(labels, denials, pictures, own, scale=20.0).improves


def test_many_pictures_are_drawn_from(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, general, pictures, own = world
    monkeypatch.setattr(rejection, "_MOST_PICTURES", 100)
    assert fit_reject(labels, general, pictures, own, scale=20.0).pictures == 100


def test_rates_count_what_reaches_the_threshold() -> None:
    rates = rates_at(np.array([[1.0, 2.0]]), np.array([[0.5, 1.0]]), 1.0, 5)
    assert (rates.true_accepts, rates.false_accepts, rates.offered) == (1.0, 0.5, 5)


@pytest.mark.parametrize(
    ("pictures", "names", "share", "said"),
    [
        (49, 40, 0.1, "got 49 pictures of 40 names, expected at least 50 and 6"),
        (60, 5, 0.1, "got 60 pictures of 5 names"),
        (60, 40, 1.0, "got 1 false accepts, expected a share above 0, below 1"),
    ],
)
def test_too_little_is_told(world: Any, pictures: int, names: int, share: float, said: str) -> None:
    labels, general, images, own = world
    few = bank("few", labels.embeddings[:names])
    with pytest.raises(InputError, match=said):
        fit_reject(few, general, images[:pictures], own[:pictures] % names, scale=20.0, false_accepts=share)
