"""The program of one cold start: from nothing to the first label, timed on the way.

It is run by ``python -c`` with a first statement that looks at the clock, see ``cold.py``. Nothing that takes
time may be imported at the top: what the user's program would not import either would be measured.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

__all__ = ["main"]

_READ_EVERY_S = 0.004


def main(began_ns: int) -> None:
    """Do what the JSON document in the first argument says, and write a report where it says."""
    spec = json.loads(sys.argv[1])
    watch = _Watch() if spec["watch"] else None
    try:
        report = _start(spec, began_ns)
    except Exception as error:
        from edgeclip.errors import EdgeClipError

        if not isinstance(error, EdgeClipError):
            raise
        report = {"error": str(error), "kind": type(error).__name__}
    else:
        report["rss_bytes"] = _peak_rss_bytes()
        report["pss_bytes"] = watch.stop() if watch is not None else None
    with open(spec["report"], "w", encoding="utf-8") as stream:  # noqa: PTH123 - pathlib takes its time
        json.dump(report, stream)


def _start(spec: dict[str, Any], began_ns: int) -> dict[str, Any]:
    from edgeclip.classify import ZeroShotClassifier  # noqa: F401 - the import is what is timed

    imported_ns = time.perf_counter_ns()
    from edgeclip.bench.targets import Target, open_target
    from edgeclip.runtime.latency import StageClock

    clock = StageClock()
    classifier = open_target(Target(**spec["target"]), clock)
    opened_ns = time.perf_counter_ns()
    if spec["labels"] is None:
        classifier.set_bundle_labels(spec["language"])
    elif spec["labels"].endswith(".safetensors"):
        from edgeclip.labels import LabelBank

        classifier.set_labels(LabelBank.open(spec["labels"]))
    else:
        from edgeclip.label_sets import read_labels

        classifier.set_labels(read_labels(spec["labels"]), templates=spec["templates"])
    labelled_ns = time.perf_counter_ns()
    label = classifier.classify(spec["picture"])[0].label
    ended_ns = time.perf_counter_ns()
    spans = {
        span.stage: span.wall_ms for span in clock.spans if span.stage in ("open", "compile", "first_run")
    }
    decode_ms = sum(span.wall_ms for span in clock.spans if span.stage in ("decode", "resize"))
    return {
        "phases": {
            "interpreter": (began_ns - spec["started_ns"]) / 1e6,
            "import": (imported_ns - began_ns) / 1e6,
            **spans,
            "labels": (labelled_ns - opened_ns) / 1e6,
            "decode": decode_ms,
            "first_label": (ended_ns - spec["started_ns"]) / 1e6,
        },
        "label": label,
        "text_tower_runs": classifier.text_tower_runs,
    }


def _peak_rss_bytes() -> int | None:
    from edgeclip.runtime.host import peak_rss_bytes

    return peak_rss_bytes()


class _Watch:
    """A thread that reads the proportional set size every few milliseconds and keeps the largest."""

    def __init__(self) -> None:
        self._largest: int | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def stop(self) -> int | None:
        """Return the largest in bytes; ``None`` where the system does not tell."""
        self._end.set()
        self._thread.join()
        self._look()
        return self._largest

    def _read(self) -> None:
        while not self._end.wait(_READ_EVERY_S):
            if not self._look():
                return

    def _look(self) -> bool:
        try:
            file = os.open("/proc/self/smaps_rollup", os.O_RDONLY)
        except OSError:
            return False
        try:
            text = os.read(file, 4096)
        except OSError:
            return False
        finally:
            os.close(file)
        for line in text.splitlines():
            if line.startswith(b"Pss:"):
                self._largest = max(self._largest or 0, int(line.split()[1]) * 1024)
                return True
        return False
