"""Every loss against the definition written out row by row, its gradient, slicing, and two ranks."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from edgeclip.distill import losses  # noqa: E402
from edgeclip.distill.pairs import Pairs  # noqa: E402
from edgeclip.errors import ConfigError, InputError  # noqa: E402

SCALE = 7.0
IDS = torch.tensor([0, 1, 2, 0, 4])


def unit(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


def pairs(seed: int = 0, *, width: int = 4, ids: Tensor | None = None) -> Pairs:
    return Pairs.gather(unit(5, width, seed), unit(5, width, seed + 50), ids=ids)


def cross_entropy(logits: list[list[float]], targets: list[list[float]]) -> float:
    """Return the mean cross-entropy of rows, from the definition."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        denominator = sum(math.exp(value) for value in row)
        total -= sum(
            share * math.log(math.exp(value) / denominator) for value, share in zip(row, target, strict=True)
        )
    return total / len(logits)


def cosines(rows: Tensor, columns: Tensor, scale: float = SCALE) -> list[list[float]]:
    return [[scale * float(row @ column) for column in columns] for row in rows]


def one_hot(ids: Tensor | None = None) -> list[list[float]]:
    said = range(5) if ids is None else ids.tolist()
    rows = [[float(first == second) for second in said] for first in said]
    return [[value / sum(row) for value in row] for row in rows]


@pytest.mark.parametrize("ids", [None, IDS])
def test_info_nce_is_the_mean_cross_entropy_of_both_directions(ids: Tensor | None) -> None:
    batch = pairs(ids=ids)
    expected = (
        cross_entropy(cosines(batch.image, batch.text), one_hot(ids))
        + cross_entropy(cosines(batch.text, batch.image), one_hot(ids))
    ) / 2
    assert float(losses.info_nce(batch, SCALE)) == pytest.approx(expected, rel=1e-12)


def test_info_nce_equals_the_library_function_of_the_field() -> None:
    batch = pairs()
    logits, target = SCALE * batch.image @ batch.text.T, torch.arange(5)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert torch.allclose(losses.info_nce(batch, SCALE), expected, rtol=1e-12)


