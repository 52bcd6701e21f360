"""Bits per token, against cases whose cost is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessella.config import build
from tessella.evaluation.compression import compression_cost
from tessella.generators.base import Generator, Guidance, Loss
from tessella.tokenizer import TokenSpace

SMALL = {"dim": 16, "num_layers": 1, "num_heads": 2, "conditioner": {"name": "label", "num_classes": 10}}
SPECS: dict[str, dict[str, Any]] = {
    "ar": {"name": "ar", **SMALL},
    "maskgit": {"name": "maskgit", **SMALL, "hidden": 16},
    "coarse_to_fine": {
        "name": "coarse_to_fine",
        "num_clusters": 4,
        "conditioner": SMALL["conditioner"],
        "coarse": {"name": "ar", "dim": 16, "num_layers": 1, "num_heads": 2},
        "fine": {"dim": 16, "num_layers": 1, "num_heads": 2},
    },
}


def make(name: str, space: TokenSpace) -> Generator:
    torch.manual_seed(0)
    generator: Generator = build("generators", SPECS[name], space=space)
    # Four clusters of equal size: uniform over clusters and within them is uniform over codes.
    angle = 2 * math.pi * (torch.arange(space.codebook_size) % 4) / 4 + 0.001 * torch.arange(space.codebook_size)
    table = torch.stack([angle.cos(), angle.sin()], -1)
    generator.fit_codebook(table if space.num_codebooks == 1 else table.expand(space.num_codebooks, -1, -1), seed=0)
    return generator


def batches(space: TokenSpace, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    shape = (*space.grid, space.num_codebooks)
    return [(torch.randint(space.codebook_size, (n, *shape), generator=rng), torch.arange(n)) for n in sizes]


@pytest.mark.parametrize("space", [TokenSpace((4, 4), 1, 32, "f" * 16), TokenSpace((2, 3), 2, 8, "f" * 16)])
@pytest.mark.parametrize("name", SPECS)
def test_who_knows_nothing_pays_log2_of_the_codebook(name: str, space: TokenSpace) -> None:
    generator = make(name, space)
    with torch.no_grad():
        for p in generator.parameters():
            p.zero_()
    assert compression_cost(generator, batches(space, 3, 2)) == pytest.approx(math.log2(space.codebook_size), abs=1e-6)


@pytest.mark.parametrize("space", [TokenSpace((1, 3), 1, 6, "f" * 16), TokenSpace((2, 1), 2, 6, "f" * 16)])
@pytest.mark.parametrize("name", SPECS)
def test_code_lengths_are_those_of_a_distribution(name: str, space: TokenSpace) -> None:
    generator = make(name, space).train()  # dropout would show: bits are of eval mode
    for p in generator.parameters():
        nn.init.normal_(p, std=0.3)
    every = torch.cartesian_prod(*[torch.arange(6)] * space.sequence_length)
    bits = generator.bits(every.view(-1, *space.grid, space.num_codebooks), torch.full((len(every),), 7))
    assert bits.dtype == torch.float64
    assert bits.std() > 0.1
    # A coder that looked at what it codes, or forgot what it has, would give all sequences more or less than 1.
    assert (-bits).exp2().sum().item() == pytest.approx(1, abs=1e-4)


class Coin(Generator):
    """Zeros cost 1 bit each, all else 3 bits."""

    def __init__(self, space: TokenSpace) -> None:
        super().__init__(space)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, indices: Tensor, condition: Tensor | None) -> Loss:
        raise NotImplementedError

    def sample(
        self,
        condition: Tensor | None,
        *,
        rng: Sequence[torch.Generator],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: Guidance = 1.0,
    ) -> Tensor:
        raise NotImplementedError

    def bits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        return torch.where(indices == 0, 1.0, 3.0).double().flatten(1).sum(1)


def test_mean_is_over_tokens_not_over_batches() -> None:
    space = TokenSpace((2,), 1, 4, "f" * 16)
    coin = Coin(space)
    data = [
        (torch.tensor([[[0], [0]], [[0], [1]], [[0], [0]]]), None),
        (torch.tensor([[[1], [2]]]), None),
    ]
    assert compression_cost(coin, data) == pytest.approx((5 * 1 + 3 * 3) / 8)


def test_errors() -> None:
    space = TokenSpace((2,), 1, 4, "f" * 16)
    with pytest.raises(ValueError, match="no token to code"):
        compression_cost(Coin(space), [])
    with pytest.raises(NotImplementedError, match="Coin has no code length"):
        Generator.bits(Coin(space), torch.zeros(1, 2, 1).long(), None)
    generator = make("maskgit", TokenSpace((4, 4), 1, 32, "f" * 16))
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 32\)"):
        compression_cost(generator, [(torch.full((1, 4, 4, 1), 32), None)])
