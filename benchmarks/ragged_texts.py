"""What texts without padding gain: new labels on a text tower of 77 tokens, whole rows and cut ones.

    python benchmarks/ragged_texts.py

A text tower as ViT-B/32 has it, with random weights, which cost what trained ones cost, is exported as
``edgeclip export`` does it, once with rows of 77 tokens and once with rows of any length. A hundred labels,
every tenth of ImageNet's in one template, go through both, tokens ready, as a text encoder feeds them:
in turns, on every engine that is here. The differences of the embeddings are kept beside the times, and how
long the same texts are for the tokenizer of a bundle.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import written
from numpy.typing import NDArray

from edgeclip.bundle import Bundle
from edgeclip.export.build import BuildRequest, builder_of
from edgeclip.export.passes import apply
from edgeclip.export.passes.sequences import shared
from edgeclip.export.trace import trace_text_tower
from edgeclip.export.variants import VariantSpec
from edgeclip.labels import LabelBank
from edgeclip.models.clip import build_text_tower
from edgeclip.models.zoo import model_entry
from edgeclip.runtime.latency import compare_interleaved
from edgeclip.runtime.rows import run_rows, run_texts
from edgeclip.runtime.session import OpenSession, RuntimeOptions, open_session
from edgeclip.text_encoder import TEXTS_A_CALL, even_parts, open_tokenizer
from edgeclip.tokenizer import Tokenizer

MODEL = "ViT-B-32.openai"
FORMS = ("onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-int8")
LABELS = 100
TEMPLATE = "a photo of a {}."


def main() -> None:
    """Measure, print and write."""
    parser = written.arguments(__doc__.splitlines()[0], "ragged_texts.json")
    parser.add_argument("--blocks", type=int, default=6, help="At least; a block is four calls.")
    parser.add_argument("--threads", type=int, help="Of every engine; usable cores if not given.")
    asked = parser.parse_args()
    texts = labels(LABELS)
    tokenizer = Tokenizer.clip()
    tokens = tokenizer(texts, truncate=True)
    lengths = tokenizer.config.lengths(tokens)
    default = open_tokenizer(Bundle.open(asked.bundle))
    result: dict[str, Any] = {
        "model": MODEL,
        "labels": LABELS,
        "template": TEMPLATE,
        "tokens": spread(lengths, tokenizer.context_length),
        "tokens_of_bundle": spread(
            default.config.lengths(default(texts, truncate=True)), default.context_length
        ),
        "texts_a_call": TEXTS_A_CALL,
        "forms": {},
    }
    forms = [
        form for form in FORMS if not form.startswith("openvino") or importlib.util.find_spec("openvino")
    ]
    with tempfile.TemporaryDirectory() as folder:
        made = graphs()
        for form in forms:
            options = RuntimeOptions(threads=asked.threads)
            with (
                opened(form, made["whole"], Path(folder) / form / "whole", options) as whole,
                opened(form, made["cut"], Path(folder) / form / "cut", options) as cut,
            ):
                result["forms"][form] = compared(whole, cut, tokens, lengths, blocks=asked.blocks)
            print(form, json.dumps(result["forms"][form]), file=sys.stderr)
    written.write(asked.output, result)


def labels(count: int) -> list[str]:
    """Return so many labels of ImageNet, evenly drawn, in a template."""
    bundle = Bundle.open("default")
    bank = LabelBank.from_bytes(bundle.read(bundle.manifest.label_banks["imagenet-1k"].file), source="bank")
    return [TEMPLATE.replace("{}", bank.names[row * len(bank) // count]) for row in range(count)]


def spread(lengths: NDArray[np.intp], context_length: int) -> dict[str, Any]:
    """Return how long texts are."""
    least, median, most = np.quantile(lengths, [0, 0.5, 1]).tolist()
    return {
        "context_length": context_length,
        "least": least,
        "median": median,
        "mean": round(float(lengths.mean()), 2),
        "most": most,
    }


def graphs() -> dict[str, Any]:
    """Return the text graph in both forms."""
    torch.manual_seed(0)
    config = model_entry(MODEL).config.text
    tower = build_text_tower(config).eval()
    cut = trace_text_tower(tower, config.context_length, free_length=config.free_length)
    whole = trace_text_tower(tower, config.context_length)
    return {name: apply(graph, shared(), what=name) for name, graph in (("whole", whole), ("cut", cut))}


def opened(form: str, graph: Any, folder: Path, options: RuntimeOptions) -> OpenSession:
    """Make a form of a text tower and open it."""
    folder.mkdir(parents=True)
    tokens = Tokenizer.clip()(labels(32))
    spec = VariantSpec.parse(form)
    request = BuildRequest(spec, {"text": graph}, folder, calibration={"text": tokens})
    tower = builder_of(spec.form.format)(request).towers["text"]
    for name, content in tower.files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
    return open_session(folder / tower.model, options=options)


def compared(
    whole: OpenSession,
    cut: OpenSession,
    tokens: NDArray[np.int32],
    lengths: NDArray[np.intp],
    *,
    blocks: int,
) -> dict[str, Any]:
    """Time both in turns, and say how far their embeddings are apart."""
    ends = np.cumsum(even_parts(len(tokens), TEXTS_A_CALL))
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def run_whole() -> NDArray[np.float32]:
        return np.concatenate([run_rows(whole, tokens[part], batch=TEXTS_A_CALL) for part in parts])

    def run_cut() -> NDArray[np.float32]:
        return np.concatenate([run_texts(cut, tokens[part], lengths[part]) for part in parts])

    found = compare_interleaved(run_whole, run_cut, min_blocks=blocks, max_duration_s=120, warmup=1)
    one = compare_interleaved(
        lambda: run_rows(whole, tokens[:1]), lambda: run_texts(cut, tokens[:1], lengths[:1]), min_blocks=20
    )
    # What a free axis alone costs: the same rows of 77 tokens through both.
    padded = compare_interleaved(
        lambda: run_rows(cut, tokens[:8]), lambda: run_rows(whole, tokens[:8]), min_blocks=8
    )
    return {
        "backend": cut.chosen.backend,
        "threads": cut.chosen.threads,
        "hundred_labels": written.ratio(found),
        "one_label": written.ratio(one),
        "eight_whole_rows_free_over_fixed": written.ratio(padded),
        "max_abs": float(np.abs(run_whole() - run_cut()).max()),
        "samples_ms": {
            "whole": np.round(found.a.samples_ms, 2).tolist(),
            "cut": np.round(found.b.samples_ms, 2).tolist(),
        },
    }


if __name__ == "__main__":
    main()
