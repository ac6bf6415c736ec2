"""Which variant of a bundle this host runs, and opening its towers.

``auto`` takes the tuned device profile where there is one, else the first of ``default_variants`` that this
host can run and whose numbers were verified, or can be: a variant that was made for a host unlike its maker's
is unverified until this one has run golden inputs. What is passed over is returned with its reason: nothing
is chosen silently. An int8 variant must first give the right answers on this host in any case: int8 kernels
differ between instruction sets, and saturate on some.

A tuned profile is one entry of the host cache, see :mod:`edgeclip.runtime.tuned`. It holds for one bundle on
one device of one kind of host, and gives way to whatever the caller asks for. One that is stale, malformed or
for a variant that cannot be run here is ignored, and the choice says so.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeclip.cache import COMPILED, HostCache
from edgeclip.errors import BackendError, BackendUnavailableError
from edgeclip.runtime.byte_sums import (
    UnsafeIsaWarning,
    adds_in_16_bits,
    expected_overflow,
    is_exact_by_setting,
)
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.session import (
    DEFAULT_OPTIONS,
    OPENVINO_DEVICES,
    OpenSession,
    RuntimeOptions,
    open_session,
    parse_device,
    resolve_backend,
)

if TYPE_CHECKING:
    from edgeclip.bundle import Bundle, Variant
    from edgeclip.runtime.tuned import TunedSettings

__all__ = [
    "GOLDEN_INPUTS",
    "PROFILE_NAME",
    "TUNED",
    "VariantChoice",
    "choose_variant",
    "open_tower",
    "profile_name",
    "unmet",
    "unprovable",
    "with_cache",
]

PROFILE_NAME: Final = "profile.json"
TUNED: Final = "tuned profile"
"""What :attr:`VariantChoice.skipped` calls a tuned profile that is not used."""

GOLDEN_INPUTS: Final = 8

# The distributions that carry the library of a backend.
_DISTRIBUTIONS: Final = {
    "ort": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", *(f"tensorrt-cu{major}-bindings" for major in (13, 12))),
    "tensorrt_rtx": ("tensorrt-rtx", *(f"tensorrt-rtx-cu{major}-bindings" for major in (13, 12))),
}
_ENGINE_OF_FORMAT: Final = {
    "onnx": ("ort",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
}


@dataclass(frozen=True)
class VariantChoice:
    """The variant to run.

    Attributes:
        variant: the variant.
        reason: why this one, in words.
        skipped: variants that come before it and were passed over, each with the reason; :data:`TUNED`
            stands for a tuned profile.
        settings: how the tuned profile that names it runs it; ``None`` without one.
    """

    variant: Variant
    reason: str
    skipped: tuple[tuple[str, str], ...] = ()
    settings: TunedSettings | None = None

    def options_for(self, options: RuntimeOptions, tower: str = "image") -> RuntimeOptions:
        """Return options to open a tower with: what was asked for, and the tuned settings for the rest."""
        return options if self.settings is None else self.settings.applied_to(options, tower)


def choose_variant(
    bundle: Bundle,
    *,
    variant: str = "auto",
    options: RuntimeOptions = DEFAULT_OPTIONS,
    host: Host | None = None,
    tuned: bool = True,
) -> VariantChoice:
    """Choose the variant that this host runs. Opens no tower and imports no engine.

    Args:
        bundle: an open bundle.
        variant: a name, or ``"auto"``.
        options: backend and device must be able to run it; ``allow`` lifts guards.
        host: instead of this machine.
        tuned: heed the tuned profile.

    Raises:
        BundleError: there is no variant of that name.
        BackendUnavailableError: the named variant cannot be run here, or none of the default ones can; the
            message gives every reason.
    """
    host = host or Host.here()
    if variant != "auto":
        named = bundle.variant(variant)
        problem = unmet(named, options=options, host=host)
        if problem is not None:
            raise BackendUnavailableError(
                f"variant {variant!r} cannot be run here: {problem}. Choose another one or variant='auto'."
            )
        _warn_unsafe(named, options, host)
        return VariantChoice(named, f"variant {variant} was asked for")
    skipped: list[tuple[str, str]] = []
    profile = _tuned(bundle, options, host) if tuned else None
    if isinstance(profile, VariantChoice):
        _warn_unsafe(profile.variant, options, host)
        return profile
    if profile is not None:
        skipped.append((TUNED, profile))
    names = bundle.manifest.default_variants or tuple(bundle.manifest.variants)
    for name in names:
        candidate = bundle.variant(name)
        problem = unmet(candidate, options=options, host=host) or unprovable(candidate, options)
        if problem is None:
            passed_over = any(name != TUNED for name, _ in skipped)
            reason = "first of the bundle's default variants" + (" that runs here" if passed_over else "")
            if _to_prove(candidate, "image", options) and not _is_verified(candidate, "image"):
                reason += "; not verified where it was made, so golden pictures are run here first"
            _warn_unsafe(candidate, options, host)
            return VariantChoice(candidate, reason, tuple(skipped))
        skipped.append((name, problem))
    reasons = "; ".join(f"{name}: {problem}" for name, problem in skipped)
    raise BackendUnavailableError(f"{bundle.where}: none of its variants can be run here ({reasons}).")


def open_tower(
    bundle: Bundle,
    choice: VariantChoice | Variant,
    tower: str,
    options: RuntimeOptions = DEFAULT_OPTIONS,
) -> OpenSession:
    """Open a tower of the chosen variant; int8 towers and unverified ones prove themselves first.

    The first time such a tower is opened on a kind of host, eight golden inputs are run, and the host cache
    is stamped. From then on this costs one small read. ``"unverified"`` in ``options.allow`` takes what is
    not verified as it is. The host cache also keeps what the engine made of a tower, unless
    ``options.cache_dir`` names another place. A choice that a tuned profile made brings settings for what
    ``options`` leave open.

    Raises:
        BundleError: files are missing or damaged.
        BackendError: the engine cannot load it, or its answers on this host are wrong.
    """
    if isinstance(choice, VariantChoice):
        variant, options = choice.variant, choice.options_for(options, tower)
    else:
        variant = choice
    session = open_session(variant.tower(tower), options=with_cache(variant, tower, options))
    try:
        if _to_prove(variant, tower, options):
            _prove(bundle, variant, tower, session, options)
    except BaseException:
        session.close()
        raise
    return session


def with_cache(variant: Variant, tower: str, options: RuntimeOptions) -> RuntimeOptions:
    """Return options whose ``cache_dir`` is the host cache, where none is named and the tower gains by it."""
    # ONNX Runtime's text towers are opened for new labels alone, and are mostly a table: nothing to optimise.
    if options.cache_dir is not None or (tower != "image" and variant.entry.format == "onnx"):
        return options
    return replace(options, cache_dir=HostCache.open(COMPILED).directory)


def unmet(variant: Variant, *, options: RuntimeOptions, host: Host) -> str | None:
    """Return why a host cannot run a variant, ``None`` where it can."""
    entry = variant.entry
    if entry.format not in _ENGINE_OF_FORMAT:
        return f"this edgeclip does not know the format {entry.format!r}"
    try:
        backend, _ = resolve_backend(entry.format, options)
    except BackendUnavailableError as error:
        return str(error).rstrip(".")
    requires = entry.requires
    if requires.isa_any and "unsafe-isa" not in options.allow:
        offered = host.isa
        if offered is None:
            return f"it needs one of {_list(requires.isa_any)}, and this host does not tell what it has"
        if not offered.intersection(requires.isa_any):
            return (
                f"it needs one of {_list(requires.isa_any)}, this host has {_list(sorted(offered)) or 'none'}"
            )
    if entry.precision == "int8":
        problem = expected_overflow(variant, backend, options, host)
        if problem is not None:
            return problem
    if requires.engine is not None and backend in _ENGINE_OF_FORMAT[entry.format]:
        installed = versions()
        have = next((installed[name] for name in _DISTRIBUTIONS[backend] if name in installed), None)
        fits = None if have is None else version_fits(have, requires.engine)
        if fits is False:
            return f"it needs {backend} {requires.engine}, this host has {have}"
    if entry.format == "tensorrt" or requires.compute_capability is not None:
        problem = _gpu_problem(requires.compute_capability, options, host)
        if problem is not None:
            return problem
    kind, _ = parse_device(options.device)
    if (kind == "cuda" and backend == "openvino") or (kind in OPENVINO_DEVICES and backend != "openvino"):
        return f"{backend} does not run on {options.device}"
    return None


def _warn_unsafe(variant: Variant, options: RuntimeOptions, host: Host) -> None:
    """Warn of a variant that would not have been taken without ``"unsafe-isa"``."""
    if "unsafe-isa" not in options.allow:
        return
    problem = unmet(variant, options=replace(options, allow=options.allow - {"unsafe-isa"}), host=host)
    if problem is not None:
        warnings.warn(
            f"variant {variant.name!r} is run although {problem}: its answers may be wrong here, and nothing "
            "but the golden check looks at them.",
            UnsafeIsaWarning,
            stacklevel=3,
        )


def _gpu_problem(capability: str | None, options: RuntimeOptions, host: Host) -> str | None:
    """Return why this host's GPU cannot run a variant; asks the driver only where a GPU was asked for."""
    needs = "it needs a GPU" if capability is None else f"it needs a GPU of capability {capability}"
    kind, index = parse_device(options.device)
    if kind != "cuda":
        found = host.gpus or "nvidia" in (host.board or "").lower()  # a Jetson lists none where others do
        if not found:
            return f"{needs}, and no driver is loaded"
        return f"{needs}, and the device asked for is {options.device!r}: ask for 'cuda'"
    from edgeclip.runtime.cuda import find_gpu

    try:
        gpu = find_gpu(index)
    except BackendUnavailableError as error:
        return f"{needs}, and {str(error).rstrip('.')}"
    have, want = _numbers(gpu.compute_capability), None if capability is None else _numbers(capability)
    if have is not None and want is not None and have < want:
        return f"{needs} or newer, and {gpu.name} has {gpu.compute_capability}"
    return None


