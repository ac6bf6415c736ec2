"""Choosing calibration rows: by what is in pictures alone, near copies aside, within bounds of memory."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file
from scipy.spatial.distance import cdist

from edgeclip.bundle import PreprocessSpec
from edgeclip.calibration.dataset import (
    CROPS,
    WHOLE,
    CalibrationSet,
    Pool,
    SamplePool,
    Selection,
    View,
    choose_texts,
    cover,
    read_pool,
)
from edgeclip.data import Sample
from edgeclip.errors import CalibrationError, ConfigError, InputError
from edgeclip.export.reference import _VIEWS
from edgeclip.preprocess import Preprocess

SPEC = PreprocessSpec(image_size_px=(32, 32))
RANDOM = Selection("random", samples=16)


def drawn(number: int) -> NDArray[np.uint8]:
    """Return a picture of 5 x 4 coloured fields, another one for each number."""
    fields = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return fields.repeat(12, axis=0).repeat(12, axis=1)


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder_of(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(drawn(number)))
    return folder


def colours(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embed pictures as their mean colours."""
    return (rows.mean(axis=(1, 2)) - 128).astype(np.float32)


def chosen(path: Path, selection: Selection) -> NDArray[np.uint8]:
    return read_pool(SamplePool.of(path), SPEC, selection).choose(selection, colours)


# --- where pictures are does not matter


@pytest.mark.parametrize("method", ["random", "coverage"])
def test_rows_depend_on_pictures_and_not_on_names_or_order(method: str, tmp_path: Path) -> None:
    selection = Selection(method, samples=20)  # type: ignore[arg-type]
    names = [f"{number:03}.png" for number in range(90)]
    expected = chosen(folder_of(tmp_path / "a", names), selection)
    assert len(expected) == 20
    elsewhere = folder_of(tmp_path / "b" / "c", [f"{97 * number % 90:03}/x.png" for number in range(90)])
    np.testing.assert_array_equal(chosen(elsewhere, selection), expected)
    table = tmp_path / "table.csv"
    table.write_text("path\n" + "".join(f"a/{name}\n" for name in reversed(names)), "utf-8")
    np.testing.assert_array_equal(chosen(table, selection), expected)
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as file:
        for number in reversed(range(90)):
            content = png(drawn(number))
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    np.testing.assert_array_equal(chosen(shard, selection), expected)


def test_another_seed_takes_others_and_one_more_picture_changes_little(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", [f"{number:03}.png" for number in range(90)])
    first = {row.tobytes() for row in chosen(folder, RANDOM)}
    other = {row.tobytes() for row in chosen(folder, Selection("random", samples=16, seed=1))}
    assert len(first & other) < 12
    (folder / "more.png").write_bytes(png(drawn(1000)))
    assert len(first & {row.tobytes() for row in chosen(folder, RANDOM)}) >= 15


def test_rows_are_what_preprocessing_makes_of_the_pictures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", [f"{number:03}.png" for number in range(90)])
    spec = PreprocessSpec(image_size_px=(24, 40), resize="squash", interpolation="bicubic", crop="none")
    made = read_pool(SamplePool.of(folder), spec, RANDOM).choose(RANDOM)
    every = {Preprocess(spec)(path).tobytes() for path in folder.iterdir()}
    assert made.shape == (16, 24, 40, 3)
    assert {row.tobytes() for row in made} <= every


# --- pools


def test_few_pictures_are_all_seen_before_any_is_seen_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", [f"{number}.png" for number in range(10)])
    made = read_pool(SamplePool.of(folder), SPEC, RANDOM, most=20)
    assert (len(made.pixels), made.pictures) == (20, 10)
    prepare = Preprocess(SPEC)
    images = [prepare.decode(path) for path in folder.iterdir()]
    views = [prepare.resize(view.of(image)).tobytes() for image in images for view in (WHOLE, CROPS[0])]
    assert sorted(row.tobytes() for row in made.pixels) == sorted(views)


def test_calibration_never_sees_the_crops_that_judge() -> None:
    assert not set(CROPS) & set(_VIEWS)
    image = Image.fromarray(drawn(0))
    np.testing.assert_array_equal(
        np.asarray(View(0.2, 0.5, 0.5, mirrored=True).of(image)), drawn(0)[24:48, 12:42][:, ::-1]
    )
    np.testing.assert_array_equal(np.asarray(WHOLE.of(image)), drawn(0))


def test_near_copies_are_set_aside_and_fill_up_only_to_sixteen(tmp_path: Path) -> None:
    names = [f"{number:03}.png" for number in range(70)]
    folder = folder_of(tmp_path / "a", names)
    for number in range(20):  # what another JPEG encoder or a still camera gives
        noise = np.random.default_rng(number).integers(-3, 4, (48, 60, 3))
        copy = np.clip(drawn(number).astype(int) + noise, 0, 255).astype(np.uint8)
        (folder / f"copy-{number}.png").write_bytes(png(copy))
    made = read_pool(SamplePool.of(folder), SPEC, Selection("random", samples=200))
    assert (len(made.pixels), made.copies, made.pictures) == (70, 20, 90)
    still = [drawn(0) for _ in range(100)]
    only = Pool.of(np.stack([row[:32, :32] for row in still]), RANDOM, "still")
    assert (len(only.pixels), only.copies) == (16, 99)


def test_no_more_pictures_are_decoded_and_held_than_were_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "a", [f"{number:03}.png" for number in range(300)])
    decoded: list[object] = []
    decode = Preprocess.decode
    monkeypatch.setattr(
        Preprocess, "decode", lambda self, source: decoded.append(source) or decode(self, source)
    )  # type: ignore[func-returns-value]
    assert len(read_pool(SamplePool.of(folder), SPEC, RANDOM).pixels) == 20
    assert len(decoded) == 20
    assert len(read_pool(SamplePool.of(folder), SPEC, Selection("coverage", samples=16)).pixels) == 64
    monkeypatch.setattr("edgeclip.calibration.dataset._POOL_BYTES", 30 * 32 * 32 * 3)
    assert len(read_pool(SamplePool.of(folder), SPEC, Selection("coverage", samples=16)).pixels) == 30


