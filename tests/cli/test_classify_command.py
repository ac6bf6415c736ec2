"""``edgeclip classify``: forms of output, exit codes, what goes to which stream, interruption."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Command
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.bundle import BundleWriter

NAMES = sorted(COLOURS)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name in COLOURS:
        where = folder / "below" if name == "red" else folder
        Image.fromarray(colour_picture(name)).resize((60, 50)).save(where / f"{name}.png")
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def classify(run: Command, tiny_bundle_session: Path, photos: Path):
    return lambda *arguments: run("classify", "--bundle", tiny_bundle_session, "--threads", 1, *arguments)


def _labels(jsonl: str) -> dict[str, str]:
    objects = [json.loads(line) for line in jsonl.splitlines()]
    return {Path(each["path"]).stem: each["predictions"][0]["label"] for each in objects}


# -- forms -------------------------------------------------------------------------------------------------


def test_for_people(classify, photos: Path) -> None:
    result = classify(photos / "blue.png", "--labels", "blue,green", "--top-k", 2)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == str(photos / "blue.png")
    assert [line.split()[1] for line in lines[1:]] == ["blue", "green"]
    assert lines[1].split()[0].endswith("%")
    assert len({line.index(line.split()[1]) for line in lines[1:]}) == 1  # labels stand below each other
    assert "\x1b" not in result.out
    assert result.err == ""


def test_jsonl_has_one_object_a_picture(classify, photos: Path) -> None:
    result = classify(photos, "--jsonl", "--top-k", 3)
    assert result.code == 0
    assert _labels(result.out) == {name: name for name in NAMES}
    first = json.loads(result.out.splitlines()[0])
    assert list(first) == ["schema", "score_kind", "path", "predictions", "timing_ms"]
    assert (first["schema"], first["score_kind"]) == (1, "softmax")
    assert len(first["predictions"]) == 3
    assert list(first["predictions"][0]) == ["label", "score", "similarity"]
    assert {"decode", "resize", "image_tower", "head", "batch"} == set(first["timing_ms"])


def test_json_is_one_document(classify, photos: Path) -> None:
    result = classify(photos, "--json", "--batch-size", 3)
    document = json.loads(result.out)
    assert (document["schema"], document["score_kind"]) == (1, "softmax")
    assert (document["variant"], document["labels"]) == ("onnx-int8", 8)
    assert (document["pictures"], document["failed"]) == (8, 0)
    assert len(document["results"]) == 8
    assert document["stages"]["image_tower"]["batch"] == 3
    assert {"import", "open", "compile", "first_run"} <= set(document["stages"])


def test_two_forms_of_results_are_refused(classify, photos: Path) -> None:
    result = classify(photos / "red.png", "--csv", "--json")
    assert result.code == 2
    assert result.out == ""
    assert "--csv and --json ask for two forms of the results; give one." in result.err


def test_csv_has_a_header(classify, photos: Path) -> None:
    result = classify(photos / "red.png", photos / "blue.png", "--csv", "--top-k", 2)
    rows = list(csv.DictReader(io.StringIO(result.out)))
    assert list(rows[0]) == ["path", "rank", "label", "score", "similarity", "error"]
    assert [(row["rank"], row["label"]) for row in rows[1:]] == [("1", "blue"), ("2", rows[2]["label"])]
    assert "no such file" in rows[0]["error"]
    assert result.code == 1


def test_timing_shows_stages_and_wall(classify, photos: Path) -> None:
    result = classify(photos, "--timing", "--labels", "dark red,blue")
    for stage in (
        "import",
        "open",
        "compile",
        "tokenize",
        "text_tower",
        "decode",
        "resize",
        "image_tower",
        "head",
    ):
        assert f"\n{stage} " in result.out
    assert "wall: " in result.out
    quiet = classify(photos, "--timing", "--csv")
    assert "image_tower" in quiet.err
    assert "image_tower" not in quiet.out


def test_min_confidence_leaves_labels_out(classify, photos: Path) -> None:
    result = classify(photos / "blue.png", "--jsonl", "--min-confidence", 0.9)
    assert [each["label"] for each in json.loads(result.out)["predictions"]] == ["blue"]
    flat = classify(photos / "blue.png", "--labels", "blue,blue sky", "--min-confidence", 1)
    assert "no label scored high enough" in flat.out
    assert flat.code == 0


# -- labels ------------------------------------------------------------------------------------------------


def test_without_labels_there_is_a_hint(classify, photos: Path) -> None:
    result = classify(photos / "blue.png")
    assert "blue" in result.out
    assert "no labels given, so the bundle's own 8 are used" in result.err
    assert "--labels" in result.err


def test_label_files_and_banks(
    classify, run: Command, tiny_bundle_session: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("# mine\nblue | navy\ngreen\n", encoding="utf-8")
    (tmp_path / "labels.json").write_text(
        '{"blue": {"aliases": {"en": "blue"}}, "green": []}', encoding="utf-8"
    )
    bank = tmp_path / "bank.safetensors"
    assert (
        run("labels", "build", "--bundle", tiny_bundle_session, "--labels", "blue,green", "-o", bank).code
        == 0
    )
    for file in ("labels.txt", "labels.json", "bank.safetensors"):
        result = classify(photos / "blue.png", "--label-file", tmp_path / file, "--jsonl")
        assert _labels(result.out) == {"blue": "blue"}


def test_templates_and_language(classify, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("my {}\nthe {}\n", encoding="utf-8")
    (tmp_path / "l.json").write_text(
        '{"azul": {"aliases": {"en": "blue"}}, "verde": {"aliases": {"en": "green"}}}'
    )
    for templates in ("openai-7", tmp_path / "t.txt", "so {}"):
        result = classify(
            photos / "blue.png",
            "--label-file",
            tmp_path / "l.json",
            "--language",
            "en",
            "--templates",
            templates,
        )
        assert result.code == 0
        assert result.out.splitlines()[1].endswith("blue")
    for wrong, message in (("openai", "expected one of"), (tmp_path / "none.txt", "cannot be read")):
        result = classify(photos / "blue.png", "--labels", "blue", "--templates", wrong)
        assert result.code == 1
        assert message in result.err


def test_unknown_labels_are_warned_about_once(classify, photos: Path) -> None:
    result = classify(photos, "--labels", "red,gato,кошка," + "very " * 40)
    assert result.err.count("gato") == 1
    assert "cyrillic" in result.err
    assert result.err.count("too long for the text tower and were cut") == 1
    assert result.code == 0
    assert classify(photos / "blue.png", "--labels", "red,blue").err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--labels", "a", "--label-file", "b"], 2, "cannot be given together"),
        (["--templates", "one"], 2, "needs --labels"),
        (["--language", "fr"], 1, "brings no labels in language 'fr'; it has en"),
        (["--label-file", "bank.npy", "--templates", "one"], 2, "brings its own templates"),
        (["--labels", "a,a"], 1, "--labels, entry 2: label 'a' is repeated"),
        (["--labels", ""], 1, "entry 1: empty label"),
        (["--label-file", "/none.txt"], 1, "'/none.txt' cannot be read"),
        (["--top-k", "0"], 2, "top-k"),
        (["--bundle", "/none"], 1, "'/none': does not exist"),
        (["--variant", "onnx-int4"], 1, "no variant 'onnx-int4'"),
        (["--device", "tpu"], 1, "'tpu'"),
        (["--backend", "eager"], 1, "no such backend yet"),
        (["--backend", "tensorrt"], 1, "'tensorrt' runs tensorrt files, got 'onnx'"),
        (["--language", "zh", "--labels", "a"], 1, "no alias in language 'zh'"),
    ],
)
def test_refusals(classify, photos: Path, arguments: list[str], code: int, message: str) -> None:
    result = classify(photos / "blue.png", *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_no_paths_is_a_syntax_error(run: Command) -> None:
    result = run("classify", "--labels", "a")
    assert result.code == 2
    assert "name a picture or a folder" in result.err


# -- pictures ----------------------------------------------------------------------------------------------


def test_broken_pictures_are_reported_and_the_rest_go_on(classify, photos: Path) -> None:
    (photos / "blue.png").write_bytes(b"no picture")
    result = classify(photos, photos / "none.jpg", "--jsonl")
    assert result.code == 1
    objects = [json.loads(line) for line in result.out.splitlines()]
    assert len(objects) == 9
    errors = {Path(each["path"]).name: each["error"] for each in objects if "error" in each}
    assert set(errors) == {"blue.png", "none.jpg"}
    assert list(objects[-1]) == ["schema", "score_kind", "path", "error"]
    assert result.err.count("edgeclip: error:") == 2


def test_strict_stops_at_the_first(classify, photos: Path) -> None:
    (photos / "black.png").write_bytes(b"no picture")
    result = classify(photos, "--jsonl", "--strict")
    assert result.code == 1
    assert len(result.out.splitlines()) < 8
    assert "black.png" in result.err


def test_an_empty_folder_is_said(classify, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = classify(tmp_path / "empty")
    assert (result.code, result.out) == (0, "")
    assert "no pictures found" in result.err


def test_paths_from_a_file(classify, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{photos / 'blue.png'}\n\n{photos / 'below'}\n", encoding="utf-8")
    result = classify("--paths-from", tmp_path / "list", "--jsonl")
    assert list(_labels(result.out)) == ["blue", "red"]
    assert classify("--paths-from", tmp_path / "none").code == 1


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_file_names_that_are_no_text(classify, photos: Path) -> None:
    odd = os.fsencode(photos) + b"/\xff\x1b[31m\n.png"
    Path(os.fsdecode(odd)).write_bytes((photos / "blue.png").read_bytes())
    for form in ("--jsonl", "--csv", "--json", None):
        result = classify(os.fsdecode(odd), *([form] if form else []))
        assert result.code == 0
        assert "\\xff" in result.out
        assert "\x1b" not in result.out


# -- real processes ----------------------------------------------------------------------------------------


def _start(bundle: Path, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgeclip", "classify", "--bundle", str(bundle), *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def test_results_follow_a_slow_list_of_paths(tiny_bundle_session: Path, photos: Path) -> None:
    with _start(
        tiny_bundle_session, "--paths-from", "-", "--jsonl", "--labels", "red,blue", stdin=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(3):
            process.stdin.write(f"{photos / 'blue.png'}\n")
            process.stdin.flush()
            assert _labels(process.stdout.readline()) == {"blue": "blue"}
        process.stdin.close()
        assert process.wait(timeout=20) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to one child there")
@pytest.mark.parametrize("waiting", [True, False])
def test_control_c_ends_with_130(tiny_bundle_session: Path, photos: Path, waiting: bool) -> None:
    arguments = ["--paths-from", "-", "--jsonl", "--labels", "red,blue"]
    with _start(tiny_bundle_session, *arguments, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{photos / 'blue.png'}\n" * (1 if waiting else 3000))
        process.stdin.flush()
        process.stdout.readline()
        if waiting:
            time.sleep(0.2)  # now it waits for the next path
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert "interrupted" in err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
@pytest.mark.parametrize("form", ["--jsonl", "--csv", "--top-k=1"])
def test_a_reader_that_leaves_is_no_error(tiny_bundle_session: Path, photos: Path, form: str) -> None:
    with _start(tiny_bundle_session, *[photos] * 60, form, "--labels", "red,blue") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 0


def test_output_survives_a_terminal_without_chinese(tiny_bundle_session: Path, photos: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    with _start(tiny_bundle_session, photos / "blue.png", "--labels", "猫,狗", env=environment) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "\\u732b" in out
    assert "Traceback" not in err


def test_json_stays_json_on_any_terminal(tiny_bundle_session: Path, photos: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    more = ("--labels", "café,猫,😀", "--jsonl")
    with _start(tiny_bundle_session, photos / "blue.png", *more, env=environment) as process:
        out, _ = process.communicate(timeout=30)
    assert {each["label"] for each in json.loads(out)["predictions"]} == {"café", "猫", "😀"}


def test_a_lifted_guard_is_a_line_on_stderr(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["variants"]["onnx-int8"]["requires"] = {"isa_any": ["amx_fp16"]}
        writer.commit()
    photo = Path(__file__).parents[2] / "edgeclip/assets/photos"
    command = [sys.executable, "-m", "edgeclip", "classify", str(min(photo.glob("*.jpg"))), "--labels", "a,b"]
    command += ["--bundle", str(tiny_bundle), "--variant", "onnx-int8"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "'onnx-int8' cannot be run here: it needs one of amx_fp16" in refused.stderr
    allowed = subprocess.run([*command, "--allow", "unsafe-isa"], capture_output=True, text=True, check=False)
    assert allowed.returncode == 0
    assert allowed.stderr.startswith("warning: variant 'onnx-int8' is run although it needs one of amx_fp16")
