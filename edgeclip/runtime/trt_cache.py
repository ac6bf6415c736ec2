"""Where built TensorRT engines are kept on a host, and what says whether one still fits.

An engine holds for one network, one version of TensorRT and one kind of GPU, whichever bundle the network is
in. It is an entry of the host cache with a JSON record beside it; the record is written last and names the
engine, so that a process killed between the two leaves the old pair or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import msgspec

from edgeclip.cache import COMPILED, HostCache
from edgeclip.errors import BackendError
from edgeclip.runtime.cuda import Gpu
from edgeclip.runtime.session import RuntimeOptions

__all__ = ["EngineCache", "EngineRecord"]

_SCHEMA: Final = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineRecord:
    """What an engine was built from, with and for.

    Attributes:
        engine: name of the entry that holds it.
        size_bytes: of the engine.
        tower_digest: of the network's files.
        tower: which network, as messages name it.
        precision: of the variant.
        backend: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        engine_version: of TensorRT.
        compute_capability: GPU generation it was built for; ``None`` where TensorRT-RTX built it for all.
        gpu: name of the GPU it was built on; ``None`` where it was built without one.
        gpu_uuid: of that very board.
        driver: version of its driver.
        batch: ``"MIN/OPT/MAX"``.
        workspace_bytes: memory it may use for intermediate values; ``None`` for no limit.
        profile: smallest, best and largest shape of each input.
        layers: of the parsed network.
        build_s: seconds it took.
    """

    engine: str
    size_bytes: int
    tower_digest: str
    tower: str
    precision: str
    backend: str
    engine_version: str
    compute_capability: str | None
    gpu: str | None
    gpu_uuid: str | None
    driver: str | None
    batch: str
    workspace_bytes: int | None
    profile: dict[str, list[list[int]]] = field(default_factory=dict)
    layers: int = 0
    build_s: float = 0.0

    @property
    def name(self) -> str:
        """Of its files: what decides whether an engine can be used, and nothing else."""
        generation = "any" if self.compute_capability is None else f"sm{self.compute_capability}"
        parts = [
            self.backend,
            self.tower_digest[:16],
            _word(self.engine_version),
            generation.replace(".", ""),
        ]
        if self.gpu is not None and self.backend == "tensorrt":
            parts.append(_word(self.gpu))
        return "-".join(parts)

    def kernels_name(self, gpu: Gpu) -> str:
        """Return the name of what TensorRT-RTX compiles on a GPU when the engine runs."""
        return f"kernels-{self.name}-{_word(gpu.name)}.cache"

    @property
    def choices(self) -> tuple[Any, ...]:
        """What the name does not tell in full, and what was chosen for the build."""
        gpu = self.gpu if self.backend == "tensorrt" else None
        return (
            self.tower_digest,
            self.engine_version,
            self.compute_capability,
            gpu,
            self.batch,
            self.workspace_bytes,
        )

    def misfit(self, *, version: str, gpu: Gpu) -> str | None:
        """Return why the engine cannot be used with a TensorRT and a GPU, ``None`` where it can."""
        if self.engine_version != version:
            return f"it was built by version {self.engine_version}, this host has {version}"
        if self.compute_capability not in (None, gpu.compute_capability):
            return (
                f"it was built for compute capability {self.compute_capability}, this host's {gpu.name} has "
                f"{gpu.compute_capability}"
            )
        # TensorRT times kernels on the GPU it builds on; TensorRT-RTX makes them where the engine runs.
        if self.backend == "tensorrt" and self.gpu != gpu.name:
            return f"it was built on {self.gpu}, this host has {gpu.name}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class EngineCache:
    """The engines of this host, or those in a directory.

    An engine's name tells network, version of TensorRT and GPU; there is one of each, and another choice of
    batches takes its place.

    Attributes:
        entries: where they are.
    """

    entries: HostCache

    @classmethod
    def of(cls, options: RuntimeOptions) -> EngineCache:
        """Return the engines in ``options.cache_dir``, which is made if it is not there; else the host's."""
        directory = options.cache_dir
        if directory is None:
            return cls(HostCache.open(COMPILED))
        with contextlib.suppress(OSError):  # what it then says is that it cannot be written
            directory.mkdir(parents=True, exist_ok=True)
        return cls(HostCache(directory, writable=os.access(directory, os.W_OK | os.X_OK)))

    @property
    def where(self) -> str:
        """The directory, as messages name it."""
        directory = self.entries.directory
        return "the host cache, which cannot be made" if directory is None else repr(str(directory))

    def same(self, record: EngineRecord) -> EngineRecord | None:
        """Return what is kept for this network, version and GPU, if it was built with these choices."""
        kept = self._record(f"{record.name}.json")
        if kept is None or kept.choices != record.choices:
            return None
        return kept

    def fitting(self, digest: str, *, backend: str, version: str, gpu: Gpu) -> EngineRecord | str:
        """Return the engine of a tower that runs here, else why there is none.

        Args:
            digest: of the tower.
            backend: that runs it.
            version: of the TensorRT at hand.
            gpu: at hand. What was built for it alone comes before what was built for all.
        """
        directory = self.entries.directory
        names = [] if directory is None else sorted(directory.glob(f"{backend}-{digest[:16]}-*.json"))
        found = [self._record(path.name) for path in names]
        records = [record for record in found if record is not None and record.tower_digest == digest]
        records.sort(key=lambda record: record.compute_capability is None)
        problem = f"there is none in {self.where}"
        for record in records:
            misfit = record.misfit(version=version, gpu=gpu)
            if misfit is None:
                return record
            problem = f"{record.engine!r} in {self.where} does not fit: {misfit}"
        return problem

    def read(self, record: EngineRecord) -> bytes | None:
        """Return an engine; ``None`` where it is missing or damaged."""
        return self.entries.get(record.engine)

    def keep(self, record: EngineRecord, data: bytes) -> EngineRecord:
        """Store an engine and its record in the place of earlier ones; return the record as stored.

        Raises:
            BackendError: the cache cannot be written.
        """
        engine = f"{record.name}-{hashlib.sha256(data).hexdigest()[:8]}.engine"
        stored = replace(record, engine=engine, size_bytes=len(data))
        text = json.dumps({"schema": _SCHEMA, **stored.to_dict()}, indent=2, ensure_ascii=False)
        written = self.entries.put(engine, data)
        earlier = self._record(f"{record.name}.json")
        if not written or not self.entries.put(f"{record.name}.json", text.encode()):
            raise BackendError(
                f"{record.tower}: the engine was built and cannot be kept in {self.where}. Make room there, "
                "or choose a directory that can be written with -o or EDGECLIP_CACHE_DIR."
            )
        if earlier is not None and earlier.engine != engine:
            self.entries.remove(earlier.engine)
        return stored

    def timing_cache(self, version: str, gpu: str) -> bytes:
        """Return what earlier builds of this version measured on this GPU; empty where there is nothing."""
        return self.entries.get(_timing_name(version, gpu)) or b""

    def keep_timing_cache(self, version: str, gpu: str, data: bytes) -> None:
        """Keep what a build measured; losing it costs time alone."""
        self.entries.put(_timing_name(version, gpu), data)

    def _record(self, name: str) -> EngineRecord | None:
        data = self.entries.get(name)
        if data is None:
            return None
        try:
            said = json.loads(data)
            if said["schema"] != _SCHEMA:
                return None
            record = msgspec.convert(said, EngineRecord)
        except (ValueError, TypeError, KeyError):
            _log.debug("the record %s cannot be read", name, exc_info=True)
            return None
        return record


def _timing_name(version: str, gpu: str) -> str:
    return f"timing-{_word(version)}-{_word(gpu)}.cache"


def _word(text: str) -> str:
    """Return text as a part of a name: the GPU's as the driver says it, or a version."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)[:80]
