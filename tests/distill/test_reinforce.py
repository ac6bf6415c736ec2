"""Reinforcing: what is stored is what the teachers said, however often it was interrupted."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from reinforced_shards import PROBES, SIZE_PX, WIDTH, make_reinforced, make_shapes, probe  # noqa: E402
from tar_shards import make_shard, picture  # noqa: E402

from edgeclip.distill import reinforce as reinforce_module  # noqa: E402
from edgeclip.distill import reinforce_plan as plan_module  # noqa: E402
from edgeclip.distill.batches import to_float  # noqa: E402
from edgeclip.distill.caption_file import CaptionFile  # noqa: E402
from edgeclip.distill.inputs import STORED_IMAGE, STORED_TEXT, Consumer, Inputs, StoredViews  # noqa: E402
from edgeclip.distill.online_teacher import OnlineTeacher  # noqa: E402
from edgeclip.distill.randomness import Randomness  # noqa: E402
from edgeclip.distill.recipe import DataSpec, StoredTeacher  # noqa: E402
from edgeclip.distill.reinforce import reinforce  # noqa: E402
from edgeclip.distill.reinforce_plan import ReinforceOptions, open_plan  # noqa: E402
from edgeclip.distill.reinforcement import read_reinforcement, reinforcement_of  # noqa: E402
from edgeclip.distill.samples import BrokenLimit, ShardSamples, open_samples  # noqa: E402
from edgeclip.distill.teachers import open_teacher  # noqa: E402
from edgeclip.errors import ConfigError, EdgeClipError, InputError  # noqa: E402
from edgeclip.models.checkpoints import load_model  # noqa: E402
from edgeclip.storage import DirectoryLock  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

TEACHERS = [probe("vit", scale=30), probe("tinyclip")]
SETTINGS: dict[str, Any] = {"rand_augment": 2, "crop_scale": (0.3, 1.0), "precision": "float32"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of eight samples, reinforced by two teachers; the views that these saw are kept."""
    folder = make_shapes(tmp_path_factory.mktemp("data"), train=24, held_out=4, per_shard=8)
    seen: list[NDArray[np.uint8]] = []
    forward = OnlineTeacher.forward

    def remembering(self: OnlineTeacher, image: Any, tokens: Any) -> Any:
        if image is not None and self.name == "vit":
            seen.append(image.numpy().copy())
        return forward(self, image, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineTeacher, "forward", remembering)
        make_reinforced(folder, "dr", TEACHERS, captions=folder / "captions.jsonl", **SETTINGS)
    np.save(folder / "seen.npy", np.concatenate(seen))
    return folder


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def encode(name: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return unit embeddings of ``(n, H, W, 3)`` pixels, straight from the checkpoint."""
    loaded = load_model(PROBES / name)
    image = to_float(
        torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        mean=loaded.config.mean,
        std=loaded.config.std,
    )
    with torch.no_grad():
        rows: NDArray[np.float32] = F.normalize(loaded.model.encode_image(image), dim=-1).numpy()
    return rows


# What is stored


def test_another_reader_finds_the_published_layout(folder: Path) -> None:
    """tarfile, json, numpy and PIL alone: members, counts, crops, and what the teachers say of them."""
    plain = folder / "plain"
    make_reinforced(
        folder, "plain", TEACHERS, captions=folder / "captions.jsonl",
        rand_augment=0, crop_scale=(0.3, 1.0), precision="float32",
    )  # fmt: skip
    source, found = members(folder / "shards" / "shard-000001.tar"), members(plain / "shard-000001.tar")
    keys = sorted({name.split(".")[0] for name in source})
    assert len(keys) == 8
    for name, content in source.items():
        assert found[name] == content  # pictures and texts as they were, with nothing in .json to add
    key = keys[3]
    assert {name.partition(".")[2] for name in found if name.startswith(key)} == {
        "cls", "json", "npz", "paug.json", "png", "syn.json", "txt",
    }  # fmt: skip
    synthetic = json.loads(found[f"{key}.syn.json"])
    label = found[f"{key}.cls"].decode()
    assert synthetic == {
        "syn_text": [label, f"a picture: {label}"],
        "syn_text_first": [label],
        "syn_text_second": [f"a picture: {label}"],
    }
    views = json.loads(found[f"{key}.paug.json"])["param_aug"]
    arrays = np.load(io.BytesIO(found[f"{key}.npz"]), allow_pickle=False)
    assert {name: arrays[name].shape for name in arrays.files} == {
        "image_emb": (3, 2 * WIDTH),
        "text_emb": (3, 2 * WIDTH),
        "syn_text_first_emb": (1, 2 * WIDTH),
        "syn_text_second_emb": (1, 2 * WIDTH),
        "caption_zh_emb": (1, 2 * WIDTH),
    }
    for name in arrays.files:
        for half in np.split(arrays[name], 2, axis=1):
            assert np.allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    assert np.allclose(arrays["text_emb"][1], arrays["syn_text_first_emb"][0], atol=1e-6)  # the same text

    image = Image.open(io.BytesIO(found[f"{key}.png"])).convert("RGB")
    config = load_model(PROBES / "vit").config
    size, interpolation = config.image_size_px, Image.Resampling[config.interpolation.upper()]
    crops = []
    for ((top, left, height, width),) in views:
        part = image.crop((left, top, left + width, top + height))
        crops.append(np.asarray(part.resize(size[::-1], interpolation)))
    rows = encode("vit", np.stack(crops))
    # Pillow resizes both sides in one call here, which may differ by a level.
    assert (rows * arrays["image_emb"][:, :WIDTH]).sum(axis=1).min() > 0.9999


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves the file open
def test_webdataset_reads_what_we_write(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    found = list(
        webdataset.WebDataset(str(folder / "dr" / "shard-000002.tar"), shardshuffle=False, empty_check=False)
    )
    assert len(found) == 8
    for sample in found:
        arrays = np.load(io.BytesIO(sample["npz"]), allow_pickle=False)
        assert len(arrays["image_emb"]) == len(json.loads(sample["paug.json"])["param_aug"]) == 3
        assert len(arrays["text_emb"]) == 1 + len(json.loads(sample["syn.json"])["syn_text"])
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(16, 24)]


def test_replay_gives_the_teacher_its_view_again(folder: Path) -> None:
    """Pixel by pixel, with RandAugment; and the teacher says of it what is stored, to float rounding."""
    seen = np.load(folder / "seen.npy").reshape(24, 3, 3, SIZE_PX * 2, SIZE_PX * 2)
    samples = open_samples([folder / "dr"])
    teachers = [open_teacher(spec, folder) for spec in TEACHERS]
    student = Consumer(teachers[1].consumer.form, Tokenizer.open(folder / "tokenizer"))  # type: ignore[union-attr]
    inputs = Inputs.of(
        DataSpec(paths=("dr",), captions={"alt": 1, "zh": 1}),
        2,
        [student, *(teacher.consumer for teacher in teachers if teacher.consumer)],
        stored=StoredViews(2 * WIDTH),
    )
    numbers = set()
    for row in range(24):
        sample = samples.read(row)
        arrays = inputs(sample, Randomness(1, 0, row))
        at = 0
        for teacher in teachers:
            assert teacher.consumer is not None
            view = arrays[inputs.image_name(teacher.consumer)]
            if view.shape[-1] == 3:
                view = view.transpose(2, 0, 1)
            if teacher.name == "vit":
                (number,) = (n for n in range(3) if np.array_equal(view, seen[row, n]))
                numbers.add(number)
            tokens = torch.from_numpy(arrays[inputs.tokens_name(teacher.consumer)])[None]
            said = teacher(torch.from_numpy(view.copy())[None], tokens)  # type: ignore[operator]
            for rows, wanted in (
                (said.image, arrays[STORED_IMAGE][None, at : at + WIDTH]),
                (torch.cat(said.texts), arrays[STORED_TEXT][:, at : at + WIDTH]),
            ):
                unit = F.normalize(rows, dim=-1).numpy()
                assert np.abs(unit - wanted).max() < 1e-5
            at += WIDTH
    assert numbers == {0, 1, 2}


def test_the_manifest_says_who_and_how(folder: Path) -> None:
    manifest = read_reinforcement(folder / "dr")
    assert manifest is not None
    assert manifest.complete
    assert [(t.name, t.columns, t.scale, t.licence) for t in manifest.teachers] == [
        ("vit", (0, WIDTH), 30.0, "Apache-2.0"),
        ("tinyclip", (WIDTH, 2 * WIDTH), 100.0, "Apache-2.0"),
    ]
    assert all(len(teacher.sha256) == 64 for teacher in manifest.teachers)
    assert (manifest.settings.augmentations, manifest.settings.rand_augment) == (3, 2)
    for shard in manifest.shards:
        content = (folder / "dr" / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.size_bytes, shard.sha256)
        stored = [m for name, m in members(folder / "dr" / shard.name).items() if name.endswith(".npz")]
        assert (shard.samples, shard.captioned) == (len(stored), 8)
        assert shard.embedding_bytes == sum(map(len, stored))
        assert shard.payload_bytes == 8 * (3 + 3 + 1 + 1 + 1) * 2 * WIDTH * 4
    assert reinforcement_of(open_samples([folder / "dr"]), what="[data.train]") == manifest


def test_further_captions_go_behind_those_that_are_there(tmp_path: Path) -> None:
    described = {"captions": {"zh": ["一"]}, "syn": 1}
    shard = make_shard(
        tmp_path / "a.tar",
        {
            "7.jpg": picture(0, kind="JPEG"),
            "7.txt": b"real",
            "7.json": json.dumps(described).encode(),
            "7.syn.json": json.dumps({"syn_text": ["one"]}).encode(),
            "8.jpg": picture(1, kind="JPEG"),
        },
    )
    lines = [
        {"key": "a.tar/7", "captions": ["one", "two"], "zh": "二", "rewrite": ["again"]},
        {"key": "8", "alt": "only here", "synthetics": ["kept"], "zh": [" "]},
    ]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    options = ReinforceOptions(augmentations=1, captions=file, precision="float16")
    report = reinforce(open_plan([shard], [TEACHERS[1]], options, root=tmp_path), tmp_path / "out")
    assert (report.samples, report.captioned, report.broken) == (2, 2, ())
    found = members(tmp_path / "out" / "a.tar")
    assert json.loads(found["7.syn.json"]) == {"syn_text": ["one", "two"]}
    assert json.loads(found["7.json"]) == {"captions": {"zh": ["一", "二"], "rewrite": ["again"]}, "syn": 1}
    shapes = {k: v.shape[0] for k, v in np.load(io.BytesIO(found["7.npz"])).items()}
    assert shapes == {"image_emb": 1, "text_emb": 3, "caption_rewrite_emb": 1, "caption_zh_emb": 2}
    assert json.loads(found["8.json"]) == {"captions": {"alt": ["only here"], "synthetics": ["kept"]}}
    others = {k: v.shape[0] for k, v in np.load(io.BytesIO(found["8.npz"])).items()}
    assert others == {"image_emb": 1, "text_emb": 1, "caption_synthetics_emb": 1}
    again = ReinforceOptions(augmentations=2, precision="bfloat16")
    reinforce(
        open_plan([tmp_path / "out" / "a.tar"], [TEACHERS[1]], again, root=tmp_path), tmp_path / "twice"
    )
    twice = members(tmp_path / "twice" / "a.tar")
    assert "7.npz" not in twice
    assert torch.load(io.BytesIO(gzip.decompress(twice["7.pth.gz"])))["image_emb"].shape == (2, WIDTH)


# The same bytes


def test_ranks_workers_and_neighbours_do_not_matter(folder: Path, tmp_path: Path) -> None:
    captions = folder / "captions.jsonl"
    wanted = hashes(folder / "dr")
    first = make_reinforced(
        folder, "ranks", TEACHERS, rank=0, world=2, captions=captions, workers=1, **SETTINGS
    )
    assert (first.status, first.complete, first.shards, first.samples) == ("written", False, 2, 16)
    with pytest.raises(ConfigError, match=r"not all shards are made; run the same 'edgeclip reinforce'"):
        reinforcement_of(open_samples([folder / "ranks"]), what="[data.train]")
    second = make_reinforced(folder, "ranks", TEACHERS, rank=1, world=2, captions=captions, **SETTINGS)
    assert (second.status, second.complete, second.shards) == ("written", True, 1)
    assert hashes(folder / "ranks") == wanted
    options = ReinforceOptions(augmentations=3, captions=captions, **SETTINGS)
    alone = open_plan([folder / "shards" / "shard-000001.tar"], TEACHERS, options, root=folder)
    reinforce(alone, tmp_path / "alone")
    assert hashes(tmp_path / "alone")["shard-000001.tar"] == wanted["shard-000001.tar"]


def test_what_is_missing_or_damaged_is_made_again(folder: Path) -> None:
    shutil.copytree(folder / "dr", folder / "damaged")
    wanted = hashes(folder / "dr")
    (folder / "damaged" / "shard-000000.tar").unlink()
    with (folder / "damaged" / "shard-000002.tar").open("r+b") as stream:
        stream.write(b"\xff")
    (folder / "damaged" / "shard-000001.reinforced.json").write_text("{")
    for name in ("shard-000001.tar", "reinforcement.json"):  # killed just before it would have gone
        (folder / "damaged" / f".edgeclip-tmp-{name}").mkdir()
    again = make_reinforced(folder, "damaged", TEACHERS, captions=folder / "captions.jsonl", **SETTINGS)
    assert (again.status, again.complete) == ("written", True)
    assert hashes(folder / "damaged") == wanted
    there = make_reinforced(folder, "damaged", TEACHERS, captions=folder / "captions.jsonl", **SETTINGS)
    assert (there.status, there.complete, there.samples) == ("present", True, 24)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_shards(tmp_path: Path, repo: Path) -> None:
    make_shapes(tmp_path, train=32, held_out=4, per_shard=4)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EDGECLIP_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, repo / "tests" / "tools" / "kill_reinforce.py", tmp_path, "20"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["killed"] == 20
    assert said["same"] is True
    assert said["left_temporary"] >= 5  # kills did hit the work
    assert said["compared"] >= 1
    assert not [name for name in said["files"] if name.startswith(".")]


# What cannot be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augmentations": 4}, "made otherwise: augmentations is 3, not 4"),
        ({"seed": 1}, "made otherwise: seed is 0, not 1"),
        ({"precision": "float16"}, "precision is float32, not float16"),
        ({"captions": None}, "captions is [0-9a-f]{64}, not "),
    ],
)
def test_a_directory_made_otherwise_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    before = hashes(folder / "dr")
    said = {"captions": folder / "captions.jsonl", **SETTINGS, **change}
    with pytest.raises(InputError, match=message):
        make_reinforced(folder, "dr", TEACHERS, **said)
    assert hashes(folder / "dr") == before


def test_directories_of_others_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"teachers are \['vit', 'tinyclip'\], not \['vit'\]"):
        make_reinforced(folder, "dr", TEACHERS[:1], captions=folder / "captions.jsonl", **SETTINGS)
    with pytest.raises(InputError, match=r"scale of the teacher 'vit' is 30\.0, not 31\.0"):
        make_reinforced(
            folder,
            "dr",
            [probe("vit", scale=31), TEACHERS[1]],
            captions=folder / "captions.jsonl",
            **SETTINGS,
        )
    with pytest.raises(InputError, match="holds the shards that are read"):
        make_reinforced(folder, "shards", TEACHERS)
    with pytest.raises(InputError, match=r"holds 'shapes', but no reinforcement\.json|holds 'captions"):
        make_reinforced(folder, ".", TEACHERS)
    (folder / "file").write_text("")
    with pytest.raises(InputError, match="file' is a file"):
        make_reinforced(folder, "file", TEACHERS)
    options = ReinforceOptions()
    one = [folder / "shards" / "shard-000000.tar"]
    with pytest.raises(InputError, match="the input was 3 shards of 24 samples"):
        reinforce(
            open_plan(one, TEACHERS, ReinforceOptions(
                augmentations=3, captions=folder / "captions.jsonl", **SETTINGS), root=folder), folder / "dr"
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"two shards are called 'shard-000000\.tar'"):
        open_plan(one * 2, TEACHERS, options, root=folder)
    with pytest.raises(ConfigError, match=r"teachers are called \['vit', 'vit'\]"):
        open_plan(one, [TEACHERS[0], TEACHERS[0]], options, root=folder)
    with pytest.raises(ConfigError, match="no teacher"):
        open_plan(one, [], options, root=folder)
    with pytest.raises(ConfigError, match="'kept'"):
        open_plan(one, [StoredTeacher(name="kept")], options, root=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentations": 0}, "augmentations is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"crop_scale": (0.9, 0.1)}, r"scale is \(0.9, 0.1\)"),
        ({"rand_augment_magnitude": 31}, "magnitude is 31"),
    ],
)
def test_settings_that_cannot_be(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_plan([folder / "shards"], TEACHERS, ReinforceOptions(**options), root=folder)


def test_a_shard_that_is_being_made_is_left_to_its_process(folder: Path) -> None:
    out = folder / "locked"
    staging = out / ".edgeclip-tmp-shard-000000.tar"
    staging.mkdir(parents=True)
    lock = DirectoryLock(staging)
    try:
        with pytest.raises(InputError, match="is being made by another process"):
            make_reinforced(folder, "locked", TEACHERS, **SETTINGS)
    finally:
        lock.release()
    assert not list(out.glob("shard-*"))


def test_the_manifest_is_completed_though_another_process_holds_its_folder_for_a_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "dr", folder / "held")
    manifest = folder / "held" / "reinforcement.json"
    wanted = manifest.read_bytes()
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    staging = folder / "held" / ".edgeclip-tmp-reinforcement.json"
    staging.mkdir()
    lock = DirectoryLock(staging)
    monkeypatch.setattr(reinforce_module.time, "sleep", lambda seconds: lock.release())
    report = make_reinforced(folder, "held", TEACHERS, captions=folder / "captions.jsonl", **SETTINGS)
    assert (report.status, report.complete) == ("present", True)
    assert manifest.read_bytes() == wanted


def test_a_worker_that_is_killed_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module._Preparing, "_prepared", lambda self, row: os._exit(9))
    with pytest.raises(EdgeClipError, match=r"preparing samples: DataLoader worker .* Take fewer workers"):
        make_reinforced(folder, "killed", TEACHERS, workers=1, **SETTINGS)


def test_broken_samples_are_left_out_under_the_limit(tmp_path: Path) -> None:
    good = picture(0, kind="JPEG")
    (tmp_path / "in").mkdir()
    make_shard(
        tmp_path / "in" / "a.tar",
        {
            "0.jpg": good, "0.txt": b"fine",
            "1.jpg": good[: len(good) // 2], "1.txt": b"cut off",
            "2.jpg": good,
            "3.txt": b"no picture",
            "4.png": picture(4), "4.txt": b"fine too",
        },
    )  # fmt: skip
    (tmp_path / "none.jsonl").write_text('{"key": "9", "captions": ["nobody"]}\n', encoding="utf-8")

    def plan(count: int) -> Any:
        options = ReinforceOptions(
            augmentations=2, limit=BrokenLimit(1.0, count), captions=tmp_path / "none.jsonl"
        )
        return open_plan([tmp_path / "in"], [TEACHERS[1]], options, root=tmp_path)

    tried = reinforce(plan(2), tmp_path / "out", dry_run=True)
    assert (tried.samples, tried.without_picture) == (4, 1)
    with pytest.raises(InputError, match=r"2 of 4 samples cannot be used, 1 are allowed.*'a\.tar/2'"):
        reinforce(plan(1), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["reinforcement.json"]
    report = reinforce(plan(2), tmp_path / "out")
    assert (report.samples, report.without_picture, report.captioned) == (2, 1, 0)
    assert [one.key for one in report.broken] == ["a.tar/1", "a.tar/2"]
    assert "cannot be decoded" in report.broken[0].reason
    assert "has no caption" in report.broken[1].reason
    manifest = read_reinforcement(tmp_path / "out")
    assert manifest is not None
    assert [one.key for one in manifest.shards[0].broken] == ["a.tar/1", "a.tar/2"]
    kept = reinforce(plan(2), tmp_path / "out")
    assert (kept.status, [one.key for one in kept.broken]) == ("present", ["a.tar/1", "a.tar/2"])
    assert kept.to_dict()["broken"][1]["key"] == "a.tar/2"
    with pytest.raises(InputError, match="2 of 4 samples cannot be used, 1 are allowed"):
        reinforce(plan(1), tmp_path / "out")
    make_shard(tmp_path / "in" / "b.tar", {"0.jpg": good, "0.txt": b"fine", "1.jpg": good})
    with pytest.raises(InputError, match=r"3 of 6 samples cannot be used, 2 are allowed.*'b\.tar/1'"):
        reinforce(plan(2), tmp_path / "two")


def test_shards_without_pictures_are_explained(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "00000000.tar", {"0.npz": b"", "0.paug.json": b"{}", "0.syn.json": b"{}"})
    message = (
        r"00000000\.tar': 1 samples have no picture \(members: npz, paug\.json, syn\.json\)\. .*DataComp-12M"
    )
    with pytest.raises(InputError, match=message):
        open_plan([shard], TEACHERS, ReinforceOptions(), root=tmp_path)
    with pytest.raises(InputError, match=message):
        open_samples([shard])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"captions": ["x"]}', "line 2: no 'key'"),
        ('{"key": "0"}', "line 2: got the key '0' and the kinds"),
        ('{"key": "0", "captions": [1]}', "line 2: Expected `str`"),
        ("[]", "line 2: Expected `object`"),
        ("{", "line 2: Input data was truncated"),
    ],
)
def test_caption_files_are_checked(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text('{"key": "1", "zh": "x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        CaptionFile(file)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        CaptionFile(tmp_path / "nothing")


def test_streams_follow_the_shard_and_not_its_place(folder: Path) -> None:
    """Two shards of the same samples have the same views; other samples have others."""
    shards = [ShardSamples([folder / "shards" / f"shard-00000{number}.tar"]) for number in range(3)]
    assert len({shard.indexes[0].digest for shard in shards}) == 3
    views = [
        content
        for number in range(3)
        for name, content in sorted(members(folder / "dr" / f"shard-00000{number}.tar").items())
        if name.endswith("paug.json")
    ]
    assert len(set(views)) == 24
