"""Adaptation to pictures without labels: what is right is known here, and never told."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from edgeclip.distill.adapt import (
    LEAST_EXPLAINED,
    LEAST_FOLLOWED,
    Self,
    Taught,
    adapt,
    adapted_bank,
    ask_teacher,
    bank_file,
    first_labels,
    posterior,
    read_about,
    soft_labels,
)
from edgeclip.errors import ConfigError, InputError
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank

LABELS, DIM, SCALE = 8, 32, 20.0
ROUNDING = 1e-5
FLOATS = np.float32


def unit(rows: Any) -> Any:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), FLOATS)


@dataclass(frozen=True, eq=False)
class Domain:
    """Pictures of classes whose texts lie beside them."""

    texts: Any
    pictures: Any
    own: Any
    others: Any
    own_others: Any


def domain(
    seed: int = 0, *, each: int = 12, noise: float = 1.0, off: float = 2.0, hub: float = 0.5
) -> Domain:
    """Draw classes; texts are off by a random direction each, and one of them lies near all pictures."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(LABELS, DIM)))
    texts = centres + off * unit(rng.normal(size=(LABELS, DIM)))
    texts[0] += hub * LABELS**0.5 * centres.mean(axis=0)
    own = np.repeat(np.arange(LABELS), each)

    def drawn() -> Any:
        return unit(centres[own] + noise * unit(rng.normal(size=(len(own), DIM))))

    return Domain(unit(texts), drawn(), own, drawn(), own)


def right(pictures: Any, rows: Any, own: Any) -> float:
    return float(np.mean(first_labels(pictures, rows) == own))


# --- soft labels -------------------------------------------------------------------------------------------


def test_without_balance_soft_labels_are_the_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 5))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert soft_labels(logits, 0.0, None) == pytest.approx(expected)


def test_full_balance_reaches_the_marginal_and_rows_stay_shares() -> None:
    logits = 3 * np.random.default_rng(1).normal(size=(200, 5))
    marginal = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    said = soft_labels(logits, 1.0, marginal)
    assert said.sum(axis=1) == pytest.approx(np.ones(200))
    assert said.mean(axis=0) == pytest.approx(marginal, abs=1e-4)


def test_more_balance_comes_nearer_to_the_marginal() -> None:
    logits = np.random.default_rng(2).normal(size=(300, 4)) + np.array([3.0, 0, 0, -1])
    equal = np.full(4, 0.25)
    off = [
        float(np.abs(soft_labels(logits, balance, equal).mean(axis=0) - equal).sum())
        for balance in (0.0, 0.3, 0.6, 1.0)
    ]
    assert off == sorted(off, reverse=True)
    assert off[0] > 0.5
    assert off[-1] < 1e-3


def test_soft_labels_do_not_mind_what_is_added_to_a_picture() -> None:
    logits = np.random.default_rng(3).normal(size=(30, 6))
    moved = logits + 500 * np.random.default_rng(4).normal(size=(30, 1))
    equal = np.full(6, 1 / 6)
    assert soft_labels(moved, 0.5, equal) == pytest.approx(soft_labels(logits, 0.5, equal))


def test_logits_are_left_as_they_are() -> None:
    logits = np.random.default_rng(5).normal(size=(30, 6)).astype(FLOATS)
    given = logits.copy()
    said = soft_labels(logits, 0.5, np.full(6, 1 / 6, FLOATS))
    assert np.array_equal(logits, given)
    exact = soft_labels(given.astype(np.float64), 0.5, np.full(6, 1 / 6))
    assert said == pytest.approx(exact, abs=ROUNDING)


def test_a_label_that_fits_nothing_stays_finite() -> None:
    logits = np.zeros((10, 3), FLOATS)
    logits[:, 2] = -1e4
    said = soft_labels(logits, 1.0, np.full(3, 1 / 3, FLOATS))
    assert np.isfinite(said).all()
    assert said.sum(axis=1) == pytest.approx(np.ones(10))


