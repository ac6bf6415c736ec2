from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.answers import Answers, InForce
from edgeclip.bundle import PreprocessSpec
from edgeclip.classify import ZeroShotClassifier
from edgeclip.data import read_samples
from edgeclip.errors import BackendError, BundleError, ConfigError, InputError
from edgeclip.evaluate.comparison import Settings, compare_retrieval, compare_zero_shot
from edgeclip.evaluate.corruptions import CORRUPTIONS, corrupt
from edgeclip.evaluate.metrics import auroc, false_positive_rate
from edgeclip.evaluate.offered import offer
from edgeclip.evaluate.picture_sets import open_set
from edgeclip.evaluate.subjects import BundleSubject, force_of_labels, open_bundle
from edgeclip.evaluate.tables import WIDTH, comparison_table, grid, per_class_table
from edgeclip.evaluate.zero_shot import evaluate_classifier
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank

NAMES = tuple(COLOURS)
EACH = 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    for name in NAMES:
        (root / name).mkdir()
        for number in range(EACH):
            picture = Image.fromarray(colour_picture(name, seed=number, noise=90))
            picture.save(root / name / f"{number}.png")
            (root / name / f"{number}.txt").write_text(f"{name}\nsomething {name}\n", encoding="utf-8")
    return root


@pytest.fixture
def subjects(tiny_bundle_session: Path) -> Iterator[list[BundleSubject]]:
    opened, skipped = open_bundle(str(tiny_bundle_session))
    assert not skipped
    yield opened
    for subject in opened:
        subject.close()


class Stub:
    """A model that knows a picture by its mean colour, at a size of its own."""

    def __init__(self, name: str = "stub", size_px: int = 8) -> None:
        self.name = name
        self.preprocess = PreprocessSpec(image_size_px=(size_px, size_px))
        self.scale = 10.0
        self.about: dict[str, Any] = {"kind": "stub"}
        self.calls: list[tuple[int, ...]] = []
        self.templates: list[Templates | None] = []
        self.answers = Answers()

    def images(self, pictures: np.ndarray) -> np.ndarray:
        self.calls.append(pictures.shape)
        return self._unit(pictures.mean(axis=(1, 2)) - 127)

    def texts(self, texts: Any) -> np.ndarray:
        return self._unit(
            np.array([COLOURS[next(name for name in NAMES if name in text)] for text in texts]) - 127.0
        )

    def bank(self, labels: LabelSet, templates: Any, on_progress: Any = None) -> LabelBank:
        self.templates.append(templates)
        return LabelBank(labels, self.texts(labels.names), templates or Templates.of("openai-7"))

    def in_force(self, asked: Any, templates: Any, on_progress: Any = None) -> InForce:
        return force_of_labels(self, asked, templates, on_progress)

    def close(self) -> None: ...

    @staticmethod
    def _unit(rows: np.ndarray) -> np.ndarray:
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def offered(*names: str) -> Any:
    return offer([(None, LabelSet.of(names or NAMES))])


# Zero-shot


def test_a_row_is_what_the_classifier_says(pictures: Path, subjects: list[BundleSubject]) -> None:
    found = compare_zero_shot(subjects, open_set(pictures), offered(), settings=Settings(batch_size=7))
    assert [row.name.rpartition("/")[2] for row in found.rows] == sorted(
        row.name.rpartition("/")[2] for row in found.rows
    )
    assert len(found.rows) == 2
    for row in found.rows:
        bundle, _, variant = row.name.rpartition("/")
        with ZeroShotClassifier.open(bundle, variant=variant) as classifier:
            classifier.set_labels(NAMES)
            direct = evaluate_classifier(classifier, read_samples([pictures], folder_labels=True))
        report = row.reports[""]
        assert (report.n, report.top1, report.top5) == (direct.n, direct.top1, direct.top5)
        assert report.mean_per_class_recall == direct.mean_per_class_recall
        assert report.calibration_error == pytest.approx(direct.calibration_error, abs=1e-5)
        assert report.confusions == direct.confusions
        assert report.top1.value > 1 / 8
    assert found.data.measured == found.data.total == len(NAMES) * EACH
    assert (found.labels, found.seed, found.ood) == (8, None, None)