def test_progress_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", [f"{number:03}.png" for number in range(70)])
    selection = Selection("coverage", samples=16)
    told: list[tuple[int, int]] = []
    pool = read_pool(
        SamplePool.of(folder), SPEC, selection, workers=4, on_progress=lambda *at: told.append(at)
    )
    assert told == [(done, 64) for done in range(8, 65, 8)]
    told.clear()
    pool.choose(selection, colours, on_progress=lambda *at: told.append(at))
    assert told == [(64, 64)]


# --- choices


def test_coverage_takes_what_brings_all_rows_nearest() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 6))
    distances = cdist(rows, rows, "cosine")
    expected: list[int] = []
    for _ in range(30):
        left = [distances[[*expected, row]].min(axis=0).sum() for row in range(200)]
        expected.append(int(np.argmin(left)))
    assert cover(rows, 30) == expected
    # Scaling and noise in the last bits of float32 change nothing.
    noise = 1 + 1e-7 * np.random.default_rng(1).normal(size=rows.shape)
    assert cover((7 * rows * noise).astype(np.float32), 30) == expected


def test_coverage_takes_the_first_of_equal_rows_and_never_one_twice() -> None:
    rows = np.eye(4)[[0, 1, 1, 2, 3, 3]]
    assert cover(rows, 4) == [1, 4, 0, 3]
    assert sorted(cover(rows, 6)) == [0, 1, 2, 3, 4, 5]


def test_coverage_finds_the_rare_kind() -> None:
    rows = np.full((400, 32, 32, 3), 30, np.uint8)
    rows[:, ::2] = np.random.default_rng(0).integers(0, 60, (400, 16, 32, 3))
    rows[397:] += np.array([0, 150, 0], np.uint8)
    selection = Selection("coverage", samples=16)
    pool = Pool.of(rows, selection, "camera")
    taken = pool.choose(selection, colours)
    assert any(row[..., 1].mean() > 150 for row in taken[:2])


def test_equal_shares_are_filled_up_by_the_larger_kinds(tmp_path: Path) -> None:
    names = [
        f"{kind}/{number}.png" for kind, count in (("a", 60), ("b", 20), ("c", 2)) for number in range(count)
    ]
    folder = folder_of(tmp_path / "kinds", names)
    selection = Selection("stratified", samples=16)
    pool = read_pool(SamplePool.of(folder), SPEC, selection)
    kinds = {Preprocess(SPEC)(folder / name).tobytes(): name[0] for name in names}
    taken = [kinds[row.tobytes()] for row in pool.choose(selection)]
    assert [taken.count(kind) for kind in "abc"] == [7, 7, 2]


