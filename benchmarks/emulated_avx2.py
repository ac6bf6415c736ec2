"""Does the int8 bundle give the same answers on a processor with AVX2 and without VNNI?

ONNX Runtime's int8 kernels for AVX2 add pairs of products in 16 bits and saturate; with VNNI they do not. A
model that is right on one processor can collapse on another. This runs the embedded bundle twice, on this
processor and under qemu-user as a Haswell (AVX2, no VNNI), and compares embeddings. A product that must
saturate is the control: were it not saturated by the emulated processor, the comparison would prove nothing.

    python benchmarks/emulated_avx2.py        # needs qemu-x86_64 (Debian, Ubuntu: apt install qemu-user)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
CPU = "Haswell"
K = 64
_CHILD = f"""
import sys
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from edgeclip import RuntimeOptions, ZeroShotClassifier
from edgeclip.runtime.ort import import_onnxruntime

ort = import_onnxruntime()
graph = helper.make_graph(
    [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
    "control",
    [helper.make_tensor_value_info("a", TensorProto.UINT8, [1, {K}])],
    [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16])],
    [numpy_helper.from_array(np.full(({K}, 16), 127, np.int8), "b")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
control = session.run(None, {{"a": np.full((1, {K}), 255, np.uint8)}})[0]
with ZeroShotClassifier.open(sys.argv[1], options=RuntimeOptions(threads=1)) as classifier:
    images = classifier.embed_images(sys.argv[3:])
    texts = classifier.embed_texts(["cat", "dog", "猫", "frying pan", "a red car in the snow"])
    classifier.set_labels(["cat", "dog", "panda", "sheep", "castle", "coffee"])
    top = [best[0].label for best in classifier.classify(sys.argv[3:], top_k=1)]
np.savez(sys.argv[2], control=control, images=images, texts=texts, top=np.array(top))
"""


def _embed(prefix: list[str], bundle: str, photos: list[Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.npz"
        environment = {**os.environ, "EDGECLIP_CACHE_DIR": folder}
        command = [*prefix, sys.executable, "-c", _CHILD, bundle, str(output), *map(str, photos)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        with np.load(output) as arrays:
            return dict(arrays)


def main() -> None:
    """Run both processors, print the agreement, write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/emulated_avx2.json")
    options = parser.parse_args()
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        sys.exit("qemu-x86_64 is not installed: apt install qemu-user (Debian, Ubuntu), then run this again.")
    photos = sorted((ROOT / "edgeclip/assets/photos").glob("*.jpg"))
    native = _embed([], options.bundle, photos)
    emulated = _embed([qemu, "-cpu", CPU], options.bundle, photos)
    exact = 255 * 127 * K
    if int(emulated["control"][0, 0]) == exact:
        sys.exit(f"the emulated {CPU} did not saturate the control product: this comparison proves nothing.")

    from edgeclip.bundle import Bundle
    from edgeclip.runtime.host import Host, versions

    host = Host.here()
    result = {
        "what": f"embedded bundle on this processor and on an emulated {CPU} (AVX2, no VNNI)",
        "command": "python benchmarks/emulated_avx2.py",
        "bundle": Bundle.open(options.bundle).digest,
        "host": {"cpu_model": host.cpu_model, "isa": sorted(host.isa or ())},
        "qemu": subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )[0],
        "versions": versions(),
        "control": {
            "exact": exact,
            "this_processor": int(native["control"][0, 0]),
            "emulated": int(emulated["control"][0, 0]),
        },
        "images": len(photos),
        "top1_agreement": float(np.mean(native["top"] == emulated["top"])),
    }
    for kind in ("images", "texts"):
        a, b = native[kind].astype(np.float64), emulated[kind].astype(np.float64)
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        result[f"{kind}_cosine_min"] = float(cosine.min())
        result[f"{kind}_max_abs"] = float(np.abs(a - b).max())
    options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
