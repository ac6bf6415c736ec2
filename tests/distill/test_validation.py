from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeclip.data import read_samples  # noqa: E402
from edgeclip.distill.eager import EagerSubject, open_eager  # noqa: E402
from edgeclip.distill.recipe import (  # noqa: E402
    BundleTeacher,
    CheckpointTeacher,
    DataSpec,
    EmbeddingsTeacher,
    ValidationSpec,
    parse_recipe,
)
from edgeclip.distill.run import open_run  # noqa: E402
from edgeclip.distill.samples import open_samples  # noqa: E402
from edgeclip.distill.teachers import open_teacher  # noqa: E402
from edgeclip.distill.validation import Validation, open_validation  # noqa: E402
from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.evaluate.metrics import recall_at_k  # noqa: E402
from edgeclip.evaluate.zero_shot import evaluate_embedder  # noqa: E402
from edgeclip.label_sets import Templates, read_labels  # noqa: E402
from edgeclip.models.checkpoints import load_checkpoint, read_checkpoint_info  # noqa: E402
from edgeclip.preprocess import Preprocess  # noqa: E402
from edgeclip.shape_files import write_shapes  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

PROBES = Path(__file__).parent.parent / "data" / "probes"
CPU = torch.device("cpu")
COUNT = 90


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, train=8, held_out=COUNT, size_px=64, seed=5)
    return folder


@pytest.fixture(scope="module")
def probe() -> tuple[Any, Any, Tokenizer]:
    directory = PROBES / "vit"
    return load_checkpoint(directory), read_checkpoint_info(directory).config, Tokenizer.open(directory)


def measured(shapes: Path, probe: tuple[Any, Any, Tokenizer], **said: Any) -> dict[str, float]:
    return opened(shapes, **said).measure(*probe, device=CPU)


def opened(shapes: Path, *, captions: tuple[str, ...] = ("alt",), **said: Any) -> Validation:
    teachers = {name: teacher(name) for name in ("vit", "mobileclip")}
    data = DataSpec(paths=("held_out.jsonl",), captions=dict.fromkeys(captions, 1.0))
    samples = open_samples([shapes / "held_out.jsonl"])
    return open_validation(ValidationSpec(name="v", **said), data, samples, shapes, teachers)


def teacher(name: str) -> Any:
    return open_teacher(CheckpointTeacher(name=name, path=str(PROBES / name)), Path())


@pytest.mark.parametrize("language", [None, "zh"])
def test_zero_shot_is_what_evaluation_says(
    shapes: Path, probe: tuple[Any, Any, Tokenizer], language: str | None
) -> None:
    found = measured(shapes, probe, kind="zero-shot", labels="labels.json", language=language)
    subject = EagerSubject("probe", *probe)
    labels = read_labels(shapes / "labels.json")
    offered = labels if language is None else labels.in_language(language)
    report = evaluate_embedder(
        subject.images,
        read_samples([shapes / "held_out.jsonl"]),
        subject.bank(offered, Templates.of("bare")),
        labels=labels.names,
        preprocess=Preprocess(subject.preprocess),
        scale=subject.scale,
    )
    assert found["top1"] == report.top1.value > 0.8
    assert (found["top5"], found["mean_per_class_recall"]) == (
        report.top5.value,
        report.mean_per_class_recall,
    )
    assert found["calibration_error"] == pytest.approx(report.calibration_error)
    assert (found["pictures"], found["skipped"]) == (COUNT, 0)


