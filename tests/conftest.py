"""Small things that several tests need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.autoencoders import Conv
from tessella.media.image import Image as ImageMedium
from tessella.objectives.image import Image as ImageObjective
from tessella.quantizers import FSQ, Quantizer
from tessella.tokenizer import Tokenizer
from tessella.training.tokenizer import TokenizerStep

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers that a test does not seed do not depend on the tests before it, nor equal those of seed 0."""
    torch.manual_seed(2026)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


def tiny_tokenizer(quantizer: Quantizer | None = None, *, seed: int = 0) -> Tokenizer:
    """A tokenizer of a few thousand weights with stride 4."""
    torch.manual_seed(seed)
    autoencoder = Conv(
        channels=8, multipliers=(1,), num_res_blocks=1, num_decoder_res_blocks=1, mid_attention=False, latent_dim=8,
        patch_px=4,
    )  # fmt: skip
    return Tokenizer(autoencoder, quantizer or FSQ([5, 5, 5])).eval()


def picture_step(tokenizer: Tokenizer, **loss: Any) -> TokenizerStep:
    """The training step of a tokenizer of pictures."""
    return TokenizerStep(tokenizer, ImageObjective(**loss), ImageMedium())


def write_pictures(folder: Path, count: int, *, size: int = 20, classes: int = 2) -> Path:
    """Smooth random pictures as PNGs in ``count / classes`` files a class."""
    rng = np.random.default_rng(0)
    for index in range(count):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        file = folder / f"class_{index % classes}" / f"{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(file)
    return folder


TINY_RECIPE = """
# A run of seconds, with everything on that has a state
[data]
name = "folder"
path = "pictures"
crop_px = 16
flip = true
[autoencoder]
name = "conv"
channels = 8
multipliers = [1]
num_res_blocks = 1
num_decoder_res_blocks = 1
mid_attention = false
latent_dim = 8
patch_px = 4
[quantizer]
name = "gumbel"
codebook_size = 32
dim = 4
[training]
steps = 24
batch_size = 4
accumulate = 2
warmup_steps = 5
ema_decay = 0.9
log_every = 1
sample_every = 8
checkpoint_every = 4
num_workers = 0
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with pictures and a recipe for a run of seconds."""
    write_pictures(tmp_path / "pictures", 40)
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def single_threaded() -> dict[str, str]:
    """Environment for subprocesses."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
