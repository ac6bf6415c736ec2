"""How engines add products of bytes on this host, and refusing files whose sums would overflow.

What a processor says of itself is not asked: under emulation it can be another one's word. A product that
must overflow is run instead, once a process, which takes ONNX Runtime a millisecond or two. Where sums are
exact nothing more is done; where they are not, the weights of a file tell whether it can overflow
(:mod:`edgeclip.runtime.byte_products`).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from edgeclip.errors import BackendError, BackendUnavailableError
from edgeclip.runtime.host import Host
from edgeclip.runtime.session import BACKENDS, ModelFiles, RuntimeOptions, parse_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.bundle import Variant
    from edgeclip.runtime.byte_products import Overflow

__all__ = [
    "UnsafeIsaWarning",
    "adds_in_16_bits",
    "expected_overflow",
    "is_exact_by_setting",
    "lacks_vnni",
    "refuse_overflow",
    "run_graph",
]

_ENGINES: Final = ("ort", "openvino")
_EXACT_KERNELS: Final = "session.x64quantprecision"
_FLOAT_KERNELS: Final = "session.disable_quant_qdq"
_CPU_PROVIDER: Final = "CPUExecutionProvider"
_VNNI: Final = frozenset({"avx512_vnni", "avx_vnni"})
_TERMS: Final = 8


class UnsafeIsaWarning(UserWarning):
    """Says that a variant runs on instruction sets that it was not made for, because that was allowed."""


def run_graph(
    graph: bytes,
    feeds: Mapping[str, NDArray[Any]],
    *,
    backend: str = "ort",
    session_config: Mapping[str, str] | None = None,
) -> dict[str, NDArray[Any]]:
    """Run a tiny ONNX graph once, on one thread of the CPU.

    Args:
        graph: a file's content, see :mod:`edgeclip.runtime.probe_graphs`.
        feeds: inputs by name.
        backend: which engine.
        session_config: settings of the engine.

    Raises:
        BackendError: the engine is not here or cannot run it.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="edgeclip-") as folder:
        path = Path(folder) / "probe.onnx"
        path.write_bytes(graph)
        module = cast(Any, importlib.import_module(BACKENDS[backend].module))
        model = ModelFiles(path, "probe", "onnx", session_config=dict(session_config or {}))
        options = RuntimeOptions(backend=backend, threads=1)
        engine = module.load(model, options, reason="a probe of its sums")
        try:
            return cast("dict[str, NDArray[Any]]", engine.run(feeds))
        finally:
            engine.close()


@functools.cache
def adds_in_16_bits(backend: str = "ort") -> bool:
    """Return whether an engine adds pairs of products in 16 bits here, as AVX2 without VNNI does.

    Args:
        backend: ``"ort"`` or ``"openvino"``.

    Raises:
        BackendError: the engine is not here, or gives what neither way of adding does.
    """
    import numpy as np

    from edgeclip.runtime.probe_graphs import product

    rows = np.full((4, _TERMS), 255, np.float32)
    weight = np.full((_TERMS, 16), 127, np.int8)
    graph = product(rows.shape, (np.float32(1), 0), "uint8", weight, np.ones(16, np.float32))
    found = set(run_graph(graph, {"x": rows}, backend=backend)["y"].ravel().tolist())
    exact, in_16_bits = 255.0 * 127 * _TERMS, 32767.0 * _TERMS / 2
    if found == {exact}:
        return False
    if found == {in_16_bits}:
        return True
    raise BackendError(
        f"backend {backend!r}: a product of bytes gives {sorted(found)[:3]} here, expected {exact:.0f}, or "
        f"{in_16_bits:.0f} from sums of 16 bits. Use float variants, and report this host."
    )


def is_exact_by_setting(backend: str, session_config: Mapping[str, str]) -> bool:
    """Return whether settings of an engine keep it from adding in 16 bits anywhere."""
    return backend == "ort" and "1" in (
        session_config.get(_EXACT_KERNELS),
        session_config.get(_FLOAT_KERNELS),
    )


