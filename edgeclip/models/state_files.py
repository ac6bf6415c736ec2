"""Tensors out of files from strangers (safetensors and ``torch.save``, told apart by content), and into ours.

Nothing in a file is ever executed: safetensors holds no code, and a pickle is read by PyTorch's restricted
unpickler (``weights_only=True``) after its instructions were listed without running them. What else is
refused, each with one sentence:

- TorchScript archives (they are programs), the formats of torch before 1.6 (bare pickles, tar), folders,
  git-lfs pointers, and everything that is no such file;
- compressed or overlapping members of an archive (``torch.save`` writes neither; a zip bomb needs one), and
  tensors that claim more bytes than the file has;
- files over 16 GiB.

Not in here: what the names mean (``foreign.py``).
"""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeclip.errors import InputError

__all__ = ["read_state", "write_state"]

_MAX_BYTES = 16 << 30
_MAX_PICKLE_BYTES = 64 << 20
_MAX_WRAPPERS = 4
_MAX_SHARING = 3
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PARALLEL = "module."
_HEAD_BYTES = 512
_TAR_MAGIC = slice(257, 262)
# Inert, and part of the training checkpoints of others (their options): attributes without behaviour.
_ALLOWED: list[Any] = [argparse.Namespace]
_KNOWN = "expected safetensors, or a state dict written by torch.save (.pt, .pth, .bin)"


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a weights file, names and dtypes as they are.

    What training wraps around them is taken off: ``{"state_dict": …}``, ``{"model": …}`` and ``module.``
    before every name. Tensors may be views of the mapped file: copy what outlives it.

    Args:
        path: a safetensors file or one written by ``torch.save``, whatever its name ends with.

    Raises:
        InputError: the file is missing, damaged, too large, of another format, holds code, or holds anything
            but tensors.
    """
    path = Path(path)
    where = f"weights file {str(path)!r}"
    head, size = _open(path, where)
    if head.startswith(b"PK"):
        content = _read_torch(path, size, where)
    elif len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        content = _read_safetensors(path, where)
    else:
        raise InputError(f"{where} {_guess(head)}; {_KNOWN}.")
    state = _unwrap(content, where)
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    # Tensors that share storage are stored once: tied weights, and a tower registered under two names.
    if claimed > _MAX_SHARING * size:
        raise InputError(
            f"{where}: its tensors claim {claimed} bytes, but the file has {size}; it is damaged."
        )
    return state


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that may be read by whom the user's umask lets.

    The library makes its files readable for their owner alone, which stops the next user or service.

    Raises:
        OSError: it cannot be written.
        SafetensorError: likewise, as the library says it.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(state), path, metadata={"format": "pt"})
    path.chmod(mode)


def _open(path: Path, where: str) -> tuple[bytes, int]:
    """Return the first bytes and the size."""
    if path.is_dir():
        inside = sorted(
            file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".pth", ".bin")
        )
        hint = f"name the file in it, one of {inside}" if inside else "it holds no weights file"
        raise InputError(f"{where} is a folder; {hint}.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror}); check the path.") from error
    if not head:
        raise InputError(f"{where} is empty; fetch it again.")
    if size > _MAX_BYTES:
        raise InputError(
            f"{where} has {size} bytes, expected at most {_MAX_BYTES}; it is no CLIP checkpoint."
        )
    return head, size


def _guess(head: bytes) -> str:
    """Say what a file that cannot be used looks like."""
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer in place of the weights (run `git lfs pull`)"
    if head[_TAR_MAGIC] == b"ustar":
        return "is a tar archive, the format of torch before 0.4 (save it again with a current torch)"
    if head.startswith(b"\x80"):
        return "is a bare pickle, the format of torch before 1.6 (save it again with a current torch)"
    if head.lstrip()[:1] in (b"<", b"{"):
        return "is a text file, perhaps an error page saved as weights (fetch it again)"
    return f"begins with {head[:8]!r}, which is no weights file (it may be truncated: fetch it again)"


def _read_safetensors(path: Path, where: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{where} is no whole safetensors file ({_first_line(error)}); fetch it again."
        ) from error


def _read_torch(path: Path, size: int, where: str) -> Any:
    _check_archive(path, size, where)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not unsafe and path.suffix == ".safetensors":
                with path.open("rb") as file:  # by its name torch would take it for safetensors
                    return torch.load(file, map_location="cpu", weights_only=True)
            if not unsafe:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle from a stranger can make the reader raise anything
        raise InputError(
            f"{where} cannot be read by torch ({type(error).__name__}: {_first_line(error)}); fetch it again."
        ) from error
    raise InputError(
        f"{where} asks for {', '.join(map(repr, sorted(unsafe)[:5]))} when it is opened, expected tensors "
        "only; nothing was run. Save its state dict alone, as safetensors."
    )


def _check_archive(path: Path, size: int, where: str) -> None:
    """Refuse archives that ``torch.save`` did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{where} is no whole archive ({error}); fetch it again.") from error
    names = [member.filename for member in members]
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise InputError(
            f"{where} is a TorchScript archive, a program; use the same weights as safetensors: OpenAI's are "
            "in timm/vit_base_patch32_clip_224.openai, timm/vit_base_patch16_clip_224.openai and "
            "timm/vit_large_patch14_clip_224.openai on the hub."
        )
    pickles = [member for member in members if member.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{where} is a zip archive with {len(pickles)} data.pkl, expected one; {_KNOWN}.")
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    unpacked = sum(member.file_size for member in members)
    if packed or unpacked > size or len(set(names)) < len(names):
        raise InputError(
            f"{where} unpacks to {unpacked} bytes from {size}, with {len(packed)} compressed members of "
            f"{len(names)}; torch.save writes none, so this is no checkpoint."
        )
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise InputError(
            f"{where}: its data.pkl has {pickles[0].file_size} bytes, expected at most {_MAX_PICKLE_BYTES}; "
            "it holds more than tensors."
        )


def _unwrap(content: Any, where: str) -> dict[str, Tensor]:
    """Return the mapping of names to tensors that is in there."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(content, Mapping):
            break
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        kind = "an empty mapping" if isinstance(content, Mapping) else type(content).__name__
        raise InputError(f"{where} holds {kind}, expected names and tensors.")
    wrong = [
        f"{key!r} ({type(value).__name__})"
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, Tensor) and _is_plain(value))
    ]
    if wrong:
        raise InputError(
            f"{where} holds {len(wrong)} entries that are no plain tensors, expected none: "
            f"{', '.join(wrong[:5])}; save its state dict alone."
        )
    state = {key: value.detach() for key, value in content.items()}
    if all(key.startswith(_PARALLEL) for key in state):
        state = {key.removeprefix(_PARALLEL): value for key, value in state.items()}
    return state


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and not value.is_complex()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
