"""docs/manifest.schema.json and the reader agree on what a manifest is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from edgeclip.errors import BundleError
from edgeclip.manifest import Manifest, manifest_schema, parse_manifest

REPO = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((REPO / "docs" / "manifest.schema.json").read_text("utf-8"))
    return read


@pytest.fixture
def manifest() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((DATA / "bundle-1.0" / "manifest.json").read_text("utf-8"))
    return read


def is_valid(schema: dict[str, Any], manifest: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(manifest)


def is_read(manifest: Any) -> bool:
    try:
        parse_manifest(json.dumps(manifest).encode(), "bundle")
    except BundleError:
        return False
    return True


@pytest.mark.skipif(msgspec.__version__ < "0.19", reason="older ones spell the same schema differently")
def test_the_schema_in_the_docs_is_the_one_of_the_types(schema: dict[str, Any]) -> None:
    # After a change of edgeclip/manifest.py: python tests/tools/write_manifest_schema.py
    assert schema == manifest_schema()


def test_it_is_a_schema_and_names_every_field(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(schema["$defs"]["Manifest"]["properties"]) == list(Manifest.__struct_fields__)


def test_every_field_is_explained_in_the_docs() -> None:
    text = (REPO / "docs" / "bundle-format.md").read_text("utf-8")
    definitions = manifest_schema()["$defs"]
    names = {name for definition in definitions.values() for name in definition.get("properties", {})}
    assert {name for name in names if f"`{name}`" not in text} == {
        "major",
        "minor",
    }  # said as `{major, minor}`


def test_real_bundles_are_valid(schema: dict[str, Any], tiny_bundle: Path) -> None:
    paths = [DATA / "bundle-1.0", tiny_bundle, REPO / "edgeclip" / "assets" / "default"]
    for path in paths:
        if (path / "manifest.json").is_file():
            jsonschema.validate(json.loads((path / "manifest.json").read_text("utf-8")), schema)


def test_a_stranger_classifies_with_what_the_docs_say() -> None:
    """The half page of docs/bundle-format.md, step by step, with nothing of edgeclip."""
    import hashlib

    import numpy as np
    import onnxruntime
    import safetensors.numpy

    directory = DATA / "bundle-1.0"
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    assert manifest["schema"]["major"] == 1

    def read(name: str) -> bytes:
        data = (directory / name).read_bytes()
        listed = manifest["files"][name]
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (listed["sha256"], listed["size_bytes"])
        return data

    variant = manifest["variants"][manifest["default_variants"][0]]
    assert variant["format"] == "onnx"
    assert variant["parity"]["image"]["status"] == "passed"
    tower = onnxruntime.InferenceSession(read(variant["towers"]["image"]["model"]))
    side_px = manifest["preprocess"]["image_size_px"]
    pictures = np.stack(
        [np.full((*side_px, 3), colour, np.uint8) for colour in ((220, 30, 30), (30, 40, 220))]
    )
    embeddings = tower.run(["image_embedding"], {"image": pictures})[0]
    data = read(manifest["label_banks"][manifest["default_bank"]]["file"])
    bank = safetensors.numpy.load(data)["embeddings"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    labels = json.loads(header["__metadata__"]["labels"])
    assert [labels[row] for row in (embeddings @ bank.T).argmax(axis=1)] == ["red", "blue"]


def change(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return apply


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "no schema": lambda manifest: manifest.pop("schema"),
    "another major": change("schema", "major", value=2),
    "no model": lambda manifest: manifest.pop("model"),
    "no licence": lambda manifest: manifest["model"].pop("licence"),
    "no files": lambda manifest: manifest.pop("files"),
    "no dimension": change("model", "embed_dim", value=0),
    "half a dimension": change("model", "embed_dim", value=1.5),
    "scale too large": change("model", "scale", value=101),
    "scale zero": change("model", "scale", value=0),
    "scale as text": change("model", "scale", value="20"),
    "three sides": change("preprocess", "image_size_px", value=[32, 32, 3]),
    "a huge side": change("preprocess", "image_size_px", value=[32, 5000]),
    "unknown resize": change("preprocess", "resize", value="stretch"),
    "no variants": change("variants", value={}),
    "variants as list": change("variants", value=[]),
    "a tower without files": change("variants", "onnx-int8", "towers", "image", "files", value=[]),
    "a tower without outputs": change("variants", "onnx-int8", "towers", "image", "outputs", value=[]),
    "a negative dimension": change(
        "variants", "onnx-int8", "towers", "image", "inputs",
        value=[{"name": "image", "dtype": "uint8", "shape": [-1, 32, 32, 3]}],
    ),
    "an odd variant name": change("variants", "../x", value={}),
    "unknown parity": change("variants", "onnx-int8", "parity", "image", "status", value="maybe"),
    "a climbing name": change("golden", value="../x"),
    "an absolute name": change("golden", value="/x"),
    "a name with a backslash": change("golden", value="a\\b"),
    "a short hash": change("files", "a.bin", value={"sha256": "00", "size_bytes": 1}),
    "an upper-case hash": change("files", "a.bin", value={"sha256": "A" * 64, "size_bytes": 1}),
    "a negative size": change("files", "a.bin", value={"sha256": "0" * 64, "size_bytes": -1}),
    "no labels": change("label_banks", "colours", "labels", value=0),
    "an unknown head": change("heads", "temperature", "kind", value="mlp"),
    "provenance as text": change("provenance", value="here"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_schema_and_reader_refuse_the_same(
    schema: dict[str, Any], manifest: dict[str, Any], name: str
) -> None:
    WRONG[name](manifest)
    assert not is_valid(schema, manifest)
    assert not is_read(manifest)


@pytest.mark.parametrize(
    "apply",
    [
        change("weather", value={"sunny": True}),
        change("schema", "minor", value=9),
        change("model", "motto", value="small"),
        change("golden", value=None),
        change("variants", "onnx-int8", "format", value="a-later-format"),
        change("variants", "onnx-int8", "accuracy", value={"imagenet": {"top1": 0.7}}),
        change("model", "parents", value=["a", {"name": "b", "licence": "MIT"}]),
    ],
)
def test_schema_and_reader_accept_the_same(
    schema: dict[str, Any], manifest: dict[str, Any], apply: Callable[[dict[str, Any]], None]
) -> None:
    apply(manifest)
    assert is_valid(schema, manifest)
    assert is_read(manifest)


def test_what_the_schema_refuses_the_reader_refuses(schema: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Each value in turn becomes another type: the reader may know more than the schema, never less."""
    validator = jsonschema.Draft202012Validator(schema)
    differ = []
    for path in _leaves(manifest):
        for value in (None, True, -1, 1.5, "x", [], {}):
            changed = copy.deepcopy(manifest)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
            if is_read(changed) and not validator.is_valid(changed):
                differ.append((path, value))
    assert differ == []


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    return [path]