def test_agreement_is_with_the_first_row_on_the_same_pictures(
    pictures: Path, subjects: list[BundleSubject]
) -> None:
    rows = compare_zero_shot([*subjects, Stub()], open_set(pictures), offered()).rows
    assert rows[0].agreement == {}
    answers = []
    for subject in subjects:
        with ZeroShotClassifier.open(subject.name.rpartition("/")[0],
                                     variant=subject.about["variant"]) as classifier:  # fmt: skip
            classifier.set_labels(NAMES)
            outcomes = classifier.classify(sorted(pictures.glob("*/*.png")), top_k=1)
            answers.append([predictions[0].label for predictions in outcomes])
    expected = np.mean([first == second for first, second in zip(*answers, strict=True)])
    assert rows[1].agreement[""].value == expected
    assert rows[1].agreement[""].n == len(NAMES) * EACH
    assert rows[2].agreement[""].value > 0


def test_models_of_other_sizes_share_the_decoding(pictures: Path) -> None:
    small, large = Stub("small"), Stub("large", 16)
    twin = Stub("twin")
    found = compare_zero_shot(
        [small, large, twin], open_set(pictures), offered(), settings=Settings(batch_size=16, workers=3)
    )
    assert small.calls == twin.calls == [(16, 8, 8, 3), (16, 8, 8, 3), (8, 8, 8, 3)]
    assert large.calls[0] == (16, 16, 16, 3)
    assert found.rows[0].reports == found.rows[2].reports
    assert found.rows[2].agreement[""].value == 1.0


def test_templates_of_the_first_model_are_used_for_all(pictures: Path) -> None:
    first, second = Stub("a"), Stub("b")
    found = compare_zero_shot([first, second], open_set(pictures), offered())
    assert first.templates == [None]
    assert second.templates == [Templates.of("openai-7")]
    assert found.templates[""] == Templates.of("openai-7").texts
    given = offer([(None, LabelSet.of(NAMES))], templates=[(None, Templates.of("bare"))])
    assert compare_zero_shot([first], open_set(pictures), given).templates == {"": ("{}",)}


def test_languages_are_columns(pictures: Path) -> None:
    labels = LabelSet.of([{"name": name, "aliases": {"de": f"{name}lich"}} for name in NAMES])  # type: ignore[list-item]
    found = compare_zero_shot([Stub()], open_set(pictures), offer([(None, labels)], languages=["en", "de"]))
    (row,) = found.rows
    assert found.columns == ("en", "de")
    assert row.reports["en"] == row.reports["de"]


def test_every_corruption_is_measured_as_by_hand(pictures: Path) -> None:
    found = compare_zero_shot(
        [Stub("a"), Stub("b", 12)],
        open_set(pictures),
        offered(),
        corruptions=["fog", "brightness"],
        severities=[2, 5],
        seed=4,
        settings=Settings(batch_size=9, workers=2),
    )
    assert found.seed == 4
    for row, size_px in zip(found.rows, (8, 12), strict=True):
        stub = Stub("again", size_px)
        bank = stub.texts(NAMES)
        robustness = row.robustness[""]
        means = []
        for name in ("fog", "brightness"):
            for severity in (2, 5):
                hits = []
                for path in sorted(pictures.glob("*/*.png")):
                    image = Image.open(path).resize((size_px, size_px), Image.Resampling.BILINEAR)
                    key = path.relative_to(pictures).as_posix()
                    worse = corrupt(np.array(image), name, severity, key=key, seed=4)
                    best = np.argmax(bank @ stub.images(worse[None])[0])
                    hits.append(NAMES[best] == path.parent.name)
                assert robustness.corrupted[name][severity].value == np.mean(hits)
                means.append(np.mean(hits))
        assert robustness.mean < 1
        assert robustness.mean == pytest.approx(np.mean(means))
        assert robustness.clean == row.reports[""].top1
        assert robustness.retained == pytest.approx(np.mean(means) / row.reports[""].top1.value)


