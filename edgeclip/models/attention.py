"""Transformer layers: attention whose heads are free of the width, and pre-norm residual layers.

- The heads of a layer times their width need not be the width of a token, so that a pruned model is an
  ordinary model; a layer without heads has no attention, one without hidden units no feed-forward part.
- Queries, keys and values come out of one linear map, in this order.
- A tower reads one token of the last layer only, so the last attention asks for that token's query alone and
  everything behind it sees one token. This changes no result and saves 6-8 % of a tower of 12 layers.
- Training uses the fused kernel of PyTorch. ``fold`` returns plain products and a softmax, with the scaling
  of the queries in their weights: that form has few ONNX nodes and no special case for an exporter.
- Masks are added to the scores (0 keeps, ``MASKED`` leaves out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.errors import ConfigError
from edgeclip.models.config import Activation
from edgeclip.models.keys import KeyPair

__all__ = [
    "APPLE_LAYER",
    "HF_LAYER",
    "MASKED",
    "OPENAI_LAYER",
    "TIMM_LAYER",
    "Attention",
    "QuickGELU",
    "Transformer",
    "TransformerLayer",
    "affine_keys",
    "batch_norm_keys",
    "layer_keys",
]

MASKED = -1e4
"""What is added to a score that must not count: its weight is exactly zero in float32 and float64, the number
fits into float16, and a row with nothing left stays finite."""

_QUICK_GELU_SLOPE = 1.702


class QuickGELU(nn.Module):
    """``x · sigmoid(1.702 x)``, the approximation OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return x * torch.sigmoid(_QUICK_GELU_SLOPE * x)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, §3.2.2), the form it trains in.

    Args:
        width: channels of a token.
        heads: attention heads.
        head_dim: channels of a head; ``heads · head_dim`` may differ from ``width``.
    """

    def __init__(self, width: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, *, queries: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend to ``x`` (B, L, D).

        Args:
            x: tokens that are attended to.
            queries: tokens ``(B, Q, D)`` that attend; all of ``x`` if missing.
            mask: added to the scores, of two axes or more, broadcast to ``(B, heads, Q, L)``.

        Returns:
            ``(B, Q, D)``, or ``(B, L, D)`` without ``queries``.
        """
        inner = self.heads * self.head_dim
        if queries is None:
            q, k, v = _split_heads(self.qkv(x), self.head_dim, parts=3)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            (q,) = _split_heads(F.linear(queries, weight[:inner], bias[:inner]), self.head_dim, parts=1)
            k, v = _split_heads(F.linear(x, weight[inner:], bias[inner:]), self.head_dim, parts=2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, Q, head_dim)
        return cast(Tensor, self.out(_merge_heads(mixed)))

    @torch.no_grad()
    def fold(self, *, fused: bool = True) -> nn.Module:
        """Return the form for inference, ``1/√head_dim`` in the weights of the queries.

        Args:
            fused: keep one linear map for all three; otherwise the queries have one of their own and may be
                fewer than the tokens.
        """
        inner = self.heads * self.head_dim
        scale = torch.ones(3 * inner, dtype=torch.float64, device=self.qkv.weight.device)
        scale[:inner] = self.head_dim**-0.5
        weight = (self.qkv.weight.double() * scale[:, None]).to(self.qkv.weight.dtype)
        bias = (self.qkv.bias.double() * scale).to(self.qkv.bias.dtype)
        if fused:
            return _FoldedAttention(_linear(weight, bias), self.out, head_dim=self.head_dim)
        return _FoldedQueryAttention(
            _linear(weight[:inner], bias[:inner]),
            _linear(weight[inner:], bias[inner:]),
            self.out,
            head_dim=self.head_dim,
        )


