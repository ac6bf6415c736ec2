"""How far exported towers are from eager float32 ones, at full size: every architecture, both precisions.

Weights are random (a softmax over the wrong tokens or a lost bias shows), batch norms hold the statistics
they meet. Pictures are photographs of edgeclip's; token rows are random and end like texts. Every float form
of ONNX and OpenVINO is built as `edgeclip export` builds it, opened as a device opens it, and run in batches
of 1 and 5. Random weights give nearly one embedding for every input: what counts is the largest difference of
one element, and that difference beside the spread of the embeddings around their mean.

How much a random network makes of the rounding of its weights to float16 differs by a factor of a hundred
between architectures. Beside each tower stands that amount (`rounding_alone`: float32 arithmetic, weights
rounded); a float16 form may be twice as far.

    python benchmarks/exported_parity.py                   # what the results lack
    python benchmarks/exported_parity.py --again --models MobileCLIP2-S4,ViT-L-14.openai
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tools"))

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn
from towers import random_weights
from written import arguments, write

from edgeclip.export.build import BuildRequest, builder_of
from edgeclip.export.passes import apply
from edgeclip.export.passes.sequences import shared
from edgeclip.export.reference import reference_pictures
from edgeclip.export.trace import trace_image_tower, trace_text_tower
from edgeclip.export.variants import VariantSpec
from edgeclip.manifest import PreprocessSpec
from edgeclip.models.clip import build_image_tower, build_text_tower
from edgeclip.models.config import CLIPConfig
from edgeclip.models.zoo import ModelConfig, model_entry
from edgeclip.runtime import RuntimeOptions, open_session
from edgeclip.runtime.parity import ParityLimits, check_parity, compare_embeddings
from edgeclip.runtime.rows import run_rows

# One name of each architecture and activation; the first generation's S3, S4 and L-14 are the second's.
MODELS = (
    "nano-bag-256",
    "nano-transformer-256",
    "EfficientNet-Lite0",
    "EfficientNet-Lite1",
    "EfficientNet-Lite2",
    "TinyCLIP-ViT-8M-16-Text-3M",
    "MobileCLIP-S0",
    "MobileCLIP2-S0",
    "MobileCLIP-S1",
    "MobileCLIP-S2",
    "TinyCLIP-ViT-39M-16-Text-19M",
    "TinyCLIP-ViT-40M-32-Text-19M",
    "TinyCLIP-ViT-61M-32-Text-29M",
    "MobileCLIP-B",
    "MobileCLIP2-B",
    "ViT-B-32.openai",
    "ViT-B-32.laion2b_s34b_b79k",
    "ViT-B-16.openai",
    "MobileCLIP2-S3",
    "MobileCLIP2-S4",
    "MobileCLIP2-L-14",
    "ViT-L-14.openai",
)
FORMS = ("onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16")
BATCHES = (1, 5)
LIMITS = {precision: ParityLimits.of(precision, "centred") for precision in ("fp32", "fp16")}
OF_SPREAD = {"fp32": 1e-3, "fp16": 0.01}
# A float16 form may be this many times as far as rounding alone, where that is more of the spread.
OF_ROUNDING = 2.0
_ROWS = 8


def measured(name: str, *, threads: int = 1) -> dict[str, Any]:
    """Return what every form of every tower of a model differs by, from a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--threads", str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{name}: {run.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def failures(result: Mapping[str, Any]) -> list[str]:
    """Return the numbers of a model that are beyond their limits, in words."""
    return [
        f"{tower}, {form}, {batch}: {failure}"
        for tower, forms in result["towers"].items()
        for form, batches in forms.items()
        if form in FORMS
        for batch, numbers in batches.items()
        for failure in numbers["failures"]
    ]


