from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella.quantizers.base import (
    _histogram_statistics,
    _sorted_statistics,
    index_statistics,
    masked_mean,
    mean_squared,
    straight_through,
)


def test_index_statistics_by_hand() -> None:
    indices = torch.tensor([[0], [0], [1], [3]])
    usage, perplexity = index_statistics(indices, 8)
    assert usage.item() == 3 / 8
    # H = -(1/2 ln 1/2 + 2 * 1/4 ln 1/4) = 3/2 ln 2
    assert perplexity.item() == pytest.approx(2**1.5)


def test_index_statistics_are_averaged_over_codebooks() -> None:
    indices = torch.tensor([[0, 5], [0, 6]])
    usage, perplexity = index_statistics(indices, 10)
    assert usage.item() == pytest.approx((0.1 + 0.2) / 2)
    assert perplexity.item() == pytest.approx((1 + 2) / 2)


def test_masked_rows_do_not_count() -> None:
    indices = torch.tensor([[0], [1], [7]])
    mask = torch.tensor([True, True, False])
    for statistics in (_histogram_statistics, _sorted_statistics):
        usage, perplexity = statistics(indices[:, 0], 8, mask, shared=False)
        assert usage.item() == 2 / 8
        assert perplexity.item() == pytest.approx(2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_the_sorted_form_equals_the_histogram(rows: list[tuple[int, bool]]) -> None:
    column = torch.tensor([index for index, _ in rows], dtype=torch.long)
    mask = torch.tensor([keep for _, keep in rows], dtype=torch.bool)
    for given_mask in (None, mask):
        expected = _histogram_statistics(column, 6, given_mask, shared=False)
        torch.testing.assert_close(_sorted_statistics(column, 6, given_mask, shared=False), expected)


def test_statistics_of_a_codebook_beyond_any_table() -> None:
    usage, perplexity = index_statistics(torch.tensor([[2**62], [1], [2**62], [1]]), 2**63 - 1)
    assert usage.item() == pytest.approx(2 / 2**63)
    assert perplexity.item() == pytest.approx(2)


def test_means_over_unmasked_rows() -> None:
    a, b = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert mean_squared(a, b, None).item() == (1 + 4 + 25 + 25) / 4
    assert mean_squared(a, b, torch.tensor([True, False])).item() == (1 + 4) / 2
    assert mean_squared(a, b, torch.tensor([False, False])).item() == 0
    assert mean_squared(a[:0], b[:0], None).item() == 0
    assert masked_mean(torch.tensor([1.0, 4.0]), None).item() == 2.5
    assert masked_mean(torch.tensor([1.0, math.nan]), torch.tensor([True, False])).item() == 1


def test_straight_through_is_exact() -> None:
    # z + (z_q - z) rounds; 0.1 and 1e8 make it visible.
    z = torch.tensor([1e8, -3.0], requires_grad=True)
    z_q = torch.tensor([0.1, 0.3], requires_grad=True)
    out = straight_through(z, z_q)
    assert torch.equal(out, z_q)
    (out * torch.tensor([2.0, 3.0])).sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [2.0, 3.0]
    assert z_q.grad is None