def test_softness_moves_that_share_to_the_negatives() -> None:
    batch, softness = pairs(), 0.2
    targets = [[0.8 if row == column else 0.05 for column in range(5)] for row in range(5)]
    expected = (
        cross_entropy(cosines(batch.image, batch.text), targets)
        + cross_entropy(cosines(batch.text, batch.image), targets)
    ) / 2
    assert float(losses.info_nce(batch, SCALE, softness=softness)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ids", [None, IDS])
def test_softness_can_follow_what_looks_similar(ids: Tensor | None) -> None:
    batch, softness, hard = pairs(ids=ids), 0.2, one_hot(ids)
    expected = 0.0
    for rows, columns in ((batch.image, batch.text), (batch.text, batch.image)):
        logits, targets = cosines(rows, columns), []
        for row, own in zip(logits, hard, strict=True):
            others = [math.exp(value) * (share == 0) for value, share in zip(row, own, strict=True)]
            targets.append(
                [0.8 * share + 0.2 * other / sum(others) for share, other in zip(own, others, strict=True)]
            )
        expected += cross_entropy(logits, targets) / 2
    found = losses.info_nce(batch, SCALE, softness=softness, spread="similar")
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spread", ["even", "similar"])
def test_softened_targets_are_constants(spread: str) -> None:
    image, text = unit(5, 4, 3).requires_grad_(), unit(5, 4, 4)
    value = losses.info_nce(Pairs.gather(image, text), SCALE, softness=0.3, spread=spread)
    (found,) = torch.autograd.grad(value, image)
    logits = SCALE * image.detach() @ text.T
    expected = torch.zeros_like(image)
    for said, sign in ((logits, 1), (logits.T, 0)):
        others = torch.zeros(5, 5).double() if spread == "even" else said.clone()
        others.fill_diagonal_(-math.inf)
        target = 0.7 * torch.eye(5, dtype=torch.float64) + 0.3 * others.softmax(dim=1)
        difference = (said.softmax(dim=1) - target) * SCALE / 10
        expected += (difference if sign else difference.T) @ text
    assert torch.allclose(found, expected, rtol=1e-10)


def test_a_row_of_positives_alone_stays_as_it_is() -> None:
    batch = pairs(ids=torch.zeros(5, dtype=torch.long))
    hard = losses.info_nce(batch, SCALE)
    for spread in ("even", "similar"):
        assert torch.equal(losses.info_nce(batch, SCALE, softness=0.4, spread=spread), hard)


def test_decoupled_leaves_the_positive_out_of_the_denominator() -> None:
    batch = pairs()
    expected = 0.0
    for rows, columns in ((batch.image, batch.text), (batch.text, batch.image)):
        for index, row in enumerate(cosines(rows, columns)):
            others = sum(math.exp(value) for column, value in enumerate(row) if column != index)
            expected += (math.log(others) - row[index]) / 10
    assert float(losses.decoupled_contrastive(batch, SCALE)) == pytest.approx(expected, rel=1e-12)


def test_siglip_is_a_sum_of_yes_and_no() -> None:
    batch, bias = pairs(), -3.0
    expected = 0.0
    for index, row in enumerate(cosines(batch.image, batch.text)):
        for column, value in enumerate(row):
            sign = 1 if index == column else -1
            expected += math.log1p(math.exp(-sign * (value + bias))) / 5
    assert float(losses.siglip(batch, SCALE, bias)) == pytest.approx(expected, rel=1e-12)


def test_affinity_kl_is_the_weighted_mean_divergence() -> None:
    student, first, second = pairs(0), pairs(1), pairs(2, width=6)
    expected = 0.0
    for rows, columns in (("image", "text"), ("text", "image")):
        said = [[*row] for row in cosines(getattr(student, rows), getattr(student, columns))]
        for teacher, scale, weight in ((first, 20.0, 0.25), (second, 30.0, 0.75)):
            for row, told in zip(
                said, cosines(getattr(teacher, rows), getattr(teacher, columns), scale), strict=True
            ):
                p = [math.exp(value) / sum(map(math.exp, told)) for value in told]
                q = [math.exp(value) / sum(map(math.exp, row)) for value in row]
                expected += weight * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 10
    found = losses.affinity_kl(
        student, [first, second], scale=SCALE, teacher_scales=[20.0, 30.0], teacher_weights=[1.0, 3.0]
    )
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_affinity_kl_is_zero_for_the_teacher_itself_and_positive_otherwise() -> None:
    same = losses.affinity_kl(pairs(1), [pairs(1)], scale=SCALE, teacher_scales=[SCALE])
    other = losses.affinity_kl(pairs(1), [pairs(2)], scale=SCALE, teacher_scales=[SCALE])
    assert abs(float(same)) < 1e-12
    assert float(other) > 0.01


def test_interactive_contrastive_crosses_student_and_teacher() -> None:
    student, teacher = pairs(0), pairs(1)
    expected = (
        cross_entropy(cosines(student.image, teacher.text), one_hot())
        + cross_entropy(cosines(student.text, teacher.image), one_hot())
    ) / 2
    assert float(losses.interactive_contrastive(student, teacher, SCALE)) == pytest.approx(
        expected, rel=1e-12
    )


def test_feature_losses_are_means_over_elements() -> None:
    first, second = unit(3, 4, 0), unit(3, 4, 1)
    difference = (first - second).flatten().tolist()
    assert float(losses.feature_mse(first, second)) == pytest.approx(sum(d * d for d in difference) / 12)
    beta = 0.3
    smooth = [d * d / (2 * beta) if abs(d) < beta else abs(d) - beta / 2 for d in difference]
    assert float(losses.feature_smooth_l1(first, second, beta=beta)) == pytest.approx(sum(smooth) / 12)


def test_alignment_and_uniformity_at_their_ends() -> None:
    rows = unit(4, 8, 0)
    assert float(losses.alignment(rows, rows)) == 0
    assert float(losses.alignment(rows, -rows)) == pytest.approx(4)
    assert float(losses.uniformity(rows[:1].expand(3, -1))) == pytest.approx(0, abs=1e-12)
    assert float(losses.uniformity(torch.eye(8, dtype=torch.float64))) == pytest.approx(-4)  # distance² = 2
    expected = (-2 * torch.pdist(rows).square()).exp().mean().log()
    assert float(losses.uniformity(rows)) == pytest.approx(float(expected), rel=1e-12)


TERMS: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda batch, teacher, **limit: losses.info_nce(batch, SCALE, softness=0.1, **limit),
    "decoupled": lambda batch, teacher, **limit: losses.decoupled_contrastive(batch, SCALE, **limit),
    "siglip": lambda batch, teacher, **limit: losses.siglip(batch, SCALE, -1.0, **limit),
    "affinity": lambda batch, teacher, **limit: losses.affinity_kl(
        batch, [teacher], scale=SCALE, teacher_scales=[20.0], **limit
    ),
    "interactive": lambda batch, teacher, **limit: losses.interactive_contrastive(
        batch, teacher, SCALE, **limit
    ),
    "mse": lambda batch, teacher, **limit: losses.feature_mse(batch.image, teacher.image),
    "smooth_l1": lambda batch, teacher, **limit: losses.feature_smooth_l1(batch.text, teacher.text),
    "alignment": lambda batch, teacher, **limit: losses.alignment(batch.image, batch.text),
    "uniformity": lambda batch, teacher, **limit: (
        losses.uniformity(batch.image, **limit) + losses.uniformity(batch.text, **limit)
    ),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("ids", [None, IDS])
def test_gradients_are_those_of_the_value(name: str, ids: Tensor | None) -> None:
    image, text = unit(5, 4, 3).requires_grad_(), unit(5, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda image, text: TERMS[name](Pairs.gather(image, text, ids=ids), pairs(1)), (image, text)
    )


@pytest.mark.parametrize("name", ["info_nce", "decoupled", "siglip", "affinity", "interactive", "uniformity"])
def test_slices_change_neither_value_nor_gradient(name: str) -> None:
    found = []
    for limit in (1 << 30, 2 * 5 * 8, 1):  # whole, two rows at a time, one row at a time
        image, text = unit(5, 4, 3).requires_grad_(), unit(5, 4, 4).requires_grad_()
        value = TERMS[name](Pairs.gather(image, text), pairs(1), max_matrix_bytes=limit)
        found.append((value.detach(), *torch.autograd.grad(value, (image, text))))
    for sliced in found[1:]:
        for expected, got in zip(found[0], sliced, strict=True):
            assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_no_matrix_is_larger_than_asked_for() -> None:
    rows, limit = 256, 64 << 10
    image, text = unit(rows, 8, 0).requires_grad_(), unit(rows, 8, 1).requires_grad_()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and func is torch.ops.aten.mm.default:
                sizes.append(out.numel() * out.element_size())
            return out

    batch = Pairs.gather(image, text)
    with Watch():
        losses.info_nce(batch, SCALE, max_matrix_bytes=limit).backward()
    assert len(sizes) > rows * rows * 8 // limit
    assert max(sizes) <= limit


def test_teachers_get_no_gradient() -> None:
    image, text = unit(5, 4, 3).requires_grad_(), unit(5, 4, 4).requires_grad_()
    teacher = Pairs.gather(image, text)
    student_image = unit(5, 4, 5).requires_grad_()
    student = Pairs.gather(student_image, unit(5, 4, 6))
    (
        losses.affinity_kl(student, [teacher], scale=SCALE, teacher_scales=[10.0])
        + losses.interactive_contrastive(student, teacher, SCALE)
        + losses.feature_mse(student_image, image)
    ).backward()
    assert image.grad is None
    assert text.grad is None
    assert student_image.grad is not None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: losses.info_nce(pairs(), 1.0, softness=1.0), ConfigError, "softness is 1.0"),
        (
            lambda: losses.affinity_kl(pairs(), [], scale=1.0, teacher_scales=[]),
            ConfigError,
            "got 0 teachers",
        ),
        (
            lambda: losses.affinity_kl(
                pairs(), [pairs()], scale=1.0, teacher_scales=[1.0], teacher_weights=[-1.0]
            ),
            ConfigError,
            r"weights are \[-1.0\]",
        ),
        (lambda: losses.interactive_contrastive(pairs(), pairs(width=6), 1.0), ConfigError, r"\(5, 6\)"),
        (lambda: losses.feature_mse(unit(2, 3, 0), unit(2, 4, 0)), ConfigError, r"\(2, 3\) and \(2, 4\)"),
        (lambda: losses.uniformity(unit(1, 3, 0)), ConfigError, "got 1 rows"),
        (
            lambda: losses.decoupled_contrastive(Pairs.gather(unit(1, 3, 0), unit(1, 3, 1)), 1.0),
            ConfigError,
            "batch of 1",
        ),
        (lambda: Pairs.gather(unit(2, 3, 0), unit(3, 3, 0)), InputError, r"\(2, 3\) .* \(3, 3\)"),
        (
            lambda: Pairs.gather(unit(2, 3, 0), unit(2, 3, 0), ids=torch.arange(3)),
            InputError,
            r"ids \(3,\), expected \(2,\)",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(
    call: Callable[[], Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_two_ranks_have_the_gradients_of_one(repo: Path, tmp_path: Path) -> None:
    script = repo / "tests" / "tools" / "two_ranks.py"
    for world in (1, 2):
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(world), str(tmp_path / f"store{world}"),
                 str(tmp_path / f"{world}.safetensors")],
                stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        for rank in ranks:
            _, said = rank.communicate(timeout=120)
            assert rank.returncode == 0, said
    one, two = (load_file(tmp_path / f"{world}.safetensors") for world in (1, 2))
    assert set(one) == set(two)
    # losses x ids x (four parameters, the scale, the loss); some do without a tower or the scale
    assert len(one) == 8 * 2 * 6 + 2 * (5 + 3)
    for key, expected in one.items():
        assert torch.allclose(two[key], expected, rtol=1e-6, atol=1e-12), key
        assert expected.abs().max() > 0, key