def test_kinds_are_superclasses_before_labels(tmp_path: Path) -> None:
    folder_of(tmp_path, [f"{number}.png" for number in range(80)])
    table = tmp_path / "table.jsonl"
    rows = [
        {"path": f"{number}.png", "label": str(number), "superclass": "animal" if number < 6 else "thing"}
        for number in range(80)
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    selection = Selection("stratified", samples=16)
    pool = read_pool(SamplePool.of(table), SPEC, selection)
    assert sorted(pool.strata, key=str).count("animal") == 6
    animals = {Preprocess(SPEC)(tmp_path / f"{number}.png").tobytes() for number in range(6)}
    assert sum(row.tobytes() in animals for row in pool.choose(selection)) == 6


def test_texts_are_drawn_in_equal_shares() -> None:
    groups = [[f"a {number}" for number in range(1000)] * 2, ["b 0", "b 1"], (f"c {n}" for n in range(5000))]
    taken = choose_texts(groups, Selection("random"), 20)
    assert len(taken) == len(set(taken)) == 20
    assert [sum(text.startswith(kind) for text in taken) for kind in "abc"] == [9, 2, 9]
    assert choose_texts([["x", "y"], ["y", "z"]], Selection(), 9) == choose_texts(
        [["y", "x"], ["z", "y"]], Selection(), 9
    )


def test_captions_are_drawn_without_holding_all(tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        return (Sample(str(n), tmp_path, columns={"caption": f"caption {n % 7000}"}) for n in range(20_000))

    taken = SamplePool(samples, "many").captions(Selection(), 50)
    ranked = sorted((f"caption {n}" for n in range(7000)), key=lambda text: Selection().rank(text.encode()))
    assert taken == ranked[:50]


# --- sets in files


@pytest.fixture
def made() -> CalibrationSet:
    rows = {
        "image": np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3),
        "text": np.arange(6, dtype=np.int32).reshape(2, 3),
    }
    return CalibrationSet(
        rows, {"image": "häuser", "text": "captions"}, {"method": "random", "seed": 3}, "tok"
    )


def test_a_set_is_read_back_and_others_can_read_it(made: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    made.write(path)
    read = CalibrationSet.read(path)
    assert read.digest == made.digest
    assert (read.sources, read.selection, read.tokenizer) == (made.sources, made.selection, "tok")
    for name, rows in load_file(path).items():
        np.testing.assert_array_equal(rows, made.rows[name])
    again = tmp_path / "again.safetensors"
    read.write(again)
    assert again.read_bytes() == path.read_bytes()


def test_the_digest_tells_shape_dtype_and_tower_apart(made: CalibrationSet) -> None:
    image = made.rows["image"]
    others = [{"image": image.reshape(2, 4, 12, 1)}, {"image": image.view(np.int8)}, {"text": image}]
    digests = {CalibrationSet(rows, {}).digest for rows in ({"image": image}, *others)}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:-1] + b"\xff", "digest .*damaged or was changed"),
        (
            lambda content: content.replace(b'"calibration"', b'"labels     "'),
            "is 'labels     ' of schema '1'",
        ),
        (
            lambda content: content.replace(b'"text":{"dtype":"I32"', b'"tExt":{"dtype":"I32"'),
            "holds 'tExt' as int32",
        ),
        (lambda content: content.replace(b'"sources":"{', b'"sources":"['), "description cannot be read"),
        (lambda content: content[:40], "cannot be read as safetensors"),
    ],
)
def test_a_changed_set_is_refused(
    made: CalibrationSet, tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "set.safetensors"
    made.write(path)
    spoilt = spoil(path.read_bytes())
    assert spoilt != path.read_bytes()
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match=message):
        CalibrationSet.read(path)


def test_float_input_is_what_the_host_normalizes() -> None:
    spec = PreprocessSpec(image_size_px=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    rows = CalibrationSet({"image": np.full((1, 32, 32, 3), 255, np.uint8)}, {"image": "white"})
    floats = rows.feeds(spec, float_input=True)["image"]
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats[0, :, 0, 0], [2.5, 2.4, 1.4], rtol=1e-6)
    assert rows.feeds(spec, float_input=False)["image"] is rows.rows["image"]


# --- what is refused


def test_choices_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="selection: got 'best', expected one of coverage, stratified, random"
    ):
        Selection("best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="samples: got 15, expected at least 16"):
        Selection(samples=15)
    with pytest.raises(ConfigError, match="seed: got -1, expected 0 or more"):
        Selection(seed=-1)


def test_pictures_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "one", ["a.png"])
    with pytest.raises(InputError, match="'one': holds 1 pictures, expected at least 2"):
        chosen(folder, RANDOM)
    shutil.copy(folder / "a.png", folder / "b.png")
    (folder / "c.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"c\.png"):
        chosen(folder, RANDOM)
    (folder / "c.png").unlink()
    (folder / "c.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"calibration picture '.*c\.png': cannot be read"):
        chosen(folder, RANDOM)


def test_equal_shares_need_labels(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "mixed", ["a/0.png", *(f"{number}.png" for number in range(80))])
    with pytest.raises(InputError, match=r"'mixed': 19 of 20 rows are of pictures without a label"):
        chosen(folder, Selection("stratified", samples=16))


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda rows: np.full((len(rows), 3), np.nan), r"\(64, 3\), not finite"),
        (lambda rows: np.ones((1, 3)), r"\(1, 3\), finite; expected \(64, E\)"),
        (None, "coverage needs embeddings"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(
    embed: Callable[..., NDArray[np.float64]] | None, message: str
) -> None:
    selection = Selection("coverage", samples=16)
    rows = np.stack([drawn(number)[:32, :32] for number in range(100)])
    with pytest.raises(CalibrationError, match=message):
        Pool.of(rows, selection, "drawn").choose(selection, embed)