@pytest.mark.parametrize("captions", [("alt",), ("zh",), ("alt", "zh")])
def test_retrieval_is_that_of_the_whole_matrix(
    shapes: Path, probe: tuple[Any, Any, Tokenizer], captions: tuple[str, ...]
) -> None:
    found = measured(shapes, probe, captions=captions, limit=40)
    samples = open_samples([shapes / "held_out.jsonl"])
    taken = [samples.read(number * COUNT // 40) for number in range(40)]
    subject = EagerSubject("probe", *probe)
    prepare = Preprocess(subject.preprocess)
    images = subject.images(np.stack([prepare(sample.image) for sample in taken]))
    said = [[text for kind in captions for text in sample.captions[kind]] for sample in taken]
    texts = sorted({text for each in said for text in each})
    relevant = np.array([[text in each for text in texts] for each in said])
    similarity = images @ subject.texts(texts).T
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == pytest.approx(recall_at_k(similarity, relevant, k=k))
        assert found[f"text_to_image_r{k}"] == pytest.approx(recall_at_k(similarity.T, relevant.T, k=k))
    assert (found["pictures"], found["texts"]) == (40, len(texts))
    assert found["image_to_text_r1"] > 0.8


def test_a_model_agrees_with_itself_and_less_with_another(
    shapes: Path, probe: tuple[Any, Any, Tokenizer]
) -> None:
    same = measured(shapes, probe, kind="teacher-agreement", teacher="vit")
    shares = ("neighbours", "cosine")
    for name in [f"{tower}_{each}" for tower in ("image", "text") for each in shares]:
        assert same[name] == pytest.approx(1, abs=1e-5), name
    assert same["image_to_text_matches"] == same["text_to_image_matches"] == 1
    other = measured(shapes, probe, kind="teacher-agreement", teacher="mobileclip")
    # Both know the shapes; nothing has brought their spaces together.
    assert 0.6 < other["image_to_text_matches"] < 1
    assert 0.02 < other["image_neighbours"] < 1
    assert abs(other["image_cosine"]) < 0.5
    assert (other["pictures"], other["skipped"]) == (COUNT, 0)


@pytest.mark.parametrize(
    "said",
    [
        {"kind": "zero-shot", "labels": "labels.json"},
        {"kind": "retrieval"},
        {"kind": "teacher-agreement", "teacher": "mobileclip"},
    ],
)
def test_only_a_few_pictures_are_held_at_a_time(
    shapes: Path, probe: tuple[Any, Any, Tokenizer], monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]
) -> None:
    whole = measured(shapes, probe, limit=50, **said)
    held: list[int] = []

    class Counted:
        def __len__(self) -> int:
            return COUNT

        def read(self, index: int) -> Any:
            held[-1] += 1
            return samples.read(index)

    images = EagerSubject.images

    def asked(subject: EagerSubject, pictures: Any) -> Any:
        held.append(0)
        return images(subject, pictures)

    samples: Any = open_samples([shapes / "held_out.jsonl"])
    monkeypatch.setattr(EagerSubject, "images", asked)
    monkeypatch.setattr("edgeclip.distill.validation._BATCH", 8)
    held.append(0)
    found = dataclasses.replace(opened(shapes, limit=50, **said), samples=Counted()).measure(
        *probe, device=CPU
    )
    assert held == [8] * 6 + [2, 0]
    assert found == pytest.approx(whole, abs=1e-5)


def test_a_teacher_of_another_size_sees_the_same_pictures(
    shapes: Path, probe: tuple[Any, Any, Tokenizer]
) -> None:
    from edgeclip.distill.inputs import Consumer, ViewForm
    from edgeclip.distill.objective import Embedded

    class Watching:
        name, image_dim, text_dim, parent = "w", 5, None, {}
        consumer = Consumer(ViewForm((48, 32), "bicubic"), None)

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def to(self, device: Any) -> Any:
            return self

        def ask(self, batch: Any, inputs: Any, *, parts: int = 1) -> Embedded:
            image = batch[inputs.image_name(self.consumer)]
            self.seen.append(image)
            return Embedded(image.float().mean((2, 3)) + torch.arange(3), ())

    data = DataSpec(paths=("held_out.jsonl",))
    spec = ValidationSpec(name="v", kind="teacher-agreement", teacher="w")
    samples = open_samples([shapes / "held_out.jsonl"])
    watching = Watching()
    teachers: Any = {"w": watching}
    found = open_validation(spec, data, samples, shapes, teachers).measure(*probe, device=CPU)
    assert {tuple(image.shape[1:]) for image in watching.seen} == {(3, 48, 32)}
    assert sorted(found) == ["image_neighbours", "pictures", "skipped", "texts"]


def test_a_teacher_that_is_only_compared_with_is_no_parent(shapes: Path) -> None:
    text = f"""
schema = 1
kind = "train"
name = "tiny"
[student]
checkpoint = "{PROBES / "vit"}"
[data.held_out]
paths = ["held_out.jsonl"]
[[teacher]]
kind = "checkpoint"
name = "other"
path = "{PROBES / "tinyclip"}"
[[stage]]
name = "a"
data = "held_out"
samples = 16
batch_size = 8
[[stage.loss]]
kind = "info-nce"
[[validation]]
name = "like"
kind = "teacher-agreement"
teacher = "other"
data = "held_out"
limit = 16
"""
    run = open_run(parse_recipe(text.encode()), shapes)
    assert run.teachers == {}
    assert [parent["role"] for parent in run.info()[0].parents] == ["start", "recipe"]
    student = run.student
    found = run.validations[0].measure(student.model, student.config, student.tokenizer, device=CPU)
    assert found["pictures"] == 16


def test_what_means_nothing_is_said(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kind = 'retrieval' got 'labels' 'labels.json', expected none"):
        opened(shapes, labels="labels.json")
    with pytest.raises(ConfigError, match=r"kind = 'zero-shot' got 'teacher' 'vit'"):
        opened(shapes, kind="zero-shot", labels="labels.json", teacher="vit")
    with pytest.raises(InputError, match="no alias in language 'de'"):
        opened(shapes, kind="zero-shot", labels="labels.json", language="de")
    np.save(tmp_path / "rows.npy", np.eye(3, dtype=np.float32))
    stored = open_teacher(EmbeddingsTeacher(name="s", image="rows.npy"), tmp_path)
    spec = ValidationSpec(name="v", kind="teacher-agreement", teacher="s")
    with pytest.raises(ConfigError, match="the teacher 's' cannot be asked about other pictures"):
        open_validation(spec, DataSpec(paths=("x",)), [], shapes, {"s": stored})  # type: ignore[arg-type]


def test_a_bundle_can_be_agreed_with(
    shapes: Path, probe: tuple[Any, Any, Tokenizer], tiny_bundle_session: Path
) -> None:
    spec = BundleTeacher(name="b", path=str(tiny_bundle_session))
    entry = ValidationSpec(name="v", kind="teacher-agreement", teacher="b", limit=12)
    samples, data = open_samples([shapes / "held_out.jsonl"]), DataSpec(paths=("held_out.jsonl",))
    teachers = {"b": open_teacher(spec, shapes)}
    found = open_validation(entry, data, samples, shapes, teachers).measure(*probe, device=CPU)
    assert found["pictures"] == 12
    assert {"image_neighbours", "text_neighbours", "image_to_text_matches"} <= set(found)
    assert "image_cosine" not in found  # 96 and 16 dimensions


def test_a_recipe_must_name_its_teacher(shapes: Path) -> None:
    text = """
schema = 1
kind = "train"
name = "tiny"
[student]
model = "tiny-vit"
[data.held_out]
paths = ["held_out.jsonl"]
[[stage]]
name = "a"
data = "held_out"
samples = 16
batch_size = 8
loss = [{ kind = "info-nce" }]
[[validation]]
name = "like"
data = "held_out"
kind = "teacher-agreement"
teacher = "nobody"
"""
    with pytest.raises(
        ConfigError, match=r"\[\[validation\]\] 0: 'teacher' is 'nobody', expected one of \[\]"
    ):
        parse_recipe(text.encode())


def test_a_label_that_is_not_offered_is_named(
    shapes: Path, probe: tuple[Any, Any, Tokenizer], tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n", encoding="utf-8")
    validation = opened(shapes, kind="zero-shot", labels=str(tmp_path / "labels.txt"))
    with pytest.raises(InputError, match=r"validation 'v': a picture has the label '.*', which is not among"):
        validation.measure(*probe, device=CPU)


def test_an_eager_subject_says_what_it_is() -> None:
    subject = open_eager(str(PROBES / "vit"))
    assert subject.about["model"] == "probe-vit"
    assert (subject.about["kind"], subject.about["backend"]) == ("checkpoint", "torch")
    assert subject.about["parameters"] > 100_000
    with pytest.raises(ConfigError, match="device 'cuda:77' cannot be used"):
        open_eager(str(PROBES / "vit"), device="cuda:77")
