"""From logits to tokens by hand and by frequency; guidance that changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tessella.generators.guidance import cosine, interval, linear
from tessella.generators.sampling import choose, generators, guided, inference, truncated, uniforms

# Probabilities .5, .3, .15, .05
PROBABILITIES = torch.tensor([0.3, 0.5, 0.05, 0.15])
LOGITS = PROBABILITIES.log()


def kept(logits: Tensor) -> list[bool]:
    return logits.isfinite().tolist()  # type: ignore[no-any-return]


def test_guided_by_hand() -> None:
    conditional, null = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert guided(conditional, null, 1.5).tolist() == [3 + 1.5 * (1 - 3), -2 + 1.5 * (2 + 2)]
    assert torch.equal(guided(conditional, null, 0), null)
    # MaskGIT's form with a = s - 1
    torch.testing.assert_close(guided(conditional, null, 3.0), conditional + 2 * (conditional - null))


class TestTruncated:
    def test_top_k(self) -> None:
        assert kept(truncated(LOGITS, top_k=1)) == [False, True, False, False]
        assert kept(truncated(LOGITS, top_k=3)) == [True, True, False, True]
        assert torch.equal(truncated(LOGITS, top_k=4), LOGITS)

    def test_ties_with_the_last_are_kept(self) -> None:
        assert kept(truncated(torch.tensor([1.0, 2.0, 1.0, 0.0]), top_k=2)) == [True, True, True, False]

    def test_top_p_keeps_the_token_that_crosses(self) -> None:
        assert kept(truncated(LOGITS, top_p=0.49)) == [False, True, False, False]
        assert kept(truncated(LOGITS, top_p=0.51)) == [True, True, False, False]
        assert kept(truncated(LOGITS, top_p=0.79)) == [True, True, False, False]
        assert kept(truncated(LOGITS, top_p=0.81)) == [True, True, False, True]
        assert torch.equal(truncated(LOGITS, top_p=1.0), LOGITS)

    def test_top_k_comes_first(self) -> None:
        # Of the two likeliest, 5/8 and 3/8, the first alone has .6.
        assert kept(truncated(LOGITS, top_k=2, top_p=0.6)) == [False, True, False, False]
        assert kept(truncated(LOGITS, top_p=0.6)) == [True, True, False, False]

    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 10**6), k=st.integers(1, 9), p=st.floats(0.01, 1))
    def test_each_row_alone_and_never_empty(self, seed: int, k: int, p: float) -> None:
        logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed))
        cut = truncated(logits, top_k=k, top_p=p)
        assert (cut.isfinite().sum(-1) >= 1).all()
        assert (cut.isfinite().sum(-1) <= k).all()
        assert (cut.softmax(-1).sum(-1) - 1).abs().max() < 1e-5
        for row in range(3):
            assert torch.equal(cut[row], truncated(logits[row], top_k=k, top_p=p))
            assert cut[row].argmax() == logits[row].argmax()


class TestChoose:
    def test_inverts_the_distribution_function(self) -> None:
        """.3, .8, .85, 1 are the upper ends of the tokens' intervals."""
        uniform = torch.tensor([0.0, 0.299, 0.301, 0.799, 0.801, 0.849, 0.851, 1 - 2**-24])
        assert choose(LOGITS.expand(8, -1), uniform).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]

    def test_frequencies_are_probabilities(self) -> None:
        count = 20000
        uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
        for temperature in (1.0, 0.5, 2.0):
            expected = PROBABILITIES ** (1 / temperature) / (PROBABILITIES ** (1 / temperature)).sum()
            tokens = choose(LOGITS.expand(count, -1), uniform, temperature=temperature)
            found = tokens.bincount(minlength=4) / count
            bound = 4 * (expected * (1 - expected) / count).sqrt()  # four standard deviations
            assert ((found - expected).abs() < bound).all()

    def test_truncated_tokens_never_come(self) -> None:
        uniform = torch.linspace(0, 1 - 2**-24, 5000)
        for settings_ in ({"top_k": 2}, {"top_p": 0.6}):
            assert set(choose(LOGITS.expand(5000, -1), uniform, **settings_).tolist()) == {0, 1}  # type: ignore[arg-type]
        first_is_out = torch.tensor([-math.inf, 0.0, -math.inf])
        assert choose(first_is_out.expand(5000, -1), uniform).unique().tolist() == [1]

    def test_the_temperature_comes_before_the_nucleus(self) -> None:
        # At temperature 1/2 the likeliest token has .25 / .365 = .68.
        uniform = torch.linspace(0, 0.999, 1000)
        assert choose(LOGITS.expand(1000, -1), uniform, temperature=0.5, top_p=0.65).unique().tolist() == [1]
        assert choose(LOGITS.expand(1000, -1), uniform, top_p=0.65).unique().tolist() == [0, 1]

    def test_temperature_0_takes_the_likeliest_and_the_first_of_equals(self) -> None:
        logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 2.0, 2.0]])
        assert choose(logits, torch.tensor([0.9, 0.9]), temperature=0).tolist() == [1, 0]

    def test_low_temperatures_do_not_overflow(self) -> None:
        logits = torch.tensor([500.0, -500.0, 496.0], dtype=torch.bfloat16)
        assert choose(logits, torch.tensor(0.999), temperature=1e-4).item() == 0

    def test_large_codebooks_reach_the_last_token(self) -> None:
        logits = torch.zeros(2, 262144)
        assert choose(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 262143]


def test_uniforms_are_each_samples_own() -> None:
    together = uniforms(generators([3, 4, 5]), 2, 7)
    assert together.shape == (3, 2, 7)
    assert torch.equal(uniforms(generators([4]), 2, 7)[0], together[1])
    assert together.unique().numel() == together.numel()
    rng = generators([3])
    assert not torch.equal(uniforms(rng, 4), uniforms(rng, 4)), "a generator goes on"


def test_inference_restores_every_mode_after_an_error_too() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)

        @inference
        def run(self, x: Tensor, *, fail: bool = False) -> Tensor:
            assert not any(part.training for part in self.modules())
            if fail:
                raise RuntimeError("in the middle")
            return self.first(x)  # type: ignore[no-any-return]

    part = Part()
    part.second.eval()
    assert not part.run(torch.ones(1)).requires_grad
    with pytest.raises(RuntimeError, match="in the middle"):
        part.run(torch.ones(1), fail=True)
    assert (part.training, part.first.training, part.second.training) == (True, True, False)
    assert torch.is_grad_enabled()


class TestGuidance:
    def test_interval(self) -> None:
        scale = interval(3.0, 0.25, 0.5)
        assert [scale(progress) for progress in (0.0, 0.24, 0.25, 0.49, 0.5, 0.9)] == [1, 1, 3, 3, 1, 1]

    def test_ramps(self) -> None:
        assert [linear(1.0, 5.0)(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == [1, 2, 3, 5]
        assert [cosine(1.0, 5.0)(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([1, 3, 5])
        assert cosine(0.0, 1.0)(1 / 3) == pytest.approx(0.25)  # (1 - cos 60 degrees) / 2

    @pytest.mark.parametrize("make", [lambda: interval(-1, 0, 1), lambda: linear(-1, 2), lambda: cosine(2, -1)])
    def test_refuses_negative_scales(self, make: object) -> None:
        with pytest.raises(ValueError, match="guidance must be >= 0"):
            make()  # type: ignore[operator]

    @pytest.mark.parametrize("bounds", [(0.5, 0.2), (-0.1, 0.5), (0.5, 1.1)])
    def test_refuses_bounds(self, bounds: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match="0 <= start <= stop <= 1"):
            interval(2.0, *bounds)
