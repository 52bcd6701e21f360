from __future__ import annotations

import pytest
import torch

from tessella.quantizers import VQ, Residual, ResidualDropout


def stack() -> ResidualDropout:
    torch.manual_seed(0)
    return ResidualDropout(VQ(16, 4), 4)


def test_training_shows_the_first_codes_and_evaluation_all() -> None:
    quantizer, z = stack(), torch.randn(50, 4)
    seen = set()
    for _ in range(60):
        out = quantizer.train()(z)
        sums = [quantizer.indices_to_codes(out.indices[:, :count]) for count in (1, 2, 3, 4)]
        matches = [count for count, code in enumerate(sums, 1) if torch.allclose(code, out.z_q, atol=1e-6)]
        assert len(matches) == 1
        seen |= set(matches)
    assert seen == {1, 2, 3, 4}
    out = quantizer.eval()(z)
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    plain = Residual(VQ(16, 4), 4).eval()
    plain.load_state_dict(quantizer.state_dict())
    assert torch.equal(plain(z).z_q, out.z_q)


def test_more_codebooks_are_nearer() -> None:
    quantizer, z = stack(), torch.randn(200, 4)
    for stage, scale in zip(quantizer.stages, (1.0, 0.5, 0.25, 0.12), strict=True):
        torch.nn.init.normal_(stage.embedding, std=scale)  # type: ignore[arg-type]
    indices = quantizer.eval()(z).indices
    errors = [(quantizer.indices_to_codes(indices[:, :count]) - z).square().mean().item() for count in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


def test_no_and_too_many_codebooks_are_refused() -> None:
    for count in (0, 5):
        with pytest.raises(ValueError, match=r"the last axis of indices must be num_codebooks = 4"):
            stack().indices_to_codes(torch.zeros(2, count, dtype=torch.long))
