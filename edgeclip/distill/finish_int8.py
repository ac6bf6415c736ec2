"""Finishing: a tower learns to give, with its products in int8, what it gives in float.

Quantization after training moves embeddings a little, and ranks with them. A few hundred steps of
self-distillation heal most of that: the float tower is the teacher, a copy of it the student, whose chosen
products round their inputs, weights and outputs as the exported file will. Gradients pass the rounding as if
it were not there (straight-through, Bengio et al. 2013, arXiv 1308.3432). The student is asked to give the
teacher's embeddings and, where labels are known, its answers: targets mix what the teacher says of all labels
with its best one, as the hybrid targets of CLIP-Refine do (Yamaguchi et al. 2025, arXiv 2504.12717, HyCD,
there with captions in place of the best label). No labelled picture is needed.

Which products, with which ranges and in which form are values (:mod:`edgeclip.quantization`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgeclip.errors import CalibrationError, ConfigError
from edgeclip.quantization import Range, Scheme, activation_step, rounded_weight, weight_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FinishSettings", "Finished", "RoundedProduct", "RoundedProducts", "finish_int8"]

_HELD_OUT = 5  # one row of so many
_LEAST_ROWS = 32
_BATCH_MEASURED = 16
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class RoundedProduct:
    """What int8 rounds around one product.

    Attributes:
        input: range of what goes in.
        output: range of what comes out, where that is rounded, too; for a product that a clamp follows the
            range behind the clamp, which comes to the same.
        mean: of each channel that goes in, ``(channels,)``, where biases are corrected for what rounding the
            weight takes off on average (Nagel et al. 2019, §4.2).
    """

    input: Range
    output: Range | None = None
    mean: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class FinishSettings:
    """How to finish.

    Attributes:
        steps: of the optimizer.
        batch: rows a step.
        learning_rate: of Adam, at its highest; it falls to zero along a cosine.
        answers: weight of the term that compares answers, where labels are given; on a trained probe it
            moved the share of kept answers less than seeds do.
        hybrid: share of the teacher's best label in the targets; the rest is its softmax over all labels.
        scale: multiplier of cosines in both.
        every: steps between measurements on the rows held out.
        seed: of the order of rows.

    Raises:
        ConfigError: a number is out of range.
    """

    steps: int = 120
    batch: int = 32
    learning_rate: float = 5e-6
    answers: float = 0.0
    hybrid: float = 0.3
    scale: float = 100.0
    every: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"finishing: {name} is {getattr(self, name)}, expected at least 1.")
        for name, low, high in (
            ("learning_rate", 0, 1),
            ("answers", 0, math.inf),
            ("hybrid", 0, 1),
            ("scale", 0, 100),
        ):
            value = getattr(self, name)
            if not low <= value <= high or not math.isfinite(value):
                raise ConfigError(f"finishing: {name} is {value}, expected from {low} to {high}.")


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished tower and what it gained.

    Attributes:
        tower: in float, with other weights; rounded as before it is closer to the teacher.
        before: mean of 1 - cosine to the teacher over the rows held out, before.
        after: the same of ``tower``; not above ``before``, since the best measured tower is returned.
        step: at which that tower was measured; 0 where nothing was gained.
        flips_before: rows held out whose best label is not the teacher's, before; ``None`` without labels.
        flips_after: the same of ``tower``.
        held_out: number of rows held out.
    """

    tower: nn.Module
    before: float
    after: float
    step: int
    flips_before: int | None
    flips_after: int | None
    held_out: int

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values."""
        names = ("before", "after", "step", "flips_before", "flips_after", "held_out")
        return {name: getattr(self, name) for name in names}


class RoundedProducts(TorchFunctionMode):
    """While active, products with chosen parameters of a module round as int8 files do.

    Convolutions and linear maps are recognised by the parameter that is their weight, so that modules stay as
    they are. Weights get a scale an output channel from what they hold at the time.

    Args:
        module: whose parameters are meant.
        products: by name of the weight's parameter.
        scheme: what int8 means.

    Raises:
        CalibrationError: a name is no parameter with two dimensions or more.
    """

    def __init__(self, module: nn.Module, products: Mapping[str, RoundedProduct], scheme: Scheme) -> None:
        super().__init__()
        parameters = dict(module.named_parameters())
        wrong = next((name for name in products if name not in parameters or parameters[name].ndim < 2), None)
        if wrong is not None:
            raise CalibrationError(
                f"finishing: {wrong!r} is no weight of the tower, expected some of its "
                f"{len(parameters)} parameters, such as {next(iter(parameters), 'none')!r}."
            )
        self._scheme = scheme
        self._products = {id(parameters[name]): product for name, product in products.items()}
        self._names = {id(parameters[name]): name for name in products}
        self.seen: set[str] = set()
        """Weights of products that were rounded so far."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Round around a product with a chosen weight; leave everything else alone."""
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) >= 2 and id(args[1]) in self._products:
            product = self._products[id(args[1])]
            self.seen.add(self._names[id(args[1])])
            given = _rounded(args[0], product.input, self._scheme)
            groups = kwargs.get("groups", args[_GROUPS] if len(args) > _GROUPS else 1)
            weight = _rounded_weight(args[1], self._scheme, groups)
            result = func(given, weight, *args[2:], **kwargs)
            if product.mean is not None:
                result = result + _correction(args[1], weight, product.mean, groups)
            return result if product.output is None else _rounded(result, product.output, self._scheme)
        return func(*args, **kwargs)


