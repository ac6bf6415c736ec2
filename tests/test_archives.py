"""Reading wheels, tarballs, Debian packages and Qt resource files: right, and only what is wanted."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeclip.archives import Limits, read_members, safe_name
from edgeclip.errors import InputError

FILES = {"data/a.txt": b"alpha\n", "data/sub/b.bin": bytes(range(256)) * 40, "docs/licence": b"free"}


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_deb(path: Path, files: dict[str, bytes], *, suffix: str = ".xz") -> Path:
    """Write the layout of deb(5) by hand: an ar archive with an odd-sized member before the files."""
    mode = {"": "w", ".gz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz", ".zst": "w"}[suffix]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo("./" + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    members = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", b"odd"),
        (f"data.tar{suffix}", buffer.getvalue()),
    ]
    out = b"!<arch>\n"
    for name, content in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    path.write_bytes(out)
    return path


def make_rcc(files: dict[str, bytes], *, compress: bool = False, version: int = 3) -> bytes:
    """Write one folder of files in the layout of Qt's binary resources."""
    names, contents = b"", b""
    nodes = [struct.pack(">IHII", 0, 2, 1, 1), struct.pack(">IHII", 0, 2, len(files), 2)]

    def add_name(name: str) -> int:
        nonlocal names
        offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return offset

    nodes[1] = struct.pack(">IHII", add_name("pics"), 2, len(files), 2)
    for name, content in files.items():
        data = struct.pack(">I", len(content)) + zlib.compress(content) if compress else content
        nodes.append(struct.pack(">IHHHI", add_name(name), int(compress), 0, 0, len(contents)))
        contents += struct.pack(">I", len(data)) + data
    tree = b"".join(node + bytes(0 if version == 1 else 8) for node in nodes)
    header = 20 + (4 if version == 3 else 0)
    offsets = (header, header + len(tree), header + len(tree) + len(contents))
    return b"qres" + struct.pack(">4I", version, *offsets) + bytes(header - 20) + tree + contents + names


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "pkg.whl": make_zip,
    "pkg.tgz": make_tar,
    "pkg.tar.xz": lambda path, files: make_tar(path, files, "w:xz"),
    "pkg.deb": make_deb,
}


@pytest.mark.parametrize("name", MAKERS)
def test_matching_members_come_back_unchanged(tmp_path: Path, name: str) -> None:
    archive = MAKERS[name](tmp_path / name, FILES)

    assert dict(read_members(archive, ["*"])) == FILES
    assert dict(read_members(archive, ["data/*"])) == {
        k: v for k, v in FILES.items() if k.startswith("data/")
    }
    assert dict(read_members(archive, ["nothing*"])) == {}


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_debian_packages_of_each_readable_compression(tmp_path: Path, suffix: str) -> None:
    archive = make_deb(tmp_path / "pkg.deb", FILES, suffix=suffix)

    assert dict(read_members(archive, ["*"])) == FILES


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not here")
@pytest.mark.parametrize("compression", ["xz", "gzip", "none"])
def test_deb_reader_agrees_with_dpkg(tmp_path: Path, compression: str) -> None:
    tree = tmp_path / "tree"
    for name, content in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    (tree / "data/link").symlink_to("a.txt")
    (tree / "DEBIAN").mkdir()
    control = "Package: tiny\nVersion: 1:1.0-1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    (tree / "DEBIAN/control").write_text(control)
    archive, out = tmp_path / "tiny.deb", tmp_path / "out"
    quiet = {"check": True, "capture_output": True}
    subprocess.run(["dpkg-deb", f"-Z{compression}", "--root-owner-group", "-b", tree, archive], **quiet)
    subprocess.run(["dpkg-deb", "-x", archive, out], **quiet)

    theirs = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    assert dict(read_members(archive, ["*"])) == theirs == FILES


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_members_of_qt_resources_inside_an_archive(tmp_path: Path, version: int, compress: bool) -> None:
    inner = {"kätzchen.webp": b"cat" * 50, "read.me": b"text"}
    archive = make_deb(tmp_path / "p.deb", {"usr/x.rcc": make_rcc(inner, compress=compress, version=version)})

    got = dict(read_members(archive, ["*.rcc:pics/*.webp"]))

    assert got == {"usr/x.rcc/pics/kätzchen.webp": inner["kätzchen.webp"]}


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../up", "a\\..\\b", "C:/x", "nul\0", "", "./"]
)
def test_names_that_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"'x\.whl' has a member named .* leave the directory"):
        safe_name(name, archive="x.whl")


def test_harmless_names_are_made_plain() -> None:
    assert safe_name("./usr//share/./a b.txt", archive="x.deb") == "usr/share/a b.txt"


