"""The loop a careful user writes over an ONNX file: Pillow, numpy and an engine, no torch.

Full decode, resize and centre crop as torchvision does them, float32 pixels, one row into the engine, one
matrix product with the text embeddings. ``reduced`` lets the JPEG decoder work at a smaller scale
(``Image.draft``), which few know; ``engine`` is ``onnxruntime`` with the settings its documentation
recommends (all optimizations, threads set, spinning as it comes) or ``openvino``. Texts are tokenized by
`tokenizers`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


class Peer:
    """Pictures to labels through one file for pictures and one for texts."""

    def __init__(
        self,
        *,
        threads: int,
        image: str,
        text: str = "",
        tokenizer: str = "",
        bank: str,
        size_px: int,
        bicubic: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        engine: str = "onnxruntime",
        reduced: bool = False,
        spinning: bool = True,
        text_batch: int = 100,
    ) -> None:
        self.size_px, self.reduced, self.threads = size_px, reduced, threads
        self.resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        self.mean = None if mean is None else np.array(mean, np.float32)
        self.std = None if std is None else np.array(std, np.float32)
        self.engine, self.spinning, self.text_batch = engine, spinning, text_batch
        self.bank = np.load(bank)  # (labels, E), unit norm
        self.image = self._open(image) if image else None
        self.text_path, self.tokenizer_path = text, tokenizer
        self.text = self.tokenizer = None

    def _open(self, path):  # noqa: ANN001, ANN202 - foreign types
        if self.engine == "openvino":
            import openvino

            settings = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
            settings["INFERENCE_PRECISION_HINT"] = "f32"
            request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
            return lambda rows: request.infer({0: rows}, share_inputs=True)[0]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        if not self.spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda rows: session.run(None, {name: rows})[0]

    def pixels(self, path: str) -> np.ndarray:
        """Return ``(1, 3, S, S)`` float32."""
        size = self.size_px
        with Image.open(path) as opened:
            width, height = opened.size
            if self.reduced:
                opened.draft("RGB", (2 * size, 2 * size))
            picture = opened.convert("RGB")
        shorter = min(width, height)
        shape = (int(size * width / shorter), int(size * height / shorter))
        picture = picture.resize(shape, self.resample)
        left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
        picture = picture.crop((left, top, left + size, top + size))
        values = np.asarray(picture, np.float32) / 255
        if self.mean is not None:
            values = (values - self.mean) / self.std
        return np.ascontiguousarray(values.transpose(2, 0, 1)[None])

    def cosines(self, path: str) -> np.ndarray:
        return (self.image(self.pixels(path)) @ self.bank.T)[0]

    def classify(self, path: str) -> int:
        """Return the number of the best label."""
        return int(self.cosines(path).argmax())

    def similarities(self, path: str) -> list[float]:
        return self.cosines(path).tolist()

    def texts(self, texts: list[str]) -> list[float]:
        """Encode texts in batches, ``text_batch`` rows each; return the first row."""
        if self.text is None:
            from tokenizers import Tokenizer

            self.text = self._open(self.text_path)
            self.tokenizer = Tokenizer.from_file(self.tokenizer_path)
        rows = [self.text(self.tokens(texts[at : at + self.text_batch])) for at in self._starts(texts)]
        return np.concatenate(rows)[0].tolist()

    def _starts(self, texts: list[str]) -> range:
        return range(0, len(texts), self.text_batch)

    def tokens(self, texts: list[str]) -> np.ndarray:
        return np.array([row.ids for row in self.tokenizer.encode_batch(texts)], np.int64)

    # -- floors: what no program that uses the same libraries can do without -----------------------------

    def decode(self, path: str) -> None:
        """Decode the JPEG and nothing else, at full or at reduced scale."""
        with Image.open(path) as opened:
            if self.reduced:
                opened.draft("RGB", (2 * self.size_px, 2 * self.size_px))
            opened.load()

    def tower(self, kind: str) -> None:
        """Run the image tower on a picture that is ready."""
        if not hasattr(self, "ready"):
            shape = (
                (1, self.size_px, self.size_px, 3) if kind == "uint8" else (1, 3, self.size_px, self.size_px)
            )
            drawn = np.random.default_rng(0).integers(0, 256, shape)
            self.ready = drawn.astype(np.uint8) if kind == "uint8" else (drawn / 255).astype(np.float32)
        self.image(self.ready)
