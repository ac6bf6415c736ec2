from __future__ import annotations

import hashlib
import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.data import read_samples
from edgeclip.errors import ConfigError, InputError
from edgeclip.label_sets import read_labels
from edgeclip.shape_files import encode_png, write_shapes
from edgeclip.shapes import (
    COLOURS,
    COUNTS,
    LANGUAGES,
    MAX_CAPTIONS,
    POSITIONS,
    SHAPES,
    TEXTURES,
    Combination,
    _Random,
    captions,
    combinations,
    held_out_combinations,
    label,
    ordered_combinations,
    render,
    training_combinations,
)
from edgeclip.storage import DirectoryLock

ONE = Combination("red", "circle", 1, "left", "solid")
# Of the version of the set: another value here needs another VERSION there.
PICTURES_SHA256 = "10dd78cc5c09da333f566d1109d51c342505abd17c840f9064df2d79b1f4d5a6"
CAPTIONS_SHA256 = "b80820a48997b13cf46d3dc85ad4311e466ca0b55532f2aa31fdb4f939030425"
DIGEST = "32175926288a36a91799b798f0aa6d20657e98c60deff77138ec7aebb16a5e3f"


def test_every_combination_is_in_exactly_one_split() -> None:
    assert len(combinations()) == len(COLOURS) * len(SHAPES) * len(COUNTS) * len(POSITIONS) * len(TEXTURES)
    assert len(combinations()) == 8000
    held_out, training = set(held_out_combinations()), set(training_combinations())
    assert not held_out & training
    assert held_out | training == set(combinations())
    assert len(held_out) == 796


def test_training_has_every_pair_of_values_and_nearly_every_triple() -> None:
    for chosen, least in ((1, 1.0), (2, 1.0), (3, 0.999)):
        for names in itertools.combinations(("colour", "shape", "count", "position", "texture"), chosen):
            seen, every = (
                {tuple(getattr(each, name) for name in names) for each in split}
                for split in (training_combinations(), combinations())
            )
            assert len(seen) >= least * len(every), names


def test_held_out_combinations_have_every_value() -> None:
    for name, values in (("colour", COLOURS), ("shape", SHAPES), ("count", COUNTS)):
        counted = Counter(getattr(each, name) for each in held_out_combinations())
        assert set(counted) == set(values)
        assert min(counted.values()) > 0.5 * len(held_out_combinations()) / len(values)


@pytest.mark.parametrize(
    ("field", "value"), [("colour", "mauve"), ("shape", "blob"), ("count", 5), ("texture", "furry")]
)
def test_an_unknown_value_is_an_error_that_lists_the_known(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value!r}, expected one of .*,"):
        Combination(**{**ONE.__dict__, field: value})


# --- pictures ----------------------------------------------------------------------------------------------


def test_pictures_are_the_same_on_every_machine_and_version() -> None:
    digest = hashlib.sha256()
    for index, combination in enumerate(combinations()[::80]):
        digest.update(render(combination, index).tobytes())
    digest.update(render(ONE, 1, size_px=150).tobytes())
    assert digest.hexdigest() == PICTURES_SHA256


def test_pictures_of_one_combination_differ() -> None:
    pictures = [render(ONE, seed) for seed in range(20)]
    assert all((a != b).mean() > 0.5 for a, b in itertools.combinations(pictures, 2))


def test_one_seed_gives_one_scene_at_every_size() -> None:
    for seed in range(5):
        small, large = render(ONE, seed, size_px=64), render(ONE, seed, size_px=256)
        shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert abs(small - shrunk).mean() < 6  # noise is of up to 8 levels