def test_pictures_without_a_label_are_told_apart_by_two_scores(pictures: Path, tmp_path: Path) -> None:
    for number in range(12):
        grey = np.full((8, 8, 3), 100 + number, np.uint8)
        Image.fromarray(grey).save(tmp_path / f"{number}.png")
    some = NAMES[:6]
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in some:
        (inside / name).symlink_to(pictures / name)
    found = compare_zero_shot(
        [Stub()], open_set(inside), offered(*some), ood=open_set(_without(tmp_path, inside))
    )
    apart = found.rows[0].ood[""]
    stub = Stub()
    bank = stub.texts(some)
    paths = [*sorted(inside.glob("*/*.png")), *sorted((tmp_path / "grey").glob("*.png"))]
    similarity = np.array(
        [
            bank @ stub.images(np.array(Image.open(path).resize((8, 8), Image.Resampling.BILINEAR))[None])[0]
            for path in paths
        ]
    )
    positive = np.arange(len(paths)) < 6 * EACH
    probability = np.exp(10 * similarity) / np.exp(10 * similarity).sum(axis=1, keepdims=True)
    for name, scores in (("similarity", similarity), ("score", probability)):
        assert apart.auroc[name] == pytest.approx(auroc(scores.max(axis=1), positive))
        assert apart.fpr95[name] == pytest.approx(false_positive_rate(scores.max(axis=1), positive))
    assert (apart.inside, apart.outside) == (6 * EACH, 12)
    assert found.ood is not None
    assert (found.ood.measured, found.ood.left_out) == (12, ())


def _without(root: Path, inside: Path) -> Path:
    (root / "grey").mkdir()
    for path in root.glob("*.png"):
        path.rename(root / "grey" / path.name)
    return root / "grey"


