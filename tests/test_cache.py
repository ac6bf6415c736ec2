"""The host cache: atomic, checked, shared, and never in the way."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from edgeclip.cache import HostCache, cache_info, cache_root, clear_cache
from edgeclip.errors import ConfigError

DIGEST = "0123456789abcdef" * 4
posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and limits")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def cache(root: Path) -> HostCache:
    return HostCache.open(DIGEST, "host-1", root=root)


def test_entries_come_back(cache: HostCache, root: Path) -> None:
    assert cache.get("engines/image.bin") is None
    assert cache.put("engines/image.bin", b"one")
    assert cache.put("engines/image.bin", b"two, longer")
    assert cache.get("engines/image.bin") == b"two, longer"
    assert cache.is_sound("engines/image.bin")
    assert cache.directory == root / DIGEST[:16] / "host-1"
    assert cache.path("engines", "image.bin").read_bytes() == b"two, longer"  # the plain content, for engines
    cache.remove("engines/image.bin")
    cache.remove("engines/image.bin")
    assert cache.get("engines/image.bin") is None


def test_empty_content_is_an_entry(cache: HostCache) -> None:
    assert cache.put("stamp", b"")
    assert cache.get("stamp") == b""


def test_hosts_and_bundles_do_not_share(cache: HostCache, root: Path) -> None:
    cache.put("x", b"mine")
    assert HostCache.open(DIGEST, "host-2", root=root).get("x") is None
    assert HostCache.open("f" * 64, "host-1", root=root).get("x") is None
    assert HostCache.open(DIGEST, "host-1", root=root).get("x") == b"mine"


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no-sum", "other-sum", "directory"])
def test_a_damaged_entry_counts_as_absent(cache: HostCache, damage: str) -> None:
    cache.put("x", b"content " * 100)
    cache.put_array("a.npy", np.arange(100.0))
    for name in ("x", "a.npy"):
        path = cache.path(name)
        check = path.with_name(f".{name}.sum")
        if damage == "flip":
            data = bytearray(path.read_bytes())
            data[300] ^= 1
            path.write_bytes(data)
        elif damage == "truncate":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "no-sum":
            check.unlink()
        elif damage == "other-sum":
            check.write_bytes(b"3 00000000")
        else:
            path.unlink()
            path.mkdir()
    assert cache.get("x") is None
    assert not cache.is_sound("x")
    assert cache.map_array("a.npy") is None


def test_arrays_are_mapped_read_only(cache: HostCache) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert cache.put_array("vectors/v.npy", array)
    mapped = cache.map_array("vectors/v.npy", dtype=np.dtype(np.float32))
    assert mapped is not None
    np.testing.assert_array_equal(mapped, array, strict=True)
    assert isinstance(mapped.base, np.memmap)
    assert not mapped.flags.writeable
    assert cache.map_array("vectors/v.npy", dtype=np.dtype(np.float16)) is None
    assert cache.map_array("vectors/missing.npy") is None


def test_an_array_file_with_objects_is_never_loaded(cache: HostCache, tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    cache.put("objects.npy", (tmp_path / "objects.npy").read_bytes())
    np.save(tmp_path / "short.npy", np.zeros(100))
    cache.put("short.npy", (tmp_path / "short.npy").read_bytes()[:-1])
    cache.put("text.npy", b"not an array")
    for name in ("objects.npy", "short.npy", "text.npy"):
        assert cache.map_array(name) is None


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_layout_come_back(
    cache: HostCache, shape: tuple[int, ...], order: Literal["C", "F"]
) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=shape), order=order)
    cache.put_array("a.npy", array)
    mapped = cache.map_array("a.npy")
    assert mapped is not None
    np.testing.assert_array_equal(mapped, array, strict=True)


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", "a\\b", ".hidden", "a\0b", "a/", "C:x"])
def test_names_stay_in_the_directory(cache: HostCache, name: str) -> None:
    for use in (cache.get, cache.path, cache.remove, lambda name: cache.put(name, b"")):
        with pytest.raises(ConfigError, match="a cache entry cannot be named"):
            use(name)


@pytest.mark.parametrize(
    ("digest", "host"), [("xyz", "h"), ("../../../../etc", "h"), (DIGEST, "../h"), (DIGEST, "")]
)
def test_digest_and_fingerprint_must_be_plain(root: Path, digest: str, host: str) -> None:
    with pytest.raises(ConfigError, match="a host cache cannot be named"):
        HostCache.open(digest, host, root=root)


def test_where_no_directory_can_be_made_there_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache = HostCache.open(DIGEST, "host", root=tmp_path / "file" / "root")
    assert cache.directory is None
    assert cache.get("x") is None
    assert not cache.put("x", b"x")
    assert cache.map_array("x") is None
    cache.remove("x")
    with pytest.raises(ConfigError, match="no writable cache directory"):
        cache.path("x")


@posix_only
def test_a_full_disk_costs_the_entry_only(root: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from edgeclip.cache import HostCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = HostCache.open("0" * 64, "host", root=Path(sys.argv[1]))
assert cache.put("x", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
assert not cache.put("x", bytes(1000))
assert not cache.put("y", bytes(1000))
assert cache.get("x") == b"old"
assert cache.get("y") is None
"""
    subprocess.run([sys.executable, "-c", code, str(root)], check=True)
    assert [path.name for path in root.rglob("*") if path.is_file() and path.name.startswith(".tmp-")] == []


