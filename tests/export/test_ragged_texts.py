"""Texts without padding: what a tower gives of a cut row is what it gives of the whole one."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from exported import export_probe, write_pictures  # noqa: E402

from edgeclip.bundle import Bundle  # noqa: E402
from edgeclip.export.build import BuildOptions, BuildRequest, Int8Settings, builder_of  # noqa: E402
from edgeclip.export.options import ExportSettings, GraphOptions, References  # noqa: E402
from edgeclip.export.passes import apply  # noqa: E402
from edgeclip.export.passes.sequences import shared  # noqa: E402
from edgeclip.export.text_length import fixed_length, graphs_for  # noqa: E402
from edgeclip.export.to_onnx import tensor_entries  # noqa: E402
from edgeclip.export.trace import trace_text_tower  # noqa: E402
from edgeclip.export.variants import VariantSpec  # noqa: E402
from edgeclip.models.clip import build_text_tower  # noqa: E402
from edgeclip.models.zoo import TINY  # noqa: E402
from edgeclip.runtime import RuntimeOptions, open_session  # noqa: E402
from edgeclip.runtime.parity import Golden, check_tower, golden_check  # noqa: E402
from edgeclip.runtime.rows import has_free_length, run_rows, run_texts  # noqa: E402
from edgeclip.runtime.session import OpenSession  # noqa: E402
from edgeclip.text_encoder import TextEncoder, open_tokenizer  # noqa: E402

FREE = ("tiny-vit", "tiny-vit-quick", "tiny-vit-mci", "tiny-vit-pruned", "tiny-transformer", "tiny-bag")
FIXED = ("tiny-fastvit", "tiny-fastvit-five", "tiny-mct")
# Sums over fewer terms, padding's exact zeros left out: measured 1.2e-7.
TOLERANCE = 1e-5
FORMATS = ["onnx", *(["openvino"] if importlib.util.find_spec("openvino") else [])]
ONE = RuntimeOptions(threads=1)


@lru_cache
def graph(name: str, opset: int = 20, batch: int | None = None) -> onnx.ModelProto:
    """Return the text graph of a tiny model with random weights, as an export has it."""
    torch.manual_seed(0)
    config = TINY[name].text
    traced = trace_text_tower(
        build_text_tower(config).eval(),
        config.context_length,
        GraphOptions(opset=opset, static_batch=batch),
        free_length=config.free_length,
    )
    return apply(traced, shared(), what=name)


def random_rows(name: str, lengths: list[int]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Return rows of random texts of these lengths, with the end token where CLIP has it."""
    config = TINY[name].text
    end = config.vocab_size - 1 if config.pad_id != config.vocab_size - 1 else config.vocab_size - 2
    draw = np.random.default_rng(sum(lengths))
    rows = np.full((len(lengths), config.context_length), config.pad_id, np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = draw.integers(1, end, length)
        row[length - 1] = end
    return rows, np.array(lengths, np.intp)


def opened(name: str, variant: str, work: Path, settings: Int8Settings | None = None) -> OpenSession:
    """Make the text tower of a variant and open it on its engine."""
    rows = random_rows(name, [2 + row % 11 for row in range(32)])[0]
    request = BuildRequest(
        VariantSpec.parse(variant),
        {"text": graph(name)},
        work,
        calibration={"text": rows},
        options=BuildOptions(quantization=settings or Int8Settings()),
    )
    tower = builder_of(variant.partition("-")[0])(request).towers["text"]
    for file, content in tower.files.items():
        if isinstance(content, bytes):
            (work / file).write_bytes(content)
    return open_session(work / tower.model, options=ONE)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FREE)
def test_a_cut_row_gives_what_the_whole_row_gives(name: str, form: str, tmp_path: Path) -> None:
    rows, lengths = random_rows(name, [2, 3, 12, 5, 4, 7, 11])
    with opened(name, f"{form}-fp32", tmp_path) as session:
        assert has_free_length(session)
        whole = run_rows(session, rows)
        assert np.ptp(whole, axis=0).max() > 100 * TOLERANCE  # texts differ
        for row, length in enumerate(lengths):
            cut = run_rows(session, rows[row : row + 1, :length])
            assert np.abs(cut - whole[row]).max() < TOLERANCE, (row, length)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("text", ["weights", "full"])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-transformer", "tiny-bag"])
