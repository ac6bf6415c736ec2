"""Embed rows with one variant of a bundle, on whatever processor this runs; see ``emulation.py``.

    python benchmarks/emulation_child.py BUNDLE VARIANT ROWS.npz RESULT.npz

Towers are opened as a device opens them, with the golden check of the first time. Instruction sets are not
asked for (``unsafe-isa``), because the same file is to run on all of them.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np

from edgeclip.bundle import Bundle
from edgeclip.runtime import RuntimeOptions, open_tower
from edgeclip.runtime.byte_sums import adds_in_16_bits
from edgeclip.runtime.host import Host
from edgeclip.runtime.rows import run_rows


def main(bundle_path: str, name: str, given: str, result: str) -> None:
    """Write the embeddings of every tower."""
    warnings.simplefilter("ignore")
    bundle = Bundle.open(bundle_path)
    variant = bundle.variant(name)
    options = RuntimeOptions(threads=1, allow=frozenset({"unsafe-isa", "unverified"}))
    found = {}
    with np.load(given) as rows:
        for tower in rows:
            with open_tower(bundle, variant, tower, options) as session:
                found[tower] = run_rows(session, rows[tower], batch=1)
                backend = session.chosen.backend
    sums = "16-bit pairs" if adds_in_16_bits(backend) else "32-bit"
    isa = " ".join(sorted(Host.here().isa or ()))
    np.savez(result, sums=np.array(sums), isa=np.array(isa), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
