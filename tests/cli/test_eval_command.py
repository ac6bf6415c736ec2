"""``edgeclip eval``: one table, the same pictures, and what is said when something does not fit."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command
from picture_sets import clip_benchmark
from PIL import Image
from tar_shards import make_shard, picture
from tiny_bundle import COLOURS, colour_picture

from edgeclip.classify import ZeroShotClassifier
from edgeclip.data import read_samples
from edgeclip.evaluate.zero_shot import evaluate_classifier
from edgeclip.runtime.host import usable_cores

PROBES = Path(__file__).parent.parent / "data" / "probes"
PHOTOS = Path(__file__).parents[2] / "edgeclip/assets/photos"
NAMES = tuple(COLOURS)
# No module of torch may be imported, and no socket used: ends the process with code 99.
GUARD = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "torchvision", "sklearn"):
            refuse(f"import of {name}")
def refuse(what):
    sys.stderr.write(f"refused: {what}\\n")
    sys.stderr.flush()
    os._exit(99)
sys.meta_path.insert(0, Finder())
sys.addaudithook(lambda event, arguments: event.startswith("socket.") and event != "socket.gethostname"
                 and refuse(event))
"""


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]):
    command = Command(capsys)
    return lambda *arguments: command("eval", *arguments)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Tiny towers are faster on one thread, and tests share the machine."""
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    for name in NAMES:
        (root / name).mkdir()
        for number in range(4):
            noisy = colour_picture(name, seed=number, noise=150)
            Image.fromarray(noisy).save(root / name / f"{number}.png")
            (root / name / f"{number}.txt").write_text(f"{name}\nthe colour {name}\n", encoding="utf-8")
    return root


def document(result: Any) -> dict[str, Any]:
    assert result.code == 0, result.err
    said: dict[str, Any] = json.loads(result.out)
    return said


# Bundles


def test_every_variant_of_a_bundle_is_a_row(evaluate, colours: Path, tiny_bundle: Path) -> None:
    done = evaluate(tiny_bundle, "--data", colours)
    assert done.code == 0, done.err
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0].endswith(f"{colours.name}: 32 pictures, 8 labels")
    rows = [line.split() for line in lines if "/onnx-" in line]
    assert [row[0].rpartition("/")[2] for row in rows] == ["onnx-fp32", "onnx-int8"]
    assert rows[0][-1] == "-"
    assert max(map(len, lines)) <= 100
    for row in rows:
        with ZeroShotClassifier.open(tiny_bundle, variant=row[0].rpartition("/")[2]) as classifier:
            classifier.set_labels(sorted(NAMES))
            direct = evaluate_classifier(classifier, read_samples([colours], folder_labels=True))
        assert row[1] == f"{100 * direct.top1.value:.1f}"
        assert row[2] == f"({100 * direct.top1.low:.1f}-{100 * direct.top1.high:.1f})"
        assert row[3:6] == [
            f"{100 * value:.1f}"
            for value in (direct.top5.value, direct.mean_per_class_recall, direct.calibration_error or 0)
        ]


def test_one_variant_and_the_whole_document(
    evaluate, colours: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    arguments = [tiny_bundle, "--data", colours, "--variants", "onnx-int8", "--limit", 16, "--per-class",
                 "--json", out]  # fmt: skip
    done = evaluate(*arguments)
    assert done.code == 0, done.err
    assert "top-1 of every label, %" in done.out
    said = json.loads(out.read_text("utf-8"))
    assert (said["schema"], said["kind"], said["task"]) == (1, "evaluation", "zero-shot")
    assert said["command"] == ["edgeclip", "eval", *map(str, arguments)]
    assert {"numpy", "edgeclip", "onnxruntime"} <= set(said["versions"])
    assert said["host"]["cores"] >= 1
    assert said["wall_s"] > 0
    assert said["data"] == {
        "path": str(colours), "total": 32, "taken": 16, "measured": 16, "left_out": []
    }  # fmt: skip
    (row,) = said["rows"]
    assert (row["about"]["variant"], row["about"]["backend"]) == ("onnx-int8", "ort")
    assert row["zero_shot"][""]["n"] == 16
    assert sorted(row["zero_shot"][""]["per_class"]) == sorted(NAMES)  # spread over the sorted folders
    assert document(evaluate(*arguments[:-2], "--json", "-"))["rows"] == said["rows"]


def test_corruptions_and_strangers(evaluate, colours: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    for number in range(4):
        Image.fromarray(np.full((32, 32, 3), 110 + number, np.uint8)).save(strange / f"{number}.png")
    arguments = [tiny_bundle, "--data", colours, "--variants", "onnx-fp32", "--ood", strange,
                 "--corruptions", "fog,brightness", "--severities", "1,5"]  # fmt: skip
    said = document(evaluate(*arguments, "--json", "-"))
    robustness = said["rows"][0]["robustness"][""]
    assert list(robustness["corruptions"]) == ["fog", "brightness"]
    assert list(robustness["corruptions"]["fog"]["severities"]) == ["1", "5"]
    assert robustness["clean"] == said["rows"][0]["zero_shot"][""]["top1"]
    assert robustness["retained"] == pytest.approx(robustness["mean"] / robustness["clean"]["value"])
    assert said["seeds"] == {"corruptions": 0}
    assert said["ood_data"]["measured"] == 4
    assert said["rows"][0]["out_of_distribution"][""]["inside"] == 32
    table = evaluate(*arguments).out
    assert "told from 4 pictures of" in table
    assert [line.split()[0] for line in table.splitlines() if line.startswith(("fog", "bright", "all"))] == [
        "fog", "brightness", "all"
    ]  # fmt: skip


def test_all_corruptions_at_all_severities(evaluate, colours: Path, tiny_bundle: Path) -> None:
    done = evaluate(tiny_bundle, "--data", colours, "--variants", "onnx-fp32", "--limit", 8,
                    "--corruptions", "all")  # fmt: skip
    assert done.code == 0, done.err
    assert sum(len(line.split()) == 8 for line in done.out.splitlines()) >= 14


def test_retrieval_of_a_folder_with_captions(evaluate, colours: Path, tiny_bundle: Path) -> None:
    said = document(evaluate(tiny_bundle, "--data", colours, "--task", "retrieval", "--json", "-"))
    report = said["rows"][0]["retrieval"]["alt"]
    assert (report["pictures"], report["texts"]) == (32, 16)
    assert report["text_to_image"]["r5"]["n"] == 16
    assert evaluate(tiny_bundle, "--data", colours, "--task", "retrieval").out.count("alt i>t R@1") == 1


def test_sets_in_the_form_of_clip_benchmark(evaluate, tiny_bundle: Path, tmp_path: Path) -> None:
    root = clip_benchmark(tmp_path / "wds")
    (root / "classnames.txt").write_text("red\nred\nblue\n", encoding="utf-8")
    for number in range(2):
        members = {}
        for row, name in enumerate(("red", "red", "blue")):
            Image.fromarray(colour_picture(name)).save(tmp_path / "one.png")
            members |= {f"s{row}.png": (tmp_path / "one.png").read_bytes(), f"s{row}.cls": b"%d" % row}
        make_shard(root / "test" / f"{number}.tar", members)
    done = evaluate(tiny_bundle, "--data", root, "--variants", "onnx-fp32", "--json", "-")
    assert "1 names stand for several labels, which cannot be told apart, first 'red'" in done.err
    said = document(done)
    assert said["templates"] == {"": ["a photo of a {}.", "art of the {}."]}
    # Of two equal labels the first wins: the second one's pictures are missed.
    assert said["rows"][0]["zero_shot"][""]["top1"]["value"] == pytest.approx(4 / 6)
    shifted = evaluate(tiny_bundle, "--data", root, "--labels", "background,red,green,blue")
    assert "--labels: got 4, expected 3 in the order of" in shifted.err
    retrieval = clip_benchmark(tmp_path / "pairs", retrieval=True)
    said = document(evaluate(tiny_bundle, "--data", retrieval, "--json", "-"))
    assert (said["task"], said["rows"][0]["retrieval"]["alt"]["texts"]) == ("retrieval", 7)


def test_what_is_left_out_is_named_and_limited(evaluate, tiny_bundle: Path, tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate(("red", "blue", "red", "blue")):
        Image.fromarray(colour_picture(name)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": name})
    (tmp_path / "broken.png").write_bytes(picture(1)[:40])
    rows += [{"image": "broken.png", "label": "red"}, {"image": "0.png"}]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = evaluate(tiny_bundle, "--data", table, "--max-left-out", "50%")
    assert done.code == 0, done.err
    assert "2 pictures of" in done.out
    assert "'broken.png'" in done.out
    refused = evaluate(tiny_bundle, "--data", table)
    assert (refused.code, refused.out) == (1, "")
    assert "2 of 6 pictures cannot be used, expected at most 1" in refused.err


def test_the_default_bundle_needs_neither_torch_nor_a_network(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgeclip", "eval", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run("default", "--data", PHOTOS / "labels.csv", "--json", "-", "--ood", PHOTOS)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rows"][0]["name"] == "default/onnx-int8"
    assert said["rows"][0]["zero_shot"][""]["top1"]["value"] >= 0.9
    assert "refused: import of torch" in run(PROBES / "vit", "--data", PHOTOS / "labels.csv").stderr


# Checkpoints


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeclip.shape_files import write_shapes

    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, train=1, held_out=60, size_px=64, seed=2)
    return folder


@pytest.mark.slow
def test_checkpoints_and_a_bundle_in_one_table(evaluate, shapes: Path) -> None:
    pytest.importorskip("torch")
    from edgeclip.distill.eager import open_eager
    from edgeclip.evaluate.zero_shot import evaluate_embedder
    from edgeclip.label_sets import Templates, read_labels
    from edgeclip.preprocess import Preprocess

    labels = read_labels(shapes / "labels.json")
    said = document(
        evaluate(PROBES / "vit", PROBES / "mobileclip", "default", "--data", shapes / "held_out.jsonl",
                 "--labels", shapes / "labels.json", "--language", "en", "--language", "zh",
                 "--templates", "bare", "--limit", 40, "--json", "-")
    )  # fmt: skip
    assert [row["name"] for row in said["rows"]] == [
        str(PROBES / "vit"), str(PROBES / "mobileclip"), "default/onnx-int8"
    ]  # fmt: skip
    assert [row["about"]["kind"] for row in said["rows"]] == ["checkpoint", "checkpoint", "bundle"]
    assert (said["languages"], said["labels"]) == (["en", "zh"], 796)
    samples = list(read_samples([shapes / "held_out.jsonl"]))
    taken = [samples[number * 60 // 40] for number in range(40)]
    for row in said["rows"][:2]:
        subject = open_eager(row["name"])
        for language in ("en", "zh"):
            offered = labels if language == "en" else labels.in_language("zh")
            report = evaluate_embedder(
                subject.images,
                taken,
                subject.bank(offered, Templates.of("bare")),
                labels=labels.names,
                preprocess=Preprocess(subject.preprocess),
                scale=subject.scale,
            )
            found = row["zero_shot"][language]
            assert found["top1"]["value"] == report.top1.value > 0.7
            assert found["calibration_error"] == pytest.approx(report.calibration_error, abs=1e-6)
    assert "agreement" not in said["rows"][0]
    assert 0.6 < said["rows"][1]["agreement"]["zh"]["value"] <= 1
    assert said["rows"][2]["agreement"]["en"]["n"] == 40


def test_captions_in_two_languages(evaluate, shapes: Path) -> None:
    pytest.importorskip("torch")
    said = document(
        evaluate(PROBES / "tinyclip", "--data", shapes / "held_out.jsonl", "--task", "retrieval",
                 "--captions", "alt", "--captions", "zh", "--limit", 30, "--json", "-")
    )  # fmt: skip
    assert said["captions"] == ["alt", "zh"]
    assert said["rows"][0]["about"]["threads"] == usable_cores()
    for kind in ("alt", "zh"):
        assert said["rows"][0]["retrieval"][kind]["image_to_text"]["r5"]["value"] > 0.9


@pytest.mark.slow
def test_corruptions_hurt_a_trained_model_more_and_more(evaluate, shapes: Path) -> None:
    pytest.importorskip("torch")
    said = document(
        evaluate(PROBES / "mobileclip", "--data", shapes / "held_out.jsonl",
                 "--labels", shapes / "labels.json", "--templates", "bare", "--limit", 40,
                 "--corruptions", "all", "--json", "-")
    )  # fmt: skip
    robustness = said["rows"][0]["robustness"][""]
    means = [
        np.mean([each["severities"][str(severity)]["value"] for each in robustness["corruptions"].values()])
        for severity in range(1, 6)
    ]
    assert robustness["clean"]["value"] > means[0]
    assert all(before > after for before, after in itertools.pairwise(means)), means
    for name, each in robustness["corruptions"].items():
        mild, hard = (each["severities"][severity]["value"] for severity in "15")
        assert mild >= hard, name


@pytest.mark.slow
def test_a_published_file_of_a_model(evaluate, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from edgeclip.models.clip import build_clip
    from edgeclip.models.foreign import save_foreign
    from edgeclip.models.zoo import clip_config

    name = "TinyCLIP-ViT-8M-16-Text-3M"
    torch.manual_seed(0)
    config = clip_config(name)
    save_foreign(build_clip(config), config, tmp_path / "weights.safetensors", source="hf")
    said = document(
        evaluate(f"{name}:{tmp_path / 'weights.safetensors'}", "--data", PHOTOS / "labels.csv", "--limit", 2,
                 "--json", "-")
    )  # fmt: skip
    about = said["rows"][0]["about"]
    assert (about["kind"], about["model"], about["source"]) == ("published file", name, "hf")
    refused = evaluate(f"MobileCLIP9:{tmp_path / 'weights.safetensors'}", "--data", PHOTOS / "labels.csv")
    assert refused.code == 1
    assert "MobileCLIP9" in refused.err


def test_without_torch_a_checkpoint_says_what_to_install(
    evaluate, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = evaluate(PROBES / "vit", "--data", shapes / "held_out.jsonl")
    assert done.code == 1
    assert f"evaluating {str(PROBES / 'vit')!r} needs the package 'torch'" in done.err
    assert 'pip install "edgeclip[train]"' in done.err


# What does not fit


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "'nowhere' is not there; expected 'default', 'nano', the directory of"),
        (["MobileCLIP-S0:nowhere.pt"], 1, "'nowhere.pt' is not there"),
        (["FOLDER"], 1, "holds neither manifest.json (a bundle) nor config.json (a checkpoint)."),
        (["RUN"], 1, "Did you mean 'RUN/model'?"),
        (["default", "default"], 1, "'default/onnx-int8' is there twice, expected every model once"),
        (["default", "--variants", "onnx-fp16"], 1, "onnx-fp16"),
        (["default", "--json", "no-such/r.json"], 1, "'no-such/r.json': there is no directory 'no-such'"),
        (["default", "--labels", "nothing.txt"], 1, "label file 'nothing.txt' cannot be read"),
        (["default", "--templates", "nice"], 1, "templates: got 'nice'"),
        (["default", "--language", "de"], 1, "no alias in language 'de'"),
        (["default", "--max-left-out", "some"], 1, "limit of broken samples is 'some'"),
        (["default", "--ood", "nowhere"], 1, "'nowhere': no such file or folder"),
        (["default", "--corruptions", "fog,snow"], 2, "'snow' is not one of all, gaussian-noise"),
        (["default", "--corruptions", "fog", "--severities", "0-9"], 2, "'0-9': expected 1 to 5"),
        (["default", "--task", "retrieval", "--ood", "x"], 2, "--ood means nothing for retrieval"),
        (["default", "--captions", "zh"], 2, "--captions means nothing for zero-shot"),
        (["default", "--task", "retrieval"], 1, "none of its 16 pictures can be used"),
        ([], 2, "Missing argument 'MODEL...'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    evaluate, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}", encoding="utf-8")
    paths = {"FOLDER": str(tmp_path / "folder"), "RUN": str(tmp_path / "run")}
    done = evaluate(*(paths.get(each, each) for each in arguments), "--data", PHOTOS / "labels.csv")
    assert (done.code, done.out) == (code, "")
    assert message.replace("RUN", paths["RUN"]) in done.err
    if code == 1:
        assert done.err.count("\n") == 1


def test_pictures_without_labels_need_another_task(evaluate) -> None:
    done = evaluate("default", "--data", PHOTOS)
    assert done.code == 1
    assert "no picture has a label; expected a folder a class" in done.err


def test_a_file_for_each_language(evaluate, tiny_bundle: Path, colours: Path, tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("\n".join(NAMES), encoding="utf-8")
    (tmp_path / "loud.txt").write_text("\n".join(f"{name}!" for name in NAMES), encoding="utf-8")
    said = document(
        evaluate(tiny_bundle, "--data", colours, "--labels", f"en={tmp_path / 'en.txt'}",
                 "--labels", f"loud={tmp_path / 'loud.txt'}", "--templates", "loud=bare", "--json", "-")
    )  # fmt: skip
    assert said["languages"] == ["en", "loud"]
    assert said["templates"]["loud"] == ["{}"]
    twice = evaluate(tiny_bundle, "--data", colours, "--labels", f"en={tmp_path / 'en.txt'}",
                     "--labels", f"loud={tmp_path / 'loud.txt'}", "--language", "zh")  # fmt: skip
    assert twice.code == 2
    assert "--language takes aliases of one file" in twice.err


def test_labels_may_be_a_list(evaluate, tiny_bundle: Path, colours: Path) -> None:
    said = document(evaluate(tiny_bundle, "--data", colours, "--labels", ",".join(NAMES), "--json", "-"))
    assert (said["labels"], said["data"]["total"]) == (8, 32)
    more = ["colour of this very number " * 3 + str(number) for number in range(40)]  # no path is that long
    arguments = ["--labels", ",".join([*NAMES, *more]), "--templates", "x" * 300 + " {}", "--json", "-"]
    assert document(evaluate(tiny_bundle, "--data", colours, *arguments))["labels"] == 48
    refused = evaluate(tiny_bundle, "--data", colours, "--templates", "x" * 300)
    assert "one of 'bare', 'one', " in refused.err


def test_what_was_measured_is_shown_where_it_cannot_be_written(
    evaluate, tiny_bundle: Path, colours: Path, tmp_path: Path
) -> None:
    done = evaluate(tiny_bundle, "--data", colours, "--json", tmp_path / f"{'long' * 100}.json")
    assert done.code == 1
    assert "long.json' cannot be written: File name too long" in done.err
    assert "32 pictures, 8 labels" in done.out


def test_a_person_sees_how_far_it_is(
    evaluate, tiny_bundle: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = evaluate(tiny_bundle, "--data", colours, "--batch-size", 8)
    assert "pictures: 8 of 32" in done.err
    assert "pictures: 16 of 32, 0 s left" in done.err


def test_a_variant_that_cannot_run_here_is_said(
    evaluate, tiny_bundle: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeclip.errors import BackendError

    real = ZeroShotClassifier.open

    def refuses(bundle: Any, *, variant: str, **options: Any) -> Any:
        if variant == "onnx-int8":
            raise BackendError("it needs what is not here.")
        return real(bundle, variant=variant, **options)

    monkeypatch.setattr(ZeroShotClassifier, "open", refuses)
    done = evaluate(tiny_bundle, "--data", colours, "--json", "-")
    assert f"{tiny_bundle}/onnx-int8 is left out: it needs what is not here." in done.err
    said = document(done)
    assert [each["name"] for each in said["not_run"]] == [f"{tiny_bundle}/onnx-int8"]
    assert len(said["rows"]) == 1
