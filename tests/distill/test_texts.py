"""Training a text tower on texts without pictures."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from train_runs import assert_same_weights, run_recipe, steps, weights  # noqa: E402

from edgeclip.distill import student as student_module  # noqa: E402
from edgeclip.distill.batches import BatchLoader, BatchPlan, Caption  # noqa: E402
from edgeclip.distill.forward import embed_texts  # noqa: E402
from edgeclip.distill.prompts import Prompted, Writer, open_prompts  # noqa: E402
from edgeclip.distill.recipe import PromptSpec, Recipe, parse_recipe  # noqa: E402
from edgeclip.distill.run import dry_run_of, open_run  # noqa: E402
from edgeclip.distill.texts import open_texts  # noqa: E402
from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.models import checkpoints  # noqa: E402
from edgeclip.models.checkpoints import (  # noqa: E402
    CheckpointInfo,
    ExternalWeights,
    load_checkpoint,
    read_checkpoint_info,
    save_checkpoint,
)
from edgeclip.models.clip import build_clip  # noqa: E402
from edgeclip.models.config import BagTextConfig, CLIPConfig, PosteriorImageConfig  # noqa: E402
from edgeclip.tokenizer import Tokenizer, train_bpe  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

EMBED = 16
COLOURS = (
    "red", "green", "blue", "violet", "orange", "purple", "yellow", "crimson", "scarlet", "turquoise", "grey",
    "pink",
)  # fmt: skip
THINGS = ("circle", "triangle", "hexagon", "star", "heart")
# A stage in which the image tower stands still.
STILL = """batch_size = 32
optimizer = {{ learning_rate = 1e-2, weight_decay = 0.0 }}
train_scale = false
[[stage.group]]
match = "image_tower.*"
learning_rate = 0
[[stage.loss]]
"""
RECIPE = (
    """
schema = 1
kind = "train"
name = "bag"
seed = 5
[student]
tokenizer = "tokenizer"
[student.config]
image_size_px = [32, 32]
[student.config.image]
kind = "vit"
width = 16
heads = [1]
hidden_dims = [16]
head_dim = 16
patch_px = 16
grid = [2, 2]
embed_dim = 16
[student.config.text]
kind = "bag"
vocab_size = {vocab}
context_length = 16
pad_id = {pad}
width = 32
heads = 4
hidden_dim = 32
embed_dim = 16
[data.texts]
texts = ["texts.jsonl"]
pictures = "pictures.npy"
[data.texts.prompts.alt]
templates = ["a picture of {{}}", "zh"]
bare = 0.5
drop = 0.3
before = ["big", "the"]
before_share = 0.2
[data.pairs]
texts = ["pairs.jsonl"]
pictures = "pictures.npy"
[[teacher]]
kind = "embeddings"
name = "t"
text = "targets.npy"
[[stage]]
name = "targets"
data = "texts"
samples = 1280
"""
    + STILL
    + """
kind = "feature"
teacher = "t"
tower = "text"
distance = "cosine"
[[stage.loss]]
kind = "picture-match"
teacher = "t"
pictures = 8
weight = 0.1
"""
)
ALIGN = (
    """
[[stage]]
name = "alignment"
data = "pairs"
samples = 640
"""
    + STILL
    + """
