"""The small model: what it learns from, how it is judged, and the whole way from pictures to a bundle."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip.bundle import Bundle
from edgeclip.distill.recipe import parse_recipe
from edgeclip.distill.recipe_text import find_recipe
from edgeclip.errors import BundleError, ConfigError, InputError
from edgeclip.evaluate.subjects import open_bundle
from edgeclip.export.recipes.build_nano import (
    Materials,
    Plan,
    _check_work,
    build,
    main,
    make_start,
    nano_config,
    narrowed,
)
from edgeclip.export.recipes.command import put_bundle
from edgeclip.export.recipes.default_space import ClassNames
from edgeclip.export.recipes.emoji import Pictogram, read_pictograms
from edgeclip.export.recipes.nano_eval import (
    Question,
    judged,
    n_way,
    pictogram_questions,
    stamp_questions,
)
from edgeclip.export.recipes.nano_pictures import (
    SIZE_PX,
    Named,
    Scene,
    photograph,
    pictogram,
    write_table,
)
from edgeclip.export.recipes.stamps import Stamp
from edgeclip.models.checkpoints import CheckpointInfo, read_checkpoint_info, save_checkpoint
from edgeclip.models.clip import build_clip
from edgeclip.models.config import BagTextConfig, CLIPConfig, FastViTConfig
from edgeclip.models.reparam import reparameterize
from edgeclip.models.text import BagTextTower
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.tokenizer import Tokenizer, train_bpe

NAMES = {"1f34e": ("red apple", "红苹果"), "1f438": ("frog", "青蛙"), "2764-fe0f": ("red heart", "红心")}


@pytest.fixture
def emojibase(tmp_path: Path) -> Path:
    """Return the package's layout: three emoji, and one that no style draws."""
    listed = {**NAMES, "1f47b": ("ghost", "鬼")}
    for at, language in enumerate(("en", "zh")):
        folder = tmp_path / "emojibase" / language
        folder.mkdir(parents=True)
        entries = [
            {
                "hexcode": code.upper(),
                "label": names[at],
                "tags": [f"tag {names[at]}"],
                "group": group,
            }
            for (code, names), group in zip(listed.items(), (4, 0, 9, 0), strict=True)
        ]
        (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path / "emojibase"


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """Return a set of drawings, one of them named without its variation selector."""
    folder = tmp_path / "style"
    folder.mkdir()
    for number, code in enumerate(("1f34e", "1f438", "2764")):
        drawing = Image.new("RGBA", (32, 32))
        drawing.paste(((200, 20, 20, 255), (20, 200, 20, 255), (20, 20, 200, 255))[number], (4, 4, 28, 28))
        drawing.save(folder / f"{code}.png")
    return folder


def test_pictograms_are_those_that_every_style_draws(emojibase: Path, style: Path) -> None:
    found = read_pictograms(emojibase, (style,))
    assert [(one.code, one.english, one.chinese) for one in found] == [
        (code, *names) for code, names in NAMES.items()
    ]
    assert (found[0].tags, found[0].chinese_tags) == (("tag red apple",), ("tag 红苹果",))
    assert found[2].files == (style / "2764.png",)
    assert [(one.is_thing, one.is_flag) for one in found] == [(True, False), (False, False), (False, True)]


def test_drawings_are_found_however_their_names_write_selectors(emojibase: Path, tmp_path: Path) -> None:
    (tmp_path / "webp").mkdir()
    for name in ("1f34e-fe0f.webp", "2764-fe0f.webp", "1f438.txt"):
        (tmp_path / "webp" / name).touch()
    found = read_pictograms(emojibase, (tmp_path / "webp",))
    assert [one.files[0].name for one in found] == ["1f34e-fe0f.webp", "2764-fe0f.webp"]


def test_pictograms_that_are_not_there_name_the_command(emojibase: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of 4 emoji .*edgeclip data fetch pictograms"):
        read_pictograms(emojibase, (tmp_path / "nothing",))
    with pytest.raises(InputError, match=r"cannot read '.*nowhere'"):
        read_pictograms(tmp_path / "nowhere", ())


def test_a_pictogram_is_seen_on_its_ground_and_keeps_its_names(emojibase: Path, style: Path) -> None:
    apple = read_pictograms(emojibase, (style,))[0]
    scenes = [pictogram(apple, random.Random(seed), []) for seed in range(40)]
    assert {scene.picture.size for scene in scenes} == {(SIZE_PX, SIZE_PX)}
    assert scenes[0].named == Named(("red apple", "tag red apple"), ("红苹果", "tag 红苹果"))
    again = pictogram(apple, random.Random(7), [])
    assert np.array_equal(np.asarray(again.picture), np.asarray(scenes[7].picture))
    white = [scene for scene in scenes if scene.picture.getpixel((0, 0)) == (255, 255, 255)]
    assert 8 <= len(white) <= 28  # two in five, and grounds that happen to be
    # Red is what sticks out of white, whatever was done to it.
    reddest = [np.asarray(scene.picture, np.int64) for scene in white]
    assert all((each[..., 0] - each[..., 1]).max() > 60 for each in reddest)


def test_photographs_have_no_name_and_some_are_cut_out() -> None:
    photo = Image.new("RGB", (300, 200), (10, 60, 200))
    scenes = [photograph(photo, random.Random(seed), []) for seed in range(60)]
    assert all(scene.named is None for scene in scenes)
    cut_out = [scene for scene in scenes if scene.picture.getpixel((0, 0)) == (255, 255, 255)]
    assert 10 <= len(cut_out) <= 32
    assert all(scene.picture.getpixel((SIZE_PX // 2,) * 2) == (10, 60, 200) for scene in scenes)


def test_the_table_asks_for_names_in_groups_and_in_order(tmp_path: Path) -> None:
    photo = Image.new("RGB", (64, 64), (10, 60, 200))
    named = pictogram(
        Pictogram("a", "red apple", "红苹果", (), (), 4, (_red(tmp_path / "a.png"),)), random.Random(0), []
    )
    scenes = [photograph(photo, random.Random(1), []), named, photograph(photo, random.Random(2), [])]
    asked: list[int] = []

    def name_all(pictures: np.ndarray) -> list[Named]:
        asked.append(len(pictures))
        return [Named((f"thing {number}",), (f"物{number}",)) for number in range(len(pictures))]

    assert write_table(tmp_path / "made", iter(scenes), name_all, seed=0) == 3
    rows = [json.loads(line) for line in (tmp_path / "made/train.jsonl").read_text("utf-8").splitlines()]
    assert asked == [2]
    assert [row["caption"][0] for row in rows] == ["thing 0", "red apple", "thing 1"]
    assert [row["caption_zh"][0] for row in rows] == ["物0", "红苹果", "物1"]
    assert all(row["caption"][0] in row["caption"][-1] != row["caption"][0] for row in rows)
    with Image.open(tmp_path / "made" / rows[2]["image"]) as last:
        assert last.size == (SIZE_PX, SIZE_PX)
    assert not (tmp_path / "made.unfinished").exists()


def test_what_a_stopped_run_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    def scenes() -> Iterator[Scene]:
        yield photograph(Image.new("RGB", (64, 64)), random.Random(1), [])
        raise KeyboardInterrupt

    def name_all(pictures: np.ndarray) -> list[Named]:
        return [Named(("thing",), ("物",))] * len(pictures)

    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path / "made", scenes(), name_all, seed=0, batch_size=1)
    assert (tmp_path / "made.unfinished" / "images" / "000000.jpg").is_file()
    assert write_table(tmp_path / "made", iter(()), name_all, seed=0) == 0
    assert list((tmp_path / "made" / "images").iterdir()) == []


def _red(path: Path) -> Path:
    Image.new("RGBA", (16, 16), (200, 0, 0, 255)).save(path)
    return path


# --- judging -----------------------------------------------------------------------------------------------


def test_n_way_is_what_hypergeometry_says() -> None:
    # The own name is better than k of the other N - 1: it wins where all n - 1 are among these.
    names, n = 12, 5
    cosines = np.tile(np.arange(names, dtype=np.float32), (names, 1))
    own = np.arange(names)
    won = n_way(cosines, own, n, draws=4000)
    wanted = [np.prod([(at - i) / (names - 1 - i) for i in range(n - 1)]) for at in range(names)]
    np.testing.assert_allclose(won, np.maximum(wanted, 0), atol=0.03)
    assert np.array_equal(won, n_way(cosines, own, n, draws=4000))


def test_n_way_counts_ties_as_lost_and_refuses_too_few_names() -> None:
    assert n_way(np.zeros((2, 3), np.float32), np.array([0, 1]), 2).tolist() == [0, 0]
    with pytest.raises(InputError, match="5-way: got 3 names"):
        n_way(np.zeros((2, 3), np.float32), np.array([0, 1]), 5)


def test_pictures_are_judged_under_names_of_their_own_half() -> None:
    stamps = [
        Stamp("a.png", "goat", "山羊", "exact", "tune"),
        Stamp("b.png", "ibex", "山羊", "exact", "report"),
    ]
    assert [each.key for each in stamp_questions(stamps, Path("p"), "report", "en")] == ["b.png"]
    assert stamp_questions(stamps, Path("p"), "report", "zh") == []
    assert [each.key for each in stamp_questions(stamps, Path("p"), "tune", "zh")] == ["a.png"]


# --- the student -------------------------------------------------------------------------------------------


def test_the_image_tower_is_small_and_the_recipe_fits() -> None:
    text = BagTextConfig(vocab_size=100, context_length=8, pad_id=99, embed_dim=512)
    config = nano_config(text)
    tower = build_clip(config).image_tower.eval()
    folded = reparameterize(tower)
    assert sum(each.numel() for each in folded.parameters()) <= 2_000_000
    picture = torch.rand(1, 3, *config.image_size_px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(folded(picture), tower(picture), atol=1e-4, rtol=1e-3)
    content, _, where = find_recipe("nano", "edgeclip.distill.recipes")
    recipe = parse_recipe(content, where=where)
    assert [teacher.name for teacher in recipe.teacher] == ["default"]
    assert {type(loss).__struct_config__.tag for loss in recipe.stage[0].loss} >= {"affinity", "info-nce"}


def test_the_narrow_text_tower_is_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    wide = BagTextConfig(
        vocab_size=40, context_length=6, pad_id=39, width=16, heads=4, hidden_dim=8, embed_dim=12
    )
    teacher = BagTextTower(wide)
    full, narrow = (
        BagTextTower(BagTextConfig(**{**vars(wide), "token_dim": token_dim})) for token_dim in (16, 5)
    )
    narrowed(teacher, full)
    narrowed(teacher, narrow)
    tokens = torch.randint(0, 39, (9, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(full(tokens), teacher(tokens), atol=1e-5, rtol=1e-4)
        table = narrow.pieces.weight @ narrow.widen.weight.T  # type: ignore[union-attr]
    # Eckart and Young 1936: what is lost are the singular values left out.
    lost = np.linalg.norm(table.numpy() - teacher.pieces.weight.detach().numpy())
    values = np.linalg.svd(teacher.pieces.weight.detach().numpy(), compute_uv=False)
    assert lost == pytest.approx(np.linalg.norm(values[5:]), rel=1e-4)


# --- the whole way -----------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Return a checkpoint that knows nothing, with a bag of byte pairs of its own."""
    corpus = [
        "a photo of a red apple.",
        "a frog",
        "a picture of a red heart",
        "一张红苹果的图片。",
        "青蛙",
    ] * 20
    tokenizer = train_bpe(corpus, vocab_size=600, context_length=12, languages=("en", "zh"))
    config = CLIPConfig(
        name="tiny",
        image=FastViTConfig(dims=(16,), depths=(1,), mixers=("repmixer",), embed_dim=16),
        text=BagTextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=12,
            pad_id=tokenizer.config.special.pad,
            width=104,
            heads=4,
            hidden_dim=16,
            embed_dim=16,
        ),
        image_size_px=(32, 32),
        resize="squash",
        crop="none",
    )
    torch.manual_seed(0)
    info = CheckpointInfo(config=config, scale=20.0, tokenizer_digest=tokenizer.digest, tokenizer_files={})
    save_checkpoint(build_clip(config), tmp_path / "tiny", info, tokenizer_files=tokenizer.files)
    return tmp_path / "tiny"


@pytest.mark.slow
def test_a_bundle_from_drawings_and_photographs(
    tmp_path: Path, teacher: Path, emojibase: Path, style: Path
) -> None:
    rng = np.random.default_rng(0)
    found = Materials(
        names=ClassNames((1, 2, 3), ("apple", "frog", "frog"), ("苹果", "青蛙", "蛙"), ((), (), ())),
        pictograms=read_pictograms(emojibase, (style,)),
        photographs=(Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)),),
    )
    plan = Plan(
        work=tmp_path / "work",
        checkpoint=teacher,
        pictures=24,
        steps=5,
        changes=tuple(f"stage.{number}.batch_size=8" for number in range(3)),
    )
    bundle = build(plan, found, tmp_path / "bundle")
    assert list(bundle.manifest.variants) == ["onnx-int8"]
    assert bundle.manifest.label_banks["everyday"].labels == 100
    assert set(bundle.manifest.model.languages) == {"en", "zh"}
    notice, card = (bundle.read(name).decode() for name in bundle.manifest.model.notices)
    assert f"- {read_checkpoint_info(teacher).config.name}: edgeclip, Apache-2.0; teacher" in notice
    assert f"image {bundle.manifest.model.parameters['image']:,}," in card
    assert "Not measured in this build." in card
    made = _digests(plan.work)
    stages = {name.split("/")[0] for name in made}
    assert stages >= {"teacher", "pictures", "shards", "reinforced", "start-0", "run-0", "calibration"}

    put_bundle(Bundle.open("default"), tmp_path / "again")  # another model, to be replaced
    again = build(plan, found, tmp_path / "again")
    assert _digests(plan.work) == made  # nothing is done twice
    with pytest.raises(
        ConfigError, match=r"work' was made from other pictures: got 24 for 'pictures', .* 25"
    ):
        build(replace(plan, pictures=25), found, tmp_path / "again")
    files, known = (
        {name: each.sha256 for name, each in one.manifest.files.items()} for one in (again, bundle)
    )
    assert files == known

    (subject,), _ = open_bundle(str(bundle.path), options=RuntimeOptions(threads=1))
    questions = pictogram_questions(emojibase, style)
    said = judged(subject, questions, "zh", 2)
    subject.close()
    assert (said["pictures"], said["names"], len(said["rows"])) == (3, 3, 3)
    assert said["2-way"] == pytest.approx(np.mean([row["2-way"] for row in said["rows"]]), abs=1e-3)
    assert all(isinstance(each, Question) for each in questions)


@pytest.fixture
def found(emojibase: Path, style: Path) -> Materials:
    """Return materials without photographs."""
    return Materials(
        names=ClassNames((1, 2), ("apple", "frog"), ("苹果", "青蛙"), ((), ())),
        pictograms=read_pictograms(emojibase, (style,)),
        photographs=(),
    )


def test_work_belongs_to_its_teacher_and_materials(tmp_path: Path, teacher: Path, found: Materials) -> None:
    plan = Plan(work=tmp_path / "work", checkpoint=teacher)
    _check_work(plan, found)
    _check_work(replace(plan, seed=3, steps=7), found)
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    fewer = replace(found, pictograms=found.pictograms[1:])
    with pytest.raises(ConfigError, match=r"made from other teacher and materials: got .*rm -r .*work"):
        _check_work(plan, fewer)
    (plan.work / "pictures").mkdir()
    (plan.work / "made-from.json").write_text("[]", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"other teacher and materials and pictures and photo_share: got None"
    ):
        _check_work(plan, found)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file' cannot be written: File exists"):
        _check_work(replace(plan, work=tmp_path / "file"), found)
    with pytest.raises(InputError, match=r"nowhere.config.json' cannot be read"):
        _check_work(replace(plan, checkpoint=tmp_path / "nowhere"), found)


def test_what_cannot_be_built_is_refused_before_anything_is_made(
    tmp_path: Path, teacher: Path, found: Materials
) -> None:
    plan = Plan(work=tmp_path / "work", checkpoint=teacher)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with pytest.raises(BundleError, match=r"mine' is there and no bundle"):
        build(plan, found, mine)
    with pytest.raises(ConfigError, match=r"seed.*-1"):
        build(replace(plan, seed=-1), found, tmp_path / "bundle")
    info = read_checkpoint_info(teacher)
    assert isinstance(info.config.text, BagTextConfig)
    narrow = replace(info, config=replace(info.config, text=replace(info.config.text, token_dim=8)))
    tokenizer = Tokenizer.open(teacher)
    save_checkpoint(build_clip(narrow.config), tmp_path / "narrow", narrow, tokenizer_files=tokenizer.files)
    with pytest.raises(ConfigError, match=r"narrow' has a text tower 'bag' with a table 8 wide, expected"):
        build(replace(plan, checkpoint=tmp_path / "narrow"), found, tmp_path / "bundle")
    assert not plan.work.exists()


def test_the_start_is_under_the_terms_of_its_text_tower(
    tmp_path: Path, teacher: Path, found: Materials
) -> None:
    config = json.loads((teacher / "config.json").read_text("utf-8"))
    (teacher / "config.json").write_text(json.dumps(config | {"licence": "CC-BY-SA-4.0"}), encoding="utf-8")
    start = make_start(Plan(work=tmp_path / "work", checkpoint=teacher), found)
    info = read_checkpoint_info(start)
    assert info.licence == "Apache-2.0 AND CC-BY-SA-4.0"
    assert [parent["licence"] for parent in info.parents] == ["CC-BY-SA-4.0"]


@pytest.mark.parametrize("option", ["--pictures", "--steps"])
def test_none_of_something_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--work", "w", "-o", "b", option, "0"])
    assert f"argument {option}: got '0', expected a whole number, 1 or more." in capsys.readouterr().err


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file that a stage leaves; logs and the bundle's manifest say when."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix not in (".jsonl", ".lock")
        and ".edgeclip" not in path.name
        and not path.parent.name.startswith("bundle-")
    }
