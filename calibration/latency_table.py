"""What each product of a tower takes in float and in int8 on some device, for :mod:`.sensitivity`.

A table is two operator profiles of one tower (``edgeclip bench --per-op``), float and int8, read side by side
by the names of what nodes give, which int8 keeps; or their essence, in a small JSON document of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgeclip.bench.per_op import OpProfile
from edgeclip.errors import InputError

__all__ = ["LatencyTable", "NodeTime", "Tensors"]

_KIND: Final = "latency-table"
_PROFILES: Final = "op-profiles"
_INT8_KERNELS: Final = frozenset({"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"})
_NCHWC: Final = "_nchwc"
_QUANTIZED, _DEQUANTIZED = "_q", "_dq"  # what the pass for Q/DQ puts behind the name of a tensor


@dataclass(frozen=True)
class NodeTime:
    """Milliseconds of one product, with the conversions around it."""

    float_ms: float
    int8_ms: float

    @property
    def gain_ms(self) -> float:
        """What int8 saves; negative where it is slower."""
        return self.float_ms - self.int8_ms


@dataclass(frozen=True)
class Tensors:
    """Which product of a tower a tensor belongs to.

    Attributes:
        products: names of what the products give, in the order of the graph.
        made: the product that makes a tensor, itself or with what engines fuse into it.
        read: the first product that reads a tensor.
    """

    products: tuple[str, ...]
    made: Mapping[str, str]
    read: Mapping[str, str]


@dataclass(frozen=True)
class LatencyTable:
    """Times by the name of what a node gives.

    Attributes:
        nodes: of the products that are known.
        float_ms: of the whole tower in float; 0 where it was not said.
        source: where it was recorded, in a few words.
    """

    nodes: Mapping[str, NodeTime]
    float_ms: float = 0.0
    source: str = ""

    @classmethod
    def of(cls, floating: OpProfile, rounded: OpProfile, tensors: Tensors) -> LatencyTable:
        """Return the table of two profiles of one tower, in float and in int8."""
        before, after = (_by_product(profile, tensors) for profile in (floating, rounded))
        known = {
            name: NodeTime(before[name], after[name])
            for name in tensors.products
            if name in before and name in after
        }
        where = floating.host.get("cpu_model") or floating.host.get("machine") or "an unknown host"
        placed = floating.placement
        source = f"{placed.get('backend', '?')} on {where}, {placed.get('threads', '?')} thread(s)"
        return cls(known, floating.kernels_ms, source)

    @classmethod
    def read(cls, path: Path, tensors: Tensors) -> LatencyTable:
        """Read a table, or a document with a float and an int8 profile of one tower.

        Args:
            path: a JSON file.
            tensors: of the tower.

        Raises:
            InputError: it cannot be read, is something else, or knows none of the products.
        """
        where = f"latency table {str(path)!r}"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{where} cannot be read: {error}.") from error
        kind = raw.get("kind") if isinstance(raw, dict) else None
        if kind == _PROFILES:
            table = cls._of_profiles(raw.get("profiles"), tensors, where)
        elif kind == _KIND:
            table = cls._of_document(raw, where, path.name)
        else:
            raise InputError(
                f"{where}: got a document of kind {kind!r}, expected {_KIND!r}, or what `edgeclip bench "
                "--per-op BUNDLE --variant onnx-fp32 --variant onnx-int8 -o FILE` writes."
            )
        if not any(name in table.nodes for name in tensors.products):
            raise InputError(
                f"{where}: it knows none of the {len(tensors.products)} products of this tower, such as "
                f"{next(iter(tensors.products), '?')!r}; record it with a bundle of the same model."
            )
        return table

    @classmethod
    def _of_profiles(cls, raw: Any, tensors: Tensors, where: str) -> LatencyTable:
        profiles = [OpProfile.from_dict(each) for each in raw] if isinstance(raw, list) else []
        rounds = [any(each.kernel in _INT8_KERNELS for each in profile.ops) for profile in profiles]
        if sorted(rounds) != [False, True]:
            raise InputError(
                f"{where}: got {len(profiles)} profiles, {sum(rounds)} of them with int8 kernels of ONNX "
                "Runtime; expected two, of the float variant and of the int8 variant."
            )
        return cls.of(profiles[rounds.index(False)], profiles[rounds.index(True)], tensors)

    @classmethod
    def _of_document(cls, raw: Mapping[str, Any], where: str, name: str) -> LatencyTable:
        try:
            if raw["schema"] != 1:
                raise InputError(f"{where}: got schema {raw['schema']!r}, expected 1; update edgeclip.")
            nodes = {
                str(node): NodeTime(float(said["float_ms"]), float(said["int8_ms"]))
                for node, said in raw["nodes"].items()
            }
            total = float(raw.get("float_ms", 0.0))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{where}: it cannot be read ({error!r}); expected nodes, each with float_ms and int8_ms."
            ) from error
        numbers = [total, *(ms for each in nodes.values() for ms in (each.float_ms, each.int8_ms))]
        wrong = next((ms for ms in numbers if not (math.isfinite(ms) and ms >= 0)), None)
        if wrong is not None:
            raise InputError(f"{where}: got a time of {wrong} ms, expected 0 or more.")
        return cls(nodes, total, str(raw.get("source") or name))

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values, as :meth:`read` takes them."""
        return {
            "schema": 1,
            "kind": _KIND,
            "source": self.source,
            "float_ms": round(self.float_ms, 6),
            "nodes": {
                name: {"float_ms": round(each.float_ms, 6), "int8_ms": round(each.int8_ms, 6)}
                for name, each in self.nodes.items()
            },
        }


def _by_product(profile: OpProfile, tensors: Tensors) -> dict[str, float]:
    """Return milliseconds by product, each with what is fused into it and the conversions around it."""
    found: dict[str, float] = {}
    for entry in profile.ops:
        # ONNX Runtime names convolutions in its own layout after what they give, not after a node.
        name = entry.output or (entry.name[: -len(_NCHWC)] if entry.name.endswith(_NCHWC) else "")
        product = tensors.made.get(name)
        if product is None and name.endswith(_DEQUANTIZED):
            stem = name[: -len(_DEQUANTIZED)]
            product = tensors.made.get(stem, tensors.read.get(stem))
        elif product is None and name.endswith(_QUANTIZED):
            stem = name[: -len(_QUANTIZED)]
            product = tensors.read.get(stem, tensors.made.get(stem))
        if product is not None:
            found[product] = found.get(product, 0.0) + entry.ms
    return found
