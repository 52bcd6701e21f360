from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to as reference_rotation

from tessella.quantizers import VQ, Quantizer
from tessella.quantizers._estimators import rotate_to


def with_codes(quantizer: VQ, codes: list[list[float]], dtype: torch.dtype = torch.float32) -> VQ:
    quantizer.to(dtype).embedding.data = torch.tensor(codes, dtype=dtype)
    return quantizer


def gradients(quantizer: Quantizer, z: Tensor, upstream: Tensor | float = 0.0) -> Tensor:
    leaf = z.clone().requires_grad_()
    out = quantizer(leaf)
    (out.loss + (upstream * out.z_q).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_values_and_gradients_by_hand() -> None:
    vq = with_codes(VQ(2, 1, commitment_weight=0.25, codebook_weight=1.0), [[0.0], [1.0]])
    z = torch.tensor([[0.8]])
    out = vq(z)
    assert out.indices.tolist() == [[1]]
    assert out.z_q.tolist() == [[1.0]]
    assert out.loss.item() == pytest.approx((1 + 0.25) * 0.2**2)
    assert out.metrics["quantization_error"].item() == pytest.approx(0.04)
    # dz = g + 2 w_c (z - e), de = 2 w_e (e - z)
    assert gradients(vq, z, 3.0).item() == pytest.approx(3 + 2 * 0.25 * (0.8 - 1))
    assert vq.embedding.grad is not None
    assert vq.embedding.grad[:, 0].tolist() == pytest.approx([0, 2 * (1 - 0.8)])


def test_weights_move_what_they_say() -> None:
    z = torch.tensor([[0.8], [0.1]])
    commitment = with_codes(VQ(2, 1, commitment_weight=1.0, codebook_weight=0.0), [[0.0], [1.0]])
    assert gradients(commitment, z).abs().min() > 0
    assert commitment.embedding.grad is None
    codebook = with_codes(VQ(2, 1, commitment_weight=0.0, codebook_weight=1.0), [[0.0], [1.0]])
    assert not gradients(codebook, z).any()
    assert codebook.embedding.grad is not None
    assert codebook.embedding.grad[:, 0].tolist() == pytest.approx([2 * (0 - 0.1) / 2, 2 * (1 - 0.8) / 2])


def test_cosine_by_hand() -> None:
    vq = with_codes(VQ(2, 2, metric="cosine", commitment_weight=0.0, codebook_weight=1.0), [[9.0, 0.0], [0.0, 0.5]])
    z = torch.tensor([[3.0, 4.0]])  # of unit length (0.6, 0.8), nearer to (0, 1), though (9, 0) has the larger product
    out = vq(z)
    assert out.indices.tolist() == [[1]]
    assert out.z_q.tolist() == [[0.0, 1.0]]
    assert vq.codebook.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert out.loss.item() == pytest.approx((0.6**2 + 0.2**2) / 2)
    # (I - u u^T) g / |z| for g = (1, 0)
    expected = [(1 - 0.36) / 5, -0.48 / 5]
    assert gradients(vq, z, torch.tensor([1.0, 0.0]))[0].tolist() == pytest.approx(expected)


def test_entropy_penalty_equals_the_dense_form() -> None:
    torch.manual_seed(0)
    weight, temperature = 0.3, 0.7
    vq = VQ(5, 3, entropy_weight=weight, entropy_temperature=temperature).double()
    vq.embedding.data.normal_()
    plain = VQ(5, 3).double()
    plain.embedding.data = vq.embedding.data.clone()
    z = torch.randn(11, 3, dtype=torch.float64)
    z_grad, plain_grad = gradients(vq, z), gradients(plain, z)

    leaf, codes = z.clone().requires_grad_(), vq.embedding.data.clone().requires_grad_()
    p = (-(torch.cdist(leaf, codes, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / temperature).softmax(-1)
    q = p.mean(0)
    sample, batch = -(p * p.log()).sum(-1).mean(), -(q * (q + 1e-5).log()).sum()
    penalty = weight * (sample - batch)
    penalty.backward()
    out = vq(z)
    torch.testing.assert_close(out.loss, plain(z).loss + penalty)
    torch.testing.assert_close(out.metrics["sample_entropy"], sample)
    torch.testing.assert_close(out.metrics["batch_entropy"], batch)
    assert leaf.grad is not None
    assert codes.grad is not None
    torch.testing.assert_close(z_grad, plain_grad + leaf.grad)
    assert vq.embedding.grad is not None
    assert plain.embedding.grad is not None
    torch.testing.assert_close(vq.embedding.grad, plain.embedding.grad + codes.grad)
    with torch.no_grad():
        assert "sample_entropy" not in vq(z).metrics


def test_rotation_by_hand() -> None:
    # A quarter turn and 3/2 of the length: R^T turns g = (1, 0) to (0, -1).
    z = torch.tensor([[2.0, 0.0]], requires_grad=True)
    out = rotate_to(z, torch.tensor([[0.0, 3.0]]))
    assert out.tolist() == [[0.0, 3.0]]
    out.backward(torch.tensor([[1.0, 0.0]]))
    assert z.grad is not None
    assert z.grad[0].tolist() == pytest.approx([0.0, -1.5], abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_rotation_keeps_angles_and_scales_lengths(seed: int, dim: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    z, z_q, g = torch.randn(3, 8, dim, generator=rng, dtype=torch.float64).unbind()
    z.requires_grad_()
    out = rotate_to(z, z_q)
    assert torch.equal(out, z_q)
    out.backward(g)
    grad, ratio = z.grad, z_q.norm(dim=-1) / z.detach().norm(dim=-1)
    assert grad is not None
    torch.testing.assert_close(grad.norm(dim=-1), ratio * g.norm(dim=-1))
    # R z/|z| = q/|q|, so <R^T g, z> |q|/|z| = <g, q>
    torch.testing.assert_close((grad * z.detach()).sum(-1), (g * z_q).sum(-1))
    other = z.detach().clone().requires_grad_()
    reference_rotation(other, z_q).backward(g)
    torch.testing.assert_close(grad, other.grad)


def test_rotation_without_a_direction() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    rotate_to(z, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])).backward(torch.ones(3, 2))
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert z.grad[0].tolist() == [1.0, 1.0]  # a zero z: straight through
    assert z.grad[2].tolist() == [0.0, 0.0]  # a zero code has no length to scale


def test_the_rotation_estimator_is_used_and_leaves_the_codes_alone() -> None:
    vq = with_codes(
        VQ(2, 2, estimator="rotation", commitment_weight=0.0, codebook_weight=0.0), [[0.0, 3.0], [9.0, 9.0]]
    )
    grad = gradients(vq, torch.tensor([[2.0, 0.0]]), torch.tensor([1.0, 0.0]))
    assert grad[0].tolist() == pytest.approx([0.0, -1.5], abs=1e-6)
    assert vq.embedding.grad is None


def test_tokens_and_gradients_of_a_public_implementation() -> None:
    torch.manual_seed(0)
    reference = VectorQuantize(
        dim=4, codebook_size=12, learnable_codebook=True, ema_update=False, commitment_weight=1.0, rotation_trick=False
    )
    vq = VQ(12, 4, commitment_weight=1.0, codebook_weight=1.0)
    vq.embedding.data = reference.codebook.detach().clone()
    z = torch.randn(1, 50, 4)
    leaf = z.clone().requires_grad_()
    quantized, indices, loss = reference(leaf)
    (loss.sum() + quantized.square().sum()).backward()
    mine = z.clone().requires_grad_()
    out = vq(mine)
    (out.loss + out.z_q.square().sum()).backward()
    assert torch.equal(out.indices[..., 0], indices)
    assert mine.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(mine.grad, leaf.grad)
    reference_codes = reference._codebook.embed.grad
    assert vq.embedding.grad is not None
    torch.testing.assert_close(vq.embedding.grad, reference_codes[0])


def test_random_start() -> None:
    assert VQ(64, 3).embedding.abs().max() <= 1 / 64
    assert VQ(64, 3).embedding.abs().max() > 0.9 / 64
    assert VQ(64, 3, init_scale=0.5).embedding.abs().max().item() == pytest.approx(0.5, rel=0.05)
    with pytest.raises(ValueError, match="init_scale must be above 0 and finite, got 0"):
        VQ(64, 3, init_scale=0.0)


def test_cosine_codes_start_as_unit_vectors() -> None:
    vq = VQ(64, 8, metric="cosine")
    torch.testing.assert_close(vq.embedding.norm(dim=-1), torch.ones(64))
    vq.reset_parameters()
    torch.testing.assert_close(vq.embedding.norm(dim=-1), torch.ones(64))


def clusters(count: int, per_cluster: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    means = 10 * torch.randn(count, 3, generator=rng)
    points = means.repeat_interleave(per_cluster, 0) + 0.01 * torch.randn(count * per_cluster, 3, generator=rng)
    return means, points[torch.randperm(len(points), generator=rng)]


class TestKMeansInit:
    def quantizer(self, size: int = 8) -> VQ:
        return VQ(size, 3, codebook_init="kmeans")

    def test_unfitted_evaluation_is_refused(self) -> None:
        vq = self.quantizer().eval()
        for use in (
            lambda: vq(torch.zeros(20, 3)),
            lambda: vq.codebook,
            lambda: vq.indices_to_codes(torch.zeros(1, 1).long()),
        ):
            with pytest.raises(RuntimeError, match="codebook is not fitted: codebook_init='kmeans'"):
                use()

    def test_unfitted_compilation_is_refused(self) -> None:
        vq = torch.compile(self.quantizer(), fullgraph=True, backend="eager")
        with pytest.raises(Exception, match=r"must run outside torch\.compile"):
            vq(torch.randn(20, 3))

    def test_too_small_a_batch_is_refused(self) -> None:
        vq = self.quantizer()
        with pytest.raises(ValueError, match=r"needs at least codebook_size = 8 vectors .* got 7"):
            vq(torch.randn(9, 3), torch.arange(9) < 7)

    def test_the_first_batch_fits_and_no_other(self) -> None:
        means, points = clusters(8, 20)
        vq = self.quantizer()
        state = torch.get_rng_state()
        out = vq(points)
        assert torch.equal(torch.get_rng_state(), state), "the fit must leave the global generator alone"
        assert out.metrics["quantization_error"] < 1e-3
        assert out.metrics["usage"] == 1
        assert torch.cdist(means, vq.codebook.detach()).min(-1).values.max() < 0.05
        codes = vq.codebook.detach().clone()
        vq(points + 5)
        assert torch.equal(vq.codebook, codes)

    def test_padding_takes_no_part(self) -> None:
        _, points = clusters(8, 20)
        plain, padded = self.quantizer(), self.quantizer()
        plain(points)
        padded(torch.cat([points, torch.full((50, 3), 99.0)]), torch.arange(210) < 160)
        assert torch.equal(plain.codebook, padded.codebook)

    def test_the_state_dict_knows(self) -> None:
        fitted, other = self.quantizer(), self.quantizer()
        empty = self.quantizer().state_dict()
        fitted.fit(torch.randn(30, 3))
        other.load_state_dict(fitted.state_dict())
        assert torch.equal(other.eval().codebook, fitted.codebook)
        other.load_state_dict(empty)
        with pytest.raises(RuntimeError, match="not fitted"):
            other(torch.zeros(1, 3))

    def test_codes_from_before_the_option_are_fitted(self) -> None:
        random, vq = VQ(8, 3), self.quantizer().eval()
        vq.load_state_dict(random.state_dict())
        assert torch.equal(vq(torch.zeros(1, 3)).z_q, random(torch.zeros(1, 3)).z_q)
        unfitted = self.quantizer().eval()
        unfitted.load_state_dict({}, strict=False)
        with pytest.raises(RuntimeError, match="not fitted"):
            unfitted(torch.zeros(1, 3))

    def test_a_copied_buffer_is_enough_also_for_a_compiled_graph(self) -> None:
        fitted, copied = self.quantizer(), self.quantizer().eval()
        fitted.fit(torch.randn(30, 3))
        compiled = torch.compile(copied, fullgraph=True, backend="eager")
        z = torch.randn(20, 3)
        with pytest.raises(RuntimeError, match="not fitted"):
            compiled(z)
        for own, theirs in zip(copied.state_dict().values(), fitted.state_dict().values(), strict=True):
            own.copy_(theirs)
        assert torch.equal(compiled(z).indices, fitted.eval()(z).indices)

    def test_a_loaded_state_can_be_compiled_at_once(self) -> None:
        fitted, other = self.quantizer(), self.quantizer()
        fitted.fit(torch.randn(30, 3))
        compiled = torch.compile(other, fullgraph=True, backend="eager")
        other.load_state_dict(fitted.state_dict())
        z = torch.randn(20, 3)
        assert torch.equal(compiled(z).indices, fitted(z).indices)

    def test_no_step_after_the_first_asks_the_device(self) -> None:
        vq = self.quantizer()
        vq(torch.randn(20, 3))
        vq.fitted = vq.fitted.to("meta")  # which has no value to read
        vq(torch.randn(20, 3))

    def test_cosine_codes_are_unit_vectors(self) -> None:
        vq = VQ(8, 3, codebook_init="kmeans", metric="cosine")
        _, points = clusters(8, 20)
        out = vq(points)
        torch.testing.assert_close(vq.embedding.norm(dim=-1), torch.ones(8))
        assert out.metrics["quantization_error"] < 1e-3
