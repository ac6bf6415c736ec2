"""One command from a checkpoint to a bundle: trace once, make every variant, compare each, commit once.

The float32 model says first what it makes of the reference set. Then its towers are traced, one after the
other, and let go. Each variant is made from these graphs, stored, opened from its stored files as a device
will open it, and compared; only when all of them agree does the manifest change. Whatever fails or is
interrupted, the old bundle stays what it was.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edgeclip.bundle import Bundle, BundleWriter, TensorEntry
from edgeclip.errors import ConfigError, MissingExtraError, ParityError
from edgeclip.labels import make_folder, write_atomic
from edgeclip.runtime.host import peak_rss_bytes
from edgeclip.storage import TEMPORARY_PREFIX

from .agreement import Yardstick, verify_tower
from .build import BuildRequest, BuiltTower, BuiltVariant, builder_of
from .calibration_rows import calibration_set
from .contents import write_contents, write_provenance
from .options import Checkpoint, Exported, ExportReport, ExportSettings, VariantReport
from .steps import OnStep, Steps
from .text_length import graphs_for
from .variants import VariantSpec

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray
    from torch import nn

    from edgeclip.calibration.dataset import CalibrationSet

    from .finish import FinishedGraph
    from .source import Source

__all__ = ["default_order", "export_bundle"]

# In the order in which a host that can run several of them should try them: int8 first, then what is fastest
# in float. TensorRT's files can stand before all others, as only hosts with its GPUs can run them.
_ORDER: Final = (
    "tensorrt-int8",
    "tensorrt-fp16",
    "tensorrt-fp32",
    "openvino-int8",
    "onnx-int8",
    "onnx-fp32",
    "openvino-fp16",
    "openvino-fp32",
    "onnx-fp16",
)
_NEEDED: Final = {"torch": "export", "onnx": "export", "onnxscript": "export"}


def export_bundle(
    checkpoint: Checkpoint,
    variants: Sequence[VariantSpec],
    out: Path,
    settings: ExportSettings | None = None,
    *,
    on_step: OnStep | None = None,
) -> Exported:
    """Export a model to a bundle, or add variants to the bundle that is there.

    Args:
        checkpoint: what to export.
        variants: what to make of it; those of the same name in the bundle are replaced.
        out: directory of the bundle.
        settings: how.
        on_step: told each step when it begins and when it ends.

    Returns:
        The bundle, opened, and what was measured.

    Raises:
        MissingExtraError: torch, onnx or what a format needs is not installed.
        ConfigError: choices that cannot be had together.
        InputError: checkpoint or pictures cannot be read.
        BundleError: the directory holds the bundle of another model, or cannot be written.
        ExportError: a tower cannot be traced, or a variant cannot be made.
        ParityError: a variant is further from float32 than its limits, or could not be verified where that
            was asked for.
    """
    settings = settings or ExportSettings()
    settings.check(variants)
    for module, extra in _needed(variants):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("edgeclip export", extra=extra, module=module)
    if (out / "config.json").is_file():
        raise ConfigError(f"{str(out)!r} is a checkpoint: name another directory for the bundle.")
    kept = settings.keep_intermediate
    if kept is not None and kept.absolute() == out.absolute():
        raise ConfigError(f"{str(out)!r} is the bundle: name another directory for the intermediate files.")
    steps = Steps(on_step or (lambda step: None))
    with BundleWriter(out) as writer, _work(writer.path, settings.keep_intermediate) as work:
        from .source import open_source

        with steps("open the checkpoint"):
            source = open_source(checkpoint, threads=settings.threads)
        yardstick = write_contents(writer, source, variants, settings, steps)
        student = source.image_graph(settings.graph) if settings.finish_int8 else None
        graphs = _trace(source, settings, steps, work)
        calibration = _calibration(source, graphs, variants, settings, steps, work)
        finished = None
        if student is not None:
            finished = _finish(student, variants, source, calibration, yardstick, settings, steps)
            del student
        source.release()
        made = {
            spec.name: _make(spec, yardstick, graphs, calibration, settings, steps, work, finished)
            for spec in variants
        }
        if settings.gates.require_verified:
            _raise_unverified(made)
        manifest = writer.manifest
        manifest["default_variants"] = default_order(manifest["variants"])
        write_provenance(manifest, yardstick, source, variants, settings)
        with steps("commit"):
            bundle = writer.commit()
    return Exported(bundle, _report(bundle, yardstick, made, steps))


def default_order(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return variants in the order in which a device should try them.

    One that was not verified is left out where it asks nothing of a host, so that a host could not tell
    whether it is meant; unless no other is left. A device proves what was not verified before it answers.

    Args:
        entries: ``variants`` of a manifest.
    """

    def eligible(name: str) -> bool:
        parity, requires = entries[name].get("parity", {}), entries[name].get("requires", {})
        verified = all(parity.get(tower, {}).get("status") == "passed" for tower in entries[name]["towers"])
        return verified or bool(requires.get("isa_any") or requires.get("compute_capability"))

    def place(name: str) -> tuple[int, bool, str]:
        form, at, _ = name.partition("@")
        return (_ORDER.index(form) if form in _ORDER else len(_ORDER), not at, name)

    ordered = sorted(entries, key=place)
    with_image = [name for name in ordered if "image" in entries[name]["towers"]]
    return [name for name in with_image if eligible(name)] or with_image


