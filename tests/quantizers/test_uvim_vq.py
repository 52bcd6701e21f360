"""UViM's VQ."""

from __future__ import annotations

import pytest
import torch

from tessella.quantizers import UViMVQ


def test_scale_and_offset_of_a_vector_do_not_count_and_codes_have_norm_1() -> None:
    torch.manual_seed(0)
    quantizer = UViMVQ(16, 6).eval()
    z = torch.randn(50, 6)
    out = quantizer(z)
    assert torch.equal(out.indices, quantizer(3 * z + 7).indices)
    torch.testing.assert_close(out.z_q.norm(dim=-1), torch.ones(50))
    # The nearest of unit vectors is the one of the largest cosine.
    standard = torch.nn.functional.layer_norm(z, (6,))
    assert torch.equal(out.indices[:, 0], (standard @ quantizer.codebook.T).argmax(-1))
    assert out.loss == 0


def test_counts_follow_the_published_decay_and_unused_codes_are_split_off_the_most_used() -> None:
    torch.manual_seed(0)
    quantizer = UViMVQ(4, 3)
    z = torch.tensor([[1.0, 0.0, -1.0]]).repeat(200, 1) + 0.01 * torch.randn(200, 3)
    used = quantizer(z).indices.unique()
    quantizer.after_step()
    assert len(used) == 1
    assert quantizer.counts[used].item() == pytest.approx(0.995 + 200)
    assert quantizer.counts.min().item() == pytest.approx(0.995)  # none is dead yet
    for _ in range(10):
        quantizer(z)
        quantizer.after_step()
    assert (quantizer.counts > 10).all()  # halves of what was used
    keep = UViMVQ(4, 3, dead_codes="keep")
    for _ in range(50):
        keep(z)
        keep.after_step()
    assert (keep.counts < 1).sum() == 3


def test_a_single_number_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match="dim must be at least 2"):
        UViMVQ(4, 1)
