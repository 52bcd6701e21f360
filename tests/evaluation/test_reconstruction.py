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
from tessella.errors import ConfigError
from tessella.evaluation.image import (
    ImageMetrics,
    gaussian_ssim,
    lpips_scores,
    picture_scores,
    psnr,
    to_uint8,
)
from tessella.evaluation.reconstruction import ReconstructionRecord, evaluate_reconstruction
from tessella.losses.perceptual import LPIPS
from tessella.media.image import Image
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
    scores = picture_scores(x, x_hat, pixels="float")
    torch.testing.assert_close(scores["l1"], torch.tensor([0.1, 0.01]))
    torch.testing.assert_close(scores["l2"], torch.tensor([0.01, 0.0001]))
    torch.testing.assert_close(scores["psnr"], torch.tensor([20.0, 40.0]))


def test_eight_bit_rounds_the_reconstruction() -> None:
    x = to_uint8(torch.zeros(1, 3, 8, 8)) / 127.5 - 1
    x_hat = x + 0.8 / 127.5  # nearer to the next level
    assert picture_scores(x, x_hat, pixels="float")["l1"].item() == pytest.approx(0.8 / 255, rel=1e-4)
    assert picture_scores(x, x_hat, pixels="uint8")["l1"].item() == pytest.approx(1 / 255, rel=1e-4)
    assert picture_scores(x, x_hat, pixels="truncated")["l1"].item() == 0
    every = torch.arange(192.0).view(1, 3, 8, 8) / 127.5 - 1
    assert picture_scores(every, every, pixels="truncated")["l1"].item() == 0


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
    np.testing.assert_allclose(gaussian_ssim(x, x_hat).numpy(), expected, atol=2e-5)


