"""One command from a checkpoint to a bundle: trace once, make every variant, compare each, commit once.

The float32 model says first what it makes of the reference set. Then its towers are traced, one after the
other, and let go. Each variant is made from these graphs, stored, opened from its stored files as a device
will open it, and compared; only when all of them agree does the manifest change. Whatever fails or is
interrupted, the old bundle stays what it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from edgeclip.bundle import (
    Bundle,
    BundleWriter,
    PreprocessSpec,
    TensorEntry,
    TowerFiles,
    Variant,
    embedding_space,
)
from edgeclip.errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    ConfigError,
    ExportError,
    MissingExtraError,
    ParityError,
)
from edgeclip.labels import LabelBank
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.choose import unmet
from edgeclip.runtime.host import Host, peak_rss_bytes, versions
from edgeclip.runtime.parity import (
    DEGENERATE_SIMILARITY,
    Basis,
    Golden,
    ParityLimits,
    ParityNumbers,
    check_parity,
    check_tower,
    compare_embeddings,
    compare_logits,
)
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import OpenSession, RuntimeOptions, open_session
from edgeclip.tensors import write_tensors

from .build import BuildRequest, BuiltTower, BuiltVariant, builder_of
from .notices import notice_of
from .options import (
    Checkpoint,
    Exported,
    ExportReport,
    ExportSettings,
    Offered,
    Step,
    TowerReport,
    VariantReport,
)
from .reference import (
    Expected,
    Reference,
    calibration_pictures,
    calibration_texts,
    default_templates,
    everyday,
    golden_file,
    reference_pictures,
    reference_texts,
)
from .variants import VariantSpec

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from .source import Source

__all__ = ["default_order", "export_bundle"]

OnStep = Callable[[Step], None]

# In the order in which a host that can run several of them should try them: int8 first, where it agrees; then
# what is fastest in float (design 0001). Tensor cores need no hint: only their hosts can run these files.
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
_MODULES: Final = ("torch", "onnx", "onnxscript")


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
    settings.graph.check(variants)
    settings.gates.check(variants)
    for module in _MODULES:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("exporting a model", extra="export", module=module)
    if (out / "config.json").is_file():
        raise ConfigError(f"{str(out)!r} is a checkpoint: name another directory for the bundle.")
    steps = _Steps(on_step or (lambda step: None))
    with BundleWriter(out) as writer, _work(settings.keep_intermediate) as work:
        from .source import open_source

        with steps("open the checkpoint"):
            source = open_source(checkpoint, threads=settings.threads)
        export = _begin(writer, source, settings, steps)
        graphs = _trace(source, settings, steps, work)
        calibration = _calibration(source, variants, settings, steps)
        source.release()
        made = {
            spec.name: _make(spec, export, graphs, calibration, settings, steps, work) for spec in variants
        }
        if settings.gates.require_verified:
            _raise_unverified(made)
        manifest = writer.manifest
        manifest["default_variants"] = default_order(manifest["variants"])
        _say_where_from(manifest, export, source, variants, settings)
        with steps("commit"):
            bundle = writer.commit()
    return Exported(bundle, _report(bundle, export, made, steps))


def default_order(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return variants in the order in which a device should try them.

    Those that were not verified are left out, unless none was: a device must not choose them by itself.

    Args:
        entries: ``variants`` of a manifest.
    """

    def verified(name: str) -> bool:
        parity = entries[name].get("parity", {})
        return all(parity.get(tower, {}).get("status") == "passed" for tower in entries[name]["towers"])

    def place(name: str) -> tuple[int, bool, str]:
        form, at, _ = name.partition("@")
        return (_ORDER.index(form) if form in _ORDER else len(_ORDER), not at, name)

    ordered = sorted(entries, key=place)
    with_image = [name for name in ordered if "image" in entries[name]["towers"]]
    return [name for name in with_image if verified(name)] or with_image


# --- steps and places --------------------------------------------------------------------------------------


class _Steps:
    """What is being done, told and timed."""

    def __init__(self, tell: OnStep) -> None:
        self._tell = tell
        self.done: list[Step] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._tell(Step(name))
        began = time.perf_counter()
        yield
        self.done.append(Step(name, round(time.perf_counter() - began, 3)))
        self._tell(self.done[-1])

    def note(self, name: str) -> None:
        """Tell a part of a step."""
        self._tell(Step(name))