# --- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_rows_fit_the_domain_better_and_pictures_that_were_not_seen(seed: int) -> None:
    drawn = domain(seed)
    found = adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE)
    assert np.linalg.norm(found.rows, axis=1) == pytest.approx(np.ones(LABELS))
    assert found.rows.dtype == FLOATS
    before = right(drawn.others, drawn.texts, drawn.own_others)
    assert before < 0.95
    assert right(drawn.others, found.rows, drawn.own_others) >= before + 0.03
    assert found.judgement.reliable


def test_the_order_of_pictures_does_not_matter_and_equal_input_gives_equal_bytes() -> None:
    drawn = domain()
    order = np.random.default_rng(0).permutation(len(drawn.own))
    every = np.arange(len(order))
    rows = Self(SCALE)(drawn.pictures, drawn.texts, every)
    assert Self(SCALE)(drawn.pictures, drawn.texts, every).tobytes() == rows.tobytes()
    assert Self(SCALE)(drawn.pictures[order], drawn.texts, every) == pytest.approx(rows, abs=ROUNDING)
    assert Self(SCALE)(drawn.pictures, drawn.texts, order) == pytest.approx(rows, abs=ROUNDING)


def test_only_the_chosen_pictures_are_looked_at() -> None:
    drawn = domain()
    chosen = np.arange(0, len(drawn.own), 2)
    spoilt = drawn.pictures.copy()
    spoilt[1::2] = np.nan
    assert np.isfinite(Self(SCALE)(spoilt, drawn.texts, chosen)).all()
    said = Taught(posterior(drawn.pictures, drawn.texts, SCALE))
    assert np.isfinite(said(spoilt, drawn.texts, chosen)).all()


def test_strength_says_how_far_rows_go() -> None:
    drawn = domain()
    every = np.arange(len(drawn.own))
    moved = [
        float(
            (Self(SCALE, strength=strength)(drawn.pictures, drawn.texts, every) * drawn.texts).sum(1).mean()
        )
        for strength in (0.0, 0.2, 0.5)
    ]
    assert moved[0] == pytest.approx(1, abs=ROUNDING)
    assert moved == sorted(moved, reverse=True)


def test_a_label_that_lies_near_all_pictures_takes_fewer_of_them() -> None:
    drawn = domain(off=1.5)
    common = unit(np.random.default_rng(0).normal(size=DIM))
    pictures, texts = unit(drawn.pictures + 0.5 * common), drawn.texts.copy()
    texts[0] = unit(texts[0] + common)
    rows = Self(SCALE)(pictures, texts, np.arange(len(drawn.own)))
    before, after = (int(np.sum(first_labels(pictures, each) == 0)) for each in (texts, rows))
    assert before > 4 * 12
    assert after < 0.8 * before


def test_a_teacher_that_is_sure_gives_the_means_of_its_classes() -> None:
    drawn = domain()
    every = np.arange(len(drawn.own))
    rows = Taught(np.eye(LABELS)[drawn.own], strength=1.0)(drawn.pictures, drawn.texts, every)
    means = unit(np.stack([drawn.pictures[drawn.own == label].mean(axis=0) for label in range(LABELS)]))
    assert rows == pytest.approx(means, abs=ROUNDING)


def test_a_student_that_knows_little_learns_from_a_teacher_of_another_width() -> None:
    student, teacher = domain(0, off=3.0), domain(0)
    wide = np.hstack([teacher.pictures, teacher.pictures]) / np.sqrt(2)
    labels = np.hstack([teacher.texts, teacher.texts]) / np.sqrt(2)
    taught, own = ask_teacher(wide, labels, SCALE)
    assert own.reliable
    found = adapt(student.pictures, student.texts, taught, scale=SCALE, taught=taught)
    before = right(student.others, student.texts, student.own)
    assert right(student.others, found.rows, student.own) > before + 0.3
    judged = found.judgement
    assert judged.follows is not None
    assert judged.follows_before is not None
    assert judged.follows > judged.follows_before
    assert judged.reliable