@posix_only
def test_a_read_only_cache_still_serves(
    cache: HostCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put("x", b"x")
    # root may write anywhere, so the question is answered for it
    monkeypatch.setattr("edgeclip.cache.os.access", lambda *_: False)
    again = HostCache.open(DIGEST, "host-1", root=root)
    assert not again.writable
    assert again.get("x") == b"x"
    assert not again.put("x", b"y")
    assert again.get("x") == b"x"


@posix_only
def test_only_the_user_may_look_into_a_new_cache(cache: HostCache, root: Path) -> None:
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert (root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


WORKER = """
import sys, zlib
from pathlib import Path
from edgeclip.cache import HostCache
import numpy as np
root, number = Path(sys.argv[1]), int(sys.argv[2])
cache = HostCache.open("0" * 64, "host", root=root)
own, seen = bytes([number]) * (1000 + number), 0
for turn in range(30):
    assert cache.put("shared", own)
    assert cache.put(f"own/{number}", own + bytes([turn]))
    assert cache.put_array("array.npy", np.full(500 + number, number, np.int32))
    found = cache.get("shared")
    if found is not None:
        assert found == bytes([found[0]]) * (1000 + found[0])
        seen += 1
    array = cache.map_array("array.npy")
    if array is not None:
        assert len(array) == 500 + int(array[0]) and (array == array[0]).all()
    assert cache.get(f"own/{number}") == own + bytes([turn])
assert seen
"""


@pytest.mark.slow
def test_eight_processes_share_a_cache(root: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root), str(number)], stderr=subprocess.PIPE, text=True
        )
        for number in range(8)
    ]
    said = [worker.communicate(timeout=60)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8, said
    cache = HostCache.open("0" * 64, "host", root=root)
    assert cache.directory is not None
    assert not [path for path in cache.directory.rglob("*") if path.name.startswith(".tmp-")]


# --- root, info and clear
# --------------------------------------------------------------------------------------------


def test_the_root_is_the_environment_or_the_user_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import platformdirs

    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", "relative")
    assert cache_root() == tmp_path / "relative"
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", "")
    assert cache_root() == platformdirs.user_cache_path("edgeclip")


def test_info_counts_entries_by_bundle(root: Path) -> None:
    assert cache_info(root).entries == ()
    for host in ("h1", "h2"):
        HostCache.open(DIGEST, host, root=root).put("x", bytes(1000))
    HostCache.open("f" * 64, "h1", root=root).put("y", bytes(10))
    info = cache_info(root)
    assert [(entry.bundle, entry.hosts, entry.files) for entry in info.entries] == [
        (DIGEST[:16], ("h1", "h2"), 2),
        ("f" * 16, ("h1",), 1),
    ]
    assert info.size_bytes == sum(entry.size_bytes for entry in info.entries) >= 2010


def test_clearing_removes_our_layout_and_nothing_else(root: Path, tmp_path: Path) -> None:
    HostCache.open(DIGEST, "h1", root=root).put("x/y/z", b"x")
    others = {
        "thesis.txt": root / "thesis.txt",
        "photos": root / "photos" / "cat.jpg",
        "a commit": root / "0123456789abcdee" / "loose-file",  # sixteen digits, but not our layout inside
    }
    for path in others.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("keep")
    if os.name == "posix":
        (tmp_path / "outside" / "host").mkdir(parents=True)
        (tmp_path / "outside" / "host" / "keep").write_text("keep")
        (root / "fedcba9876543210").symlink_to(tmp_path / "outside")
    removed = clear_cache(root)
    assert [entry.bundle for entry in removed.entries] == [DIGEST[:16]]
    assert not (root / DIGEST[:16]).exists()
    assert all(path.read_text() == "keep" for path in others.values())
    if os.name == "posix":
        assert (tmp_path / "outside" / "host" / "keep").is_file()


def test_one_bundle_can_be_cleared(root: Path) -> None:
    for digest in (DIGEST, "f" * 64):
        HostCache.open(digest, "h", root=root).put("x", b"x")
    assert [entry.bundle for entry in clear_cache(root, bundle=DIGEST).entries] == [DIGEST[:16]]
    assert [entry.bundle for entry in cache_info(root).entries] == ["f" * 16]
    for wrong in ("e", ""):
        with pytest.raises(
            ConfigError, match=f"has 0 entries whose digest starts with {wrong!r}, expected one"
        ):
            clear_cache(root, bundle=wrong)


@posix_only
def test_odd_roots_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    (tmp_path / "home" / "me").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for root in (Path("/"), tmp_path / "home" / "me", tmp_path / "home", tmp_path / "link", tmp_path):
        with pytest.raises(
            ConfigError, match="is a home directory or above one, so nothing in it is removed"
        ):
            clear_cache(root)
    clear_cache(tmp_path / "home" / "me" / ".cache" / "edgeclip")


def test_writing_with_a_clear_in_between_only_costs_the_entry(cache: HostCache, root: Path) -> None:
    cache.put("x", b"x")
    clear_cache(root)
    assert cache.get("x") is None
    assert cache.put("x", b"again")
    assert cache.get("x") == b"again"
