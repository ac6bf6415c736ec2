"""Operator profiles as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing.

The JSON object form of the Trace Event Format: complete events (``"ph": "X"``, times in microseconds), one
process a profile with one track, on which the call holds its stages, these their blocks, and these their
kernels. A stage that the engine leaves and enters again is two slices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from edgeclip.bench.per_op import OpEntry, OpProfile, TimelineEntry

__all__ = ["to_trace"]

_TRACK: Final = 1
_CLOCKS: Final = {
    "engine": "start and length of every kernel as the engine tells them",
    "end-to-end": "lengths as the engine tells them, laid end to end in the order kernels ran: gaps between "
    "kernels are not known",
}


def to_trace(profiles: Mapping[str, OpProfile]) -> str:
    """Return profiles as the JSON text of a trace.

    Args:
        profiles: by what their process is called. A profile without a timeline has no slices.
    """
    events: list[dict[str, Any]] = []
    for number, (name, profile) in enumerate(profiles.items(), start=1):
        where = profile.placement
        ran = f"{where['backend']}, {where['threads']} thread(s), batch {profile.batch}"
        events += [
            _named("process_name", number, f"{name} {profile.tower} tower"),
            {"ph": "M", "pid": number, "name": "process_sort_index", "args": {"sort_index": number}},
            _named("thread_name", number, ran, tid=_TRACK),
            *_slices(number, profile),
        ]
    said = {
        "displayTimeUnit": "ms",
        "otherData": {
            "made by": "edgeclip bench --per-op",
            "profiles": {
                name: {
                    "clock": _CLOCKS[profile.clock],
                    "call": f"the one of {profile.runs} whose kernels took the median time",
                    "created": profile.created,
                    "placement": profile.placement,
                    "bundle": profile.bundle,
                    "host": profile.host,
                    "versions": profile.versions,
                }
                for name, profile in profiles.items()
            },
        },
        "traceEvents": events,
    }
    return json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False)


def _named(what: str, process: int, name: str, **rest: int) -> dict[str, Any]:
    return {"ph": "M", "pid": process, **rest, "name": what, "args": {"name": name}}


def _slices(process: int, profile: OpProfile) -> list[dict[str, Any]]:
    """Return the call, and in it stages, blocks and kernels; what holds others stands before them."""
    kernels = _placed(profile)
    if not kernels:
        return []
    found = [_slice(process, f"call of {profile.tower} tower", "call", kernels)]
    for stage, of_stage in groupby(kernels, lambda each: each[0].stage):
        stage_kernels = list(of_stage)
        if stage is not None:
            found.append(_slice(process, stage, "stage", stage_kernels))
        for block, of_block in groupby(stage_kernels, lambda each: each[0].block):
            block_kernels = list(of_block)
            if block is not None and block != stage:
                found.append(_slice(process, block, "block", block_kernels))
            found += [_slice(process, each[0].name, "kernel", [each]) for each in block_kernels]
    return found


def _placed(profile: OpProfile) -> list[tuple[OpEntry, TimelineEntry]]:
    return [(profile.ops[each.op], each) for each in profile.timeline]


def _slice(
    process: int, name: str, kind: str, kernels: Sequence[tuple[OpEntry, TimelineEntry]]
) -> dict[str, Any]:
    """Return a slice from the start of the first of some kernels to the end of the last."""
    first, last = kernels[0][1], kernels[-1][1]
    operations = sum(entry.operations or 0 for entry, _ in kernels)
    args: dict[str, Any] = {"kernels": len(kernels)} if kind != "kernel" else _of_kernel(kernels[0][0])
    if operations:
        args["operations"] = operations
    return {
        "ph": "X",
        "pid": process,
        "tid": _TRACK,
        "ts": round(first.start_ms * 1e3, 3),
        "dur": round(round((last.start_ms + last.ms) * 1e3, 3) - round(first.start_ms * 1e3, 3), 3),
        "cat": kind,
        "name": name,
        "args": args,
    }


def _of_kernel(entry: OpEntry) -> dict[str, Any]:
    said = {"kernel": entry.kernel, "node": entry.node, "op": entry.op, "output": entry.output}
    return {key: value for key, value in said.items() if value is not None} | {"median ms": entry.ms}
