"""Codebook statistics against hand-worked numbers and a dense count."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessella.evaluation.codebook import CodeCounter


def test_hand_worked() -> None:
    counter = CodeCounter(8)
    counter.update(torch.tensor([[[0], [0]], [[3], [5]]]))
    counter.update(torch.tensor([[5], [5], [0], [0]]))
    codes, counts = counter.histogram()
    assert codes.tolist() == [0, 3, 5]
    assert counts.tolist() == [4, 1, 3]
    assert counter.num_positions == 8
    assert counter.usage == 3 / 8
    entropy = math.log(2) / 2 + math.log(8) / 8 + 3 / 8 * math.log(8 / 3)
    assert counter.perplexity == pytest.approx(math.exp(entropy))


def test_codebooks_are_averaged() -> None:
    counter = CodeCounter(4, num_codebooks=2)
    counter.update(torch.tensor([[0, 1], [0, 2]]))
    assert counter.usage == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert counter.perplexity == pytest.approx((1 + 2) / 2)
    assert counter.histogram(1)[0].tolist() == [1, 2]


def test_codebook_too_large_to_count_densely() -> None:
    counter = CodeCounter(2**62)
    counter.update(torch.tensor([[2**62 - 1], [0], [2**62 - 1]]))
    assert counter.histogram()[0].tolist() == [0, 2**62 - 1]
    assert counter.usage == 2 / 2**62


def test_uniform_use_has_the_perplexity_of_the_codebook_size() -> None:
    counter = CodeCounter(1 << 20)
    for part in torch.randperm(1 << 20, generator=torch.Generator().manual_seed(0)).chunk(4):
        counter.update(part[:, None])
    assert counter.usage == 1
    assert counter.perplexity == pytest.approx(1 << 20, rel=1e-9)


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), min_size=1, max_size=5))
def test_agrees_with_a_dense_count_whatever_the_batches(batches: list[list[int]]) -> None:
    counter = CodeCounter(10)
    for batch in batches:
        counter.update(torch.tensor(batch, dtype=torch.int32).reshape(-1, 1))
    dense = torch.bincount(torch.tensor([*itertools.chain(*batches)], dtype=torch.int64), minlength=10)
    codes, counts = counter.histogram()
    assert codes.tolist() == dense.nonzero().flatten().tolist()
    assert counts.tolist() == dense[codes].tolist()
    if counter.num_positions:
        assert 1 <= counter.perplexity <= len(codes) * (1 + 1e-12)


def test_errors() -> None:
    counter = CodeCounter(4, num_codebooks=2)
    with pytest.raises(TypeError, match=r"integers, got torch\.float32"):
        counter.update(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"num_codebooks = 2, got \[3, 1\]"):
        counter.update(torch.zeros(3, 1, dtype=torch.int64))
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=rf"\[0, 4\), got .*{bad}"):
            counter.update(torch.tensor([[0, bad]]))
    with pytest.raises(ValueError, match="call update first"):
        _ = counter.perplexity
    with pytest.raises(ValueError, match="codebook_size 0"):
        CodeCounter(0)
