from __future__ import annotations

import pytest
import torch
from conftest import tiny_tokenizer
from torch import Tensor

from tessella.autoencoders import Conv
from tessella.quantizers import FSQ
from tessella.tokenizer import Tokenizer


def test_encode_then_decode_is_what_forward_shows() -> None:
    tokenizer = tiny_tokenizer()
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    out = tokenizer(x)
    indices = tokenizer.encode(x)
    assert indices.shape == (2, 4, 6, 1)
    assert torch.equal(indices, out.quantized.indices)
    assert torch.equal(tokenizer.decode(indices), out.x_hat)


def test_padding_on_request_and_cropping_back() -> None:
    tokenizer = tiny_tokenizer()
    x = torch.rand(1, 3, 18, 23) * 2 - 1
    with pytest.raises(ValueError, match="multiples of the stride 4, got 18 x 23"):
        tokenizer.encode(x)
    indices = tokenizer.encode(x, pad=True)
    assert indices.shape == (1, 5, 6, 1)
    x_hat = tokenizer.decode(indices, extent=(18, 23))
    assert x_hat.shape == x.shape
    padded = tokenizer.pad(x)
    assert torch.equal(padded[..., :18, :23], x)
    assert torch.equal(padded[..., 18:, :23], x[..., -1:, :].expand(-1, -1, 2, -1))
    assert torch.equal(tokenizer.decode(indices)[..., :18, :23], x_hat)
    fitting = torch.zeros(1, 3, 16, 16)
    assert tokenizer.pad(fitting) is fitting


def test_token_space() -> None:
    space = tiny_tokenizer().token_space(16, 24)
    assert (space.grid, space.num_codebooks, space.codebook_size) == ((4, 6), 1, 125)
    assert space.sequence_length == 24


def test_projection() -> None:
    autoencoder = Conv(channels=8, multipliers=(1, 1), num_res_blocks=0, mid_attention=False, latent_dim=3)
    assert sum(p.numel() for p in Tokenizer(autoencoder, FSQ([5, 5, 5]), projection=False).to_code.parameters()) == 0
    with pytest.raises(ValueError, match=r"latent_dim \(3\) must equal the quantizer's dim \(2\)"):
        Tokenizer(autoencoder, FSQ([5, 5]), projection=False)


def test_gradient_reaches_the_encoder_through_the_quantizer() -> None:
    tokenizer = tiny_tokenizer().train()
    tokenizer(torch.rand(2, 3, 16, 16)).x_hat.square().mean().backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_channels_first_latents_are_refused_by_name() -> None:
    class ChannelsFirst(Conv):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x).movedim(-1, 1)

    tokenizer = Tokenizer(ChannelsFirst(channels=8, multipliers=(1,), latent_dim=8, patch_px=4), FSQ([5, 5, 5]))
    with pytest.raises(ValueError, match=r"ChannelsFirst.encode gave \[2, 8, 4, 6\]; latents are channels-last"):
        tokenizer(torch.zeros(2, 3, 16, 24))
