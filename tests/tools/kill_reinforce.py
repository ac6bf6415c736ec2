"""Reinforce shards in children that are killed by SIGKILL at random moments, and compare what they end with.

    python tests/tools/kill_reinforce.py FOLDER KILLS

FOLDER is one of ``reinforced_shards.make_shapes``. Models are opened once; every attempt is a fork of this
process. A set that was finished between two kills is compared and begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from reinforced_shards import probe

from edgeclip.distill.reinforce import reinforce
from edgeclip.distill.reinforce_plan import Plan, ReinforceOptions, open_plan


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def attempt(plan: Plan, out: Path, kill_after_s: float | None) -> bool:
    """Return whether the attempt was killed."""
    child = os.fork()
    if child == 0:
        try:
            reinforce(plan, out)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit("a child failed")
    return False


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    options = ReinforceOptions(augmentations=2, batch_size=8, captions=folder / "captions.jsonl")
    plan = open_plan([folder / "shards"], [probe("tinyclip")], options, root=folder)
    began = time.monotonic()
    attempt(plan, folder / "whole", None)
    whole_s = time.monotonic() - began
    wanted = hashes(folder / "whole")
    rng, killed, compared, left = random.Random(0), 0, 0, 0
    out = folder / "killed"
    while killed < kills:
        if attempt(plan, out, rng.uniform(0, 0.6 * whole_s)):
            killed += 1
            left += any(path.name.startswith(".edgeclip-tmp-") for path in out.iterdir())
        else:
            compared += hashes(out) == wanted
            shutil.rmtree(out)
    attempt(plan, out, None)
    compared += hashes(out) == wanted
    print(
        json.dumps(
            {
                "killed": killed,
                "left_temporary": left,
                "compared": compared,
                "files": sorted(wanted),
                "same": hashes(out) == wanted,
            }
        )
    )


if __name__ == "__main__":
    main()
