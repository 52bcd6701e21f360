from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tessella.quantizers import BSQ, LFQ, Residual


def test_by_hand() -> None:
    bsq = BSQ(dim=4, entropy_weight=0.0, commitment_weight=1.0)
    # |z| = 5: u = (0.6, -0.8, 0, 0); signs over sqrt 4.
    z = torch.tensor([[3.0, -4.0, 0.0, 0.0]], requires_grad=True)
    out = bsq(z)
    assert out.z_q.tolist() == [[0.5, -0.5, -0.5, -0.5]]  # zero counts as negative
    assert out.indices.tolist() == [[0b0001]]  # the first channel is the lowest bit
    assert out.loss.item() == pytest.approx((0.1**2 + 0.3**2 + 0.5**2 + 0.5**2) / 4)
    (grad,) = torch.autograd.grad(out.z_q[0, 0], z)
    # d u_0 / d z = (1 - u u^T)_0 / |z|.
    assert grad[0].tolist() == pytest.approx([(1 - 0.36) / 5, 0.48 / 5, 0, 0])


def test_entropies_by_hand() -> None:
    # Two bits, u = (1, 0): the first has the logit 4 / sqrt 2 / t, the second none.
    bsq = BSQ(dim=2, entropy_weight=1.0, entropy_temperature=0.5)
    out = bsq(torch.tensor([[7.0, 0.0]]))
    p = 1 / (1 + math.exp(-8 / math.sqrt(2)))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p) + math.log(2)
    assert out.metrics["sample_entropy"].item() == pytest.approx(entropy, abs=1e-5)
    assert out.metrics["batch_entropy"].item() == pytest.approx(entropy, abs=1e-4)  # of one vector, the same


@pytest.mark.parametrize("bits", [1, 3])
def test_the_softmax_over_all_corners_factorises(bits: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(50, 3, dtype=torch.float64)
    bsq = BSQ(dim=3, entropy_weight=1.0, entropy_temperature=0.3, entropy_group_bits=bits).double()
    out = bsq(z)
    p = (2 * functional.normalize(z, dim=-1) @ bsq.codebook.T / 0.3).softmax(-1)
    torch.testing.assert_close(out.metrics["sample_entropy"], torch.special.entr(p).sum(-1).mean())
    joint = torch.special.entr(p.mean(0)).sum()
    if bits == 3:
        torch.testing.assert_close(out.metrics["batch_entropy"], joint, rtol=0, atol=1e-3)
    else:
        assert out.metrics["batch_entropy"] > joint - 1e-3


def test_only_the_direction_counts() -> None:
    torch.manual_seed(0)
    bsq, z = BSQ(dim=6), torch.randn(20, 6)
    first, second = bsq(z), bsq(1000 * z)
    assert torch.equal(first.indices, second.indices)
    torch.testing.assert_close(first.loss, second.loss)


@pytest.mark.parametrize("dim", [1, 2, 9, 36])
def test_codes_are_unit_vectors_and_the_error_is_bounded(dim: int) -> None:
    torch.manual_seed(0)
    bsq, z = BSQ(dim=dim), torch.randn(500, dim)
    z[0] = 0
    z[0, 0] = 3  # a pole: as far from any corner as can be
    out = bsq(z)
    torch.testing.assert_close(out.z_q.norm(dim=-1), torch.ones(500))
    error = (out.z_q - functional.normalize(z, dim=-1)).norm(dim=-1)
    bound = math.sqrt(2 - 2 / math.sqrt(dim))
    assert error.max() <= bound + 1e-6
    assert error[0].item() == pytest.approx(bound, abs=1e-3)


def test_is_lookup_free_quantization_on_the_sphere() -> None:
    torch.manual_seed(0)
    z = torch.randn(40, 5)
    bsq = BSQ(dim=5, commitment_weight=0.25, entropy_weight=0.1)
    lfq = LFQ(
        dim=5, scale=5**-0.5, commitment_weight=0.25, entropy_weight=0.1, entropy_temperature=1.0, entropy_group_bits=1
    )
    assert torch.equal(bsq(z).indices, lfq(z).indices)
    torch.testing.assert_close(bsq(z).loss, lfq(functional.normalize(z, dim=-1)).loss)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="binary codes need dim, or codebook_size"):
        BSQ()
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        BSQ(dim=0)
    with pytest.raises(ValueError, match="drops the length of z"):
        Residual(BSQ(dim=4), 2)
