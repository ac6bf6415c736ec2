"""What every result of these benchmarks carries, and an interval for differences of interleaved samples."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.classify import ZeroShotClassifier
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.latency import RatioInterval

ROOT = Path(__file__).parent.parent
_DRAWS = 10_000
_PACKAGE = ("edgeclip", "export", "calibration")


def arguments(description: str, output: str) -> argparse.ArgumentParser:
    """Return a parser with the options all of them have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / output)
    return parser


def ratio(found: RatioInterval) -> dict[str, Any]:
    """Return a ratio as JSON, with the medians of both sides."""
    return {
        "ratio": round(found.ratio, 5),
        "low": round(found.low, 5),
        "high": round(found.high, 5),
        "confidence": found.confidence,
        "blocks": found.n,
        "a_median_ms": round(found.a.median_ms, 4),
        "b_median_ms": round(found.b.median_ms, 4),
        "steal_share": found.steal_share,
    }


def difference(found: RatioInterval, *, seed: int = 0) -> dict[str, Any]:
    """Return the median over blocks of ``a − b`` in milliseconds with a bootstrap interval over blocks.

    A block holds two samples of each side, so a drift that is linear over the block cancels.
    """
    a, b = (side.samples_ms.reshape(-1, 2).mean(axis=1) for side in (found.a, found.b))
    differences: NDArray[np.float64] = a - b
    rng = np.random.default_rng(seed)
    draws = rng.choice(differences, (_DRAWS, len(differences)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {
        "difference_ms": round(float(np.median(differences)), 4),
        "low_ms": round(float(low), 4),
        "high_ms": round(float(high), 4),
        "confidence": 0.95,
        "blocks": len(differences),
    }


def model(classifier: ZeroShotClassifier) -> dict[str, Any]:
    """Return what ran."""
    placement = classifier.placement
    return {
        "model": classifier.bundle.manifest.model.name,
        "bundle_digest": classifier.bundle.digest,
        "variant": classifier.choice.variant.name,
        "embed_dim": classifier.bundle.manifest.model.embed_dim,
        "backend": placement.backend,
        "provider": placement.provider,
        "threads": placement.threads,
    }


def write(output: Path, document: dict[str, Any], *, show: bool = True) -> None:
    """Add where and when, write the file, and print it if it is to be shown."""
    host = Host.here()
    document = {
        "schema": 1,
        **document,
        "command": " ".join(["python", *(_relative(part) for part in sys.argv)]),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": host.to_dict(),
        "versions": versions(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    if show:
        print(text)


def _relative(part: str) -> str:
    """Name what lies elsewhere on this machine by its last part only."""
    path = Path(part)
    if not path.is_absolute():
        return part
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def commit() -> str:
    """Return the commit of the tree, with ``-dirty`` where the package was changed since."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", *_PACKAGE],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return commit + ("-dirty" if changed.strip() else "")