def expected_overflow(variant: Variant, backend: str, options: RuntimeOptions, host: Host) -> str | None:
    """Return why int8 answers of a variant would be wrong on a host, by what that host says of itself.

    Asks no engine, and reads the variant's files only where the host has AVX2 without VNNI.

    Args:
        variant: of a bundle.
        backend: what would run it.
        options: device, and guards that are lifted.
        host: where.

    Raises:
        BundleError: files are missing or damaged.
    """
    entry = variant.entry
    isa = host.isa or frozenset()
    if entry.precision != "int8" or backend not in _ENGINES or "unsafe-isa" in options.allow:
        return None
    if not lacks_vnni(host) or not _is_on_cpu(options):
        return None
    if is_exact_by_setting(backend, entry.session_config):
        return None
    for tower in sorted(entry.towers):
        files = variant.tower(tower)
        found = _stored_overflow(files.model, files.files)
        if found is not None:
            return (
                f"sums of its {tower} tower would overflow: this host has {', '.join(sorted(isa))} and no "
                "VNNI, so pairs of products are added in 16 bits"
            )
    return None


def lacks_vnni(host: Host) -> bool:
    """Return whether a host says that it has AVX2 and no instruction that adds four products in 32 bits."""
    isa = host.isa or frozenset()
    return "avx2" in isa and not isa & _VNNI


def refuse_overflow(model: ModelFiles, backend: str, options: RuntimeOptions) -> None:
    """Raise where a file's sums of bytes would overflow on this host; warn where that is allowed.

    Args:
        model: the file.
        backend: what will run it.
        options: device, and guards that are lifted.

    Raises:
        BackendUnavailableError: products of it would overflow.
        BackendError: the engine cannot be asked.
    """
    found = _overflow(model, backend, options)
    if found is None:
        return
    isa = Host.here().isa
    said = (
        f"{model.name}: its int8 answers would be wrong here: {backend} adds pairs of products in 16 bits on "
        f"this host ({', '.join(sorted(isa)) if isa else 'instruction sets unknown'}), and "
        f"{found.products} of its products can overflow them (at most in {found.worst!r}, whose weights add "
        f"up to {found.largest_pair}, 128 fits)"
    )
    if "unsafe-isa" in options.allow:
        warnings.warn(f"{said}; it is run because 'unsafe-isa' is allowed.", UnsafeIsaWarning, stacklevel=4)
        return
    raise BackendUnavailableError(
        f"{said}. Use a float variant or one made for x86-avx2 (edgeclip export "
        "--target x86-avx2); allow 'unsafe-isa' runs it all the same."
    )


def _overflow(model: ModelFiles, backend: str, options: RuntimeOptions) -> Overflow | None:
    """Return what overflows, ``None`` where nothing does."""
    if backend not in _ENGINES or model.precision not in ("int8", "as stored") or not _is_on_cpu(options):
        return None
    if is_exact_by_setting(backend, model.session_config):
        return None
    # A look at the file is cheaper than asking OpenVINO, and dearer than asking ONNX Runtime.
    if backend == "openvino" and not _can_overflow(model.model, model.files):
        return None
    return _stored_overflow(model.model, model.files) if adds_in_16_bits(backend) else None


def _is_on_cpu(options: RuntimeOptions) -> bool:
    return parse_device(options.device)[0] == "cpu" and options.providers in (None, (_CPU_PROVIDER,))


def _can_overflow(path: Path, files: Iterable[Path]) -> bool:
    from edgeclip.runtime.byte_products import can_overflow

    try:
        return can_overflow(path, files)
    except (OSError, ValueError):
        return False  # the engine says next, and better, what is wrong with the file


def _stored_overflow(path: Path, files: Iterable[Path]) -> Overflow | None:
    from edgeclip.runtime.byte_products import overflow

    try:
        return overflow(path, files)
    except (OSError, ValueError):
        return None  # as above
