from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import train_probes as probes  # noqa: E402

from edgeclip.evaluate.metrics import median_similarity, wilson_interval  # noqa: E402
from edgeclip.evaluate.zero_shot import evaluate_embedder  # noqa: E402
from edgeclip.models.checkpoints import load_checkpoint, read_checkpoint_info  # noqa: E402
from edgeclip.models.clip import CLIP  # noqa: E402
from edgeclip.models.config import CLIPConfig  # noqa: E402
from edgeclip.models.reparam import reparameterize  # noqa: E402
from edgeclip.shapes import LANGUAGES, held_out_combinations, label  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

PROBES = Path(__file__).parent.parent / "data" / "probes"
NAMES = ("mobileclip", "tinyclip", "vit")
# Fresh pictures: another seed than the recorded accuracy has.
FRESH_SEED, FRESH = 7, 240
FOLDING = 1e-9
SCALES = ("layer_scale", "attention_scale", "ffn_scale")


@lru_cache
def _probe(name: str) -> tuple[CLIP, CLIPConfig, Tokenizer, dict[str, Any]]:
    directory = PROBES / name
    said = json.loads((directory / "recipe.json").read_text("utf-8"))
    config = read_checkpoint_info(directory).config
    return load_checkpoint(directory), config, Tokenizer.open(directory), said


@lru_cache
def _pictures(size_px: int) -> tuple[torch.Tensor, list[int]]:
    return probes.held_out_pictures(FRESH, size_px, seed=FRESH_SEED)


