"""Reconstruction metrics: numbers worked out by hand, a float64 SSIM, and what the record must say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.evaluation.reconstruction import (
    ReconstructionRecord,
    evaluate_reconstruction,
    picture_scores,
    psnr,
    ssim,
    to_uint8,
)
from tessella.losses.perceptual import LPIPS
from tessella.tokenizer import Tokenizer


class GreyLevels(nn.Module):
    """A tokenizer of stride 1: each pixel's channels are K tokens, x_hat is the level plus ``error``."""

    def __init__(self, levels: int = 256, error: float = 0.0) -> None:
        super().__init__()
        self.levels = levels
        self.error = nn.Parameter(torch.tensor(error))
        self.quantizer = nn.Module()
        self.quantizer.codebook_size = levels  # type: ignore[assignment]
        self.quantizer.num_codebooks = 3  # type: ignore[assignment]

    def encode(self, x: Tensor, *, pad: bool = False) -> Tensor:
        assert not self.training
        return ((x + 1) / 2 * (self.levels - 1)).round().long().permute(0, 2, 3, 1)

    def decode(self, indices: Tensor, *, extent: Sequence[int] | None = None) -> Tensor:
        x_hat = indices.permute(0, 3, 1, 2) / (self.levels - 1) * 2 - 1 + self.error
        assert extent == x_hat.shape[2:]
        return x_hat.detach()


def grey_levels(levels: int = 256, error: float = 0.0) -> Tokenizer:
    return cast(Tokenizer, GreyLevels(levels, error))


def batch(x: Tensor, *, first: int = 0, skipped: int = 0) -> Batch:
    keys = [f"picture{first + position}" for position in range(len(x))]
    return Batch(
        x=x,
        label=torch.full((len(x),), -1),
        key=keys,
        skipped=[(f"bad{position}", "cut") for position in range(skipped)],
    )


def pictures(count: int, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng) / 127.5 - 1


def test_psnr_by_hand() -> None:
    torch.testing.assert_close(psnr(torch.tensor([0.01, 1.0, 0.0])), torch.tensor([20.0, 0.0, 100.0]))


def test_constant_error_by_hand() -> None:
    x = torch.zeros(2, 3, 8, 8)
    x_hat = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), -0.02)])
    scores = picture_scores(x, x_hat, lpips={}, pixels="float")
    torch.testing.assert_close(scores["l1"], torch.tensor([0.1, 0.01]))
    torch.testing.assert_close(scores["l2"], torch.tensor([0.01, 0.0001]))
    torch.testing.assert_close(scores["psnr"], torch.tensor([20.0, 40.0]))


def test_eight_bit_rounds_the_reconstruction() -> None:
    x = to_uint8(torch.zeros(1, 3, 8, 8)) / 127.5 - 1
    x_hat = x + 0.8 / 127.5  # nearer to the next level
    assert picture_scores(x, x_hat, lpips={}, pixels="float")["l1"].item() == pytest.approx(0.8 / 255, rel=1e-4)
    assert picture_scores(x, x_hat, lpips={}, pixels="uint8")["l1"].item() == pytest.approx(1 / 255, rel=1e-4)
    assert picture_scores(x, x_hat, lpips={}, pixels="truncated")["l1"].item() == 0
    every = torch.arange(192.0).view(1, 3, 8, 8) / 127.5 - 1
    assert picture_scores(every, every, lpips={}, pixels="truncated")["l1"].item() == 0


