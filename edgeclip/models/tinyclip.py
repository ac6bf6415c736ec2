"""TinyCLIP's checkpoints, and the physical pruning of those with masks ("auto weight inheritance").

Wu et al. 2023, "TinyCLIP", §3.3. While its masks are learned, an "auto" model is a ViT-B/32 CLIP of full
width with one gate for each attention head, feed-forward neuron and hidden dimension of a tower: hard
concrete gates (Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", §2.2) in
the deterministic form of CoFi (Xia et al. 2022). A gate multiplies what it gates. Where it is 0, rows and
columns are taken out of the weights here, where it is not, it is multiplied into them; what remains is an
ordinary model whose layers differ in heads and hidden units.

Three details follow ``prune()`` of the published code (wkcn/TinyCLIP, ``model.py``), which is what its
authors train on and deploy, and not its masked forward pass: an attention without heads goes away with the
bias of its output; the gates of the hidden dimensions are multiplied into both projections; a feed-forward
part without neurons still adds the bias of its output. That bias is a constant, so it is added to the bias of
whatever wrote to the residual stream before it.

A file saved after this pruning has no gates; the shapes of its weights say how wide each layer is. The
published code expects its released "auto" files to be such: it pads them with zeros to full width, sets fresh
gates of ``sigmoid(12) = 0.999994`` over the kept part and prunes again, so that its weights are smaller by
6e-6 for each gate passed. Here such a file is taken as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from edgeclip.errors import InputError
from edgeclip.models.config import CLIPConfig, TextTransformerConfig, ViTConfig
from edgeclip.models.gates import deterministic_gates as gates

__all__ = ["gates", "infer_config", "plain_names", "prune", "size_name"]

IMAGE, TEXT, SCALE = "_image_encoder.", "_text_encoder.", "_logit_scale.logit_scale"
"""Prefixes of the towers in their files, and the key of the scale."""

_GATES = "l0_module."
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OLD_NAMES = (("image_encoder_without_ddp.", IMAGE), ("text_encoder_without_ddp.", TEXT))


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the ``module.`` that distributed training puts into their names.

    Their code registers a pruned tower a second time, under the name of a property; such doubles go away.
    """
    plain = {key.replace(".module.", "."): value for key, value in state.items()}
    doubles = {
        new + key.removeprefix(old): value
        for old, new in _OLD_NAMES
        for key, value in plain.items()
        if key.startswith(old)
    }
    olds = tuple(old for old, _ in _OLD_NAMES)
    return doubles | {key: value for key, value in plain.items() if not key.startswith(olds)}