def test_there_is_a_probe_of_every_recipe() -> None:
    assert set(NAMES) == set(probes.RECIPES) == {path.name for path in PROBES.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_is_small_and_the_one_its_recipe_describes(name: str) -> None:
    _, config, tokenizer, said = _probe(name)
    weights = PROBES / name / "model.safetensors"
    assert weights.stat().st_size <= 3_000_000
    assert said["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert config == probes.RECIPES[name].config
    assert tokenizer.digest == probes.shapes_tokenizer().digest


@pytest.mark.parametrize("name", NAMES)
def test_recipe_and_training_code_are_those_the_probe_was_made_with(name: str) -> None:
    recipe = probes.RECIPES[name]
    said = _probe(name)[3]
    assert said["recipe"] == recipe.to_dict(), "another recipe: train again (tests/tools/train_probes.py)"
    assert {key: said[key] for key in probes.hashes(recipe)} == probes.hashes(recipe), (
        "the training code has changed: train again, or --restamp where no number changes"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_meets_its_bars(name: str) -> None:
    said = _probe(name)[3]
    assert said["held_out"]["en"]["top1"]["value"] >= 0.8
    assert said["held_out"]["en"]["n"] == probes.EVALUATED
    assert said["held_out"]["en"]["labels"] == len(held_out_combinations()) >= 200
    assert said["median_image_cosine"] < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_does_on_fresh_pictures_what_it_is_said_to_do(name: str) -> None:
    model, config, tokenizer, said = _probe(name)
    pictures, targets = _pictures(config.image_size_px[0])
    embeddings = probes.embed_pictures(model, config, pictures)
    assert median_similarity(embeddings) < 0.9
    for language in LANGUAGES:
        report = probes.evaluate_zero_shot(
            embeddings, probes.embed_labels(model, tokenizer, language), targets
        )
        recorded = said["held_out"][language]["top1"]
        hits = round(report.top1.value * FRESH)
        # 99.9 %: one seed, so the chance is taken once
        low, high = wilson_interval(hits, FRESH, confidence=0.999)
        assert low <= recorded["high"], (language, report.top1, recorded)
        assert high >= recorded["low"], (language, report.top1, recorded)


@pytest.mark.parametrize("name", NAMES)
def test_folding_a_trained_probe_changes_nothing(name: str) -> None:
    _, config, tokenizer, _ = _probe(name)
    model = load_checkpoint(PROBES / name).double()
    folded = reparameterize(model)
    pictures = _pictures(config.image_size_px[0])[0][:128]
    texts = [
        label(combination, language) for combination in held_out_combinations()[:60] for language in LANGUAGES
    ]
    tokens = torch.from_numpy(tokenizer(texts)).long()
    with torch.inference_mode():
        image = probes.normalized(pictures[:64], config, torch.float64)
        for before, after in (
            (model.encode_image(image), folded.encode_image(image)),
            (model.encode_text(tokens), folded.encode_text(tokens)),
        ):
            assert before.dtype == torch.float64
            relative = (before - after).abs().max() / before.abs().max()
            assert relative <= FOLDING, float(relative)
    embeddings = [probes.embed_pictures(each, config, pictures) for each in (model, folded)]
    for language in LANGUAGES:
        first, second = (
            np.argmax(rows @ probes.embed_labels(each, tokenizer, language).T, axis=1)
            for rows, each in zip(embeddings, (model, folded), strict=True)
        )
        assert (first == second).all()


def test_the_mobileclip_probe_has_trained_structure_to_fold() -> None:
    model, config, _, said = _probe("mobileclip")
    fresh = probes.fresh_model(probes.RECIPES["mobileclip"])
    scales = {key: value for key, value in model.state_dict().items() if key.endswith(SCALES)}
    assert any(key.startswith("image_tower") for key in scales)
    assert any(key.startswith("text_tower") for key in scales)
    initial = said["recipe"]["layer_scale"]
    for key, value in scales.items():
        assert (value - initial).abs().mean() > 0.1 * initial, key
    trained, untrained = model.state_dict(), fresh.state_dict()
    for part in ("running_mean", "running_var", "norm.weight", ".position.conv.", ".se."):
        keys = [key for key in trained if part in key and key.startswith("image_tower")]
        assert keys, part
        for key in keys:
            change = (trained[key] - untrained[key]).norm() / (untrained[key].norm() + 1)
            assert change > 0.005, (key, float(change))
    kinds = {type(module).__name__ for module in model.image_tower.modules()}
    assert {"BatchNorm2d", "SqueezeExcite", "PositionEncoding", "RepMixer", "Attention"} <= kinds
    # Setting the layer scales to nothing must cost accuracy: the blocks behind them are used.
    pictures, targets = _pictures(config.image_size_px[0])
    tokenizer = _probe("mobileclip")[2]
    without = load_checkpoint(PROBES / "mobileclip")
    with torch.no_grad():
        for key, parameter in without.image_tower.named_parameters():
            if key.endswith(SCALES):
                parameter.zero_()
    reports = [
        probes.evaluate_zero_shot(
            probes.embed_pictures(each, config, pictures), probes.embed_labels(each, tokenizer, "en"), targets
        )
        for each in (model, without)
    ]
    assert reports[1].top1.value < 0.7 * reports[0].top1.value


def test_the_tinyclip_probe_has_layers_that_differ() -> None:
    config = _probe("tinyclip")[1]
    for tower in (config.image, config.text):
        assert len(set(tower.heads)) > 1  # type: ignore[union-attr]
        assert len(set(tower.hidden_dims)) > 1  # type: ignore[union-attr]


def test_an_eager_probe_is_evaluated_from_files(tmp_path: Path) -> None:
    from edgeclip.bundle import PreprocessSpec
    from edgeclip.data import read_samples
    from edgeclip.label_sets import read_labels
    from edgeclip.preprocess import Preprocess
    from edgeclip.shape_files import write_shapes

    model, config, tokenizer, said = _probe("mobileclip")
    write_shapes(tmp_path / "set", train=1, held_out=100, size_px=config.image_size_px[0], seed=11)
    labels = read_labels(tmp_path / "set" / "labels.json")
    report = evaluate_embedder(
        lambda pictures: probes.embed_pictures(model, config, torch.from_numpy(pictures)),
        read_samples([tmp_path / "set" / "held_out.jsonl"]),
        probes.embed_labels(model, tokenizer, "en"),
        labels=labels.names,
        preprocess=Preprocess(PreprocessSpec(image_size_px=config.image_size_px)),
    )
    low, high = wilson_interval(round(report.top1.value * 100), 100, confidence=0.999)
    assert low <= said["held_out"]["en"]["top1"]["value"] <= high


# --- training ----------------------------------------------------------------------------------------------


def test_equal_combinations_are_no_negatives() -> None:
    random = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(4, 8, generator=random), dim=-1) for _ in range(2)
    )
    scale = torch.tensor(10.0)
    every = probes.contrastive_loss(image, text, scale, torch.tensor([0, 1, 2, 3]))
    logits = 10 * image @ text.T
    target = torch.arange(4)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(every, (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2)
    some = probes.contrastive_loss(image, text, scale, torch.tensor([0, 0, 2, 3]))
    without = logits.clone()
    without[0, 1] = without[1, 0] = -torch.inf
    torch.testing.assert_close(some, (cross_entropy(without, target) + cross_entropy(without.T, target)) / 2)


def test_an_order_gives_every_picture_once_and_blocks_of_distinct_combinations() -> None:
    order = probes._order(25, 10, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(25))
    assert sorted(len(set(range(start, start + 10)) & set(order[:10])) for start in (0, 10, 20))[-1] in (
        5,
        10,
    )


def test_what_is_pruned_is_what_does_least() -> None:
    parent = probes.fresh_model(probes.RECIPES["vit"]).eval()
    config = probes.RECIPES["vit"].config
    child = dataclasses.replace(
        config,
        image=dataclasses.replace(config.image, heads=(3, 2, 1), hidden_dims=(192, 190, 100)),
        text=dataclasses.replace(config.text, heads=(1, 3), hidden_dims=(100, 192)),
    )
    random = torch.Generator().manual_seed(0)
    for tower, made in ((parent.image_tower, child.image), (parent.text_tower, child.text)):
        for layer, heads, hidden in zip(tower.transformer.layers, made.heads, made.hidden_dims, strict=True):
            with torch.no_grad():  # what is left out has no effect
                gone = torch.randperm(3, generator=random)[heads:]
                layer.attention.out.weight.unflatten(1, (3, 32))[:, gone] = 0
                layer.fc2.weight[:, torch.randperm(192, generator=random)[hidden:]] = 0
    pruned = probes.inherited(probes.build_clip(child), parent).eval()
    assert sum(each.numel() for each in pruned.parameters()) < sum(
        each.numel() for each in parent.parameters()
    )
    image = torch.randn(2, 3, 64, 64, generator=random)
    tokens = torch.randint(0, 800, (2, probes.CONTEXT_LENGTH), generator=random)
    tokens[:, 9] = 836
    with torch.inference_mode():
        torch.testing.assert_close(pruned.encode_image(image), parent.encode_image(image))
        torch.testing.assert_close(pruned.encode_text(tokens), parent.encode_text(tokens))


def test_look_alikes_have_two_colours_and_textures() -> None:
    looks = torch.tensor([(colour, texture) for colour in range(10) for texture in range(4)] * 15)
    random = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        batch = probes._look_alikes(looks, 20, random)
        assert len(set(batch.tolist())) == 20
        assert all(len(column.unique()) == 2 for column in looks[batch].T)
        seen |= set(batch.tolist())
    assert len(seen) > 200


def test_shifted_pictures_repeat_their_edge() -> None:
    pictures = torch.arange(5 * 6 * 6 * 3, dtype=torch.uint8).reshape(5, 6, 6, 3)
    shifted = probes._shifted(pictures, 2, torch.Generator().manual_seed(1))
    for before, after in zip(pictures, shifted, strict=True):
        padded = np.pad(before.numpy(), ((2, 2), (2, 2), (0, 0)), mode="edge")
        windows = [padded[y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
        assert any((window == after.numpy()).all() for window in windows)
    assert (probes._shifted(pictures, 0, torch.Generator()) == pictures).all()


@pytest.mark.slow
def test_a_short_training_learns_well_above_chance() -> None:
    recipe = dataclasses.replace(probes.RECIPES["mobileclip"], steps=120, warmup=10, batch=64, alike=0)
    data = probes.training_data(recipe, probes.shapes_tokenizer(), limit=120 * 64)
    losses: list[float] = []
    model = probes.train(recipe, data, progress=lambda step, loss: losses.append(loss))
    reports, _ = probes.evaluate(model, recipe.config, probes.shapes_tokenizer(), count=400)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    for report in reports.values():
        assert report.top1.low > 10 / report.labels  # ten times chance