def test_what_cannot_be_read_is_left_out_for_all_and_named(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": str(path), "label": path.parent.name} for path in sorted(pictures.glob("*/*.png"))]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows.insert(3, {"image": "broken.png", "label": "red"})
    rows.insert(9, {"image": rows[0]["image"], "label": "beige"})
    rows.insert(11, {"image": rows[0]["image"]})
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = compare_zero_shot([Stub("a"), Stub("b", 9)], open_set(table), offered())
    broken, stray, bare = sorted(found.data.left_out, key=lambda each: each.reason)
    assert broken.key == "broken.png"
    assert "broken.png" in broken.reason
    assert bare.reason == "has the label 'beige', which is not among the 8 offered."
    assert stray.reason.startswith("has no label; expected a column 'label'")
    assert (found.data.total, found.data.taken, found.data.measured) == (43, 41, 40)
    assert {row.reports[""].n for row in found.rows} == {40}
    with pytest.raises(InputError, match=r"3 of 43 pictures cannot be used, expected at most 2"):
        compare_zero_shot([Stub()], open_set(table), offered(), settings=Settings(allowed=lambda total: 2))


def test_of_a_few_pictures_only_a_few_may_be_left_out(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": str(path), "label": path.parent.name} for path in sorted(pictures.glob("*/*.png"))]
    rows[::10] = [{"image": "broken.png", "label": "red"}] * 4
    (tmp_path / "broken.png").write_bytes(b"no picture")
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    every_tenth = Settings(limit=8, allowed=lambda total: total // 10)
    with pytest.raises(InputError, match=r"4 of 8 pictures cannot be used, expected at most 0.*broken"):
        compare_zero_shot([Stub()], open_set(table), offered(), settings=every_tenth)
    whole = compare_zero_shot(
        [Stub()], open_set(table), offered(), settings=Settings(allowed=every_tenth.allowed)
    )
    assert whole.data.measured == 36


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "a.png").write_bytes(b"no")
    with pytest.raises(InputError, match=r"none of 1 pictures can be read, first 'red/a.png'"):
        compare_zero_shot([Stub()], open_set(tmp_path), offered())


def test_labels_are_reported_one_by_one(pictures: Path) -> None:
    found = compare_zero_shot([Stub()], open_set(pictures), offered(), per_class=True)
    report = found.rows[0].reports[""]
    assert set(report.per_class) == set(NAMES)
    assert np.mean([each.value for each in report.per_class.values()]) == pytest.approx(
        report.mean_per_class_recall
    )
    assert sum(each.n for each in report.per_class.values()) == report.n


def test_what_is_asked_is_checked_first(pictures: Path) -> None:
    for asked, message in (
        ({"corruptions": ["snow"]}, "corruption 'snow' is not known"),
        ({"corruptions": ["fog"], "severities": [0]}, "severities: got 0"),
        ({"settings": Settings(batch_size=0)}, "batch_size is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_zero_shot([Stub()], open_set(pictures), offered(), **asked)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got no model"):
        compare_zero_shot([], open_set(pictures), offered())
    with pytest.raises(ConfigError, match="'stub' is there twice"):
        compare_zero_shot([Stub(), Stub()], open_set(pictures), offered())


def test_progress_ends_at_the_total(pictures: Path) -> None:
    said: list[tuple[str, int, int]] = []
    settings = Settings(batch_size=16, progress=lambda *each: said.append(each))
    compare_zero_shot([Stub()], open_set(pictures), offered(), settings=settings)
    assert said == [("pictures", 16, 40), ("pictures", 32, 40), ("pictures", 40, 40)]


# Retrieval


def test_captions_of_two_kinds_are_two_columns(pictures: Path, tmp_path: Path) -> None:
    rows = [
        {"image": str(path), "caption": f"a {path.parent.name} one", "caption_de": f"{path.parent.name}lich"}
        for path in sorted(pictures.glob("*/0.png"))
    ]
    del rows[2]["caption_de"]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = compare_retrieval([Stub()], open_set(table))
    (row,) = found.rows
    assert (found.columns, found.without) == (("alt", "de"), {"alt": 0, "de": 1})
    assert (row.retrieval["alt"].pictures, row.retrieval["de"].pictures) == (8, 7)
    assert row.retrieval["alt"].image_to_text[1].value > 0.5
    assert row.retrieval["alt"].image_to_text[10].value == 1.0
    only = compare_retrieval([Stub()], open_set(table), kinds=["de"])
    assert only.columns == ("de",)
    assert only.rows[0].retrieval["de"] == row.retrieval["de"]
    assert [each.reason for each in only.data.left_out] == ["has captions of the kinds alt, expected de."]
    with pytest.raises(InputError, match=r"none of its 8 pictures can be used.*expected zh"):
        compare_retrieval([Stub()], open_set(table), kinds=["zh"])
    with pytest.raises(InputError, match="none of 8 pictures measured has a caption of kind 'zh'"):
        compare_retrieval([Stub()], open_set(table), kinds=["alt", "zh"])


def test_a_kind_that_a_limit_leaves_out_is_no_column(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": str(path), "caption": path.parent.name} for path in sorted(pictures.glob("*/0.png"))]
    rows[-1]["caption_de"] = "selten"
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    few = compare_retrieval([Stub()], open_set(table), settings=Settings(limit=3))
    assert (few.columns, few.without) == (("alt",), {"alt": 0})
    assert compare_retrieval([Stub()], open_set(table), kinds=["alt", "alt"]).columns == ("alt",)
    with pytest.raises(InputError, match="none of 3 pictures measured has a caption of kind 'de'"):
        compare_retrieval([Stub()], open_set(table), kinds=["alt", "de"], settings=Settings(limit=3))


def test_pictures_with_several_captions(pictures: Path, subjects: list[BundleSubject]) -> None:
    found = compare_retrieval([*subjects, Stub()], open_set(pictures))
    for row in found.rows:
        report = row.retrieval["alt"]
        assert (report.pictures, report.texts) == (40, 16)
        assert report.text_to_image[1].n == 16
        assert report.image_to_text[1].value > 0.3


# Bundles


def test_variants_are_chosen_or_left_out(tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (only,), skipped = open_bundle(str(tiny_bundle_session), variants=["onnx-fp32"])
    assert (only.about["precision"], only.about["backend"], skipped) == ("fp32", "ort", [])
    only.close()
    with pytest.raises(BundleError, match="onnx-fp64"):
        open_bundle(str(tiny_bundle_session), variants=["onnx-fp64"])
    real = ZeroShotClassifier.open

    def refuses(bundle: Any, *, variant: str, **options: Any) -> Any:
        if variant in unable:
            raise BackendError(f"{variant} needs what is not here.")
        return real(bundle, variant=variant, **options)

    monkeypatch.setattr(ZeroShotClassifier, "open", refuses)
    unable = {"onnx-int8"}
    (only,), ((name, reason),) = open_bundle(str(tiny_bundle_session))
    only.close()
    assert (name.rpartition("/")[2], reason) == ("onnx-int8", "onnx-int8 needs what is not here.")
    with pytest.raises(BackendError, match="onnx-int8 needs"):
        open_bundle(str(tiny_bundle_session), variants=["onnx-int8"])
    unable = {"onnx-int8", "onnx-fp32"}
    with pytest.raises(BackendError, match="none of its variants can run here: onnx-"):
        open_bundle(str(tiny_bundle_session))


# Tables and JSON


def full(pictures: Path, **more: Any) -> Any:
    return compare_zero_shot(
        [Stub("checkpoints/of/a/model/with/a/long/name/" + letter) for letter in "ab"],
        open_set(pictures),
        offer([("en", LabelSet.of(NAMES)), ("zh", LabelSet.of([f"{name}的" for name in NAMES]))]),
        corruptions=list(CORRUPTIONS)[:3],
        severities=[1, 3],
        ood=open_set(pictures),
        per_class=True,
        **more,
    )


def test_tables_fit_a_hundred_columns(pictures: Path) -> None:
    text = comparison_table(full(pictures))
    assert max(map(len, text.splitlines())) <= WIDTH
    for part in ("en top-1", "zh top-1", "agree", "kept", "AUROC p", "gaussian-noise", "ECE"):
        assert part in text
    assert "40 pictures, 8 labels" in text
    retrieval = comparison_table(compare_retrieval([Stub("x" * 60)], open_set(pictures)))
    assert max(map(len, retrieval.splitlines())) <= WIDTH
    assert "alt: 40 pictures, 16 distinct texts" in retrieval
    classes = per_class_table(full(pictures)).splitlines()
    assert classes[0] == "top-1 of every label (en), %"
    assert len(classes) == 2 + len(NAMES)


def test_a_wide_grid_goes_on_below() -> None:
    header = ["name", *(f"column {number}" for number in range(12))]
    lines = grid(header, [["猫", *map(str, range(12))], ["long name", *["-"] * 12]], groups=[1, 8])
    assert lines[0].endswith("column 6")
    assert [line[:4] for line in lines] == ["name", "猫   ", "long", "", "name", "猫   ", "long"]
    assert lines[1].index("0") + 1 == lines[2].index("-")  # a Chinese character takes two columns


def test_json_holds_every_number(pictures: Path) -> None:
    said = json.loads(json.dumps(full(pictures).to_dict()))
    assert (said["task"], said["labels"], said["languages"]) == ("zero-shot", 8, ["en", "zh"])
    assert said["seeds"] == {"corruptions": 0}
    assert said["data"] == {
        "path": str(pictures), "total": 40, "taken": 40, "measured": 40, "left_out": []
    }  # fmt: skip
    row = said["rows"][1]
    assert row["zero_shot"]["zh"]["n"] == 40
    assert row["agreement"]["en"]["value"] == 1.0
    assert set(row["robustness"]["en"]["corruptions"]) == set(list(CORRUPTIONS)[:3])
    assert row["robustness"]["en"]["corruptions"]["shot-noise"]["severities"]["3"]["n"] == 40
    assert row["out_of_distribution"]["en"]["auroc"]["score"] == 0.5  # the same pictures twice
    assert len(row["zero_shot"]["en"]["per_class"]) == 8
    retrieval = json.loads(json.dumps(compare_retrieval([Stub()], open_set(pictures)).to_dict()))
    assert (retrieval["captions"], retrieval["without_caption"]) == (["alt"], {"alt": 0})
    assert retrieval["rows"][0]["retrieval"]["alt"]["text_to_image"]["r10"]["n"] == 16