@pytest.mark.parametrize("make", [make_tar, make_zip, make_deb], ids=["tgz", "whl", "deb"])
def test_an_archive_that_climbs_is_refused(
    tmp_path: Path, make: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    suffix = {make_tar: ".tgz", make_zip: ".whl", make_deb: ".deb"}[make]
    archive = make(tmp_path / f"evil{suffix}", {"ok": b"1", "../../evil": b"2"})

    with pytest.raises(InputError, match=r"evil.* has a member named '.*\.\./\.\./evil'"):
        list(read_members(archive, ["*"]))


def test_links_and_devices_are_not_read(tmp_path: Path) -> None:
    archive = tmp_path / "links.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        file.addfile(tarfile.TarInfo("empty"))

    assert dict(read_members(archive, ["*"])) == {"empty": b""}


def test_a_link_in_a_zip_is_not_read(tmp_path: Path) -> None:
    archive = tmp_path / "links.zip"
    with zipfile.ZipFile(archive, "w") as file:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
        file.writestr("folder/", b"")

    assert dict(read_members(archive, ["*"])) == {}


@pytest.mark.parametrize(
    "limits", [Limits(files=2), Limits(file_bytes=100), Limits(total_bytes=10_000)], ids=["n", "one", "sum"]
)
@pytest.mark.parametrize("name", MAKERS)
def test_too_much_is_refused(tmp_path: Path, name: str, limits: Limits) -> None:
    archive = MAKERS[name](tmp_path / name, FILES)

    with pytest.raises(
        InputError, match=f"expected at most {limits.files} files, {limits.file_bytes} bytes each"
    ):
        list(read_members(archive, ["*"], limits=limits))


def test_a_compressed_qt_resource_is_not_inflated_past_the_limit(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "p.zip", {"x.rcc": make_rcc({"zeros": bytes(1 << 20)}, compress=True)})

    with pytest.raises(InputError, match="expected at most"):
        list(read_members(archive, ["*.rcc:*"], limits=Limits(file_bytes=10_000)))


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "case.tgz", {"Readme": b"1", "README": b"2"})

    with pytest.raises(InputError, match="'README' twice, or two names that differ in case"):
        list(read_members(archive, ["*"]))


@pytest.mark.parametrize("name", ["pkg.whl", "pkg.tgz", "pkg.deb", "pkg.tar.xz"])
def test_a_truncated_archive_is_an_error_or_complete(tmp_path: Path, name: str) -> None:
    archive = MAKERS[name](tmp_path / name, FILES)
    whole = archive.read_bytes()
    refused = 0
    for size in range(0, len(whole), max(1, len(whole) // 60)):
        archive.write_bytes(whole[:size])
        try:
            assert (
                dict(read_members(archive, ["*"])) == FILES
            )  # only checksums after the last byte are missing
        except InputError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("name", ["pkg.whl", "pkg.tgz", "pkg.deb", "pkg.tar.xz", "rcc.zip"])
def test_damage_gives_nothing_but_input_errors(tmp_path: Path, name: str) -> None:
    if name == "rcc.zip":
        archive = tmp_path / name
        whole = make_rcc({"a": b"1" * 30, "b": b"2" * 30}, compress=True)
    else:
        archive = MAKERS[name](tmp_path / name, FILES)
        whole = archive.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if name == "rcc.zip":
            make_zip(archive, {"x.rcc": bytes(data)})
        else:
            archive.write_bytes(bytes(data))
        try:
            for member, content in read_members(archive, ["*", "*.rcc:*"]):
                assert safe_name(member, archive=name) == member
                assert isinstance(content, bytes)
        except InputError:
            continue


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.rar", b"Rar!", "ends in .whl"),
        ("a.deb", b"no ar", "Debian package"),
        ("a.deb", b"!<arch>\n", "no member 'data.tar'"),
        ("a.tgz", gzip.compress(b"not a tar" * 100), "cannot be read"),
        ("a.whl", b"", "cannot be read"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError, match=f"'{name}' cannot be read.*{reason}|{reason}"):
        list(read_members(tmp_path / name, ["*"]))


def test_a_deb_compressed_with_zstd_says_so(tmp_path: Path) -> None:
    archive = make_deb(tmp_path / "z.deb", FILES, suffix=".zst")

    with pytest.raises(InputError, match=r"tarball '\*\.zst', a compression not read here"):
        list(read_members(archive, ["*"]))


def test_a_qt_resource_that_refers_to_itself_is_refused(tmp_path: Path) -> None:
    data = bytearray(make_rcc({"a": b"1"}))
    struct.pack_into(">II", data, 24 + 22 + 6, 1, 1)  # the folder's only child is the folder
    archive = make_zip(tmp_path / "p.zip", {"x.rcc": bytes(data)})

    with pytest.raises(InputError, match="refers to one entry twice"):
        list(read_members(archive, ["*.rcc:*"]))


def test_an_encrypted_zip_member_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "p.zip", {"a": b"1"})
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    archive.write_bytes(bytes(data))

    with pytest.raises(InputError, match="member 'a' is encrypted"):
        list(read_members(archive, ["*"]))


def test_a_zip_member_without_a_name_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "p.zip", {"@": b"1"})
    archive.write_bytes(archive.read_bytes().replace(b"@", b"\0"))

    with pytest.raises(InputError, match="a member named ''"):
        list(read_members(archive, ["*"]))
