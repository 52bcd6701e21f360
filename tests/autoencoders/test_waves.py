"""SEANet, Vocos and spectra: sizes, lengths, causality, chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessella.autoencoders import SEANet, Spectral, Vocos
from tessella.autoencoders.base import Autoencoder, Memory
from tessella.autoencoders.seanet import CausalConv, CausalTransposed, pad_reflecting
from tessella.quantizers import FSQ
from tessella.tokenizer import Tokenizer

SMALL: dict[str, Any] = {"channels": 4, "latent_dim": 6, "strides": (2, 4), "kernel": 5}


def seanet(**options: Any) -> SEANet:
    return SEANet(**{**SMALL, **options}).eval()


def vocos(**options: Any) -> Vocos:
    small = {**SMALL, "dim": 16, "hidden": 24, "num_blocks": 2, "n_fft": 32}
    return Vocos(**{**small, **options}).eval()


def spectral(**options: Any) -> Spectral:
    small = {"latent_dim": 6, "hop": 8, "n_fft": 32, "dim": 16, "hidden": 24}
    return Spectral(**{**small, "num_encoder_blocks": 2, "num_decoder_blocks": 1, **options}).eval()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        model, base = Vocos(), SEANet(latent_dim=512)
    assert count(model.encoder) == pytest.approx(8.80e6, abs=0.005e6)
    assert count(model.backbone) == pytest.approx(61.90e6, abs=0.005e6)
    assert count(model.head) == 769 * 1282
    assert count(base.decoder) == pytest.approx(8.80e6, abs=0.005e6)
    names = {name for name, _ in model.encoder.named_parameters()}
    assert "model.13.lstm.weight_hh_l1" in names
    assert "model.1.block.3.conv.conv.bias" not in names  # one wrapper fewer than in the checkpoints
    assert "model.10.block.model.3.conv.bias" in names


@pytest.mark.parametrize("make", [seanet, vocos])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
def test_lengths_of_convolutions(make: Any, causal: bool, pad_mode: str) -> None:
    lengths(make(causal=causal, pad_mode=pad_mode))


def test_lengths_of_spectra() -> None:
    lengths(spectral())


def lengths(model: Autoencoder) -> None:
    tokenizer = Tokenizer(model, FSQ([5, 5])).eval()
    for length in range(1, 3 * 8 + 2):
        x = torch.randn(2, 1, length)
        tokens = -(-length // 8)
        latent = model.encode(x)
        assert latent.shape == (2, tokens, 6)
        assert model.latent_grid(length) == (tokens,)
        assert model.decode(latent).shape == (2, 1, 8 * tokens)
        indices = tokenizer.encode(x, pad=True)
        assert indices.shape == (2, tokens, 1)
        assert tokenizer.decode(indices, extent=(length,)).shape == x.shape


@pytest.mark.parametrize("make", [seanet, vocos])
@pytest.mark.parametrize("sample", [0, 8, 17, 39, 56])
def test_samples_change_no_token_before_their_own(make: Any, sample: int) -> None:
    model = make(pad_mode="constant", num_res_layers=2).double()
    x = torch.randn(1, 1, 80, dtype=torch.float64)
    other = x.clone()
    other[..., sample:] = torch.randn(80 - sample)
    changed = (model.encode(x) - model.encode(other)).abs().amax((0, 2)) > 0
    first = sample // 8
    assert not changed[:first].any()
    assert changed[first]


def test_a_mirrored_start_is_causal_from_the_second_kernel_on() -> None:
    model = seanet().double()
    x = torch.randn(1, 1, 160, dtype=torch.float64)
    other = x.clone()
    other[..., 96:] = 0
    changed = (model.encode(x) - model.encode(other)).abs().amax((0, 2)) > 0
    assert changed.nonzero()[0].item() == 12


def test_without_causality_later_samples_matter() -> None:
    model = seanet(causal=False, pad_mode="constant")
    x = torch.randn(1, 1, 80)
    other = x.clone()
    other[..., 48:] = 0
    changed = (model.encode(x) - model.encode(other)).abs().amax((0, 2)) > 0
    assert changed[:6].any()


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
@pytest.mark.parametrize("make", [seanet, vocos])
def test_chunked_encoding_equals_whole(make: Any, pad_mode: str) -> None:
    model = make(pad_mode=pad_mode, num_res_layers=2).double()
    x = torch.randn(2, 1, 8 * 30 + 3, dtype=torch.float64)
    memory: Memory = {}
    pieces = [64, 8, 40, 80, 48, 3]
    parts = [model.encode_chunk(piece, memory) for piece in x.split(pieces, -1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.encode(x), rtol=0, atol=1e-12)


def test_spectra_with_as_much_context_as_they_reach_equal_the_whole() -> None:
    model = spectral().double()
    assert model.reach == 3 * 3 + 2
    tokenizer = Tokenizer(model, FSQ([8, 8])).double().eval()
    x = torch.randn(1, 1, 8 * 90 + 3, dtype=torch.float64)
    indices = tokenizer.encode(x, pad=True)
    stream = tokenizer.stream(chunk=model.reach, context=model.reach)
    assert torch.equal(torch.cat(list(stream.encode(x.split(100, -1))), 1), indices)
    whole = tokenizer.decode(indices)
    torch.testing.assert_close(torch.cat(list(stream.decode([indices])), -1), whole, rtol=0, atol=1e-12)
    blind = tokenizer.stream(chunk=model.reach, context=0)
    parts = torch.cat([tokenizer.autoencoder.encode(x[..., : 8 * 20]), model.encode(x[..., 8 * 20 :])], 1)
    assert (parts - model.encode(x)).abs().amax((0, 2)).nonzero().min() == 20 - model.reach
    assert not torch.equal(torch.cat(list(blind.decode([indices])), -1), whole)


def test_a_tone_of_spectra_is_seen_with_its_phase() -> None:
    """Half a turn moves the real and the imaginary part, not the magnitude."""
    seen: list[Tensor] = []
    model = spectral()
    model.read.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 10]))
    tone = torch.sin(2 * torch.pi * 4 / 32 * torch.arange(200))[None, None]
    model.encode(tone), model.encode(-tone)
    assert torch.allclose(seen[0][:17], seen[1][:17])
    assert torch.allclose(seen[0][17:], -seen[1][17:], atol=1e-5)
    assert seen[0][:17].argmax() == 4


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
def test_chunked_decoding_equals_whole(pad_mode: str) -> None:
    model = seanet(pad_mode=pad_mode, num_res_layers=2).double()
    latent = torch.randn(2, 20, 6, dtype=torch.float64)
    memory: Memory = {}
    parts = [model.decode_chunk(piece, memory) for piece in latent.split([8, 1, 4, 7], 1)]
    torch.testing.assert_close(torch.cat(parts, -1), model.decode(latent), rtol=0, atol=1e-12)


def test_a_convolution_by_hand() -> None:
    """Kernel [1, 2, 3, 4], stride 2, two zeros before: 3 * 1 + 4 * 2, then 1 + 2 * 2 + 3 * 3 and a zero."""
    conv = CausalConv(1, 1, 4, stride=2, pad_mode="constant")
    conv.conv.weight = torch.tensor([[[1.0, 2, 3, 4]]])
    nn.init.zeros_(conv.conv.bias)
    out = conv(torch.tensor([[[1.0, 2, 3]]]))
    torch.testing.assert_close(out, torch.tensor([[[11.0, 14]]]))


def test_a_transposed_convolution_by_hand() -> None:
    """Stride 1, kernel [1, 10]: each output is a frame and ten times the one before."""
    conv = CausalTransposed(1, 1, 1)
    conv.conv.weight = torch.tensor([[[1.0, 10]]])
    nn.init.zeros_(conv.conv.bias)
    torch.testing.assert_close(conv(torch.tensor([[[1.0, 2, 3]]])), torch.tensor([[[1.0, 12, 23]]]))


def test_reflection_of_what_is_too_short() -> None:
    x = torch.tensor([[[1.0, 2]]])
    torch.testing.assert_close(pad_reflecting(x, (1, 0)), torch.tensor([[[2.0, 1, 2]]]))
    torch.testing.assert_close(pad_reflecting(x, (3, 0)), torch.tensor([[[0.0, 0, 2, 1, 2]]]))


def last_layer_moves_the_signal(model: Any) -> Tensor:
    x_hat = model.decode(model.encode(torch.randn(1, 1, 64)))
    (gradient,) = torch.autograd.grad(x_hat.square().sum(), model.last_layer)
    return gradient


def test_every_parameter_and_the_last_layer_get_gradient() -> None:
    for model in (seanet(), vocos(), spectral()):
        assert last_layer_moves_the_signal(model).abs().sum() > 0
        model.train().decode(model.encode(torch.randn(2, 1, 64))).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": []}, "strides must be whole numbers of at least 1"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"n_fft": 7}, "n_fft must be even and exceed the stride"),
        ({"dropout": 1.0}, "dropout must lie in"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocos(**options)


def test_bad_signals() -> None:
    with pytest.raises(ValueError, match=r"x must be \[B, 1, T\] with T at least 1, got \[1, 1, 0\]"):
        seanet().encode(torch.zeros(1, 1, 0))
    with pytest.raises(ValueError, match=r"latent must be \[B, t, 6\]"):
        vocos().decode(torch.zeros(1, 6, 3))
    with pytest.raises(ValueError, match="the encoder of SEANet needs all of a signal at once"):
        seanet(causal=False).encode_chunk(torch.zeros(1, 1, 8), {})