_PRODUCTS = frozenset({F.conv1d, F.conv2d, F.conv3d, F.linear})
_GROUPS = 6  # place of ``groups`` among the arguments of convolutions; linear maps have fewer


def _rounded(x: Tensor, given: Range, scheme: Scheme) -> Tensor:
    """Return a tensor rounded to 256 levels of a range; gradients pass inside it."""
    scale, zero = activation_step(given, scheme)
    least, most = (-128, 127) if scheme.signed else (0, 255)
    low, high = (least - zero) * float(scale), (most - zero) * float(scale)
    inside = x.clamp(low, high)
    with torch.no_grad():
        levels = (x / float(scale)).round_().add_(zero).clamp_(least, most)
        rounded = levels.sub_(zero).mul_(float(scale))
    return inside + (rounded - inside).detach()


def _rounded_weight(weight: Tensor, scheme: Scheme, groups: int) -> Tensor:
    """Return a weight in integers of a scale an output channel; gradients pass as they are."""
    with torch.no_grad():
        array = weight.detach().cpu().numpy()
        steps = weight_steps(array, 0, scheme, groups=groups)
        rounded = torch.from_numpy(rounded_weight(array, 0, steps, scheme)).to(weight)
    return weight + (rounded - weight).detach()


@torch.no_grad()
def _correction(weight: Tensor, rounded: Tensor, mean: NDArray[np.float64], groups: int) -> Tensor:
    """Return what rounding a weight takes off its product on average, ready to be added to it."""
    lost = (weight - rounded).double().reshape(*weight.shape[:2], -1).sum(dim=2)  # over the window
    out, each = lost.shape
    given = torch.as_tensor(mean, device=lost.device).reshape(groups, each)
    shift = torch.einsum("goc,gc->go", lost.reshape(groups, out // groups, each), given)
    return shift.reshape(-1, *(1,) * (weight.ndim - 2)).to(weight)


def finish_int8(
    tower: nn.Module,
    products: Mapping[str, RoundedProduct],
    scheme: Scheme,
    rows: NDArray[np.generic],
    *,
    bank: NDArray[np.float32] | None = None,
    settings: FinishSettings | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Finished:
    """Train a copy of a folded tower so that int8 costs it less.

    Args:
        tower: rows to unit embeddings ``(n, E)``, folded, in float32; stays as it is.
        products: what is rounded, by name of the weight's parameter.
        scheme: what int8 means.
        rows: inputs ``(n, …)`` without labels, at least 32; one of five is held out.
        bank: unit text embeddings ``(N, E)`` of labels whose order is to be kept.
        settings: how.
        on_step: told each step, from 1, and its loss.

    Returns:
        The best tower over all measurements on the rows held out; the first is before any step.

    Raises:
        CalibrationError: too few rows, names that are no weights or belong to no product, or an embedding
            that is not finite.
    """
    settings = settings or FinishSettings()
    if len(rows) < _LEAST_ROWS:
        raise CalibrationError(
            f"finishing: got {len(rows)} rows, expected at least {_LEAST_ROWS}; give more calibration data."
        )
    student = copy.deepcopy(tower).eval().requires_grad_(True)
    teacher = tower.eval()
    given = torch.tensor(rows)
    labels = None if bank is None else torch.tensor(bank, dtype=torch.float32)
    target = _embeddings(teacher, given)
    if not torch.isfinite(target).all():
        raise CalibrationError("finishing: the float tower's embeddings are not finite; check its weights.")
    held_out = torch.arange(len(rows)) % _HELD_OUT == _HELD_OUT - 1
    seen, kept = given[held_out], target[held_out]
    rounding = RoundedProducts(student, products, scheme)

    def measure() -> tuple[float, int | None]:
        with rounding:
            got = _embeddings(student, seen)
        return _distance(got, kept), None if labels is None else _flips(got, kept, labels)

    before, flips_before = measure()
    unused = sorted(set(products) - rounding.seen)
    if unused:
        raise CalibrationError(
            f"finishing: {unused[0]!r} is the weight of no convolution or linear map that was run "
            f"({len(unused)} are not)."
        )
    best = (before, flips_before, 0, copy.deepcopy(student.state_dict()))
    inputs, wanted = given[~held_out], target[~held_out]
    optimizer = torch.optim.Adam(
        [parameter for parameter in student.parameters() if parameter.is_floating_point()],
        lr=settings.learning_rate,
    )
    draw = np.random.default_rng(settings.seed)
    order: list[int] = []
    for step in range(1, settings.steps + 1):
        while len(order) < settings.batch:
            order += draw.permutation(len(inputs)).tolist()
        chosen, order = torch.tensor(order[: settings.batch]), order[settings.batch :]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
        with rounding:
            got = student(inputs[chosen])
        loss = _loss(got, wanted[chosen], labels, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step(step, float(loss.detach()))
        if step % settings.every == 0 or step == settings.steps:
            distance, flips = measure()
            if (flips or 0, distance) < (best[1] or 0, best[0]) and distance <= before:
                best = (distance, flips, step, copy.deepcopy(student.state_dict()))
    after, flips_after, step, state = best
    student.load_state_dict(state)
    return Finished(
        student.requires_grad_(False), before, after, step, flips_before, flips_after, int(held_out.sum())
    )


def _loss(got: Tensor, wanted: Tensor, labels: Tensor | None, settings: FinishSettings) -> Tensor:
    """Return ``1 - cosine`` plus the weighted cross-entropy of the answers, as means over rows."""
    loss = (1 - F.cosine_similarity(got, wanted, dim=1)).mean()
    if labels is None or settings.answers == 0:
        return loss
    with torch.no_grad():
        said = settings.scale * wanted @ labels.T
        best = F.one_hot(said.argmax(dim=1), len(labels)).to(said.dtype)
        targets = (1 - settings.hybrid) * said.softmax(dim=1) + settings.hybrid * best
        least = -(targets * targets.clamp_min(_TINY).log()).sum(dim=1).mean()
    answers = F.cross_entropy(settings.scale * F.normalize(got, dim=1) @ labels.T, targets)
    return loss + settings.answers * (answers - least)


@torch.no_grad()
def _embeddings(tower: nn.Module, rows: Tensor) -> Tensor:
    return torch.cat([tower(part) for part in torch.split(rows, _BATCH_MEASURED)])


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((1 - F.cosine_similarity(got.double(), wanted.double(), dim=1)).mean())


def _flips(got: Tensor, wanted: Tensor, labels: Tensor) -> int:
    return int(((got @ labels.T).argmax(dim=1) != (wanted @ labels.T).argmax(dim=1)).sum())