@contextlib.contextmanager
def _work(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="edgeclip-export-") as folder:
        yield Path(folder)


# --- the bundle but for its variants -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Export:
    """What every variant is compared with, and where it goes."""

    writer: BundleWriter
    spec: PreprocessSpec
    reference: Reference
    expected: Expected
    tokens: NDArray[np.int32] | None
    bank: LabelBank
    bank_name: str
    basis: Basis
    similarity: float
    scale: float
    threads: int | None
    remarks: list[str] = field(default_factory=list)


def _begin(writer: BundleWriter, source: Source, settings: ExportSettings, steps: _Steps) -> _Export:
    """Write what belongs to the model, and have the float32 model speak on the reference set."""
    manifest = writer.manifest
    spec = msgspec.structs.replace(
        source.preprocess, applied="host" if settings.graph.float_input else "graph"
    )
    space = embedding_space(source.digest, spec)
    existing = _existing(writer, source, spec, space)
    languages = source.tokenizer.config.languages
    given = settings.references.offered
    bank_name = existing.manifest.default_bank if existing is not None and given is None else None
    if existing is not None and bank_name is not None:
        file = existing.manifest.label_banks[bank_name].file
        bank = LabelBank.from_bytes(existing.read(file), source=f"{existing.where}: label bank {bank_name!r}")
    else:
        offered = given or everyday(languages)
        with steps(f"{len(offered.labels)} labels: eager float32"):
            bank, bank_name = _eager_bank(source, offered, space, steps), offered.name
        _refuse_other_labels(existing, bank_name, bank)
        _add_bank(writer, bank, bank_name, languages, scale=source.scale)
    with steps("reference pictures"):
        pictures = reference_pictures(source.preprocess, settings.references.pictures)
    texts = reference_texts(bank.labels, bank.templates, languages) if settings.graph.text else ()
    reference = Reference(pictures, texts)
    what = f"{len(pictures.names)} pictures" + (f" and {len(texts)} texts" if texts else "")
    with steps(f"{what}: eager float32"):
        image = source.images(
            pictures.pixels, lambda done, total: steps.note(f"eager float32: {done} of {total} pictures")
        )
        expected = Expected(image, source.texts(texts) if texts else None)
    similarity = compare_embeddings(image, image).reference_similarity or 0.0
    basis: Basis = "trained" if similarity < DEGENERATE_SIMILARITY else "centred"
    export = _Export(
        writer,
        spec,
        reference,
        expected,
        source.tokenizer(texts, truncate=True) if texts else None,
        bank,
        bank_name,
        basis,
        similarity,
        source.scale,
        settings.threads,
    )
    if basis == "centred":
        export.remarks.append(
            f"the reference embeddings are all alike (median cosine {similarity:.3f}), so cosines and ranks "
            "mean nothing: judged are differences and cosines after taking the mean off"
        )
    if existing is None:
        _describe(writer, source, spec, space, text=settings.graph.text)
    elif settings.graph.text and manifest.get("tokenizer") is None:
        manifest["tokenizer"] = _add_tokenizer(writer, source)
    if existing is None or existing.manifest.golden is None or given or settings.references.pictures:
        golden = golden_file(reference, expected, source.tokenizer, bank, bank_name)
        manifest["golden"] = writer.add("golden.safetensors", golden)
        if settings.references.pictures is not None:
            export.remarks.append(
                f"the bundle's golden file holds pictures of {pictures.source!r}, at the size of the tower"
            )
    return export


def _existing(writer: BundleWriter, source: Source, spec: PreprocessSpec, space: str) -> Bundle | None:
    """Return the bundle that is there.

    Raises:
        BundleError: it holds another model, or the same one for other inputs.
    """
    if "model" not in writer.manifest:
        return None
    bundle = Bundle.open(writer.path)
    known = bundle.manifest.model
    if known.embedding_space != space:
        raise BundleError(
            f"{bundle.where}: holds the model {known.name!r} of the embedding space "
            f"{known.embedding_space[:12]}…, got {source.config.name!r} of {space[:12]}…: name another "
            "directory, or remove that bundle."
        )
    if bundle.manifest.preprocess.applied != spec.applied:
        raise BundleError(
            f"{bundle.where}: its pictures are normalized by the {bundle.manifest.preprocess.applied}, got "
            f"{spec.applied}: one bundle has one kind of input, name another directory."
        )
    return bundle


