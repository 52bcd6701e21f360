"""The schedules of masked generation against published counts and their defining properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessella.generators.maskgit import _MIN_MASK_RATIO
from tessella.generators.schedules import (
    _generalised_golden_ratio,
    group_ends,
    low_discrepancy_order,
    num_masked,
    num_remasked,
    random_masks,
)


def test_training_counts_at_the_published_bound() -> None:
    assert pytest.approx(0.29715, abs=5e-6) == _MIN_MASK_RATIO
    bound = torch.tensor([_MIN_MASK_RATIO, 1.0])
    assert num_masked(bound, 256).tolist() == [116, 256]
    assert num_masked(bound, 64).tolist() == [29, 64]


def test_training_counts_by_hand() -> None:
    # cos(pi/2 (1 - r)): r = 1/3 gives cos(60 degrees), r = 1/2 gives 0.70711, r = 0 gives 0 and still hides one.
    assert num_masked(torch.tensor([0.0, 0.4999, 0.5, 0.5001], dtype=torch.float64), 100).tolist() == [1, 71, 71, 71]
    assert num_masked(torch.tensor([1 / 3 - 1e-6, 1 / 3 + 1e-6], dtype=torch.float64), 256).tolist() == [128, 129]


@pytest.mark.parametrize(("bound", "fraction"), [(0.0, 2 / math.pi), (_MIN_MASK_RATIO, 0.8089)])
def test_mean_masked_fraction(bound: float, fraction: float) -> None:
    ratio = bound + (1 - bound) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    # Of so many tokens that rounding up does not count.
    assert (num_masked(ratio, 10**6).double().mean() / 10**6).item() == pytest.approx(fraction, abs=5e-5)


def test_random_masks_have_the_count_and_no_preferred_position() -> None:
    torch.manual_seed(0)
    ratio = torch.rand(4000)
    masks = random_masks(ratio, 16)
    assert torch.equal(masks.sum(-1), num_masked(ratio, 16))
    share = masks.double().mean(0)
    # Five standard errors of a mean of 4000 bits.
    assert (share - share.mean()).abs().max() < 5 * 0.5 / 4000**0.5


DECODING = {
    256: [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33],
    64: [63, 61, 59, 55, 50, 45, 38, 32, 24, 16, 8],
}


@pytest.mark.parametrize("length", DECODING)
def test_decoding_counts_of_twelve_steps(length: int) -> None:
    masked = torch.tensor(length)
    seen = []
    for step in range(11):
        masked = num_remasked((step + 1) / 12, masked, length)
        seen.append(masked.item())
    assert seen == DECODING[length]
    assert num_remasked(1.0, masked, length) == 1


@given(st.integers(2, 300), st.integers(1, 40))
def test_every_decoding_step_shows_a_token_until_one_is_left(length: int, num_steps: int) -> None:
    masked = torch.tensor([length])
    for step in range(num_steps):
        left = num_remasked((step + 1) / num_steps, masked, length)
        assert left == 1 or left < masked
        masked = left


def test_golden_ratios() -> None:
    assert _generalised_golden_ratio(1) == pytest.approx((1 + 5**0.5) / 2, abs=1e-14)
    assert _generalised_golden_ratio(2) == pytest.approx(1.32471795724474602596, abs=1e-14)


def test_order_by_hand() -> None:
    # alpha = (0.7549, 0.5698): (.5, .5) (.255, .070) (.010, .640) (.765, .209): cells of 2 x 2, then all are hit.
    assert low_discrepancy_order((2, 2)).tolist() == [3, 0, 1, 2]
    # alpha = 0.618: .5 .118 .736 .354, .972 in quarters; the third point falls into the cell of the first.
    assert low_discrepancy_order((4,)).tolist() == [2, 0, 1, 3]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_order_is_a_permutation_and_ignores_single_cells(shape: list[int]) -> None:
    order = low_discrepancy_order(shape)
    assert order.sort().values.tolist() == list(range(math.prod(shape)))
    assert torch.equal(low_discrepancy_order([*shape, 1]), order)


def test_prefixes_cover_the_grid_evenly() -> None:
    order = low_discrepancy_order((16, 16))
    quadrants = torch.bincount((order[:64] // 128) * 2 + (order[:64] % 16) // 8, minlength=4)
    assert quadrants.min() >= 14
    assert quadrants.max() <= 18


def test_groups_by_hand() -> None:
    # 256 (i / 12)^2.2: 1.08 4.98 12.1 22.8 37.3 55.7 78.2 104.9 136 171 211.4 256.
    assert group_ends(256) == [2, 5, 13, 23, 38, 56, 79, 105, 136, 172, 212, 256]
    assert group_ends(4, num_groups=4, exponent=1.0) == [1, 2, 3, 4]
    assert group_ends(8, num_groups=2, exponent=2.0) == [2, 8]


@given(st.integers(1, 2000))
def test_groups_are_not_empty_and_hold_all(length: int) -> None:
    ends = group_ends(length)
    assert len(ends) == min(12, length)
    assert ends[-1] == length
    assert all(a < b for a, b in zip([0, *ends], ends, strict=False))
