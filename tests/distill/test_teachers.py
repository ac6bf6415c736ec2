from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from msgspec.structs import replace  # noqa: E402
from train_runs import (  # noqa: E402
    FASTVIT,
    SIZE_PX,
    STAGE,
    assert_same_weights,
    make_data,
    recipe_text,
    run,
    steps,
    weights,
)

from edgeclip.distill.augment import RandomResizedCrop  # noqa: E402
from edgeclip.distill.batches import to_float  # noqa: E402
from edgeclip.distill.inputs import Inputs  # noqa: E402
from edgeclip.distill.lineage import licence_of  # noqa: E402
from edgeclip.distill.objective import Embedded  # noqa: E402
from edgeclip.distill.randomness import Randomness  # noqa: E402
from edgeclip.distill.recipe import (  # noqa: E402
    CheckpointTeacher,
    DataSpec,
    OpenClipTeacher,
    StoredTeacher,
    parse_recipe,
)
from edgeclip.distill.run import open_run  # noqa: E402
from edgeclip.distill.samples import open_samples  # noqa: E402
from edgeclip.distill.student import open_student  # noqa: E402
from edgeclip.distill.teachers import OnlineTeacher, open_teacher  # noqa: E402
from edgeclip.errors import ConfigError, InputError, MissingExtraError  # noqa: E402
from edgeclip.models.checkpoints import CheckpointInfo, read_checkpoint_info, save_checkpoint  # noqa: E402
from edgeclip.models.clip import build_clip  # noqa: E402
from edgeclip.models.config import CLIPConfig, TextTransformerConfig, ViTConfig  # noqa: E402
from edgeclip.models.foreign import save_foreign  # noqa: E402
from edgeclip.models.zoo import MODELS, clip_config  # noqa: E402
from edgeclip.pictures import decode_image  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

