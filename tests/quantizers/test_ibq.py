from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tessella.quantizers import IBQ


def dense(
    z: Tensor, codes: Tensor, commitment: float, codebook: float, entropy: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The published rule with [N, V] tensors, as autograd sees it."""
    logits = z @ codes.T
    s = logits.softmax(-1)
    indices = s.argmax(-1)
    hard = torch.nn.functional.one_hot(indices, len(codes)).to(z.dtype)
    z_q, z_q2 = (hard - s.detach() + s) @ codes, hard @ codes
    loss = (
        (z_q - z).square().mean()
        + commitment * (z_q2.detach() - z).square().mean()
        + codebook * (z_q2 - z.detach()).square().mean()
    )
    p = (logits / temperature).softmax(-1)
    q = p.mean(0)
    sample, batch = torch.special.entr(p).sum(-1).mean(), -(q * (q + 1e-5).log()).sum()
    return z_q, indices, loss + entropy * (sample - batch)


def test_values_by_hand() -> None:
    ibq = IBQ(2, 1, entropy_weight=0.0)
    ibq.embedding.data = torch.tensor([[1.0], [3.0]])
    z = torch.tensor([[1.5]], requires_grad=True)
    out = ibq(z)
    assert out.indices.tolist() == [[1]]  # the largest product, although 1 is nearer
    assert out.z_q.tolist() == [[3.0]]
    assert out.loss.item() == pytest.approx((1 + 1 + 0.25) * 1.5**2)
    out.z_q.sum().backward()
    # dz = Var_s(e) g with s = softmax(1.5, 4.5); dE_k = [k = k*] g + s_k (e_k - mean) g z
    s = 1 / (1 + math.exp(-3))
    mean = 1 + 2 * s
    assert z.grad is not None
    assert z.grad.item() == pytest.approx(s * (1 - s) * 4, rel=1e-5)
    assert ibq.embedding.grad is not None
    expected = [(1 - s) * (1 - mean) * 1.5, 1 + s * (3 - mean) * 1.5]
    assert ibq.embedding.grad[:, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_everything_against_the_dense_form() -> None:
    torch.manual_seed(0)
    weights = {"commitment_weight": 0.7, "codebook_weight": 0.3, "entropy_weight": 0.2, "entropy_temperature": 0.5}
    ibq = IBQ(9, 4, **weights).double()
    z = torch.randn(20, 4, dtype=torch.float64)
    upstream = torch.randn(20, 4, dtype=torch.float64)
    mine, theirs, codes = (
        z.clone().requires_grad_(),
        z.clone().requires_grad_(),
        ibq.embedding.data.clone().requires_grad_(),
    )
    out = ibq(mine)
    (out.loss + (upstream * out.z_q).sum()).backward()
    z_q, indices, loss = dense(theirs, codes, *weights.values())
    (loss + (upstream * z_q).sum()).backward()
    assert torch.equal(out.indices[:, 0], indices)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.z_q, z_q)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(ibq.embedding.grad, codes.grad)


def test_defaults_are_those_of_the_published_code() -> None:
    torch.manual_seed(0)
    ibq = IBQ(9, 4)
    z = torch.randn(20, 4)
    _, _, loss = dense(z, ibq.codebook.detach(), 1.0, 0.25, 0.05, 0.01)
    torch.testing.assert_close(ibq(z).loss.detach(), loss)
    torch.testing.assert_close(IBQ(1000, 64).codebook.std(), torch.tensor(1.0), rtol=0, atol=0.02)


def test_codes_may_start_at_the_scale_of_the_latents() -> None:
    torch.manual_seed(0)
    paper = IBQ(1000, 16)
    torch.manual_seed(0)
    scaled = IBQ(1000, 16, codebook_std=0.25)
    torch.testing.assert_close(scaled.codebook, 0.25 * paper.codebook)  # the same draw
    scaled.reset_parameters()
    torch.testing.assert_close(scaled.codebook.std(), torch.tensor(0.25), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="codebook_std must be above 0 and finite, got 0"):
        IBQ(1000, 16, codebook_std=0)


def test_every_code_receives_gradient() -> None:
    torch.manual_seed(0)
    ibq = IBQ(32, 4)
    ibq(0.3 * torch.randn(3, 4)).z_q.square().sum().backward()
    assert ibq.embedding.grad is not None
    assert (ibq.embedding.grad != 0).any(-1).all()


def test_without_gradients_only_the_search_is_done() -> None:
    torch.manual_seed(0)
    ibq = IBQ(16, 4)
    z = torch.randn(30, 4)
    full = ibq(z)
    with torch.no_grad():
        out = ibq(z)
    assert torch.equal(out.indices, full.indices)
    assert torch.equal(out.z_q, full.z_q)
    error = (full.z_q - z).square().mean()
    torch.testing.assert_close(out.loss, (2.25 * error).detach())
    torch.testing.assert_close(out.metrics["quantization_error"], full.metrics["quantization_error"])
    assert "sample_entropy" not in out.metrics
