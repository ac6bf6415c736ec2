"""What ``edgeclip eval`` measures is what ``edgeclip classify`` answers: with contexts, heads, gates."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command
from picture_sets import clip_benchmark
from PIL import Image, ImageFilter
from tar_shards import make_shard
from tiny_bundle import colour_picture

from edgeclip.answers import Answers, crossed
from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.comparison import Settings, compare_zero_shot
from edgeclip.evaluate.metrics import expected_calibration_error
from edgeclip.evaluate.offered import Instead, offer, offer_instead
from edgeclip.evaluate.passes import Passes, choose
from edgeclip.evaluate.picture_sets import open_set
from edgeclip.evaluate.subjects import open_bundle
from edgeclip.evaluate.tables import WIDTH
from edgeclip.evaluate.zero_shot import evaluate_classifier, ranking_of
from edgeclip.few_shot import FewShotHead
from edgeclip.few_shot_fit import fit_head, without_class
from edgeclip.label_sets import LabelSet
from edgeclip.labels import LabelBank
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.tensors import write_tensors

PHOTOS = Path(__file__).parents[2] / "edgeclip/assets/photos"
NAMES = ("castle", "cat", "coffee", "crab", "dog", "koala", "panda", "parrot", "sheep")
ONE_THREAD = RuntimeOptions(threads=1)
CONTEXT = ("on snow", "a blurred {}")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder a name: a photograph, and what is left of it through worse and worse lenses."""
    root = tmp_path_factory.mktemp("photos")
    for name in NAMES:
        (root / name).mkdir()
        picture = Image.open(PHOTOS / f"{name}.jpg").convert("RGB").resize((128, 128))
        for number, radius in enumerate((0, 5, 8, 12)):
            picture.filter(ImageFilter.GaussianBlur(radius)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def head(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a head fitted on two pictures of each name but the last two."""
    names, path = NAMES[:-2], tmp_path_factory.mktemp("head") / "own.head"
    with ZeroShotClassifier.open(options=ONE_THREAD) as classifier:
        classifier.set_labels(names)
        images = classifier.embed_images([photos / name / f"{n}.png" for name in names for n in range(2)])
        model = classifier.bundle.manifest.model
        fit_head(
            images,
            np.repeat(np.arange(len(names)), 2),
            names,
            space=model.embedding_space,
            zero_shot=classifier.bank.embeddings,
            scale=model.scale,
        ).save(path)
    return path


@pytest.fixture(scope="module")
def bank(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bank whose rows no text has: those of names and pictures between."""
    path = tmp_path_factory.mktemp("bank") / "adapted.safetensors"
    with ZeroShotClassifier.open(options=ONE_THREAD) as classifier:
        classifier.set_labels(NAMES)
        images = classifier.embed_images([photos / name / "2.png" for name in NAMES])
        rows = classifier.bank.embeddings + 0.3 * images
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        path.write_bytes(replace(classifier.bank, embeddings=rows).to_bytes())
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def _evaluated(run: Command, *arguments: object) -> dict[str, Any]:
    done = run("eval", "default", *arguments, "--threads", 1, "--max-left-out", "50%", "--json", "-")
    assert done.code == 0, done.err
    said: dict[str, Any] = json.loads(done.out)
    return said


def _answered(run: Command, pictures: list[Path], *arguments: object) -> list[dict[str, Any]]:
    done = run("classify", *pictures, "--threads", 1, "--top-k", 99, "--jsonl", *arguments)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def _f1(given: list[set[str]], right: list[set[str]]) -> float:
    hits = sum(len(first & second) for first, second in zip(given, right, strict=True))
    return 2 * hits / (sum(map(len, given)) + sum(map(len, right)))


# What classify answers


@pytest.mark.parametrize("asked", [[], ["--reject"], ["--multi"], ["--multi", "--threshold", "-2"]])
@pytest.mark.parametrize("offered", ["labels", "context", "bank", "head"])
def test_eval_measures_what_classify_answers(
    run: Command, photos: Path, head: Path, bank: Path, asked: list[str], offered: str
) -> None:
    said = ["--head", head] if offered == "head" else ["--labels", ",".join(NAMES)]
    said = ["--label-file", bank] if offered == "bank" else said
    said += ["--context", ",".join(CONTEXT)] if offered == "context" else []
    names = NAMES[:-2] if offered == "head" else NAMES
    pictures = [path for name in names for path in sorted((photos / name).glob("*.png"))]
    right = [path.parent.name for path in pictures]
    answers = _answered(run, pictures, *said, *asked)
    if offered == "bank":
        said[0] = "--labels"
    found = _evaluated(run, "--data", photos, *said, *asked)
    assert found["asked"]["bank"] == (str(bank) if offered == "bank" else None)
    (row,) = found["rows"]
    assert row["zero_shot"][""]["n"] == len(pictures)
    first = [each["predictions"][0]["label"] if each["predictions"] else None for each in answers]
    hits = [guess == label for guess, label in zip(first, right, strict=True)]
    if not asked:
        assert row["zero_shot"][""]["top1"]["value"] == np.mean(hits) < 1
        assert "rejection" not in row
        return
    judged = row["rejection"][""]
    assert judged["threshold"] == pytest.approx(answers[0]["rejection"]["threshold"], rel=1e-5)
    assert judged["right"]["value"] == np.mean(hits) > 0
    assert judged["rejected"]["value"] == np.mean([each["rejected"] for each in answers])
    assert judged["wrong"]["value"] == np.mean(
        [guess not in (None, label) for guess, label in zip(first, right, strict=True)]
    )
    if "--multi" in asked:
        given = [{each["label"] for each in answer["predictions"]} for answer in answers]
        several = row["several_labels"][""]
        assert several["f1"]["value"] == pytest.approx(_f1(given, [{label} for label in right]))
        assert several["given"] == pytest.approx(np.mean([len(each) for each in given]))


@pytest.mark.parametrize(
    ("answers", "with_head"),
    [
        (Answers(), False),
        (Answers(context=CONTEXT), False),
        (Answers(reject=True), False),
        (Answers(multi=True, context=CONTEXT), False),
        (Answers(), True),
        (Answers(reject=True), True),
        (Answers(multi=True, threshold=-2.0), True),
    ],
)
def test_they_agree_picture_by_picture(photos: Path, head: Path, answers: Answers, with_head: bool) -> None:
    (subject,), _ = open_bundle("default", options=ONE_THREAD, answers=answers)
    with ZeroShotClassifier.open(options=ONE_THREAD, answers=answers) as classifier:
        if with_head:
            classifier.set_head(head)
        else:
            classifier.set_labels(NAMES)
        force = subject.in_force(str(head) if with_head else LabelSet.of(NAMES), None)
        with Passes([subject], batch_size=7) as passes:
            chosen = choose(open_set(photos), lambda picture: picture.source)
            done = 0
            for batch in passes.batches(chosen):
                ((_, rows),) = passes.embedded(batch)
                ranking = ranking_of(force, rows)
                for number, path in enumerate(batch.uses):
                    (outcome,) = classifier.classify_stream([path], top_k=len(force.names))
                    given = len(ranking.best[number]) if ranking.given is None else ranking.given[number]
                    labels = [force.names[each] for each in ranking.best[number][:given]]
                    # Where a gate takes all, five are ranked: what is asked of it is whether, not how many.
                    assert [each.label for each in outcome.predictions][: len(labels)] == labels
                    if labels:
                        assert ranking.similarity[number] == pytest.approx(
                            outcome.predictions[0].similarity, abs=1e-5
                        )
                    if outcome.rejection is not None:
                        assert ranking.gate is not None
                        assert ranking.gate[number] == pytest.approx(outcome.rejection.score, abs=1e-4)
                        assert bool(given) != outcome.rejection.rejected
                    done += 1
            assert done == 4 * len(NAMES)
    subject.close()


@pytest.mark.parametrize("offered", ["labels", "context", "bank", "head"])
def test_held_out_pictures_are_asked_without_their_own_label(
    run: Command, photos: Path, head: Path, bank: Path, offered: str
) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    said = ["--head", head] if offered == "head" else ["--labels", ",".join(NAMES)]
    said = ["--labels", bank] if offered == "bank" else said
    said += ["--context", ",".join(CONTEXT)] if offered == "context" else []
    held_out = _evaluated(run, "--data", photos, *said, "--reject")["rows"][0]["rejection"][""]["held_out"]
    asked = Answers(reject=True, context=CONTEXT if offered == "context" else ())
    inside, outside = [], []
    with ZeroShotClassifier.open(options=ONE_THREAD, answers=asked) as classifier:
        fitted = FewShotHead.open(head)
        names = fitted.names if offered == "head" else NAMES
        for name in names:
            images = classifier.embed_images(sorted((photos / name).glob("*.png")))
            for scores, everything in ((inside, True), (outside, False)):
                if offered == "head":
                    some = fitted if everything else without_class(fitted, name, choose=False)
                    classifier.set_head(some)
                elif offered == "bank":
                    whole = LabelBank.open(bank)
                    kept = [row for row, each in enumerate(NAMES) if everything or each != name]
                    labels = LabelSet.of([NAMES[row] for row in kept])
                    classifier.set_labels(replace(whole, labels=labels, embeddings=whole.embeddings[kept]))
                else:
                    classifier.set_labels([each for each in NAMES if everything or each != name])
                scores += [each.rejection for each in classifier.answer(images)]
    positive = [1] * len(inside) + [0] * len(outside)
    area = sklearn.roc_auc_score(positive, [each.score for each in inside + outside])
    assert held_out["auroc"]["gate"] == pytest.approx(area, abs=1e-9)
    assert held_out["accepted"]["value"] == np.mean([not each.rejected for each in outside])
    assert held_out["outside"] == held_out["inside"] == 4 * len(names)


def test_pictures_may_have_several_labels(run: Command, photos: Path, tmp_path: Path) -> None:
    pairs = [("castle", "crab"), ("cat", "coffee"), ("dog", "koala"), ("panda", "parrot")]
    rows, pictures = [], []
    for number, pair in enumerate(pairs):
        both = Image.new("RGB", (256, 128))
        for side, name in enumerate(pair):
            both.paste(Image.open(photos / name / "0.png"), (128 * side, 0))
        pictures.append(tmp_path / f"{number}.png")
        both.save(pictures[-1])
        rows.append({"image": f"{number}.png", "label": f"{pair[0]} | {pair[1]}"})
    table = tmp_path / "several.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = ["--multi", "--threshold", "-3"]
    answers = _answered(run, pictures, "--labels", ",".join(sorted(sum(pairs, ()))), *said)
    given = [{each["label"] for each in answer["predictions"]} for answer in answers]
    (row,) = _evaluated(run, "--data", table, *said)["rows"]
    several = row["several_labels"][""]
    assert several["f1"]["value"] == pytest.approx(_f1(given, [set(pair) for pair in pairs]))
    assert several["right"] == 2
    first = [answer["predictions"][0]["label"] for answer in answers]
    hits = [label in pair for label, pair in zip(first, pairs, strict=True)]
    assert row["zero_shot"][""]["top1"]["value"] == np.mean(hits)
    assert several["first_alone"]["value"] == pytest.approx(
        _f1([{each} for each in first], [set(p) for p in pairs])
    )
    assert row["rejection"][""]["held_out"]["outside"] == 4  # both labels of each are held out
    alone = run("eval", "default", "--data", table, "--labels", ",".join(NAMES), "--reject")
    assert "has the label 'castle | crab', which is not among the 9 offered" in alone.err


def test_a_bundle_s_own_labels_are_answered_with_what_was_fitted_to_them(
    run: Command, tiny_bundle: Path, tmp_path: Path
) -> None:
    """A temperature and a threshold of the bank, as classify takes them where no labels are given."""
    with BundleWriter(tiny_bundle) as writer:
        for name, kind, tensor, value in (
            ("warm", "temperature", "scale", 7.0), ("some", "reject", "threshold", 0.9)
        ):  # fmt: skip
            content = write_tensors({tensor: np.array([value], np.float32)}, {"method": "standardized"})
            file = writer.add(f"heads/{name}.safetensors", content)
            writer.manifest["heads"][name] = {"kind": kind, "file": file, "bank": "colours"}
        writer.commit()
    names = ("red", "blue", "white", "black")
    for name in names:
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(colour_picture(name, seed=number, noise=120)).save(
                tmp_path / name / f"{number}.png"
            )
    pictures = sorted(tmp_path.glob("*/*.png"))
    arguments = ["--data", tmp_path, "--own-labels", "--variants", "onnx-fp32", "--json", "-"]
    plain = run("eval", tiny_bundle, *arguments)
    assert plain.code == 0, plain.err
    said = json.loads(plain.out)
    assert (said["labels"], said["asked"]["own_labels"]) == (8, True)
    answers = _answered(run, pictures, "--bundle", tiny_bundle, "--variant", "onnx-fp32")
    first = [each["predictions"][0] for each in answers]
    hits = [each["label"] == path.parent.name for each, path in zip(first, pictures, strict=True)]
    report = said["rows"][0]["zero_shot"][""]
    assert report["top1"]["value"] == np.mean(hits)
    expected = expected_calibration_error([each["score"] for each in first], hits)
    assert report["calibration_error"] == pytest.approx(expected, abs=1e-4)
    several = run("eval", tiny_bundle, *arguments, "--multi")
    assert several.code == 0, several.err
    (row,) = json.loads(several.out)["rows"]
    answers = _answered(run, pictures, "--bundle", tiny_bundle, "--variant", "onnx-fp32", "--multi")
    given = [{each["label"] for each in answer["predictions"]} for answer in answers]
    right = [{path.parent.name} for path in pictures]
    assert row["several_labels"][""]["f1"]["value"] == pytest.approx(_f1(given, right))
    assert row["rejection"][""]["threshold"] == pytest.approx(0.9)
    assert row["rejection"][""]["held_out"] is None
    refused = run("eval", tiny_bundle, *arguments, "--labels", "red,blue")
    assert "--own-labels are the bundles'; leave out" in refused.err


# What is said


def test_the_commands_of_the_page_run(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = Path(__file__).parents[2]
    page = (repo / "docs/eval.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 7
    (tmp_path / "edgeclip").symlink_to(repo / "edgeclip")
    monkeypatch.chdir(tmp_path)
    (shown,) = re.findall(r"adds to the table:\n\n```\n(.*?)```", page, re.DOTALL)
    for number, command in enumerate(commands):
        done = run(*shlex.split(command)[1:])
        assert done.code == 0, done.err
        if number == 2:
            titles = shown.splitlines()[:2]  # thresholds change with the bundle
            assert done.out.splitlines()[-3:-1] == titles
            assert done.out.splitlines()[-1].startswith("default/onnx-int8")


def test_contexts_are_crossed_and_named(run: Command, photos: Path) -> None:
    arguments = ["--data", photos, "--labels", ",".join(NAMES), "--context", "on snow,at night",
                 "--context", "a blurred {}"]  # fmt: skip
    said = _evaluated(run, *arguments)
    wanted = crossed([["on snow", "at night"], ["a blurred {}"]])
    assert said["asked"] == {
        "own_labels": False, "head": None, "bank": None, "reject": False, "multi": False, "threshold": None,
        "context": list(wanted),
    }  # fmt: skip
    assert "prompts: 'a photo of a {}.', in 5 contexts" in run("eval", "default", *arguments).out


@pytest.mark.parametrize("asked", ["--reject", "--multi"])
def test_tables_fit_and_have_a_line_for_everything(
    run: Command, photos: Path, head: Path, asked: str, tmp_path: Path
) -> None:
    second = tmp_path / ("bundle-of-a-long-name-" * 3)
    shutil.copytree(Bundle.open("default").path, second)
    (tmp_path / "strange").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 90, 9)).save(tmp_path / "strange" / f"{number}.png")
    done = run("eval", "default", second, "--data", photos, "--labels", ",".join(NAMES), asked, "--ood",
               tmp_path / "strange")  # fmt: skip
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    blocks = 3 if asked == "--reject" else 4
    assert sum(line.startswith("default/") for line in lines) == blocks
    assert sum("long-name-/onnx-int8" in line for line in lines) == blocks
    assert "gate (g)" in done.out
    assert "held out: given one" in done.out
    assert ("first alone" in done.out) == (asked == "--multi")
    assert f"head: {head}"[:40] in run("eval", "default", "--data", photos, "--head", head,
                                       "--max-left-out", "50%").out  # fmt: skip


def test_where_no_other_label_is_left_nothing_is_held_out(run: Command, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cat").symlink_to(photos / "cat")
    found = _evaluated(run, "--data", tmp_path, "--reject")["rows"][0]["rejection"][""]
    assert found["held_out"] is None
    assert found["right"]["value"] >= 0.25
    table = run("eval", "default", "--data", tmp_path, "--reject").out
    assert table.splitlines()[-1].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reject", "--multi"], "--reject and --multi cannot be given together"),
        (["--threshold", "1"], "--threshold needs --reject or --multi"),
        (["--head", "x", "--context", "on snow"], "--context needs labels"),
        (["--head", "x", "--labels", "a,b"], "--head brings its own classes"),
        (["--head", "x", "--language", "zh"], "--head brings its own classes"),
        (["--labels", "x.safetensors", "--context", "on snow"], "a label bank brings its own templates"),
        (["--labels", "x.npy", "--templates", "bare"], "a label bank brings its own templates"),
        (["--task", "retrieval", "--reject"], "--reject means nothing for retrieval"),
        (["--task", "retrieval", "--context", "on snow"], "--context means nothing for retrieval"),
    ],
)
def test_what_means_nothing_is_refused(run: Command, arguments: list[str], said: str) -> None:
    done = run("eval", "default", "--data", PHOTOS / "labels.csv", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_head_that_is_not_there_and_a_bundle_that_cannot_reject(
    run: Command, colours: Path, tiny_bundle_session: Path
) -> None:
    missing = run("eval", "default", "--data", colours, "--head", "nothing.head")
    assert missing.code == 1
    assert "head 'nothing.head' cannot be read: No such file" in missing.err
    refused = run("eval", tiny_bundle_session, "--data", colours, "--reject")
    assert (refused.code, refused.out) == (1, "")
    assert "fit one with `edgeclip heads reject" in refused.err


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    for name in ("blue", "red"):
        (root / name).mkdir()
        Image.new("RGB", (32, 32), name).save(root / name / "0.png")
    return root


def _colour_head(space: str, names: tuple[str, ...] = ("red", "blue")) -> FewShotHead:
    return fit_head(np.eye(len(names), 16), range(len(names)), names, space=space)


def test_a_head_may_be_named_and_all_models_must_have_its_classes(
    run: Command, colours: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    with BundleWriter(tiny_bundle) as writer:
        space = writer.manifest["model"]["embedding_space"]
        file = writer.add("heads/own.safetensors", _colour_head(space).to_bytes())
        writer.manifest["heads"]["own"] = {"kind": "linear", "file": file}
        writer.commit()
    done = run("eval", tiny_bundle, "--data", colours, "--head", "own", "--json", "-")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["labels"], said["asked"]["head"], said["templates"]) == (2, "own", {"": []})
    # Without a class one would be left, which is no head.
    gated = run("eval", tiny_bundle, "--data", colours, "--head", "own", "--reject")
    assert "fitted without words on one picture a class" in gated.err
    subjects, _ = open_bundle(str(tiny_bundle), options=ONE_THREAD)
    turned = offer_instead(Instead("head", "own"), ("blue", "red"))
    with pytest.raises(InputError, match=r"offers 2 labels, first 'red'; expected the 2 .* first 'blue'"):
        compare_zero_shot(subjects, open_set(colours), turned)
    for subject in subjects:
        subject.close()


def test_numbers_of_a_set_are_classes_of_a_head_by_name(
    run: Command, tiny_bundle: Path, tmp_path: Path
) -> None:
    root = clip_benchmark(tmp_path / "wds")
    (root / "classnames.txt").write_text("red\ngreen\nblue\n", encoding="utf-8")
    for number in range(2):
        members: dict[str, bytes] = {}
        for row, name in enumerate(("red", "green", "blue")):
            Image.new("RGB", (32, 32), name).save(tmp_path / "one.png")
            members |= {f"s{row}.png": (tmp_path / "one.png").read_bytes(), f"s{row}.cls": b"%d" % row}
        make_shard(root / "test" / f"{number}.tar", members)
    with ZeroShotClassifier.open(tiny_bundle, options=ONE_THREAD) as classifier:
        images = classifier.embed_images([Image.new("RGB", (32, 32), name) for name in ("blue", "red")])
        space = classifier.bundle.manifest.model.embedding_space
    fit_head(images, [0, 1], ("blue", "red"), space=space).save(tmp_path / "own.head")
    done = run("eval", tiny_bundle, "--data", root, "--head", tmp_path / "own.head", "--max-left-out", 2,
               "--variants", "onnx-fp32", "--json", "-")  # fmt: skip
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["data"]["measured"] == 4
    assert said["rows"][0]["zero_shot"][""]["top1"]["value"] == 1.0
    assert said["data"]["left_out"][0]["reason"] == "has the label '1', which is not among the 2 offered."


def test_a_checkpoint_has_contexts_but_nothing_to_reject_by(run: Command, colours: Path) -> None:
    pytest.importorskip("torch")
    probe = Path(__file__).parents[1] / "data" / "probes" / "vit"
    arguments = [probe, "--data", colours, "--templates", "bare"]
    done = run("eval", *arguments, "--context", "on the left,at the top", "--json", "-")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["asked"]["context"]) == 2
    refused = run("eval", *arguments, "--reject")
    assert (refused.code, refused.out) == (1, "")
    assert "is no bundle: it has nothing to reject by" in refused.err


def test_a_classifier_that_rejects_has_no_ranking(head: Path) -> None:
    with ZeroShotClassifier.open(options=ONE_THREAD, answers=Answers(reject=True)) as classifier:
        classifier.set_labels(NAMES)
        with pytest.raises(ConfigError, match="eval --reject"):
            evaluate_classifier(classifier, [])
    from edgeclip.data import Sample

    with ZeroShotClassifier.open(options=ONE_THREAD) as classifier:
        classifier.set_head(head)
        report = evaluate_classifier(classifier, [Sample("cat", PHOTOS / "cat.jpg", label="cat")])
    assert (report.labels, report.top1.value) == (len(NAMES) - 2, 1.0)
    assert report.calibration_error is not None


def test_everything_goes_together(photos: Path, head: Path) -> None:
    """Corruptions, strangers, languages and a gate are measured at once, and do not change each other."""
    answers = Answers(reject=True)
    offered = offer([(None, LabelSet.of(NAMES))])
    (subject,), _ = open_bundle("default", options=ONE_THREAD, answers=answers)
    settings = Settings(limit=18)
    alone = compare_zero_shot([subject], open_set(photos), offered, settings=settings).rows[0]
    both = compare_zero_shot(
        [subject],
        open_set(photos),
        offered,
        corruptions=["fog"],
        severities=[3],
        ood=open_set(PHOTOS),
        settings=settings,
    ).rows[0]
    subject.close()
    assert alone.rejections == both.rejections
    assert alone.reports == both.reports
    assert both.ood[""].accepted is not None
    assert set(both.ood[""].auroc) == {"score", "similarity", "gate"}