class _FoldedAttention(nn.Module):
    """Attention of all tokens to all tokens, with queries already scaled."""

    def __init__(self, qkv: nn.Linear, out: nn.Linear, *, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = qkv
        self.out = out

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Attend to ``x`` (B, L, D)."""
        q, k, v = _split_heads(self.qkv(x), self.head_dim, parts=3)
        return cast(Tensor, self.out(_merge_heads(_attend(q, k, v, mask))))


class _FoldedQueryAttention(nn.Module):
    """Attention of some tokens to all tokens, with queries already scaled."""

    def __init__(self, query: nn.Linear, key_value: nn.Linear, out: nn.Linear, *, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = query
        self.key_value = key_value
        self.out = out

    def forward(self, x: Tensor, *, queries: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend to ``x`` (B, L, D) from ``queries`` (B, Q, D), or from all of ``x``."""
        (q,) = _split_heads(self.query(x if queries is None else queries), self.head_dim, parts=1)
        k, v = _split_heads(self.key_value(x), self.head_dim, parts=2)
        return cast(Tensor, self.out(_merge_heads(_attend(q, k, v, mask))))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    score = q @ k.transpose(-1, -2)  # (B, heads, Q, L)
    if mask is not None:
        score = score + mask
    return score.softmax(dim=-1) @ v  # (B, heads, Q, head_dim)


def _split_heads(x: Tensor, head_dim: int, *, parts: int) -> tuple[Tensor, ...]:
    """Split (B, L, parts · heads · head_dim) into ``parts`` times (B, heads, L, head_dim)."""
    heads = x.shape[2] // head_dim
    # -1 for the batch: its shape would otherwise be computed in an exported graph.
    split = x.reshape(-1, x.shape[1], heads, head_dim).transpose(1, 2)  # (B, parts · heads, L, head_dim)
    return torch.split(split, heads // parts, dim=1) if parts > 1 else (split,)


def _merge_heads(x: Tensor) -> Tensor:
    """Return (B, heads, L, head_dim) as (B, L, heads · head_dim)."""
    return x.transpose(1, 2).reshape(-1, x.shape[2], x.shape[1] * x.shape[3])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return made


class TransformerLayer(nn.Module):
    """Pre-norm residual layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))`` (Xiong et al. 2020).

    Args:
        width: channels of a token.
        heads: attention heads; 0 leaves the attention out.
        head_dim: channels of a head.
        hidden_dim: hidden units of the feed-forward part; 0 leaves it out.
        activation: of the feed-forward part.
        norm_eps: of both norms.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_dim: int,
        hidden_dim: int,
        activation: Activation,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attention: nn.Module | None = None
        self.fc1: nn.Linear | None = None
        if heads:
            self.norm1 = nn.LayerNorm(width, eps=norm_eps)
            self.attention = Attention(width, heads=heads, head_dim=head_dim)
        if hidden_dim:
            self.norm2 = nn.LayerNorm(width, eps=norm_eps)
            self.fc1 = nn.Linear(width, hidden_dim)
            self.activation: nn.Module = QuickGELU() if activation == "quick-gelu" else nn.GELU()
            self.fc2 = nn.Linear(hidden_dim, width)

    def forward(self, x: Tensor, *, queries: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the layer's tokens.

        Args:
            x: ``(B, L, D)``.
            queries: the tokens ``(B, Q, D)`` out of ``x`` that are wanted; all if missing.
            mask: added to the scores, broadcast to ``(B, heads, Q, L)``.
        """
        tokens = x if queries is None else queries
        if self.attention is not None:
            keys = self.norm1(x)
            if queries is None:
                tokens = tokens + self.attention(keys, mask=mask)
            else:
                tokens = tokens + self.attention(keys, queries=self.norm1(queries), mask=mask)
        if self.fc1 is not None:
            tokens = tokens + self.fc2(self.activation(self.fc1(self.norm2(tokens))))
        return tokens

    @torch.no_grad()
    def fold(self, *, fused: bool = True) -> TransformerLayer:
        """Fold in place and return self; ``fused`` as :meth:`Attention.fold` has it.

        ``x · sigmoid(1.702 x)`` is ``silu(1.702 x) / 1.702``: both factors go into the linear maps around it.
        """
        if isinstance(self.attention, Attention):
            self.attention = self.attention.fold(fused=fused)
        if self.fc1 is not None and isinstance(self.activation, QuickGELU):
            for tensor, factor in (
                (self.fc1.weight, _QUICK_GELU_SLOPE),
                (self.fc1.bias, _QUICK_GELU_SLOPE),
                (self.fc2.weight, 1 / _QUICK_GELU_SLOPE),
            ):
                tensor.copy_(tensor.double() * factor)
            self.activation = nn.SiLU()
        return self


class Transformer(nn.Module):
    """A stack of layers.

    Args:
        width: channels of a token.
        heads: attention heads of each layer.
        hidden_dims: hidden units of each layer.
        head_dim: channels of a head.
        activation: of the feed-forward parts.
        norm_eps: of every norm.
        where: the tower, as messages name it.
        picked: whether the tower calls ``forward_picked``; it decides the form the last attention folds to.

    Raises:
        ConfigError: there is no layer, or ``heads`` and ``hidden_dims`` are of different length.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: Sequence[int],
        hidden_dims: Sequence[int],
        head_dim: int,
        activation: Activation,
        norm_eps: float,
        where: str,
        picked: bool = True,
    ) -> None:
        super().__init__()
        if not heads or len(heads) != len(hidden_dims):
            raise ConfigError(
                f"{where}: 'heads' has {len(heads)} layers and 'hidden_dims' {len(hidden_dims)}; "
                "give both for each layer, and at least one layer."
            )
        self.layers = nn.ModuleList(
            TransformerLayer(
                width,
                heads=count,
                head_dim=head_dim,
                hidden_dim=hidden,
                activation=activation,
                norm_eps=norm_eps,
            )
            for count, hidden in zip(heads, hidden_dims, strict=True)
        )
        self._picked = picked
        # Behind the last attention tokens do not meet any more.
        self._last_attention = max((index for index, count in enumerate(heads) if count), default=0)
        self._reset_parameters(width)

    def _reset_parameters(self, width: int) -> None:
        # As OpenAI's CLIP: width and depth keep the residual stream's variance (Radford et al. 2021, code).
        depth = (2 * len(self.layers)) ** -0.5
        for layer in self._layers():
            if isinstance(layer.attention, Attention):
                nn.init.normal_(layer.attention.qkv.weight, std=width**-0.5)
                nn.init.zeros_(layer.attention.qkv.bias)
                nn.init.normal_(layer.attention.out.weight, std=width**-0.5 * depth)
                nn.init.zeros_(layer.attention.out.bias)
            if layer.fc1 is not None:
                nn.init.normal_(layer.fc1.weight, std=(2 * width) ** -0.5)
                nn.init.zeros_(layer.fc1.bias)
                nn.init.normal_(layer.fc2.weight, std=width**-0.5 * depth)
                nn.init.zeros_(layer.fc2.bias)

    def _layers(self) -> list[TransformerLayer]:
        return cast(list[TransformerLayer], list(self.layers))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return all tokens ``(B, L, D)`` of the last layer."""
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x

    def forward_picked(
        self,
        x: Tensor,
        pick: Callable[[Tensor], Tensor],
        *,
        mask: Tensor | None = None,
        picked_mask: Tensor | None = None,
    ) -> Tensor:
        """Return some tokens of the last layer, equal to ``pick(self(x, mask=mask))`` and cheaper.

        Args:
            x: ``(B, L, D)``.
            pick: takes ``(B, Q, D)`` out of ``(B, L, D)``, the same tokens whenever it is called.
            mask: as in ``forward``.
            picked_mask: the rows of ``mask`` for the picked tokens, broadcast to ``(B, heads, Q, L)``.
        """
        return self._picked_end(self._beginning(x, mask), pick, picked_mask)

    def forward_both(
        self,
        x: Tensor,
        pick: Callable[[Tensor], Tensor],
        *,
        mask: Tensor | None = None,
        picked_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what ``forward_picked`` returns, bit by bit, and what ``forward`` returns.

        The layers before the last attention run once.
        """
        x = self._beginning(x, mask)
        picked = self._picked_end(x, pick, picked_mask)
        for layer in self._layers()[self._last_attention :]:
            x = layer(x, mask=mask)
        return picked, x

    def _beginning(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return all tokens before the last attention."""
        for layer in self._layers()[: self._last_attention]:
            x = layer(x, mask=mask)
        return x

    def _picked_end(self, x: Tensor, pick: Callable[[Tensor], Tensor], picked_mask: Tensor | None) -> Tensor:
        layers = self._layers()
        tokens: Tensor = layers[self._last_attention](x, queries=pick(x), mask=picked_mask)
        for layer in layers[self._last_attention + 1 :]:
            tokens = layer(tokens)
        return tokens

    def fold(self) -> Transformer:
        """Fold every layer in place and return self."""
        for index, layer in enumerate(self._layers()):
            layer.fold(fused=not self._picked or index != self._last_attention)
        return self


# Foreign checkpoints
# -------------------------------------------------------------------------------------------------


def _both(names: Mapping[str, str]) -> dict[str, str | tuple[str, ...]]:
    """Write weight and bias of each pair of modules."""
    return {
        f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in names.items() for leaf in ("weight", "bias")
    }


_QKV = "attention.qkv"

OPENAI_LAYER: Mapping[str, str | tuple[str, ...]] = _both(
    {
        "norm1": "ln_1",
        "attention.out": "attn.out_proj",
        "norm2": "ln_2",
        "fc1": "mlp.c_fc",
        "fc2": "mlp.c_proj",
    }
) | {f"{_QKV}.weight": "attn.in_proj_weight", f"{_QKV}.bias": "attn.in_proj_bias"}
"""A layer of OpenAI and open_clip."""

TIMM_LAYER: Mapping[str, str | tuple[str, ...]] = _both(
    {
        "norm1": "norm1",
        _QKV: "attn.qkv",
        "attention.out": "attn.proj",
        "norm2": "norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
)
"""A layer of timm."""

APPLE_LAYER: Mapping[str, str | tuple[str, ...]] = _both(
    {
        "norm1": "pre_norm_mha.0",
        _QKV: "pre_norm_mha.1.qkv_proj",
        "attention.out": "pre_norm_mha.1.out_proj",
        "norm2": "pre_norm_ffn.0",
        "fc1": "pre_norm_ffn.1",
        "fc2": "pre_norm_ffn.4",
    }
)
"""A layer of Apple's MobileCLIP, image and text."""

HF_LAYER: Mapping[str, str | tuple[str, ...]] = _both(
    {
        "norm1": "layer_norm1",
        "attention.out": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
) | {
    f"{_QKV}.{leaf}": tuple(f"self_attn.{name}_proj.{leaf}" for name in "qkv") for leaf in ("weight", "bias")
}
"""A layer of Hugging Face transformers' CLIP."""


def layer_keys(
    names: Mapping[str, str | tuple[str, ...]],
    theirs: str,
    *,
    heads: Sequence[int],
    hidden_dims: Sequence[int],
    first: int = 0,
) -> tuple[KeyPair, ...]:
    """Return the keys of a :class:`Transformer` called ``transformer``.

    Args:
        names: one layer, one of the tables above.
        theirs: prefix of a layer with ``{}`` for its number.
        heads: attention heads of each layer; a layer without has no such keys.
        hidden_dims: hidden units of each layer; a layer without has no such keys.
        first: their number of our first layer.
    """
    pairs: list[KeyPair] = []
    for index, (count, hidden) in enumerate(zip(heads, hidden_dims, strict=True)):
        prefix = theirs.format(index + first)
        for ours, name in names.items():
            if not (count if ours.startswith(("norm1", "attention")) else hidden):
                continue
            pairs.append(
                KeyPair(
                    f"transformer.layers.{index}.{ours}",
                    prefix + name if isinstance(name, str) else tuple(prefix + each for each in name),
                )
            )
    return tuple(pairs)


def affine_keys(ours: str, theirs: str) -> tuple[KeyPair, KeyPair]:
    """Return weight and bias of a module."""
    return KeyPair(f"{ours}.weight", f"{theirs}.weight"), KeyPair(f"{ours}.bias", f"{theirs}.bias")


def batch_norm_keys(ours: str, theirs: str) -> tuple[KeyPair, ...]:
    """Return the five tensors of a batch norm."""
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return tuple(KeyPair(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in leaves)
