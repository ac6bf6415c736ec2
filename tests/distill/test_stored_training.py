"""Students learn from what lies in shards: ours, and DataCompDR's as they are published."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch")
from reinforced_shards import (  # noqa: E402
    PROBES,
    WIDTH,
    apple_sample,
    apple_shard,
    jpeg,
    make_reinforced,
    make_shapes,
    probe,
    shipped,
)
from tar_shards import make_shard  # noqa: E402
from train_runs import assert_same_weights, recipe_text, run, run_recipe, steps  # noqa: E402

from edgeclip.distill.batches import BatchLoader  # noqa: E402
from edgeclip.distill.inputs import STORED_IMAGE, STORED_TEXT  # noqa: E402
from edgeclip.distill.offline import OfflineTeacher  # noqa: E402
from edgeclip.distill.recipe import parse_recipe  # noqa: E402
from edgeclip.distill.run import dry_run_of, open_run  # noqa: E402
from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.models.checkpoints import load_model, read_checkpoint_info  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

TINY = (
    "stage.0.batch_size=32",
    "stage.0.precision=float32",
    "stage.0.schedule.warmup=5",
    "stage.0.optimizer.learning_rate=3e-3",
    "stage.0.ema=0.9",
    f"teacher.0.slice=[0, {WIDTH}]",
    f"teacher.1.slice=[{WIDTH}, {2 * WIDTH}]",
    'data.train.paths=["dr"]',
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of generated shapes, and what two probes say about them."""
    folder = make_shapes(tmp_path_factory.mktemp("data"), train=320, held_out=48)
    make_reinforced(
        folder, "dr", [probe("vit"), probe("mobileclip", scale=50)],
        augmentations=2, captions=folder / "captions.jsonl", batch_size=128,
        precision="bfloat16",
    )  # fmt: skip
    return folder


STAGE = """
[[stage]]
name = "distil"
data = "train"
samples = 64
batch_size = 16
texts = 2
optimizer = { learning_rate = 2e-3 }
"""


def with_teachers(folder: Path, *rest: str, paths: str = "dr") -> str:
    """Return a recipe over reinforced shards: a stage with two captions a picture, then these tables."""
    text = recipe_text(folder, STAGE, *rest)
    return text.replace('paths = ["shapes/train.jsonl"]', f'paths = ["{paths}"]', 1)


def stored(name: str, said: str = "") -> str:
    return f'[[teacher]]\nkind = "stored"\nname = "{name}"\n{said}\n'


def affinity(*names: str) -> str:
    return f'[[stage.loss]]\nkind = "affinity"\nteachers = {json.dumps(names)}\n'


# The recipes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileclip", "mobileclip2"])
def test_the_recipe_beats_its_start(folder: Path, tmp_path: Path, name: str) -> None:
    """R@10 among 48 held-out pairs, the mean of both ways, rises by 0.15 and more; chance is 0.21."""
    recipe = shipped(folder, name, *TINY, "stage.0.samples=2880")
    opened = open_run(recipe, folder)
    start = opened.validations[0].measure(
        opened.student.model, opened.student.config, opened.student.tokenizer, device=torch.device("cpu")
    )
    result, heard = run_recipe(recipe, folder, tmp_path / "run")
    assert result.status == "finished"
    ways = ("image_to_text_r10", "text_to_image_r10")
    before, after = (sum(values[way] for way in ways) / 2 for values in (start, result.validation["pairs"]))
    assert after >= before + 0.15
    losses = [step["loss"] for step in steps(heard)]
    assert losses[-1] < losses[0]
    info = read_checkpoint_info(tmp_path / "run" / "model")
    assert len(info.parents) == 3  # two teachers and the recipe
    assert info.licence == "Apache-2.0"


def test_the_second_recipe_draws_from_both_captioners(folder: Path) -> None:
    recipe = shipped(folder, "mobileclip2", *TINY)
    assert [(teacher.name, teacher.scale) for teacher in recipe.teacher] == [
        ("dfn2b", 70),
        ("dfn2b-s39b", 60),
    ]
    opened = open_run(recipe, folder)
    inputs = opened.inputs(recipe.stage[0])
    assert dict(inputs.captions[1].weights) == {
        "synthetic": 1.0, "synthetic_first": 1.0, "synthetic_second": 1.0,
    }  # fmt: skip
    assert opened.objective(recipe.stage[0]).teacher_scales["dfn2b"] == 70


# What a batch holds


