"""Export in processes that are killed, and check after each kill that a complete bundle is there.

``kill_export.py DIRECTORY COUNT SEED``. The probe is traced once, here; the children are forks that open it,
compare, store and commit, again and again, until SIGKILL comes at a random moment. Prints one JSON line of
what was seen; exits with a traceback where a bundle was not complete.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # threads of a parent are gone in its forks

from exported import PROBES, export_probe, write_pictures  # noqa: E402

from edgeclip.bundle import Bundle  # noqa: E402
from edgeclip.errors import BundleError  # noqa: E402
from edgeclip.export.options import Checkpoint, GraphOptions  # noqa: E402
from edgeclip.export.source import Source, open_source  # noqa: E402
from edgeclip.export.verify import verify_bundle  # noqa: E402


def check(directory: Path, least: int) -> int:
    """Return how many variants are there, complete; 0 for no bundle, right only before the first commit."""
    try:
        bundle = Bundle.open(directory)
    except BundleError as error:
        if not least and ("has no manifest.json" in str(error) or "does not exist" in str(error)):
            return 0
        raise
    bundle.check_files()
    assert len(bundle.manifest.variants) >= least
    return len(bundle.manifest.variants)


def export(directory: Path, pictures: Path, number: int) -> None:
    """Write the bundle, or add to it, or replace what is there."""
    export_probe("tinyclip", directory, pictures, ("onnx-fp32", "onnx-fp32@x86-avx2")[number % 2])


def in_child(work: Any) -> int:
    """Run in a fork and return its process."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def main(directory: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill ``count`` exports."""
    pictures = write_pictures(directory.with_name("pictures"), 66)
    source = open_source(Checkpoint(str(PROBES / "tinyclip")))
    graphs = {tower: source.trace(tower, GraphOptions()) for tower in ("image", "text")}
    Source.trace = lambda self, tower, options: graphs[tower]  # type: ignore[method-assign]
    began = time.perf_counter()
    _, status = os.waitpid(in_child(lambda: export(directory.with_name("probe"), pictures, 0)), 0)
    assert status == 0
    export_s = time.perf_counter() - began
    rng = random.Random(seed)
    variants = mid_export = 0

    def again() -> None:
        for number in range(1000):
            export(directory, pictures, number)

    for _ in range(count):
        child = in_child(again)
        time.sleep(rng.uniform(0.2, 1.6) * export_s)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the export failed by itself"
        variants = check(directory, variants)
        mid_export += (directory / ".edgeclip-lock").exists()
    _, status = os.waitpid(in_child(lambda: export(directory, pictures, 0)), 0)
    assert status == 0, "a rerun does not succeed"
    check(directory, 1)
    left = [path.name for path in directory.glob(".edgeclip-*")]
    assert not left, f"a rerun leaves {left}"
    verdicts = {verdict.status for verdict in verify_bundle(Bundle.open(directory)).variants}
    return {"kills": count, "mid_export": mid_export, "rerun": ", ".join(sorted(verdicts))}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