kind = "info-nce"
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty texts of two words, targets that add up from the words, and a picture for each first word."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    train_bpe([*texts * 20, "a picture of", "the big", "see"], vocab_size=600, context_length=16).to_files(
        folder / "tokenizer"
    )
    random = np.random.default_rng(0)
    pictures = random.normal(size=(12, EMBED)).astype(np.float32)
    things = random.normal(size=(5, EMBED)).astype(np.float32)
    targets = pictures[np.arange(60) // 5] + things[np.arange(60) % 5]
    np.save(folder / "pictures.npy", pictures)
    np.save(folder / "targets.npy", targets)
    np.save(folder / "two.npy", targets[:2])
    write_table(
        folder / "texts.jsonl", [{"text": text, "weight": 1 + row % 3} for row, text in enumerate(texts)]
    )
    write_table(
        folder / "pairs.jsonl", [{"text": text, "pictures": [row // 5]} for row, text in enumerate(texts)]
    )
    return folder


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder: Path, *changes: str, more: str = "") -> Recipe:
    tokenizer = Tokenizer.open(folder / "tokenizer")
    text = (RECIPE + more).format(vocab=tokenizer.vocab_size, pad=tokenizer.config.special.pad)
    return parse_recipe(text.encode(), changes=changes)


# Tables of texts


def test_a_text_is_a_sample_with_one_caption_and_no_picture(tmp_path: Path) -> None:
    rows = [{"text": "cat", "kind": "en", "weight": 2}, {"text": "猫", "kind": "zh", "weight": 0.5}]
    texts = open_texts([write_table(tmp_path / "a.jsonl", rows)])
    assert (len(texts), texts.key(1), texts.most_pictures) == (2, "a.jsonl:2", 0)
    assert dict(texts.read(1).captions) == {"zh": ("猫",)}
    assert texts.weights is not None
    assert texts.weights.tolist() == [2.0, 0.5]
    again = open_texts([write_table(tmp_path / "b.jsonl", [*rows, {"text": "dog"}])])
    assert again.digest != texts.digest


def test_texts_of_one_weight_have_none(tmp_path: Path) -> None:
    assert open_texts([write_table(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])]).weights is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"txt": "b"}], r"a.jsonl', line 2: .*txt"),
        ([{"text": ""}], r"line 1: got the text ''"),
        ([{"text": " "}], r"line 1: got the text ' '"),
        ([{"text": "a", "weight": 0}], r"line 1: got the text 'a', the weight 0.0"),
        ([{"text": "a", "pictures": [3, -1]}], r"the pictures \[3, -1\]"),
        ([{"text": "a", "pictures": [3]}, {"text": "b"}], r"'a.jsonl:2' has no 'pictures'"),
        ([], r"hold no line"),
    ],
)
def test_a_table_that_cannot_be_used_names_the_line(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    path = write_table(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=message):
        open_texts([path])


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.jsonl' cannot be read"):
        open_texts([tmp_path / "nothing.jsonl"])


def test_heavy_texts_are_drawn_as_often_as_their_weight_says() -> None:
    weights = np.array([1.0, 7.0, 0.25, 2.0, 1.5] * 20)
    plan = BatchPlan(100, 10, seed=1, weights=weights)
    first, second = plan.order(0), plan.order(1)
    expected = weights / weights.sum() * 100
    for order in (first, second):
        counts = np.bincount(order, minlength=100)
        assert np.abs(counts - expected).max() < 1
    assert first.tolist() == plan.order(0).tolist()
    assert sorted(first) != sorted(second)
    # Rounding goes another way in each epoch, so that the light ones come in their turn.
    mean = np.mean([np.bincount(plan.order(epoch), minlength=100) for epoch in range(400)], axis=0)
    assert np.abs(mean - expected).max() < 0.12


def test_a_text_that_comes_twice_gets_another_prompt_each_time(folder: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "one.jsonl", [{"text": "a red circle", "weight": 50}, {"text": "a star"}])
    table = f'data.texts.texts=["{tmp_path / "one.jsonl"}"]'
    opened = open_run(recipe(folder, table, "stage.0.batch_size=2", 'teacher.0.text="two.npy"'), folder)
    stage = opened.recipe.stage[0]
    batches = BatchLoader(opened.data["texts"], opened.plan(stage), opened.inputs(stage)).batches()
    rows = [tuple(row) for _ in range(20) for row in next(batches)["tokens"][:, 0].tolist()]
    assert len(set(rows)) > 10


# Prompts


def prompts(**spec: Any) -> Any:
    return open_prompts({"en": PromptSpec(**spec)}, Path(), where="[data.x]")


def drawn(prompts: Any, text: str = "grey wolf", kind: str = "en") -> list[Prompted]:
    rng = np.random.default_rng(0)
    return [prompts.draw(Caption(kind, 0, text), rng) for _ in range(4000)]


def test_prompts_come_as_often_as_they_should() -> None:
    said = drawn(
        prompts(templates=("one", "one", "see {}!"), bare=0.4, before=("old",), before_share=0.1, drop=0.2)
    )
    counts = Counter(prompted.whole.replace("old ", "") for prompted in said)
    assert counts["grey wolf"] / 4000 == pytest.approx(0.4, abs=0.03)
    assert counts["a photo of a grey wolf."] / 4000 == pytest.approx(0.4, abs=0.03)
    assert counts["see grey wolf!"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert sum("old grey wolf" in prompted.whole for prompted in said) / 4000 == pytest.approx(0.1, abs=0.02)
    assert sum(prompted.drop is not None for prompted in said) / 4000 == pytest.approx(0.2, abs=0.03)
    assert {prompted.text for prompted in said} == {"grey wolf"}


def test_a_kind_without_prompts_stays_as_it_is() -> None:
    assert {prompted.whole for prompted in drawn(prompts(templates=("see {}",)), kind="zh")} == {"grey wolf"}


def test_templates_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("look: {}\n\nlook: {}\nno, {}\n", encoding="utf-8")
    opened = open_prompts({"en": PromptSpec(templates=("mine.txt",))}, tmp_path, where="x")
    counts = Counter(prompted.whole for prompted in drawn(opened))
    assert counts["look: grey wolf"] / 4000 == pytest.approx(2 / 3, abs=0.03)
    assert counts.keys() == {"look: grey wolf", "no, grey wolf"}


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (("openai-81",), r"\[data.x\]: prompts.en: 'openai-81' is no template"),
        (("{} and {}",), r"'{} and {}' has 2 places"),
        (("gone.txt",), r"gone.txt' cannot be read"),
        (("empty.txt",), r"empty.txt' holds no line"),
    ],
)
def test_templates_that_are_none_are_named(templates: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        open_prompts({"en": PromptSpec(templates=templates)}, tmp_path, where="[data.x]")


@pytest.mark.parametrize("tokenizer", [Tokenizer.clip(), None], ids=["clip", "own"])
def test_one_token_of_the_caption_and_none_of_its_prompt_is_dropped(
    tokenizer: Tokenizer | None, folder: Path
) -> None:
    tokenizer = tokenizer or Tokenizer.open(folder / "tokenizer")
    ids = tokenizer.encode("red turquoise star")
    whole = Prompted("see ", "red turquoise star", ".")
    write = Writer(tokenizer)
    assert write(whole).tolist() == tokenizer("see red turquoise star.")[0].tolist()
    found = {tuple(write(replace(whole, drop=share / 50)).tolist()) for share in range(50)}
    special = tokenizer.config.special
    around = [[] if each is None else [each] for each in (special.start, special.end)]
    expected = set()
    for lost in range(len(ids)):
        kept = tokenizer.encode("see ") + ids[:lost] + ids[lost + 1 :] + tokenizer.encode(".")
        row = around[0] + kept + around[1]
        expected.add(tuple(row + [special.pad] * (tokenizer.context_length - len(row))))
    assert found == expected


def test_short_texts_and_long_rows_are_safe(folder: Path) -> None:
    tokenizer = Tokenizer.open(folder / "tokenizer")
    assert Writer(tokenizer)(Prompted("", "a", "", drop=0.9)).tolist() == tokenizer("a")[0].tolist()
    long = Writer(tokenizer)(Prompted("", "green star " * 30, "", drop=0.0))
    assert long.shape == (tokenizer.context_length,)


@pytest.mark.parametrize("tokenizer", [Tokenizer.clip(), None], ids=["clip", "own"])
def test_what_is_remembered_is_what_the_tokenizer_writes(tokenizer: Tokenizer | None, folder: Path) -> None:
    tokenizer = tokenizer or Tokenizer.open(folder / "tokenizer")
    write = Writer(tokenizer)
    templates = ("{}", "a photo of a {}.", "{}s", "un{}", "一张{}的图片。", "see {}'s star", "7{}7", "  {} ,")
    captions = ("red star", "狗", "7", "'s", "don't", "star-", "(blue)", "é", " pink ", "红心7")
    for _ in range(2):
        for before, _, after in (template.partition("{}") for template in templates):
            for caption in captions:
                row = write(Prompted(before, caption, after))
                assert row.tolist() == tokenizer(before + caption + after, truncate=True)[0].tolist()


# The towers


def test_texts_of_one_length_together_embed_as_they_do_alone() -> None:
    config = BagTextConfig(
        vocab_size=50, context_length=12, pad_id=49, width=16, heads=2, hidden_dim=16, embed_dim=8
    )
    image = PosteriorImageConfig(part_dims=(4, 4), part_weights=(0.5, 0.5))
    torch.manual_seed(0)
    model = build_clip(CLIPConfig(name="x", image=image, text=config)).eval()
    tokens = torch.randint(0, 49, (9, 2, 12))
    lengths = torch.randint(0, 13, (9, 2, 1))
    tokens[torch.arange(12) >= lengths] = 49
    first, second = embed_texts(model, tokens)
    expected = model.encode_text(tokens.flatten(0, 1)).unflatten(0, (9, 2))
    torch.testing.assert_close(first, expected[:, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(second, expected[:, 1], atol=1e-6, rtol=1e-5)


# Training


def test_the_text_tower_learns_its_targets_and_the_image_tower_stays(folder: Path, tmp_path: Path) -> None:
    asked = recipe(folder, 'dtype="float16"')
    before = open_run(asked, folder).student.model.state_dict()
    result, heard = run_recipe(asked, folder, tmp_path / "run")
    said = [entry["parts"] for entry in steps(heard)]
    assert said[0]["0-feature"] > 0.8
    assert said[-1]["0-feature"] < 0.35
    assert said[-1]["1-picture-match"] < 0.3 * said[0]["1-picture-match"]
    assert read_checkpoint_info(tmp_path / "run" / "model").dtype == "float16"
    for name, value in weights(tmp_path / "run").items():
        assert value.dtype == torch.float16
        if name.startswith("image_tower."):
            assert torch.equal(value, before[name].half())
    assert result.status == "finished"


def test_aligned_with_pictures_a_text_finds_its_own(folder: Path, tmp_path: Path) -> None:
    asked = recipe(folder, more=ALIGN)
    run_recipe(asked, folder, tmp_path / "run")
    model = load_checkpoint(tmp_path / "run" / "model")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text("utf-8").splitlines()]
    tokens = Tokenizer.open(folder / "tokenizer")([row["text"] for row in rows], truncate=True)
    with torch.no_grad():
        texts = model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    pictures = np.load(folder / "pictures.npy")
    best = (texts @ (pictures / np.linalg.norm(pictures, axis=1, keepdims=True)).T).argmax(axis=1)
    assert (best == [row["pictures"][0] for row in rows]).mean() > 0.8


def test_a_run_that_was_stopped_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    asked = recipe(folder, "stage.0.samples=320", "stage.1.samples=320", more=ALIGN)
    run_recipe(asked, folder, tmp_path / "whole")
    for stop_after in (4, 9):
        result, _ = run_recipe(asked, folder, tmp_path / "cut", stop_after=stop_after)
        assert result.status == "interrupted"
    assert run_recipe(asked, folder, tmp_path / "cut")[0].status == "finished"
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("changed", ["pictures.npy", "mine.txt"])
def test_a_run_does_not_go_on_with_other_pictures_or_templates(
    changed: str, folder: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "data"
    shutil.copytree(folder, beside)
    (beside / "mine.txt").write_text("see {}", encoding="utf-8")
    made = recipe(beside, 'data.texts.prompts.alt.templates=["mine.txt"]', "stage.0.samples=64")
    run_recipe(made, beside, tmp_path / "run")
    run_recipe(made, beside, tmp_path / "run")
    (beside / "mine.txt").write_text("look, {}", encoding="utf-8")
    if changed == "pictures.npy":
        (beside / "mine.txt").write_text("see {}", encoding="utf-8")
        np.save(beside / changed, np.load(beside / changed)[::-1])
    with pytest.raises(ConfigError, match=r"the data \['texts'\] are others than when it began"):
        run_recipe(made, beside, tmp_path / "run")


def test_parts_give_the_gradient_of_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    changes = ("stage.0.samples=160", "stage.0.optimizer.eps=1e-4")
    run_recipe(recipe(folder, *changes), folder, tmp_path / "whole")
    run_recipe(recipe(folder, *changes, "stage.0.parts=4"), folder, tmp_path / "parts")
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-4, rtol=1e-3)


def test_a_dry_run_tells_what_moves(folder: Path) -> None:
    (plan, _), _ = dry_run_of(recipe(folder, more=ALIGN), folder)
    assert (plan.samples, plan.steps, plan.teachers) == (60, 40, ("t",))
    assert plan.trained > 0
    assert plan.frozen > 0


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (("stage.0.group=[]",), "", r"texts without pictures, which cannot train 'image_tower"),
        (("data.texts.crop_scale=[0.5, 1]",), "", r"\[data.texts\]: 'crop_scale' is \(0.5, 1.0\)"),
        (('data.texts.paths=["a.jsonl"]',), "", r"got both of 'paths' and 'texts'"),
        (("stage.0.texts=2",), "", r"'texts' is 2, but \[data.texts\] has texts without pictures"),
        (('stage.0.loss.0.tower="both"', 'teacher.0.image="targets.npy"'), "", r"the tower 'both'"),
        (('stage.0.loss=[{kind="info-nce"}]',), "", r"loss 0 \(info-nce\) compares texts with pictures"),
        (('stage.1.loss=[{kind="masked-tokens"}]',), ALIGN, r"loss 0 \(masked-tokens\) needs the pictures"),
        (('data.texts.pictures="targets.txt"',), "", r"'pictures' is '.*targets.txt', which cannot be read"),
        (('data.texts.pictures="narrow.npy"',), "", r"12 rows of 3, expected at least 1 rows of 16"),
        (('data.pairs.pictures="few.npy"',), ALIGN, r"2 rows of 16, expected at least 12 rows of 16"),
        (('teacher.0.text="wide.npy"',), "", r"the teacher 't' embeds into 20 dimensions"),
        (("data.texts.prompts.alt.before=[]",), "", r"prompts.alt: 'before_share' is 0.2"),
        (('validation=[{name="v", data="texts"}]',), "", r"\[\[validation\]\] 0: \[data.texts\] has texts"),
    ],
)
def test_what_texts_cannot_have_is_refused(
    changes: tuple[str, ...], more: str, message: str, folder: Path
) -> None:
    np.save(folder / "narrow.npy", np.ones((12, 3)))
    np.save(folder / "few.npy", np.ones((2, EMBED)))
    np.save(folder / "wide.npy", np.ones((60, 20)))
    (folder / "targets.txt").write_text("1 2", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        dry_run_of(recipe(folder, *changes, more=more), folder)


def test_prompts_of_data_that_nothing_uses_are_not_read(folder: Path) -> None:
    unused = '{texts = ["gone.jsonl"], prompts = {alt = {templates = ["gone.txt"]}}}'
    plans, _ = dry_run_of(recipe(folder, f"data.unused={unused}"), folder)
    assert len(plans) == 1


def test_pictures_that_texts_name_must_be_said(folder: Path) -> None:
    text = RECIPE.replace('[data.pairs]\ntexts = ["pairs.jsonl"]\npictures = "pictures.npy"\n', "")
    text = text.replace('texts = ["texts.jsonl"]\npictures = "pictures.npy"', 'texts = ["pairs.jsonl"]')
    tokenizer = Tokenizer.open(folder / "tokenizer")
    made = parse_recipe(text.format(vocab=tokenizer.vocab_size, pad=tokenizer.config.special.pad).encode())
    with pytest.raises(ConfigError, match="name pictures up to number 11"):
        dry_run_of(made, folder)


# Weights that stay in their package


@pytest.mark.slow
def test_weights_that_did_not_move_stay_in_their_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checkpoints._RENAMES, "timm", dict)  # a package that calls its weights as we do
    tokenizer = Tokenizer.open(folder / "tokenizer")
    text = BagTextConfig(
        vocab_size=tokenizer.vocab_size, context_length=16, pad_id=tokenizer.config.special.pad, width=32,
        heads=4, hidden_dim=32, embed_dim=EMBED,
    )  # fmt: skip
    image = PosteriorImageConfig(part_dims=(12, 4), part_weights=(0.5, 0.5))
    config = CLIPConfig(name="bag", image=image, text=text)
    torch.manual_seed(0)
    model = build_clip(config)
    package = tmp_path / "package"
    package.mkdir()
    prefix = "image_tower.backbone."
    save_file(
        {
            key.removeprefix(prefix): value
            for key, value in model.state_dict().items()
            if key.startswith(prefix)
        },
        package / "backbone.safetensors",
    )
    entry = ExternalWeights(
        prefix=prefix, package="p", version="1", file="backbone.safetensors",
        sha256=checkpoints._sha256(package / "backbone.safetensors"), keys="timm", licence="MIT",
    )  # fmt: skip
    info = CheckpointInfo(
        config=config, scale=20.0, tokenizer_digest=tokenizer.digest, tokenizer_files={},
        external_weights=(entry,),
    )  # fmt: skip
    save_checkpoint(model, tmp_path / "start", info, tokenizer_files=tokenizer.files)

    def found(name: str, directory: Path | None) -> Mapping[str, Path]:
        assert (name, directory) == ("default-model", folder / "there")
        return {"p": package}

    monkeypatch.setattr(student_module, "materials", found)
    changes = (f'student={{checkpoint="{tmp_path / "start"}", materials="there"}}', "stage.0.samples=64")
    run_recipe(recipe(folder, *changes, 'dtype="float16"'), folder, tmp_path / "run")

    said = read_checkpoint_info(tmp_path / "run" / "model")
    assert said.external_weights == (entry,)
    assert not any(name.startswith(prefix) for name in weights(tmp_path / "run"))
    again = load_checkpoint(tmp_path / "run" / "model", external={"p": package}).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items() if prefix in key)
    loaded = student_module.open_student(recipe(folder, *changes), folder)
    with torch.no_grad():
        loaded.model.image_tower.backbone.classifier.bias[0] += 1
    assert loaded.left_outside(loaded.model) == ()
