"""``edgeclip bundle`` and ``edgeclip cache`` as a user meets them: output, files and exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import COLOURS, colour_picture, make_tiny_bundle

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.bundle_tools import NewBank, diff_bundles, pack_bundle, slim_bundle, unpack_bundle
from edgeclip.cache import COMPILED, HostCache
from edgeclip.classify import ZeroShotClassifier
from edgeclip.cli import _run
from edgeclip.errors import BundleError, ConfigError
from edgeclip.labels import LabelBank

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; return exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = _run([str(argument) for argument in arguments], debug=False)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# --- inspect
# ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_a_bundle_holds(run: Run, tiny_bundle: Path) -> None:
    code, out, err = run("bundle", "inspect", tiny_bundle)
    assert (code, err) == (0, "")
    for said in (
        "tiny-colours (test), image",
        "16 dimensions, scale 20",
        "32 × 32 px, shortest, bilinear, crop center",
        "Apache-2.0",
        "onnx-int8 (default 1)",
        "onnx-fp32 (default 2)",
        "onnx >=1.20",
        "colours (default)",
        "head temperature: temperature, bank colours, fitted on its own golden pictures",
        "made with recipe: tests/tools/tiny_bundle.py",
        "hashes are checked at first use",
        Bundle.open(tiny_bundle).digest,
    ):
        assert said in out


def test_inspect_says_which_limits_were_missed(run: Run, tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        parity = writer.manifest["variants"]["onnx-int8"]["parity"]["image"]
        parity.update(top1_agreement=0.957, missed={"top1_agreement": 0.98})
        writer.commit()

    code, out, _ = run("bundle", "inspect", tiny_bundle)

    assert code == 0
    words = out.replace("│", " ").split()
    assert {"but", "for", "top1_agreement,"} <= set(words)


def test_inspect_json_holds_sizes_and_is_one_document(run: Run, tiny_bundle: Path) -> None:
    code, out, _ = run("bundle", "inspect", tiny_bundle, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema"] == 1
    assert document["digest"] == Bundle.open(tiny_bundle).digest
    assert document["size_bytes"] == sum(
        len(data) for name, data in files_of(tiny_bundle).items() if name != "manifest.json"
    )
    int8 = document["variants"]["onnx-int8"]
    assert int8["default"] is True
    assert int8["towers"]["image"]["parity"]["status"] == "passed"
    assert int8["towers"]["image"]["size_bytes"] > 0
    assert document["label_banks"]["colours"]["labels"] == 8
    assert document["checked"] is False


def test_inspect_check_finds_a_damaged_file(run: Run, tiny_bundle: Path) -> None:
    golden = tiny_bundle / (Bundle.open(tiny_bundle).manifest.golden or "")
    golden.write_bytes(golden.read_bytes()[:-1] + b"?")
    assert run("bundle", "inspect", tiny_bundle)[0] == 0
    code, out, err = run("bundle", "inspect", tiny_bundle, "--check")
    assert (code, out) == (1, "")
    assert "is damaged: it has sha256" in err
    assert err.count("\n") == 1


def test_inspect_shows_names_as_text_and_never_as_markup_or_control(run: Run, tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["model"]["name"] = "[red]\x1b[31mbold"
        writer.commit()
    code, out, _ = run("bundle", "inspect", tiny_bundle)
    assert code == 0
    assert "[red]\\x1b[31mbold" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("command", ["inspect", "slim", "diff", "pack", "unpack"])
def test_a_missing_bundle_is_one_line_and_exit_code_1(run: Run, tmp_path: Path, command: str) -> None:
    rest: list[Any] = {
        "slim": ["--variant", "x", "-o", tmp_path / "o"],
        "diff": [tmp_path / "b"],
        "pack": ["-o", tmp_path / "o.zip"],
        "unpack": ["-o", tmp_path / "o"],
    }.get(command, [])
    code, out, err = run("bundle", command, tmp_path / "missing.zip", *rest)
    assert (code, out) == (1, "")
    assert "missing.zip" in err
    assert err.startswith("edgeclip: error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- slim
# ------------------------------------------------------------------------------------------------------------


def test_slim_for_a_device_classifies_without_a_text_tower(
    run: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    target = tmp_path / "device"
    code, out, err = run(
        "bundle", "slim", tiny_bundle, "--variant", "onnx-int8", "--labels", "red,green,blue,white",
        "--drop-text", "-o", target,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert str(target) in out
    bundle = Bundle.open(target)
    bundle.check_files()
    assert list(bundle.manifest.variants) == ["onnx-int8"]
    assert list(bundle.manifest.variants["onnx-int8"].towers) == ["image"]
    assert bundle.manifest.tokenizer is None
    assert set(bundle.manifest.files) == set(files_of(target)) - {"manifest.json"}
    assert bundle.manifest.default_bank == "labels"
    assert bundle.manifest.provenance["slimmed_from"] == Bundle.open(tiny_bundle).digest
    with ZeroShotClassifier.open(target) as classifier:
        for name in ("red", "green", "blue", "white"):
            assert classifier.classify(colour_picture(name, seed=9), top_k=1)[0].label == name


def test_labels_come_from_a_file_or_a_bank(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("red\ngreen\n", "utf-8")
    first, second = tmp_path / "first", tmp_path / "second"
    common = ("--variant", "onnx-int8", "--drop-text")
    assert (
        run("bundle", "slim", tiny_bundle, *common, "--labels", tmp_path / "labels.txt", "-o", first)[0] == 0
    )
    bank = first / Bundle.open(first).manifest.label_banks["labels"].file
    assert LabelBank.open(bank).names == ("red", "green")
    copy = shutil.copy(bank, tmp_path / "bank.safetensors")
    assert run("bundle", "slim", tiny_bundle, *common, "--labels", copy, "-o", second)[0] == 0
    assert files_of(first) == files_of(second)


def test_the_same_slim_gives_the_same_bytes(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(
            "bundle",
            "slim",
            tiny_bundle,
            "--variant",
            "onnx-int8",
            "--labels",
            "red,blue",
            "-o",
            tmp_path / name,
        )
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_slim_keeps_the_text_tower_the_banks_and_the_heads_unless_told(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    slim = slim_bundle(Bundle.open(tiny_bundle), tmp_path / "s", variants=["onnx-int8"])
    assert list(slim.manifest.variants["onnx-int8"].towers) == ["image", "text"]
    assert slim.manifest.tokenizer is not None
    assert list(slim.manifest.label_banks) == ["colours"]
    assert list(slim.manifest.heads) == ["temperature"]
    assert slim.manifest.golden == Bundle.open(tiny_bundle).manifest.golden
    assert not any("onnx-fp32/image" in name for name in slim.manifest.files)
    slim.check_files()


def test_slim_without_variants_copies_the_bundle(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    assert run("bundle", "slim", tiny_bundle, "-o", tmp_path / "s")[0] == 0
    source, copy = Bundle.open(tiny_bundle).manifest, Bundle.open(tmp_path / "s").manifest
    assert (copy.default_variants, copy.files) == (source.default_variants, source.files)


def test_a_variant_without_text_tower_keeps_the_one_it_borrows(tiny_bundle: Path, tmp_path: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        del writer.manifest["variants"]["onnx-int8"]["towers"]["text"]
        source = writer.commit()
    slim = slim_bundle(source, tmp_path / "s", variants=["onnx-int8"])
    assert slim.manifest.default_variants == ("onnx-int8",)
    assert {name: list(entry.towers) for name, entry in slim.manifest.variants.items()} == {
        "onnx-fp32": ["text"],
        "onnx-int8": ["image"],
    }


def test_a_background_bank_stays_beside_new_labels(tiny_bundle: Path, tmp_path: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["background_bank"] = "colours"
        source = writer.commit()
    content = source.read(source.manifest.label_banks["colours"].file)
    bank = NewBank("mine", content, {"labels": 8, "templates": "one"})
    slim = slim_bundle(source, tmp_path / "s", variants=["onnx-int8"], bank=bank)
    assert list(slim.manifest.label_banks) == ["colours", "mine"]
    assert (slim.manifest.default_bank, slim.manifest.background_bank) == ("mine", "colours")
    assert list(slim.manifest.heads) == ["temperature"]


def test_slim_without_labels_and_text_needs_a_bank(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest.update(label_banks={}, default_bank=None, heads={})
        writer.commit()
    code, _, err = run(
        "bundle", "slim", tiny_bundle, "--variant", "onnx-int8", "--drop-text", "-o", tmp_path / "s"
    )
    assert code == 1
    assert "could classify nothing: give it labels" in err
    assert not (tmp_path / "s").exists()


def test_slim_refuses_what_makes_no_sense(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "s"
    code, _, err = run("bundle", "slim", tiny_bundle, "--variant", "onnx-int4", "-o", target)
    assert (code, "no variant 'onnx-int4'; it has" in err) == (1, True)
    code, _, err = run(
        "bundle", "slim", tiny_bundle, "--variant", "onnx-int8", "--templates", "one", "-o", target
    )
    assert (code, "--templates" in err) == (2, True)
    with pytest.raises(ConfigError, match="no variant was named; it has"):
        slim_bundle(Bundle.open(tiny_bundle), target, variants=[])
    assert not target.exists()


def test_a_bank_of_another_space_is_refused(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path / "other", seed=5)
    bank = other.file(other.manifest.label_banks["colours"].file)
    code, _, err = run(
        "bundle", "slim", tiny_bundle, "--variant", "onnx-int8", "--labels", bank, "-o", tmp_path / "s"
    )
    assert code == 1
    assert "the label bank is of the embedding space" in err


def test_a_bundle_without_a_text_tower_that_runs_here_says_why(
    run: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    with BundleWriter(tiny_bundle) as writer:
        for entry in writer.manifest["variants"].values():
            entry["requires"] = {"isa_any": ["quantum"]}
        writer.commit()
    code, _, err = run(
        "bundle", "slim", tiny_bundle, "--variant", "onnx-int8", "--labels", "red,blue", "-o", tmp_path / "s"
    )
    assert code == 1
    assert "no text tower that runs here to encode labels with (onnx-int8: " in err
    assert "quantum" in err


@pytest.mark.parametrize("command", ["slim", "unpack"])
def test_nothing_but_a_bundle_is_ever_replaced(
    run: Run, tiny_bundle: Path, tmp_path: Path, command: str
) -> None:
    pack_bundle(Bundle.open(tiny_bundle), tmp_path / "b.zip")
    source = [tiny_bundle, "--variant", "onnx-int8"] if command == "slim" else [tmp_path / "b.zip"]
    target = tmp_path / "target"

    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    code, _, err = run("bundle", command, *source, "-o", target, "--force")
    assert (code, "is not empty and no bundle" in err) == (1, True)
    assert files_of(target) == {"thesis.txt": b"years of work"}

    (target / "thesis.txt").unlink()
    assert run("bundle", command, *source, "-o", target)[0] == 0  # empty: fine
    code, _, err = run("bundle", command, *source, "-o", target)
    assert (code, "there is a bundle at" in err) == (1, True)
    assert run("bundle", command, *source, "-o", target, "--force")[0] == 0
    Bundle.open(target).check_files()

    (tmp_path / "file").write_text("x")
    code, _, err = run("bundle", command, *source, "-o", tmp_path / "file", "--force")
    assert (code, "is not a directory" in err) == (1, True)


# --- diff
# ------------------------------------------------------------------------------------------------------------


def test_equal_bundles_have_no_differences(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "copy")
    assert run("bundle", "diff", tiny_bundle, tmp_path / "copy", "--exit-code") == (0, "no differences\n", "")


def test_differences_are_told_by_field_and_file(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    with BundleWriter(other) as writer:
        writer.manifest["model"]["scale"] = 30
        writer.manifest["weather"] = "sunny"
        writer.manifest["golden"] = writer.add("golden.safetensors", b"new")
        del writer.manifest["heads"]["temperature"]
        writer.commit()

    code, out, _ = run("bundle", "diff", tiny_bundle, other)

    assert code == 0
    lines = out.splitlines()
    assert "~ model.scale: 20.0 → 30" in lines
    assert '+ weather: "sunny"' in lines
    assert any(line.startswith("- heads.temperature: ") for line in lines)
    assert any(line.startswith("~ files.golden.safetensors.sha256: ") for line in lines)
    assert any(
        line.startswith("~ files.golden.safetensors.size_bytes: ") and line.endswith("→ 3") for line in lines
    )
    assert not any(line.startswith("~ golden") for line in lines)  # the same file, with other content
    assert run("bundle", "diff", tiny_bundle, other, "--exit-code")[0] == 1
    code, out, _ = run("bundle", "diff", tiny_bundle, other, "--json")
    document = json.loads(out)
    assert (code, document["schema"], document["same"]) == (0, 1, False)
    assert {"field": "model.scale", "a": 20.0, "b": 30, "missing": None} in document["differences"]
    assert {"field": "weather", "a": None, "b": "sunny", "missing": "a"} in document["differences"]


def test_a_difference_of_type_alone_is_one(tiny_bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    bundles = []
    for path, value in ((tiny_bundle, 1), (other, True)):
        with BundleWriter(path) as writer:
            writer.manifest["provenance"] = {"flag": value, "time": "2026-01-01T00:00:00Z"}
            bundles.append(writer.commit())
    assert [each.field for each in diff_bundles(*bundles)] == ["provenance.flag"]


# --- pack and unpack
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_a_packed_bundle_comes_back_byte_by_byte(
    run: Run, tiny_bundle: Path, tmp_path: Path, suffix: str
) -> None:
    archive = tmp_path / f"b{suffix}"
    assert run("bundle", "pack", tiny_bundle, "-o", archive)[0] == 0
    code, out, _ = run("bundle", "unpack", archive, "-o", tmp_path / "back")
    assert code == 0
    assert Bundle.open(tiny_bundle).digest[:16] in out
    assert files_of(tmp_path / "back") == files_of(tiny_bundle)


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_an_archive_depends_on_the_bundle_alone(tiny_bundle: Path, tmp_path: Path, suffix: str) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "elsewhere"))
    for path in copy.rglob("*"):
        os.utime(path, (1e9, 1e9))
        path.chmod(0o700)
    (copy / "unlisted.txt").write_text("not part of the bundle")
    for number, directory in enumerate((tiny_bundle, copy)):
        pack_bundle(Bundle.open(directory), tmp_path / f"{number}{suffix}")
    assert (tmp_path / f"0{suffix}").read_bytes() == (tmp_path / f"1{suffix}").read_bytes()


def test_members_are_plain_files_without_owner_or_time(tiny_bundle: Path, tmp_path: Path) -> None:
    pack_bundle(Bundle.open(tiny_bundle), tmp_path / "b.tar")
    pack_bundle(Bundle.open(tiny_bundle), tmp_path / "b.zip")
    with tarfile.open(tmp_path / "b.tar") as archive:
        members = archive.getmembers()
    assert members[0].name == "manifest.json"
    assert {(m.mode, m.uid, m.gid, m.uname, m.mtime, m.isreg()) for m in members} == {
        (0o644, 0, 0, "", 0, True)
    }
    with zipfile.ZipFile(tmp_path / "b.zip") as zipped:
        assert [info.filename for info in zipped.infolist()] == [member.name for member in members]
        assert {info.date_time for info in zipped.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.external_attr >> 16 for info in zipped.infolist()} == {stat.S_IFREG | 0o644}


def test_pack_refuses_other_suffixes_existing_files_and_damage(
    run: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    code, _, err = run("bundle", "pack", tiny_bundle, "-o", tmp_path / "b.rar")
    assert (code, "should end in .tar or .zip" in err) == (1, True)
    (tmp_path / "b.zip").write_text("mine")
    code, _, err = run("bundle", "pack", tiny_bundle, "-o", tmp_path / "b.zip")
    assert (code, "exists: choose another name" in err) == (1, True)
    assert run("bundle", "pack", tiny_bundle, "-o", tmp_path / "b.zip", "--force")[0] == 0
    code, _, err = run("bundle", "pack", tiny_bundle, "-o", tmp_path / "no" / "b.zip")
    assert (code, "cannot be written: No such file or directory" in err) == (1, True)
    golden = tiny_bundle / (Bundle.open(tiny_bundle).manifest.golden or "")
    golden.write_bytes(bytes(golden.stat().st_size))
    before = files_of(tmp_path)
    code, _, err = run("bundle", "pack", tiny_bundle, "-o", tmp_path / "c.zip")
    assert (code, "is damaged" in err) == (1, True)
    assert files_of(tmp_path) == before  # no half-written archive, no temporary file


def _archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_an_archive_made_by_hand_may_hold_a_folder_and_more(tiny_bundle: Path, tmp_path: Path) -> None:
    members = {f"my [bundle]/{name}": content for name, content in files_of(tiny_bundle).items()}
    members |= {
        "my [bundle]/.DS_Store": b"x",
        "__MACOSX/._manifest.json": b"x",
        "my [bundle]/sub/manifest.json": b"{}",
    }
    back = unpack_bundle(_archive(tmp_path / "b.zip", members), tmp_path / "back")
    assert back.digest == Bundle.open(tiny_bundle).digest
    assert files_of(tmp_path / "back") == files_of(tiny_bundle)
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(tiny_bundle, ".")
    assert unpack_bundle(tmp_path / "b.tar.gz", tmp_path / "again").digest == back.digest


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda files: files.pop("manifest.json"), r"holds no manifest\.json"),
        (lambda files: files.update({"manifest.json": b"{}"}), "field 'schema' cannot be used"),
        (lambda files: files.update({"../evil": b"x"}), "would leave the directory"),
        (lambda files: files.pop(next(iter(set(files) - {"manifest.json"}))), "which was not added"),
        (
            lambda files: files.update({n: c[:-1] + b"~" for n, c in files.items() if "golden" in n}),
            "was added with .* the manifest says",
        ),
        (
            lambda files: files.update({n: c + bytes(10**6) for n, c in files.items() if "golden" in n}),
            "holds too much at 'golden",
        ),
    ],
)
def test_a_wrong_archive_leaves_nothing_behind(
    run: Run,
    tiny_bundle: Path,
    tmp_path: Path,
    change: Callable[[dict[str, bytes]], object],
    expected: str,
) -> None:
    import re

    members = files_of(tiny_bundle)
    change(members)
    archive = _archive(tmp_path / "b.zip", members)
    before = set(tmp_path.rglob("*"))
    code, out, err = run("bundle", "unpack", archive, "-o", tmp_path / "back")
    assert (code, out) == (1, "")
    assert re.search(expected, err)
    assert err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_unpack_tells_what_is_missing_or_no_archive(run: Run, tmp_path: Path) -> None:
    code, _, err = run("bundle", "unpack", tmp_path / "b.zip", "-o", tmp_path / "back")
    assert (code, "b.zip': no such file. Check the path." in err) == (1, True)
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8\xff")
    code, _, err = run("bundle", "unpack", tmp_path / "cat.jpg", "-o", tmp_path / "back")
    assert (code, "expected a name that ends in .zip, .tar" in err, "delete" in err) == (1, True, False)


def test_links_in_an_archive_are_neither_made_nor_followed(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    golden = Bundle.open(tiny_bundle).manifest.golden
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(tmp_path / "b.tar", "w") as archive:
            for name, content in files_of(tiny_bundle).items():
                entry = tarfile.TarInfo(name)
                if name == golden:
                    entry.type, entry.linkname = kind, str(tmp_path / "secret")
                    archive.addfile(entry)
                else:
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        with pytest.raises(BundleError, match="which was not added"):
            unpack_bundle(tmp_path / "b.tar", tmp_path / "back")
        assert not (tmp_path / "back").exists()


# --- cache
# -----------------------------------------------------------------------------------------------------------


def test_the_cache_can_be_looked_at_and_cleared(run: Run) -> None:
    root = Path(os.environ["EDGECLIP_CACHE_DIR"])
    for digest in ("a" * 64, "ab" * 32):
        HostCache.open(digest, "host").put_array("x.npy", np.zeros(1000))

    code, out, _ = run("cache", "info")
    assert code == 0
    assert str(root) in out
    assert "bundle aaaaaaaaaaaaaaaa" in out
    document = json.loads(run("cache", "info", "--json")[1])
    assert document["schema"] == 1
    assert [entry["bundle"] for entry in document["bundles"]] == ["a" * 16, "ab" * 8]
    assert document["bundles"][0]["files"] == 1
    assert document["size_bytes"] > 16_000

    HostCache.open(COMPILED).put("x.engine", b"x" * 500_000)
    code, out, _ = run("cache", "info")
    assert re.search(r"^  compiled towers +0\.5 MB  1 file, all hosts, \d", out, re.M)
    assert json.loads(run("cache", "info", "--json")[1])["bundles"][0]["bundle"] == COMPILED
    assert run("cache", "clear", "--bundle", COMPILED, "--yes")[:2] == (
        0,
        "removed 0.5 MB: compiled towers\n",
    )

    code, _, err = run("cache", "clear", "--bundle", "a", "--yes")
    assert (code, "has 2 entries whose digest starts with 'a', expected one" in err) == (1, True)
    assert run("cache", "clear", "--bundle", "ab", "--yes")[:2] == (
        0,
        "removed 8.1 kB: bundle abababababababab\n",
    )
    removed = json.loads(run("cache", "clear", "--yes", "--json")[1])
    assert [entry["bundle"] for entry in removed["bundles"]] == ["a" * 16]
    assert json.loads(run("cache", "info", "--json")[1])["bundles"] == []
    assert run("cache", "clear") == (
        0,
        "removed 0.0 kB: there was nothing\n",
        "",
    )  # nothing there: nothing to ask


def test_clearing_asks_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = HostCache.open("a" * 64, "host")
    cache.put("x", b"x")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, _, err = run("cache", "clear")
    assert code == 1
    assert "Remove everything in" in err
    assert err.endswith("edgeclip: nothing was removed\n")
    assert cache.get("x") == b"x"


def test_clearing_without_an_answer_names_the_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = HostCache.open("a" * 64, "host")
    cache.put("x", b"x")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = run("cache", "clear", "--bundle", "aa")
    assert (code, "Remove bundle aaaaaaaaaaaaaaaa in" in err, "say --yes" in err) == (1, True, True)
    assert cache.get("x") == b"x"
    code, _, err = run("cache", "clear", "--bundle", "b")
    assert (code, "Remove" in err, "has 0 entries" in err) == (1, False, True)


def test_the_labels_of_the_tiny_bundle_are_right() -> None:
    assert len(COLOURS) == 8  # what the tests above count on