TEACHERS = """
[[teacher]]
kind = "checkpoint"
name = "same"
path = "same/model"
scale = 30
[[teacher]]
kind = "checkpoint"
name = "wide"
path = "wide"
scale = 50
"""
# Another width, size, interpolation, normalization and tokenizer than the student's.
WIDE = CLIPConfig(
    name="wide",
    image=ViTConfig(
        width=32, heads=(2,), hidden_dims=(64,), head_dim=16, patch_px=16, grid=(3, 3), embed_dim=40
    ),
    text=TextTransformerConfig(
        vocab_size=49408,
        context_length=20,
        width=16,
        heads=(1,),
        hidden_dims=(32,),
        head_dim=16,
        embed_dim=40,
    ),
    image_size_px=(48, 48),
    interpolation="bicubic",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a trained teacher of the student's kind, and a foreign-looking one under research terms."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    run(folder, folder / "same")
    torch.manual_seed(0)
    save_wide(folder / "wide", licence="apple-amlr")
    return folder


def save_wide(path: Path, *, licence: str) -> None:
    info = CheckpointInfo(config=WIDE, scale=50.0, tokenizer_files={}, licence=licence)
    save_checkpoint(build_clip(WIDE), path, info, tokenizer_files=Tokenizer.clip(20).files)


def with_losses(*losses: str) -> str:
    return STAGE + "".join(f"[[stage.loss]]\n{loss}\n" for loss in losses) + TEACHERS


EVERY_LOSS = with_losses(
    'kind = "affinity"\nteachers = ["same", "wide"]\nteacher_weights = [2, 1]',
    'kind = "interactive"\nteacher = "same"',
    'kind = "feature"\nteacher = "wide"\nweight = 10',
    'kind = "feature"\nteacher = "same"\ntower = "image"\ndistance = "smooth-l1"',
)


def test_every_teacher_sees_the_student_s_crop_and_captions_its_own_way(folder: Path) -> None:
    opened = open_run(parse_recipe(recipe_text(folder, EVERY_LOSS).encode()), folder)
    stage = opened.recipe.stage[0]
    inputs = opened.inputs(stage)
    sample = open_samples([folder / "shapes" / "train.jsonl"]).read(5)
    randomness = Randomness(0, 0, 5)
    arrays = inputs(sample, randomness)
    same, wide = opened.teachers["same"].consumer, opened.teachers["wide"].consumer
    assert sorted(arrays) == ["image", "image:1", "tokens", "tokens:1"]  # equal forms once
    assert (inputs.image_name(same), inputs.tokens_name(same)) == ("image", "tokens")
    assert (inputs.image_name(wide), inputs.tokens_name(wide)) == ("image:1", "tokens:1")

    picture = decode_image(sample.image)
    crop = inputs.augmentation.transforms[0]
    assert isinstance(crop, RandomResizedCrop)
    (box,) = inputs.augmentation.sample(randomness.stream("view"), (picture.height, picture.width))
    large = dataclasses.replace(crop, size_px=(48, 48), interpolation="bicubic").apply(picture, box)
    assert np.array_equal(arrays["image:1"], np.array(large).transpose(2, 0, 1))
    assert np.array_equal(arrays["image"], np.array(crop.apply(picture, box)))
    (caption,) = sample.captions["alt"]
    assert np.array_equal(arrays["tokens:1"], Tokenizer.clip(20)([caption], truncate=True))
    assert np.array_equal(arrays["tokens"], Tokenizer.open(folder / "tokenizer")([caption], truncate=True))


def test_rand_augment_and_synthetic_captions_are_shared_too(folder: Path) -> None:
    student = open_student(parse_recipe(recipe_text(folder).encode()), folder)
    data = DataSpec(paths=("x",), rand_augment=2, captions={"alt": 1.0})
    inputs = Inputs.of(data, 2, [student.consumer])
    assert [type(each).__name__ for each in inputs.augmentation.transforms] == [
        "RandomResizedCrop",
        "RandAugment",
    ]
    assert [dict(mix.weights) for mix in inputs.captions] == [{"alt": 1.0}, {"synthetic": 1.0}]
    sample = open_samples([folder / "shapes" / "train.jsonl"]).read(0)
    with pytest.raises(InputError, match="expected synthetic"):
        inputs(sample, Randomness(0, 0, 0))
    both = dataclasses.replace(sample, captions={**sample.captions, "synthetic": ("a thing",)})
    assert inputs(both, Randomness(0, 0, 0))["tokens"].shape == (2, 16)


def test_a_teacher_is_frozen_and_normalizes_its_own_way(folder: Path) -> None:
    teacher = open_teacher(CheckpointTeacher(name="wide", path="wide"), folder)
    holder = torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    image = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    tokens = torch.from_numpy(Tokenizer.clip(20)(["a", "b", "c", "d"])).view(2, 2, 20)
    said = teacher(image, tokens)
    assert isinstance(said, Embedded)
    expected = teacher.model.encode_image(to_float(image, mean=WIDE.mean, std=WIDE.std))
    assert torch.equal(said.image, expected)
    assert not said.image.requires_grad
    for caption in (0, 1):
        assert torch.allclose(said.texts[caption], teacher.model.encode_text(tokens[:, caption]), atol=1e-6)


def test_every_loss_runs_beside_teachers_and_resumes(folder: Path, tmp_path: Path) -> None:
    teacher = weights(folder / "same")
    _, heard = run(folder, tmp_path / "whole", EVERY_LOSS, student=FASTVIT)
    assert sorted(steps(heard)[0]["parts"]) == [
        "0-info-nce",
        "1-affinity",
        "2-interactive",
        "3-feature",
        "4-feature",
    ]
    run(folder, tmp_path / "parts", EVERY_LOSS, student=FASTVIT, stop_after=5)
    run(folder, tmp_path / "parts", EVERY_LOSS, student=FASTVIT)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    after = weights(folder / "same")
    assert all(torch.equal(after[name], teacher[name]) for name in teacher)
    assert not any("adapter" in name for name in weights(tmp_path / "whole"))


def test_parts_ask_teachers_the_same(folder: Path, tmp_path: Path) -> None:
    _, whole = run(folder, tmp_path / "whole", EVERY_LOSS)
    _, parts = run(folder, tmp_path / "parts", EVERY_LOSS, changes=("stage.0.parts=2",))
    assert [e["loss"] for e in steps(parts)] == pytest.approx([e["loss"] for e in steps(whole)], rel=1e-3)


@pytest.mark.slow
def test_distillation_brings_the_student_to_the_teacher(folder: Path, tmp_path: Path) -> None:
    head = STAGE[: STAGE.index("[[stage.loss]]")]
    stage = head + '[[stage.loss]]\nkind = "affinity"\nteachers = ["same"]\n' + TEACHERS
    _, heard = run(folder, tmp_path, stage, changes=("stage.0.samples=1280",))
    losses = [entry["loss"] for entry in steps(heard)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert min(losses) > 0  # a divergence


def test_two_captions_a_picture(folder: Path, tmp_path: Path) -> None:
    table = folder / "shapes" / "two.jsonl"
    lines = (folder / "shapes" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    table.write_text(
        "".join(
            json.dumps({**json.loads(line), "syn_text": ["a shape", "a drawing"]}) + "\n" for line in lines
        ),
        encoding="utf-8",
    )
    changes = ("stage.0.texts=2", 'data.train.paths=["shapes/two.jsonl"]', "stage.0.samples=96")
    _, heard = run(folder, tmp_path, EVERY_LOSS, changes=changes)
    assert steps(heard)[0]["parts"]["0-info-nce"] > 5  # the sum over both captions


def test_the_student_records_its_parents_and_takes_the_strictest_licence(
    folder: Path, tmp_path: Path
) -> None:
    result, heard = run(folder, tmp_path, EVERY_LOSS, changes=("stage.0.samples=96",))
    info = read_checkpoint_info(tmp_path / "model")
    assert [(parent["role"], parent["name"]) for parent in info.parents] == [
        ("teacher", "tiny"),
        ("teacher", "wide"),
        ("recipe", "tiny"),
    ]
    assert (info.licence, result.licence) == ("apple-amlr", "apple-amlr")
    assert [each.text for each in heard if each.kind == "remark"] == [
        "the student may be used for research only (apple-amlr), because it descends from wide"
    ]


def test_a_student_may_start_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    text = recipe_text(folder).replace("[student]\n", '[student]\ncheckpoint = "same/model"\n')
    head, tail = text.split("[student.config]")[0], text[text.index("[data.train]") :]
    recipe = parse_recipe((head.replace('tokenizer = "tokenizer"', "") + tail).encode())
    student = open_student(recipe, folder)
    theirs = weights(folder / "same")
    assert all(torch.equal(value, theirs[name]) for name, value in student.model.state_dict().items())
    assert student.tokenizer.digest == Tokenizer.open(folder / "tokenizer").digest
    assert (student.parents[0]["role"], student.parents[0]["file"]) == ("start", "model")


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["apple-amlr", "MIT"], "apple-amlr"),
        (["(apple-amlr) AND MIT", "MIT"], "(apple-amlr) AND MIT"),
        (["NOASSERTION", "MIT"], "NOASSERTION"),
        (["Apache-2.0 AND MIT", "Apache-2.0"], "Apache-2.0 AND MIT"),
        (["Apache-2.0 OR GPL-2.0-only"], "(Apache-2.0 OR GPL-2.0-only) AND MIT"),
    ],
)
def test_models_of_one_name_do_not_hide_each_other_s_licence(licences: list[str], expected: str) -> None:
    parents = [{"name": "tiny", "licence": licence} for licence in licences]
    assert licence_of("MIT", parents)[0] == expected