def _refuse_other_labels(existing: Bundle | None, name: str, bank: LabelBank) -> None:
    """Refuse to put other labels under the name of a bank that a variant has inside."""
    for variant in {} if existing is None else existing.manifest.variants.values():
        parity = variant.parity.get("classifier")
        if existing is None or parity is None or parity.bank != name:
            continue
        known = LabelBank.from_bytes(existing.read(existing.manifest.label_banks[name].file))
        if known.names != bank.names or known.templates.digest != bank.templates.digest:
            raise ConfigError(
                f"{existing.where}: its bank {name!r} has {len(known)} other labels, and a variant has them "
                "inside: give the label file another name, or name another directory."
            )


def _eager_bank(source: Source, offered: Offered, space: str, steps: _Steps) -> LabelBank:
    templates = offered.templates or default_templates(offered.labels)
    bank = source.subject.bank(
        offered.labels,
        templates,
        on_progress=lambda said: steps.note(f"labels: {said.labels_done} of {said.labels}"),
    )
    # As it is stored: everything is compared with what devices will read.
    return LabelBank.from_bytes(replace(bank, space=space).to_bytes(dtype="float16"))


def _add_bank(
    writer: BundleWriter, bank: LabelBank, name: str, languages: Sequence[str], *, scale: float
) -> None:
    manifest = writer.manifest
    chinese = default_templates(bank.labels).name == "zh"
    language = "zh" if chinese else "en" if "en" in languages else None
    manifest.setdefault("label_banks", {})[name] = {
        "file": writer.add(f"banks/{name}.safetensors", bank.to_bytes(dtype="float16")),
        "labels": len(bank),
        "templates": bank.templates.name,
        "language": language,
        "aliases": sorted({code for label in bank.labels.labels for code, _ in label.aliases}),
    }
    manifest["default_bank"] = name
    head = writer.add(
        "heads/temperature.safetensors", write_tensors({"scale": np.array([scale], np.float32)})
    )
    manifest.setdefault("heads", {})[f"temperature-{name}"] = {
        "kind": "temperature",
        "file": head,
        "bank": name,
        "fitted_on": "the model's own scale",
    }


def _describe(writer: BundleWriter, source: Source, spec: PreprocessSpec, space: str, *, text: bool) -> None:
    parameters = dict(source.parameters)
    if not text:
        parameters.pop("text")
    manifest = writer.manifest
    manifest.update(
        model={
            "name": source.config.name,
            "family": source.family,
            "parameters": parameters,
            "embed_dim": source.config.embed_dim,
            "scale": source.scale,
            "languages": list(source.tokenizer.config.languages),
            "licence": source.licence,
            "parents": [dict(parent) for parent in source.parents],
            "notices": [writer.add("NOTICE.txt", notice_of(source, text=text))],
            "embedding_space": space,
        },
        preprocess=msgspec.to_builtins(spec),
        tokenizer=_add_tokenizer(writer, source) if text else None,
        variants={},
    )


def _add_tokenizer(writer: BundleWriter, source: Source) -> dict[str, Any]:
    stored = {
        name: writer.add(f"tokenizer/{name}", content) for name, content in source.tokenizer.files.items()
    }
    return {
        "config": stored["tokenizer.json"],
        "merges": stored["merges.txt.gz"],
        "words": stored.get("words.bin"),
        "digest": source.tokenizer.digest,
    }


