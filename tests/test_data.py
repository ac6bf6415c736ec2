"""Finding pictures: which ones, in which order, and what happens where they cannot be listed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from PIL import Image

from edgeclip.data import PICTURE_SUFFIXES, Sample, captions_of, read_path_list, read_samples
from edgeclip.errors import InputError

SHIPPED = Path(__file__).parent.parent / "edgeclip/assets/photos"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def keys(*paths: Path, root: Path) -> list[str]:
    return [Path(sample.key).relative_to(root).as_posix() for sample in read_samples(paths)]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


def make_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# Folders


def test_a_folder_gives_its_pictures_sorted_part_by_part(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.png", "a/z.jpg", "a/b/c.JPG", "a-b.jpg", "Z.webp", "10.gif", "9.tif", "a.txt", "notes.md"
    )

    expected = ["10.gif", "9.tif", "Z.webp", "a/b/c.JPG", "a/z.jpg", "a-b.jpg", "b.png"]
    assert keys(tmp_path, root=tmp_path) == expected
    assert expected == sorted(expected, key=lambda name: Path(name).parts)


def test_every_picture_suffix_counts_in_either_case(tmp_path: Path) -> None:
    names = [f"x{suffix}" for suffix in PICTURE_SUFFIXES] + [
        f"y{suffix.upper()}" for suffix in PICTURE_SUFFIXES
    ]
    touch(tmp_path, *names, "x.pdf", "x.svg", "x.mp4", "jpg", "x.jpg.part")

    assert sorted(keys(tmp_path, root=tmp_path)) == sorted(names)


def test_suffixes_are_those_pillow_knows() -> None:
    Image.init()
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert readable | {".mpo", ".avif"} >= PICTURE_SUFFIXES


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, ".a.jpg", "._b.jpg", ".cache/c.jpg", "d/.e/f.jpg", "d/g.jpg")

    assert keys(tmp_path, root=tmp_path) == ["d/g.jpg"]


def test_a_hidden_folder_named_by_the_user_is_read(tmp_path: Path) -> None:
    touch(tmp_path, ".mine/a.jpg")

    assert keys(tmp_path / ".mine", root=tmp_path) == [".mine/a.jpg"]


def test_a_folder_whose_name_looks_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "album.jpg/a.png")

    assert keys(tmp_path, root=tmp_path) == ["album.jpg/a.png"]


def test_loops_of_links_end_and_no_folder_is_read_twice(tmp_path: Path) -> None:
    touch(tmp_path, "a/b/pic.jpg", "c/other.jpg")
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(".")
    (tmp_path / "zz").symlink_to(tmp_path / "c")
    (tmp_path / "again.png").symlink_to("again.png")

    # A link to itself is a picture that cannot be opened: whoever opens it says so.
    assert keys(tmp_path, root=tmp_path) == ["a/b/pic.jpg", "again.png", "c/other.jpg"]


def test_links_to_pictures_are_followed_and_broken_ones_reported_later(tmp_path: Path) -> None:
    touch(tmp_path, "real/one.jpg")
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "good.jpg").symlink_to(tmp_path / "real/one.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")

    assert keys(folder, root=folder) == ["gone.jpg", "good.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_are_not_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")

    assert keys(tmp_path, root=tmp_path) == []


def test_names_that_are_no_text_survive(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        touch(tmp_path, name)
    except OSError:
        pytest.skip("this file system wants UTF-8")

    (sample,) = read_samples([tmp_path])
    assert sample.source == tmp_path / name


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_an_error_or_told(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg", "z.jpg")
    (tmp_path / "locked").chmod(0)
    told: list[tuple[Path, str]] = []
    try:
        with pytest.raises(InputError, match=r"locked' cannot be listed \(Permission denied\)"):
            list(read_samples([tmp_path]))
        found = [
            Path(sample.key).name for sample in read_samples([tmp_path], skipped=lambda *e: told.append(e))
        ]
    finally:
        (tmp_path / "locked").chmod(0o700)

    assert found == ["a.jpg", "z.jpg"]
    assert told == [(tmp_path / "locked", "Permission denied")]


def test_a_folder_that_vanishes_is_an_error_or_told(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b/c.jpg", "z.jpg")
    told: list[Path] = []

    def names(**options: object) -> list[str]:
        found = []
        for sample in read_samples([tmp_path], **options):
            found.append(Path(sample.key).name)
            if found == ["a.jpg"]:
                (tmp_path / "b/c.jpg").unlink()
                (tmp_path / "b").rmdir()
        return found

    assert names(skipped=lambda path, _: told.append(path)) == ["a.jpg", "z.jpg"]
    assert told == [tmp_path / "b"]
    touch(tmp_path, "b/c.jpg")
    with pytest.raises(InputError, match=r"b' cannot be listed"):
        names()


def test_folder_labels_are_the_first_folder_below_the_root(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/young/2.jpg", "dog/3.jpg", "4.jpg")

    samples = list(read_samples([tmp_path], folder_labels=True))

    assert [sample.label for sample in samples] == [None, "cat", "cat", "dog"]
    assert {sample.label for sample in read_samples([tmp_path])} == {None}


# Paths


def test_files_are_taken_as_given_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a.jpg", "no_suffix", "folder/c.png")
    paths = [tmp_path / name for name in ("b.jpg", "no_suffix", "folder", "a.jpg", "b.jpg")]

    samples = list(read_samples(paths))

    assert samples[0] == Sample(key=(tmp_path / "b.jpg").as_posix(), source=tmp_path / "b.jpg")
    assert [Path(sample.key).name for sample in samples] == ["b.jpg", "no_suffix", "c.png", "a.jpg", "b.jpg"]


def test_a_missing_path_is_named_before_anything_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")

    with pytest.raises(InputError, match=r"nowhere\.jpg': no such file or folder"):
        read_samples([tmp_path / "a.jpg", tmp_path / "nowhere.jpg"])


@pytest.mark.parametrize("name", ["nul\0byte.jpg", "x" * 5000])
def test_a_path_no_system_takes_is_missing(name: str) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        read_samples([name])


def test_missing_paths_can_be_left_to_the_decoder() -> None:
    (sample,) = read_samples(["nowhere.jpg"], missing="yield")
    assert sample == Sample(key="nowhere.jpg", source=Path("nowhere.jpg"))


# Lists of paths


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"a.jpg\nb c.jpg\n", ["a.jpg", "b c.jpg"]),
        (b"a.jpg\r\nb.jpg", ["a.jpg", "b.jpg"]),
        (b"\n\na.jpg\n\n", ["a.jpg"]),
        (b"a.jpg\0with\nline feed.jpg\0", ["a.jpg", "with\nline feed.jpg"]),
        (b"only.jpg\0", ["only.jpg"]),
        ("猫.jpg\nß.png".encode(), ["猫.jpg", "ß.png"]),
        (b"", []),
    ],
)
def test_lists_of_paths(tmp_path: Path, content: bytes, names: list[str]) -> None:
    (tmp_path / "list").write_bytes(content)

    assert list(read_path_list(tmp_path / "list")) == [Path(name) for name in names]
    assert list(read_path_list(io.BytesIO(content))) == [Path(name) for name in names]


def test_a_list_longer_than_a_block_is_cut_at_its_ends(tmp_path: Path) -> None:
    names = [f"folder/picture {number:06}.jpg" for number in range(20_000)]
    (tmp_path / "list").write_text("\n".join(names))

    assert list(read_path_list(tmp_path / "list")) == [Path(name) for name in names]


def test_paths_from_a_pipe_come_as_they_are_written() -> None:
    reader, writer = os.pipe()
    got = []
    release = threading.Event()

    def write() -> None:
        os.write(writer, b"first.jpg\nsec")
        release.wait(5)
        os.write(writer, b"ond.jpg\n")
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader, "rb") as stream:
        for path in read_path_list(stream):
            got.append(path.name)
            release.set()  # the writer goes on only after the first path arrived
    thread.join()

    assert got == ["first.jpg", "second.jpg"]


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"list of paths '.*nowhere' cannot be read \(No such file"):
        list(read_path_list(tmp_path / "nowhere"))


# Tables


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'filename,caption,label\na/1.jpg,"a cat, asleep",cat\n2.png,,\n'),
        ("t.CSV", '\ufeffimage,text,class\r\na/1.jpg,"a cat, asleep",cat\r\n2.png,,\r\n'),
        ("t.tsv", "label\tfilepath\ttitle\ncat\ta/1.jpg\ta cat, asleep\n\t2.png\t\n"),
        (
            "t.jsonl",
            '{"image": "a/1.jpg", "caption": "a cat, asleep", "label": "cat"}\n\n{"path": "2.png"}\n',
        ),
        (
            "t.ndjson",
            '{"img": "a/1.jpg", "text": "a cat, asleep", "cls": "cat", "x": [1]}\n{"file": "2.png"}',
        ),
    ],
)
def test_tables_give_paths_captions_and_labels(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())

    assert list(read_samples([tmp_path / name])) == [
        Sample("a/1.jpg", tmp_path / "a/1.jpg", "a cat, asleep", "cat"),
        Sample("2.png", tmp_path / "2.png", None, None),
    ]


def test_absolute_paths_in_a_table_stay(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"path\n{SHIPPED / 'cat.jpg'}\n")

    (sample,) = read_samples([table])
    assert sample.source == SHIPPED / "cat.jpg"


def test_the_picture_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,thumb\nbig.jpg,small.jpg\n")

    (sample,) = read_samples([tmp_path / "t.csv"], image_column="thumb")
    assert sample.key == "small.jpg"


def test_a_number_is_a_label_and_a_list_is_not(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"path": "a.jpg", "label": 7}\n{"path": "b.jpg", "label": [1], "caption": true}'
    )

    assert [(sample.label, sample.caption) for sample in read_samples([tmp_path / "t.jsonl"])] == [
        ("7", None),
        (None, None),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b"name,caption\na.jpg,x\n",
            r"line 2: has no picture among 'name', 'caption'; expected a path under",
        ),
        ("t.csv", b"path,caption\n,x\n", "line 2: has no picture"),
        ("t.jsonl", b'{"path": "a.jpg"}\n{"url": "b"}', "line 2: has no picture among 'url'"),
        ("t.jsonl", b'{"path": "a.jpg"}\n{"path": ', "line 2: is not JSON"),
        ("t.jsonl", b'["a.jpg"]', r"line 1: expected a JSON object, got \['a.jpg'\]"),
        ("t.jsonl", b"[" * 100_000, "line 1: is not JSON"),
        ("t.jsonl", b"\xff\xfe", "cannot be read"),
        ("t.csv", b"path\n\xff\n", "cannot be read"),
        ("t.csv", b'path\n"' + b"x" * 200_000 + b'"\n', "cannot be read .*field larger"),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError, match=rf"table '.*{name}'.*{message}"):
        list(read_samples([tmp_path / name]))


def test_a_line_without_end_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.data._MAX_LINE", 40)
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"path": "x" * 15 + ".jpg"}) + "\n" + '{"path": "' + "x" * 10_000, "utf-8")
    found = read_samples([table])
    assert next(found).key == "x" * 15 + ".jpg"
    with pytest.raises(InputError, match="line 2: is too long, expected a JSON object of at most 40 char"):
        next(found)


# Shards


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".tar.gz", ".tar.xz", ".TAR"])
def test_shards_give_pictures_with_captions_and_labels(tmp_path: Path, suffix: str) -> None:
    picture = png()
    mode = {".tar": "w", ".TAR": "w", ".tar.xz": "w:xz"}.get(suffix, "w:gz")
    members = {
        "a/000.png": picture,
        "a/000.txt": b"a red square\n",
        "a/000.cls": b"12",
        "a/001.JPG": b"broken",
        "a/001.json": b'{"caption": "from json", "label": "cat"}',
        "a/002.txt": b"no picture",
        "a/._003.png": b"resource fork",
        "__pax.png": b"bookkeeping",
        "004.seg.png": b"a mask",
        "004.webp": b"picture",
        "004.png": b"second picture",
        "readme": b"",
        "005.npy": b"other data",
    }
    shard = make_shard(tmp_path / f"shard-0{suffix}", members, mode)

    samples = list(read_samples([shard]))

    prefix = shard.as_posix()
    assert samples == [
        Sample(f"{prefix}/a/000.png", picture, "a red square", "12"),
        Sample(f"{prefix}/a/001.jpg", b"broken", "from json", "cat"),
        Sample(f"{prefix}/004.webp", b"picture"),
    ]


def test_json_that_is_none_describes_nothing(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"1.png": b"p", "1.json": b"{", "2.png": b"q", "2.json": b"[1]"})

    assert [(sample.caption, sample.label) for sample in read_samples([shard])] == [(None, None)] * 2


def test_a_truncated_shard_gives_its_whole_samples_and_an_error(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {f"{number}.png": bytes(2000) for number in range(4)})
    shard.write_bytes(shard.read_bytes()[: 2 * 2560 + 1000])
    samples = read_samples([shard])

    assert next(samples).key == f"{shard.as_posix()}/0.png"
    with pytest.raises(InputError, match=r"archive 's\.tar' cannot be read"):
        list(samples)  # the second is whole, but whether a caption followed it nobody knows


def test_an_enormous_member_is_refused_unread(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    info = tarfile.TarInfo("1.png")
    info.size = 1 << 40
    shard.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))  # the header alone

    with pytest.raises(
        InputError, match=r"member '1\.png' has 1099511627776 bytes, expected at most 268435456"
    ):
        list(read_samples([shard]))


@pytest.mark.slow  # webdataset imports torch
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files open
def test_shards_read_by_webdataset_itself_agree(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "w-000.tar")) as sink:
        for number in range(5):
            content = {"png": png(), "txt": f"caption {number}", "json": {"label": number}}
            sink.write({"__key__": f"dir/sample.{number}".replace(".", "_"), **content})
    theirs = [
        (row["__key__"], row["png"], row["txt"].decode(), str(json.loads(row["json"])["label"]))
        for row in webdataset.WebDataset(str(tmp_path / "w-000.tar"), shardshuffle=False)
    ]

    ours = [
        (
            sample.key.removeprefix(f"{tmp_path.as_posix()}/w-000.tar/").removesuffix(".png"),
            sample.source,
            sample.caption,
            sample.label,
        )
        for sample in read_samples([tmp_path / "w-000.tar"])
    ]

    assert ours == theirs


# Together


def test_the_shipped_photographs_are_found_and_decode() -> None:
    from edgeclip.preprocess import decode_image

    samples = list(read_samples([SHIPPED]))

    assert len(samples) == 16
    assert samples == list(read_samples([SHIPPED]))
    assert decode_image(samples[0].source).mode == "RGB"


def test_importing_it_costs_the_standard_library_only() -> None:
    code = "import sys, edgeclip.data; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"numpy", "PIL", "csv", "json", "tarfile", "msgspec"} & set(done.stdout.split())


def test_a_shard_s_descriptions_are_columns(tmp_path: Path) -> None:
    described = {"caption": "other", "captions": {"zh": ["一"]}, "label": "cat"}
    shard = make_shard(
        tmp_path / "a.tar",
        {
            "1.png": png(),
            "1.txt": b"a dog\n",
            "1.json": json.dumps(described).encode(),
            "1.syn.json": json.dumps({"syn_text": ["x", "y"]}).encode(),
            "2.png": png(),
        },
    )
    first, second = read_samples([shard])
    assert captions_of(first.columns) == {"alt": ("a dog",), "zh": ("一",), "synthetic": ("x", "y")}
    assert (first.caption, first.label, second.columns) == ("a dog", "cat", {})
