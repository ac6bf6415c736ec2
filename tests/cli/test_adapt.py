"""``edgeclip adapt``: banks for pictures of one's own, without a label on them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command, Result
from PIL import Image
from tiny_bundle import COLOURS, colour_picture, make_tiny_bundle

from edgeclip.bundle import Bundle
from edgeclip.classify import ZeroShotClassifier
from edgeclip.distill import adapt as adaptation
from edgeclip.distill.adapt import read_about
from edgeclip.labels import LabelBank

NAMES = ",".join(COLOURS)
EACH = 6


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder a colour; all pictures are pale, and noisy."""
    folder = tmp_path_factory.mktemp("pale")
    for name in COLOURS:
        (folder / name).mkdir()
        for seed in range(EACH):
            pale = 140 + 0.4 * (colour_picture(name, seed=seed, noise=40).astype(np.float64) - 128)
            Image.fromarray(pale.astype(np.uint8)).save(folder / name / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny bundle of another embedding space."""
    directory = tmp_path_factory.mktemp("other") / "bundle"
    make_tiny_bundle(directory, seed=5)
    return directory


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "bank.safetensors"


def adapted(run: Command, bundle: Path, pictures: Path, out: Path, *more: object) -> Result:
    return run("adapt", bundle, "--images", pictures, "--labels", NAMES, "-o", out, *more)


def accuracy(bundle: Path, pictures: Path, bank: LabelBank | None) -> float:
    shown = sorted(pictures.glob("*/*.png"))
    with ZeroShotClassifier.open(bundle) as classifier:
        classifier.set_labels(list(COLOURS) if bank is None else bank)
        found = classifier.classify(shown, top_k=1)
    return float(
        np.mean([each[0].label == path.parent.name for each, path in zip(found, shown, strict=True)])
    )


def test_a_bank_for_pale_colours_is_better_and_classify_takes_it(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path
) -> None:
    result = adapted(run, tiny_bundle, pictures, out, "--check", pictures, "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert (said["schema"], said["kind"], said["method"], said["written"]) == (1, "adapt", "vectors", True)
    assert (said["pictures"], said["labels"], said["duplicates"], said["left_out"]) == (48, 8, 0, 0)
    assert said["reliable"]
    assert (said["check"]["n"], said["check"]["adapted_on"]) == (48, 48)
    assert said["witness"] is None
    bank = LabelBank.open(out)
    assert bank.names == tuple(COLOURS)
    assert bank.space == Bundle.open(tiny_bundle).manifest.model.embedding_space
    before, after = accuracy(tiny_bundle, pictures, None), accuracy(tiny_bundle, pictures, bank)
    assert before < 1
    assert after > before
    assert said["check"]["before"]["value"] == pytest.approx(before)
    assert said["check"]["after"]["value"] == pytest.approx(after)
    used = run("classify", pictures, "--bundle", tiny_bundle, "--label-file", out, "--json")
    assert used.code == 0
    first = [each["predictions"][0]["label"] for each in json.loads(used.out)["results"]]
    own = [path.parent.name for path in sorted(pictures.glob("*/*.png"))]
    assert np.mean([a == b for a, b in zip(first, own, strict=True)]) == pytest.approx(after)


def test_the_bank_says_how_it_was_made_and_no_path(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path
) -> None:
    assert adapted(run, tiny_bundle, pictures, out, "--seed", 3).code == 0
    about = read_about(out.read_bytes())
    assert about is not None
    assert (about["method"], about["seed"], about["pictures"], about["teacher"]) == ("vectors", 3, 48, None)
    assert len(about["pictures_sha256"]) == 64
    assert about["reasons"] == []
    assert str(pictures) not in out.read_bytes().decode("latin-1")


def test_the_same_pictures_give_the_same_bytes_wherever_they_lie(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(pictures, elsewhere)
    other = tmp_path / "other.safetensors"
    assert adapted(run, tiny_bundle, pictures, out).code == 0
    assert adapted(run, tiny_bundle, elsewhere, other).code == 0
    assert out.read_bytes() == other.read_bytes()


def test_pictures_that_are_there_twice_count_once(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(pictures, twice / "a")
    shutil.copytree(pictures, twice / "b")
    assert adapted(run, tiny_bundle, pictures, out).code == 0
    once = read_about(out.read_bytes())
    said = json.loads(adapted(run, tiny_bundle, twice, out, "--json").out)
    assert (said["pictures"], said["duplicates"]) == (48, 48)
    assert once is not None
    assert said["pictures_sha256"] == once["pictures_sha256"]


def test_adapted_labels_are_not_taken_for_the_texts_later(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path
) -> None:
    assert adapted(run, tiny_bundle, pictures, out).code == 0
    with ZeroShotClassifier.open(tiny_bundle) as classifier:
        classifier.set_labels(["red", "blue"])
        texts = classifier.bank.embeddings.copy()
        classifier.set_labels(LabelBank.open(out))
        classifier.set_labels(["red", "blue"])
        assert np.array_equal(classifier.bank.embeddings, texts)


def test_what_cannot_be_relied_on_is_not_written_but_by_force(
    run: Command, tiny_bundle: Path, out: Path, tmp_path: Path
) -> None:
    noise = tmp_path / "noise"
    noise.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(noise / f"{number}.png")
    result = adapted(run, tiny_bundle, noise, out)
    assert result.code == 3
    assert "reason: labels explain" in result.out
    assert "nothing is written (--force writes it)" in result.out
    assert not out.exists()
    forced = adapted(run, tiny_bundle, noise, out, "--force")
    assert forced.code == 0
    assert "by force" in forced.out
    about = read_about(out.read_bytes())
    assert about is not None
    assert about["reasons"]


def test_labelled_pictures_that_get_worse_are_a_reason(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"  # the folder says another colour than the adapted bank will
    first = adapted(run, tiny_bundle, pictures, out)
    assert first.code == 0
    with ZeroShotClassifier.open(tiny_bundle) as classifier:
        shown = sorted(pictures.glob("*/*.png"))
        texts = classifier.classify(shown, top_k=1) if classifier.set_labels(list(COLOURS)) is None else []
    for path, found in zip(shown, texts, strict=True):
        (wrong / found[0].label).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, wrong / found[0].label / f"{path.parent.name}{path.name}")
    out.unlink()
    result = adapted(run, tiny_bundle, pictures, out, "--check", wrong)
    assert "100.0% [" in result.out  # right before, by the way these labels were made
    assert result.code == 3
    assert "reason: labelled pictures are right less often than before" in result.out
    assert not out.exists()


def test_labels_are_looked_at_before_anything_is_embedded(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    for folder in ("unreadable", "flat"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"no picture")
    result = adapted(run, tiny_bundle, tmp_path / "unreadable", out, "--check", tmp_path / "flat")
    assert result.code == 1
    assert "first 'a.png': has no label." in result.err
    (tmp_path / "flat" / "mauve").mkdir()
    (tmp_path / "flat" / "a.png").rename(tmp_path / "flat" / "mauve" / "a.png")
    result = adapted(run, tiny_bundle, tmp_path / "unreadable", out, "--check", tmp_path / "flat")
    assert "has the label 'mauve', which is not offered" in result.err
    result = run("adapt", tiny_bundle, "--images", tmp_path / "unreadable", "--labels", "red", "-o", out)
    assert "got 1 label, expected at least two" in result.err


def test_a_witness_that_rather_says_what_was_said_before_is_a_reason(
    run: Command, tiny_bundle: Path, other_bundle: Path, pictures: Path, out: Path
) -> None:
    assert adapted(run, tiny_bundle, pictures, out).code == 0
    alone = LabelBank.open(out).embeddings
    out.unlink()
    # The bundle itself never finds another label likelier than the one that it says first.
    result = adapted(run, tiny_bundle, pictures, out, "--witness", tiny_bundle)
    assert result.code == 3
    assert "reason: the witness expects" in result.out
    assert not out.exists()
    said = json.loads(
        adapted(run, tiny_bundle, pictures, out, "--witness", tiny_bundle, "--force", "--json").out
    )
    assert said["witness"]["embedding_space"] == Bundle.open(tiny_bundle).manifest.model.embedding_space
    assert said["judgement"]["witness"] < 0
    assert np.array_equal(LabelBank.open(out).embeddings, alone)
    said = json.loads(
        adapted(run, tiny_bundle, pictures, out, "--witness", other_bundle, "--json", "--force").out
    )
    assert said["witness"]["embedding_space"] == Bundle.open(other_bundle).manifest.model.embedding_space


def test_nano_asks_the_default_model_unless_told_otherwise(
    run: Command, repo: Path, out: Path, tmp_path: Path
) -> None:
    shown = sorted((repo / "edgeclip/assets/photos").glob("*.jpg"))[:8]
    labels = ",".join(path.stem.split("-")[0] for path in shown[:4])
    for number, path in enumerate(shown):
        with Image.open(path) as photo:
            photo.convert("RGB").resize((96, 96)).save(tmp_path / f"{number}.png")
    asked = ("--images", tmp_path, "--labels", labels, "-o", out, "--force", "--json")
    said = json.loads(run("adapt", "nano", *asked).out)
    assert said["witness"]["embedding_space"] == Bundle.open("default").manifest.model.embedding_space
    assert said["judgement"]["witness"] is not None
    said = json.loads(run("adapt", "nano", *asked, "--witness", "none").out)
    assert (said["witness"], said["judgement"]["witness"]) == (None, None)


def test_a_program_without_torch_opens_the_bank_and_gets_the_same_numbers(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path
) -> None:
    assert adapted(run, tiny_bundle, pictures, out).code == 0
    shown = sorted(pictures.glob("*/*.png"))
    with ZeroShotClassifier.open(tiny_bundle) as classifier:
        classifier.set_labels(LabelBank.open(out))
        expected = [[each.label, each.score] for each, *_ in classifier.classify(shown, top_k=1)]
    program = """
import json, sys
sys.modules["torch"] = None
from edgeclip.classify import ZeroShotClassifier
from edgeclip.labels import LabelBank
with ZeroShotClassifier.open(sys.argv[1]) as classifier:
    classifier.set_labels(LabelBank.open(sys.argv[2]))
    found = classifier.classify(sys.argv[3:], top_k=1)
print(json.dumps([[each.label, each.score] for each, *_ in found]))
"""
    said = subprocess.run(
        [sys.executable, "-c", program, tiny_bundle, out, *shown], capture_output=True, text=True, check=True
    )
    assert json.loads(said.stdout) == expected


def test_another_bundle_teaches(
    run: Command, tiny_bundle: Path, other_bundle: Path, pictures: Path, out: Path
) -> None:
    result = adapted(run, tiny_bundle, pictures, out, "--teacher", other_bundle, "--json", "--force")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["teacher"]["embedding_space"] == Bundle.open(other_bundle).manifest.model.embedding_space
    assert said["strength"] == 0.7
    assert said["judgement"]["follows"] is not None
    assert LabelBank.open(out).space == Bundle.open(tiny_bundle).manifest.model.embedding_space


def test_stored_embeddings_teach_what_their_bundle_does(
    run: Command, tiny_bundle: Path, other_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    teacher = other_bundle
    rows, bank = tmp_path / "rows.npy", tmp_path / "labels.safetensors"
    assert run("embed", pictures, "--bundle", teacher, "-o", rows).code == 0
    backwards = ",".join(reversed(COLOURS))  # found by their names, not by their order
    assert run("labels", "build", "--bundle", teacher, "--labels", backwards, "-o", bank).code == 0
    asked = ("--teacher", rows, "--teacher-bank", bank, "--teacher-scale", 20, "--force")
    assert adapted(run, tiny_bundle, pictures, out, *asked).code == 0
    stored = LabelBank.open(out)
    assert adapted(run, tiny_bundle, pictures, out, "--teacher", teacher, "--force").code == 0
    assert np.abs(stored.embeddings - LabelBank.open(out).embeddings).max() < 1e-4


def test_teachers_that_do_not_fit_are_refused(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    rows, bank = tmp_path / "rows.npy", tmp_path / "labels.safetensors"
    np.save(rows, np.ones((5, 16), np.float32))
    assert run("labels", "build", "--bundle", tiny_bundle, "--labels", NAMES, "-o", bank).code == 0
    asked = ("--teacher", rows, "--teacher-bank", bank)
    result = adapted(run, tiny_bundle, pictures, out, *asked)
    assert (result.code, "has 5 rows" in result.err, "holds 48 pictures" in result.err) == (1, True, True)
    np.save(rows, np.ones((48, 7), np.float32))
    result = adapted(run, tiny_bundle, pictures, out, *asked)
    assert result.code == 1
    assert "rows of 7, its bank of 16 dimensions" in result.err
    rows.write_bytes(b"nothing")
    result = adapted(run, tiny_bundle, pictures, out, *asked)
    assert result.code == 1
    assert "cannot be read as a .npy file" in result.err
    assert run("labels", "build", "--bundle", tiny_bundle, "--labels", "red,blue", "-o", bank).code == 0
    result = adapted(run, tiny_bundle, pictures, out, *asked)
    assert result.code == 1
    assert "holds other labels than are offered, first 'black'" in result.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--labels", NAMES, "--method", "prompts"], 2, "--method prompts needs --checkpoint"),
        (["--labels", NAMES, "--checkpoint", "x"], 2, "belong to --method prompts"),
        (["--labels", NAMES, "--teacher", "x.npy"], 2, "needs --teacher-bank"),
        (["--labels", NAMES, "--teacher-scale", "3"], 2, "need --teacher"),
        (["--labels", NAMES, "--teacher", "a", "--witness", "b"], 2, "cannot be given together"),
        (
            [
                "--labels",
                NAMES,
                "--method",
                "prompts",
                "--checkpoint",
                "x",
                "--teacher",
                "a",
                "--strength",
                "1",
            ],
            2,
            "means nothing to prompts",
        ),
        ([], 2, "give --labels or --label-file"),
        (["--labels", "red"], 1, "got 1 label, expected at least two"),
        (["--labels", ",".join(map(str, range(30)))], 1, "got 48 different pictures for 30 labels"),
        (
            ["--labels", NAMES, "--limit", "15"],
            1,
            "got 15 different pictures for 8 labels, expected at least 16",
        ),
        (["--labels", NAMES, "--max-left-out", "x"], 1, "limit of broken samples is 'x'"),
    ],
)
def test_what_means_nothing_is_refused(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, options: list[str], code: int, said: str
) -> None:
    result = run("adapt", tiny_bundle, "--images", pictures, "-o", out, *options)
    assert (result.code, said in " ".join(result.err.split())) == (code, True), result.err
    assert not out.exists()


def test_paths_that_are_not_there_are_refused_before_anything_is_done(
    run: Command, tiny_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    result = adapted(run, tiny_bundle, tmp_path / "nowhere", tmp_path / "b.safetensors")
    assert (result.code, "nowhere" in result.err) == (1, True)
    result = adapted(run, tiny_bundle, pictures, tmp_path / "nowhere" / "b.safetensors")
    assert (result.code, "there is no directory" in result.err) == (1, True)
    (tmp_path / "folder.safetensors").mkdir()
    result = adapted(run, tiny_bundle, pictures, tmp_path / "folder.safetensors")
    assert (result.code, "is a directory" in result.err) == (1, True)
    result = adapted(run, tiny_bundle, pictures, tmp_path / "b.npy")
    assert (result.code, "does not end in .safetensors" in result.err) == (2, True)
    result = adapted(run, tmp_path / "nobundle", pictures, tmp_path / "b.safetensors")
    assert (result.code, "nobundle" in result.err) == (1, True)


def test_broken_pictures_are_counted_and_too_many_end_it(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pictures, broken)
    (broken / "red" / "broken.png").write_bytes(b"no picture")
    result = adapted(run, tiny_bundle, broken, out, "--max-left-out", 0)
    assert result.code == 1
    assert "1 of 49 pictures cannot be used, expected at most 0" in result.err
    assert not out.exists()
    said = json.loads(adapted(run, tiny_bundle, broken, out, "--max-left-out", 1, "--json").out)
    assert (said["left_out"], said["pictures"]) == (1, 48)


def test_a_bank_of_another_space_and_a_bundle_without_a_text_tower_are_refused(
    run: Command, tiny_bundle: Path, other_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "labels.safetensors"
    assert run("labels", "build", "--bundle", other_bundle, "--labels", NAMES, "-o", bank).code == 0
    result = run("adapt", tiny_bundle, "--images", pictures, "--label-file", bank, "-o", out)
    assert result.code == 1
    assert "label bank of embedding space" in result.err
    make_tiny_bundle(tmp_path / "slim", text_tower=False)
    result = run("adapt", tmp_path / "slim", "--images", pictures, "--labels", "one,two", "-o", out)
    assert result.code == 1
    assert "text tower" in result.err


def test_a_finished_bank_is_adapted_where_there_is_no_text_tower(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "labels.safetensors"
    assert run("labels", "build", "--bundle", tiny_bundle, "--labels", NAMES, "-o", bank).code == 0
    assert run("adapt", tiny_bundle, "--images", pictures, "--label-file", bank, "-o", out).code == 0
    from_bank = LabelBank.open(out)
    assert adapted(run, tiny_bundle, pictures, out).code == 0
    assert np.abs(from_bank.embeddings - LabelBank.open(out).embeddings).max() < 1e-6


def test_prompts_without_torch_name_the_extra(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "edgeclip.distill.learned_prompts", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = adapted(run, tiny_bundle, pictures, out, "--method", "prompts", "--checkpoint", "x")
    assert result.code == 1
    assert 'pip install "edgeclip[train]"' in result.err


@pytest.mark.usefixtures("one_thread")
def test_prompts_of_the_default_model_make_a_bank(
    run: Command, repo: Path, out: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    shown = sorted((repo / "edgeclip/assets/photos").glob("*.jpg"))[:8]
    labels = ",".join(path.stem.split("-")[0] for path in shown[:4])
    for number, path in enumerate(shown):
        with Image.open(path) as photo:
            photo.convert("RGB").resize((96, 96)).save(tmp_path / f"{number}.png")
    checkpoint = repo / "tests/data/default-checkpoint"
    asked: list[Any] = ["--labels", labels, "--method", "prompts", "--force", "--threads", 1, "-o", out]
    result = run("adapt", "default", "--images", tmp_path, *asked, "--checkpoint", checkpoint)
    assert result.code == 0, result.err
    about = read_about(out.read_bytes())
    assert about is not None
    assert (about["method"], about["strength"]) == ("prompts", 0.3)
    result = run(
        "adapt", "default", "--images", tmp_path, *asked, "--checkpoint", checkpoint, "--teacher", "nano"
    )
    assert result.code == 0, result.err
    about = read_about(out.read_bytes())
    assert about is not None
    assert (about["teacher"]["name"], about["strength"]) == (Bundle.open("nano").manifest.model.name, None)
    other = repo / "tests/data/probes/vit"
    result = run("adapt", "default", "--images", tmp_path, *asked, "--checkpoint", other)
    assert result.code == 1
    assert "expected the checkpoint that the bundle was exported from" in result.err


def test_an_interrupt_leaves_nothing(
    run: Command, tiny_bundle: Path, pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adaptation, "adapt", interrupted)
    result = adapted(run, tiny_bundle, pictures, out)
    assert result.code == 130
    assert list(out.parent.glob("*bank*")) == []