def measure(name: str, *, threads: int) -> dict[str, Any]:
    started = time.perf_counter()
    torch.set_num_threads(threads)
    config = model_entry(name).config
    rows, wanted, graphs = _traced(config)
    result: dict[str, Any] = {
        tower: {
            "spread": _rounded(_spread(wanted[tower])),
            "rows_alike": _rounded(compare_embeddings(wanted[tower], wanted[tower]).reference_similarity),
            "rounding_alone": _rounded(_of_spread(wanted[tower], _with_rounded(graphs[tower], rows[tower]))),
        }
        for tower in graphs
    }
    for form in FORMS:
        with tempfile.TemporaryDirectory() as work:
            for tower, found in _run(form, graphs, rows, Path(work), threads=threads):
                result[tower].setdefault(form, {})[f"batch {found.batch}"] = judged(
                    form, wanted[tower], found.embeddings, result[tower]["rounding_alone"]
                )
    return {
        "towers": result,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 2),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    batch: int
    embeddings: NDArray[np.float32]


def _run(
    form: str,
    graphs: Mapping[str, onnx.ModelProto],
    rows: Mapping[str, NDArray[Any]],
    work: Path,
    *,
    threads: int,
) -> list[tuple[str, _Found]]:
    """Build one form, store its files and run every tower."""
    spec = VariantSpec.parse(form)
    found = []
    for tower, built in builder_of(spec.form.format)(BuildRequest(spec, graphs, work)).towers.items():
        for name, content in built.files.items():
            if isinstance(content, bytes):
                (work / name).write_bytes(content)
        with open_session(work / built.model, options=RuntimeOptions(threads=threads)) as session:
            found += [
                (tower, _Found(batch, run_rows(session, rows[tower], batch=batch))) for batch in BATCHES
            ]
    return found


def judged(
    form: str, wanted: NDArray[np.float32], got: NDArray[np.float32], rounding_alone: float
) -> dict[str, Any]:
    """Return the numbers of one form, and which of them are beyond their limits."""
    precision = VariantSpec.parse(form).form.precision
    numbers, of_spread = compare_embeddings(wanted, got), _of_spread(wanted, got)
    said = [str(failure) for failure in check_parity(numbers, LIMITS[precision])]
    most = max(OF_SPREAD[precision], OF_ROUNDING * rounding_alone if precision == "fp16" else 0.0)
    if not of_spread <= most:
        said.append(f"{of_spread:.3g} of the spread, expected at most {most:.3g}")
    return {
        "max_abs": _rounded(numbers.max_abs),
        "of_spread": _rounded(of_spread),
        "centred_cosine_mean": numbers.centred_cosine_mean,
        "failures": said,
    }


def _with_rounded(graph: onnx.ModelProto, rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return what ONNX Runtime makes of rows in float32, with weights that were rounded to float16."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(graph)
    for tensor in rounded.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims:
            weights = np.frombuffer(tensor.raw_data, np.float32)
            tensor.raw_data = weights.astype(np.float16).astype(np.float32).tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounded.onnx"
        path.write_bytes(rounded.SerializeToString())
        del rounded
        with open_session(path) as session:
            return run_rows(session, rows, batch=_ROWS)


def _spread(wanted: NDArray[np.float32]) -> float:
    """Return the largest distance of an element from its mean over the rows."""
    return float(np.abs(wanted - wanted.mean(axis=0)).max())


def _of_spread(wanted: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    return float(np.abs(got - wanted).max()) / _spread(wanted)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


# --- a model, its inputs and what it makes of them --------------------------------------------------------


@torch.no_grad()
def _traced(
    config: ModelConfig,
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.float32]], dict[str, onnx.ModelProto]]:
    """Return rows, eager embeddings and graphs by tower; one tower is in memory at a time."""
    pixels = _pixels(config)
    rows: dict[str, NDArray[Any]] = {"image": pixels}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    planes = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    tower = _settled(random_weights(build_image_tower(config.image), dtype=torch.float32), planes)
    wanted = {"image": _embedded(tower, planes)}
    graphs = {"image": apply(trace_image_tower(tower, config), shared(), what="image tower")}
    if isinstance(config, CLIPConfig):
        rows["text"] = _tokens(config)
        tokens = torch.from_numpy(rows["text"])
        tower = _settled(random_weights(build_text_tower(config.text), seed=1, dtype=torch.float32), tokens)
        wanted["text"] = _embedded(tower, tokens)
        traced = trace_text_tower(tower, config.text.context_length)
        graphs["text"] = apply(traced, shared(), what="text tower")
    return rows, wanted, graphs