def test_stored_and_running_teachers_say_the_same_in_one_step(folder: Path, tmp_path: Path) -> None:
    """The same probe twice, once from the shards (bfloat16) and once beside the student."""
    running = f'[[teacher]]\nkind = "checkpoint"\nname = "running"\npath = "{PROBES / "vit"}"\n'
    text = with_teachers(
        folder, affinity("vit", "mobileclip", "running"), stored("vit"), stored("mobileclip"), running
    )
    recipe = parse_recipe(text.encode())
    opened = open_run(recipe, folder)
    stage = recipe.stage[0]
    inputs = opened.inputs(stage)
    batch = next(BatchLoader(opened.data["train"], opened.plan(stage), inputs).batches())
    assert batch[STORED_IMAGE].shape == (16, 2 * WIDTH)
    assert batch[STORED_TEXT].shape == (16, 2, 2 * WIDTH)
    kept, run_now = opened.teachers["vit"].ask(batch, inputs), opened.teachers["running"].ask(batch, inputs)
    assert kept.image is not None
    assert run_now.image is not None
    for ours, theirs in ((kept.image, run_now.image), *zip(kept.texts, run_now.texts, strict=True)):
        cosines = torch.nn.functional.cosine_similarity(ours, theirs)
        assert cosines.min() > 0.9999
        assert (ours - torch.nn.functional.normalize(theirs, dim=-1)).abs().max() < 2**-8
    other = opened.teachers["mobileclip"]
    assert isinstance(other, OfflineTeacher)
    assert (other.columns, other.scale, other.image_dim) == ((WIDTH, 2 * WIDTH), 50.0, WIDTH)
    assert opened.objective(stage).teacher_scales["mobileclip"] == 50.0  # as the manifest says
    result, _ = run_recipe(recipe, folder, tmp_path / "run")
    assert (result.status, result.broken) == ("finished", 0)


def test_a_stopped_run_goes_on_exactly(folder: Path, tmp_path: Path) -> None:
    text = with_teachers(folder, affinity("vit", "mobileclip"), stored("vit"), stored("mobileclip"))
    recipe = parse_recipe(text.encode())
    run_recipe(recipe, folder, tmp_path / "whole")
    stopped, _ = run_recipe(recipe, folder, tmp_path / "parts", stop_after=2, workers=1)
    assert stopped.status == "interrupted"
    run_recipe(recipe, folder, tmp_path / "parts")
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


# DataCompDR's layout, written here with the standard library


