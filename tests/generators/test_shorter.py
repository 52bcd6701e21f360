"""Signals shorter than the grid, and samples that go on from a start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tessella.generators import AR
from tessella.generators.sampling import generators
from tessella.tokenizer import TokenSpace

ORDERS = [("flattened", 1), ("flattened", 3), ("delay", 3), ("parallel", 2)]


def model(order: str = "flattened", num_codebooks: int = 1, grid: tuple[int, ...] = (9,)) -> AR:
    torch.manual_seed(0)
    space = TokenSpace(grid, num_codebooks, 7, "x")
    made = AR(space, conditioner={"name": "none"}, dim=16, num_layers=2, num_heads=2, order=order).eval()  # type: ignore[arg-type]
    for parameter in made.head.parameters():
        torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize(("order", "num_codebooks"), ORDERS)
def test_a_shorter_signal_is_the_beginning_of_a_longer_one(order: str, num_codebooks: int) -> None:
    ar = model(order, num_codebooks)
    indices = torch.randint(7, (2, 9, num_codebooks))
    whole, part = ar.logits(indices, None), ar.logits(indices[:, :5], None)
    # With a delay the last K - 1 positions see something of those behind them, which the shorter signal does not have.
    same = 5 - (num_codebooks - 1 if order == "delay" else 0)
    torch.testing.assert_close(part[:, :same], whole[:, :same])
    nats = -part.log_softmax(-1).gather(-1, indices[:, :5, :, None]).double().sum((1, 2, 3))
    torch.testing.assert_close(ar.bits(indices[:, :5], None), nats / math.log(2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("order", "num_codebooks"), ORDERS)
def test_samples_go_on_from_a_start(order: str, num_codebooks: int) -> None:
    ar = model(order, num_codebooks)
    whole = ar.sample(None, rng=generators([1, 2]))
    short = ar.sample(None, rng=generators([1, 2]), num_positions=5)
    assert short.shape == (2, 5, num_codebooks)
    start = torch.randint(7, (2, 3, num_codebooks))
    continued = ar.sample(None, rng=generators([1, 2]), start=start)
    assert continued.shape == whole.shape
    assert torch.equal(continued[:, :3], start)
    # From the start that it would have drawn, a sample goes on as it would have.
    assert torch.equal(ar.sample(None, rng=generators([1, 2]), start=whole[:, :4]), whole)
    assert not torch.equal(continued[:, 3:], whole[:, 3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_positions": 10}, r"num_positions must be in \[1, 9\]"),
        ({"start": torch.zeros(1, 3, 1, dtype=torch.long)}, r"start must be \[2, t, 1\] with t at most 9"),
        ({"start": torch.zeros(2, 6, 1, dtype=torch.long), "num_positions": 5}, "with t at most 5"),
        ({"start": torch.full((2, 3, 1), 7)}, r"indices must lie in \[0, 7\)"),
    ],
)  # fmt: skip
def test_bad_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().sample(None, rng=generators([1, 2]), **options)


def test_grids_of_two_axes_are_whole() -> None:
    ar = model(grid=(3, 3))
    with pytest.raises(ValueError, match=r"indices must be \[B, 3, 3, 1\]"):
        ar.logits(torch.zeros(1, 2, 3, 1, dtype=torch.long), None)
    with pytest.raises(ValueError, match="num_positions must be in"):
        ar.sample(None, rng=generators([1]), num_positions=3)
