"""The tokens of a signal do not depend on what else is in its batch, whatever the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tessella import config, registry
from tessella.quantizers import FSQ, VQ, Quantizer
from tessella.tokenizer import Tokenizer

SMALL: dict[str, dict[str, Any]] = {
    "conv": {"channels": 16, "multipliers": [1, 2], "num_res_blocks": 1, "latent_dim": 16, "attention_strides": [2]},
    "vit": {"size_px": 16, "patch_px": 4, "width": 32, "depth": 2, "num_heads": 2, "latent_dim": 16},
}


def signals(count: int) -> Tensor:
    """Pictures with long flat parts, where rounding decides between codes, and noise."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, 16, 16, generator=rng) * 2 - 1
    x[::3] = (x[::3] * 2).round() / 2
    return x


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tokenizer(name: str, quantizer: Quantizer) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(config.build("autoencoders", {"name": name, **SMALL[name]}), quantizer).eval()


def share_that_differs(model: Tokenizer, x: Tensor, *, autocast: bool) -> float:
    """Of the tokens of each signal alone, against those in batches of several sizes."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone = torch.cat([model.encode(row[None]) for row in x])
        shares = [
            (torch.cat([model.encode(part) for part in x.split(size)]) != alone).double().mean().item()
            for size in (2, 3, 7, len(x))
        ]
    return max(shares)


def test_every_autoencoder_of_pictures_is_here() -> None:
    own = {"uvim", "uvim_no_code", "seanet", "vocos"}  # their tests hold labels, contexts and sounds to the same
    published = {"cosmos", "maskgit_vqgan", "open_magvit2", "titok", "titok_proxy"}  # forms of the others' layers
    assert set(registry.names("autoencoders")) == set(SMALL) | own | published


@pytest.mark.parametrize("quantizer", [lambda: FSQ([8, 5, 5, 5]), lambda: VQ(512, 16)], ids=["fsq", "vq"])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("threads")
def test_tokens_in_float32(name: str, quantizer: Any) -> None:
    assert share_that_differs(tokenizer(name, quantizer()), signals(24), autocast=False) <= FLOAT32[name]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("threads")
def test_tokens_under_autocast(name: str) -> None:
    assert share_that_differs(tokenizer(name, FSQ([8, 5, 5, 5])), signals(24), autocast=True) <= BFLOAT16[name]


# Matrix products of other heights may add in another order. What was measured is in docs/batch_independence.md.
FLOAT32 = {"conv": 0.002, "vit": 0.002}
BFLOAT16 = {"conv": 0.02, "vit": 0.02}
