from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import FSQ as ReferenceFSQ

from tessella.quantizers import FSQ

# Decision thresholds in z of the paper's convention.
PAPER_THRESHOLDS = {
    3: [-0.5500, 0.5500],
    4: [-1.1525, -0.3466, 0.4593],
    5: [-0.9747, -0.2557, 0.2557, 0.9747],
    6: [-1.3038, -0.6270, -0.2029, 0.2212, 0.8979],
    7: [-1.2017, -0.5500, -0.1684, 0.1684, 0.5500, 1.2017],
    8: [-1.4297, -0.7945, -0.4382, -0.1440, 0.1502, 0.5065, 1.1417],
}
CONVENTIONS: list[Any] = ["corrected", "paper", "wide", "symmetric"]


@pytest.mark.parametrize("level", PAPER_THRESHOLDS)
def test_thresholds_of_the_paper(level: int) -> None:
    fsq = FSQ([level], convention="paper")
    z = torch.linspace(-3, 3, 600_001, dtype=torch.float64)[:, None]
    indices = fsq(z).indices[:, 0]
    steps = indices.diff().nonzero()[:, 0]
    assert indices[0] == 0
    assert indices[-1] == level - 1
    assert (indices.diff() >= 0).all()
    assert z[steps, 0].tolist() == pytest.approx(PAPER_THRESHOLDS[level], abs=6e-5)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("level", [3, 4, 5, 6, 7, 8, 16, 255, 1000])
def test_every_level_is_reached_and_no_other(convention: Any, level: int) -> None:
    fsq = FSQ([level], convention=convention)
    z = torch.linspace(-10, 10, 200_001)[:, None]
    out = fsq(z)
    assert out.indices.unique().tolist() == list(range(level))
    assert len(out.z_q.unique()) == level
    assert torch.equal(out.z_q.unique(), fsq.codebook[:, 0].sort().values)


def test_codes_by_hand() -> None:
    assert FSQ([4]).codebook[:, 0].tolist() == [-1, -0.5, 0, 0.5]
    assert FSQ([5]).codebook[:, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert FSQ([8]).codebook.max() == 0.75
    assert FSQ([4], convention="symmetric").codebook[:, 0].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert FSQ([2], convention="symmetric").codebook[:, 0].tolist() == [-1, 1]


def test_the_first_channel_runs_fastest() -> None:
    fsq = FSQ([3, 4])
    assert fsq.codebook[:4].tolist() == [[-1, -1], [0, -1], [1, -1], [-1, -0.5]]
    z = torch.tensor([[10.0, -10.0], [-10.0, 10.0]])
    assert fsq(z).indices[:, 0].tolist() == [2, 9]  # 2 + 3 * 0 and 0 + 3 * 3


@pytest.mark.parametrize(("convention", "even_at_zero"), [("corrected", 0.0), ("wide", 0.0), ("paper", -4.3e-4)])
def test_zero_maps_to_zero(convention: Any, even_at_zero: float) -> None:
    bounded = FSQ([4, 5], convention=convention).bound(torch.zeros(2, dtype=torch.float64))
    assert bounded.tolist() == pytest.approx([even_at_zero, 0], abs=1e-5)


def test_gradient_is_that_of_the_bound() -> None:
    # d zhat/dz at 0 = half sech^2(shift) / floor(L/2)
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    FSQ([5, 4, 6, 8], convention="paper")(z).z_q.sum().backward()
    assert z.grad is not None
    assert z.grad[0].tolist() == pytest.approx([0.999, 0.6660, 0.7991, 0.8563], abs=6e-5)
    for convention in CONVENTIONS:
        fsq = FSQ([5, 4, 7], convention=convention)
        z = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(20, 3, dtype=torch.float64)
        (grad,) = torch.autograd.grad(fsq(z).z_q, z, upstream)
        width = (fsq.levels - 1) / 2 if convention == "symmetric" else fsq.levels // 2
        step = 1e-6
        numeric = (fsq.bound(z.detach() + step) - fsq.bound(z.detach() - step)) / (2 * step) / width
        torch.testing.assert_close(grad, upstream * numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("convention", "symmetric"), [("wide", False), ("symmetric", True)])
@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 5, 5, 5]])
def test_tokens_of_a_public_implementation(levels: list[int], convention: Any, symmetric: bool) -> None:
    reference = ReferenceFSQ(levels, preserve_symmetry=symmetric)
    z = 2 * torch.randn(1, 20_000, len(levels), generator=torch.Generator().manual_seed(0))
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = FSQ(levels, convention=convention)(mine)
    codes, indices = reference(theirs)
    # The last bit of its float32 shift may differ.
    same = out.indices[..., 0] == indices
    assert same.float().mean() > 0.9999
    torch.testing.assert_close(out.z_q[same], codes[same])
    (out.z_q * z).sum().backward()
    (codes * z).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(CONVENTIONS))
def test_indices_survive_the_round_trip_exactly(data: st.DataObject, convention: Any) -> None:
    levels = data.draw(
        st.lists(st.integers(3, 1000), min_size=1, max_size=6).filter(lambda x: math.prod(x) < 2**63), label="levels"
    )
    fsq = FSQ(levels, convention=convention)
    index = data.draw(st.integers(0, fsq.codebook_size - 1), label="index")
    digits = fsq.indices_to_digits(torch.tensor([index]))
    assert (digits >= 0).all()
    assert (digits < fsq.levels).all()
    assert sum(t * b for t, b in zip(digits[0].tolist(), fsq.basis.tolist(), strict=True)) == index
    assert fsq.digits_to_indices(digits).item() == index
    codes = fsq.indices_to_codes(torch.tensor([[index]]))
    assert codes.abs().max() <= 1


@pytest.mark.parametrize("bits", [32, 33, 62])
def test_indices_beyond_32_bits(bits: int) -> None:
    fsq = FSQ([4] * (bits // 2) + [2] * (bits % 2), convention="symmetric")
    assert fsq.codebook_size == 2**bits
    top = fsq(torch.full((1, fsq.dim), 9.0))
    assert top.indices.item() == 2**bits - 1
    assert torch.equal(fsq.indices_to_codes(top.indices), torch.ones(1, fsq.dim))
    rng = torch.Generator().manual_seed(0)
    out = fsq(torch.randn(500, fsq.dim, generator=rng))
    assert torch.equal(fsq.indices_to_codes(out.indices), out.z_q)
    assert out.metrics["usage"].item() == pytest.approx(500 / 2**bits)
    with pytest.raises(ValueError, match="indices_to_codes instead"):
        _ = fsq.codebook


def test_bfloat16_keeps_all_codes_apart() -> None:
    # Index sums in bfloat16 merge codes: at these levels half of them.
    fsq = FSQ([7, 5, 5, 5, 5])
    z = torch.atanh(0.94 * fsq.codebook).bfloat16()
    assert len(fsq(z).indices.unique()) > 0.99 * fsq.codebook_size
    half = FSQ([1000, 8]).bfloat16()
    assert len(half.float().codebook.unique(dim=0)) == 8000


@pytest.mark.parametrize(
    ("levels", "convention"),
    [([], "corrected"), ([2, 5], "corrected"), ([1, 5], "symmetric"), ([1001], "wide"), ([-5], "paper")],
)
def test_bad_levels(levels: list[int], convention: Any) -> None:
    with pytest.raises(ValueError, match=r"levels must hold numbers from [23] to 1000"):
        FSQ(levels, convention=convention)


def test_levels_that_overflow() -> None:
    with pytest.raises(ValueError, match="int64 indices end at"):
        FSQ([1000] * 7)
    assert FSQ([1000] * 6).codebook_size == 10**18