def version_fits(version: str, spec: str) -> bool | None:
    """Return whether a version meets a specification (``">=1.20,<2"``); ``None`` where not understood."""
    have = _numbers(version)
    for clause in spec.split(","):
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)\s*", clause)
        if match is None or have is None:
            return None
        want = _numbers(match[2]) or ()
        width = max(len(have), len(want))
        left, right = (numbers + (0,) * (width - len(numbers)) for numbers in (have, want))
        holds = {
            ">=": left >= right,
            "<=": left <= right,
            "==": left == right,
            "!=": left != right,
            ">": left > right,
            "<": left < right,
        }
        if not holds[match[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...] | None:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else None


def _is_verified(variant: Variant, tower: str) -> bool:
    parity = variant.entry.parity.get(tower)
    return parity is not None and parity.status == "passed"


def unprovable(variant: Variant, options: RuntimeOptions) -> str | None:
    """Return why a variant may not be chosen by itself: nobody found its numbers right, nor can this host."""
    if "unverified" in options.allow or variant.bundle.manifest.golden is not None:
        return None
    for tower in sorted(variant.entry.towers):
        if not _is_verified(variant, tower):
            return (
                f"the numbers of its {tower} tower are not verified, and without golden file cannot be here"
            )
    return None


def _to_prove(variant: Variant, tower: str, options: RuntimeOptions) -> bool:
    """Return whether a tower must give the right answers here before it is handed out."""
    if tower not in ("image", "text"):
        return False
    if variant.entry.precision == "int8":
        return True
    return "unverified" not in options.allow and not _is_verified(variant, tower)


def profile_name(device: str) -> str:
    """Return the name of the entry of the host cache that holds the tuned profile of a device."""
    if device == "cpu":
        return PROFILE_NAME
    return f"profile-{re.sub(r'[^A-Za-z0-9]+', '-', device.removesuffix(':0'))}.json"


def _tuned(bundle: Bundle, options: RuntimeOptions, host: Host) -> VariantChoice | str | None:
    """Return the choice of the tuned profile, why it is not used, or ``None`` where there is none."""
    directory = _cache(bundle, host).directory
    if directory is None or not _has_profile(directory, profile_name(options.device)):
        return None
    from edgeclip.runtime.tuned import find_profile

    found = find_profile(bundle, host, options.device)
    if found is None:
        return None
    profile = found.profile
    again = "run `edgeclip tune` again"
    if found.stale is not None or profile is None:
        return f"{found.stale}: {again}"
    if profile.variant not in bundle.manifest.variants:
        return f"it names the variant {profile.variant!r}, which the bundle does not have: {again}"
    settings, variant = profile.settings, bundle.variant(profile.variant)
    problem = settings.overruled_by(options)
    if problem is None:
        problem = unmet(variant, options=settings.applied_to(options), host=host)
    if problem is None:
        problem = unprovable(variant, options)
    if problem is not None:
        return f"{profile.variant}: {problem}"
    reason = f"the tuned profile of this device names it (for {profile.goal}, {profile.created[:10]}: "
    reason += f"{settings}{_overruled(settings, options)})"
    return VariantChoice(variant, reason, settings=settings)


def _has_profile(directory: Path, name: str) -> bool:
    """Return whether a profile is there, or in the folders of other engines, in some microseconds."""
    if os.path.exists(f"{directory}/{name}"):  # noqa: PTH110 - as below
        return True
    try:
        with os.scandir(directory.parent) as folders:
            return any(os.path.exists(f"{folder.path}/{name}") for folder in folders)  # noqa: PTH110
    except OSError:
        return False


def _overruled(settings: TunedSettings, options: RuntimeOptions) -> str:
    """Return what was asked for in place of tuned settings, as the end of a sentence."""
    asked = []
    if options.affinity is not None:
        asked.append(f"CPUs {', '.join(map(str, options.affinity))}")
    elif options.threads not in (None, settings.threads):
        asked.append(f"threads {options.threads}")
    for name in ("spinning", "low_memory"):
        said = getattr(options, name)
        if said not in (None, getattr(settings, name)):
            asked.append(f"{name} {said}")
    return f"; but {' and '.join(asked)} asked for" if asked else ""


def _cache(bundle: Bundle, host: Host | None = None) -> HostCache:
    return HostCache.open(bundle.digest, (host or Host.here()).fingerprint())


def _prove(
    bundle: Bundle, variant: Variant, tower: str, session: OpenSession, options: RuntimeOptions
) -> None:
    """Check eight golden inputs unless this kind of host has passed before."""
    if bundle.manifest.golden is None:
        return  # nothing to check against; `edgeclip verify` says so
    placement = session.chosen
    cache = _cache(bundle)
    device = re.sub(r"\W+", "", placement.device, flags=re.ASCII)
    which = "" if tower == "image" else f"-{tower}"
    backend = placement.backend
    is_int8 = variant.entry.precision == "int8" and placement.device == "cpu" and backend == "ort"
    # Known since it was opened. An emulated processor says of itself what the one below it is.
    if is_int8 and not is_exact_by_setting(backend, variant.entry.session_config):
        which += "-16bit" if adds_in_16_bits(backend) else ""
    stamp = f"golden-{variant.name}-{placement.backend}-{device}{which}.json"
    if cache.get(stamp) is not None:
        return
    from edgeclip.runtime.parity import Golden, check_tower

    golden = Golden.of(bundle)
    if tower == "text" and golden.tokens is None:
        return
    result = check_tower(bundle, golden, variant, tower, session, limit=GOLDEN_INPUTS)
    if not result.passed:
        others = [name for name in bundle.manifest.variants if name != variant.name]
        instead = f"Open it with variant={others[0]!r}" if others else "Use another bundle"
        inputs, cause = "pictures" if tower == "image" else "texts", _overflowing(variant, session)
        said = (
            f"variant {variant.name!r}: its answers on this host are wrong over {result.numbers.n} golden "
            f"{inputs}: {'; '.join(map(str, result.failures))}{cause}"
        )
        if cause and "unsafe-isa" in options.allow:
            warnings.warn(
                f"{said}; it is run because 'unsafe-isa' is allowed.", UnsafeIsaWarning, stacklevel=3
            )
            return
        raise BackendError(f"{said}. {instead}, and see `edgeclip verify`.")
    cache.put(stamp, json.dumps(result.numbers.to_dict()).encode())


def _overflowing(variant: Variant, session: OpenSession) -> str:
    """Return what adds to wrong answers of int8 where sums overflow, as a part of a sentence."""
    backend, entry = session.chosen.backend, variant.entry
    if entry.precision != "int8" or session.chosen.device != "cpu" or backend not in ("ort", "openvino"):
        return ""
    if is_exact_by_setting(backend, entry.session_config) or not adds_in_16_bits(backend):
        return ""
    isa = _list(sorted(Host.here().isa or ())) or "unknown instruction sets"
    return (
        f" (sums of bytes overflow: {backend} adds pairs of products in 16 bits on this host, {isa}; "
        "variants for x86-avx2 fit, and float ones)"
    )


def _list(words: tuple[str, ...] | list[str]) -> str:
    return ", ".join(words)
