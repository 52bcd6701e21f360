from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tessella.generators.base import Generator
from tessella.generators.digits import Digits
from tessella.generators.sampling import generators
from tessella.quantizers import FSQ
from tessella.tokenizer import TokenSpace

from .examples import NONE, SMALL

AR = {"name": "ar", **SMALL}


def make(bases: list[int], *, grid: tuple[int, ...] = (4,), num_codebooks: int = 1, **inner: Any) -> Digits:
    torch.manual_seed(0)
    space = TokenSpace(grid, num_codebooks, math.prod(bases), "f" * 16)
    return Digits(space, bases=bases, generator={**AR, **inner}, conditioner=NONE)


def random_weights(generator: Generator) -> Generator:
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.1)
    return generator.eval()


def test_by_hand() -> None:
    model = make([8, 5, 5, 5], grid=(2,))
    indices = torch.tensor([[[0], [3 + 8 * 4 + 40 * 1 + 200 * 2]]])
    assert model.to_digits(indices).tolist() == [[[0, 0, 0, 0], [3, 4, 1, 2]]]
    assert model.generator.space == TokenSpace((2,), 4, 8, "f" * 16)


def test_are_the_channels_of_fsq() -> None:
    fsq = FSQ([8, 5, 5, 5])
    indices = torch.arange(1000)[:, None]
    digits = make([8, 5, 5, 5]).to_digits(indices)
    assert torch.equal(digits, fsq.indices_to_digits(indices[:, 0]))
    assert torch.equal(fsq.digits_to_codes(digits), fsq.codebook)


@given(
    bases=st.lists(st.integers(2, 9), min_size=1, max_size=4), num_codebooks=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_there_and_back(bases: list[int], num_codebooks: int, seed: int) -> None:
    model = make(bases, num_codebooks=num_codebooks, dim=8, num_heads=1, num_layers=1)
    rng = torch.Generator().manual_seed(seed)
    indices = torch.randint(math.prod(bases), (2, 4, num_codebooks), generator=rng)
    digits = model.to_digits(indices)
    assert digits.shape == (2, 4, num_codebooks * len(bases))
    assert torch.equal(model.from_digits(digits), indices)
    assert (digits < model.bases.repeat(num_codebooks)).all()


@pytest.mark.parametrize("inner", [{}, {"order": "delay"}, {"name": "maskgit", "hidden": 48, "num_steps": 2}], ids=str)
def test_no_digit_is_beyond_its_base(inner: dict[str, Any]) -> None:
    model = random_weights(make([5, 2, 3], num_codebooks=2, **inner))
    digits = model.generator.sample(None, rng=generators(range(64)))
    assert digits.amax((0, 1)).tolist() == [4, 1, 2, 4, 1, 2]
    assert torch.equal(model.sample(None, rng=generators(range(64))), model.from_digits(digits))


def test_probabilities_of_all_codes_sum_to_one() -> None:
    model = random_weights(make([3, 4, 2], grid=(1,)))
    every = torch.arange(24).view(24, 1, 1)
    assert (2 ** -model.bits(every, None)).sum().item() == pytest.approx(1, abs=1e-5)


def test_first_loss_of_a_code_is_that_of_a_uniform_guess() -> None:
    model = make([8, 5, 5, 5])
    loss = model(torch.randint(1000, (3, 4, 1)), None).loss
    assert 4 * loss.item() == pytest.approx(math.log(1000), abs=1e-5)


@pytest.mark.parametrize(
    ("bases", "generator", "message"),
    [
        ([8, 5, 5], AR, r"product 1000 \(the codebook size\), got \[8, 5, 5\] of product 200"),
        ([1000, 1], AR, "at least 2"),
        ([10, 100], {"name": "coarse_to_fine", "num_clusters": 4, "coarse": AR, "fine": SMALL},
         "codes of CoarseToFine cannot be limited"),
    ],
)  # fmt: skip
def test_bad_options(bases: list[int], generator: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(TokenSpace((4,), 1, 1000, "f" * 16), bases=bases, generator=generator, conditioner=NONE)