def unit(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    parts = rng.standard_normal((rows, 2, 8)).astype(np.float32)
    return (parts / np.linalg.norm(parts, axis=-1, keepdims=True)).reshape(rows, 16)


SOME_VIEWS = 3


def published(path: Path, form: str, *, second: bool = False, count: int = 32) -> dict[str, Any]:
    """Write a shard; return what every sample holds by key."""
    rng = np.random.default_rng(0)
    samples, known = [], {}
    for number in range(count):
        key = f"{number:08x}{'0' * 24}"
        pixels = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
        content = jpeg(pixels, orientation=6 if number % 2 else 1)
        views = []
        for _ in range(SOME_VIEWS):
            height, width = (int(rng.integers(8, high)) for high in (40, 56))
            top, left = int(rng.integers(0, 41 - height)), int(rng.integers(0, 57 - width))
            views.append([[top, left, height, width], [[0, 0.0], [10, 8.0]]])  # RandAugment that keeps all
        arrays = {"image_emb": unit(rng, SOME_VIEWS), "text_emb": unit(rng, 1 if second else 3)}
        synthetic = [f"one {number}", f"two {number}"]
        if second:
            arrays["syn_text_emb"] = unit(rng, 2)
        known[key] = {
            "picture": content,
            "views": views,
            "arrays": arrays,
            "captions": [f"real {number}", *synthetic],
        }
        samples.append(apple_sample(key, content, f"real {number}", synthetic, views, arrays, form=form))
    apple_shard(path, samples)
    return known


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("form", ["npz", "pth.gz"])
def test_the_published_layout_trains(folder: Path, tmp_path: Path, form: str, second: bool) -> None:
    known = published(tmp_path / "00000000.tar", form, second=second)
    teachers = stored("openai", "slice = [0, 8]") + stored("datacomp", "slice = [8, 16]\nscale = 60")
    text = with_teachers(
        folder, affinity("openai", "datacomp"), teachers, paths=str(tmp_path / "00000000.tar")
    )
    recipe = parse_recipe(text.encode())
    opened = open_run(recipe, folder)
    stage = recipe.stage[0]
    inputs = opened.inputs(stage)
    batch = next(BatchLoader(opened.data["train"], opened.plan(stage), inputs).batches())
    size = opened.student.config.image_size_px
    resampling = Image.Resampling[opened.student.config.interpolation.upper()]
    tokenizer = opened.student.tokenizer
    for row, name in enumerate(batch.keys):
        one = known[name.split("/")[1]]
        # As the published loader decodes: not turned upright.
        picture = Image.open(io.BytesIO(one["picture"])).convert("RGB")
        assert picture.size == (56, 40)
        seen = np.asarray(batch["image"][row].permute(1, 2, 0))
        found = []
        for number, ((top, left, height, width), _) in enumerate(one["views"]):
            part = picture.crop((left, top, left + width, top + height))
            part = part.resize((size[1], height), resampling).resize((size[1], size[0]), resampling)
            if np.array_equal(np.asarray(part), seen):
                found.append(number)
        assert len(found) == 1
        tolerance = 0 if form == "npz" else 2**-8
        wanted = one["arrays"]["image_emb"][found[0]]
        assert np.abs(batch[STORED_IMAGE][row].numpy() - wanted).max() <= tolerance
        texts = one["arrays"]["text_emb"]
        if second:
            texts = np.concatenate([texts, one["arrays"]["syn_text_emb"]])
        for at, options in enumerate(([0], [1, 2])):
            ids = tokenizer(one["captions"], truncate=True)
            (chosen,) = (n for n in options if np.array_equal(ids[n], batch["tokens"][row, at].numpy()))
            assert np.abs(batch[STORED_TEXT][row, at].numpy() - texts[chosen]).max() <= tolerance
    assert opened.objective(stage).teacher_scales["openai"] == 100
    result, heard = run_recipe(recipe, folder, tmp_path / "run")
    assert (result.status, result.broken, len(steps(heard))) == ("finished", 0, 4)
    assert result.licence == "NOASSERTION"  # nobody says whose the teachers' terms are
    info = read_checkpoint_info(tmp_path / "run" / "model")
    assert [parent["name"] for parent in info.parents[:2]] == ["openai", "datacomp"]
    load_model(tmp_path / "run" / "model")


def test_licences_of_stored_teachers_can_be_said(folder: Path, tmp_path: Path) -> None:
    published(tmp_path / "0.tar", "npz")
    said = stored("openai", 'slice = [0, 8]\nlicence = "MIT"')
    text = with_teachers(folder, affinity("openai"), said, paths=str(tmp_path / "0.tar"))
    plans, remark = dry_run_of(parse_recipe(text.encode()), folder)
    assert plans[0].teachers == ("openai",)
    assert "MIT" in remark


# What cannot be


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("", r"teacher 'openai': expected 'slice', .* of the 16 columns .* no manifest"),
        ("slice = [8, 24]", r"'slice' is \[8, 24\], expected two rising columns of the 16"),
        ("slice = [8, 8]", r"'slice' is \[8, 8\]"),
    ],
)
def test_foreign_shards_need_a_slice_that_fits(
    folder: Path, tmp_path: Path, teacher: str, message: str
) -> None:
    published(tmp_path / "0.tar", "npz", count=16)
    text = with_teachers(folder, affinity("openai"), stored("openai", teacher), paths=str(tmp_path / "0.tar"))
    with pytest.raises(ConfigError, match=message):
        open_run(parse_recipe(text.encode()), folder)


def test_our_shards_know_their_teachers(folder: Path) -> None:
    def opened(name: str, said: str = "") -> Any:
        text = with_teachers(folder, affinity(name), stored(name, said))
        return open_run(parse_recipe(text.encode()), folder).teachers[name]

    assert opened("mobileclip").columns == (WIDTH, 2 * WIDTH)
    assert opened("anything", f"slice = [0, {WIDTH}]").scale == 100.0
    assert opened("mobileclip", "scale = 7").scale == 7.0
    with pytest.raises(ConfigError, match=r"'other': expected 'slice'.*which names \['vit', 'mobileclip'\]"):
        opened("other")
    with pytest.raises(ConfigError, match=r"'vit': 'slice' is \[0, 5\], but the manifest .*\[0, 96\]"):
        opened("vit", "slice = [0, 5]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train.crop_scale=[0.5, 1.0]", r"\['vit'\] lie in the shards, .* sets 'crop_scale' to \(0\.5"),
        ("data.train.rand_augment=1", "sets 'rand_augment' to 1"),
        ("data.train.rand_augment_magnitude=3", "sets 'rand_augment_magnitude' to 3"),
        (
            'data.train.paths=["shapes/train.jsonl"]',
            r"\[data.train\]: stored teachers read .* from tar shards",
        ),
        ('data.train.paths=["shards"]', r"no stored embeddings in the first samples .* only \['cls', 'json'"),
    ],
)
def test_data_that_hold_no_such_views_are_refused(folder: Path, change: str, message: str) -> None:
    text = with_teachers(folder, affinity("vit"), stored("vit"))
    with pytest.raises(ConfigError, match=message):
        open_run(parse_recipe(text.encode(), changes=[change]), folder)