def test_so_it_is_in_int8(name: str, text: Any, form: str, tmp_path: Path) -> None:
    rows, lengths = random_rows(name, [2, 3, 12, 5, 4, 7])
    with opened(name, f"{form}-int8", tmp_path, Int8Settings(text=text)) as session:
        whole, cut = run_rows(session, rows), run_texts(session, rows, lengths)
    with opened(name, "onnx-fp32", tmp_path) as session:
        single = run_rows(session, rows)
    # Ranges are fixed, so that only a value at the edge of a level can fall to another one.
    assert (whole * cut).sum(axis=1).min() > 0.999
    assert (cut * single).sum(axis=1).mean() > 0.98


def test_so_it_is_in_float16(tmp_path: Path) -> None:
    rows, lengths = random_rows("tiny-vit", [2, 3, 12, 5])
    with opened("tiny-vit", "onnx-fp16", tmp_path) as session:
        assert np.abs(run_rows(session, rows) - run_texts(session, rows, lengths)).max() < 5e-3


@pytest.mark.parametrize("opset", [17, 24])
def test_the_first_and_the_last_opset_take_cut_rows(opset: int, tmp_path: Path) -> None:
    rows, lengths = random_rows("tiny-vit", [2, 12, 5])
    (tmp_path / "text.onnx").write_bytes(graph("tiny-vit", opset).SerializeToString())
    with open_session(tmp_path / "text.onnx", options=ONE) as session:
        assert np.abs(run_rows(session, rows) - run_texts(session, rows, lengths)).max() < TOLERANCE


def test_rows_of_random_lengths_come_back_in_their_order(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    with opened("tiny-vit", "onnx-fp32", tmp_path) as session:
        for count in (1, 2, 15, 16, 17, 50):
            rows, lengths = random_rows("tiny-vit", [*draw.integers(2, 13, count - 1).tolist(), 12])
            found = run_texts(session, rows, lengths)
            assert np.abs(found - run_rows(session, rows)).max() < TOLERANCE, count


@pytest.mark.parametrize("name", FIXED)
def test_towers_that_attend_to_padding_keep_one_length(name: str, tmp_path: Path) -> None:
    assert not TINY[name].text.free_length
    (entry,), _ = tensor_entries(graph(name))
    assert entry.shape == ("batch", 12)
    rows, lengths = random_rows(name, [2, 3, 12])
    with opened(name, "onnx-fp32", tmp_path) as session:
        assert not has_free_length(session)
        assert np.array_equal(run_texts(session, rows, lengths), run_rows(session, rows))


def test_every_tower_of_the_zoo_is_one_or_the_other() -> None:
    assert {*FREE, *FIXED} == set(TINY)
    assert [name for name in TINY if TINY[name].text.free_length] == list(FREE)


def test_a_static_batch_has_a_static_length() -> None:
    (entry,), _ = tensor_entries(graph("tiny-vit", batch=1))
    assert entry.shape == (1, 12)


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        ("onnx-fp32", ("batch", "length")),
        ("onnx-int8@x86-avx2", ("batch", "length")),
        ("openvino-fp16", ("batch", "length")),
        ("openvino-fp16@intel-gpu", ("batch", 12)),
        ("tensorrt-fp16", ("batch", 12)),
    ],
)
def test_engines_built_for_one_shape_get_one_length(variant: str, shape: tuple[Any, ...]) -> None:
    given = {"text": graph("tiny-vit")}
    made = graphs_for(VariantSpec.parse(variant), given, 12)["text"]
    (entry,), _ = tensor_entries(made)
    assert entry.shape == shape
    onnx.checker.check_model(made, full_check=True)
    assert tensor_entries(given["text"])[0][0].shape == ("batch", "length")


def test_a_graph_of_one_length_computes_the_same(tmp_path: Path) -> None:
    rows, _ = random_rows("tiny-vit", [2, 12, 5])
    (tmp_path / "text.onnx").write_bytes(fixed_length(graph("tiny-vit"), 12).SerializeToString())
    with opened("tiny-vit", "onnx-fp32", tmp_path / "..") as free:
        wanted = run_rows(free, rows)
    with open_session(tmp_path / "text.onnx", options=ONE) as session:
        assert np.abs(run_rows(session, rows) - wanted).max() < TOLERANCE


