"""Losses and discriminators of waveforms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tessella.losses.audio_adversary import (
    AudioAdversary,
    Balancer,
    discriminator_loss,
    feature_distance,
    generator_loss,
)
from tessella.losses.audio_discriminators import MultiBand, MultiPeriod, MultiResolution, MultiScaleSTFT
from tessella.losses.mel import MelDistance, MelSpectrogram, MultiScaleSpectral


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("cls", "parameters", "digits"), [(MultiPeriod, 41.1e6, 0.05e6), (MultiResolution, 0.60e6, 0.005e6),
                                      (MultiBand, 42.5e6, 0.05e6)],
)  # fmt: skip
def test_the_published_sizes(cls: type[nn.Module], parameters: float, digits: float) -> None:
    with torch.device("meta"):
        assert count(cls()) == pytest.approx(parameters, abs=digits)


@pytest.mark.parametrize(
    ("cls", "views"), [(MultiPeriod, 5), (MultiResolution, 3), (MultiBand, 8), (MultiScaleSTFT, 5)]
)
def test_every_view_judges(cls: type[nn.Module], views: int) -> None:
    discriminator = cls(4)
    x = torch.randn(2, 1, 2400)
    judgement = discriminator(x)
    assert len(judgement) == views
    for features, logits in judgement:
        assert len(logits) == 2
        assert logits.shape[1] == 1
        assert len(features) >= 4
    other = torch.cat([x[:1], torch.randn(1, 1, 2400)])
    torch.testing.assert_close(discriminator(other)[0][1][:1], judgement[0][1][:1])  # a file is judged alone


def test_periods_see_columns() -> None:
    """A signal of period 3 is, to the network of period 3, three constant columns."""
    discriminator = MultiPeriod(4, (3,))
    x = torch.tensor([0.1, -0.4, 0.7]).repeat(40)[None, None]
    logits = discriminator(x)[0][1][0, 0]
    middle = logits[len(logits) // 2]
    assert middle.unique().numel() == 3


def test_the_band_discriminator_ignores_offset_and_level() -> None:
    discriminator = MultiBand(2).double()
    x = torch.randn(1, 1, 2048, dtype=torch.float64)
    for (_, first), (_, second) in zip(discriminator(x), discriminator(0.25 * x + 0.5), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_rules_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.25 + 0.75)
    assert generator_loss(fake, "hinge").item() == pytest.approx((3 + 0.5) / 2)
    assert discriminator_loss(real, fake, "least_squares").item() == pytest.approx((1 + 0.25) / 2 + (4 + 0.25) / 2)
    assert generator_loss(fake, "least_squares").item() == pytest.approx((9 + 0.25) / 2)
    assert feature_distance([real, real], [fake, real]).item() == pytest.approx(2.0)


def test_turns_reach_their_own_networks_alone() -> None:
    adversary = AudioAdversary(discriminators=["period", "resolution", "stft"], width=0.125)
    x, x_hat = torch.randn(1, 1, 2400), torch.randn(1, 1, 2400, requires_grad=True)
    terms, loss, metrics = adversary(x, x_hat)
    assert set(terms) == {"adversary", "features"}
    torch.stack(list(terms.values())).sum().backward()
    assert x_hat.grad is not None
    assert x_hat.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.parameters())
    x_hat.grad = None
    loss.backward()
    assert x_hat.grad is None
    assert all(parameter.grad is not None for parameter in adversary.parameters())
    assert metrics["features"] > 0


def test_an_adversary_starts_late_and_warms_up() -> None:
    adversary = AudioAdversary(discriminators=["resolution"], width=0.125, start_step=1, warmup_steps=2)
    x, x_hat = torch.randn(1, 1, 2400), torch.randn(1, 1, 2400, requires_grad=True)
    sizes = []
    for _ in range(4):
        terms, _, metrics = adversary(x, x_hat)
        sizes.append(terms["adversary"].item() / metrics["adversarial"].item() if terms else 0.0)
        adversary.after_step()
    assert sizes == pytest.approx([0, 0.5, 1, 1])


def test_bad_adversaries() -> None:
    with pytest.raises(ValueError, match="discriminators must name at least one"):
        AudioAdversary(discriminators=[])
    with pytest.raises(ValueError, match="unknown discriminator 'patch'"):
        AudioAdversary(discriminators=["patch"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="width must leave"):
        AudioAdversary(width=0.01)


def test_the_balancer_by_hand() -> None:
    """At the first step averages are the norms themselves: unit gradients, weighted 3 to 1."""
    balancer = Balancer({"a": 3.0, "b": 1.0}, decay=0.5)
    x_hat = torch.zeros(1, 1, 2, requires_grad=True)

    def pull(scale: float) -> Tensor:
        losses = {"a": scale * x_hat[0, 0, 0], "b": 10 * x_hat[0, 0, 1]}
        (gradient,) = torch.autograd.grad(balancer(losses, x_hat), x_hat)
        balancer.after_step()
        return gradient[0, 0]

    torch.testing.assert_close(pull(4.0), torch.tensor([0.75, 0.25]))
    # Norm 8 against the average (0.5 * 4 + 8) / (0.5 + 1).
    torch.testing.assert_close(pull(8.0), torch.tensor([0.75 * 8 / (10 / 1.5), 0.25]))


def test_distances_on_mel_spectra() -> None:
    x = 0.1 * torch.randn(1, 1, 4800)
    mel = MelDistance(24000)
    assert mel(x, x).item() == 0
    # Every magnitude doubles, and so does every mel.
    assert mel(x, 2 * x).item() == pytest.approx(math.log(2), rel=1e-4)
    scales = MultiScaleSpectral(24000)
    assert scales(x, x).item() == 0
    assert len(scales.scales) == 5
    sizes = [MelSpectrogram(24000, 2**power, 2**power // 4, 64) for power in range(6, 11)]
    expected = sum(
        (spectrum(x).mean() + ((2 * spectrum(x)).clamp(1e-7).log() - spectrum(x).clamp(1e-7).log()).square().mean())
        for spectrum in sizes
    )
    assert scales(x, 2 * x).item() == pytest.approx(expected.item() / 5, rel=1e-4)


def test_silence_has_a_finite_distance_and_gradient() -> None:
    x_hat = torch.zeros(1, 1, 4800, requires_grad=True)
    distance = MelDistance(24000)(0.1 * torch.randn(1, 1, 4800), x_hat) + MultiScaleSpectral(24000)(
        x_hat.detach(), x_hat
    )
    distance.backward()
    assert distance.isfinite()
    assert x_hat.grad is not None
    assert x_hat.grad.isfinite().all()