def test_shards_of_several_kinds_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    published(tmp_path / "0.tar", "npz", count=16)
    both = f'data.train.paths=["dr", "{tmp_path / "0.tar"}"]'
    text = with_teachers(folder, affinity("vit"), stored("vit"))
    with pytest.raises(ConfigError, match="were reinforced by different teachers"):
        open_run(parse_recipe(text.encode(), changes=[both]), folder)
    two = (
        with_teachers(folder, affinity("vit", "openai"), stored("vit"), stored("openai", "slice = [0, 8]"))
        + f'[data.foreign]\npaths = ["{tmp_path / "0.tar"}"]\n'
    )
    second = STAGE.replace('"distil"', '"second"').replace('"train"', '"foreign"') + affinity("openai")
    with pytest.raises(ConfigError, match=r"'openai'.*manifest|stores it otherwise"):
        open_run(parse_recipe((two + second).encode()), folder)


def test_samples_that_do_not_fit_are_counted_as_broken(folder: Path, tmp_path: Path) -> None:
    """One of each: no embeddings, other counts of views and captions, another width, a crop outside."""
    known = published(tmp_path / "0.tar", "npz", count=24)
    samples = []
    for number, (key, one) in enumerate(known.items()):
        arrays, views, synthetic = dict(one["arrays"]), list(one["views"]), one["captions"][1:]
        if number == 1:
            views = views[:2]
        if number == 2:
            synthetic = [*synthetic, "a third"]
        if number == 3:
            arrays = {name: np.concatenate([array, array], axis=1) for name, array in arrays.items()}
        if number == 4:
            views = [[[30, 40, 20, 30], view[1]] for view in views]
        if number == 5:
            arrays["image_emb"] = np.full_like(arrays["image_emb"], np.nan)
        members = apple_sample(key, one["picture"], one["captions"][0], synthetic, views, arrays, form="npz")
        if number == 6:
            members = [(name, content) for name, content in members if not name.endswith("npz")]
        if number == 7:
            members = [(name, content) for name, content in members if not name.endswith("paug.json")]
        samples.append(members)
    path = tmp_path / "damaged.tar"
    make_shard(path, [member for sample in samples for member in sample])
    text = with_teachers(folder, affinity("openai"), stored("openai", "slice = [0, 8]"), paths=str(path))
    recipe = parse_recipe(text.encode(), changes=["stage.0.samples=144", "stage.0.batch_size=8"])
    opened = open_run(recipe, folder)
    loader = BatchLoader(opened.data["train"], opened.plan(recipe.stage[0]), opened.inputs(recipe.stage[0]))
    loader._allowed = 24
    batches = loader.batches()
    for _ in range(3):  # an epoch
        next(batches)
    said = {broken.index: broken.reason for broken in loader.broken.values()}
    assert sorted(said) == [1, 2, 3, 4, 5, 6, 7]
    messages = (
        "says 2 views, there are embeddings of 3",
        "'synthetic', the sample has 3",
        "have 32 columns, expected 16",
        "crop box ends at",
        "not finite",
        "has no stored embeddings",
        "paug.json: is missing",
    )
    for index, message in enumerate(messages, 1):
        assert message in said[index]
    with pytest.raises(InputError, match="samples cannot be used, 0 are allowed"):
        run_recipe(parse_recipe(text.encode(), changes=["data.train.max_broken=0"]), folder, tmp_path / "run")


def test_moved_shards_without_their_manifest_need_a_slice(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "dr" / "shard-000000.tar", tmp_path / "shard-000000.tar")
    text = with_teachers(folder, affinity("vit"), stored("vit"), paths=str(tmp_path))
    with pytest.raises(ConfigError, match="no manifest is beside the shards"):
        open_run(parse_recipe(text.encode()), folder)
    (tmp_path / "reinforcement.json").write_text("{}")
    with pytest.raises(InputError, match=r"reinforcement\.json' is no manifest of reinforced shards"):
        open_run(parse_recipe(text.encode()), folder)
    whole = json.loads((folder / "dr" / "reinforcement.json").read_text(encoding="utf-8"))
    for teachers in ([], [whole["teachers"][0] | {"scale": -1.0}]):
        (tmp_path / "reinforcement.json").write_text(json.dumps(whole | {"teachers": teachers}))
        with pytest.raises(InputError, match=r"no manifest of reinforced shards .*\$\.teachers"):
            open_run(parse_recipe(text.encode()), folder)


def test_plain_training_on_reinforced_shards_draws_its_own_views(folder: Path, tmp_path: Path) -> None:
    text = with_teachers(folder, '[[stage.loss]]\nkind = "info-nce"\n')
    recipe = parse_recipe(text.encode(), changes=["data.train.crop_scale=[0.5, 1.0]"])
    opened = open_run(recipe, folder)
    assert opened.inputs(recipe.stage[0]).stored is None
    result, _ = run(
        folder, tmp_path / "run", STAGE, '[[stage.loss]]\nkind = "info-nce"\n', changes=("stage.0.texts=1",)
    )
    assert result.status == "finished"