# --- steps and places --------------------------------------------------------------------------------------


def _needed(variants: Sequence[VariantSpec]) -> Iterator[tuple[str, str]]:
    """Yield packages with their extras: asked before a minute is spent on tracing."""
    yield from _NEEDED.items()
    if any(spec.form.format == "openvino" for spec in variants):
        yield "openvino", "openvino"


@contextlib.contextmanager
def _work(bundle: Path, kept: Path | None) -> Iterator[Path]:
    """Yield a folder for files on the way.

    It is in the bundle's directory, whose lock is held: what is there already is of an export that was
    killed, and every later write to the bundle removes it too.
    """
    if kept is not None:
        make_folder(kept)
        yield kept
        return
    prefix = f"{TEMPORARY_PREFIX}export-"
    for left in bundle.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=bundle, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


# --- graphs ------------------------------------------------------------------------------------------------


def _trace(
    source: Source, settings: ExportSettings, steps: Steps, work: Path
) -> Mapping[str, onnx.ModelProto]:
    graphs = {}
    for tower in ("image", "text") if settings.graph.text else ("image",):
        with steps(f"trace the {tower} tower"):
            graphs[tower] = source.trace(tower, settings.graph)
            if settings.keep_intermediate is not None:
                write_atomic(work / f"{tower}.onnx", graphs[tower].SerializeToString(deterministic=True))
    return graphs


def _calibration(
    source: Source,
    graphs: Mapping[str, onnx.ModelProto],
    variants: Sequence[VariantSpec],
    settings: ExportSettings,
    steps: Steps,
    work: Path,
) -> tuple[dict[str, NDArray[Any]], CalibrationSet | None]:
    """Return rows to choose ranges on, and the set they are, where anything is to be quantized."""
    if all(spec.form.precision != "int8" for spec in variants):
        return {}, None
    from .embedder import embedder

    spec, float_input = source.preprocess, settings.graph.float_input
    with (
        steps("calibration set"),
        embedder(graphs["image"], spec, float_input=float_input, threads=settings.threads) as embed,
    ):
        chosen = calibration_set(
            spec,
            settings.references,
            languages=source.tokenizer.config.languages,
            tokenize=partial(source.tokenizer, truncate=True) if settings.graph.text else None,
            tokenizer=source.tokenizer.digest,
            embed=embed,
            on_note=steps.note,
        )
        if settings.keep_intermediate is not None:
            chosen.write(work / "calibration.safetensors")
        return chosen.feeds(spec, float_input=float_input), chosen


def _finish(
    module: nn.Module,
    variants: Sequence[VariantSpec],
    source: Source,
    calibration: tuple[dict[str, NDArray[Any]], CalibrationSet | None],
    yardstick: Yardstick,
    settings: ExportSettings,
    steps: Steps,
) -> FinishedGraph:
    """Return the image tower that int8 variants are made of."""
    from edgeclip.distill.finish_int8 import FinishSettings

    from .finish import finish_image_tower
    from .int8 import scheme_of

    total = settings.finish_int8
    targets = [spec.target for spec in variants if spec.form.precision == "int8"]
    # Trained for the coarser weights, it gains with the finer ones, too.
    scheme = scheme_of(fit_pairs=any(target is None or target.fit_pairs for target in targets))
    with steps("finish the image tower for int8"):
        return finish_image_tower(
            module,
            source.config,
            settings.graph,
            calibration[0]["image"],
            scheme=scheme,
            quantization=settings.build.quantization,
            bank=yardstick.bank.embeddings if yardstick.basis == "trained" else None,
            settings=FinishSettings(steps=total, scale=source.scale),
            on_step=lambda step, loss: steps.note(f"finish the image tower for int8: {step} of {total}"),
        )


# --- variants ----------------------------------------------------------------------------------------------