def test_ssim_is_torchmetrics_to_the_last_bit() -> None:
    library = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    for shape in ((40, 3, 32, 32), (2, 4, 17, 33), (3, 1, 28, 28)):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        x_hat = (x + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
        expected = library(x_hat, x, gaussian_kernel=True, sigma=1.5, data_range=1.0, reduction="none")
        assert torch.equal(gaussian_ssim(x, x_hat), expected)


def test_uniform_ssim_is_scikit_images_default() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x = (pictures(1, 40, 33) / 2 + pictures(1, 40, 33, seed=3) / 4).clamp(-1, 1)
    for scale in (0.02, 0.1, 0.4):
        x_hat = x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        eight_bit = [to_uint8(picture)[0].permute(1, 2, 0).numpy() for picture in (x, x_hat)]
        expected = metrics.structural_similarity(*eight_bit, channel_axis=-1)
        found = picture_scores(x, x_hat, window="uniform")["ssim"].item()
        assert found == pytest.approx(expected, abs=1e-6)
        assert abs(found - picture_scores(x, x_hat)["ssim"].item()) > 1e-5
    with pytest.raises(ValueError, match="at least 7 px, got 6x9"):
        picture_scores(pictures(1, 6, 9), pictures(1, 6, 9), window="uniform")


def test_ibq_protocol_sees_what_its_evaluation_sees() -> None:
    metrics = Image().metrics(protocol="ibq")
    x = pictures(2, 32, 32)
    x_hat = x + 0.7 / 127.5  # cut off, it is gone; LPIPS sees it
    network = LPIPS("alexnet")
    metrics.lpips = {"alexnet": network}  # type: ignore[attr-defined]
    metrics.update(x, x_hat)
    found = metrics.compute()
    assert found["l1"] == pytest.approx(0, abs=1e-9)
    floats = lpips_scores(x, x_hat, {"alexnet": network}, pixels="float")["lpips alexnet"].mean().item()
    assert found["lpips"]["alexnet"] == pytest.approx(floats, rel=1e-5)
    assert metrics.protocol()["ssim_window"] == "uniform"
    assert Image().metrics(protocol="ibq", pixels="uint8").protocol()["pixels"] == "uint8"


def test_signals_that_were_padded_are_taken_one_by_one() -> None:
    whole = pictures(2, 16, 16)
    x = whole.clone()
    x[1, :, 9:], x[1, :, :, 12:] = 0, 0
    padded = batch(x)
    padded["extent"] = torch.tensor([[16, 16], [9, 12]])
    record = evaluate_reconstruction(grey_levels(4), [padded], ImageMetrics())
    alone = evaluate_reconstruction(grey_levels(4), [batch(whole[:1]), batch(whole[1:, :, :9, :12])], ImageMetrics())
    assert record["psnr"] == pytest.approx(alone["psnr"], rel=1e-9)
    assert record.protocol["sizes"] == {"16x16": 1, "9x12": 1}


def test_record_by_hand() -> None:
    x = pictures(5)
    record = evaluate_reconstruction(grey_levels(), [batch(x[:3], skipped=2), batch(x[3:], first=3)], ImageMetrics())
    assert (record["psnr"], record["l1"], record["l2"]) == (pytest.approx(100), 0, 0)
    assert record["ssim"] == pytest.approx(1, abs=1e-5)
    assert record["bits_per_pixel"] == 3 * 8
    assert record["num_skipped"] == 2
    assert record.protocol["num_images"] == 5
    levels = ((x + 1) * 127.5).round().long().permute(1, 0, 2, 3).flatten(1)
    assert record["usage"] == pytest.approx(sum(len(channel.unique()) for channel in levels) / (3 * 256))
    f = [torch.bincount(channel, minlength=256).double() / channel.numel() for channel in levels]
    assert record["perplexity"] == pytest.approx(np.mean([math.exp(torch.special.entr(p).sum()) for p in f]))
    assert record["images_per_sec"] > 0


def test_mean_over_pictures_not_over_batches() -> None:
    x = pictures(5)
    whole = evaluate_reconstruction(grey_levels(4), [batch(x)], ImageMetrics())
    parts = evaluate_reconstruction(grey_levels(4), [batch(x[:4]), batch(x[4:])], ImageMetrics())
    for name in ("psnr", "ssim", "l1", "l2", "usage", "perplexity", "bits_per_pixel"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6), name
    assert whole.protocol == parts.protocol
    expected = picture_scores(x, (((x + 1) / 2 * 3).round() / 3 * 2 - 1))
    assert whole["psnr"] == pytest.approx(expected["psnr"].mean().item(), rel=1e-6)


def test_mixed_sizes_and_progress() -> None:
    seen: list[int] = []
    batches = [batch(pictures(1, 16, 24)), batch(pictures(1, 8, 8)), batch(pictures(1, 8, 8))]
    record = evaluate_reconstruction(
        grey_levels(2), batches, ImageMetrics(), progress=seen.append,
    )  # fmt: skip
    assert record.protocol["sizes"] == {"16x24": 1, "8x8": 2}
    assert record["bits_per_pixel"] == 3
    assert seen == [1, 2, 3]


def test_lpips_is_named_with_its_weights() -> None:
    torch.manual_seed(0)
    metric = LPIPS("alexnet")
    metric.files = {"some.safetensors": "0123456789abcdef"}
    x = pictures(2, 32, 32)
    record = evaluate_reconstruction(grey_levels(8), [batch(x)], ImageMetrics({"alexnet": metric}, pixels="float"))
    x_hat = ((x + 1) / 2 * 7).round() / 7 * 2 - 1
    assert record["lpips"] == {"alexnet": pytest.approx(metric(x, x_hat).mean().item(), rel=1e-5)}
    assert record.protocol["lpips_files"] == metric.files
    assert "01234567" in record.line


def test_mode_is_restored() -> None:
    for mode in (True, False):
        tokenizer = grey_levels().train(mode)
        evaluate_reconstruction(tokenizer, [batch(pictures(1))], ImageMetrics())
        assert tokenizer.training is mode


def test_json_is_strict_complete_and_atomic(tmp_path: Path) -> None:
    data = {"name": "folder", "split": "test", "crop_px": 16, "resize_px": None}
    record = evaluate_reconstruction(grey_levels(8), [batch(pictures(2))], ImageMetrics(), data=data)
    file = tmp_path / "new" / "evaluation.json"
    record.write(file)
    assert [path.name for path in file.parent.iterdir()] == ["evaluation.json"]
    stored = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert stored == record.to_dict()
    assert stored["psnr"] == record["psnr"]
    assert stored["protocol"]["pixels"] == "uint8"
    assert stored["protocol"]["data"] == data
    assert "rounded to 8 bits" in stored["protocol"]["meaning"]["pixels"]
    assert "codes" not in stored
    assert record.line.startswith("2 images of 16x16; 8-bit pixels; SSIM 11x11 Gaussian;")
    assert "crop_px 16" in record.line
    assert "resize_px" not in record.line


def test_table_shows_numbers_and_protocol() -> None:
    record: ReconstructionRecord = evaluate_reconstruction(grey_levels(), [batch(pictures(2))], ImageMetrics())
    console = Console(width=120)
    with console.capture() as capture:
        record.print(console)
    assert "100.00 dB" in capture.get()
    assert "8-bit pixels" in capture.get()


def test_errors() -> None:
    with pytest.raises(ConfigError, match="unknown pixels 'int8'; choose one of: uint8, truncated, float"):
        ImageMetrics(pixels="int8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown option 'pixel' of the metrics of pictures; accepted: pixels, "):
        Image().metrics(pixel="float")
    with pytest.raises(ValueError, match="held nothing to evaluate"):
        evaluate_reconstruction(grey_levels(), [batch(torch.empty(0, 3, 8, 8), skipped=1)], ImageMetrics())
    with pytest.raises(ValueError, match="NaN or infinity for: picture0, picture1"):
        evaluate_reconstruction(grey_levels(error=math.nan), [batch(pictures(2))], ImageMetrics())
    with pytest.raises(ValueError, match="at least 6 px, got 5x9"):
        evaluate_reconstruction(grey_levels(), [batch(pictures(1, 5, 9))], ImageMetrics())


def test_importing_is_light_and_a_missing_extra_is_named() -> None:
    program = """
import sys
import tessella.evaluation, tessella.reporting
assert "matplotlib" not in sys.modules and "torchmetrics" not in sys.modules
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "torchmetrics":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
try:
    tessella.evaluation.image.gaussian_ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
except ModuleNotFoundError as error:
    assert "pip install 'tessella[eval]'" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