def _say_where_from(
    manifest: dict[str, Any],
    export: _Export,
    source: Source,
    variants: Sequence[VariantSpec],
    settings: ExportSettings,
) -> None:
    """Write into the provenance how each variant was made."""
    installed = {**versions(), **_versions(("onnx", "onnxscript", "onnx-ir", "nncf"))}
    said = {
        "tool": "edgeclip export",
        "source": dict(source.origin),
        "graph": settings.graph.to_dict(),
        "gelu_tanh": settings.build.gelu_tanh,
        "reference": export.reference.to_dict(),
        "limits": [f"{each.where}:{each.number}={each.limit:g}" for each in settings.gates.limits],
        "versions": installed,
    }
    provenance = manifest.setdefault("provenance", {})
    provenance["source"] = dict(source.origin)
    provenance["variants"] = {
        name: entry
        for name, entry in {
            **provenance.get("variants", {}),
            **{spec.name: said for spec in variants},
        }.items()
        if name in manifest["variants"]
    }


def _versions(names: Sequence[str]) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# --- graphs ------------------------------------------------------------------------------------------------


def _trace(
    source: Source, settings: ExportSettings, steps: _Steps, work: Path
) -> Mapping[str, onnx.ModelProto]:
    graphs = {}
    for tower in ("image", "text") if settings.graph.text else ("image",):
        with steps(f"trace the {tower} tower"):
            graphs[tower] = source.trace(tower, settings.graph)
            if settings.keep_intermediate is not None:
                path = work / f"{tower}.onnx"
                path.write_bytes(graphs[tower].SerializeToString(deterministic=True))
    return graphs


def _calibration(
    source: Source, variants: Sequence[VariantSpec], settings: ExportSettings, steps: _Steps
) -> tuple[dict[str, NDArray[Any]], str | None]:
    """Return rows to choose ranges on, and their digest, where anything is to be quantized."""
    if all(spec.form.precision != "int8" for spec in variants):
        return {}, None
    with steps("calibration inputs"):
        given = settings.references.calibration
        pictures = calibration_pictures(source.preprocess, given)
        rows: dict[str, NDArray[Any]] = {"image": pictures.pixels}
        if settings.graph.text:
            texts = calibration_texts(source.tokenizer.config.languages)
            rows["text"] = source.tokenizer(texts, truncate=True)
        digest = hashlib.sha256()
        for name in sorted(rows):
            digest.update(np.ascontiguousarray(rows[name]).data)
        if settings.graph.float_input:
            rows["image"] = Preprocess(source.preprocess).normalize(pictures.pixels)
    return rows, digest.hexdigest()


# --- variants ----------------------------------------------------------------------------------------------


def _make(
    spec: VariantSpec,
    export: _Export,
    graphs: Mapping[str, onnx.ModelProto],
    calibration: tuple[dict[str, NDArray[Any]], str | None],
    settings: ExportSettings,
    steps: _Steps,
    work: Path,
) -> VariantReport:
    """Make, store and compare one variant."""
    folder = work / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    rows, digest = calibration if spec.form.precision == "int8" else ({}, None)
    with steps(f"{spec.name}: make"):
        request = BuildRequest(
            spec,
            graphs,
            folder,
            rows,
            digest,
            settings.build,
            on_step=lambda said: steps.note(f"{spec.name}: {said}"),
        )
        built = builder_of(spec.form.format)(request)
        if settings.graph.bake_labels and spec.form.format == "onnx":
            built = replace(built, towers={**built.towers, "classifier": _classifier(built, export, spec)})
    replaced = spec.name in export.writer.manifest["variants"]
    with steps(f"{spec.name}: store"):
        sizes = _store(spec, built, export.writer)
        towers = sorted(built.towers)
        del built
    reports = {}
    for tower in towers:
        with steps(f"{spec.name}: verify the {tower} tower"):
            reports[tower] = replace(_verify(spec, tower, export, settings, folder), size_bytes=sizes[tower])
    return VariantReport(reports, replaced)


