from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from train_runs import FASTVIT as TINY_FASTVIT  # noqa: E402
from train_runs import STAGE, make_data, run, weights  # noqa: E402
from train_runs import VIT as TINY_VIT  # noqa: E402

from edgeclip.distill.accumulate import backward_in_parts  # noqa: E402
from edgeclip.distill.recompute import blocks_of, held_statistics, recomputed_blocks  # noqa: E402
from edgeclip.models.attention import TransformerLayer  # noqa: E402
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import (  # noqa: E402
    CLIPConfig,
    EfficientNetImageConfig,
    FastViTConfig,
    ImageConfig,
    TextTransformerConfig,
    ViTConfig,
)
from edgeclip.models.fastvit import AttentionBlock, Downsample  # noqa: E402
from edgeclip.models.mobileone import MobileOneBlock, RepMixerBlock  # noqa: E402
from edgeclip.models.text_transformer import ConvLayer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = ViTConfig(
    width=24, heads=(2, 2, 2), hidden_dims=(48, 48, 48), head_dim=12, patch_px=8, grid=(4, 4), embed_dim=16
)
FASTVIT = FastViTConfig(
    dims=(8, 16, 32),
    depths=(1, 2, 1),
    mixers=("repmixer", "repmixer", "attention"),
    head_dim=8,
    embed_dim=16,
    layer_scale_init=0.5,
)
LITE = EfficientNetImageConfig(backbone="lite0", embed_dim=16)
TOWERS: dict[str, tuple[ImageConfig, bool, int]] = {
    "vit": (VIT, False, 32),
    "fastvit": (FASTVIT, True, 64),
    "efficientnet-lite": (LITE, False, 64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), train=96, held_out=8)


def build(name: str) -> tuple[CLIP, Any, Any]:
    image, conv_ends, side = TOWERS[name]
    text = TextTransformerConfig(
        vocab_size=50,
        context_length=8,
        width=24,
        heads=(2, 2),
        hidden_dims=(48, 48),
        head_dim=12,
        embed_dim=16,
        attention="full" if conv_ends else "causal",
        conv_ends=conv_ends,
        conv_kernel=3,
    )
    torch.manual_seed(0)
    config = CLIPConfig(name="tiny", image_size_px=(side, side), image=image, text=text)
    model = build_clip(config).double().train()
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(6, 3, side, side, dtype=torch.float64, generator=generator)
    tokens = torch.randint(1, 49, (6, 8), generator=generator)
    return model, pictures, tokens


def embed(model: CLIP, part: tuple[Any, Any]) -> tuple[Any, Any]:
    return model.encode_image(part[0]), model.encode_text(part[1])


def loss(image: Any, text: Any) -> Any:
    logits = 10 * nn.functional.normalize(image, dim=-1) @ nn.functional.normalize(text, dim=-1).T
    return nn.functional.cross_entropy(logits, torch.arange(len(image)))


def gradients(model: CLIP) -> dict[str, Any]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_step(model: CLIP, pictures: Any, tokens: Any, *, recompute: bool) -> dict[str, Any]:
    with recomputed_blocks(model) if recompute else nullcontext():
        value = loss(*embed(model, (pictures, tokens)))
    value.backward()
    return gradients(model)


@pytest.mark.parametrize("name", list(TOWERS))
def test_gradients_and_statistics_are_those_without(name: str) -> None:
    model, pictures, tokens = build(name)
    again = copy.deepcopy(model)
    expected = one_step(model, pictures, tokens, recompute=False)
    found = one_step(again, pictures, tokens, recompute=True)
    assert expected.keys() == found.keys()
    for parameter, value in expected.items():
        assert torch.equal(found[parameter], value), parameter
    before = build(name)[0].state_dict()
    after, theirs = again.state_dict(), model.state_dict()
    for buffer, value in model.named_buffers():
        assert torch.equal(after[buffer], value), buffer
    moved = [
        key for key in after if key.endswith("running_mean") and not torch.equal(after[key], before[key])
    ]
    assert len(moved) == sum(key.endswith("running_mean") for key in theirs)
    counts = {int(value) for key, value in after.items() if key.endswith("num_batches_tracked")}
    assert counts <= {1}


