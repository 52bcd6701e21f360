"""Pictures of other channels and depths through every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tessella
from tessella.data._pixels import BitDepth
from tessella.media.image import Image

RECIPE = """
[data]
name = "folder"
path = "planes"
crop_px = 16
channels = {channels}
bit_depth = {bit_depth}
[autoencoder]
name = "conv"
in_channels = {channels}
channels = 8
multipliers = [1]
num_res_blocks = 1
num_decoder_res_blocks = 1
mid_attention = false
latent_dim = 3
patch_px = 4
[quantizer]
name = "fsq"
levels = [5, 5, 5]
[training]
steps = 2
batch_size = 2
sample_every = 2
"""


@pytest.mark.parametrize(("channels", "bit_depth"), [(1, 8), (6, 16)])
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, bit_depth: BitDepth) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "planes").mkdir()
    for index in range(6):
        values = rng.integers(0, 2**bit_depth, (18, 20, channels), dtype=np.uint8 if bit_depth == 8 else np.uint16)
        np.save(tmp_path / "planes" / f"{index}.npy", values)
    (tmp_path / "planes.toml").write_text(RECIPE.format(channels=channels, bit_depth=bit_depth))
    run = tessella.train("planes.toml", out=Path("run"), device="cpu", quiet=False)
    tessella.tokenize(run, Path("tokens"), device="cpu")
    assert tessella.detokenize(run, Path("tokens"), Path("pictures"), device="cpu") == 6
    medium = Image(channels=channels, bit_depth=bit_depth)
    pictures = sorted(Path("pictures").rglob(f"*{medium.suffix}"))
    assert len(pictures) == 6
    assert medium.read(pictures[0]).shape == (channels, 16, 16)
    assert tessella.evaluate(run, device="cpu").reconstruction is not None
    assert json.loads((run / "evaluation.json").read_text())["psnr"] > 0
    assert "0.npy" in tessella.report(run, device="cpu").read_text()
