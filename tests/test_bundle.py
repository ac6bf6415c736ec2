"""Reading and writing bundles: what is accepted, what is refused and how it is said."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_bundle import make_tiny_bundle

from edgeclip.bundle import (
    EMBEDDED,
    Bundle,
    BundleWriter,
    Manifest,
    PreprocessSpec,
    embedding_space,
    provenance_time,
    stored_name,
)
from edgeclip.errors import BundleError

DATA = Path(__file__).parent / "data"
posix_only = pytest.mark.skipif(os.name != "posix", reason="links and permissions as on POSIX")


# The least protobuf message there is: one field that onnx.proto calls ir_version.
ANOTHER_GRAPH = b"\x08\x09"


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a bundle by hand."""
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def minimal(writer: BundleWriter, content: bytes = b"\x08\x08") -> None:
    """Fill a writer with the least a bundle needs."""
    file = writer.add("onnx-fp32/image.onnx", content)
    image = {"name": "image", "dtype": "uint8", "shape": ["B", 8, 8, 3]}
    output = {"name": "image_embedding", "dtype": "float32", "shape": ["B", 4]}
    tower = {"model": file, "files": [file], "inputs": [image], "outputs": [output]}
    writer.manifest.update(
        model={
            "name": "least",
            "family": "test",
            "embed_dim": 4,
            "scale": 10,
            "licence": "Apache-2.0",
            "embedding_space": "0" * 64,
        },
        preprocess={"image_size_px": [8, 8]},
        variants={"onnx-fp32": {"format": "onnx", "precision": "fp32", "towers": {"image": tower}}},
        default_variants=["onnx-fp32"],
    )


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# --- reading
# ---------------------------------------------------------------------------------------------------------


def test_towers_come_with_checked_files_and_interface(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)

    tower = bundle.variant("onnx-int8").tower("image")

    assert tower.model.is_file()
    assert tower.files == (tower.model,)
    assert (tower.variant, tower.format, tower.precision) == ("onnx-int8", "onnx", "int8")
    assert [(entry.name, entry.dtype, entry.shape) for entry in tower.inputs] == [
        ("image", "uint8", ("B", 32, 32, 3))
    ]
    assert tower.requires.engine == ">=1.20"


def test_opening_reads_the_manifest_and_nothing_else(tiny_bundle: Path) -> None:
    for path in tiny_bundle.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.unlink()

    bundle = Bundle.open(tiny_bundle)

    assert bundle.manifest.model.name == "tiny-colours"
    with pytest.raises(BundleError, match=r"the file 'onnx-fp32/image\.\w{8}\.onnx' is missing"):
        bundle.variant("onnx-fp32").tower("image")


def test_digest_is_the_hash_of_the_manifest(tiny_bundle: Path) -> None:
    import hashlib

    expected = hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()
    assert Bundle.open(tiny_bundle).digest == expected


def test_equal_towers_have_equal_digests_in_different_bundles(tiny_bundle: Path, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "other", manifest={}) as writer:
        minimal(writer, Bundle.open(tiny_bundle).variant("onnx-fp32").tower("image").model.read_bytes())
        other = writer.commit()

    digests = [
        bundle.variant("onnx-fp32").tower("image").digest for bundle in (Bundle.open(tiny_bundle), other)
    ]

    assert digests[0] == digests[1]
    assert digests[0] != Bundle.open(tiny_bundle).variant("onnx-int8").tower("image").digest


@pytest.mark.parametrize("word", EMBEDDED)
def test_words_are_embedded_bundles(word: str) -> None:
    bundle = Bundle.open(word)
    bundle.check_files()
    assert bundle.manifest.model.name == f"edgeclip-{word}"