@pytest.mark.parametrize("name", ["vit", "fastvit"])
def test_it_works_with_parts(name: str) -> None:
    model, pictures, tokens = build(name)
    again = copy.deepcopy(model)
    parts = [(pictures[:3], tokens[:3]), (pictures[3:], tokens[3:])]

    def kept(which: CLIP, recompute: bool) -> Any:
        def run(part: tuple[Any, Any]) -> tuple[Any, Any]:
            first = held_statistics(which) if not torch.is_grad_enabled() else nullcontext()
            with first, recomputed_blocks(which) if recompute else nullcontext():
                return embed(which, part)

        return run

    values = [
        backward_in_parts(kept(which, recompute), parts, loss)
        for which, recompute in ((model, False), (again, True))
    ]
    assert torch.equal(*values)
    expected, found = gradients(model), gradients(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for (key, mine), (_, other) in zip(again.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(mine, other), key
        if key.endswith("num_batches_tracked"):
            assert mine == len(parts)


def test_frozen_batch_norms_stay_frozen() -> None:
    model, pictures, tokens = build("fastvit")
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    before = {key: value.clone() for key, value in model.named_buffers()}
    again = copy.deepcopy(model)
    expected = one_step(model, pictures, tokens, recompute=False)
    found = one_step(again, pictures, tokens, recompute=True)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(value, before[key]) for key, value in again.named_buffers())


def test_chance_inside_a_block_is_the_same_twice() -> None:
    model, pictures, tokens = build("vit")
    for layer in model.image_tower.transformer.layers:
        layer.activation = nn.Sequential(layer.activation, nn.Dropout(0.3))
    again = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = one_step(model, pictures, tokens, recompute=False)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    found = one_step(again, pictures, tokens, recompute=True)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_less_is_kept() -> None:
    """What autograd keeps for the backward pass, counted where it is packed away."""

    def kept_bytes(recompute: bool) -> int:
        model, pictures, tokens = build("vit")
        parameters = {p.data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Any) -> Any:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, recomputed_blocks(model) if recompute else nullcontext():
            value = loss(*embed(model, (pictures, tokens)))
        assert value.requires_grad
        return sum(kept.values())

    assert kept_bytes(True) < 0.4 * kept_bytes(False)


def test_a_model_is_as_it_was_afterwards() -> None:
    model, pictures, tokens = build("fastvit")
    before = [(type(module), sorted(module.__dict__)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop here"), recomputed_blocks(model):
        raise RuntimeError("stop here")
    one_step(model, pictures, tokens, recompute=True)
    assert [(type(module), sorted(module.__dict__)) for module in model.modules()] == before


def test_blocks_are_the_outermost() -> None:
    model, _, _ = build("fastvit")
    found = blocks_of(model)
    kinds = {type(block) for block in found}
    assert kinds == {
        AttentionBlock,
        ConvLayer,
        Downsample,
        MobileOneBlock,
        RepMixerBlock,
        TransformerLayer,
    }
    inside = {id(child) for block in found for child in block.modules() if child is not block}
    assert not inside & {id(block) for block in found}


PRUNE = """
[stage.prune]
image = 0.5
text = 0.6
gates = ["channels", "heads", "neurons", "layers"]
warmup = 1
"""
TOKENS = '[[stage.loss]]\nkind = "token-alignment"\n[[stage.loss]]\nkind = "masked-tokens"\n'


@pytest.mark.parametrize(
    ("student", "table", "parts"),
    [
        (TINY_FASTVIT, "", 1),
        (TINY_FASTVIT, "", 2),
        (TINY_FASTVIT, TOKENS, 2),
        (TINY_VIT, PRUNE, 2),
        (TINY_VIT, TOKENS, 1),
    ],
    ids=["fastvit", "parts", "tokens in parts", "masks", "tokens"],
)
def test_a_stage_that_recomputes_ends_with_the_same_weights(
    student: str, table: str, parts: int, folder: Path, tmp_path: Path
) -> None:
    changes = (f"stage.0.parts={parts}", "stage.0.samples=96", "stage.0.schedule.warmup=0")
    kept, again = tmp_path / "kept", tmp_path / "again"
    run(folder, kept, STAGE + table, student=student, changes=changes)
    changes = (*changes, "stage.0.checkpoint_activations=true")
    run(folder, again, STAGE + table, student=student, changes=changes)
    expected, found = weights(kept), weights(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    counts = {int(value) for name, value in found.items() if name.endswith("num_batches_tracked")}
    assert counts <= {3 * parts}
