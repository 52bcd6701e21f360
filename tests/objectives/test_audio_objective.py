"""The objective of sound: its terms by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.errors import ConfigError
from tessella.losses.audio_adversary import AudioAdversary
from tessella.losses.mel import MelDistance, MultiScaleSpectral
from tessella.objectives.audio import Audio
from tessella.objectives.base import StepOutput
from tessella.quantizers.base import Quantized
from tessella.tokenizer import Reconstruction

LAST = nn.Parameter(torch.zeros(1))


def judged(objective: Audio, x: Tensor, x_hat: Tensor) -> StepOutput:
    batch = Batch(x=x, label=torch.zeros(len(x), dtype=torch.long), key=["a"] * len(x), skipped=[])
    quantized = Quantized(x_hat, torch.zeros(1, 1, dtype=torch.long), torch.zeros(()), {})
    return objective(batch, Reconstruction(x_hat, quantized), LAST)


def test_the_loss_is_the_weighted_sum() -> None:
    x, x_hat = 0.1 * torch.randn(2, 1, 4800), 0.1 * torch.randn(2, 1, 4800)
    out = judged(Audio(mel_weight=45.0, spectral_weight=2.0, l1_weight=0.5), x, x_hat)
    mel, spectral, l1 = MelDistance(24000)(x, x_hat), MultiScaleSpectral(24000)(x, x_hat), (x - x_hat).abs().mean()
    torch.testing.assert_close(out.losses["tokenizer"], 45 * mel + 2 * spectral + 0.5 * l1)
    assert set(out.terms) == {"mel", "spectral", "l1"}
    torch.testing.assert_close(out.metrics["mel"], mel)


def test_samples_beyond_the_original_are_cut_off() -> None:
    x = 0.1 * torch.randn(1, 1, 4700)
    out = judged(Audio(), x, torch.nn.functional.pad(x, (0, 100), value=0.7))
    assert out.losses["tokenizer"].item() == 0


def test_the_balanced_loss_pulls_as_hard_as_its_weights_say() -> None:
    adversary = AudioAdversary(discriminators=["resolution"], width=0.125, weight=3.0, feature_weight=1.0)
    objective = Audio(mel_weight=2.0, l1_weight=1.0, adversary=adversary, balance=True)
    x, x_hat = 0.1 * torch.randn(1, 1, 4800), (0.1 * torch.randn(1, 1, 4800)).requires_grad_()
    out = judged(objective, x, x_hat)
    (gradient,) = torch.autograd.grad(out.losses["tokenizer"], x_hat, retain_graph=True)
    weights = {"mel": 2.0, "l1": 1.0, "adversary": 3.0, "features": 1.0}
    pulls = {name: torch.autograd.grad(term, x_hat, retain_graph=True)[0] for name, term in out.terms.items()}
    expected = sum(weights[name] / 7 * pull / pull.norm() for name, pull in pulls.items())
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="must not all be 0"):
        Audio(mel_weight=0.0)
    late = Audio(adversary=AudioAdversary(discriminators=["stft"], width=0.125, start_step=10))
    with pytest.raises(ConfigError, match=r"loss\.adversary\.start_step \(10\) is not before the end"):
        late.check_steps(10)
