"""What `import edgeclip` and `edgeclip --help` cost, beside a bare interpreter, in fresh processes.

Bars: importing costs under 40 ms over the bare interpreter, `edgeclip --help` under 250 ms as a process.

    python benchmarks/start_up.py
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from written import arguments, difference, ratio, write

from edgeclip.runtime.latency import compare_interleaved

BARE = [sys.executable, "-c", "pass"]
COMMANDS = {
    "import": [sys.executable, "-c", "import edgeclip"],
    "help": [str(Path(sys.executable).parent / "edgeclip"), "--help"],
}
MAX_IMPORT_MS, MAX_HELP_MS = 40, 250


def main() -> None:
    """Measure both against the bare interpreter, interleaved; print and write the result."""
    output = arguments(__doc__, "start_up.json").parse_args().output
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    found = {
        name: compare_interleaved(partial(run, each), partial(run, BARE)) for name, each in COMMANDS.items()
    }
    over_bare = {name: difference(each) for name, each in found.items()}
    write(
        output,
        {
            "what": "fresh processes, interleaved with a bare interpreter",
            "processes": {name: ratio(each) for name, each in found.items()},
            "over_bare_ms": over_bare,
            "samples_ms": {name: each.a.samples_ms.round(2).tolist() for name, each in found.items()},
            "bare_samples_ms": {name: each.b.samples_ms.round(2).tolist() for name, each in found.items()},
            "within_bars": over_bare["import"]["high_ms"] < MAX_IMPORT_MS
            and found["help"].a.median_ms < MAX_HELP_MS,
        },
    )


if __name__ == "__main__":
    main()
