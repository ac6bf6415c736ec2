"""Run tiny graphs through an engine and write what it gives: for processors that only an emulator has.

python engine_sums.py BACKEND GRAPHS.npz RESULT.npz [KEY=VALUE …]

GRAPHS.npz holds for each NAME the bytes of an ONNX file (NAME.graph) and its one input (NAME.a or NAME.x).
"""

from __future__ import annotations

import sys

import numpy as np

from edgeclip.runtime.byte_sums import run_graph


def main(backend: str, given: str, result: str, *settings: str) -> None:
    config = dict(setting.split("=") for setting in settings)
    found = {}
    with np.load(given) as arrays:
        for key in [key for key in arrays if key.endswith(".graph")]:
            name = key.removesuffix(".graph")
            feeds = {side: arrays[f"{name}.{side}"] for side in "ax" if f"{name}.{side}" in arrays}
            found[name] = run_graph(arrays[key].tobytes(), feeds, backend=backend, session_config=config)["y"]
    np.savez(result, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
