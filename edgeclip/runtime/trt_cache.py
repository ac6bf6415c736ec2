"""Where built TensorRT engines are kept on a host, and what says whether one still fits.

An engine holds for one network, one version of TensorRT and one kind of GPU. It is an entry of the host
cache with a JSON record beside it; the record is written last and names the engine, so that a process killed
between the two leaves the old pair or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from edgeclip.cache import HostCache
from edgeclip.errors import BackendError
from edgeclip.runtime.cuda import Gpu
from edgeclip.runtime.host import Host
from edgeclip.runtime.session import ModelFiles, RuntimeOptions

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
    profile: dict[str, list[list[int]]]
    layers: int
    build_s: float

    def misfit(self, *, version: str, gpu: Gpu | None) -> str | None:
        """Return why the engine cannot be used, ``None`` where it can.

        Args:
            version: of the TensorRT at hand.
            gpu: at hand; ``None`` looks at the version alone.
        """
        if self.engine_version != version:
            return f"it was built by version {self.engine_version}, this host has {version}"
        if gpu is None:
            return None
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
    """The engines of one bundle on this host, or in a directory.

    Attributes:
        entries: where they are.
    """

    entries: HostCache

    @classmethod
    def of(cls, model: ModelFiles, options: RuntimeOptions) -> EngineCache:
        """Return where the engines of a tower are: ``options.cache_dir``, else the bundle's host cache.

        Raises:
            BackendError: the tower is a bare file, which has no cache, and ``options`` name none.
        """
        if options.cache_dir is not None:
            return cls.at(options.cache_dir)
        if model.bundle_digest is None:
            raise BackendError(
                f"{model.name}: engines of a bare file are kept nowhere. Open an engine (.engine), a "
                "tower of a bundle, or give RuntimeOptions(cache_dir=…)."
            )
        return cls(HostCache.open(model.bundle_digest, Host.here().fingerprint()))

    @classmethod
    def at(cls, directory: Path) -> EngineCache:
        """Return the engines in a directory, which is made where it does not exist."""
        with contextlib.suppress(OSError):  # what it then says is that it cannot be written
            directory.mkdir(parents=True, exist_ok=True)
        return cls(HostCache(directory, writable=os.access(directory, os.W_OK | os.X_OK)))

    @property
    def where(self) -> str:
        """The directory, as messages name it."""
        directory = self.entries.directory
        return "the host cache, which cannot be made" if directory is None else repr(str(directory))

    def find(self, digest: str, *, backend: str, capability: str | None) -> EngineRecord | None:
        """Return the record of a tower's engine; ``None`` where there is none that can be read.

        Args:
            digest: of the tower.
            backend: that runs it.
            capability: of the GPU; ``None`` looks for one that TensorRT-RTX built for all.
        """
        names = [self._name(digest, backend, capability)]
        if capability is not None and backend == "tensorrt_rtx":
            names.append(self._name(digest, backend, None))
        for name in names:
            record = self._record(f"{name}.json")
            if record is not None and record.tower_digest == digest:
                return record
        return None

    def read(self, record: EngineRecord) -> bytes | None:
        """Return an engine; ``None`` where it is missing or damaged."""
        return self.entries.get(record.engine)

    def holds(self, record: EngineRecord) -> bool:
        """Return whether an engine is there and undamaged."""
        return self.read(record) is not None

    def keep(self, record: EngineRecord, data: bytes) -> EngineRecord:
        """Store an engine and its record in the place of earlier ones; return the record as stored.

        Raises:
            BackendError: the cache cannot be written.
        """
        name = self._name(record.tower_digest, record.backend, record.compute_capability)
        earlier = self._record(f"{name}.json")
        engine = f"{name}-{hashlib.sha256(data).hexdigest()[:8]}.engine"
        stored = replace(record, engine=engine, size_bytes=len(data))
        text = json.dumps({"schema": _SCHEMA, **stored.to_dict()}, indent=2, ensure_ascii=False)
        if not self.entries.put(engine, data) or not self.entries.put(f"{name}.json", text.encode()):
            raise BackendError(
                f"{record.tower}: the engine was built and cannot be kept in {self.where}. Make room "
                "there, or set EDGECLIP_CACHE_DIR to a directory that can be written."
            )
        if earlier is not None and earlier.engine != engine:
            self.entries.remove(earlier.engine)
        return stored

    def timing_cache(self, version: str) -> bytes:
        """Return what earlier builds of this version measured; empty where there is nothing."""
        return self.entries.get(f"timing-{_word(version)}.cache") or b""

    def keep_timing_cache(self, version: str, data: bytes) -> None:
        """Keep what a build measured; losing it costs time alone."""
        self.entries.put(f"timing-{_word(version)}.cache", data)

    @staticmethod
    def _name(digest: str, backend: str, capability: str | None) -> str:
        return (
            f"{backend}-{digest[:16]}-{'any' if capability is None else 'sm' + capability.replace('.', '')}"
        )

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


def _word(version: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in version)
