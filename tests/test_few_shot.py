"""Few-shot heads: the arithmetic, its shortcuts, the file and the gate."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.metrics import auroc
from edgeclip.few_shot import FewShotHead, Part, Settings, Statistics, gate_of
from edgeclip.few_shot_fit import _Moments, extended, fit_head, held_out, layer, without_class
from edgeclip.heads import LinearHead, best_of
from edgeclip.tensors import read_tensors, write_tensors

SPACE = "0123456789abcdef"
WIDTH, CLASSES, SHOTS = 24, 5, 6
NAMES = tuple(f"class {number}" for number in range(CLASSES))

Rows = NDArray[np.float32]


def unit(rows: NDArray[np.floating]) -> Rows:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


class World:
    """Classes with names that say something, and pictures that scatter the same way in all of them."""

    def __init__(self, seed: int = 0, classes: int = CLASSES, width: int = WIDTH) -> None:
        self.random = np.random.default_rng(seed)
        self.centres = self.random.standard_normal((classes, width))
        self.mixing = self.random.standard_normal((width, width)) * np.linspace(0.1, 1, width)
        self.texts = unit(self.centres + self.random.standard_normal(self.centres.shape))

    def draw(self, shots: int) -> tuple[Rows, NDArray[np.intp]]:
        targets = np.tile(np.arange(len(self.centres)), shots)
        noise = self.random.standard_normal((len(targets), self.centres.shape[1])) @ self.mixing
        return unit(self.centres[targets] + 0.5 * noise), targets


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def head(world: World) -> FewShotHead:
    return fit_head(*world.draw(SHOTS), NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)


# --- arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", [0.05, 0.3, 0.9])
def test_a_discriminant_is_that_of_scikit_learn(world: World, shrinkage: float) -> None:
    analysis = pytest.importorskip("sklearn.discriminant_analysis")
    rows, targets = world.draw(SHOTS)
    theirs = analysis.LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=shrinkage, priors=np.full(CLASSES, 1 / CLASSES)
    ).fit(rows.astype(np.float64), targets)
    # Theirs divides the scatter by N, ours by N - C; equal once the prior counts for as much.
    freedom = len(rows) - CLASSES
    part = Part(weight=1.0, prior=shrinkage / (1 - shrinkage) * freedom)
    weights, bias = layer(Statistics.of(rows, targets, CLASSES), None, Settings("gda", pictures=part))
    ours = (rows @ weights.T + bias) * len(rows) / freedom
    expected = theirs.decision_function(rows)
    differences = ours - expected - (ours - expected).mean(axis=1, keepdims=True)
    assert np.abs(differences).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("likeness", [0.0, 0.1, 2.0])
def test_leaving_out_by_update_is_fitting_without(world: World, likeness: float) -> None:
    rows, targets = world.draw(SHOTS)
    kept = np.flatnonzero((targets > 1) | (np.arange(len(rows)) < 3 * CLASSES) & (targets > 0))
    kept = np.append(kept, 0)  # 6 of three classes, 3 of one, and one that cannot be left out
    rows, targets = rows[kept], targets[kept]
    texts = world.texts.astype(np.float64)
    moments = _Moments.of(Statistics.of(rows, targets, CLASSES), 0.0, texts)
    told = np.flatnonzero(targets > 0)
    (_, found), spread = moments.without_each(
        rows[told].astype(np.float64), targets[told], 7.0, (1.0, likeness)
    )
    assert np.bincount(targets).tolist() == [1, 3, 6, 6, 6]
    for logits, picture in zip(found, told, strict=True):
        others = np.arange(len(rows)) != picture
        without = _Moments.of(Statistics.of(rows[others], targets[others], CLASSES), 0.0, texts)
        same_target = replace(without, target=moments.target)
        weights, bias = same_target.discriminant(Part(1.0, 7.0, spread, likeness))
        expected = rows[picture] @ weights.T + bias
        assert logits - logits[0] == pytest.approx(expected - expected[0], rel=1e-9, abs=1e-9)


def test_means_are_those_of_a_gaussian_process(world: World) -> None:
    process = pytest.importorskip("sklearn.gaussian_process")
    rows, targets = world.draw(SHOTS)
    unequal = np.arange(len(rows)) < len(rows) - 3
    statistics = Statistics.of(rows[unequal], targets[unequal], CLASSES)
    moments = _Moments.of(statistics, 0.0, world.texts.astype(np.float64))
    smoothing, _ = moments.smoothing(0.5)
    differences = (world.texts - world.texts.mean(axis=0)).astype(np.float64)
    differences *= (CLASSES / (differences**2).sum()) ** 0.5
    kernels = process.kernels
    kernel = kernels.ConstantKernel(0.5, "fixed") * kernels.DotProduct(1e-3, "fixed")
    kernel += kernels.ConstantKernel(1e6, "fixed")  # the mean of all may be any
    # What a class has by itself: a white kernel would be noise to scikit-learn, a narrow one is the same.
    kernel += kernels.ConstantKernel(0.05, "fixed") * kernels.RBF(1e-6, "fixed")
    regression = process.GaussianProcessRegressor(kernel, alpha=1 / statistics.counts, optimizer=None)
    expected = regression.fit(differences, statistics.means).predict(differences)
    assert smoothing @ statistics.means == pytest.approx(expected, abs=1e-6)


def test_classes_of_like_names_tell_of_each_other() -> None:
    """Where names are right, few pictures of many classes give better means than each class has."""
    gains = []
    for seed in range(5):
        world = World(seed, classes=12, width=32)
        world.texts = unit(world.centres @ np.diag(np.arange(32) < 3))  # names differ in three things
        world.centres = world.texts @ world.random.standard_normal((32, 32)) / 2
        rows, targets = world.draw(4)
        shown, truth = world.draw(60)
        names = [str(number) for number in range(12)]
        head = fit_head(rows, targets, names, space=SPACE, zero_shot=world.texts, scale=20.0)
        part = replace(head.settings.pictures, likeness=0.0)
        alone = replace(head.settings, pictures=part)
        by_itself = fit_head(rows, targets, names, space=SPACE, zero_shot=world.texts, settings=alone)
        assert head.settings.pictures.likeness > 0
        right = [(each.logits(shown).argmax(axis=1) == truth).mean() for each in (head, by_itself)]
        gains.append(right[0] - right[1])
    assert np.mean(gains) > 0.02


def test_classes_of_many_pictures_are_not_preferred() -> None:
    """The squared length of a mean of few is too large by chance; without the correction 20 beat 200."""
    random = np.random.default_rng(1)
    rows = unit(np.eye(1, WIDTH) * 4 + random.standard_normal((4400, WIDTH)))  # all of one kind
    targets = (np.arange(4400) >= 200).astype(np.intp)
    few = np.concatenate([np.arange(5), np.arange(200, 400)])
    head = fit_head(rows[few], targets[few], ("few", "many"), space=SPACE)
    assert abs(float(head.logits(rows[400:]).argmax(axis=1).mean()) - 0.5) < 0.25


def test_pictures_help_where_words_are_poor(world: World) -> None:
    shown, truth = world.draw(60)
    by_words = float(((shown @ world.texts.T).argmax(axis=1) == truth).mean())
    rows, targets = world.draw(16)
    fitted = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    right = float((fitted.logits(shown).argmax(axis=1) == truth).mean())
    assert by_words < 0.9
    assert right > by_words + 0.05


def test_one_picture_a_class_leaves_clear_answers_of_words_alone() -> None:
    world = World(seed=3)
    world.texts = unit(world.centres)
    shown, _ = world.draw(100)
    sure = np.sort(shown @ world.texts.T, axis=1)
    clear = sure[:, -1] - sure[:, -2] > 0.2
    rows, targets = world.draw(1)
    fitted = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    assert clear.sum() > 100
    assert (fitted.logits(shown).argmax(axis=1) == (shown @ world.texts.T).argmax(axis=1))[clear].all()


@pytest.mark.parametrize("method", ["gda", "mean"])
def test_heads_without_words_have_none(world: World, method: str) -> None:
    rows, targets = world.draw(SHOTS)
    fitted = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, method=method)  # type: ignore[arg-type]
    assert fitted.zero_shot is None
    assert (fitted.logits(rows).argmax(axis=1) == targets).mean() > 0.8


def test_nearest_mean_is_what_it_says(world: World) -> None:
    rows, targets = world.draw(SHOTS)
    shown, _ = world.draw(20)
    fitted = fit_head(rows, targets, NAMES, space=SPACE, method="mean")
    means = np.stack([rows[targets == each].mean(axis=0) for each in range(CLASSES)])
    nearest = ((shown[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (fitted.logits(shown).argmax(axis=1) == nearest).all()


def test_order_of_pictures_does_not_matter_and_input_gives_equal_bytes(world: World) -> None:
    rows, targets = world.draw(SHOTS)
    first = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    again = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    assert first.to_bytes() == again.to_bytes()
    turned = np.random.default_rng(0).permutation(len(rows))
    other = fit_head(rows[turned], targets[turned], NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    assert np.allclose(first.weights, other.weights, rtol=1e-5, atol=1e-6)


def test_scores_of_held_out_pictures_are_right_as_often_as_they_say(world: World) -> None:
    rows, targets = world.draw(20)
    fitted = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    shown, truth = world.draw(400)
    logits = fitted.logits(shown).astype(np.float64)
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    assert abs(float(scores.max(axis=1).mean()) - float((logits.argmax(axis=1) == truth).mean())) < 0.06


def test_held_out_pictures_are_judged_by_heads_of_the_others(world: World) -> None:
    rows, targets = world.draw(SHOTS)
    found = held_out(rows, targets, NAMES, zero_shot=world.texts, scale=20.0, folds=3)
    assert found is not None
    assert found.zero_shot is not None
    assert sorted(found.places.tolist()) == list(range(len(rows)))
    first = found.places[:10]
    kept = ~np.isin(np.arange(len(rows)), first)
    by_hand = fit_head(rows[kept], targets[kept], NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    assert np.allclose(found.logits[:10], by_hand.logits(rows[first]), atol=1e-4)
    single = held_out(*world.draw(1), NAMES, zero_shot=world.texts)
    assert single is None


def test_pictures_of_small_classes_are_held_out_at_different_times(world: World) -> None:
    """Two pictures a class in five parts: no part leaves every class with one picture."""
    rows, targets = world.draw(2)
    found = held_out(rows, targets, NAMES, zero_shot=world.texts, scale=20.0)
    assert found is not None
    assert sorted(found.places.tolist()) == list(range(10))
    kept = ~np.isin(np.arange(10), found.places[:2])
    by_hand = fit_head(rows[kept], targets[kept], NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    assert np.allclose(found.logits[:2], by_hand.logits(rows[found.places[:2]]), atol=1e-4)


# --- classes come and go -----------------------------------------------------------------------------------


def test_a_class_added_gives_the_head_of_all_pictures_bit_for_bit(world: World) -> None:
    rows, targets = world.draw(SHOTS)
    old = targets < CLASSES - 2
    texts = world.texts
    whole = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=texts, scale=20.0)
    head = fit_head(rows[old], targets[old], NAMES[:-2], space=SPACE, zero_shot=texts[:-2], scale=20.0)
    grown = extended(head, rows[~old], targets[~old] - 3, NAMES[-2:], zero_shot=texts[-2:])
    assert grown.to_bytes() == whole.to_bytes()
    for name in NAMES[-2:]:
        grown = without_class(grown, name)
    assert grown.to_bytes() == head.to_bytes()


def test_pictures_added_to_known_classes_count_with_the_old_ones(world: World) -> None:
    rows, targets = world.draw(SHOTS)
    whole = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    first = 3 * CLASSES
    head = fit_head(rows[:first], targets[:first], NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    backwards = CLASSES - 1 - targets[first:]
    grown = extended(head, rows[first:], backwards, NAMES[::-1], zero_shot=world.texts[::-1])
    assert grown.to_bytes() == whole.to_bytes()


def test_numbers_of_very_different_size_are_added_up_in_one_order(world: World) -> None:
    rows, targets = world.draw(SHOTS)
    rows = rows * np.where(np.arange(WIDTH) < 20, 10.0 ** -world.random.uniform(0, 12, rows.shape), 1)
    rows = unit(rows)
    whole = fit_head(rows, targets, NAMES, space=SPACE)
    first = 3 * CLASSES
    grown = extended(
        fit_head(rows[:first], targets[:first], NAMES, space=SPACE), rows[first:], targets[first:], NAMES
    )
    assert grown.to_bytes() == whole.to_bytes()


def test_classes_of_more_pictures_than_dimensions_keep_their_moments(world: World) -> None:
    rows, targets = world.draw(3 * WIDTH)
    old = targets != 2
    settings = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, scale=20.0).settings
    whole = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, settings=settings)
    assert not whole.statistics.whole
    assert max(map(len, whole.statistics.rows)) == WIDTH
    names = [name for name in NAMES if name != NAMES[2]]
    places = np.delete(np.arange(CLASSES), 2)
    compact = np.searchsorted(places, targets[old])
    texts = world.texts[places]
    expected = fit_head(rows[old], compact, names, space=SPACE, zero_shot=texts, settings=settings)
    shorter = without_class(whole, NAMES[2])
    assert shorter.settings == settings  # single pictures are gone, so nothing is chosen again
    assert np.allclose(shorter.weights, expected.weights, rtol=1e-5, atol=1e-5)
    assert np.allclose(shorter.bias, expected.bias, rtol=1e-5, atol=1e-5)
    back = extended(shorter, rows[~old], targets[~old] * 0, [NAMES[2]], zero_shot=world.texts[[2]])
    order = [back.names.index(name) for name in NAMES]
    assert np.allclose(back.weights[order], whole.weights, rtol=1e-5, atol=1e-5)


def test_adding_and_removing_refuse_what_cannot_be(world: World, head: FewShotHead) -> None:
    rows, targets = world.draw(1)
    with pytest.raises(ConfigError, match=r"no class 'class 9', expected one of 'class 0'"):
        without_class(head, "class 9")
    pair = fit_head(rows[:2], targets[:2], NAMES[:2], space=SPACE)
    with pytest.raises(ConfigError, match=r"without 'class 0' one class would be left"):
        without_class(pair, "class 0")
    with pytest.raises(ConfigError, match="give the text rows of the new names"):
        extended(head, rows[:1], targets[:1], ["new"])
    with pytest.raises(InputError, match="got embeddings of 23 numbers, it has 24"):
        extended(head, unit(rows[:1, 1:]), targets[:1], ["new"], zero_shot=world.texts[:1, 1:])


# --- input -------------------------------------------------------------------------------------------------


def test_input_that_is_none_is_refused(world: World) -> None:
    rows, targets = world.draw(2)

    def fit(
        embeddings: Rows = rows, wanted: NDArray[np.intp] = targets, names: tuple[str, ...] = NAMES
    ) -> None:
        fit_head(embeddings, wanted, names, space=SPACE)

    with pytest.raises(ConfigError, match=r"got the classes 'class 0', expected at least 2"):
        fit(rows[:1], targets[:1], NAMES[:1])
    with pytest.raises(InputError, match="class 'class 4' has no pictures"):
        fit(rows[:4], targets[:4])
    with pytest.raises(InputError, match="row 3 of the embeddings is not of length 1"):
        fit(np.where(np.arange(len(rows))[:, None] == 3, 2 * rows, rows))
    with pytest.raises(InputError, match="row 0 of the embeddings is not of length 1"):
        fit(np.full_like(rows, np.nan))
    with pytest.raises(InputError, match="not all classes 0 to 4"):
        fit(rows, targets + 1)
    with pytest.raises(ConfigError, match="the class 'class 0' is given twice"):
        fit(rows, targets, (NAMES[0], *NAMES[:-1]))
    with pytest.raises(ConfigError, match="'blend' needs text rows"):
        fit_head(rows, targets, NAMES, space=SPACE, method="blend")
    with pytest.raises(InputError, match=r"text rows of float32 \(4, 24\), expected floats \(5, 24\)"):
        fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts[:4])


def test_pictures_that_are_all_alike_give_a_head() -> None:
    rows = np.repeat(np.eye(3, WIDTH, dtype=np.float32), 4, axis=0)
    head = fit_head(rows, np.repeat(np.arange(3), 4), "abc", space=SPACE, zero_shot=rows[::4], scale=20.0)
    assert (head.logits(rows).argmax(axis=1) == np.repeat(np.arange(3), 4)).all()


# --- file --------------------------------------------------------------------------------------------------


def test_a_head_comes_back_from_its_file(head: FewShotHead, tmp_path: Path) -> None:
    path = tmp_path / "my.head"
    head.save(path)
    back = FewShotHead.open(path)
    assert back.to_bytes() == head.to_bytes() == path.read_bytes()
    assert (back.names, back.space, back.settings) == (head.names, head.space, head.settings)
    tensors, metadata = read_tensors(path.read_bytes())
    assert metadata["format"] == "edgeclip-few-shot-head"
    assert set(tensors) == {"weights", "bias", "counts", "sums", "rows", "row_counts", "zero_shot"}


def test_a_linear_head_answers_with_its_layer(world: World, head: FewShotHead) -> None:
    rows, _ = world.draw(3)
    logits = head.logits(rows)
    linear = LinearHead(head.bias)
    ranked = best_of(linear.similarity(rows @ head.weights.T), linear, top_k=CLASSES)
    assert [best[0][1] for best in ranked] == logits.argmax(axis=1).tolist()
    assert [sum(score for _, _, score in best) for best in ranked] == pytest.approx([1.0] * len(rows))


def test_flipped_bits_are_noticed_or_harmless(head: FewShotHead) -> None:
    content = head.to_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(content), 300).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        with contextlib.suppress(InputError):
            assert np.array_equal(FewShotHead.from_bytes(bytes(damaged)).weights, head.weights)
    for length in (0, 7, 100, len(content) - 1):
        with pytest.raises(InputError, match="damaged"):
            FewShotHead.from_bytes(content[:length], source="damaged")


def test_files_that_are_no_heads_are_refused(head: FewShotHead, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing.head' cannot be read: No such file"):
        FewShotHead.open(tmp_path / "missing.head")
    with pytest.raises(InputError, match="but no few-shot head"):
        FewShotHead.from_bytes(write_tensors({"weights": head.weights}))
    tensors, metadata = read_tensors(head.to_bytes())
    del metadata["crc32"]

    def changed(tensors: dict[str, NDArray[np.generic]], **said: str) -> bytes:
        return write_tensors(tensors, {**metadata, **said})

    with pytest.raises(InputError, match="head schema '2', expected '1'; install a newer edgeclip"):
        FewShotHead.from_bytes(changed(tensors, schema="2"))
    for wrong in (
        changed({**tensors, "bias": tensors["bias"][1:]}),
        changed({**tensors, "weights": tensors["weights"].astype(np.float64)}),
        changed({**tensors, "weights": tensors["weights"] * np.float32(np.nan)}),
        changed({**tensors, "counts": tensors["counts"] * 0}),
        changed({**tensors, "rows": tensors["rows"][1:]}),
        changed({**tensors, "row_counts": tensors["row_counts"][::-1] * -1}),
        changed({**tensors, "zero_shot": tensors["zero_shot"] * np.float32(2)}),
        changed({key: value for key, value in tensors.items() if key != "sums"}),
        changed(tensors, names="[]"),
        changed(tensors, names=json.dumps(["a"] * CLASSES)),
        changed(tensors, names=json.dumps([*NAMES[1:], "\x1b[2J"])),
        changed(tensors, names=json.dumps([*NAMES[1:], " "])),
        changed(tensors, settings="{}"),
        changed(tensors, settings="[]"),
        changed(tensors, settings=metadata["settings"].replace("blend", "magic")),
        changed(tensors, settings=json.dumps({**json.loads(metadata["settings"]), "scale": "NaN"})),
    ):
        with pytest.raises(InputError, match=r"^head data: .*(fit .*again|expected float32|has no pictures)"):
            FewShotHead.from_bytes(wrong)


# --- none of these -----------------------------------------------------------------------------------------


def test_a_gate_tells_strangers_and_accepts_its_own() -> None:
    accepted, told = [], []
    for seed in range(10):
        world = World(seed)
        rows, targets = world.draw(12)
        known = targets < 3
        texts = world.texts[:3]
        head = fit_head(rows[known], targets[known], NAMES[:3], space=SPACE, zero_shot=texts, scale=20.0)
        gate = gate_of(head)
        shown, truth = world.draw(100)
        own, others = head.logits(shown), shown @ gate.rows.T
        scores = gate.scores(own, others)
        assert np.isfinite(scores).all()
        assert np.array_equal(scores, gate.alone(own, others).max(axis=1))
        accepted.append((scores >= gate.threshold)[truth < 3].mean())
        told.append(auroc(scores, truth < 3))
    assert np.mean(accepted) == pytest.approx(0.96, abs=0.03)
    assert np.mean(told) > 0.75
    assert gate_of(head, 1.5).threshold == 1.5
    assert gate.rows.dtype == np.float32


def test_one_picture_without_words_tells_no_stranger(world: World) -> None:
    rows, targets = world.draw(1)
    with pytest.raises(ConfigError, match="fit it on more pictures"):
        gate_of(fit_head(rows, targets, NAMES, space=SPACE))
    by_words = fit_head(rows, targets, NAMES, space=SPACE, zero_shot=world.texts, scale=20.0)
    assert by_words.settings.rejecting is not None
    assert by_words.settings.rejecting.pictures == 0


def test_settings_say_what_the_layer_is(world: World, head: FewShotHead) -> None:
    assert head.zero_shot is not None
    silent = replace(head.settings, pictures=Part(), words=Part(), zero_shot=3.0)
    weights, bias = layer(head.statistics, head.zero_shot, silent)
    assert np.allclose(weights, 3 * head.zero_shot)
    assert not bias.any()
