"""What int8 costs and which products stay float, on towers whose answers are known."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.calibration.latency_table import LatencyTable, NodeTime, Tensors
from edgeclip.calibration.sensitivity import Int8Target, Score, Sensitivity, choose, measure
from edgeclip.errors import CalibrationError, ConfigError, InputError
from edgeclip.runtime.parity import compare_embeddings

WIDTH = 64


@dataclass
class Board:
    """A tower whose products each move the embedding by so much, each in a direction of its own."""

    moves: Mapping[str, float]
    blocks: Mapping[str, str]
    digest: str = "0" * 64
    stop_after: int | None = None
    asked: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self.moves)

    def embed(self, rows: NDArray[Any], on: Collection[str]) -> NDArray[np.float32]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(tuple(sorted(on)))
        moved = rows.astype(np.float64)
        for place, name in enumerate(self.moves):
            if name in on:
                moved[:, -1 - place] += self.moves[name]
        return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def rows_of(count: int = 40, *, seed: int = 0) -> NDArray[np.float32]:
    rows = np.zeros((count, WIDTH), np.float32)
    rows[:, :16] = np.random.default_rng(seed).normal(size=(count, 16))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def board_of(**moves: float) -> Board:
    return Board(moves, {name: name[0] for name in moves})


MOVES = {"a1": 0.02, "a2": 0.30, "b1": 0.05, "b2": 0.11, "b3": 0.01, "c1": 0.20, "c2": 0.08, "c3": 0.15}
GAINS = {"a1": 1.0, "a2": 0.5, "b1": 2.0, "b2": 0.2, "b3": 0.7, "c1": 3.0, "c2": 0.1, "c3": 0.6}


def table_of(gains: Mapping[str, float]) -> LatencyTable:
    return LatencyTable({name: NodeTime(gain + 5.0, 5.0) for name, gain in gains.items()})


def scored(board: Board, rows: NDArray[Any]) -> Score:
    reference = board.embed(rows, ())
    return lambda on: compare_embeddings(reference, board.embed(rows, on))


# --- measuring ---------------------------------------------------------------------------------------------


def test_cost_is_what_the_embedding_loses() -> None:
    found = measure(board_of(**MOVES), rows_of())
    for name, move in MOVES.items():
        # A unit vector that is moved at a right angle by m turns by arctan m.
        assert found.nodes[name].cosine == pytest.approx(1 - np.cos(np.arctan(move)), abs=1e-6)
        assert found.nodes[name].flips is None
    both = np.hypot(MOVES["a1"], MOVES["a2"])
    assert found.blocks["a"].cosine == pytest.approx(1 - np.cos(np.arctan(both)), abs=1e-6)
    everything = np.linalg.norm(list(MOVES.values()))
    assert found.everything.cosine == pytest.approx(1 - np.cos(np.arctan(everything)), abs=1e-6)
    assert found.worst()[:3] == ["a2", "c1", "c3"]
    assert list(found.nodes) == list(MOVES)
    assert found.block_of["b2"] == "b"


def test_flips_are_the_share_of_rows_with_another_best_label() -> None:
    rows = np.zeros((4, WIDTH), np.float32)
    rows[:, 0], rows[:, 1] = 1.0, [0.99, 0.5, 0.99, 0.0]
    bank = np.zeros((2, WIDTH), np.float32)
    bank[0, 0], bank[1, 1], bank[1, -1] = 1.0, 1.0, 1.0
    found = measure(board_of(one=0.02, two=0.0), rows, bank / np.linalg.norm(bank, axis=1, keepdims=True))
    # Both labels are as near as 1 / 0.71 allows: recomputed by hand.
    flipped = 0
    for row in rows:
        before = np.argmax([row[0], (row[1] + row[-1]) / np.sqrt(2)])
        after = np.argmax([row[0], (row[1] + row[-1] + 0.02) / np.sqrt(2)])
        flipped += int(before != after)
    assert found.nodes["one"].flips == flipped / 4
    assert found.nodes["two"].flips == 0


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    board, rows = board_of(**MOVES), rows_of()
    board.stop_after = 4  # the float embeddings and three products
    with pytest.raises(KeyboardInterrupt):
        measure(board, rows, state=tmp_path)
    again = board_of(**MOVES)
    seen: list[tuple[int, int, str]] = []
    found = measure(again, rows, state=tmp_path, on_node=lambda *said: seen.append(said))
    assert ("a1",) not in again.asked
    assert ("b1",) not in again.asked
    assert again.asked[:2] == [(), ("b2",)]
    assert seen[-1] == (12, 12, "everything")
    assert found == measure(board_of(**MOVES), rows)
    # All is known now: nothing is asked.
    last = board_of(**MOVES)
    assert measure(last, rows, state=tmp_path) == found
    assert last.asked == []


@pytest.mark.parametrize("torn", ["{", '{"kind": "node", "na', "\x00\x00", "[]", "12"])
def test_a_torn_line_is_measured_again(tmp_path: Path, torn: str) -> None:
    found = measure(board_of(**MOVES), rows_of(), state=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:-1], torn]), encoding="utf-8")
    board = board_of(**MOVES)
    assert measure(board, rows_of(), state=tmp_path) == found
    assert board.asked == [(), tuple(sorted(MOVES))]
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        json.loads(line) for line in lines
    ]


@pytest.mark.parametrize("writes", [0, 2])
def test_a_full_disk_keeps_nothing_and_stops_nothing(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = measure(board_of(**MOVES), rows_of())
    left = [writes]
    sync = os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    assert measure(board_of(**MOVES), rows_of(), state=tmp_path) == expected
    assert caplog.text.count("cannot be kept in") == 1
    (tmp_path / "file").write_bytes(b"")
    assert measure(board_of(**MOVES), rows_of(), state=tmp_path / "file") == expected
    assert caplog.text.count("cannot be kept in") == 2


def test_other_inputs_have_another_state(tmp_path: Path) -> None:
    measure(board_of(**MOVES), rows_of(), state=tmp_path)
    for board, rows, bank in (
        (board_of(**MOVES), rows_of(seed=1), None),
        (board_of(**MOVES), rows_of(), rows_of(2)),
        (Board(MOVES, {name: name[0] for name in MOVES}, digest="1" * 64), rows_of(), None),
    ):
        measure(board, rows, bank, state=tmp_path)
        assert len(board.asked) > len(MOVES)
    assert len(list(tmp_path.glob("*.jsonl"))) == 4


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"sensitivity of 'bad': 40 of 40 embeddings are not finite"):
        measure(board_of(good=0.1, bad=float("nan")), rows_of())


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(CalibrationError, match="without products in int8"):
        measure(board_of(), rows_of())


# --- choosing ----------------------------------------------------------------------------------------------


def choice_of(target: str, gains: Mapping[str, float] = GAINS, **more: Any) -> Any:
    board, rows = board_of(**MOVES), rows_of()
    score = scored(board, rows)
    return choose(measure(board, rows), table_of(gains), Int8Target.parse(target), score, score, **more)


@pytest.mark.parametrize("cosine", [0.95, 0.97, 0.99, 0.995, 0.999, 0.9999])
def test_the_choice_is_near_the_best_there_is(cosine: float) -> None:
    found = choice_of(f"cosine={cosine}")
    assert found.measured.cosine_mean >= cosine
    lost = sum(GAINS[name] for name in found.keep_float)
    best = min(
        sum(GAINS[name] for name in kept)
        for size in range(len(MOVES))
        for kept in itertools.combinations(MOVES, size)
        if np.cos(np.arctan(np.linalg.norm([MOVES[name] for name in MOVES if name not in kept]))) >= cosine
    )
    assert lost <= best + max(GAINS.values()) / 2
    assert found.gain_ms == pytest.approx(sum(GAINS.values()) - lost)
    assert found.possible_ms == pytest.approx(sum(GAINS.values()))


def test_nothing_stays_float_where_everything_reaches_the_target() -> None:
    found = choice_of("cosine=0.9")
    assert found.keep_float == {}
    assert [point.kept for point in found.curve] == [0]


def test_what_int8_makes_slower_stays_float() -> None:
    found = choice_of("cosine=0.9", {**GAINS, "b3": -4.0, "a1": -0.4})
    assert found.keep_float == {"b3": "int8 is 4.0000 ms slower"}  # a1 by less than half
    assert found.gain_ms == pytest.approx(found.possible_ms)


def test_where_int8_saves_nothing_the_fewest_stay_float() -> None:
    found = choice_of("cosine=0.95", dict.fromkeys(MOVES, -1.0))
    assert sorted(found.keep_float) == ["a2"]


def test_reasons_say_cost_and_time() -> None:
    found = choice_of("cosine=0.97")
    assert found.keep_float["a2"] == "int8 costs 0.042 of the cosine (0.5000 ms saved)"


def test_errors_that_lean_on_one_another_are_measured() -> None:
    """Two products whose errors cancel: costs say that both have to be float, measuring that neither has."""

    class Cancelling(Board):
        def embed(self, rows: NDArray[Any], on: Collection[str]) -> NDArray[np.float32]:
            moved = rows.astype(np.float64)
            moved[:, -1] += 0.5 * ("up" in on) - 0.5 * ("down" in on) + 0.01 * ("other" in on)
            return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)

    board, rows = (
        Cancelling({"up": 0.5, "down": 0.5, "other": 0.01}, dict.fromkeys(("up", "down", "other"), "x")),
        rows_of(),
    )
    found = measure(board, rows)
    assert found.nodes["up"].cosine > 0.1
    score = scored(board, rows)
    chosen = choose(found, table_of({"up": 1, "down": 1, "other": 1}), Int8Target(cosine=0.999), score, score)
    assert chosen.keep_float == {}


def test_the_real_graph_has_the_last_word() -> None:
    board, rows = board_of(**MOVES), rows_of()
    simulate = scored(board, rows)
    worse = scored(board_of(**{name: 1.5 * move for name, move in MOVES.items()}), rows)
    asked: list[str] = []
    found = choose(
        measure(board, rows), table_of(GAINS), Int8Target(cosine=0.99), simulate, worse, on_step=asked.append
    )
    assert found.measured.cosine_mean >= 0.99
    assert found.simulated.cosine_mean > found.measured.cosine_mean
    assert sum(said.startswith("check the real graph") for said in asked) > 1


def test_a_target_that_cannot_be_reached_says_how_far_it_got() -> None:
    with pytest.raises(
        CalibrationError,
        match=r"int8 target cosine=0.9999999: cosine_mean is 0.99995, expected at least 1 \(.*\) with 7 of 8 "
        "products in float, which is as near as it gets; give a lower target",
    ):
        choice_of("cosine=0.9999999")


def test_a_real_graph_that_never_reaches_the_target_is_an_error() -> None:
    board, rows = board_of(**MOVES), rows_of()
    broken = scored(board_of(**dict.fromkeys(MOVES, 3.0)), rows)
    with pytest.raises(
        CalibrationError, match=r"cosine_mean is 0\.\d+.* in the real graph, although simulated"
    ):
        choose(measure(board, rows), table_of(GAINS), Int8Target(cosine=0.95), scored(board, rows), broken)


def test_two_runs_choose_the_same() -> None:
    assert choice_of("cosine=0.99").to_dict() == choice_of("cosine=0.99").to_dict()


@pytest.mark.parametrize("text", ["cosine", "cosine=1.2", "top5=0.9", "cosine=0.99,", "cosine=nan", ""])
def test_targets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match=r"int8 target .*as in cosine=0.99,top1=0.98"):
        Int8Target.parse(text)


def test_a_target_reads_back() -> None:
    target = Int8Target.parse("top1=0.98, cosine=0.99")
    assert str(target) == "cosine=0.99,top1=0.98"
    assert Int8Target.parse(str(target)) == target


def test_it_is_plain_json() -> None:
    found: Sensitivity = measure(board_of(**MOVES), rows_of())
    said = json.loads(json.dumps(found.to_dict()))
    assert said["nodes"]["a2"]["block"] == "a"
    assert json.loads(json.dumps(choice_of("cosine=0.99").to_dict()))["nodes"] == 8


# --- latency tables ----------------------------------------------------------------------------------------

TENSORS = Tensors(("a", "b"), {"a": "a", "relu": "a", "b": "b"}, {"x": "a", "relu": "b"})


def test_a_table_reads_back(tmp_path: Path) -> None:
    table = LatencyTable({"a": NodeTime(2.0, 0.5)}, 3.0, "ort on a board, 2 thread(s)")
    (tmp_path / "table.json").write_text(json.dumps(table.to_dict()), encoding="utf-8")
    assert LatencyTable.read(tmp_path / "table.json", TENSORS) == table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "of kind None, expected 'latency-table'"),
        ('{"kind": "latency-table", "schema": 2}', "got schema 2, expected 1"),
        ('{"kind": "latency-table", "schema": 1, "nodes": {"a": {"float_ms": 1}}}', "KeyError"),
        (
            '{"kind": "latency-table", "schema": 1, "nodes": {"a": {"float_ms": -1, "int8_ms": 1}}}',
            "got a time of -1.0 ms",
        ),
        (
            '{"kind": "latency-table", "schema": 1, "nodes": {"z": {"float_ms": 1, "int8_ms": 1}}}',
            "knows none of the 2 products of this tower, such as 'a'",
        ),
        ('{"kind": "op-profiles", "profiles": []}', "got 0 profiles, 0 of them with int8 kernels"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "table.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        LatencyTable.read(tmp_path / "table.json", TENSORS)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"latency table '.*none.json' cannot be read"):
        LatencyTable.read(tmp_path / "none.json", TENSORS)


def test_conversions_count_for_the_product_they_are_for(tmp_path: Path) -> None:
    def profile(*ops: tuple[str, str, str | None, float]) -> dict[str, Any]:
        entries = [
            {"name": name, "kernel": kernel, "ms": ms, "share": 0.1, "samples_ms": [ms], "output": output}
            for name, kernel, output, ms in ops
        ]
        return {
            "schema": 1,
            "kind": "op-profile",
            "subject": "x",
            "created": "2026",
            "tower": "image",
            "batch": 1,
            "runs": 1,
            "warmup": 0,
            "ops": entries,
            "wall_ms": 1.0,
            "wall_samples_ms": [1.0],
            "timed_wall_ms": 1.0,
            "timed_wall_samples_ms": [1.0],
        }

    document = {
        "kind": "op-profiles",
        "profiles": [
            profile(
                ("q_x", "QuantizeLinear", "x_q", 0.1),
                ("Conv_1", "QLinearConv", "a", 1.0),
                ("dq_a", "DequantizeLinear", "relu_dq", 0.2),
                ("q_relu", "QuantizeLinear", "relu_q", 0.4),
                ("Conv_2", "QLinearConv", "b", 2.0),
                ("Add", "Add", "elsewhere", 9.0),
            ),
            profile(
                ("relu_nchwc", "Conv", None, 4.0), ("Conv_2", "Conv", "b", 5.0), ("Add", "Add", "y", 9.0)
            ),
        ],
    }
    (tmp_path / "profiles.json").write_text(json.dumps(document), encoding="utf-8")
    table = LatencyTable.read(tmp_path / "profiles.json", TENSORS)
    assert table.nodes["a"].float_ms == pytest.approx(4.0)
    assert table.nodes["a"].int8_ms == pytest.approx(1.3)
    assert table.nodes["b"].int8_ms == pytest.approx(2.4)
    assert table.nodes["b"].gain_ms == pytest.approx(2.6)
    assert table.float_ms == pytest.approx(18.0)