def test_a_teacher_whom_the_student_cannot_follow_is_a_reason() -> None:
    drawn = domain()
    said = np.random.default_rng(0).dirichlet(np.full(LABELS, 0.1), len(drawn.own))
    taught = Taught(said)
    judged = adapt(drawn.pictures, drawn.texts, taught, scale=SCALE, taught=taught).judgement
    assert not judged.reliable
    worse = dataclasses.replace(judged, follows_before=0.5, follows=0.25)
    assert "has the teacher's first label for 25.0%, for 50.0% before" in worse.reasons[0]
    little = dataclasses.replace(judged, follows_before=0.5, follows=0.5 + LEAST_FOLLOWED / 2)
    assert f"expected at least {LEAST_FOLLOWED:.1%} more" in little.reasons[0]


# --- can it be relied on? ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_clear_groups_that_are_not_the_labels_are_seen_by_a_witness_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, classes = unit(rng.normal(size=(LABELS, DIM))), unit(rng.normal(size=(LABELS, DIM)))
    own = np.repeat(np.arange(LABELS), 12)
    noise = unit(rng.normal(size=(len(own), DIM)))
    pictures = unit(groups[rng.permutation(own)] + 0.5 * classes[own] + 0.3 * noise)
    texts = unit(classes + 0.7 * groups)
    knows = np.eye(LABELS)[own]
    found = adapt(pictures, texts, Self(SCALE), scale=SCALE, witness=knows)
    lost = right(pictures, texts, own) - right(pictures, found.rows, own)
    assert lost > 0.02
    assert found.judgement.witness == pytest.approx(-lost)  # who knows the answers expects what happens
    assert found.judgement.reasons == (
        f"the witness expects {lost:.1%} fewer pictures to be right than before",
    )
    assert dataclasses.replace(found.judgement, witness=None).reliable


def test_a_witness_teaches_nothing_and_lets_pass_what_is_better() -> None:
    drawn = domain()
    alone = adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE)
    said = np.eye(LABELS)[drawn.own]
    found = adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE, witness=said)
    assert np.array_equal(found.rows, alone.rows)
    assert found.judgement.witness is not None
    assert found.judgement.witness > 0
    assert found.judgement.reliable
    with pytest.raises(InputError, match=r"witness of shape \(96, 7\), expected \(96, 8\)"):
        adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE, witness=said[:, 1:])


def test_pictures_that_differ_in_something_else_are_refused() -> None:
    drawn = domain(each=20, noise=2.0)
    judged = adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE).judgement
    assert judged.explained < LEAST_EXPLAINED
    assert any(f"labels explain {judged.explained:.1%}" in reason for reason in judged.reasons)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_refused_and_labels_explain_nothing_of_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pictures, texts = unit(rng.normal(size=(240, 64))), unit(rng.normal(size=(LABELS, 64)))
    judged = adapt(pictures, texts, Self(SCALE), scale=SCALE).judgement
    assert not judged.reliable
    assert abs(judged.explained) < 0.1


def test_what_is_right_already_stays_and_is_relied_on() -> None:
    drawn = domain(off=0.2, hub=0.0, noise=0.3)
    assert right(drawn.pictures, drawn.texts, drawn.own) == 1
    found = adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE)
    assert found.judgement.changed == 0
    assert found.judgement.reliable
    assert found.judgement.before.neighbours == found.judgement.after.neighbours == 1


