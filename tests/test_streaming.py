"""Signals in chunks: exactly the whole where the model is causal, the overlap where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessella.autoencoders import SEANet, Vocos
from tessella.autoencoders.base import Autoencoder
from tessella.quantizers import FSQ, Residual, SimVQ
from tessella.tokenizer import Tokenizer

SMALL: dict[str, Any] = {"channels": 4, "latent_dim": 6, "strides": (2, 4)}


def pieces(x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    start = 0
    while start < x.shape[-1]:
        for size in sizes:
            if start < x.shape[-1]:
                yield x[..., start : start + size]
                start += size


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
@pytest.mark.parametrize("length", [5, 8 * 7, 8 * 100 + 3, 8 * 33])
def test_a_causal_model_in_chunks_equals_the_whole(pad_mode: Any, length: int) -> None:
    model = Tokenizer(SEANet(**SMALL, pad_mode=pad_mode), Residual(SimVQ(16, 4), 3)).double().eval()
    stream = model.stream(chunk=10)
    x = torch.randn(2, 1, length, dtype=torch.float64)
    found = torch.cat(list(stream.encode(pieces(x, [1, 100, 17]))), 1)
    indices = model.encode(x, pad=True)
    assert torch.equal(found, indices)
    x_hat = torch.cat(list(stream.decode(indices.split(7, 1))), -1)
    torch.testing.assert_close(x_hat, model.decode(indices), rtol=0, atol=1e-12)


class Window(Autoencoder):
    """Each latent sees one position on either side, and each sample one latent on either side."""

    in_channels, latent_dim, stride = 1, 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv1d(1, 2, 12, stride=4, padding=4), nn.Conv1d(2, 4, 3, padding=1)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).mT

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent.mT).mT.flatten(1)[:, None]

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.weight


@pytest.mark.parametrize("length", [3, 40, 4 * 61 + 2])
def test_a_context_as_wide_as_the_model_sees_equals_the_whole(length: int) -> None:
    model = Tokenizer(Window(), FSQ([8, 8])).double().eval()
    x = 3 * torch.randn(1, 1, length, dtype=torch.float64)
    indices = model.encode(x, pad=True)
    stream = model.stream(chunk=5, context=1)
    assert torch.equal(torch.cat(list(stream.encode(pieces(x, [9, 2]))), 1), indices)
    x_hat = torch.cat(list(stream.decode(indices.split(3, 1))), -1)
    torch.testing.assert_close(x_hat, model.decode(indices), rtol=0, atol=1e-12)
    if length > 100:
        blind = torch.cat(list(model.stream(chunk=5, context=0).encode([x])), 1)
        assert blind.shape == indices.shape
        assert not torch.equal(blind, indices)


def test_vocos_streams_its_tokens_exactly_and_its_signal_nearly() -> None:
    model = Tokenizer(Vocos(**SMALL, dim=16, hidden=24, num_blocks=2, n_fft=32), FSQ([5, 5])).eval()
    x = torch.randn(1, 1, 8 * 200)
    stream = model.stream(chunk=50, context=40)
    indices = torch.cat(list(stream.encode(x.split(100, -1))), 1)
    assert torch.equal(indices, model.encode(x))
    x_hat, whole = torch.cat(list(stream.decode([indices])), -1), model.decode(indices)
    assert x_hat.shape == whole.shape
    assert (x_hat - whole).norm() < 0.5 * whole.norm()


def test_memory_holds_a_chunk_and_no_more() -> None:
    model = Tokenizer(SEANet(**SMALL), FSQ([5, 5])).eval()
    given = taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal given
        while True:
            given += 80
            yield torch.zeros(1, 1, 80)

    for indices in model.stream(chunk=10).encode(endless()):
        taken += 8 * indices.shape[1]
        assert given - taken <= 2 * 80
        if taken > 2000:
            break


def test_bad_settings() -> None:
    model = Tokenizer(SEANet(**SMALL), FSQ([5, 5]))
    with pytest.raises(ValueError, match="chunk must be at least 7 and context at least 0, got 6 and 3"):
        model.stream(chunk=6, context=3)
