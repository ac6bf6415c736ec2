"""Make a tiny but real bundle: it knows eight colours, and every part of it runs.

The image tower pools a small convolution over 32 × 32 pixels; its projection is fitted so that a plain
picture of a colour lands on the text embedding of its name. So classification is right, int8 differs
from float32 a little, and golden numbers come from the reference evaluator of onnx, which nobody here wrote.

Run ``python tests/tools/tiny_bundle.py DIRECTORY`` to have one to look at.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeclip.bundle import Bundle, BundleWriter, PreprocessSpec, embedding_space
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.tensors import write_tensors
from edgeclip.tokenizer import Tokenizer, train_bpe
from edgeclip.words import build_words

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "yellow": (230, 220, 30),
    "cyan": (30, 210, 220),
    "magenta": (220, 30, 210),
    "white": (245, 245, 245),
    "black": (12, 12, 12),
}
SIDE_PX = 32
CONTEXT_LENGTH = 16
EMBED_DIM = 16
SCALE = 20.0
_FEATURES = 24
_OPSET, _IR_VERSION = 20, 9  # what the oldest supported ONNX Runtime reads


def colour_picture(name: str, *, seed: int = 0, noise: float = 8.0) -> NDArray[np.uint8]:
    """Return a ``(32, 32, 3)`` uint8 picture of a colour with some noise."""
    noise_levels = np.random.default_rng([seed, *name.encode()]).normal(0, noise, (SIDE_PX, SIDE_PX, 3))
    return np.clip(np.array(COLOURS[name]) + noise_levels, 0, 255).astype(np.uint8)


def make_tiny_bundle(
    directory: Path,
    *,
    variants: tuple[str, ...] = ("onnx-int8", "onnx-fp32"),
    text_tower: bool = True,
    seed: int = 0,
    pictures: int = 16,
    width: int = 24,
) -> Bundle:
    """Write a tiny bundle and return it opened.

    Args:
        directory: where to; a bundle that is there becomes this one.
        variants: of ``onnx-fp32`` and ``onnx-int8``, with or without a target, as ``default_variants``.
        text_tower: without, neither text tower nor tokenizer is in it, as in a slimmed bundle.
        seed: another seed is another model.
        pictures: how many golden pictures, at most 16.
        width: of the text tower's token table, which is most of the bundle.
    """
    model = _TinyModel(seed, width)
    space = embedding_space(model.digest, PreprocessSpec(image_size_px=(SIDE_PX, SIDE_PX)))
    templates = Templates.of("one")
    names = tuple(COLOURS)
    texts = [template.format(name) for name in names for template in templates.texts]
    tokens = model.tokenizer(texts)
    text = _run(model.text_graph(), "tokens", tokens)
    bank = LabelBank(LabelSet.of(names), text, templates, space=space)
    images = np.stack([colour_picture(name, seed=number) for number in (1, 2) for name in names][:pictures])
    float_embedding = _run(model.image_graph(), "image", images)
    golden = {
        "images": images,
        "tokens": tokens,
        "image_embedding": float_embedding,
        "text_embedding": text,
        "bank_top5": np.argsort(-(float_embedding @ text.T), axis=1, kind="stable")[:, :5].astype(np.int32),
    }
    with BundleWriter(directory, manifest={}) as writer:
        text_file = writer.add("onnx-fp32/text.onnx", model.text_graph()) if text_tower else None
        entries = {}
        for name in variants:
            precision, _, target = name.removeprefix("onnx-").partition("@")
            graph = model.image_graph(int8=precision == "int8")
            parity = {"image": _parity(float_embedding, _run(graph, "image", images))}
            towers = {"image": _image_tower(writer.add(f"{name}/image.onnx", graph))}
            if text_file is not None:
                towers["text"] = _text_tower(text_file)
                parity["text"] = _parity(text, text)
            entries[name] = {
                "format": "onnx",
                "precision": precision,
                "target": target or None,
                "requires": {"engine": ">=1.20"},
                "towers": towers,
                "parity": parity,
            }
        tokenizer = None
        if text_tower:
            stored = {
                name: writer.add(f"tokenizer/{name}", data) for name, data in model.tokenizer.files.items()
            }
            tokenizer = {
                "config": stored["tokenizer.json"],
                "merges": stored["merges.txt.gz"],
                "words": stored["words.bin"],
                "digest": model.tokenizer.digest,
            }
        writer.manifest.update(
            model={
                "name": "tiny-colours",
                "family": "test",
                "parameters": model.parameters,
                "embed_dim": EMBED_DIM,
                "scale": SCALE,
                "languages": ["en"],
                "licence": "Apache-2.0",
                "embedding_space": space,
            },
            preprocess={"image_size_px": [SIDE_PX, SIDE_PX], "resize": "shortest", "crop": "center"},
            tokenizer=tokenizer,
            variants=entries,
            default_variants=list(variants),
            label_banks={
                "colours": {
                    "file": writer.add("banks/colours.safetensors", bank.to_bytes()),
                    "labels": len(names),
                    "templates": templates.name,
                    "variant": "onnx-fp32" if text_tower else None,
                    "language": "en",
                }
            },
            default_bank="colours",
            heads={
                "temperature": {
                    "kind": "temperature",
                    "file": writer.add(
                        "heads/temperature.safetensors",
                        write_tensors({"scale": np.array([SCALE], np.float32)}),
                    ),
                    "bank": "colours",
                    "fitted_on": "its own golden pictures",
                }
            },
            golden=writer.add("golden.safetensors", write_tensors(golden, {"bank": "colours"})),
            provenance={"recipe": "tests/tools/tiny_bundle.py", "time": "2026-01-01T00:00:00Z"},
        )
        return writer.commit()


class _TinyModel:
    """Weights of both towers, drawn from a seed; the image projection fitted to the names of the colours."""

    def __init__(self, seed: int, width: int) -> None:
        rng = np.random.default_rng(seed)
        corpus = [f"a photo of {name}" for name in COLOURS for _ in range(3)]
        self.tokenizer: Tokenizer = train_bpe(
            corpus, vocab_size=600, context_length=CONTEXT_LENGTH
        ).with_words(build_words(corpus))
        self.table = rng.normal(0, 1, (self.tokenizer.vocab_size, width)).astype(np.float32)
        self.text_projection = rng.normal(0, 0.2, (width, EMBED_DIM)).astype(np.float32)
        self.text_bias = np.zeros(EMBED_DIM, np.float32)
        self._centre_text()
        self.kernel = rng.normal(0, 0.35, (_FEATURES, 3, 3, 3)).astype(np.float32)
        self.bias = rng.uniform(-0.5, 0.5, _FEATURES).astype(np.float32)
        self.image_projection = np.eye(_FEATURES, EMBED_DIM, dtype=np.float32)
        self._fit_image_projection()

    def _centre_text(self) -> None:
        """Take off what the names have in common, the template above all: it would make all of them alike."""
        tokens = self.tokenizer([Templates.of("one").texts[0].format(name) for name in COLOURS])
        is_piece = tokens != self.tokenizer.config.special.pad
        mean = (self.table[tokens] * is_piece[..., None]).sum(axis=1) / is_piece.sum(axis=1, keepdims=True)
        self.text_bias = -(mean @ self.text_projection).mean(axis=0).astype(np.float32)

    def _fit_image_projection(self) -> None:
        names = list(COLOURS)
        rows = [(name, seed) for name in names for seed in range(8)]
        pictures = np.stack([colour_picture(name, seed=100 + seed) for name, seed in rows])
        features = _run(self.image_graph(head=False), "image", pictures).astype(np.float64)
        tokens = self.tokenizer([Templates.of("one").texts[0].format(name) for name in names])
        wanted = _run(self.text_graph(), "tokens", tokens).astype(np.float64)
        wanted = wanted[[names.index(name) for name, _ in rows]]
        penalty = 0.1 * np.eye(_FEATURES)  # ridge: keeps the projection small where features hardly differ
        fitted = np.linalg.solve(features.T @ features + penalty, features.T @ wanted)
        self.image_projection = fitted.astype(np.float32)

    @property
    def parameters(self) -> dict[str, int]:
        return {
            "image": self.kernel.size + self.bias.size + self.image_projection.size,
            "text": self.table.size + self.text_projection.size + self.text_bias.size,
        }

    @property
    def digest(self) -> str:
        text, image = (self.table, self.text_projection, self.text_bias), (self.kernel, self.bias)
        arrays = (*text, *image, self.image_projection)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def image_graph(self, *, int8: bool = False, head: bool = True) -> bytes:
        """Return the image tower, uint8 ``(B, 32, 32, 3)`` to unit ``(B, 16)``; without head its features."""
        nodes: list[Any] = []
        weights = [
            numpy_helper.from_array(np.array(1 / 255, np.float32), "pixel_scale"),
            numpy_helper.from_array(self.bias, "bias"),
        ]
        for name, array, axis in (("kernel", self.kernel, 0), ("projection", self.image_projection, 1)):
            if int8:
                others = tuple(each for each in range(array.ndim) if each != axis)
                scale = (np.abs(array).max(axis=others) / 127).astype(np.float32)
                rounded = np.round(array / np.expand_dims(scale, others)).astype(np.int8)
                weights += [
                    numpy_helper.from_array(rounded, f"{name}_int8"),
                    numpy_helper.from_array(scale, f"{name}_scale"),
                ]
                nodes.append(
                    helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=axis)
                )
            else:
                weights.append(numpy_helper.from_array(array, name))
        nodes += [
            helper.make_node("Cast", ["image"], ["float_image"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["float_image", "pixel_scale"], ["pixels"]),
            helper.make_node("Transpose", ["pixels"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["nchw", "kernel", "bias"], ["conv"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["conv"], ["relu"]),
            helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
        ]
        if head:
            nodes.append(helper.make_node("MatMul", ["features", "projection"], ["projected"]))
            nodes += _unit_norm("projected", "image_embedding", weights)
        output = ("image_embedding", EMBED_DIM) if head else ("features", _FEATURES)
        return _graph(
            "image", nodes, weights, ("image", TensorProto.UINT8, ["B", SIDE_PX, SIDE_PX, 3]), output
        )

    def text_graph(self) -> bytes:
        """Return the text tower: int32 ``(B, 16)`` to ``(B, 16)`` of unit norm; padding does not count."""
        weights = [
            numpy_helper.from_array(self.table, "table"),
            numpy_helper.from_array(self.text_projection, "projection"),
            numpy_helper.from_array(self.text_bias, "bias"),
            numpy_helper.from_array(np.array(self.tokenizer.config.special.pad, np.int32), "pad"),
            numpy_helper.from_array(np.array([1], np.int64), "token_axis"),
            numpy_helper.from_array(np.array([2], np.int64), "width_axis"),
            numpy_helper.from_array(np.array(1, np.float32), "one"),
        ]
        nodes = [
            helper.make_node("Gather", ["table", "tokens"], ["pieces"]),
            helper.make_node("Equal", ["tokens", "pad"], ["is_pad"]),
            helper.make_node("Not", ["is_pad"], ["is_piece"]),
            helper.make_node("Cast", ["is_piece"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "width_axis"], ["wide_mask"]),
            helper.make_node("Mul", ["pieces", "wide_mask"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "token_axis"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["mask", "token_axis"], ["count"], keepdims=1),
            helper.make_node("Max", ["count", "one"], ["divisor"]),
            helper.make_node("Div", ["sum", "divisor"], ["mean"]),
            helper.make_node("Gemm", ["mean", "projection", "bias"], ["projected"]),
        ]
        nodes += _unit_norm("projected", "text_embedding", weights)
        tokens = ("tokens", TensorProto.INT32, ["B", CONTEXT_LENGTH])
        return _graph("text", nodes, weights, tokens, ("text_embedding", EMBED_DIM))


def _unit_norm(source: str, target: str, weights: list[Any]) -> list[Any]:
    weights += [
        numpy_helper.from_array(np.array([-1], np.int64), "last_axis"),
        numpy_helper.from_array(np.array(1e-12, np.float32), "least_norm"),
    ]
    return [
        helper.make_node("ReduceL2", [source, "last_axis"], ["norm"], keepdims=1),
        helper.make_node("Max", ["norm", "least_norm"], ["safe_norm"]),
        helper.make_node("Div", [source, "safe_norm"], [target]),
    ]


def _graph(
    name: str, nodes: list[Any], weights: list[Any], feed: tuple[str, int, list[Any]], output: tuple[str, int]
) -> bytes:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*feed)],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, ["B", output[1]])],
        [weight for weight in weights if any(weight.name in node.input for node in nodes)],
    )
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="edgeclip")
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _run(graph: bytes, name: str, rows: NDArray[Any]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = ReferenceEvaluator(onnx.load_from_string(graph)).run(None, {name: rows})[0]
    return result


def _image_tower(file: str) -> dict[str, Any]:
    image = {"name": "image", "dtype": "uint8", "shape": ["B", SIDE_PX, SIDE_PX, 3]}
    embedding = {"name": "image_embedding", "dtype": "float32", "shape": ["B", EMBED_DIM]}
    return {"model": file, "files": [file], "inputs": [image], "outputs": [embedding]}


def _text_tower(file: str) -> dict[str, Any]:
    tokens = {"name": "tokens", "dtype": "int32", "shape": ["B", CONTEXT_LENGTH]}
    embedding = {"name": "text_embedding", "dtype": "float32", "shape": ["B", EMBED_DIM]}
    return {"model": file, "files": [file], "inputs": [tokens], "outputs": [embedding]}


def _parity(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> dict[str, Any]:
    cosine = (reference * candidate).sum(axis=1)
    return {
        "status": "passed",
        "max_abs": round(float(np.abs(reference - candidate).max()), 6),
        "cosine_min": round(float(cosine.min()), 6),
        "cosine_mean": round(float(cosine.mean()), 6),
        "n": len(reference),
    }


if __name__ == "__main__":
    print(make_tiny_bundle(Path(sys.argv[1])))
