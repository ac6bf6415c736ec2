"""Make what an engine needs so that it opens towers quickly here, and say what was made.

Every backend that compiles has ``prepare(model, options, *, force, on_progress) -> Prepared``: TensorRT
builds engines, OpenVINO and ONNX Runtime keep what they made of a network when they loaded it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from edgeclip.errors import BackendError, BackendUnavailableError
from edgeclip.runtime.choose import VariantChoice, unmet, version_fits, with_cache
from edgeclip.runtime.host import Host
from edgeclip.runtime.session import (
    BACKENDS,
    DEFAULT_OPTIONS,
    Prepared,
    RuntimeOptions,
    model_files,
    resolve_backend,
)

if TYPE_CHECKING:
    from edgeclip.bundle import Variant
    from edgeclip.runtime.trt_build import BatchRange

__all__ = ["CompiledTower", "EngineChoices", "compile_variant"]

_BATCHES: Final = {"image": (1, 1, 8), "text": (1, 16, 64)}
"""Single pictures come most often; texts come as a list of labels times their prompts."""


@dataclass(frozen=True)
class EngineChoices:
    """Choices that only engines built ahead of time have; ``None`` is the default of each.

    Attributes:
        batch: batches the engine is for.
        compute_capability: build for this GPU generation, without a GPU (TensorRT-RTX), or ``"any"``.
        workspace_bytes: memory for intermediate values.
    """

    batch: BatchRange | None = None
    compute_capability: str | None = None
    workspace_bytes: int | None = None


@dataclass(frozen=True)
class CompiledTower:
    """What was made of one tower.

    Attributes:
        tower: its name.
        backend: that made it.
        prepared: where it is, and what it took.
    """

    tower: str
    backend: str
    prepared: Prepared


def compile_variant(
    choice: VariantChoice | Variant,
    *,
    towers: Sequence[str] | None = None,
    options: RuntimeOptions = DEFAULT_OPTIONS,
    choices: EngineChoices | None = None,
    force: bool = False,
    on_progress: Callable[[str, str], None] | None = None,
) -> tuple[CompiledTower, ...]:
    """Compile towers of a variant for this host, or for another one.

    Args:
        choice: a variant of an open bundle. One of a tuned profile is made for its engine.
        towers: which; all without.
        options: backend, device, and ``cache_dir`` instead of the host cache.
        choices: for TensorRT.
        force: make again what is there.
        on_progress: told the tower and what is being done. What it raises ends the work.

    Raises:
        BackendUnavailableError: the variant cannot be run on the host it is compiled for.
        BackendError: the engine fails, or there is nowhere to keep what it makes.
        BundleError: there is no such tower, or its files are damaged.
    """
    choices = choices or EngineChoices()
    variant = choice.variant if isinstance(choice, VariantChoice) else choice
    is_tensorrt = variant.entry.format == "tensorrt"
    if not is_tensorrt and choices != EngineChoices():
        raise BackendUnavailableError(
            f"variant {variant.name!r}: {variant.entry.format} files are compiled for this host and every "
            "batch; batches, compute capability and workspace are for TensorRT alone."
        )
    _check(variant, options, choices)
    compiled = []
    for tower in towers or sorted(variant.entry.towers):
        asked = choice.options_for(options, tower) if isinstance(choice, VariantChoice) else options
        backend, _ = resolve_backend(variant.entry.format, asked)
        module = cast(Any, importlib.import_module(BACKENDS[backend].module))
        chosen = with_cache(variant, tower, asked)
        if chosen.cache_dir is None and (is_tensorrt or tower == "image"):
            raise BackendError(
                "this host has no cache directory that can be written: set EDGECLIP_CACHE_DIR to one."
            )
        extra: dict[str, Any] = {}
        if is_tensorrt:
            extra["settings"] = _settings(tower, choices)
        if not hasattr(module, "prepare"):
            prepared = Prepared(None, 0, 0.0, up_to_date=True)
        else:
            prepared = module.prepare(
                model_files(variant.tower(tower)),
                chosen,
                force=force,
                on_progress=None if on_progress is None else _for(tower, on_progress),
                **extra,
            )
        compiled.append(CompiledTower(tower, backend, prepared))
    return tuple(compiled)


def _check(variant: Variant, options: RuntimeOptions, choices: EngineChoices) -> None:
    """Refuse what the host it is compiled for cannot run."""
    needed, aim = variant.entry.requires.compute_capability, choices.compute_capability
    if aim is None:
        problem = unmet(variant, options=options, host=Host.here())
        if problem is not None:
            raise BackendUnavailableError(
                f"variant {variant.name!r} cannot be compiled here: {problem}. Compile it on the device, or "
                "name another variant."
            )
    elif aim != "any" and needed is not None and version_fits(aim, f">={needed}") is False:
        raise BackendUnavailableError(
            f"variant {variant.name!r} needs compute capability {needed} or newer, got {aim!r}."
        )


def _settings(tower: str, choices: EngineChoices) -> Any:
    from edgeclip.runtime.trt import EngineSettings
    from edgeclip.runtime.trt_build import BatchRange

    return EngineSettings(
        batch=choices.batch or BatchRange(*_BATCHES.get(tower, _BATCHES["image"])),
        compute_capability=choices.compute_capability,
        workspace_bytes=choices.workspace_bytes,
    )


def _for(tower: str, on_progress: Callable[[str, str], None]) -> Callable[[str], None]:
    return lambda said: on_progress(tower, said)