@pytest.mark.parametrize(
    ("licences", "expected", "reason"),
    [
        ([], "MIT", ""),
        (["MIT"], "MIT", ""),
        (["Apache-2.0"], "Apache-2.0 AND MIT", "by its parents"),
        (["Apache-2.0", "NOASSERTION"], "NOASSERTION", "nobody says that of m1"),
        (["NOASSERTION", "apple-amlr"], "apple-amlr", r"research only \(apple-amlr\), because .* m1"),
    ],
)
def test_the_strictest_licence_wins(licences: list[str], expected: str, reason: str) -> None:
    parents = [{"name": f"m{at}", "licence": licence} for at, licence in enumerate(licences)]
    found, said = licence_of("MIT", parents)
    assert found == expected
    assert bool(said) == bool(reason)
    assert re.search(reason, said)


@pytest.mark.slow
def test_a_published_file_may_teach_and_begin(folder: Path, tmp_path: Path) -> None:
    name = "TinyCLIP-ViT-8M-16-Text-3M"
    config = clip_config(name)
    torch.manual_seed(0)
    model = build_clip(config).eval()
    save_foreign(model, config, tmp_path / "weights.safetensors", source="hf")
    teacher = open_teacher(CheckpointTeacher(name="t", path="weights.safetensors", model=name), tmp_path)
    assert teacher.consumer.form.size_px == config.image_size_px
    assert teacher.mean == config.mean
    assert (teacher.parent["name"], teacher.parent["source"]) == (name, "hf")
    image = torch.randint(0, 256, (1, 3, *config.image_size_px), dtype=torch.uint8)
    tokens = torch.from_numpy(teacher.consumer.tokenizer(["a cat"]))
    said = teacher(image, tokens[:, None])
    with torch.no_grad():
        wanted = model.encode_image(to_float(image, mean=config.mean, std=config.std))
        assert torch.allclose(said.image, wanted, atol=1e-5)
        assert torch.allclose(said.texts[0], model.encode_text(tokens), atol=1e-5)
    text = recipe_text(folder)
    student = f'[student]\nmodel = "{name}"\ncheckpoint = "weights.safetensors"\n'
    text = text.split("[student]")[0] + student + text[text.index("[data.train]") :]
    begun = open_student(parse_recipe(text.encode()), tmp_path)
    assert begun.parents[0]["name"] == name
    assert begun.tokenizer.digest == Tokenizer.clip().digest


