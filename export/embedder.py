"""Pictures to embeddings of a float32 graph, in ONNX Runtime: what calibration sets are chosen by."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeclip.bundle import PreprocessSpec
from edgeclip.calibration.dataset import Embed
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import OpenSession, RuntimeOptions, open_session

from .to_onnx import built_tower

if TYPE_CHECKING:
    import onnx

__all__ = ["embedder"]


@contextlib.contextmanager
def embedder(
    graph: onnx.ModelProto, spec: PreprocessSpec, *, float_input: bool = False, threads: int | None = None
) -> Iterator[Embed]:
    """Give a function from rows ``(n, H, W, 3)`` uint8 to embeddings ``(n, E)``; it opens what it needs once.

    Args:
        graph: float32, of an image tower; stays as it is.
        spec: how the model wants pictures.
        float_input: the graph takes them normalized.
        threads: of the engine; usable cores without.

    Raises:
        BackendError: when it is called, and ONNX Runtime cannot run the graph.
    """
    opened: list[OpenSession] = []
    with contextlib.ExitStack() as stack:

        def session() -> OpenSession:
            if not opened:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                tower = built_tower("float", graph)
                for name, content in tower.files.items():
                    assert isinstance(content, bytes)
                    (folder / name).write_bytes(content)
                options = RuntimeOptions(threads=threads)
                opened.append(stack.enter_context(open_session(folder / tower.model, options=options)))
            return opened[0]

        def embed(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
            return run_rows(session(), Preprocess(spec).normalize(rows) if float_input else rows)

        yield embed
