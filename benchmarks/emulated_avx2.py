"""Does an int8 bundle give the same answers on a processor with AVX2 and without VNNI?

ONNX Runtime's int8 kernels for AVX2 add pairs of products in 16 bits and saturate; with VNNI they do not. A
model that is right on one processor can collapse on another. This runs bundles twice, on this processor and
under qemu-user as a Haswell (AVX2, no VNNI), and compares embeddings. A probe of the engine's sums is the
control: were they exact on the emulated processor, the comparison would prove nothing. Variants that must
saturate (8-bit weights for VNNI) are run too where they are given, past the guard that refuses them.

    python benchmarks/emulated_avx2.py        # needs qemu-x86_64 (Debian, Ubuntu: apt install qemu-user)
    python benchmarks/emulated_avx2.py --bundle DIR --variant onnx-int8@x86-avx2 --variant onnx-fp32

Without a bundle: the embedded one, and the probes in three forms of int8.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from emulation import (
    PICTURES,
    ROOT,
    Subject,
    agreement,
    embed,
    export_probes,
    inputs,
    qemu,
    version_of,
)

from edgeclip.bundle import Bundle
from edgeclip.runtime.host import Host, versions

CPU = "Haswell"
_FORMS = ("onnx-int8", "onnx-int8@x86-avx2", "onnx-int8@x86-vnni")


def main() -> None:
    """Run both processors, print the agreement, write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", action="append", default=[], help="Bundles in place of the default ones.")
    parser.add_argument("--variant", action="append", default=[], help="Of each of them.  [onnx-int8]")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/emulated_avx2.json")
    options = parser.parse_args()
    emulator = qemu("qemu-x86_64")
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.bundle:
            variants = options.variant or ["onnx-int8"]
            named = [(bundle, variant) for bundle in options.bundle for variant in variants]
            subjects = [Subject(Path(bundle).name, bundle, variant) for bundle, variant in named]
        else:
            subjects = [Subject("embedded bundle", "default", "onnx-int8"), *export_probes(folder, _FORMS)]
        for subject in subjects:
            rows = inputs(subject, options.pictures)
            here = embed(subject, rows, folder)
            there = embed(subject, rows, folder, command=[emulator, "-cpu", CPU, sys.executable])
            if str(there["sums"]) == "32-bit":
                sys.exit(f"sums are exact on the emulated {CPU}: this comparison proves nothing.")
            found.append(agreement(subject, here, there))
            del found[-1]["isa_there"]  # of the processor below
            print(json.dumps(found[-1]), flush=True)
    host = Host.here()
    result = {
        "what": f"int8 bundles on this processor and on an emulated {CPU} (AVX2, no VNNI)",
        "command": " ".join(["python benchmarks/emulated_avx2.py", *sys.argv[1:]]),
        "bundle": Bundle.open("default").digest,
        "host": {"cpu_model": host.cpu_model, "isa": sorted(host.isa or ())},
        "qemu": version_of(emulator),
        "versions": versions(),
        "results": found,
    }
    options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
