from __future__ import annotations

import pytest
import torch
from vector_quantize_pytorch import SimVQ as ReferenceSimVQ

from tessella.quantizers import VQ, SimVQ


def test_values_by_hand() -> None:
    simvq = SimVQ(2, 1)
    simvq.basis.copy_(torch.tensor([[1.0], [2.0]]))
    with torch.no_grad():
        simvq.projection.weight.fill_(3.0)
        simvq.projection.bias.fill_(-1.0)
    assert simvq.codebook.tolist() == [[2.0], [5.0]]
    z = torch.tensor([[4.0]], requires_grad=True)
    out = simvq(z)
    assert out.indices.tolist() == [[1]]
    assert out.z_q.tolist() == [[5.0]]
    assert simvq.indices_to_codes(out.indices).tolist() == [[5.0]], "decoding projects too"
    assert out.loss.item() == pytest.approx(1.25 * 1)
    (out.loss + 3 * out.z_q.sum()).backward()
    assert z.grad is not None
    assert z.grad.item() == pytest.approx(3 + 0.25 * 2 * (4 - 5))
    # dL/dW = 2 R C_k, dL/db = 2 R, with R = q - z = 1
    assert simvq.projection.weight.grad is not None
    assert simvq.projection.bias.grad is not None
    assert simvq.projection.weight.grad.item() == pytest.approx(4)
    assert simvq.projection.bias.grad.item() == pytest.approx(2)


def test_gradients_of_the_closed_form() -> None:
    torch.manual_seed(0)
    simvq = SimVQ(16, 4).double()
    z = torch.randn(50, 4, dtype=torch.float64)
    out = simvq(z)
    out.loss.backward()
    residual, basis = out.z_q.detach() - z, simvq.basis[out.indices[:, 0]]
    scale = 2 / z.numel()
    torch.testing.assert_close(simvq.projection.weight.grad, scale * residual.T @ basis)
    torch.testing.assert_close(simvq.projection.bias.grad, scale * residual.sum(0))


def test_one_step_moves_every_code_by_the_published_rule() -> None:
    torch.manual_seed(0)
    simvq = SimVQ(16, 4).double()
    z, rate = torch.randn(3, 4, dtype=torch.float64), 0.1
    before, out = simvq.codebook.detach(), simvq(z)
    out.loss.backward()
    torch.optim.SGD(simvq.parameters(), lr=rate).step()
    # dE_j = -rate 2/(ND) sum_n (c_j . c_kn + 1) R_n; the 1 is the bias
    inner = simvq.basis @ simvq.basis[out.indices[:, 0]].T + 1
    expected = -rate * 2 / z.numel() * inner @ (out.z_q.detach() - z)
    torch.testing.assert_close(simvq.codebook.detach() - before, expected)
    assert (expected.norm(dim=-1) > 0).all()


def test_the_basis_is_frozen_and_scaled() -> None:
    simvq = SimVQ(4096, 64)
    assert [name for name, _ in simvq.named_parameters()] == ["projection.weight", "projection.bias"]
    assert simvq.basis.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert "basis" in simvq.state_dict()


def test_a_public_implementation_agrees() -> None:
    torch.manual_seed(0)
    reference = ReferenceSimVQ(dim=4, codebook_size=32, rotation_trick=True)
    simvq = SimVQ(32, 4, estimator="rotation")
    simvq.basis.copy_(reference.frozen_codebook)
    with torch.no_grad():
        simvq.projection.weight.copy_(reference.code_transform.weight)
        simvq.projection.bias.zero_()
    z = torch.randn(1, 60, 4)
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = simvq(mine)
    quantized, indices, loss = reference(theirs)
    assert torch.equal(out.indices[..., 0], indices)
    torch.testing.assert_close(out.loss, loss)
    (out.loss + out.z_q.square().sum()).backward()
    (loss + quantized.square().sum()).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(simvq.projection.weight.grad, reference.code_transform.weight.grad)


def test_the_codes_follow_data_that_are_off_centre() -> None:
    z = torch.randn(128, 8, generator=torch.Generator().manual_seed(0)) + 2
    usage = {}
    for cls in (SimVQ, VQ):
        torch.manual_seed(0)
        quantizer = cls(32, 8)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=3e-2)
        for _ in range(60):
            out = quantizer(z)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        usage[cls] = out.metrics["usage"].item()
    assert usage[SimVQ] > 2 * usage[VQ]
