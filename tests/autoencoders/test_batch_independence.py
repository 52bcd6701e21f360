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

_TITOK = {
    "size_px": 16, "patch_px": 4, "num_latents": 12, "latent_dim": 16, "encoder_width": 64, "encoder_depth": 2,
    "encoder_heads": 2, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
_UVIM = {
    "planes": [4], "size_px": 16, "patch_px": 4, "code_grid": 2, "width": 32, "encoder_depth": 2, "decoder_depth": 1,
    "num_heads": 2,
}  # fmt: skip
_WAVES = {"channels": 4, "latent_dim": 16, "strides": [2, 4]}
SMALL: dict[str, dict[str, Any]] = {
    "conv": {"channels": 16, "multipliers": [1, 2], "num_res_blocks": 1, "latent_dim": 16, "attention_strides": [2]},
    "vit": {"patch_px": 4, "width": 32, "depth": 2, "num_heads": 2, "latent_dim": 16},
    "vit of latent tokens": {
        "patch_px": 4, "width": 32, "depth": 2, "num_heads": 2, "latent_dim": 16, "num_latents": 12, "size_px": 16,
    },
    "cosmos": {"channels": 32, "multipliers": [1, 1], "num_downsamples": 1, "num_res_blocks": 1, "latent_dim": 16},
    "maskgit_vqgan": {"channels": 32, "multipliers": [1, 2], "num_res_blocks": 1, "latent_dim": 16},
    "open_magvit2": {"channels": 32, "multipliers": [1, 2], "num_res_blocks": 1, "latent_dim": 16},
    "titok": _TITOK,
    "titok_proxy": {**_TITOK, "size_px": 32, "patch_px": 16, "num_proxies": 32, "proxy_dim": 16, "proxy_channels": 32},
    "uvim": _UVIM,
    "uvim_no_code": _UVIM,
    "seanet": _WAVES,
    "seanet not causal": {**_WAVES, "causal": False},
    "spectral": {"latent_dim": 16, "hop": 8, "n_fft": 32, "dim": 32, "hidden": 64},
    "vocos": {**_WAVES, "dim": 32, "hidden": 64, "num_blocks": 1, "n_fft": 32},
}  # fmt: skip


def signals(name: str, count: int) -> tuple[Tensor, Tensor | None]:
    """With long flat parts, where rounding decides between codes, and noise; and a context where one is taken."""
    rng = torch.Generator().manual_seed(0)
    side = SMALL[name].get("size_px", 16)
    shape = (1, 160) if name.split()[0] in ("seanet", "spectral", "vocos") else (3, side, side)
    x = torch.rand(count, *shape, generator=rng) * 2 - 1
    x[::3] = (x[::3] * 2).round() / 2
    if name.startswith("uvim"):
        return torch.randint(0, 4, (count, 1, 16, 16), generator=rng).float(), x
    return x, None


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tokenizer(name: str, quantizer: Quantizer) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(config.build("autoencoders", {"name": name.split()[0], **SMALL[name]}), quantizer).eval()


def share_that_differs(name: str, model: Tokenizer, *, autocast: bool) -> float:
    """Of the tokens of each signal alone, against those in batches of several sizes."""
    # Two threads on cores that other tests have take ten times as long: fewer signals then.
    x, context = signals(name, 24 if torch.get_num_threads() == 1 else 7)

    def tokens(size: int) -> Tensor:
        contexts = [None] * len(x) if context is None else context.split(size)
        return torch.cat([model.encode(*pair) for pair in zip(x.split(size), contexts, strict=False)])

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone = tokens(1)
        return max((tokens(size) != alone).double().mean().item() for size in {3, 7, len(x)})


def test_every_autoencoder_is_here() -> None:
    assert set(registry.names("autoencoders")) == {name.split()[0] for name in SMALL}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("threads")
def test_tokens_in_float32(name: str) -> None:
    assert share_that_differs(name, tokenizer(name, FSQ([8, 5, 5, 5])), autocast=False) <= FLOAT32


@pytest.mark.parametrize("name", SMALL)
def test_tokens_of_a_searched_codebook(name: str) -> None:
    assert share_that_differs(name, tokenizer(name, VQ(512, 16)), autocast=False) <= FLOAT32


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("threads")
def test_tokens_under_autocast(name: str) -> None:
    assert share_that_differs(name, tokenizer(name, FSQ([8, 5, 5, 5])), autocast=True) <= BFLOAT16


# Matrix products of other heights may add in another order. What was measured is in docs/batch_independence.md.
FLOAT32 = 0.002
BFLOAT16 = 0.02
