"""Time the towers of a bundle on this host: one by itself, or two in turns.

The clock is ``edgeclip.runtime.latency``; what is fed are the golden pictures and texts of the bundle, so
that every host times the same. Without torch and onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from edgeclip.bundle import Bundle, Variant
from edgeclip.errors import BundleError
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.choose import open_tower
from edgeclip.runtime.latency import LatencySamples, RatioInterval, StageClock, compare_interleaved, measure
from edgeclip.runtime.latency_report import LatencyReport
from edgeclip.runtime.parity import Golden
from edgeclip.runtime.rows import fixed_batch
from edgeclip.runtime.session import DEFAULT_OPTIONS, OpenSession, RuntimeOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DEFAULT_EFFORT", "Effort", "compare_towers", "time_variant"]

Tower = Literal["image", "text"]


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        samples: calls at least.
        duration_s: seconds at least.
        batch: rows a call, where the tower takes any.
    """

    samples: int = 100
    duration_s: float = 1.0
    batch: int = 1


DEFAULT_EFFORT: Final = Effort()


def time_variant(
    variant: Variant,
    *,
    options: RuntimeOptions = DEFAULT_OPTIONS,
    effort: Effort = DEFAULT_EFFORT,
    images: Sequence[Path | bytes] = (),
) -> LatencyReport:
    """Time the image tower of a variant, and with pictures of files the stages around it.

    Args:
        variant: of an open bundle with a golden file.
        options: where to run.
        effort: how long.
        images: pictures to classify against the bundle's own labels as well, one by one.

    Raises:
        BundleError: the bundle has no golden file, or the variant no image tower.
        BackendError: it cannot run here.
        InputError: a picture cannot be read.
    """
    with open_tower(variant.bundle, variant, "image", options) as session:
        call, batch = _call(variant.bundle, session, "image", effort.batch)
        stages: dict[str, LatencySamples] = {
            "image_tower": measure(
                call, min_samples=effort.samples, min_duration_s=effort.duration_s, batch=batch
            )
        }
        placement = session.chosen
    if images:
        stages |= {
            name: samples
            for name, samples in _stages(variant, options, images, effort.samples).items()
            if name in ("decode", "resize", "head")
        }
    bundle = variant.bundle
    return LatencyReport.of(
        f"{bundle.manifest.model.name} {variant.name}",
        stages,
        placement=placement,
        bundle={"name": bundle.manifest.model.name, "digest": bundle.digest, "variant": variant.name},
    )


def compare_towers(
    a: Variant,
    b: Variant,
    *,
    tower: Tower = "image",
    options: RuntimeOptions = DEFAULT_OPTIONS,
    effort: Effort = DEFAULT_EFFORT,
    seed: int = 0,
) -> RatioInterval:
    """Return how much longer a tower of one variant takes than that of another, measured in turns.

    Each is fed from the golden file of its own bundle; ``effort.samples`` are blocks of four calls.

    Raises:
        BundleError: a bundle has no golden file, a variant lacks the tower, or they take other batches.
        BackendError: one cannot run here.
    """
    with ExitStack() as opened:
        calls = []
        batches = set()
        for variant in (a, b):
            session = opened.enter_context(open_tower(variant.bundle, variant, tower, options))
            call, batch = _call(variant.bundle, session, tower, effort.batch)
            calls.append(call)
            batches.add(batch)
        if len(batches) > 1:
            raise BundleError(
                f"{a.name!r} and {b.name!r} take batches of {sorted(batches)} rows, expected the same: set "
                "'batch' in [bench] to the fixed one."
            )
        return compare_interleaved(
            calls[0],
            calls[1],
            min_blocks=effort.samples,
            min_duration_s=effort.duration_s,
            max_duration_s=max(60.0, 2 * effort.duration_s),
            seed=seed,
        )


def _call(bundle: Bundle, session: OpenSession, tower: Tower, batch: int) -> tuple[Callable[[], object], int]:
    """Return a function that runs a tower once, and how many rows that are."""
    golden = Golden.of(bundle)
    rows: NDArray[Any]
    if tower == "text":
        if golden.tokens is None:
            raise BundleError(f"{bundle.where}: its golden file has no texts: export it with a text tower.")
        rows = golden.tokens
    else:
        rows = golden.images
        if bundle.manifest.preprocess.applied == "host":
            rows = Preprocess(bundle.manifest.preprocess).normalize(golden.images)
    count = fixed_batch(session) or batch
    (name,) = session.inputs
    feeds = {name: np.ascontiguousarray(np.take(rows, np.arange(count) % len(rows), axis=0))}
    return lambda: session.run(feeds), count


def _stages(
    variant: Variant, options: RuntimeOptions, images: Sequence[Path | bytes], samples: int
) -> dict[str, LatencySamples]:
    from edgeclip.classify import ZeroShotClassifier

    clock = StageClock()
    with ZeroShotClassifier.open(
        variant.bundle, variant=variant.name, options=options, clock=clock
    ) as classifier:
        classifier.set_bundle_labels()
        classifier.classify(images[0])
        clock.clear()
        for number in range(samples):
            classifier.classify(images[number % len(images)])
    return clock.samples()
