from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from edgeclip.distill.state import (  # noqa: E402
    Position,
    TrainingState,
    latest_state,
    load_state,
    optimizer_moments,
    restore_moments,
    save_state,
)
from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.models.checkpoints import CheckpointInfo  # noqa: E402
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import BagTextConfig, CLIPConfig, FastViTConfig  # noqa: E402

CONFIG = CLIPConfig(
    name="tiny",
    image=FastViTConfig(
        dims=(8, 16), depths=(1, 1), mixers=("repmixer", "attention"), head_dim=8, embed_dim=8
    ),
    text=BagTextConfig(
        vocab_size=50, context_length=8, pad_id=49, width=8, heads=2, hidden_dim=8, embed_dim=8
    ),
    image_size_px=(32, 32),
)
INFO = CheckpointInfo(config=CONFIG, scale=10.0, tokenizer_files={})
DIGEST = "d" * 64


def model(seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return build_clip(CONFIG, scale=10.0)


def step(made: CLIP, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, text, scale = made(
        torch.rand(4, 3, 32, 32, generator=generator), torch.randint(0, 49, (4, 8), generator=generator)
    )
    loss = nn.functional.cross_entropy(scale * image @ text.T, torch.arange(4))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def names(made: CLIP) -> dict[int, str]:
    return {id(parameter): name for name, parameter in made.named_parameters()}


def state(made: CLIP, optimizer: torch.optim.Optimizer, done: int) -> TrainingState:
    return TrainingState(
        Position(step=done, total_steps=done, broken=2),
        DIGEST,
        moments=optimizer_moments(optimizer, names(made)),
        objective={"biases.0": torch.tensor(-3.0)},
        ema={"x": torch.ones(2)},
        scaler={"scale": 1024.0},
    )


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, resumed = model(), model()
    for made, pause in ((straight, False), (resumed, True)):
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        for number in range(3):
            step(made, optimizer, number)
        if pause:
            saved = save_state(tmp_path, made, INFO, state(made, optimizer, 3), tokenizer_files={})
            made = resumed = model(seed=9)
            found = load_state(saved, made, recipe_digest=DIGEST)
            optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
            restore_moments(optimizer, names(made), found.moments)
            assert found.position == Position(step=3, total_steps=3, broken=2)
            assert found.objective["biases.0"] == -3
            assert found.scaler == {"scale": 1024.0}
            assert torch.equal(found.ema["x"], torch.ones(2))
        for number in range(3, 6):
            step(made, optimizer, number)
    for (name, expected), got in zip(
        straight.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, got), name


def saved(directory: Path, done: int) -> Path:
    made = model()
    optimizer = torch.optim.AdamW(made.parameters())
    return save_state(directory, made, INFO, state(made, optimizer, done), tokenizer_files={})


def test_the_newest_states_stay(tmp_path: Path) -> None:
    for done in (1, 2, 10):
        saved(tmp_path, done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    latest = latest_state(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000010"


def test_nothing_to_resume_is_none(tmp_path: Path) -> None:
    assert latest_state(tmp_path / "nowhere") is None
    (tmp_path / ".partial-step-00000001").mkdir()
    assert latest_state(tmp_path) is None


def test_another_recipe_cannot_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another recipe \(digest dddddddd, now eeeeeeee\)"):
        load_state(saved(tmp_path, 1), model(), recipe_digest="e" * 64)


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    wider = build_clip(dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, hidden_dim=9)))
    with pytest.raises(InputError, match=r"weights and model disagree about \['text_tower\.hidden\.bias'"):
        load_state(path, wider, recipe_digest=DIGEST)


@pytest.mark.parametrize("file", ["state.json", "optimizer.safetensors", "model.safetensors"])
def test_damaged_files_are_named(tmp_path: Path, file: str) -> None:
    path = saved(tmp_path, 1)
    (path / file).write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"step-00000001' cannot be read"):
        load_state(path, model(), recipe_digest=DIGEST)


def test_tensors_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    save_file({"other:x": torch.zeros(1)}, path / "optimizer.safetensors")
    with pytest.raises(InputError, match="step-00000001' cannot be read: 'other'"):
        load_state(path, model(), recipe_digest=DIGEST)


def test_a_state_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    said = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(said | {"schema": 7}))
    with pytest.raises(ConfigError, match="got schema 7, expected 1"):
        load_state(path, model(), recipe_digest=DIGEST)


def test_moments_of_no_parameter_are_refused() -> None:
    made = model()
    optimizer = torch.optim.AdamW(made.parameters())
    moments: dict[str, Tensor] = {"nothing.weight/exp_avg": torch.zeros(2)}
    with pytest.raises(InputError, match=r"'nothing.weight/exp_avg' of shape"):
        restore_moments(optimizer, names(made), moments)


def test_an_unwritable_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        saved(tmp_path / "file", 1)


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_state
for done in range(1, 10_000):
    test_state.saved(Path(sys.argv[1]), done)
    print(done, flush=True)
"""


@pytest.mark.slow
def test_after_a_kill_at_any_moment_a_complete_state_is_there(tmp_path: Path) -> None:
    for trial in range(5):
        directory = tmp_path / str(trial)
        command = [sys.executable, "-c", _WRITER, str(directory), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            written = int(writer.stdout.readline())
            time.sleep(0.013 * trial)
            writer.send_signal(signal.SIGKILL)
        latest = latest_state(directory)
        assert latest is not None
        found = load_state(latest, model(), recipe_digest=DIGEST)
        assert found.position.total_steps >= written
        assert dataclasses.replace(found.position, step=0, total_steps=0) == Position(broken=2)
