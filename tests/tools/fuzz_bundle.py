"""Open mutated bundles and use every part of them: a result, or a typed error of one line, and nothing
outside is read.

``fuzz_bundle.py BUNDLE manifest|files|archive COUNT SEED`` mutates a bundle COUNT times in place, or archives
of it. Beside the bundle lies a file that must never be opened, and links to it lie in the bundle; an audit
hook sees every file that is opened. Prints one JSON line; exits with a traceback at the first wrong
behaviour.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

from edgeclip.bundle import Bundle
from edgeclip.bundle_tools import describe_bundle, diff_bundles, pack_bundle, unpack_bundle
from edgeclip.cli.bundle import _show
from edgeclip.errors import EdgeClipError
from edgeclip.heads import temperature_head
from edgeclip.labels import LabelBank
from edgeclip.tensors import read_tensors
from edgeclip.tokenizer import Tokenizer

HANG_S = 5.0
CODE = tuple(
    os.path.realpath(path)
    for path in (
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        Path(__file__).parents[2] / "edgeclip",
    )
)


class Watch:
    """Collects what is opened while it is on; imports of code are no reads of data."""

    def __init__(self) -> None:
        self.on = False
        self.opened: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (
            self.on
            and event in ("open", "os.listdir", "os.scandir")
            and isinstance(arguments[0], (str, bytes, Path))
        ):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(CODE):
                self.opened.append(path)


def use(directory: Path) -> str:
    """Open a bundle and everything in it; return how it ended."""
    errors = []

    def attempt(step: Any) -> Any:
        try:
            return step()
        except EdgeClipError as error:
            errors.append(str(error))
            return None

    bundle: Bundle | None = attempt(lambda: Bundle.open(directory))
    if bundle is not None:
        manifest = bundle.manifest
        with contextlib.redirect_stdout(io.StringIO()):
            attempt(lambda: _show(bundle, describe_bundle(bundle), checked=False))
        attempt(lambda: diff_bundles(bundle, bundle))
        for name in manifest.files:
            attempt(lambda name=name: bundle.read(name))
            attempt(lambda name=name: bundle.file(name))
        for name, variant in manifest.variants.items():
            for tower in variant.towers:
                attempt(lambda name=name, tower=tower: bundle.variant(name).tower(tower))
        if manifest.golden is not None:
            attempt(lambda: read_tensors(bundle.read(manifest.golden)))
        for entry in manifest.label_banks.values():
            attempt(lambda entry=entry: LabelBank.from_bytes(bundle.read(entry.file)))
        attempt(lambda: temperature_head(bundle, manifest.default_bank))
        if (files := manifest.tokenizer) is not None:
            attempt(
                lambda: Tokenizer.from_bytes(
                    bundle.read(files.config),
                    bundle.read(files.merges),
                    None if files.words is None else bundle.read(files.words),
                )("a photo of a red")
            )
    for message in errors:
        assert "\n" not in message, message
        assert len(message) < 2000, message[:200]
        message.encode("utf-8")  # it can be printed
    return "refused" if bundle is None else "partly" if errors else "opened"


# --- mutations
# -------------------------------------------------------------------------------------------------


def junk(rng: random.Random, canary: Path) -> Any:
    """Return a value that does not belong where it is put."""
    deep: Any = 1
    for _ in range(rng.choice([3, 50, 200])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 3.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 2**64, -(2**63) - 1, 10**40,
            "", "x", "\n", "\0", "\x1b[31m", "\u202e", "\U0001f600", "a" * 300, "a" * 100_000,
            [], {}, [[]], [1, 2], ["x"], {"": None}, {"a": {"b": []}}, [0] * 1000,
            {str(key): key for key in range(500)}, deep, *attacks(canary),
        ]
    )  # fmt: skip


def attacks(canary: Path) -> list[str]:
    """Return names that lead out of the bundle, or try to."""
    return [
        "../canary", "x/../../canary", "./../canary", str(canary), "link.bin", "folder-link/canary", "pipe",
        "/etc/passwd", "..\\canary", "C:\\canary", "\\\\host\\share", "file:///etc/passwd", "~/canary",
        "canary\0.bin", "../canary\n", "%2e%2e/canary", "onnx-fp32/../../canary", "..", ".", "/", "//",
        "manifest.json", "MANIFEST.JSON", "loop", "/dev/zero", "/proc/self/environ", "CON", "nul.txt", "a:b",
        "．．/canary",
    ]  # fmt: skip


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += nodes(item, (*path, key))
    return found


def parent(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def renamed(value: Any, old: str, new: str) -> Any:
    """Return a document in which every string and key ``old`` is ``new``."""
    if isinstance(value, dict):
        return {new if key == old else key: renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, old, new) for item in value]
    return new if value == old else value


def mutate_document(manifest: Any, rng: random.Random, canary: Path) -> Any:
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        paths = nodes(manifest)
        path = rng.choice(paths)
        holder, key = parent(manifest, path), path[-1]
        kind = rng.randrange(6)
        if kind == 0:
            holder[key] = junk(rng, canary)
        elif kind == 1:
            del holder[key]
        elif kind == 2:
            holder[key] = copy.deepcopy(parent(manifest, (other := rng.choice(paths)))[other[-1]])
        elif kind == 3 and isinstance(holder, dict):
            holder[rng.choice([*attacks(canary), "", "a" * 5000, "unknown"])] = holder.pop(key)
        elif kind == 4:
            # The consistent attack: a listed name that leads out, with the right hash for what is there.
            files = manifest.get("files")
            name = rng.choice([*map(str, files)] or ["x"]) if isinstance(files, dict) else "x"
            attack = rng.choice(attacks(canary))
            manifest = renamed(manifest, name, attack)
            content = canary.read_bytes()
            if isinstance(manifest.get("files"), dict):
                manifest["files"][attack] = {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size_bytes": len(content),
                }
        else:
            holder[key] = rng.choice([-1, 0, 2**31 + 1, 2**53, 2**70, 0.5, 1e300, 101, 4097, 70000])
        if not isinstance(manifest, dict) or len(nodes(manifest)) < 5:
            break
    return manifest


def mutate_text(text: bytes, rng: random.Random) -> bytes:
    data = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 4])):
        position = rng.randrange(len(data))
        kind = rng.randrange(8)
        if kind == 0:
            data[position] = rng.randrange(256)
        elif kind == 1:
            del data[position : position + rng.randrange(1, 200)]
        elif kind == 2:
            data[position:position] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 3:
            del data[max(1, position) :]
        elif kind == 4:
            data[position:position] = rng.choice(
                [b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\\ud800", b"\0", b"\xef\xbb\xbf"]
            )
        elif kind == 5:
            number = rng.choice(
                [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"0x10", b"01", b"1."]
            )
            start = data.find(b": ", position) + 2
            data[start : start + 1] = number
        elif kind == 6:
            start = data.find(b'"', position)
            end = data.find(b",", start)
            data[start:start] = data[start : end + 1]  # a key twice, with the same or another value
        else:
            data[position:position] = rng.choice([b"[", b'{"a":']) * rng.choice([10, 5000, 200_000])
    return bytes(data)


def mutate_content(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        # Headers are where readers go wrong.
        position = rng.randrange(min(len(data), rng.choice([16, 600, len(data)])))
        kind = rng.randrange(6)
        if kind == 0:
            data[position] = rng.randrange(256)
        elif kind == 1:
            del data[position : position + rng.randrange(1, 64)]
        elif kind == 2:
            data[position:position] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 32)))
        elif kind == 3:
            data[position : position + 1] = rng.choice(
                [b"9", b"-", b"9999999999999999999999", b"[", b"}", b'"', b"e9", b"\\u0000"]
            )
        elif kind == 4:
            del data[max(1, position) :]
        else:
            data[:8] = rng.choice([0, 7, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
        if not data:
            break
    return bytes(data)


def hostile_archive(path: Path, members: dict[str, bytes], rng: random.Random, canary: Path) -> None:
    """Write an archive that holds a bundle and, beside it or in place of a part, what should not be there."""
    name, attack = (
        rng.choice(sorted(members)),
        rng.choice([each for each in attacks(canary) if "\0" not in each]),
    )
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                info = zipfile.ZipInfo(attack if member == name and rng.random() < 0.7 else member)
                if member == name and rng.random() < 0.5:
                    info.external_attr, content = 0o120777 << 16, str(canary).encode()  # a link
                archive.writestr(info, content)
        return
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for member, content in members.items():
            entry = tarfile.TarInfo(attack if member == name and rng.random() < 0.7 else member)
            entry.size = len(content)
            if member == name and rng.random() < 0.7:
                entry.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
                entry.linkname, entry.size, content = rng.choice([str(canary), attack, name]), 0, b""
            archive.addfile(entry, io.BytesIO(content))


def fuzz_archives(directory: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """Unpack mutated archives: the bundle or nothing comes out, and nothing appears anywhere else."""
    bundle, place = Bundle.open(directory), directory.parent
    canary = place / "canary"
    canary.write_bytes(b"must not be changed")
    good = {}
    for suffix in (".tar", ".zip"):
        pack_bundle(bundle, place / f"good{suffix}")
        good[suffix] = (place / f"good{suffix}").read_bytes()
    members = {
        "manifest.json": bundle.manifest_bytes,
        **{name: bundle.read(name) for name in bundle.manifest.files},
    }
    seen, slowest_s = {"opened": 0, "partly": 0, "refused": 0}, 0.0
    for _ in range(count):
        suffix = rng.choice([".tar", ".zip", ".tar.gz"])
        archive, target = place / f"x{suffix}", place / "target"
        if rng.random() < 0.5 or suffix == ".tar.gz":
            hostile_archive(archive, members, rng, canary)
        else:
            archive.write_bytes(mutate_content(good[suffix], rng))
        before, start = sorted(place.rglob("*")), time.perf_counter()
        try:
            unpacked = unpack_bundle(archive, target)
        except EdgeClipError as error:
            message = str(error)
            assert "\n" not in message, message
            seen["refused"] += 1
        else:
            unpacked.check_files()
            assert unpacked.digest == bundle.digest or unpacked.raw != bundle.raw
            seen["opened"] += 1
            assert not any(path.is_symlink() for path in target.rglob("*"))
            shutil.rmtree(target)
        slowest_s = max(slowest_s, time.perf_counter() - start)
        assert sorted(place.rglob("*")) == before, archive
        assert canary.read_bytes() == b"must not be changed"
        archive.unlink()
    return {**seen, "slowest_s": round(slowest_s, 3)}


def main() -> None:
    directory, mode, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rng = random.Random(int(sys.argv[4]))
    if mode == "archive":
        print(json.dumps(fuzz_archives(directory, count, rng)))
        return
    canary = directory.parent / "canary"
    canary.write_bytes(b"must not be read")
    (directory / "link.bin").symlink_to(canary)
    (directory / "folder-link").symlink_to(directory.parent)
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "pipe")
    text = (directory / "manifest.json").read_bytes()
    good = json.loads(text)
    inside = os.path.realpath(directory) + os.sep
    assert use(directory) == "opened"  # imports everything, too
    watch, seen, slowest_s = Watch(), {"opened": 0, "partly": 0, "refused": 0}, 0.0
    for _ in range(count):
        name, content = None, b""
        if mode == "files":
            manifest = copy.deepcopy(good)
            name = rng.choice(sorted(file for file in manifest["files"] if not file.endswith(".onnx")))
            content = (directory / name).read_bytes()
            mutated = mutate_content(content, rng)
            (directory / name).write_bytes(mutated)
            manifest["files"][name] = {
                "sha256": hashlib.sha256(mutated).hexdigest(),
                "size_bytes": len(mutated),
            }
            data = json.dumps(manifest).encode()
        elif rng.random() < 0.7:
            document = mutate_document(copy.deepcopy(good), rng, canary)
            data = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        else:
            data = mutate_text(text, rng)
        (directory / "manifest.json").write_bytes(data)
        watch.on, start = True, time.perf_counter()
        seen[use(directory)] += 1
        watch.on, slowest_s = False, max(slowest_s, time.perf_counter() - start)
        outside = [path for path in watch.opened if not (path + os.sep).startswith(inside)]
        assert not outside, (outside, data[:2000])
        watch.opened.clear()
        if name is not None:
            (directory / name).write_bytes(content)
    assert slowest_s < HANG_S, slowest_s
    print(json.dumps({**seen, "slowest_s": round(slowest_s, 3)}))


if __name__ == "__main__":
    main()
