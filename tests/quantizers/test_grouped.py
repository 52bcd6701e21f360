from __future__ import annotations

import pytest
import torch

from tessella.quantizers import FSQ, SCQ, VQ, Grouped, Residual


def test_groups_are_independent() -> None:
    torch.manual_seed(0)
    grouped = Grouped(VQ(8, 3), 2)
    z = torch.randn(20, 6)
    out = grouped(z)
    first, second = (group(part) for group, part in zip(grouped.groups, z.chunk(2, -1), strict=True))
    assert torch.equal(out.indices, torch.cat([first.indices, second.indices], -1))
    assert torch.equal(out.z_q, torch.cat([first.z_q, second.z_q], -1))
    torch.testing.assert_close(out.loss, (first.loss + second.loss) / 2)
    error = (out.metrics["quantization_error"], (out.z_q - z).square().mean())
    torch.testing.assert_close(*error)
    assert not torch.equal(grouped.codebook[0], grouped.codebook[1])


def test_codebook_and_order_of_indices() -> None:
    grouped = Grouped(Residual(VQ(8, 3), 2), 2)
    assert grouped.num_codebooks == 4
    assert grouped.codebook.shape == (4, 8, 3)
    indices = torch.tensor([[1, 2, 3, 4]])
    table = grouped.codebook
    expected = torch.cat([table[0, 1] + table[1, 2], table[2, 3] + table[3, 4]])
    torch.testing.assert_close(grouped.indices_to_codes(indices)[0], expected)


def test_grouped_fsq_splits_a_code_into_digits() -> None:
    whole, grouped = FSQ([8, 5, 8, 5]), Grouped(FSQ([8, 5]), 2)
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole(z).z_q, grouped(z).z_q)
    indices = grouped(z).indices
    assert torch.equal(indices[:, 0] + 40 * indices[:, 1], whole(z).indices[:, 0])


def test_soft_groups_are_soft() -> None:
    assert Grouped(SCQ(8, 2), 2).is_soft
    assert not Grouped(VQ(8, 2), 2).is_soft


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        Grouped(VQ(8, 2), 0)