def prune(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return smaller weights that compute what the gated ones do.

    Args:
        state: plain names, of full width with gates, or already pruned.

    Returns:
        The same names without gates; layers that nothing is left of have none. Where all neurons of a
        feed-forward part are gone, the bias of its output is in the bias before it.

    Raises:
        InputError: gates and weights are not of one size, or nothing is left.
    """
    pruned = {key: value for key, value in state.items() if not key.startswith((IMAGE, TEXT))}
    for prefix in (IMAGE, TEXT):
        tower = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        learned = {
            key.removeprefix(_GATES).removesuffix("_loga"): value.float()
            if value.dtype.itemsize < 4
            else value
            for key, value in tower.items()
            if key.startswith(_GATES) and key.endswith("_loga")
        }
        weights = {key: value for key, value in tower.items() if not key.startswith(_GATES)}
        if learned:
            try:
                weights = _prune_tower(weights, learned)
            except (KeyError, IndexError, RuntimeError) as error:
                raise InputError(
                    f"TinyCLIP: the gates below {prefix + _GATES!r} do not fit the weights beside them "
                    f"({type(error).__name__}: {error}); the file is damaged or not one of TinyCLIP's."
                ) from error
        stream = "visual.ln_pre.bias" if prefix == IMAGE else "positional_embedding"
        weights = _without_empty_parts(weights, "visual." if prefix == IMAGE else "", stream)
        pruned |= {prefix + key: value for key, value in weights.items()}
    return pruned


def _prune_tower(weights: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply the gates of one tower: ``hidden`` (D,), the others one row a layer."""
    width = weights["ln_final.weight" if "ln_final.weight" in weights else "visual.ln_post.weight"].shape[0]
    hidden = gates(learned["hidden"]) if "hidden" in learned else torch.ones(width)
    kept = hidden.nonzero().flatten()
    if not len(kept):
        raise InputError(f"TinyCLIP: the gates leave none of {width} hidden dimensions.")
    scale = hidden[kept]
    pruned: dict[str, Tensor] = {}
    blocks: dict[int, dict[str, Tensor]] = {}
    for key, value in weights.items():
        match = _BLOCK.search(key)
        name = key.rpartition("visual.")[2]
        if match:
            blocks.setdefault(int(match[1]), {})[match[2]] = value
        elif name.startswith("ln_"):
            pruned[key] = value[kept]
        elif name == "conv1.weight":
            pruned[key] = value[kept] * scale[:, None, None, None]
        elif name in ("proj", "text_projection"):
            pruned[key] = value[kept] * scale[:, None]
        else:  # the tables of tokens and positions, and the class token: hidden dimensions come last
            pruned[key] = value[..., kept] * scale
    visual = "visual." if "visual.proj" in weights else ""
    for index, block in sorted(blocks.items()):
        layer = {name: gates(loga[index]) for name, loga in learned.items() if name != "hidden"}
        for name, value in _prune_block(block, layer, kept, scale).items():
            pruned[f"{visual}transformer.resblocks.{index}.{name}"] = value
    return pruned


def _prune_block(
    block: Mapping[str, Tensor], layer: Mapping[str, Tensor], kept: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    """Apply the gates of one layer; ``kept`` and ``scale`` are the hidden dimensions and their gates."""
    pruned: dict[str, Tensor] = {}
    one = torch.ones(())
    mixing, feeding = layer.get("mha", one), layer.get("ffn", one)
    heads = layer.get("heads", one.expand(1))
    rows = heads.nonzero().flatten()
    if len(rows) and mixing != 0:
        count = len(heads)
        pruned |= {name: block[name][kept] for name in ("ln_1.weight", "ln_1.bias")}
        weight = block["attn.in_proj_weight"]
        weight = weight.reshape(3, count, -1, weight.shape[1])  # (3, heads, head_dim, D)
        bias = block["attn.in_proj_bias"].reshape(3, count, -1)
        pruned["attn.in_proj_weight"] = weight[:, rows][..., kept].flatten(0, 2)
        pruned["attn.in_proj_bias"] = bias[:, rows].flatten()
        out = block["attn.out_proj.weight"]
        out = out.reshape(len(out), count, -1)[kept][:, rows]  # (D, heads, head_dim)
        out = out * scale[:, None, None] * heads[rows][:, None] * mixing
        pruned["attn.out_proj.weight"] = out.flatten(1)
        pruned["attn.out_proj.bias"] = block["attn.out_proj.bias"][kept] * scale * mixing
    if feeding != 0:
        neurons = layer.get("intermediate", torch.ones(block["mlp.c_fc.bias"].shape[0]))
        units = neurons.nonzero().flatten()
        pruned |= {name: block[name][kept] for name in ("ln_2.weight", "ln_2.bias")}
        pruned["mlp.c_fc.weight"] = block["mlp.c_fc.weight"][units][:, kept]
        pruned["mlp.c_fc.bias"] = block["mlp.c_fc.bias"][units]
        out = block["mlp.c_proj.weight"][kept][:, units]
        pruned["mlp.c_proj.weight"] = out * scale[:, None] * neurons[units] * feeding
        pruned["mlp.c_proj.bias"] = block["mlp.c_proj.bias"][kept] * scale * feeding
    return pruned


def _without_empty_parts(weights: Mapping[str, Tensor], visual: str, stream: str) -> dict[str, Tensor]:
    """Take feed-forward parts without neurons out; their constant goes into the bias before them.

    Args:
        weights: one tower.
        visual: what stands before its transformer.
        stream: the key of what is added to every token before the first layer.
    """
    pruned = dict(weights)
    layers = sorted({int(match[1]) for key in weights if (match := _BLOCK.search(key))})
    writer = stream
    for index in layers:
        block = f"{visual}transformer.resblocks.{index}."
        if block + "attn.out_proj.bias" in pruned:
            writer = block + "attn.out_proj.bias"
        units = pruned.get(block + "mlp.c_fc.bias")
        if units is not None and units.numel():
            writer = block + "mlp.c_proj.bias"
        elif units is not None:
            pruned[writer] = pruned[writer] + pruned[block + "mlp.c_proj.bias"]
            for name in ("ln_2", "mlp.c_fc", "mlp.c_proj"):
                del pruned[f"{block}{name}.weight"], pruned[f"{block}{name}.bias"]
    return pruned


def infer_config(state: Mapping[str, Tensor], like: CLIPConfig) -> CLIPConfig:
    """Return the config that pruned weights have the shapes of.

    Args:
        state: plain names without gates.
        like: a model of the same make: its head width, activation, attention and preprocessing are taken.

    Raises:
        InputError: a tensor that tells a size is missing, or its shape makes no sense.
    """
    image, text = like.image, like.text
    assert isinstance(image, ViTConfig)
    assert isinstance(text, TextTransformerConfig)
    try:
        conv = state[f"{IMAGE}visual.conv1.weight"]
        side = math.isqrt(state[f"{IMAGE}visual.positional_embedding"].shape[0] - 1)
        heads, hidden_dims = _layers(state, f"{IMAGE}visual.", image.head_dim)
        image = dataclasses.replace(
            image,
            width=conv.shape[0],
            patch_px=conv.shape[-1],
            grid=(side, side),
            heads=heads,
            hidden_dims=hidden_dims,
            embed_dim=state[f"{IMAGE}visual.proj"].shape[1],
        )
        heads, hidden_dims = _layers(state, TEXT, text.head_dim)
        vocab_size, width = state[f"{TEXT}token_embedding.weight"].shape
        text = dataclasses.replace(
            text,
            vocab_size=vocab_size,
            width=width,
            context_length=state[f"{TEXT}positional_embedding"].shape[0],
            heads=heads,
            hidden_dims=hidden_dims,
            embed_dim=state[f"{TEXT}text_projection"].shape[1],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"TinyCLIP: the sizes of the model cannot be read off its weights ({type(error).__name__}: "
            f"{error}); the file is not one of TinyCLIP's."
        ) from error
    size = (side * image.patch_px,) * 2
    return dataclasses.replace(like, image=image, text=text, image_size_px=size)


def _layers(
    state: Mapping[str, Tensor], prefix: str, head_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return heads and hidden units of each layer; 0 where the part is not there."""
    found = [int(match[1]) for key in state if key.startswith(prefix) and (match := _BLOCK.search(key))]
    heads, hidden_dims = [], []
    for index in range(max(found, default=-1) + 1):
        block = f"{prefix}transformer.resblocks.{index}."
        rows = state.get(block + "attn.in_proj_bias")
        units = state.get(block + "mlp.c_fc.bias")
        heads.append(0 if rows is None else rows.shape[0] // (3 * head_dim))
        hidden_dims.append(0 if units is None else units.shape[0])
    return tuple(heads), tuple(hidden_dims)


def size_name(state: Mapping[str, Tensor], config: CLIPConfig) -> str:
    """Return the name that the authors would give to the size of pruned weights.

    Their first number is the image tower's parameters, the second those of the text tower without its token
    table, in millions.
    """
    assert isinstance(config.image, ViTConfig)
    image = sum(value.numel() for key, value in state.items() if key.startswith(IMAGE))
    text = sum(value.numel() for key, value in state.items() if key.startswith(TEXT))
    text -= state[f"{TEXT}token_embedding.weight"].numel()
    return (
        f"TinyCLIP-auto-ViT-{round(image / 1e6)}M-{config.image.patch_px}-Text-{max(1, round(text / 1e6))}M"
    )
