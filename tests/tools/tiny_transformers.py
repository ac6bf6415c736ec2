"""Tiny random models of transformers, saved as their own library saves them.

Import ``torchvision_shim`` first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

SIDE_PX, EMBED = 32, 12
WORDS = ("a", "cat", "dog", "the", "red", "红", "色", "猫", "狗")


def save(kind: str, path: Path) -> Any:
    """Write a model with its tokenizer and image processor into a directory and return it."""
    torch.manual_seed(sum(kind.encode()))
    model = _MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialized, all pictures look alike
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    _TOKENIZERS[kind]().save_pretrained(path)
    processor = _PROCESSORS.get(kind)
    if processor is not None:
        processor().save_pretrained(path)
    return model


def _tower(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **changes,
    }


def _vision(**changes: Any) -> dict[str, Any]:
    return _tower(image_size=SIDE_PX, patch_size=16, **changes)


def _clip() -> Any:
    size = len(_clip_tokenizer())
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=_tower(
                vocab_size=size,
                max_position_embeddings=14,
                bos_token_id=size - 2,
                eos_token_id=size - 1,
                pad_token_id=size - 1,
            ),
            vision_config=_vision(),
            projection_dim=EMBED,
        )
    )


def _chinese_clip() -> Any:
    text = _tower(vocab_size=len(_wordpieces()), max_position_embeddings=40, type_vocab_size=2)
    return transformers.ChineseCLIPModel(
        transformers.ChineseCLIPConfig(text_config=text, vision_config=_vision(), projection_dim=EMBED)
    )


def _altclip() -> Any:
    text = _tower(
        vocab_size=len(_unigrams()),
        max_position_embeddings=40,
        project_dim=EMBED,
        pad_token_id=1,
        bos_token_id=0,
    )
    return transformers.AltCLIPModel(
        transformers.AltCLIPConfig(text_config=text, vision_config=_vision(), projection_dim=EMBED)
    )


def _siglip() -> Any:
    text = _tower(vocab_size=len(_siglip_tokenizer()), max_position_embeddings=10, projection_size=16)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=_vision()))


def _bert() -> Any:
    config = transformers.BertConfig(vocab_size=len(_wordpieces()), max_position_embeddings=40, **_tower())
    return transformers.BertModel(config)


def _clip_tokenizer() -> Any:
    letters = sorted({letter for word in WORDS if word.isascii() for letter in word})
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=14)


def _wordpieces() -> Any:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return transformers.BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})


def _unigrams() -> Any:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), *WORDS]
    return transformers.XLMRobertaTokenizer(vocab=[(piece, -float(at)) for at, piece in enumerate(pieces)])


def _siglip_tokenizer() -> Any:
    """A tokenizer that gives no mask and pads with its end of text, as SigLIP's."""
    words = {"</s>": 0, "<unk>": 1, **{word: 2 + number for number, word in enumerate(WORDS)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="</s>",  # noqa: S106
        pad_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_input_names=["input_ids"],
        model_max_length=10,
    )


def _clip_processor() -> Any:
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX}
    )


def _square_processor() -> Any:
    return transformers.CLIPImageProcessor(
        size={"height": SIDE_PX, "width": SIDE_PX},
        do_center_crop=False,
        resample=2,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.5, 0.6, 0.7],
    )


_MODELS = {
    "clip": _clip,
    "chinese-clip": _chinese_clip,
    "altclip": _altclip,
    "siglip": _siglip,
    "bert": _bert,
}
_TOKENIZERS = {
    "clip": _clip_tokenizer,
    "chinese-clip": _wordpieces,
    "altclip": _unigrams,
    "siglip": _siglip_tokenizer,
    "bert": _wordpieces,
}
_PROCESSORS = {
    "clip": _clip_processor,
    "chinese-clip": _square_processor,
    "altclip": _clip_processor,
    "siglip": _square_processor,
}
