"""Transformer text towers: OpenAI's and open_clip's, MobileCLIP's with MCt, and compact ones of our own.

- Attention is ``"causal"`` (OpenAI, TinyCLIP, MobileCLIP-B), ``"full"`` (other MobileCLIP models) or
  ``"padded"`` (ours). In a full tower padding takes part as it did in training, so that a row always has
  ``context_length`` tokens; the others take shorter rows and give the same embedding.
- The end of a text is found as the largest id of its row. This is right because the end token has the largest
  id of CLIP's vocabulary. A tokenizer whose padding or whose words have larger ids breaks it silently: such
  a tower must pool ``"mean"``.
- The final norm comes after pooling. For ``"eot"`` this is the same number for less work; for ``"mean"``,
  which is ours, it is the definition: the mean is taken of what the last layer gives.
- ``conv_ends`` (MCt: Vasu et al. 2024, "MobileCLIP") puts a RepMixer block before and after the
  attention layers: 1×11 convolutions over the tokens in place of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.errors import ConfigError, InputError
from edgeclip.models.attention import (
    APPLE_LAYER,
    HF_LAYER,
    MASKED,
    OPENAI_LAYER,
    Transformer,
    affine_keys,
    batch_norm_keys,
    layer_keys,
)
from edgeclip.models.config import TextTransformerConfig
from edgeclip.models.keys import Constant, KeyMap, KeyPair
from edgeclip.models.mobileone import ConvNorm, RepMixer
from edgeclip.models.reparam import fold_children, scale_outputs

__all__ = ["ConvLayer", "TextTransformer", "apple_keys", "hf_keys", "openai_keys"]

_CONV_EXPANSION = 4
_SCALE_INIT = 1e-5


class ConvLayer(nn.Module):
    """A RepMixer block over tokens.

    It is the ``RepMixerBlock`` of ``mobileone.py`` with linear maps for its 1×1 convolutions, so that the
    last one computes them for one token only.

    Args:
        width: channels of a token.
        kernel: of both depthwise convolutions, in tokens; odd.
    """

    def __init__(self, width: int, *, kernel: int) -> None:
        super().__init__()
        self.mixer: nn.Module = RepMixer(width, kernel=(1, kernel), scale_init=_SCALE_INIT)
        self.depthwise: nn.Module = ConvNorm(width, width, kernel=(1, kernel), groups=width)
        self.fc1 = nn.Linear(width, _CONV_EXPANSION * width)
        self.fc2 = nn.Linear(_CONV_EXPANSION * width, width)
        self.layer_scale: nn.Parameter | None = nn.Parameter(torch.full((width,), _SCALE_INIT))
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, *, end: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, L, D)``.

        Args:
            x: tokens.
            end: position ``(B, 1)`` of the one token that is wanted; all if missing.

        Returns:
            ``(B, L, D)``, or ``(B, 1, D)`` with ``end``.
        """
        x, y = self._convolved(x)
        if end is not None:
            x, y = _token(x, end), _token(y, end)
        return self._fed(x, y)

    def forward_both(self, x: Tensor, *, end: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``forward`` returns with ``end``, bit by bit, and without; convolutions run once."""
        x, y = self._convolved(x)
        return self._fed(_token(x, end), _token(y, end)), self._fed(x, y)

    def _convolved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        row = self.mixer(x.transpose(1, 2)[:, :, None])  # (B, D, 1, L)
        x, y = (each.flatten(2).transpose(1, 2) for each in (row, self.depthwise(row)))
        return x, y

    def _fed(self, x: Tensor, y: Tensor) -> Tensor:
        y = cast(Tensor, self.fc2(F.gelu(self.fc1(y))))
        return x + (y if self.layer_scale is None else self.layer_scale * y)

    def fold(self) -> ConvLayer:
        """Fold branches, batch norms and layer scale in place and return self."""
        fold_children(self)
        if self.layer_scale is not None:
            self.fc2 = scale_outputs(self.fc2, self.layer_scale)
            self.layer_scale = None
        return self


class TextTransformer(nn.Module):
    """Token ids ``(B, L)`` to embeddings ``(B, E)``, not normalized.

    Args:
        config: the tower.

    Raises:
        ConfigError: ``heads`` and ``hidden_dims`` disagree, ``conv_ends`` stands with a mask or an even
            kernel, or ``pool`` is ``"eot"`` where padding has the largest id.
    """

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        if config.conv_ends and (config.attention != "full" or config.conv_kernel % 2 == 0):
            raise ConfigError(
                f"text tower: 'conv_ends' mixes neighbours on both sides, but 'attention' is "
                f"{config.attention!r} and 'conv_kernel' {config.conv_kernel}; "
                "expected 'full' and an odd kernel."
            )
        if config.pool == "eot" and config.pad_id == config.vocab_size - 1:
            raise ConfigError(
                f"text tower: 'pool' is 'eot', the token with the largest id of a row, but that is padding "
                f"(id {config.pad_id} of {config.vocab_size}); use 'mean', or a tokenizer whose end token "
                "has the largest id."
            )
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, config.token_dim or width)
        self.token_projection: nn.Linear | None = None
        if config.token_dim:
            self.token_projection = nn.Linear(config.token_dim, width, bias=False)
        self.positions = nn.Parameter(torch.empty(config.context_length, width))
        self.first: nn.Module | None = None
        self.last: nn.Module | None = None
        if config.conv_ends:
            self.first = ConvLayer(width, kernel=config.conv_kernel)
            self.last = ConvLayer(width, kernel=config.conv_kernel)
        self.transformer = Transformer(
            width,
            heads=config.heads,
            hidden_dims=config.hidden_dims,
            head_dim=config.head_dim,
            activation=config.activation,
            norm_eps=config.norm_eps,
            where="text tower",
            picked=config.pool == "eot" and not config.conv_ends,
        )
        self.final_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.projection = nn.Linear(width, config.embed_dim, bias=config.projection_bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if self.token_projection is not None:
            nn.init.normal_(self.token_projection.weight, std=config.token_dim**-0.5)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed rows of token ids, padding at the end.

        Raises:
            InputError: a row is too long, or shorter than the context length in a tower with full attention.
        """
        x = self._embed(tokens)  # (B, L, D)
        mask = self._mask(tokens, x)
        if self.config.pool == "mean":
            return self._projected(_mean(self._mixed(x, mask), tokens != self.config.pad_id))
        end = tokens.argmax(dim=-1, keepdim=True)  # (B, 1)
        if self.last is not None:
            return self._projected(self.last(self.transformer(x, mask=mask), end=end))
        x = self.transformer.forward_picked(
            x, lambda states: _token(states, end), mask=mask, picked_mask=self._end_mask(tokens, end, x, mask)
        )
        return self._projected(x)

    def forward_with_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding, bit by bit that of ``forward``, and all tokens after the final norm.

        Returns:
            ``(B, E)`` and ``(B, L, D)``; tokens of padding mean nothing.

        Raises:
            InputError: as for ``forward``.
        """
        x = self._embed(tokens)
        mask = self._mask(tokens, x)
        if self.config.pool == "mean":
            x = self._mixed(x, mask)
            token = _mean(x, tokens != self.config.pad_id)
        else:
            end = tokens.argmax(dim=-1, keepdim=True)  # (B, 1)
            if self.last is not None:
                token, x = cast(ConvLayer, self.last).forward_both(self.transformer(x, mask=mask), end=end)
            else:
                token, x = self.transformer.forward_both(
                    x,
                    lambda states: _token(states, end),
                    mask=mask,
                    picked_mask=self._end_mask(tokens, end, x, mask),
                )
        return self._projected(token), self.final_norm(x)

    def forward_hidden(
        self,
        tokens: Tensor,
        *,
        hidden: Tensor,
        instead: Tensor,
        after_layer: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Return all tokens after the final norm of texts of which some tokens are hidden, ``(B, L, D)``.

        For training alone: masked language modelling with another network between the layers.

        Args:
            tokens: ``(B, L)``, with the ids that are hidden.
            hidden: ``(B, L)`` bool, which are.
            instead: ``(token_dim,)``, or ``(D,)`` where the table is not factorised: what stands for their
                rows of the table.
            after_layer: given the number of an attention layer and its tokens ``(B, L, D)``, returns what the
                next layer sees.

        Raises:
            InputError: as for ``forward``.
        """
        x = self._embed(tokens, hidden=hidden, instead=instead)
        mask = self._mask(tokens, x)
        for index, layer in enumerate(self.transformer.layers):
            x = after_layer(index, layer(x, mask=mask))
        return cast(Tensor, self.final_norm(x if self.last is None else self.last(x)))

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Return all tokens after the final norm, ``(B, L, D)``; those of padding mean nothing.

        Raises:
            InputError: as for ``forward``.
        """
        x = self._embed(tokens)
        return cast(Tensor, self.final_norm(self._mixed(x, self._mask(tokens, x))))

    def _projected(self, token: Tensor) -> Tensor:
        """Return the embedding ``(B, E)`` of pooled tokens ``(B, 1, D)``."""
        return cast(Tensor, self.projection(self.final_norm(token.flatten(1))))

    def _embed(
        self, tokens: Tensor, *, hidden: Tensor | None = None, instead: Tensor | None = None
    ) -> Tensor:
        """Return the tokens ``(B, L, D)`` the first attention layer sees."""
        length, limit = tokens.shape[1], self.config.context_length
        full = self.config.attention == "full"
        if length > limit or (full and length < limit):
            raise InputError(
                f"text tower: got {tuple(tokens.shape)} tokens, expected (B, {limit})"
                + (
                    "; padding takes part in its attention, so pad every row to this length."
                    if full
                    else " at most; tokenize with this context length."
                )
            )
        x = self.token_embedding(tokens)
        if hidden is not None and instead is not None:
            x = torch.where(hidden[..., None], instead.to(x.dtype), x)
        if self.token_projection is not None:
            x = self.token_projection(x)
        x = x + self.positions[:length]
        return cast(Tensor, x if self.first is None else self.first(x))

    def _mixed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return all tokens ``(B, L, D)`` of the last layer."""
        x = self.transformer(x, mask=mask)
        return cast(Tensor, x if self.last is None else self.last(x))

    def _end_mask(self, tokens: Tensor, end: Tensor, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the rows of ``mask`` for the tokens at ``end`` (B, 1)."""
        if self.config.attention != "causal":
            return mask
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return _left_out(place > end, x)[:, None, None]  # (B, 1, 1, L)

    def _mask(self, tokens: Tensor, x: Tensor) -> Tensor | None:
        """Return what is added to the scores, broadcast to ``(B, heads, L, L)``."""
        if self.config.attention == "full":
            return None
        if self.config.attention == "padded":
            return _left_out(tokens == self.config.pad_id, x)[:, None, None]  # (B, 1, 1, L)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return _left_out(place > place[:, None], x)  # (L, L)


def _left_out(where: Tensor, like: Tensor) -> Tensor:
    return where.to(like.dtype) * MASKED


def _token(x: Tensor, place: Tensor) -> Tensor:
    """Return the token (B, 1, D) of each row of ``x`` (B, L, D) at ``place`` (B, 1)."""
    return x.gather(1, place[:, :, None].expand(-1, 1, x.shape[2]))


def _mean(x: Tensor, keep: Tensor) -> Tensor:
    """Return the mean (B, 1, D) of the tokens that are kept; zeros where none is."""
    weight = keep.to(x.dtype)[:, None]  # (B, 1, L)
    return (weight @ x) / weight.sum(dim=-1, keepdim=True).clamp(min=1)


# Foreign checkpoints
# -------------------------------------------------------------------------------------------------


def openai_keys(config: TextTransformerConfig) -> KeyMap:
    """Return the names of OpenAI (at the root) and of open_clip (there, or below ``text.``).

    Raises:
        ConfigError: that source has no such tower.
    """
    _refuse(config, "OpenAI's text tower", conv_ends=False, token_dim=0, projection_bias=False)
    return KeyMap(
        (
            KeyPair("token_embedding.weight", "token_embedding.weight"),
            KeyPair("positions", "positional_embedding"),
            *layer_keys(
                OPENAI_LAYER,
                "transformer.resblocks.{}.",
                heads=config.heads,
                hidden_dims=config.hidden_dims,
            ),
            *affine_keys("final_norm", "ln_final"),
            KeyPair("projection.weight", "text_projection", transposed=True),
        )
    )


def apple_keys(config: TextTransformerConfig) -> KeyMap:
    """Return the names of Apple's MobileCLIP, below ``text_encoder.``.

    Raises:
        ConfigError: that source has no such tower.
    """
    _refuse(config, "Apple's text tower", token_dim=0, projection_bias=False)
    shape = (1, 1, config.context_length, config.width)
    ends: tuple[KeyPair, ...] = ()
    if config.conv_ends:
        ends = _conv_keys("first", "transformer.0", config) + _conv_keys(
            "last", f"transformer.{len(config.heads) + 1}", config
        )
    return KeyMap(
        (
            KeyPair("token_embedding.weight", "embedding_layer.weight"),
            KeyPair("positions", "positional_embedding.pos_embed.pos_embed", theirs_shape=shape),
            *ends,
            *layer_keys(
                APPLE_LAYER,
                "transformer.{}.",
                heads=config.heads,
                hidden_dims=config.hidden_dims,
                first=int(config.conv_ends),
            ),
            *affine_keys("final_norm", "final_layer_norm"),
            KeyPair("projection.weight", "projection_layer", transposed=True),
        )
    )


def hf_keys(config: TextTransformerConfig) -> KeyMap:
    """Return the full names of Hugging Face transformers' CLIP.

    Raises:
        ConfigError: that source has no such tower.
    """
    _refuse(config, "transformers' text tower", conv_ends=False, token_dim=0, projection_bias=False)
    embeddings = "text_model.embeddings."
    return KeyMap(
        (
            KeyPair("token_embedding.weight", embeddings + "token_embedding.weight"),
            KeyPair("positions", embeddings + "position_embedding.weight"),
            *layer_keys(
                HF_LAYER,
                "text_model.encoder.layers.{}.",
                heads=config.heads,
                hidden_dims=config.hidden_dims,
            ),
            *affine_keys("final_norm", "text_model.final_layer_norm"),
            KeyPair("projection.weight", "text_projection.weight"),
        ),
        (Constant(embeddings + "position_ids", (1, config.context_length), value=None),),
    )


def _conv_keys(ours: str, theirs: str, config: TextTransformerConfig) -> tuple[KeyPair, ...]:
    width, hidden = config.width, _CONV_EXPANSION * config.width
    mixer = f"{theirs}.token_mixer"
    return (
        KeyPair(f"{ours}.mixer.mix.main.conv.weight", f"{mixer}.mixer.rbr_conv.0.conv.weight"),
        *batch_norm_keys(f"{ours}.mixer.mix.main.norm", f"{mixer}.mixer.rbr_conv.0.bn"),
        *batch_norm_keys(f"{ours}.mixer.mix.skip", f"{mixer}.mixer.rbr_skip"),
        *batch_norm_keys(f"{ours}.mixer.norm", f"{mixer}.norm.rbr_skip"),
        KeyPair(f"{ours}.mixer.layer_scale", f"{mixer}.layer_scale"),
        KeyPair(f"{ours}.depthwise.conv.weight", f"{theirs}.convffn.conv.conv.weight"),
        *batch_norm_keys(f"{ours}.depthwise.norm", f"{theirs}.convffn.conv.bn"),
        KeyPair(f"{ours}.fc1.weight", f"{theirs}.convffn.fc1.weight", theirs_shape=(hidden, width, 1, 1)),
        KeyPair(f"{ours}.fc1.bias", f"{theirs}.convffn.fc1.bias"),
        KeyPair(f"{ours}.fc2.weight", f"{theirs}.convffn.fc2.weight", theirs_shape=(width, hidden, 1, 1)),
        KeyPair(f"{ours}.fc2.bias", f"{theirs}.convffn.fc2.bias"),
        KeyPair(f"{ours}.layer_scale", f"{theirs}.layer_scale", theirs_shape=(width, 1, 1)),
    )


def _refuse(config: TextTransformerConfig, source: str, **expected: object) -> None:
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"text tower: {source} has {name} {value!r}, this tower {getattr(config, name)!r}; "
                "its weights have no names there."
            )