def _classifier(built: BuiltVariant, export: _Export, spec: VariantSpec) -> BuiltTower:
    """Return the image tower of a variant with the labels inside."""
    import onnx

    from .passes import apply
    from .passes.bake_labels import BakeLabels

    image = built.towers["image"]
    content = image.files[image.model]
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    bake = BakeLabels(export.bank.embeddings, export.bank.names, bank=export.bank_name, scale=export.scale)
    graph = apply(onnx.load_model_from_string(data), [bake], what=f"classifier of {spec.name}")
    # What other files the graph reads are the image tower's, under the same names.
    files = {"classifier.onnx": graph.SerializeToString(deterministic=True)}
    files |= {name: said for name, said in image.files.items() if name != image.model}
    batch = image.outputs[0].shape[0]
    logits = TensorEntry(name="logits", dtype="float32", shape=(batch, len(export.bank)))
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
        stored = {file: writer.add(f"{spec.name}/{file}", content) for file, content in tower.files.items()}
        entry["towers"][name] = {
            "model": stored[tower.model],
            "files": list(stored.values()),
            "inputs": msgspec.to_builtins(tower.inputs),
            "outputs": msgspec.to_builtins(tower.outputs),
        }
        sizes[name] = sum((writer.path / file).stat().st_size for file in stored.values())
    writer.manifest["variants"][spec.name] = entry
    return sizes


def _verify(
    spec: VariantSpec, tower: str, export: _Export, settings: ExportSettings, work: Path
) -> TowerReport:
    """Open a stored tower as a device will, compare it, and write what was measured into the manifest.

    Raises:
        ParityError: it is beyond its limits.
        ExportError: its engine is here and cannot run it.
    """
    draft = export.writer.draft()
    variant = draft.variant(spec.name)
    what = f"variant {spec.name!r}, {tower} tower"
    try:
        session, reason, proxy = _open(variant, tower, export, work)
        if session is None:
            report = TowerReport("unverified", export.basis, None, reason=reason)
            _record(spec, tower, export, report)
            return report
        with session:
            candidate = run_rows(session, _rows(tower, export))
            numbers = _compare(tower, candidate, export)
            missed = _judge(spec, tower, export, settings, numbers, proxy)
            status = "unverified" if reason else "passed"
            report = TowerReport(status, export.basis, numbers, missed, proxy, reason)
            _record(spec, tower, export, report)
            if not reason:
                _check_golden(export.writer.draft(), spec, tower, session)
    except BackendError as error:
        raise ExportError(f"{what}: its engine is here and cannot run it: {error}") from error
    return report


def _open(
    variant: Variant, tower: str, export: _Export, work: Path
) -> tuple[OpenSession | None, str, str | None]:
    """Open a tower on its engine, else on ONNX Runtime; say why not the former, and what the latter is."""
    format_name = variant.entry.format
    device = "cuda" if format_name == "tensorrt" else "cpu"
    allow = frozenset({"unsafe-isa", "unverified"})
    options = RuntimeOptions(threads=export.threads, device=device, allow=allow, cache_dir=work / "engines")
    if format_name == "onnx":
        options = replace(options, cache_dir=None)
    files = variant.tower(tower)
    host = Host.here()
    reason = unmet(variant, options=options, host=host)
    if reason is None:
        try:
            if format_name == "tensorrt":
                from edgeclip.runtime.compile import compile_variant

                compile_variant(variant, towers=[tower], options=options)
            session = open_session(files, options=options)
        except BackendUnavailableError as error:
            reason = str(error).rstrip(".")
        else:
            return session, "", _other_isa(variant, host)
    if files.model.suffix != ".onnx":
        return None, reason, None
    proxy = _open_proxy(files, export)
    installed = versions().get("onnxruntime", "")
    return proxy, reason, None if proxy is None else f"ONNX Runtime {installed} on this CPU"


def _other_isa(variant: Variant, host: Host) -> str | None:
    """Return what to note where the numbers are from another kind of processor than the variant is for."""
    needed = variant.entry.requires.isa_any
    if not needed or (host.isa is not None and host.isa.intersection(needed)):
        return None
    return f"the same engine on {host.machine}, which has none of {', '.join(needed)}"


def _open_proxy(files: TowerFiles, export: _Export) -> OpenSession | None:
    # 8-bit weights saturate where two products are added in 16 bits; this takes exact kernels there.
    config = {"session.x64quantprecision": "1"} if files.precision == "int8" else {}
    graph = replace(files, format="onnx", session_config=config)
    try:
        return open_session(graph, options=RuntimeOptions(backend="ort", threads=export.threads))
    except BackendError:
        return None


def _rows(tower: str, export: _Export) -> NDArray[Any]:
    if tower == "text":
        assert export.tokens is not None
        return export.tokens
    pixels = export.reference.pictures.pixels
    return Preprocess(export.spec).normalize(pixels) if export.spec.applied == "host" else pixels


