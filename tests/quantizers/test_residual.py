from __future__ import annotations

import pytest
import torch

from tessella import config
from tessella.errors import ConfigError
from tessella.quantizers import EMAVQ, FSQ, IBQ, LFQ, SCQ, VQ, Grouped, GumbelVQ, Residual, SimVQ


def two_stages(**options: float) -> Residual:
    residual = Residual(VQ(2, 1, **options), 2)
    for stage, codes in zip(residual.stages, ([[0.0], [1.0]], [[-0.25], [0.25]]), strict=True):
        stage.embedding.data = torch.tensor(codes)
    return residual


def test_values_and_gradients_by_hand() -> None:
    residual = two_stages(commitment_weight=0.25, codebook_weight=1.0)
    z = torch.tensor([[0.8]], requires_grad=True)
    out = residual(z)
    assert out.indices.tolist() == [[1, 0]]  # 0.8 -> 1, then -0.2 -> -0.25
    assert out.z_q.item() == 0.75
    assert out.metrics["quantization_error"].item() == pytest.approx(0.05**2)
    assert out.loss.item() == pytest.approx(1.25 * (0.2**2 + 0.05**2) / 2)
    (out.loss + 3 * out.z_q.sum()).backward()
    # The decoder's gradient counts once; the commitment of every stage moves z.
    assert z.grad is not None
    assert z.grad.item() == pytest.approx(3 + 0.25 * (2 * -0.2 + 2 * 0.05) / 2)
    first, second = (stage.embedding.grad[:, 0].tolist() for stage in residual.stages)
    assert first == pytest.approx([0, 2 * 0.2 / 2])
    assert second == pytest.approx([2 * (-0.25 + 0.2) / 2, 0])


def test_codes_are_sums_of_the_codebooks() -> None:
    torch.manual_seed(0)
    residual = Residual(VQ(8, 3), 4)
    assert residual.codebook.shape == (4, 8, 3)
    indices = torch.randint(8, (5, 6, 4))
    expected = sum(residual.codebook[k][indices[..., k]] for k in range(4))
    torch.testing.assert_close(residual.indices_to_codes(indices), expected)


def test_stages_start_from_codes_of_their_own() -> None:
    residual = Residual(SimVQ(16, 4), 3)
    tables = residual.codebook
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[1], tables[2])


def test_each_stage_of_bits_halves_the_error() -> None:
    z = 2 * torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)) - 1
    for stages in range(1, 8):
        residual = Residual(LFQ(dim=2, scale=0.5), stages)
        out = residual(z)
        assert (out.z_q - z).abs().max() <= 2.0**-stages + 1e-6
        assert out.indices.shape == (1000, stages)


def test_more_stages_fit_better() -> None:
    z = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    errors = []
    for stages in (1, 2, 4):
        residual = Residual(EMAVQ(16, 4, codebook_init="kmeans"), stages)
        errors.append(residual(z).metrics["quantization_error"].item())
    assert errors[0] > 1.5 * errors[1] > 2.5 * errors[2]


@pytest.mark.parametrize(
    ("quantizer", "reason"),
    [
        (FSQ([5, 5]), "FSQ bounds its input"),
        (IBQ(8, 2), "its own softmax gradient"),
        (GumbelVQ(8, 2), "its own softmax gradient"),
        (SCQ(8, 2), "SCQ is soft"),
        (VQ(8, 2, estimator="rotation"), "set estimator = 'straight_through', not 'rotation'"),
        (SimVQ(8, 2, estimator="rotation"), "set estimator = 'straight_through', not 'rotation'"),
        (VQ(8, 2, metric="cosine"), "metric = 'cosine' drops the length"),
        (EMAVQ(8, 2, unit_norm=True), "unit_norm fixes the length"),
        (Grouped(VQ(8, 2), 1), "residual stack inside the groups"),
        (Grouped(VQ(8, 2), 2), "put the residual inside"),
        (Residual(VQ(8, 2), 2), "must give one index per vector"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_wrong_combinations_are_refused(quantizer: VQ, reason: str, num_codebooks: int) -> None:
    with pytest.raises(ValueError, match=reason):
        Residual(quantizer, num_codebooks)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="num_codebooks must be at least 1, got 0"):
        Residual(VQ(4, 2), 0)


def test_from_a_recipe() -> None:
    spec = {"name": "residual", "num_codebooks": 4, "quantizer": {"name": "vq", "codebook_size": 8, "dim": 2}}
    residual = config.build("quantizers", spec)
    assert (residual.num_codebooks, residual.codebook_size, residual.dim) == (4, 8, 2)
    with pytest.raises(ConfigError, match="FSQ bounds its input"):
        config.build(
            "quantizers", {"name": "residual", "num_codebooks": 2, "quantizer": {"name": "fsq", "levels": [5]}}
        )