def _pixels(config: ModelConfig) -> NDArray[np.uint8]:
    """Return photographs as the model wants them."""
    spec = PreprocessSpec(
        image_size_px=config.image_size_px,
        resize=config.resize,
        interpolation=config.interpolation,
        crop=config.crop,
    )
    found = reference_pictures(spec)
    return found.pixels[list(found.whole[:_ROWS])]


def _tokens(config: CLIPConfig) -> NDArray[np.int32]:
    """Return rows of several lengths, closed by the largest id and filled with padding."""
    text = config.text
    rows = np.full((_ROWS, text.context_length), text.pad_id, np.int32)
    random = np.random.default_rng(1)
    for row, length in zip(rows, np.linspace(4, text.context_length, _ROWS).astype(int), strict=True):
        row[:length] = random.integers(1, text.vocab_size - 1, length)
        row[length - 1] = text.vocab_size - 1
    return rows


def _settled(tower: nn.Module, example: torch.Tensor) -> nn.Module:
    """Give batch norms the statistics they meet: with others, random weights reach 1e8, beyond float16."""
    for module in tower.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            module.train()
    tower(example)
    return tower.eval()


def _embedded(tower: nn.Module, rows: torch.Tensor) -> NDArray[np.float32]:
    embeddings = tower(rows).double()
    unit: NDArray[np.float64] = (embeddings / embeddings.norm(dim=-1, keepdim=True)).numpy()
    return unit.astype(np.float32)


# --- results ----------------------------------------------------------------------------------------------


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "exported_parity.json")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--again", action="store_true", help="measure models that the results have already")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help="measure one model in this process and print its numbers")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, threads=options.threads)))
        return
    for name in options.models.split(","):
        if name in _known(options.output) and not options.again:
            continue
        result = measured(name, threads=options.threads)
        print(name, failures(result) or "passed", file=sys.stderr)
        write(options.output, _document({**_known(options.output), name: result}))


def _known(output: Path) -> dict[str, Any]:
    """Return the results so far; another process may be adding to them."""
    if not output.exists():
        return {}
    known: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))["results"]
    return known


def _document(results: Mapping[str, Any]) -> dict[str, Any]:
    ordered = {name: results[name] for name in MODELS if name in results}
    return {
        "measures": "exported towers against eager float32, unit embeddings, random weights with settled "
        "batch norms: largest difference of one element, the same over the spread around the mean, and the "
        "cosine after taking the mean off",
        "limits": {
            precision: {"max_abs": LIMITS[precision].max_abs, "of_spread": OF_SPREAD[precision]}
            for precision in LIMITS
        }
        | {"of_rounding_alone": OF_ROUNDING},
        "rows": _ROWS,
        "missing": [name for name in MODELS if name not in ordered],
        "worst": {form: _worst(ordered, form) for form in FORMS},
        "passed": not any(failures(result) for result in ordered.values()),
        "results": ordered,
    }


def _worst(results: Mapping[str, Any], form: str) -> dict[str, float | None]:
    """Return the worst of every number over all models, towers and batches."""
    found: dict[str, list[float]] = {"max_abs": [], "of_spread": [], "of_rounding_alone": []}
    for result in results.values():
        for tower in result["towers"].values():
            for numbers in tower[form].values():
                found["max_abs"].append(numbers["max_abs"])
                found["of_spread"].append(numbers["of_spread"])
                found["of_rounding_alone"].append(numbers["of_spread"] / tower["rounding_alone"])
    return {name: _rounded(max(values)) for name, values in found.items()}


if __name__ == "__main__":
    main()