def test_what_is_said_of_a_bank_is_what_can_be_counted() -> None:
    drawn = domain()
    judged = adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE).judgement
    first = first_labels(drawn.pictures, drawn.texts)
    assert judged.pictures == len(drawn.own)
    assert judged.before.in_use == len(set(first.tolist()))
    assert judged.before.largest == pytest.approx(np.bincount(first).max() / len(first))
    similarity = drawn.pictures @ drawn.pictures.T
    np.fill_diagonal(similarity, -1)
    same = np.mean(first == first[similarity.argmax(axis=1)])
    chance = float(((np.bincount(first) / len(first)) ** 2).sum())
    assert judged.before.neighbours == pytest.approx((same - chance) / (1 - chance))
    said = json.loads(json.dumps(judged.to_dict()))
    assert said["before"]["in_use"] == judged.before.in_use


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"agreement": 0.25}, "agree on 25.0% of the first labels"),
        ({"explained": 0.125}, "labels explain 12.5%"),
    ],
)
def test_every_gate_says_its_number(change: dict[str, float], reason: str) -> None:
    drawn = domain()
    judged = adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE).judgement
    assert judged.reasons == ()
    (said,) = dataclasses.replace(judged, **change).reasons
    assert reason in said


def test_neighbours_that_agree_less_and_labels_out_of_use_are_reasons() -> None:
    drawn = domain()
    judged = adapt(drawn.pictures, drawn.texts, Self(SCALE), scale=SCALE).judgement
    less = dataclasses.replace(judged.after, neighbours=judged.before.neighbours - 0.5, in_use=2)
    reasons = dataclasses.replace(judged, after=less).reasons
    assert any("similar pictures agree less than before" in reason for reason in reasons)
    assert any(
        f"2 labels come first for some picture, {judged.before.in_use} did" in each for each in reasons
    )


# --- bad input ---------------------------------------------------------------------------------------------


def test_too_few_pictures_one_label_and_other_widths_are_refused() -> None:
    drawn = domain()
    fit = Self(SCALE)
    with pytest.raises(InputError, match="got 15 different pictures for 8 labels, expected at least 16"):
        adapt(drawn.pictures[:15], drawn.texts, fit, scale=SCALE)
    with pytest.raises(InputError, match="got 1 label, expected at least two"):
        adapt(drawn.pictures, drawn.texts[:1], fit, scale=SCALE)
    with pytest.raises(InputError, match=r"shape \(96, 32\) and labels of shape \(8, 31\)"):
        adapt(drawn.pictures, drawn.texts[:, 1:], fit, scale=SCALE)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'strength' is 1\.5"):
        Self(SCALE, strength=1.5)
    with pytest.raises(ConfigError, match="'balance' is -1"):
        Self(SCALE, balance=-1)
    with pytest.raises(ConfigError, match="'rounds' is 0"):
        Self(SCALE, rounds=0)
    with pytest.raises(ConfigError, match="'strength' is 2"):
        Taught(np.eye(2), strength=2)


# --- the file ----------------------------------------------------------------------------------------------


def test_the_file_is_an_ordinary_bank_that_says_how_it_was_made() -> None:
    drawn = domain()
    names = [f"label {number}" for number in range(LABELS)]
    bank = LabelBank(LabelSet.of(names), drawn.texts, Templates.of("one"), space="s" * 64, tower="t" * 64)
    rows = Self(SCALE)(drawn.pictures, drawn.texts, np.arange(len(drawn.own)))
    content = bank_file(adapted_bank(bank, rows, bank.space), {"method": "vectors", "seed": 0})
    read = LabelBank.from_bytes(content)
    assert read.names == bank.names
    assert read.space == bank.space
    assert read.embeddings == pytest.approx(rows)
    assert read.tower == ""  # else its rows would be taken for embeddings of the texts
    assert read_about(content) == {"method": "vectors", "seed": 0}
    assert read_about(bank.to_bytes()) is None
    unbound = LabelBank(bank.labels, drawn.texts, bank.templates)
    assert adapted_bank(unbound, rows, bank.space).space == bank.space
    damaged = bytearray(content)
    damaged[-1] ^= 1
    with pytest.raises(InputError, match="checksum"):
        LabelBank.from_bytes(bytes(damaged))
