"""Further captions for the samples of shards, from a JSONL file, and how they get into a sample's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgeclip.data import texts_of
from edgeclip.distill.samples import Sample
from edgeclip.errors import InputError

__all__ = ["CaptionFile", "with_captions"]

_MAX_CAPTION_FILE_BYTES = 1 << 34


class CaptionFile:
    """Further captions, from a JSONL file.

    A line is an object with ``key``, a sample's key in its shard or ``SHARD/KEY``, and texts by kind:
    ``captions`` (or ``synthetic``) are synthetic ones, ``synthetic_TAG`` those of another captioner, any
    other name is a kind of its own, such as ``zh``. They go behind those that the sample has.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read, or a line is no such object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, tuple[str, ...]]] = {}
        digest = hashlib.sha256()
        try:
            if path.stat().st_size > _MAX_CAPTION_FILE_BYTES:
                raise InputError(f"captions {str(path)!r}: larger than {_MAX_CAPTION_FILE_BYTES:,} bytes.")
            with path.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    digest.update(line)
                    if line.strip():
                        self._add(line, number)
        except OSError as error:
            raise InputError(
                f"captions {str(path)!r} cannot be read: {error.strerror or error}. Check the path; a "
                "captioner is open-clip:MODEL:FILE."
            ) from error
        self.digest = digest.hexdigest()

    def _add(self, line: bytes, number: int) -> None:
        try:
            said = msgspec.json.decode(line, type=dict[str, str | list[str]])
            key = said.pop("key")
            if not isinstance(key, str) or not said:
                raise ValueError(f"got the key {key!r} and the kinds {sorted(said)}")
        except (msgspec.MsgspecError, KeyError, ValueError, RecursionError) as error:
            reason = "no 'key'" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
            raise InputError(
                f"captions {str(self.path)!r}, line {number}: {reason}; expected an object with 'key' and "
                'texts by kind: {"key": "000017", "captions": ["…"], "zh": ["…"]}.'
            ) from error
        kinds = self._found.setdefault(key, {})
        for kind, texts in said.items():
            named = "synthetic" if kind == "captions" else kind
            if found := texts_of(texts):
                kinds[named] = kinds.get(named, ()) + found

    def of(self, sample: Sample) -> Mapping[str, tuple[str, ...]]:
        """Return what the file says about a sample; empty if nothing."""
        return self._found.get(sample.key) or self._found.get(sample.name, {})


def with_captions(
    members: Mapping[str, bytes], extra: Mapping[str, tuple[str, ...]], what: str
) -> dict[str, bytes]:
    """Return a sample's members with further captions in its ``.json`` and ``.syn.json``.

    Args:
        members: content by extension.
        extra: texts by kind; those that the sample has already are left out.
        what: names the sample in errors.

    Raises:
        InputError: a JSON member is none.
    """
    changed = dict(members)
    for extension in ("json", "syn.json"):
        is_synthetic = extension == "syn.json"
        kinds = {
            kind: texts
            for kind, texts in extra.items()
            if (kind.split("_")[0] == "synthetic") is is_synthetic
        }
        if not kinds:
            continue
        said = _object(members.get(extension, b"{}"), f"{what}.{extension}")
        if is_synthetic:
            table = said
        else:
            there = said.get("captions", {})
            table = dict(there) if isinstance(there, dict) else {"alt": there}
            said["captions"] = table
        for kind, texts in kinds.items():
            name = kind.replace("synthetic", "syn_text", 1) if is_synthetic else kind
            had = table.get(name, [])
            had = list(had) if isinstance(had, list) else [had]
            table[name] = had + [text for text in texts if text not in had]
        changed[extension] = json.dumps(said, ensure_ascii=False).encode("utf-8", "replace")
    return changed


def _object(content: bytes, what: str) -> dict[str, Any]:
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: is not JSON ({error}). Make the shard again.") from error
    return said if isinstance(said, dict) else {}