def test_a_directory_called_default_is_reached_by_path(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bundle.rename(tiny_bundle.parent / "default")
    monkeypatch.chdir(tiny_bundle.parent)
    assert Bundle.open(Path("default")).path == tiny_bundle.parent / "default"
    assert Bundle.open("./default").manifest.model.name == "tiny-colours"


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "directory"])
def test_a_damaged_file_is_named_with_both_hashes(tiny_bundle: Path, damage: str) -> None:
    name = Bundle.open(tiny_bundle).manifest.golden
    assert name is not None
    path = tiny_bundle / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "grow":
        path.write_bytes(content + b"x")
    else:
        path.unlink()
        path.mkdir()
    expected = {
        "flip": "is damaged: it has sha256 .*, the manifest says",
        "truncate": "is damaged: it has 5.* bytes, the manifest says",
        "grow": "is damaged: it has 5.* bytes, the manifest says",
        "directory": "cannot be read: it is not a regular file",
    }[damage]

    for read in (Bundle.open(tiny_bundle).file, Bundle.open(tiny_bundle).read):
        with pytest.raises(BundleError, match=expected):
            read(name)


def test_a_file_is_hashed_at_its_first_use_only(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    name = bundle.manifest.golden
    assert name is not None
    path = bundle.file(name)
    size_bytes = path.stat().st_size
    path.write_bytes(b"x" * size_bytes)

    assert bundle.file(name) == path  # not read again
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(tiny_bundle).file(name)


def test_many_threads_may_ask_for_the_same_files(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    expected = {name: (tiny_bundle / name).read_bytes() for name in bundle.manifest.files}
    wrong: list[str] = []
    start = threading.Barrier(8)

    def use() -> None:
        start.wait()
        for name, content in expected.items():
            if bundle.file(name) != tiny_bundle / name or bundle.read(name) != content:
                wrong.append(name)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["manifest.json", "../secret", "/etc/passwd", "onnx-fp32", "", "C:\\x"])
def test_what_the_manifest_does_not_list_is_not_read(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(BundleError, match="does not list the file"):
        Bundle.open(tiny_bundle).read(name)


@posix_only
def test_a_link_that_leaves_the_bundle_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    name = Bundle.open(tiny_bundle).manifest.golden
    assert name is not None
    outside = tmp_path / "outside"
    shutil.move(tiny_bundle / name, outside)
    (tiny_bundle / name).symlink_to(outside)

    with pytest.raises(
        BundleError, match=r"golden\.\w{8}\.safetensors' cannot be read: it is a link that leads out"
    ):
        Bundle.open(tiny_bundle).read(name)


@posix_only
def test_a_folder_that_is_a_link_out_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.move(tiny_bundle / "onnx-fp32", tmp_path / "outside")
    (tiny_bundle / "onnx-fp32").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="leads out"):
        Bundle.open(tiny_bundle).variant("onnx-fp32").tower("image")


@posix_only
def test_a_manifest_that_is_a_link_out_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.move(tiny_bundle / "manifest.json", tmp_path / "manifest.json")
    (tiny_bundle / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read: it is a link that leads out"):
        Bundle.open(tiny_bundle)


@posix_only
def test_links_inside_the_bundle_and_to_it_are_followed(tiny_bundle: Path, tmp_path: Path) -> None:
    name = Bundle.open(tiny_bundle).manifest.golden
    assert name is not None
    (tiny_bundle / name).rename(tiny_bundle / "elsewhere")
    (tiny_bundle / name).symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(tiny_bundle)
    assert Bundle.open(tmp_path / "link").file(name).is_file()


@posix_only
def test_a_named_pipe_does_not_hang_the_reader(tiny_bundle: Path) -> None:
    name = Bundle.open(tiny_bundle).manifest.golden
    assert name is not None
    (tiny_bundle / name).unlink()
    os.mkfifo(tiny_bundle / name)
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(tiny_bundle).read(name)


def test_unknown_variants_and_towers_are_listed_against(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(BundleError, match=r"no variant 'onnx-int4'; it has \['onnx-fp32', 'onnx-int8'\]"):
        bundle.variant("onnx-int4")
    with pytest.raises(BundleError, match=r"'onnx-int8' has no 'audio' tower, only \['image', 'text'\]"):
        bundle.variant("onnx-int8").tower("audio")


@pytest.mark.parametrize(
    "key",
    [
        "session.optimized_model_filepath",
        "session.model_external_initializers_file_folder_path",
        "session.collect_node_memory_stats_to_file",
        "ep.context_file_path",
        "CACHE_DIR",
        "x\n" * 100,
    ],
)
def test_a_bundle_may_not_set_what_makes_an_engine_touch_files(tiny_bundle: Path, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for name, setting in (("onnx-int8", "session.x64quantprecision"), ("onnx-fp32", key)):
            manifest["variants"][name]["session_config"] = {setting: "1"}

    edit(tiny_bundle, change)
    bundle = Bundle.open(tiny_bundle)
    assert bundle.variant("onnx-int8").tower("image").session_config == {"session.x64quantprecision": "1"}
    with pytest.raises(BundleError, match=r"asks for the engine setting .* a bundle may not set") as caught:
        bundle.variant("onnx-fp32").tower("image")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda path: None,
            r"does not exist, expected a directory with a manifest\.json, or 'default' or 'nano'\.",
        ),
        (lambda path: path.write_text("x"), "is a file, expected a directory"),
        (lambda path: path.mkdir(), r"has no manifest\.json, so it is not a bundle"),
    ],
)
def test_what_is_no_bundle_is_said_to_be_none(
    tmp_path: Path, make: Callable[[Path], object], expected: str
) -> None:
    make(tmp_path / "b")
    with pytest.raises(BundleError, match=expected):
        Bundle.open(tmp_path / "b")


def test_a_name_with_a_nul_is_an_ordinary_error() -> None:
    with pytest.raises(BundleError, match="bundle"):
        Bundle.open("a\0b")


# --- the manifest
# ----------------------------------------------------------------------------------------------------


def at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that sets one value; a key ``*`` stands for the first key there is."""

    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[next(iter(manifest)) if key == "*" else key]
        last = path[-1]
        manifest[next(iter(manifest)) if last == "*" else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (at("schema", value={"major": 2, "minor": 0}), "has schema 2.0, this edgeclip reads 1.x"),
        (at("schema", value=1), "field 'schema' cannot be used"),
        (lambda manifest: manifest.pop("schema"), "field 'schema' cannot be used"),
        (
            at("min_reader", value={"major": 1, "minor": 9}),
            "asks for a reader of schema 1.9, this edgeclip reads 1.0",
        ),
        (at("model", "embed_dim", value=0), r"Expected `int` >= 1 - at `\$.model.embed_dim`"),
        (at("model", "scale", value=100.5), r"Expected `float` <= 100.0 - at `\$.model.scale`"),
        (at("model", "scale", value=0), r"Expected `float` > 0.0 - at `\$.model.scale`"),
        (at("model", "scale", value="20"), r"Expected `float`, got `str` - at `\$.model.scale`"),
        (lambda manifest: manifest["model"].pop("licence"), "missing required field `licence`"),
        (
            at("preprocess", "image_size_px", value=[0, 32]),
            r"Expected `int` >= 1 - at `\$.preprocess.image_size_px",
        ),
        (at("preprocess", "image_size_px", value=[32, 4097]), "Expected `int` <= 4096"),
        (
            at("preprocess", "resize", value="stretch"),
            r"Invalid enum value 'stretch' - at `\$.preprocess.resize`",
        ),
        (at("preprocess", "std", value=[1, 0, 1]), r"field 'preprocess.std': got \[1.0, 0.0, 1.0\]"),
        (at("preprocess", "mean", value=[1e9, 0, 1]), "field 'preprocess.mean': got"),
        (at("variants", value={}), r"length >= 1 - at `\$.variants`"),
        (
            at("default_variants", value=["onnx-fp16"]),
            r"'default_variants': names the variant 'onnx-fp16'; the bundle has",
        ),
        (at("default_variants", value=["onnx-fp32"] * 2), "'default_variants': names a variant twice"),
        (
            at("variants", "onnx-int8", "towers", "image", "files", value=["x.bin"]),
            "not among the tower's files",
        ),
        (
            at("variants", "onnx-int8", "towers", "image", "files", value=["a.bin", "onnx-int8/image.onnx"]),
            "field 'variants.onnx-int8.towers.image.model'",
        ),
        (
            at("variants", "onnx-int8", "towers", "image", "inputs", value=[]),
            "variants 'onnx-int8': .*length >= 1",
        ),
        (
            at("golden", value="gold.bin"),
            "field 'golden': names the file 'gold.bin', which 'files' does not list",
        ),
        (at("golden", value="../gold.bin"), "does not match|Expected `str` matching"),
        (at("tokenizer", "words", value="w.bin"), "field 'tokenizer.words': names the file 'w.bin'"),
        (
            at("label_banks", "colours", "file", value="b.bin"),
            "field 'label_banks.colours.file': names the file 'b.bin'",
        ),
        (
            at("default_bank", value="animals"),
            r"'default_bank': names the label bank 'animals'; the bundle has \['colours'\]",
        ),
        (at("background_bank", value="animals"), "'background_bank': names the label bank 'animals'"),
        (
            at("heads", "temperature", "bank", value="animals"),
            "'heads.temperature.bank': names the label bank 'animals'",
        ),
        (
            at("heads", "temperature", "file", value="h.bin"),
            "'heads.temperature.file': names the file 'h.bin'",
        ),
        (at("heads", "temperature", "kind", value="mlp"), "heads 'temperature': Invalid enum value 'mlp'"),
        (at("model", "notices", value=["NOTICE"]), "field 'model.notices': names the file 'NOTICE'"),
        (
            at("files", "manifest.json", value={"sha256": "0" * 64, "size_bytes": 1}),
            "which cannot carry its own hash",
        ),
        (
            at("files", "A.bin", value={"sha256": "0" * 63, "size_bytes": 1}),
            "files 'A.bin': Expected `str` matching",
        ),
        (
            at("files", "A.bin", value={"sha256": "0" * 64, "size_bytes": -1}),
            "files 'A.bin': Expected `int` >= 0",
        ),
        (at("files", "x/nul.txt", value={"sha256": "0" * 64, "size_bytes": 1}), "not usable on every system"),
        (at("files", "x./y", value={"sha256": "0" * 64, "size_bytes": 1}), "not usable on every system"),
        (at("provenance", value=[]), r"Expected `object`, got `array` - at `\$.provenance`"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_field(
    tiny_bundle: Path, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    edit(tiny_bundle, change)
    with pytest.raises(BundleError, match=expected) as caught:
        Bundle.open(tiny_bundle)
    assert "\n" not in str(caught.value)
    assert str(tiny_bundle) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../a", "a/../b", "/a", "a\\b", "C:/a", "C:a", "a//b", "a/", "./a", "a/./b", "", "a\n", "a\0b",
        ".hidden", "a b", "a/.git/config", "~/a", "é", "a" * 241, "a:b", "a*", "con?",
    ],
)  # fmt: skip
def test_a_file_name_that_could_leave_or_confuse_is_refused(tiny_bundle: Path, name: str) -> None:
    edit(tiny_bundle, at("files", name, value={"sha256": "0" * 64, "size_bytes": 1}))
    with pytest.raises(BundleError, match="files "):
        Bundle.open(tiny_bundle)
    with pytest.raises(BundleError, match="cannot be used"), BundleWriter(tiny_bundle.parent / "w") as writer:
        writer.add(name, b"")


def test_names_that_differ_in_case_only_are_refused(tiny_bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"].update({name: {"sha256": "0" * 64, "size_bytes": 1} for name in ("Ab", "aB")})

    edit(tiny_bundle, change)
    with pytest.raises(BundleError, match="'Ab' and 'aB' differ only in upper and lower case"):
        Bundle.open(tiny_bundle)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[]", "holds a JSON list, expected an object"),
        ("null", "holds a JSON NoneType"),
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ('{"a": -Infinity}', "-Infinity is not a number in JSON"),
        ('{"a": 1e999}', "the number 1e999 is out of range"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' appears twice in one object"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' appears twice"),
        ('{"a": "\\ud800"}', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a":' * 100_000, "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b"\xef\xbb\xbf{}", "is not valid JSON"),
        (b" " * (8 * 2**20 + 1), "has more than 8388608 bytes"),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, (str, bytes)) else "",
)
def test_a_manifest_that_is_not_plain_json_is_refused(
    tiny_bundle: Path, text: str | bytes, expected: str
) -> None:
    (tiny_bundle / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(BundleError, match=expected) as caught:
        Bundle.open(tiny_bundle)
    assert "\n" not in str(caught.value)


def test_unknown_fields_survive_reading_and_writing(tiny_bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["schema"]["minor"] = 7
        manifest["weather"] = {"sunny": True}
        manifest["model"]["motto"] = "以小见大"
        manifest["variants"]["onnx-int8"]["towers"]["image"]["colour"] = "blue"

    edit(tiny_bundle, change)

    with BundleWriter(tiny_bundle) as writer:
        bundle = writer.commit()

    assert bundle.manifest.schema.minor == 7
    assert bundle.raw["weather"] == {"sunny": True}
    assert bundle.raw["model"]["motto"] == "以小见大"
    assert bundle.raw["variants"]["onnx-int8"]["towers"]["image"]["colour"] == "blue"
    assert "以小见大" in (tiny_bundle / "manifest.json").read_text("utf-8")


def test_a_bundle_of_schema_1_0_opens_forever() -> None:
    bundle = Bundle.open(DATA / "bundle-1.0")
    bundle.check_files()
    assert (bundle.manifest.schema.major, bundle.manifest.schema.minor) == (1, 0)
    assert bundle.digest == (DATA / "bundle-1.0.sha256").read_text("ascii").split()[0]
    assert bundle.variant("onnx-fp32").tower("text").model.is_file()


# --- writing
# ---------------------------------------------------------------------------------------------------------


def test_stored_names_carry_eight_digits_of_the_hash() -> None:
    sha256 = "0123456789abcdef" * 4
    assert stored_name("onnx-int8/image.onnx", sha256) == "onnx-int8/image.01234567.onnx"
    assert stored_name("tokenizer/merges.txt.gz", sha256) == "tokenizer/merges.01234567.txt.gz"
    assert stored_name("NOTICE", sha256) == "NOTICE.01234567"
    assert stored_name("a/image.1a2b3c4d.onnx", sha256) == "a/image.01234567.onnx"
    assert stored_name("a/merges.1a2b3c4d.txt.gz", sha256) == "a/merges.01234567.txt.gz"
    assert stored_name("onnx-int8@arm64/x.data", sha256) == "onnx-int8@arm64/x.01234567.data"
    both = stored_name("a/image.xml", sha256, "fedcba98" * 8)
    assert both == "a/image.01234567.fedcba98.xml"
    assert stored_name(both, sha256) == "a/image.01234567.xml"


def test_files_that_are_called_alike_are_stored_once_and_removed_when_nobody_names_them(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "image.bin").write_bytes(b"weights")
    hashes = [hashlib.sha256(content).hexdigest()[:8] for content in (b"graph", b"weights")]
    for _ in range(2):  # the second time they are there already
        with BundleWriter(tiny_bundle) as writer:
            stored = writer.add_alike({"ov/image.xml": b"graph", "ov/image.bin": tmp_path / "image.bin"})
            known = writer.manifest["variants"]["onnx-fp32"]
            files = {"model": stored["ov/image.xml"], "files": list(stored.values())}
            towers = {"image": {**known["towers"]["image"], **files}}
            writer.manifest["variants"]["ov"] = {**known, "towers": towers}
            writer.commit().check_files()
    stem = "ov/image." + ".".join(hashes)
    assert stored == {"ov/image.xml": f"{stem}.xml", "ov/image.bin": f"{stem}.bin"}
    assert len(list((tiny_bundle / "ov").iterdir())) == 2
    with BundleWriter(tiny_bundle) as writer:
        del writer.manifest["variants"]["ov"]
        writer.commit()
    with BundleWriter(tiny_bundle) as writer:  # the write after the one that dropped them
        writer.commit()
    assert not (tiny_bundle / "ov").exists()
    with (
        BundleWriter(tiny_bundle) as writer,
        pytest.raises(BundleError, match=r"'image\.bin' cannot be read"),
    ):
        writer.add_alike({"image.xml": b"", "image.bin": tmp_path / "missing"})


def test_same_inputs_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("a", "b"):
        with BundleWriter(tmp_path / name) as writer:
            minimal(writer)
            if name == "b":  # the order in which things are said does not matter
                writer.manifest = dict(reversed(writer.manifest.items()))
            writer.commit()
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert '"time": "2023-11-14T22:13:20Z"' in (tmp_path / "a" / "manifest.json").read_text("utf-8")
    assert (tmp_path / "a" / "manifest.json").read_bytes().endswith(b"}\n")


def test_the_tiny_bundle_is_reproducible(tiny_bundle: Path, tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tiny_bundle)


def test_a_time_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(BundleError, match="SOURCE_DATE_EPOCH is 'yesterday', expected a whole number"):
        provenance_time()


def test_adding_a_variant_keeps_the_rest(tiny_bundle: Path) -> None:
    before = Bundle.open(tiny_bundle)
    with BundleWriter(tiny_bundle) as writer:
        entry = json.loads(json.dumps(writer.manifest["variants"]["onnx-int8"]))
        file = writer.add("onnx-int8@arm64-dotprod/image.onnx", ANOTHER_GRAPH)
        entry["towers"]["image"].update(model=file, files=[file])
        entry["target"] = "arm64-dotprod"
        writer.manifest["variants"]["onnx-int8@arm64-dotprod"] = entry
        after = writer.commit()

    after.check_files()
    assert after.variant("onnx-int8@arm64-dotprod").tower("image").model.read_bytes() == ANOTHER_GRAPH
    assert before.manifest.files.items() <= after.manifest.files.items()


def test_files_nobody_names_go_at_the_next_write(tiny_bundle: Path) -> None:
    reader = Bundle.open(tiny_bundle)
    old = reader.manifest.golden
    assert old is not None
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["golden"] = writer.add("golden.safetensors", b"new")
        assert old not in writer.commit().manifest.files

    assert reader.read(old)  # the old manifest is still open here, so its files are still there
    with BundleWriter(tiny_bundle) as writer:
        writer.commit()
    assert not (tiny_bundle / old).exists()
    Bundle.open(tiny_bundle).check_files()


def test_only_our_own_leftovers_are_removed(tiny_bundle: Path) -> None:
    keep = {"README.md": b"hello", "notes.deadbeef.txt": b"mine", "onnx-fp32/other.onnx": b"also mine"}
    for name, content in keep.items():
        (tiny_bundle / name).write_bytes(content)
    (tiny_bundle / ".edgeclip-tmp-0123").write_bytes(b"half")
    (tiny_bundle / "old").mkdir()
    (tiny_bundle / "old" / ".edgeclip-tmp-4567").write_bytes(b"half")

    with BundleWriter(tiny_bundle) as writer:
        writer.commit()

    assert {name: (tiny_bundle / name).read_bytes() for name in keep} == keep
    assert not (tiny_bundle / ".edgeclip-tmp-0123").exists()
    assert not (tiny_bundle / "old").exists()
    assert not (tiny_bundle / ".edgeclip-lock").exists()


def test_leaving_without_commit_takes_everything_back(tiny_bundle: Path, tmp_path: Path) -> None:
    before = files_of(tiny_bundle)
    with BundleWriter(tiny_bundle) as writer:
        writer.add("more/things/x.bin", b"x")
        assert len(files_of(tiny_bundle)) == len(before) + 2  # the file and the lock
    assert files_of(tiny_bundle) == before
    assert not (tiny_bundle / "more").exists()
    with BundleWriter(tmp_path / "new") as writer:
        writer.add("x.bin", b"x")
    assert not (tmp_path / "new").exists()


def test_a_manifest_that_cannot_be_read_is_never_committed(tiny_bundle: Path) -> None:
    before = files_of(tiny_bundle)
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["model"]["scale"] = 1000
        with pytest.raises(BundleError, match=r"\$\.model\.scale"):
            writer.commit()
        writer.manifest["model"]["scale"] = {1, 2}
        with pytest.raises(BundleError, match="cannot be written as JSON"):
            writer.commit()
    assert files_of(tiny_bundle) == before


def test_a_manifest_that_names_what_was_not_added_is_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        minimal(writer)
        writer.manifest["golden"] = "golden.bin"
        writer.manifest["files"] = {"golden.bin": {"sha256": "0" * 64, "size_bytes": 3}}
        with pytest.raises(BundleError, match=r"names 'golden\.bin', which was not added"):
            writer.commit()


def test_an_older_file_that_vanished_is_noticed_before_the_commit(tiny_bundle: Path) -> None:
    name = Bundle.open(tiny_bundle).manifest.golden
    assert name is not None
    (tiny_bundle / name).unlink()
    with BundleWriter(tiny_bundle) as writer, pytest.raises(BundleError, match="is missing: add it again"):
        writer.commit()


def test_a_copy_has_the_bytes_and_the_digest_of_the_original(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = tiny_bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"  ", b" "))  # not as we would write it
    original = Bundle.open(tiny_bundle)
    with BundleWriter(tmp_path / "copy") as writer:
        for name in original.manifest.files:
            assert writer.add(name, original.file(name), exact=True) == name
        copy = writer.commit_copy(manifest.read_bytes())
    assert copy.digest == original.digest
    assert files_of(tmp_path / "copy") == files_of(tiny_bundle)


def test_a_copy_must_hold_what_its_manifest_lists(tiny_bundle: Path, tmp_path: Path) -> None:
    original = Bundle.open(tiny_bundle)
    golden = original.manifest.golden or ""
    with BundleWriter(tmp_path / "copy") as writer:
        for name in original.manifest.files:
            writer.add(name, b"other" if name == golden else original.file(name), exact=True)
        with pytest.raises(BundleError, match=r"the file 'golden.* was added with 5 bytes and sha256"):
            writer.commit_copy((tiny_bundle / "manifest.json").read_bytes())
    assert not (tmp_path / "copy").exists()


def test_an_ended_writer_says_so(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        minimal(writer)
        writer.commit()
        with pytest.raises(BundleError, match="this writer has ended"):
            writer.add("x.bin", b"")
        with pytest.raises(BundleError, match="this writer has ended"):
            writer.commit()


def test_a_second_writer_is_told_to_wait(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        minimal(writer)
        with pytest.raises(BundleError, match="another process is writing it: wait"):
            BundleWriter(tmp_path / "b")
        code = "import sys; from edgeclip.bundle import BundleWriter; BundleWriter(sys.argv[1])"
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, text=True, check=False
        )
        assert "BundleError" in other.stderr
        assert "another process is writing it" in other.stderr
        writer.commit()
    BundleWriter(tmp_path / "b").close()


def test_a_file_is_copied_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"s" * 1_000_003)
    with BundleWriter(tmp_path / "b") as writer:
        minimal(writer)
        writer.manifest["golden"] = writer.add("golden.safetensors", tmp_path / "source")
        bundle = writer.commit()
    assert bundle.read(bundle.manifest.golden or "") == b"s" * 1_000_003
    with (
        BundleWriter(tmp_path / "b") as writer,
        pytest.raises(BundleError, match=r"'x\.bin' cannot be written: no such"),
    ):
        writer.add("x.bin", tmp_path / "missing")


def test_an_untouched_but_damaged_file_is_repaired_by_adding_it_again(tiny_bundle: Path) -> None:
    name = Bundle.open(tiny_bundle).manifest.golden
    assert name is not None
    content = (tiny_bundle / name).read_bytes()
    (tiny_bundle / name).write_bytes(b"damaged")
    with BundleWriter(tiny_bundle) as writer:
        assert writer.add("golden.safetensors", content) == name
        writer.commit().check_files()


def test_a_manifest_can_be_given_typed(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with BundleWriter(tiny_bundle, manifest=bundle.manifest) as writer:
        again = writer.commit()
    assert again.manifest == bundle.manifest


def test_a_bundle_of_an_unknown_major_is_not_overwritten(tiny_bundle: Path) -> None:
    edit(tiny_bundle, at("schema", value={"major": 2, "minor": 0}))
    before = files_of(tiny_bundle)
    with pytest.raises(BundleError, match=r"has schema 2\.0"):
        BundleWriter(tiny_bundle, manifest={})
    assert files_of(tiny_bundle) == before


def test_a_full_disk_leaves_no_folder_behind(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edgeclip.bundle.write_temporary", full)
    for path in (tiny_bundle, tmp_path / "new"):
        before = sorted(tiny_bundle.rglob("*"))
        with (
            BundleWriter(path) as writer,
            pytest.raises(BundleError, match=r"'a/b/c.bin' cannot be written: no space left on device"),
        ):
            writer.add("a/b/c.bin", b"content")
        assert sorted(tiny_bundle.rglob("*")) == before
    assert not (tmp_path / "new").exists()


@posix_only
def test_a_folder_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    with BundleWriter(tmp_path / "b") as writer:
        (tmp_path / "b" / "onnx-fp32").symlink_to(tmp_path / "outside")
        with pytest.raises(BundleError, match="its folder is a link"):
            writer.add("onnx-fp32/image.onnx", b"x")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("parent", ["file", "nothing-may-be-made-here"])
def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, parent: str) -> None:
    place = tmp_path / "file" / "b"
    if parent == "file":
        (tmp_path / "file").write_text("x")
    elif Path("/proc").is_dir():
        place = Path("/proc/b")
    else:
        pytest.skip("no /proc here")
    with pytest.raises(BundleError, match="cannot be written"):
        BundleWriter(place)


AS_NOBODY = """
import os, sys
from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BundleError
if os.geteuid() == 0:
    os.setuid(65534)
Bundle.open(sys.argv[1]).check_files()
try:
    with BundleWriter(sys.argv[1]) as writer:
        writer.add("x.bin", b"x")
except BundleError as error:
    print(error)
"""

WITH_LITTLE_SPACE = """
import os, resource, signal, sys
from edgeclip.bundle import BundleWriter
from edgeclip.errors import BundleError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[2])
try:
    with BundleWriter(sys.argv[1]) as writer:
        writer.manifest["golden"] = writer.add("golden.safetensors", b"0123456789")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if limit < 100:
            writer.add("big.bin", bytes(1000))
        writer.commit()