def _make(
    spec: VariantSpec,
    yardstick: Yardstick,
    graphs: Mapping[str, onnx.ModelProto],
    calibration: tuple[dict[str, NDArray[Any]], CalibrationSet | None],
    settings: ExportSettings,
    steps: Steps,
    work: Path,
    finished: FinishedGraph | None,
) -> VariantReport:
    """Make, store and compare one variant."""
    folder = work / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    is_int8, options = spec.form.precision == "int8", settings.build
    rows, chosen = calibration if is_int8 else ({}, None)
    if is_int8 and finished is not None:
        graphs = {**graphs, "image": finished.graph}
        # It has learnt with the nearest levels.
        nearest = replace(options.quantization, rounding="nearest")
        options = replace(options, quantization=nearest)
    tokens = yardstick.tokens
    graphs = graphs_for(spec, graphs, None if tokens is None else tokens.shape[1])
    with steps(f"{spec.name}: make"):
        request = BuildRequest(
            spec,
            graphs,
            folder,
            rows,
            None if chosen is None else chosen.digest,
            options,
            yardstick.bank.embeddings if yardstick.basis == "trained" else None,
            on_step=lambda said: steps.note(f"{spec.name}: {said}"),
        )
        built = builder_of(spec.form.format)(request)
        if built.calibration is not None and chosen is not None:
            told = {} if finished is None else {"finishing": finished.to_dict()}
            built = replace(built, calibration={**built.calibration, **chosen.to_dict(), **told})
        if settings.graph.bake_labels and spec.form.format == "onnx":
            built = replace(built, towers={**built.towers, "classifier": _classifier(built, yardstick, spec)})
    replaced = spec.name in yardstick.writer.manifest["variants"]
    with steps(f"{spec.name}: store"):
        sizes = _store(spec, built, yardstick.writer)
        towers = sorted(built.towers)
        choices = (built.calibration or {}).get("choice", {})
        del built
    reports = {}
    for tower in towers:
        with steps(f"{spec.name}: verify the {tower} tower"):
            reports[tower] = replace(
                verify_tower(spec, tower, yardstick, settings.gates, folder), size_bytes=sizes[tower]
            )
    return VariantReport(reports, replaced, choices)


def _classifier(built: BuiltVariant, yardstick: Yardstick, spec: VariantSpec) -> BuiltTower:
    """Return the image tower of a variant with the labels inside."""
    import onnx

    from .passes import apply
    from .passes.bake_labels import BakeLabels

    image = built.towers["image"]
    content = image.files[image.model]
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    bake = BakeLabels(
        yardstick.bank.embeddings, yardstick.bank.names, bank=yardstick.bank_name, scale=yardstick.scale
    )
    graph = apply(onnx.load_model_from_string(data), [bake], what=f"classifier of {spec.name}")
    # What other files the graph reads are the image tower's, under the same names.
    files = {"classifier.onnx": graph.SerializeToString(deterministic=True)}
    files |= {name: said for name, said in image.files.items() if name != image.model}
    batch = image.outputs[0].shape[0]
    logits = TensorEntry(name="logits", dtype="float32", shape=(batch, len(yardstick.bank)))
    return BuiltTower("classifier.onnx", files, image.inputs, (logits,))


def _store(spec: VariantSpec, built: BuiltVariant, writer: BundleWriter) -> dict[str, int]:
    """Add the files of a variant, name it in the manifest, and return the size of each tower."""
    entry: dict[str, Any] = {
        "format": spec.form.format,
        "precision": spec.form.precision,
        "target": spec.target_name,
        "requires": msgspec.to_builtins(built.requires),
        "session_config": dict(built.session_config),
        "calibration": None if built.calibration is None else dict(built.calibration),
        "towers": {},
        "parity": {},
    }
    sizes = {}
    for name, tower in built.towers.items():
        files = {f"{spec.name}/{file}": content for file, content in tower.files.items()}
        if tower.alike:
            stored = writer.add_alike(files)
        else:
            stored = {file: writer.add(file, content) for file, content in files.items()}
        entry["towers"][name] = {
            "model": stored[f"{spec.name}/{tower.model}"],
            "files": list(stored.values()),
            "inputs": msgspec.to_builtins(tower.inputs),
            "outputs": msgspec.to_builtins(tower.outputs),
        }
        sizes[name] = sum((writer.path / file).stat().st_size for file in stored.values())
    writer.manifest["variants"][spec.name] = entry
    return sizes


def _raise_unverified(made: Mapping[str, VariantReport]) -> None:
    left = [
        f"{name}, {tower} tower: {said.reason}"
        for name, variant in made.items()
        for tower, said in variant.towers.items()
        if said.status != "passed"
    ]
    if left:
        raise ParityError(
            f"not verified: {'; '.join(left)}. Nothing was written: export on a host that can run it, or "
            "without --require-verified."
        )


def _report(
    bundle: Bundle, yardstick: Yardstick, made: Mapping[str, VariantReport], steps: Steps
) -> ExportReport:
    return ExportReport(
        bundle=str(bundle.path),
        digest=bundle.digest,
        model=bundle.manifest.model.name,
        reference=yardstick.reference.to_dict(),
        basis=yardstick.basis,
        variants=made,
        default_variants=bundle.manifest.default_variants,
        steps=tuple(steps.done),
        peak_rss_bytes=peak_rss_bytes(),
        remarks=tuple(yardstick.remarks),
    )