# --- whole bundles -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a probe with causal attention, exported for every engine that is here."""
    out = tmp_path_factory.mktemp("ragged")
    variants = [f"{form}-{precision}" for form in FORMATS for precision in ("fp32", "int8")]
    pictures = write_pictures(out / "pictures", 24)
    return export_probe("tinyclip", out / "bundle", pictures, *variants).bundle


TEXTS = ["", "a big red circle", "star", "a photo of " + "small blue square " * 40, "a green star", "a"]


def test_texts_of_all_lengths_are_those_of_the_float_model(bundle: Bundle) -> None:
    tokenizer = open_tokenizer(bundle)
    tokens = tokenizer(TEXTS, truncate=True)
    lengths = tokenizer.config.lengths(tokens)
    assert lengths[3] == tokens.shape[1]
    assert lengths.min() == lengths[0] == 2
    with open_session(bundle.variant("onnx-fp32").tower("text"), options=ONE) as session:
        wanted = run_rows(session, tokens)
    for name in bundle.manifest.variants:
        said = bundle.manifest.variants[name].towers["text"].inputs[0].shape
        assert said == ("batch", "length")
        encoder = TextEncoder(bundle, bundle.variant(name), options=ONE)
        found, cut = encoder.encode(TEXTS)
        encoder.close()
        assert cut.tolist() == [False, False, False, True, False, False]
        if name.endswith("fp32"):
            assert np.abs(found - wanted).max() < TOLERANCE
        else:
            assert (found * wanted).sum(axis=1).min() > 0.99


def test_the_golden_check_runs_rows_with_and_without_padding(bundle: Bundle) -> None:
    variant, golden = bundle.variant("onnx-fp32"), Golden.of(bundle)
    assert golden_check(bundle, variant, options=ONE).passed
    tokens = open_tokenizer(bundle)(TEXTS, truncate=True)  # everyday names fill the rows of a probe
    with open_session(variant.tower("text"), options=ONE) as session:
        golden = replace(golden, tokens=tokens, text_embedding=run_rows(session, tokens))
        assert check_tower(bundle, golden, variant, "text", session).passed
        for wrong in ("short", "whole"):
            spoilt = _Spoilt(session, wrong, tokens.shape[1])
            assert not check_tower(bundle, golden, variant, "text", spoilt).passed, wrong
            assert min(spoilt.lengths) < max(spoilt.lengths) == tokens.shape[1]


class _Spoilt:
    """A text tower that errs on rows that are cut, or on those that are not."""

    def __init__(self, session: OpenSession, wrong: str, context_length: int) -> None:
        self.inputs, self.outputs, self.chosen = session.inputs, session.outputs, session.chosen
        self.lengths: list[int] = []
        self._session, self._wrong, self._whole = session, wrong, context_length

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        length = feeds["tokens"].shape[1]
        self.lengths.append(length)
        is_wrong = (length == self._whole) == (self._wrong == "whole")
        return {name: rows[:, ::-1] if is_wrong else rows for name, rows in self._session.run(feeds).items()}

    def close(self) -> None:
        """Nothing of its own."""


def test_a_bundle_for_one_batch_still_takes_whole_rows(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 24)
    settings = ExportSettings(
        graph=GraphOptions(static_batch=1), references=References(pictures=pictures), threads=1
    )
    made = export_probe("tinyclip", tmp_path / "bundle", pictures, settings=settings).bundle
    encoder = TextEncoder(made, made.variant("onnx-fp32"), options=ONE)
    found, _ = encoder.encode(TEXTS[:3])
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)


def test_the_embedded_bundle_of_fixed_length_still_works() -> None:
    made = Bundle.open("default")
    encoder = TextEncoder(made, made.variant(made.manifest.default_variants[0]), options=ONE)
    found, _ = encoder.encode(["a dog", "a cat on a mat"])
    assert found.shape == (2, made.manifest.model.embed_dim)
