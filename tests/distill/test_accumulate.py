from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import Tensor, nn  # noqa: E402

from edgeclip.distill.accumulate import backward_in_parts  # noqa: E402
from edgeclip.distill.losses import info_nce  # noqa: E402
from edgeclip.distill.pairs import Pairs  # noqa: E402
from edgeclip.errors import ConfigError  # noqa: E402


def towers(dropout: float) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            side: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))
            for side in ("image", "text")
        }
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(12, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return image, text


def run(
    parts: int, dropout: float = 0.0, *, frozen: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    model, scale = towers(dropout), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    for side in frozen:
        model[side].requires_grad_(False)

    def embed(part: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            F.normalize(model[side](x), dim=-1) for side, x in zip(("image", "text"), part, strict=True)
        )

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return info_nce(Pairs.gather(image, text), scale.exp())

    image, text = batch()
    micro = list(zip(image.chunk(parts), text.chunk(parts), strict=True))
    torch.manual_seed(5)
    value = backward_in_parts(embed, micro, loss)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found["scale"] = scale.grad
    return value, {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_give_the_gradient_of_the_whole_batch(parts: int) -> None:
    (whole, expected), (value, found) = run(1), run(parts)
    assert torch.allclose(value, whole, rtol=1e-12)
    assert set(found) == set(expected)
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("frozen", [("image",), ("image", "text")])
def test_frozen_towers_need_no_gradient(frozen: tuple[str, ...]) -> None:
    (whole, expected), (value, found) = run(1), run(3, frozen=frozen)
    assert torch.allclose(value, whole, rtol=1e-12)
    assert set(found) == {name for name in expected if not name.startswith(frozen)}
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-10, atol=1e-14), name


def test_adding_up_micro_batches_would_not() -> None:
    image, text = batch()
    model = towers(0.0)

    def gradient(rows: slice) -> Tensor:
        model.zero_grad()
        sides = (F.normalize(model[side](x[rows]), dim=-1) for side, x in (("image", image), ("text", text)))
        info_nce(Pairs.gather(*sides), 7.0).backward()
        weight = model["image"][0].weight.grad
        assert weight is not None
        return weight.clone()

    whole = gradient(slice(0, 12))
    added = (gradient(slice(0, 6)) + gradient(slice(6, 12))) / 2
    assert not torch.allclose(whole, added, rtol=0.1)


def test_dropout_of_the_second_pass_repeats_the_first() -> None:
    # With one part the embeddings of both passes are those of one plain step with the same seed.
    value, found = run(1, dropout=0.5)
    model, scale = towers(0.5), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    torch.manual_seed(5)
    image, text = batch()
    plain = info_nce(
        Pairs.gather(F.normalize(model["image"](image), dim=-1), F.normalize(model["text"](text), dim=-1)),
        scale.exp(),
    )
    plain.backward()
    assert torch.allclose(value, plain.detach(), rtol=1e-12)
    weight = model["image"][0].weight.grad
    assert weight is not None
    assert torch.allclose(found["image.0.weight"], weight, rtol=1e-12)


def test_generators_go_on_after_the_batch_not_after_a_part() -> None:
    torch.manual_seed(5)
    run(3, dropout=0.5)
    first = torch.rand(1)
    run(3, dropout=0.5)
    assert torch.rand(1) == first  # run() seeds; what follows it is the same, and not what follows a part
    torch.manual_seed(5)
    assert torch.rand(1) != first


def test_no_parts_is_an_error() -> None:
    with pytest.raises(ConfigError, match="got no micro-batches"):
        backward_in_parts(lambda part: (torch.zeros(1),), [], lambda x: x.sum())