def test_a_picture_is_an_array_of_its_own() -> None:
    picture = render(ONE, 0, size_px=48)
    assert picture.shape == (48, 48, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.writeable
    assert picture.flags.owndata


@pytest.mark.parametrize("size_px", [0, 31, 1025])
def test_a_size_out_of_range_is_an_error(size_px: int) -> None:
    with pytest.raises(ConfigError, match=f"size_px is {size_px}, expected 32 to 1024"):
        render(ONE, 0, size_px=size_px)


def _ink(combination: Combination, seed: int, size_px: int = 128) -> np.ndarray:
    """Return where a picture is closer to the colour of its objects than to its background."""
    from edgeclip.shapes import _COLOURS

    picture = render(combination, seed, size_px=size_px).astype(float)
    background = np.median(picture, axis=(0, 1))
    colour = np.array(_COLOURS[combination.colour].rgb, float)
    return np.linalg.norm(picture - colour, axis=2) < np.linalg.norm(picture - background, axis=2)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_objects_stand_where_they_should_and_are_as_many(colour: str, shape: str) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    random = _Random("test", colour, shape)
    for _ in range(3):
        combination = Combination(colour, shape, random.pick(COUNTS), random.pick(POSITIONS), "solid")
        ink = _ink(combination, random.below(1000))
        components, _ = ndimage.label(ndimage.binary_opening(ink))
        sizes = np.bincount(components.ravel())[1:]
        assert (sizes > 40).sum() == combination.count, combination
        y, x = (axis.mean() / 128 - 0.5 for axis in np.nonzero(ink))
        side = {"left": -x, "right": x, "top": -y, "bottom": y, "centre": 0.25 - max(abs(x), abs(y))}
        assert side[combination.position] > 0.1, (combination, x, y)
        # Objects are not cut off by the edge.
        edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert not edge.any(), combination


@pytest.mark.parametrize("shape", SHAPES)
def test_textures_cover_less_and_less(shape: str) -> None:
    shares = {
        texture: np.mean(
            [_ink(Combination("blue", shape, 1, "centre", texture), seed).mean() for seed in range(8)]
        )
        for texture in TEXTURES
    }
    assert shares["solid"] > 1.15 * shares["striped"]
    assert shares["striped"] > shares["dotted"]
    assert shares["dotted"] > 1.15 * shares["hollow"]


def test_random_bytes_are_the_same_from_python_and_numpy() -> None:
    one, other = _Random("x"), _Random("x")
    expected = b"".join(one.next().to_bytes(8, "little") for _ in range(3))
    assert bytes(other.bytes(20).astype(np.uint8)) == expected[:20]
    assert one.next() == other.next()


def test_splitmix64_gives_the_published_stream() -> None:
    random = _Random()
    random.state = 1234567  # the example of the reference implementation
    assert [random.next() for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


# --- captions ----------------------------------------------------------------------------------------------


def test_captions_are_the_same_on_every_machine_and_version() -> None:
    digest = hashlib.sha256()
    for index, combination in enumerate(combinations()[::80]):
        for language in LANGUAGES:
            digest.update("\n".join(captions(combination, language, index, count=MAX_CAPTIONS)).encode())
    assert digest.hexdigest() == CAPTIONS_SHA256


@pytest.mark.parametrize("language", LANGUAGES)
def test_labels_and_captions_tell_combinations_apart(language: str) -> None:
    assert len({label(each, language) for each in combinations()}) == len(combinations())
    said: dict[str, Combination] = {}
    for combination in combinations()[::7]:
        for seed in range(3):
            for caption in captions(combination, language, seed, count=MAX_CAPTIONS):
                assert said.setdefault(caption, combination) == combination, caption


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_vary_in_words_and_order(language: str) -> None:
    every = [captions(ONE, language, seed)[0] for seed in range(200)]
    assert len(set(every)) > 30
    assert captions(ONE, language, 7) == captions(ONE, language, 7)
    several = captions(ONE, language, 7, count=MAX_CAPTIONS)
    assert len(set(several)) == MAX_CAPTIONS
    assert several[0] == captions(ONE, language, 7)[0]


def test_what_captions_say() -> None:
    stars = Combination("orange", "star", 2, "left", "striped")
    assert label(stars, "en") == "two striped orange stars on the left"
    assert label(stars, "zh") == "左边有两颗橙色条纹星星"
    assert label(ONE, "zh") == "左边有一个红色实心圆形"
    for seed in range(100):
        for caption in captions(stars, "en", seed, count=MAX_CAPTIONS):
            assert "two" in caption
            assert "orange" in caption
            assert "stars" in caption
            assert "left" in caption
            assert "strip" in caption
        for caption in captions(stars, "zh", seed, count=MAX_CAPTIONS):
            assert "两颗" in caption or "两个五角星" in caption or "两个" in caption
            assert "二" not in caption
    singles = {
        caption
        for seed in range(50)
        for shape in ("arrow", "circle")
        for caption in captions(Combination("orange", shape, 1, "top", "solid"), "en", seed, count=7)
    }
    assert any("an orange" in caption for caption in singles)
    assert not any(f" a {vowel}" in f" {caption}" for caption in singles for vowel in "aeiou")


@pytest.mark.parametrize(
    ("word", "measures"), [("星星", "颗"), ("爱心", "颗"), ("五角星", "个"), ("月牙", "个弯"), ("箭头", "个")]
)
def test_chinese_nouns_have_their_measure_words(word: str, measures: str) -> None:
    found = 0
    for combination in combinations()[::11]:
        for caption in captions(combination, "zh", 1, count=MAX_CAPTIONS):
            if word in caption:
                found += 1
                assert any(f"{n}{measure}" in caption for n in "一两三四" for measure in measures), caption
    assert found > 20


@pytest.mark.parametrize("count", [0, MAX_CAPTIONS + 1])
def test_too_many_captions_is_an_error(count: int) -> None:
    with pytest.raises(ConfigError, match=f"count of captions is {count}, expected 1 to {MAX_CAPTIONS}"):
        captions(ONE, "en", 0, count=count)


def test_an_unknown_language_is_an_error() -> None:
    with pytest.raises(ConfigError, match="language is 'fr', expected one of en, zh"):
        label(ONE, "fr")


# --- files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes") / "set"
    report = write_shapes(directory, train=20, held_out=10, size_px=32, seed=3)
    assert report.status == "written"
    assert report.digest == DIGEST
    return directory


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_set_can_be_read_by_the_readers(written: Path) -> None:
    labels = read_labels(written / "labels.json")
    assert len(labels) == 796
    assert labels.in_language("zh").names[0] == label(held_out_combinations()[0], "zh")
    for split, count in (("train", 20), ("held_out", 10)):
        samples = list(read_samples([written / f"{split}.jsonl"]))
        rows = [json.loads(line) for line in (written / f"{split}.jsonl").read_text("utf-8").splitlines()]
        assert len(samples) == len(rows) == count
        for sample, row in zip(samples, rows, strict=True):
            combination = Combination(
                *(row[name] for name in ("colour", "shape", "count", "position", "texture"))
            )
            assert combination.held_out == (split == "held_out")
            assert sample.label == label(combination, "en")
            assert (sample.label in labels.names) == combination.held_out
            assert sample.caption == row["caption"]
            assert row["label_zh"] == label(combination, "zh")
            assert isinstance(sample.source, Path)
            assert np.asarray(Image.open(sample.source)).shape == (32, 32, 3)


def test_a_set_says_what_it_is(written: Path) -> None:
    said = json.loads((written / "dataset.json").read_text("utf-8"))
    assert said["kind"] == "shapes"
    assert said["licence"] == "CC0-1.0"
    assert said["train"] == {"pictures": 20, "combinations": 7204}
    assert said["held_out"] == {"pictures": 10, "combinations": 796}
    hashes = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in _contents(written).items()
        if name != "dataset.json"
    }
    listed = "".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes))
    assert said["digest"] == hashlib.sha256(listed.encode()).hexdigest()


