"""Batches depend on the seed and the position: not on workers, ranks, restarts or broken samples."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tar_shards import make_table, picture

torch = pytest.importorskip("torch")
from edgeclip.bundle import PreprocessSpec  # noqa: E402
from edgeclip.distill.augment import Augmentation, RandAugment, RandomResizedCrop  # noqa: E402
from edgeclip.distill.batches import (  # noqa: E402
    BEGINNING,
    Batch,
    BatchLoader,
    BatchPlan,
    CaptionMix,
    Position,
    choose_captions,
    to_float,
)
from edgeclip.distill.inputs import Consumer, Inputs, ViewForm  # noqa: E402
from edgeclip.distill.randomness import Randomness, random_stream  # noqa: E402
from edgeclip.distill.samples import BrokenLimit, Sample, Samples, open_samples  # noqa: E402
from edgeclip.distill.shards import write_shards  # noqa: E402
from edgeclip.errors import ConfigError, EdgeClipError, InputError  # noqa: E402
from edgeclip.pictures import decode_image  # noqa: E402
from edgeclip.preprocess import Preprocess  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

# A test runner has threads, and may have fewer cores than these tests have workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

COUNT, BATCH = 22, 6
MIXES = (CaptionMix({"alt": 1.0, "rewrite": 2.0}), CaptionMix({"synthetic": 1.0}))
VIEW = Augmentation((RandomResizedCrop((8, 8)), RandAugment()))
TOKENIZER = Tokenizer.clip(16)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("data")
    write_shards(open_samples([make_table(folder / "files", COUNT)]), folder / "shards", samples_per_shard=5)
    return open_samples([folder / "shards"])


@pytest.fixture(scope="module")
def prepare() -> Inputs:
    return inputs(MIXES)


def inputs(captions: tuple[CaptionMix, ...], **options: Any) -> Inputs:
    crop = VIEW.transforms[0]
    assert isinstance(crop, RandomResizedCrop)
    return Inputs(VIEW, captions, (Consumer(ViewForm((8, 8), crop.interpolation), TOKENIZER),), **options)


def loader(samples: Samples, prepare: Any, *, seed: int = 1, **options: Any) -> BatchLoader:
    plan = BatchPlan(len(samples), BATCH, seed, world=options.pop("world", 1), rank=options.pop("rank", 0))
    return BatchLoader(samples, plan, prepare, **options)


def drawn(found: BatchLoader, count: int, start: Position = BEGINNING) -> list[Batch]:
    batches = found.batches(start)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for found, wanted in zip(batches, expected, strict=True):
        assert (found.position, found.keys) == (wanted.position, wanted.keys)
        assert torch.equal(found.index, wanted.index)
        assert found.arrays.keys() == wanted.arrays.keys()
        for name in wanted.arrays:
            assert found[name].dtype == wanted[name].dtype
            assert torch.equal(found[name], wanted[name]), name


# Positions


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_take_contiguous_shares_of_the_same_joint_batches(world: int) -> None:
    whole = BatchPlan(COUNT, BATCH, seed=4)
    parts = [BatchPlan(COUNT, BATCH, seed=4, world=world, rank=rank) for rank in range(world)]
    streams = [plan.requests() for plan in parts]
    for position, indices in islice(whole.requests(), 9):
        shares = [next(stream) for stream in streams]
        assert {share[0] for share in shares} == {position}
        assert np.concatenate([share[1] for share in shares]).tolist() == indices.tolist()


def test_an_epoch_holds_no_sample_twice_and_the_rest_is_another_each_time() -> None:
    plan = BatchPlan(COUNT, BATCH)
    assert plan.steps_per_epoch == 3
    found = list(islice(plan.requests(), 6))
    assert [position for position, _ in found] == [(0, 0), (0, 6), (0, 12), (1, 0), (1, 6), (1, 12)]
    epochs = [np.concatenate([indices for _, indices in found[at : at + 3]]).tolist() for at in (0, 3)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert set(epochs[0]) != set(epochs[1])


@pytest.mark.parametrize("step", range(8))
def test_a_restart_goes_on_with_the_next_batch(step: int) -> None:
    plan = BatchPlan(COUNT, BATCH, seed=2)
    whole = list(islice(plan.requests(), 9))
    position, indices = next(plan.requests(plan.after(whole[step][0])))
    assert (position, indices.tolist()) == (whole[step + 1][0], whole[step + 1][1].tolist())
    assert plan.at_step(step) == whole[step][0]


def test_another_batch_size_goes_on_where_the_first_one_was() -> None:
    small, large = BatchPlan(COUNT, 4, seed=1), BatchPlan(COUNT, 8, seed=1)
    seen = [next(small.requests(Position(0, at)))[1].tolist() for at in (0, 4)]
    assert next(large.requests())[1].tolist() == seen[0] + seen[1]
    assert large.after(Position(0, 4)) == Position(0, 12)
    assert large.after(Position(0, 12)) == Position(1, 0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"batch_size": 5, "world": 2}, "batch size 5 cannot be shared by 2 processes"),
        ({"batch_size": 0}, "batch size 0 cannot be shared"),
        ({"batch_size": 4, "world": 2, "rank": 2}, "rank is 2, expected 0 to 1"),
        ({"batch_size": 32}, "batch size 32 is larger than the data, which have 22 samples"),
    ],
)
def test_plans_that_cannot_be_are_errors(plan: Mapping[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchPlan(COUNT, **plan)


@pytest.mark.parametrize("position", [Position(-1, 0), Position(0, 23), Position(0, -6)])
def test_a_position_of_other_data_is_an_error(position: Position) -> None:
    with pytest.raises(
        ConfigError, match=f"epoch {position.epoch}, sample {position.seen}, expected at most sample 22"
    ):
        next(BatchPlan(COUNT, BATCH).requests(position))


def test_a_plan_for_other_data_is_an_error(samples: Samples, prepare: Inputs) -> None:
    with pytest.raises(ConfigError, match="the plan is for 99 samples, got 22"):
        BatchLoader(samples, BatchPlan(99, BATCH), prepare)


# The same bits


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(samples: Samples, prepare: Inputs, workers: int) -> None:
    expected = drawn(loader(samples, prepare), 7)
    assert_same(drawn(loader(samples, prepare, workers=workers), 7), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_start_anew_change_nothing(samples: Samples, prepare: Inputs, method: str) -> None:
    expected = drawn(loader(samples, prepare), 5)
    assert_same(drawn(loader(samples, prepare, workers=2, start_method=method), 5), expected)


@pytest.mark.parametrize("step", range(7))
def test_a_restart_changes_nothing(samples: Samples, prepare: Inputs, step: int) -> None:
    whole = drawn(loader(samples, prepare), 8)
    found = loader(samples, prepare)
    assert_same(drawn(found, 8 - step - 1, found.plan.after(whole[step].position)), whole[step + 1 :])


def test_ranks_together_see_what_one_process_sees(samples: Samples, prepare: Inputs) -> None:
    whole = drawn(loader(samples, prepare), 4)
    ranks = [drawn(loader(samples, prepare, world=3, rank=rank), 4) for rank in range(3)]
    for step, expected in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([share.index for share in shares]), expected.index)
        for name in expected.arrays:
            assert torch.equal(torch.cat([share[name] for share in shares]), expected[name])


def test_another_seed_and_another_epoch_are_other_batches(samples: Samples, prepare: Inputs) -> None:
    batches = drawn(loader(samples, prepare), 6)
    assert batches[0].keys != drawn(loader(samples, prepare, seed=2), 1)[0].keys
    views = [
        {key: batch["image"][row] for batch in epoch for row, key in enumerate(batch.keys)}
        for epoch in (batches[:3], batches[3:])
    ]
    common = views[0].keys() & views[1].keys()
    assert len(common) > 10
    assert not any(torch.equal(views[0][key], views[1][key]) for key in common)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generators_alone(samples: Samples, prepare: Inputs, workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(loader(samples, prepare, workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_shards_and_files_give_the_same_batches(tmp_path: Path, samples: Samples, prepare: Inputs) -> None:
    files = open_samples([make_table(tmp_path, COUNT)])
    for one, other in zip(drawn(loader(samples, prepare), 3), drawn(loader(files, prepare), 3), strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["tokens"], other["tokens"])


# What is in a batch


def test_a_batch_holds_views_and_tokens_of_the_chosen_captions(samples: Samples, prepare: Inputs) -> None:
    batch = drawn(loader(samples, prepare), 1)[0]
    assert (batch["image"].dtype, tuple(batch["image"].shape)) == (torch.uint8, (BATCH, 3, 8, 8))
    assert (batch["tokens"].dtype, tuple(batch["tokens"].shape)) == (torch.int32, (BATCH, 2, 16))
    assert batch["image"].is_contiguous()
    assert len(batch) == BATCH
    for row, number in enumerate(batch.index.tolist()):
        sample, randomness = samples.read(number), Randomness(1, 0, number)
        assert batch.keys[row] == sample.key
        pixels = VIEW(decode_image(sample.image), randomness.stream("view"))
        assert torch.equal(batch["image"][row], torch.from_numpy(pixels).permute(2, 0, 1))
        chosen = choose_captions(MIXES, sample.captions, randomness.stream("caption"))
        assert [caption.kind for caption in chosen] in (["alt", "synthetic"], ["rewrite", "synthetic"])
        ids = TOKENIZER([caption.text for caption in chosen])
        np.testing.assert_array_equal(batch["tokens"][row].numpy(), ids)


def test_moving_keeps_everything_else(samples: Samples, prepare: Inputs) -> None:
    batch = drawn(loader(samples, prepare), 1)[0]
    assert_same([batch.to("cpu")], [batch])
    assert batch.to("meta")["image"].device.type == "meta"


def test_to_float_is_the_preprocessing_of_the_runtime() -> None:
    spec = PreprocessSpec(
        image_size_px=(9, 7),
        resize="squash",
        crop="none",
        interpolation="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        applied="host",
    )
    levels = np.arange(4 * 9 * 7 * 3).reshape(4, 9, 7, 3).astype(np.uint8)
    found = to_float(torch.from_numpy(levels).permute(0, 3, 1, 2), mean=spec.mean, std=spec.std)
    np.testing.assert_array_equal(found.numpy(), Preprocess(spec).normalize(levels))


def test_to_float_refuses_other_arrays() -> None:
    with pytest.raises(InputError, match=r"got torch.uint8 \(2, 8, 8, 3\), expected uint8 \(B, 3, H, W\)"):
        to_float(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), mean=(0, 0, 0), std=(1, 1, 1))


def test_views_of_different_sizes_are_an_error(samples: Samples) -> None:
    def prepare(sample: Sample, randomness: Randomness) -> dict[str, Any]:
        return {"image": np.zeros((randomness.index % 2 + 1, 4, 3), np.uint8)}

    with pytest.raises(
        InputError, match=r"epoch 0, sample 0: 'image' comes in the shapes \[\(1, 4, 3\), \(2, 4, 3\)\]"
    ):
        drawn(loader(samples, prepare), 1)


# Captions


def test_captions_are_drawn_by_weight_then_evenly() -> None:
    captions = {"alt": ("a",), "rewrite": ("r0", "r1"), "zh": ("z",)}
    mix = CaptionMix({"alt": 1.0, "rewrite": 3.0})
    count = 4000
    seen = Counter(mix.choose(captions, random_stream(0, 0, index, "caption")) for index in range(count))
    expected = {("alt", 0, "a"): 0.25, ("rewrite", 0, "r0"): 0.375, ("rewrite", 1, "r1"): 0.375}
    assert set(seen) == set(expected)
    for caption, share in expected.items():
        # 4 standard deviations of a share in this many draws
        assert abs(seen[caption] / count - share) < 4 * (share * (1 - share) / count) ** 0.5  # type: ignore[index]


def test_kinds_that_a_sample_lacks_leave_their_weight_to_the_others() -> None:
    mix = CaptionMix({"alt": 1.0, "synthetic": 99.0})
    assert mix.choose({"alt": ("a",)}, random_stream(0, 0, 0, "caption")).text == "a"


def test_one_caption_is_not_chosen_twice_while_there_is_another() -> None:
    mixes = (CaptionMix({"alt": 1.0}), CaptionMix({"alt": 1.0}), CaptionMix({"alt": 1.0}))
    for index in range(50):
        chosen = choose_captions(mixes, {"alt": ("a", "b")}, random_stream(0, 0, index, "caption"))
        assert {caption.text for caption in chosen[:2]} == {"a", "b"}
        assert len(chosen) == 3


def test_a_sample_without_the_kinds_asked_for_is_an_error() -> None:
    with pytest.raises(InputError, match="captions: the sample has alt, zh, expected rewrite or synthetic"):
        CaptionMix({"synthetic": 1.0, "rewrite": 1.0}).choose(
            {"zh": ("z",), "alt": ("a",)}, random_stream(0, 0, 0, "caption")
        )


@pytest.mark.parametrize("weights", [{}, {"alt": 0.0}, {"alt": -1.0}, {"alt": float("nan")}])
def test_weights_that_mean_nothing_are_errors(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"captions: weights are \{.*expected positive numbers by kind"):
        CaptionMix(weights)


# Broken samples


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    table = make_table(tmp_path_factory.mktemp("torn"), COUNT, broken=frozenset({3, 8, 9}))
    return open_samples([table])


def test_broken_samples_are_replaced_by_the_same_ones_whoever_finds_them(
    torn: Samples, prepare: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    limit = BrokenLimit(share=0.5)
    alone = loader(torn, prepare, limit=limit)
    with caplog.at_level(logging.WARNING):
        expected = drawn(alone, 9)
    assert {broken.key for broken in alone.broken.values()} == {"003.png", "008.png", "009.png"}
    assert set(alone.broken) == {3, 8, 9}
    assert all("003.png" not in batch.keys for batch in expected)
    assert len([record for record in caplog.records if "sample left out" in record.getMessage()]) == 3
    assert "003.png" in caplog.text

    helped = loader(torn, prepare, workers=2, limit=limit)
    assert_same(drawn(helped, 9), expected)
    assert set(helped.broken) == {3, 8, 9}
    assert_same(drawn(loader(torn, prepare, limit=limit), 4, expected[5].position), expected[5:])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_samples_are_an_error(torn: Samples, prepare: Inputs, workers: int) -> None:
    with pytest.raises(
        InputError, match=r"3 of 22 samples cannot be used, 2 are allowed; the last one is '00\d\.png'"
    ):
        drawn(loader(torn, prepare, workers=workers, limit=BrokenLimit(count=2, share=1.0)), 9)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_have_gone_are_an_error_at_once(tmp_path: Path, prepare: Inputs, workers: int) -> None:
    samples = open_samples([make_table(tmp_path, COUNT)])
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"^32 samples in a row cannot be used, the last one is '0\d\d\.png'"
    ):
        drawn(loader(samples, prepare, workers=workers, limit=BrokenLimit(1.0)), 1)


def test_pictures_above_the_limit_count_as_broken(tmp_path: Path) -> None:
    table = make_table(tmp_path, COUNT)
    (tmp_path / "005.png").write_bytes(picture(5, size_px=(50, 50)))
    small = inputs((CaptionMix(),), max_pixels=1000)
    found = loader(open_samples([table]), small)
    drawn(found, 9)
    assert [broken.key for broken in found.broken.values()] == ["005.png"]


@dataclass(frozen=True)
class Dies:
    """Ends its process at one sample, as the system does where memory runs out."""

    parent: int

    def __call__(self, sample: Sample, randomness: Randomness) -> dict[str, Any]:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": np.zeros((2, 2, 3), np.uint8)}


def test_a_worker_that_was_killed_is_one_sentence(samples: Samples) -> None:
    with pytest.raises(EdgeClipError, match=r"reading batches: .*worker.*\d.* Take fewer workers"):
        drawn(loader(samples, Dies(os.getpid()), workers=1), 1)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_to_the_group(
    number: signal.Signals, samples: Samples, prepare: Inputs
) -> None:
    found = loader(samples, prepare, workers=1).batches()
    drawn = [next(found)]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, number)
    drawn += islice(found, 9)
    assert [batch.position for batch in drawn] == [
        batch.position for batch in islice(loader(samples, prepare).batches(), 10)
    ]
    found.close()  # type: ignore[attr-defined]
    assert not worker.is_alive()
