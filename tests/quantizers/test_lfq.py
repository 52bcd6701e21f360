from __future__ import annotations

import math

import pytest
import torch
from vector_quantize_pytorch import LFQ as ReferenceLFQ

from tessella.quantizers import LFQ
from tessella.quantizers.lfq import bit_entropy


def dense_entropies(z: torch.Tensor, table: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    distances = (z[:, None] - table).square().sum(-1)
    p = (-distances / temperature).softmax(-1)
    q = p.mean(0)
    return torch.special.entr(p).sum(-1).mean(), -(q * (q + 1e-5).log()).sum()


def test_bits_by_hand() -> None:
    lfq = LFQ(dim=3, commitment_weight=0.25, entropy_weight=0.0)
    z = torch.tensor([[0.5, -0.1, 2.0], [-1.0, 3.0, 0.0]], requires_grad=True)
    out = lfq(z)
    assert out.z_q.tolist() == [[1, -1, 1], [-1, 1, -1]]  # zero counts as negative
    assert out.indices[:, 0].tolist() == [0b101, 0b010]  # the first channel is the lowest bit
    squares = [0.25, 0.81, 1.0, 0.0, 4.0, 1.0]
    assert out.loss.item() == pytest.approx(0.25 * sum(squares) / 6)
    (out.loss + out.z_q.sum()).backward()
    assert z.grad is not None
    assert z.grad[0].tolist() == pytest.approx([1 + 0.25 * 2 * d / 6 for d in (-0.5, 0.9, 1.0)])


def test_scale() -> None:
    lfq = LFQ(dim=2, scale=0.25)
    assert lfq.codebook.tolist() == [[-0.25, -0.25], [0.25, -0.25], [-0.25, 0.25], [0.25, 0.25]]


def test_entropies_by_hand() -> None:
    # One bit, z = 0 twice: both probabilities 1/2, so S = A = ln 2 (up to the 1e-5 in A's logarithm).
    lfq = LFQ(dim=1, entropy_weight=1.0, commitment_weight=0.0)
    out = lfq(torch.zeros(2, 1))
    assert out.metrics["sample_entropy"].item() == pytest.approx(math.log(2))
    assert out.metrics["batch_entropy"].item() == pytest.approx(-math.log(0.5 + 1e-5))
    # Opposite certain bits: S = 0, A = ln 2, the best there is.
    out = lfq(torch.tensor([[3.0], [-3.0]]))
    assert out.loss.item() == pytest.approx(math.log(0.5 + 1e-5))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_one_group_of_all_bits_is_the_exact_entropy(scale: float) -> None:
    torch.manual_seed(0)
    z = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    lfq = LFQ(
        dim=5, scale=scale, entropy_weight=1.0, entropy_temperature=0.7, entropy_group_bits=5, commitment_weight=0.0
    )
    out = lfq.double()(z)
    (grad,) = torch.autograd.grad(out.loss, z)
    sample, batch = dense_entropies(z, lfq.codebook, 0.7)
    torch.testing.assert_close(out.metrics["sample_entropy"], sample.detach())
    torch.testing.assert_close(out.metrics["batch_entropy"], batch.detach())
    (expected,) = torch.autograd.grad(sample - batch, z)
    torch.testing.assert_close(grad, expected)


def test_groups_bound_the_joint_entropy_and_meet_it_when_independent() -> None:
    torch.manual_seed(0)
    z = torch.randn(200, 4, dtype=torch.float64)
    z[:, 1] = z[:, 0]  # dependent bits in one group of two
    found = [
        LFQ(dim=4, entropy_weight=1.0, entropy_temperature=0.5, entropy_group_bits=bits)(z).metrics["batch_entropy"]
        for bits in (1, 2, 3, 4)
    ]
    _, exact = dense_entropies(z, LFQ(dim=4).codebook.double(), 0.5)
    assert found[0] > found[1] > exact - 1e-9
    torch.testing.assert_close(found[3], exact)
    signs = LFQ(dim=4).codebook.double()  # every pattern once: independent bits
    for bits in (1, 2, 3):
        lfq = LFQ(dim=4, entropy_weight=1.0, entropy_temperature=0.5, entropy_group_bits=bits)
        _, exact = dense_entropies(signs, signs, 0.5)
        # The 1e-5 inside each logarithm is all that differs.
        torch.testing.assert_close(lfq(signs).metrics["batch_entropy"], exact, rtol=0, atol=2e-4)


def test_the_default_sees_collapse_that_single_bits_cannot() -> None:
    assert [LFQ(dim=dim).entropy_group_bits for dim in (3, 10, 16)] == [3, 10, 10]
    # Two opposite codes of 256: every bit is set half of the time, so bit by bit all 8 ln 2 = 5.55 nats seem used.
    z = torch.tensor([[5.0] * 8, [-5.0] * 8])
    bit_by_bit = LFQ(dim=8, entropy_group_bits=1)(z).metrics["batch_entropy"].item()
    assert bit_by_bit == pytest.approx(8 * math.log(2), abs=1e-3)
    assert LFQ(dim=8)(z).metrics["batch_entropy"].item() == pytest.approx(math.log(2), abs=1e-3)


def test_bit_entropy_is_stable() -> None:
    logits = torch.tensor([[-1e4, 1e4, 0.0, 30.0]], requires_grad=True)
    entropy = bit_entropy(logits, None)
    assert entropy.item() == pytest.approx(math.log(2) + 31 * math.exp(-30))
    entropy.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_saturated_batches_have_finite_gradients() -> None:
    z = torch.full((5, 3), 50.0, requires_grad=True)
    LFQ(dim=3)(z).loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_a_public_implementation_agrees() -> None:
    torch.manual_seed(0)
    dim = 6
    reference = ReferenceLFQ(dim=dim, codebook_size=2**dim, entropy_loss_weight=0.1, commitment_loss_weight=0.25)
    lfq = LFQ(dim=dim, entropy_weight=0.1, commitment_weight=0.25, entropy_group_bits=dim)
    z = 0.1 * torch.randn(1, 64, dim)
    theirs = reference(z)
    out = lfq(z)
    bits = torch.arange(dim)
    reversed_bits = ((out.indices >> bits & 1) << (dim - 1 - bits)).sum(-1)  # it numbers from the highest bit
    assert torch.equal(reversed_bits, theirs.indices)
    assert torch.equal(out.z_q, theirs.quantized)
    # It clamps the logarithm at 1e-5 where we add 1e-5.
    torch.testing.assert_close(out.loss, theirs.entropy_aux_loss, rtol=1e-3, atol=1e-3)


def test_no_table_is_needed_for_many_bits() -> None:
    lfq = LFQ(dim=62)
    out = lfq(torch.full((2, 62), 1.0))
    assert out.indices[0, 0].item() == 2**62 - 1
    assert torch.equal(lfq.indices_to_codes(out.indices), out.z_q)
    with pytest.raises(ValueError, match="indices_to_codes instead"):
        _ = lfq.codebook


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="binary codes need dim, or codebook_size"):
        LFQ()
    for size in (0, 1, 12, -4):
        with pytest.raises(ValueError, match=f"codebook_size must be a power of 2 and at least 2, got {size}"):
            LFQ(size)
    with pytest.raises(ValueError, match=r"16 is 2\^4, but dim is 5"):
        LFQ(16, 5)
    with pytest.raises(ValueError, match="dim must be at most 62, got 63"):
        LFQ(dim=63)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        LFQ(dim=0)
    for bits in (0, 13):
        with pytest.raises(ValueError, match="entropy_group_bits must be from 1 to 12"):
            LFQ(dim=4, entropy_group_bits=bits)