def test_to_uint8_inverts_the_reading_of_every_level_and_clamps() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def ssim_float64(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, one channel [H, W] in [0, 1]; scipy's mirror is the reflection without the border pixel."""

    def blur(z: np.ndarray) -> np.ndarray:
        return cast(np.ndarray, gaussian_filter(z, 1.5, mode="mirror", radius=5))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


def test_ssim_against_float64() -> None:
    x = (pictures(2, 24, 17) + 1) / 2
    x_hat = (x + 0.3 * (pictures(2, 24, 17, seed=1) + 1) / 2).clamp(0, 1)
    expected = [
        np.mean([ssim_float64(a.double().numpy(), b.double().numpy()) for a, b in zip(p, q, strict=True)])
        for p, q in zip(x, x_hat, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, x_hat).numpy(), expected, atol=2e-5)


def test_record_by_hand() -> None:
    x = pictures(5)
    record = evaluate_reconstruction(grey_levels(), [batch(x[:3], skipped=2), batch(x[3:], first=3)])
    assert (record.psnr, record.l1, record.l2) == (pytest.approx(100), 0, 0)
    assert record.ssim == pytest.approx(1, abs=1e-5)
    assert record.bits_per_pixel == 3 * 8
    assert record.num_skipped == 2
    assert record.protocol.num_images == 5
    levels = ((x + 1) * 127.5).round().long().permute(1, 0, 2, 3).flatten(1)
    assert record.usage == pytest.approx(sum(len(channel.unique()) for channel in levels) / (3 * 256))
    f = [torch.bincount(channel, minlength=256).double() / channel.numel() for channel in levels]
    assert record.perplexity == pytest.approx(np.mean([math.exp(torch.special.entr(p).sum()) for p in f]))
    assert record.images_per_sec > 0


def test_mean_over_pictures_not_over_batches() -> None:
    x = pictures(5)
    whole = evaluate_reconstruction(grey_levels(4), [batch(x)])
    parts = evaluate_reconstruction(grey_levels(4), [batch(x[:4]), batch(x[4:])])
    for name in ("psnr", "ssim", "l1", "l2", "usage", "perplexity", "bits_per_pixel"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-6), name
    assert whole.protocol == parts.protocol
    expected = picture_scores(x, (((x + 1) / 2 * 3).round() / 3 * 2 - 1), lpips={})
    assert whole.psnr == pytest.approx(expected["psnr"].mean().item(), rel=1e-6)


def test_mixed_sizes_and_progress() -> None:
    seen: list[int] = []
    record = evaluate_reconstruction(
        grey_levels(2), [batch(pictures(1, 16, 24)), batch(pictures(1, 8, 8)), batch(pictures(1, 8, 8))],
        progress=seen.append,
    )  # fmt: skip
    assert record.protocol.sizes == {"16x24": 1, "8x8": 2}
    assert record.bits_per_pixel == 3
    assert seen == [1, 2, 3]


def test_lpips_is_named_with_its_weights() -> None:
    torch.manual_seed(0)
    metric = LPIPS("alexnet")
    metric.files = {"some.safetensors": "0123456789abcdef"}
    x = pictures(2, 32, 32)
    record = evaluate_reconstruction(grey_levels(8), [batch(x)], lpips={"alexnet": metric}, pixels="float")
    x_hat = ((x + 1) / 2 * 7).round() / 7 * 2 - 1
    assert record.lpips == {"alexnet": pytest.approx(metric(x, x_hat).mean().item(), rel=1e-5)}
    assert record.protocol.lpips_files == metric.files
    assert "01234567" in record.protocol_line


def test_mode_is_restored() -> None:
    for mode in (True, False):
        tokenizer = grey_levels().train(mode)
        evaluate_reconstruction(tokenizer, [batch(pictures(1))])
        assert tokenizer.training is mode


def test_json_is_strict_complete_and_atomic(tmp_path: Path) -> None:
    data = {"name": "folder", "split": "test", "crop_px": 16, "resize_px": None}
    record = evaluate_reconstruction(grey_levels(8), [batch(pictures(2))], data=data)
    file = tmp_path / "new" / "evaluation.json"
    record.write(file)
    assert [path.name for path in file.parent.iterdir()] == ["evaluation.json"]
    stored = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert stored == record.to_dict()
    assert stored["psnr"] == record.psnr
    assert stored["protocol"]["pixels"] == "uint8"
    assert stored["protocol"]["data"] == data
    assert "rounded to 8 bits" in stored["protocol"]["meaning"]["pixels"]
    assert "codes" not in stored
    assert record.protocol_line.startswith("2 images of 16x16 px; 8-bit pixels;")
    assert "crop_px 16" in record.protocol_line
    assert "resize_px" not in record.protocol_line


def test_table_shows_numbers_and_protocol() -> None:
    record: ReconstructionRecord = evaluate_reconstruction(grey_levels(), [batch(pictures(2))])
    console = Console(width=120)
    with console.capture() as capture:
        record.print(console)
    assert "100.00 dB" in capture.get()
    assert "8-bit pixels" in capture.get()


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown pixels 'int8'; choose one of: uint8, truncated, float"):
        evaluate_reconstruction(grey_levels(), [], pixels="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no picture to evaluate"):
        evaluate_reconstruction(grey_levels(), [batch(torch.empty(0, 3, 8, 8), skipped=1)])
    with pytest.raises(ValueError, match="NaN or infinity for: picture0, picture1"):
        evaluate_reconstruction(grey_levels(error=math.nan), [batch(pictures(2))])
    with pytest.raises(ValueError, match="at least 6 px, got 5x9"):
        evaluate_reconstruction(grey_levels(), [batch(pictures(1, 5, 9))])


def test_importing_is_light_and_a_missing_extra_is_named() -> None:
    program = """
import sys
import tessella.evaluation, tessella.report
assert "matplotlib" not in sys.modules and "torchmetrics" not in sys.modules
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "torchmetrics":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
try:
    tessella.evaluation.reconstruction.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
except ModuleNotFoundError as error:
    assert "pip install 'tessella[eval]'" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