# What cannot be


def test_stored_teachers_are_not_run(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher 'kept': kind = 'stored' .* cannot be run"):
        open_teacher(StoredTeacher(name="kept", slice=(0, 32)), folder)


def test_a_teacher_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        open_teacher(CheckpointTeacher(name="t", path="nowhere"), folder)


def test_a_tokenizer_of_another_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    info = CheckpointInfo(config=WIDE, scale=50.0, tokenizer_files={})
    save_checkpoint(build_clip(WIDE), tmp_path, info, tokenizer_files=Tokenizer.clip(21).files)
    with pytest.raises(ConfigError, match=r"teacher 't': the tokenizer gives 49408 ids in rows of 21"):
        open_teacher(CheckpointTeacher(name="t", path="."), tmp_path)


def test_our_own_models_of_the_zoo_need_a_tokenizer(folder: Path) -> None:
    name = next(name for name, entry in MODELS.items() if entry.tokenizer == "edgeclip-bpe")
    text = recipe_text(folder)
    text = text.split("[student]")[0] + f'[student]\nmodel = "{name}"\n' + text[text.index("[data.train]") :]
    with pytest.raises(ConfigError, match=f"the model '{name}' reads ids of kind 'edgeclip-bpe'"):
        open_student(parse_recipe(text.encode()), folder)


def test_without_open_clip_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"teacher 'big'.*edgeclip\[openclip\]"):
        open_teacher(OpenClipTeacher(name="big", model="ViT-B-32", pretrained="w.safetensors"), folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_open_clip_teachers_give_open_clip_s_embeddings(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision_shim")
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIZE_PX, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 18, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-openclip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-openclip.json")
    theirs = open_clip.create_model("tiny-openclip").eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    spec = OpenClipTeacher(name="big", model="tiny-openclip", pretrained="w.safetensors")
    teacher = open_teacher(spec, tmp_path)
    assert isinstance(teacher, OnlineTeacher)
    assert (teacher.image_dim, teacher.consumer.form.size_px) == (24, (SIZE_PX, SIZE_PX))
    assert teacher.parent["licence"] == "NOASSERTION"
    stated = open_teacher(replace(spec, licence="CC0-1.0"), tmp_path)
    assert stated.parent["licence"] == "CC0-1.0"
    image = torch.randint(0, 256, (2, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8)
    tokens = torch.from_numpy(teacher.consumer.tokenizer(["a cat", "a dog"]))
    said = teacher(image, tokens[:, None])
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    with torch.no_grad():
        assert torch.allclose(said.image, theirs.encode_image(to_float(image, mean=mean, std=std)), atol=1e-6)
        assert torch.allclose(said.texts[0], theirs.encode_text(tokens.long()), atol=1e-6)

    for change, message in (
        ({"pretrained": "openai"}, r"'pretrained' is 'openai', which is no file .*downloads nothing"),
        ({"model": "ViT-Z"}, "open_clip knows no model 'ViT-Z'"),
        ({"model": "roberta-ViT-B-32"}, r"of another library \(hf_"),
        ({"model": "ViT-B-32"}, r"'w.safetensors' cannot be loaded as 'ViT-B-32'"),
    ):
        values = {"name": "big", "model": "tiny-openclip", "pretrained": "w.safetensors", **change}
        with pytest.raises(ConfigError, match=message):
            open_teacher(OpenClipTeacher(**values), tmp_path)

    # Files do not say how their pictures are prepared, open_clip's list does.
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}
    listed = {"plain": {"url": "", "hf_hub": "", **plain}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-openclip", listed)
    one = open_teacher(spec, tmp_path)
    assert (one.mean, one.std, one.consumer.form.interpolation) == (*list(plain.values())[:2], "bilinear")
    assert torch.allclose(
        one(image, None).image, theirs.encode_image(to_float(image, mean=one.mean, std=one.std)), atol=1e-6
    )
    listed["other"] = {"url": "", "hf_hub": "", **plain, "mean": (0.5, 0.5, 0.5)}
    with pytest.raises(
        ConfigError, match=r"say with 'tag' .* which 'w.safe.*' is, one of \['other', 'plain'\]"
    ):
        open_teacher(spec, tmp_path)
    assert open_teacher(replace(spec, tag="other"), tmp_path).mean == (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"'tag' is 'third', expected one .*\['other', 'plain'\]"):
        open_teacher(replace(spec, tag="third"), tmp_path)