def _compare(tower: str, candidate: NDArray[Any], export: _Export) -> ParityNumbers:
    image = export.expected.image
    ranked = export.basis == "trained"
    if tower == "classifier":
        cosines = image @ export.bank.embeddings.T
        numbers = compare_logits(cosines, candidate / export.scale, similarity=export.similarity)
        return numbers if ranked else replace(numbers, top1_agreement=None, top5_agreement=None)
    if tower == "text":
        assert export.expected.text is not None
        return compare_embeddings(export.expected.text, candidate)
    return compare_embeddings(image, candidate, bank=export.bank.embeddings if ranked else None)


def _judge(
    spec: VariantSpec,
    tower: str,
    export: _Export,
    settings: ExportSettings,
    numbers: ParityNumbers,
    proxy: str | None,
) -> dict[str, float]:
    """Return the default limits that were missed and accepted on purpose.

    Raises:
        ParityError: a number is beyond its limit.
    """
    precision = spec.form.precision
    if tower == "classifier":
        defaults = ParityLimits.of_classifier(precision, export.basis)
    else:
        defaults = ParityLimits.of(precision, export.basis)
    if tower == "text":
        defaults = replace(defaults, top1_agreement=None)
    limits = settings.gates.of(spec, defaults)
    failures = check_parity(numbers, limits)
    if failures:
        names = export.reference.texts if tower == "text" else export.reference.pictures.names
        where = f"variant {spec.name!r}, {tower} tower" + (f" ({proxy})" if proxy else "")
        first = failures[0]
        loosen = "" if first.number == "not_finite" else f", or --limit {precision}:{first.number}=…"
        raise ParityError(
            f"{where}: {'; '.join(map(str, failures))}, over {numbers.n} inputs; the worst input is "
            f"{names[numbers.worst]!r}. Nothing was written: use another precision{loosen}."
        )
    return {failure.number: failure.limit for failure in check_parity(numbers, defaults)}


def _record(spec: VariantSpec, tower: str, export: _Export, report: TowerReport) -> None:
    host = Host.here().to_dict()
    said: dict[str, Any] = {
        "status": report.status,
        "n": 0 if report.numbers is None else report.numbers.n,
        "host": {key: host[key] for key in ("machine", "system", "cpu_model", "isa") if key in host},
        "proxy": report.proxy,
        "missed": dict(report.missed),
    }
    if report.basis != "trained":
        said["basis"] = report.basis
    if report.numbers is not None:
        for number in ("max_abs", "cosine_min", "cosine_mean", "top1_agreement", "top5_agreement"):
            said[number] = _rounded(getattr(report.numbers, number))
        if report.basis == "centred":
            said["centred_cosine_mean"] = _rounded(report.numbers.centred_cosine_mean)
    ranked = report.numbers is not None and report.numbers.top1_agreement is not None
    if ranked or tower == "classifier":
        said["bank"] = export.bank_name
    export.writer.manifest["variants"][spec.name]["parity"][tower] = said


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _check_golden(draft: Bundle, spec: VariantSpec, tower: str, session: OpenSession) -> None:
    """Make sure that the bundle's own check on a device passes.

    Raises:
        ParityError: it does not.
    """
    checked = check_tower(draft, Golden.of(draft), draft.variant(spec.name), tower, session)
    if not checked.passed:
        raise ParityError(
            f"variant {spec.name!r}, {tower} tower: agrees on the reference set, but on the "
            f"{checked.numbers.n} golden inputs {'; '.join(map(str, checked.failures))}, so that devices "
            "would refuse it. Give other pictures with --reference, or use another precision."
        )


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
    bundle: Bundle, export: _Export, made: Mapping[str, VariantReport], steps: _Steps
) -> ExportReport:
    return ExportReport(
        bundle=str(bundle.path),
        digest=bundle.digest,
        model=bundle.manifest.model.name,
        reference=export.reference.to_dict(),
        basis=export.basis,
        variants=made,
        default_variants=bundle.manifest.default_variants,
        steps=tuple(steps.done),
        peak_rss_bytes=peak_rss_bytes(),
        remarks=tuple(export.remarks),
    )