except BundleError as error:
    print(error)
"""


def _in_a_process(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@posix_only
def test_a_read_only_directory_is_read_and_refuses_a_writer(tiny_bundle: Path) -> None:
    place = Path(tempfile.mkdtemp())  # not below tmp_path, which only its owner may enter
    try:
        place.chmod(0o755)
        bundle = Path(shutil.copytree(tiny_bundle, place / "bundle"))
        for path in (bundle, *bundle.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = files_of(bundle)
        assert "cannot be written: permission denied" in _in_a_process(AS_NOBODY, str(bundle))
        assert files_of(bundle) == before
    finally:
        for path in place.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(place)


@posix_only
@pytest.mark.parametrize("limit", [50, 500])  # the limit is met by a file, and by the manifest
def test_a_full_disk_is_an_error_and_the_old_bundle_is_intact(tiny_bundle: Path, limit: int) -> None:
    before = files_of(tiny_bundle)
    said = _in_a_process(WITH_LITTLE_SPACE, str(tiny_bundle), str(limit))
    assert os.strerror(errno.EFBIG).lower() in said
    assert files_of(tiny_bundle) == before
    Bundle.open(tiny_bundle).check_files()


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    if os.name != "posix":
        pytest.skip("POSIX permissions")
    old = os.umask(0o022)
    try:
        with BundleWriter(tmp_path / "b") as writer:
            minimal(writer)
            writer.commit()
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "b").rglob("*") if path.is_file()} == {0o644}


# --- small things
# ----------------------------------------------------------------------------------------------------


def test_the_embedding_space_depends_on_model_and_preprocessing_only() -> None:
    spec = PreprocessSpec(image_size_px=(32, 32))
    space = embedding_space("a" * 64, spec)
    assert space == embedding_space("a" * 64, msgspec.structs.replace(spec, applied="host"))
    assert space != embedding_space("b" * 64, spec)
    assert space != embedding_space("a" * 64, msgspec.structs.replace(spec, interpolation="bicubic"))


def test_the_typed_view_is_frozen(tiny_bundle: Path) -> None:
    manifest: Manifest = Bundle.open(tiny_bundle).manifest
    with pytest.raises(AttributeError):
        manifest.golden = None  # type: ignore[misc]