def test_workers_do_not_change_a_byte(written: Path, tmp_path: Path) -> None:
    # In a process of its own, as the command does it: a worker imports the parent's __main__.
    code = (
        "import sys; from edgeclip.shape_files import write_shapes\n"
        "if __name__ == '__main__':\n"
        "    write_shapes(sys.argv[1], train=20, held_out=10, size_px=32, seed=3, workers=2)\n"
    )
    script = tmp_path / "make.py"
    script.write_text(code)
    subprocess.run([sys.executable, str(script), str(tmp_path / "set")], check=True)
    assert _contents(tmp_path / "set") == _contents(written)


def test_each_combination_comes_once_before_any_comes_again() -> None:
    order = ordered_combinations(True, 5)
    first = list(itertools.islice(order, 796))
    second = list(itertools.islice(order, 796))
    assert set(first) == set(second) == set(held_out_combinations())
    assert first != second


def test_the_same_set_is_not_written_again(written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    report = write_shapes(written, train=20, held_out=10, size_px=32, seed=3)
    assert report.status == "present"
    assert report.digest == DIGEST
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_other_settings_are_refused(written: Path) -> None:
    with pytest.raises(
        InputError, match=r"set' holds generated pictures made with other settings \(seed, train\)"
    ):
        write_shapes(written, train=21, held_out=10, size_px=32, seed=4)


def test_a_foreign_directory_or_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(
            InputError, match=f"{taken.name}' is there already and holds no generated pictures"
        ):
            write_shapes(taken, train=1, held_out=1, size_px=32)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert write_shapes(tmp_path / "set", train=1, held_out=1, size_px=32).status == "written"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["train", "held_out", "workers"])
def test_a_number_out_of_range_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0, expected 1 to 1000000"):
        write_shapes(tmp_path / "set", **{name: 0})


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "set", train=70, held_out=1, size_px=32, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_a_running_one_is_not(tmp_path: Path) -> None:
    abandoned, running = tmp_path / ".edgeclip-tmp-set-0", tmp_path / ".edgeclip-tmp-set-1"
    for folder in (abandoned, running):
        (folder / "images").mkdir(parents=True)
    lock = DirectoryLock(running)
    write_shapes(tmp_path / "set", train=1, held_out=1, size_px=32)
    lock.release()
    assert {path.name for path in tmp_path.iterdir()} == {"set", running.name}


@pytest.mark.skipif(sys.platform == "win32", reason="permissions work differently")
def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"set' cannot be written \((Not a directory|File exists)"):
        write_shapes(tmp_path / "file" / "set", train=1, held_out=1, size_px=32)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (160, 150)])
def test_png_files_hold_the_pixels(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    content = encode_png(pixels)
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), pixels)
