from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from edgeclip.distill.optim import build_optimizer, learning_rate_factor, parameter_groups  # noqa: E402
from edgeclip.distill.recipe import (  # noqa: E402
    GroupSpec,
    InfoNCELoss,
    OptimizerSpec,
    ScheduleSpec,
    StageSpec,
)
from edgeclip.errors import ConfigError  # noqa: E402


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_tower = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.text_tower = nn.Linear(4, 4)
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.position = nn.Parameter(torch.ones(7, 4))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def stage(*groups: GroupSpec, train_scale: bool = True) -> StageSpec:
    return StageSpec(
        name="one", data="train", samples=100, batch_size=10, loss=(InfoNCELoss(),), group=groups,
        optimizer=OptimizerSpec(learning_rate=0.01, weight_decay=0.3), train_scale=train_scale,
    )  # fmt: skip


def test_vectors_scales_and_positions_are_not_decayed() -> None:
    groups = {group.weight_decay: set(group.names) for group in parameter_groups(Model(), stage())}
    assert groups[0.3] == {"image_tower.0.weight", "text_tower.weight"}
    assert groups[0.0] == {
        "image_tower.0.bias", "image_tower.1.weight", "image_tower.1.bias", "text_tower.bias",
        "layer_scale", "position", "logit_scale",
    }  # fmt: skip


def test_the_first_group_that_matches_decides_and_zero_freezes() -> None:
    model = Model()
    optimizer = build_optimizer(
        model,
        stage(
            GroupSpec(match="image_tower.1.*", learning_rate=0.5),
            GroupSpec(match="image_tower.*", learning_rate=0),
        ),
    )
    assert not model.image_tower[0].weight.requires_grad
    assert model.image_tower[1].weight.requires_grad
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates[id(model.image_tower[1].weight)] == pytest.approx(0.005)
    assert rates[id(model.text_tower.weight)] == pytest.approx(0.01)
    assert id(model.image_tower[0].weight) not in rates


def test_a_fixed_scale_is_not_trained() -> None:
    model = Model()
    build_optimizer(model, stage(train_scale=False))
    assert not model.logit_scale.requires_grad


def test_a_pattern_without_a_parameter_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'visual.\*' matches no parameter.*has 9, such as .*'position'"):
        parameter_groups(Model(), stage(GroupSpec(match="visual.*")))


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="stage 'one': every parameter is frozen"):
        parameter_groups(Model(), stage(GroupSpec(match="*", learning_rate=0)))


def test_warm_up_is_linear_and_the_cosine_ends_on_the_last_step() -> None:
    schedule, steps = ScheduleSpec(warmup=4, final=0.1), 21
    rates = [learning_rate_factor(schedule, step, steps) for step in range(steps)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_cosine_equals_the_library_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    library = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.2)
    for step in range(10):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_factor(ScheduleSpec(final=0.2), step, 10) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        library.step()


def test_constant_stays() -> None:
    schedule = ScheduleSpec(kind="constant", warmup=2)
    assert [learning_rate_factor(schedule, step, 5) for step in range(5)] == [0.5, 1, 1, 1, 1]
