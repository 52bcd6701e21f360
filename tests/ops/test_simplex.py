from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessella.ops.simplex import project_simplex


def by_sorting(v: Tensor) -> Tensor:
    """The textbook algorithm, as reference."""
    ordered = v.sort(-1, descending=True).values
    theta = (ordered.cumsum(-1) - 1) / torch.arange(1, v.shape[-1] + 1, dtype=v.dtype)
    size = (ordered > theta).sum(-1, keepdim=True)
    return (v - theta.gather(-1, size - 1)).clamp(min=0)


@pytest.mark.parametrize(
    ("v", "p"),
    [
        ([0.3, 0.7], [0.3, 0.7]),
        ([1.0, 0.4], [0.8, 0.2]),  # theta = 0.2
        ([5.0, 1.0], [1.0, 0.0]),
        ([-7.0], [1.0]),
        ([0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]),
        ([1.0, 0.5, -0.1], [0.75, 0.25, 0.0]),  # theta = 0.25 > -0.1
        ([1e30, 1e30, 0.0], [0.5, 0.5, 0.0]),
        ([-torch.inf, 1.0, 1.5], [0.0, 0.25, 0.75]),
    ],
)
def test_by_hand(v: list[float], p: list[float]) -> None:
    torch.testing.assert_close(project_simplex(torch.tensor(v)), torch.tensor(p))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 5),
    size=st.integers(1, 300),
    log_scale=st.floats(-6, 6),
    shift=st.floats(-10, 10),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_is_the_projection(rows: int, size: int, log_scale: float, shift: float, ties: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    v = torch.randn(rows, size, generator=rng, dtype=torch.float64) * 10**log_scale
    v = v.round() if ties else v
    p = project_simplex(v)
    torch.testing.assert_close(p, by_sorting(v), atol=1e-9, rtol=0)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), p.new_ones(rows), atol=1e-12, rtol=0)
    torch.testing.assert_close(project_simplex(p), p, atol=1e-12, rtol=0)
    torch.testing.assert_close(project_simplex(v + shift), p, atol=1e-8, rtol=0)
    # Variational inequality: (v - p)'(q - p) <= 0 for every q of the simplex, so for every corner.
    gap = (v - p).amax(-1) - ((v - p) * p).sum(-1)
    assert (gap <= 1e-9 * (1 + v.abs().amax(-1))).all()


def test_slow_cases_end() -> None:
    # Newton's method drops few entries of a geometric row at a time; entries at the threshold tempt it to cycle.
    geometric = -(0.9 ** torch.arange(2000, dtype=torch.float32))
    boundary = torch.full((2000,), 0.1, dtype=torch.float32)
    boundary[:1000] = 0.1 + 1e-3
    v = torch.stack([geometric, boundary])
    torch.testing.assert_close(project_simplex(v).double(), by_sorting(v.double()), atol=1e-6, rtol=0)


def test_nan_stays_in_its_row() -> None:
    v = torch.tensor([[torch.nan, 1.0], [1.0, 0.4]])
    p = project_simplex(v)
    assert p[0].isnan().all()
    torch.testing.assert_close(p[1], torch.tensor([0.8, 0.2]))


def test_gradient() -> None:
    v = torch.tensor([1.0, 0.5, -0.1], requires_grad=True)
    project_simplex(v)[0].backward()
    assert v.grad is not None
    assert v.grad.tolist() == [0.5, -0.5, 0.0]  # P_S of the first unit vector, S the first two entries
    x = torch.randn(3, 2, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(project_simplex, x)


def test_compiles_whole() -> None:
    v = torch.randn(4, 70, requires_grad=True)
    compiled = torch.compile(lambda x: project_simplex(x).square().sum(), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(v), v)
    (expected,) = torch.autograd.grad(project_simplex(v).square().sum(), v)
    torch.testing.assert_close(grad, expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"v must be float32 or float64, got torch\.int64"):
        project_simplex(torch.arange(3))
    with pytest.raises(ValueError, match="last axis"):
        project_simplex(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="last axis"):
        project_simplex(torch.tensor(1.0))
