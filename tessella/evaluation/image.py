"""How alike pictures are: PSNR, SSIM and LPIPS, on the pixels that a protocol names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from tessella.data.base import Batch
from tessella.errors import ConfigError
from tessella.evaluation.base import Metrics, Number
from tessella.extras import require

if TYPE_CHECKING:
    from tessella.losses.perceptual import LPIPS

Pixels = Literal["uint8", "truncated", "float"]
Window = Literal["gaussian", "uniform"]

_ROUNDING: dict[Pixels, str] = {
    "uint8": "x_hat clamped to [-1, 1] and rounded to 8 bits before every metric",
    "truncated": "x_hat clamped to [-1, 1] and cut off to 8 bits before every metric, as in IBQ's evaluation",
    "float": "x_hat clamped to [-1, 1], not rounded",
}
_PIXELS_IN_SHORT = {"uint8": "8-bit pixels", "truncated": "truncated 8-bit pixels", "float": "float pixels"}
_WINDOWS: dict[Window, str] = {
    "gaussian": "in [0, 1], Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, reflected borders; mean",
    "uniform": "in [0, 1], uniform window 7x7, sample covariance, K1 0.01, K2 0.03, borders cropped, in float64: "
    "scikit-image's default; mean",
}
_WINDOWS_IN_SHORT = {"gaussian": "SSIM 11x11 Gaussian", "uniform": "SSIM 7x7 uniform"}
_MSE_FLOOR = 1e-10  # 100 dB: one exact picture must not make the mean of a set infinite
_SSIM_PICTURES = 16  # scored at once
_GAUSSIAN_MIN_PX = 6  # the window's reflection padding takes 5
_UNIFORM_PX = 7
_K1, _K2 = 0.01, 0.03


class ImageMetrics(Metrics):
    """Means over pictures of PSNR, SSIM, LPIPS, L1 and L2.

    Args:
        lpips: metrics by network name.
        pixels: ``"uint8"`` rounds the reconstruction to 8 bits as saving it would, ``"truncated"`` cuts the rest off;
            ``"float"`` does neither.
        lpips_pixels: the same for LPIPS; ``pixels`` if None.
        window: of SSIM.

    Raises:
        ConfigError: unknown ``pixels`` or ``window``.
        ModuleNotFoundError: torchmetrics is missing, which has the Gaussian window.
    """

    signals: ClassVar[str] = "images"
    bits_name: ClassVar[str] = "bits_per_pixel"
    headline: ClassVar[frozenset[str]] = frozenset({"psnr", "ssim", "lpips"})

    def __init__(
        self, lpips: Mapping[str, LPIPS] | None = None, *, pixels: Pixels = "uint8",
        lpips_pixels: Pixels | None = None, window: Window = "gaussian",
    ) -> None:  # fmt: skip
        for name, value, choices in (("pixels", pixels, Pixels), ("lpips_pixels", lpips_pixels or pixels, Pixels),
                                     ("window", window, Window)):  # fmt: skip
            if value not in get_args(choices):
                raise ConfigError(f"unknown {name} {value!r}; choose one of: {', '.join(get_args(choices))}")
        self.lpips = dict(lpips or {})
        self.pixels = pixels
        self.lpips_pixels = lpips_pixels or pixels
        self.window = window
        if window == "gaussian":
            _torchmetrics()  # seconds of importing, before anything is timed
        self._scores: dict[str, list[float]] = {}

    def update(self, x: Tensor, x_hat: Tensor, batch: Batch | None = None) -> None:
        """Score pictures ``[B, C, H, W]`` in [-1, 1]."""
        scores = picture_scores(x, x_hat, pixels=self.pixels, window=self.window)
        scores |= lpips_scores(x, x_hat, self.lpips, pixels=self.lpips_pixels)
        for name, values in scores.items():
            self._scores.setdefault(name, []).extend(values.tolist())

    def compute(self) -> dict[str, Any]:
        """The means."""
        mean = {name: math.fsum(values) / len(values) for name, values in self._scores.items()}
        lpips = {network: mean.pop(f"lpips {network}") for network in self.lpips}
        return {"psnr": mean["psnr"], "ssim": mean["ssim"], "lpips": lpips, "l1": mean["l1"], "l2": mean["l2"]}

    def protocol(self) -> dict[str, Any]:
        """Pixels, window and weights."""
        files = {name: digest for metric in self.lpips.values() for name, digest in metric.files.items()}
        return {
            "pixels": self.pixels, "lpips_pixels": self.lpips_pixels, "ssim_window": self.window, "lpips_files": files,
        }  # fmt: skip

    def meanings(self) -> dict[str, str]:
        """See :meth:`Metrics.meanings`."""
        return {
            "pixels": _ROUNDING[self.pixels],
            "lpips_pixels": _ROUNDING[self.lpips_pixels],
            "psnr": "10 log10(1 / MSE) of each picture in [0, 1], at most 100 dB; then the mean",
            "ssim": _WINDOWS[self.window],
            "lpips": "version 0.1 on pictures in [-1, 1], their own size; mean",
            "l1": "mean |x - x_hat| of pictures in [0, 1]",
            "l2": "mean (x - x_hat)^2 of pictures in [0, 1]",
        }

    def readable(self, record: Mapping[str, Any]) -> list[Number]:
        """See :meth:`Metrics.readable`."""
        meaning = record["protocol"]["meaning"]
        rows = [
            ("psnr", "PSNR", f"{record['psnr']:.2f} dB"),
            ("ssim", "SSIM", f"{record['ssim']:.4f}"),
            *(("lpips", f"LPIPS ({network})", f"{value:.4f}") for network, value in record["lpips"].items()),
            ("l1", "L1", f"{record['l1']:.5f}"),
            ("l2", "L2", f"{record['l2']:.6f}"),
        ]
        return [Number(*row, meaning[row[0]]) for row in rows]

    def protocol_parts(self, protocol: Mapping[str, Any]) -> list[str]:
        """See :meth:`Metrics.protocol_parts`."""
        parts = [_PIXELS_IN_SHORT[protocol["pixels"]], _WINDOWS_IN_SHORT[protocol["ssim_window"]]]
        if protocol["lpips_files"]:
            weights = ", ".join(digest[:8] for digest in protocol["lpips_files"].values())
            parts.append(f"LPIPS on {_PIXELS_IN_SHORT[protocol['lpips_pixels']]}, weights {weights}")
        return parts


@torch.no_grad()
def picture_scores(
    x: Tensor, x_hat: Tensor, *, pixels: Pixels = "uint8", window: Window = "gaussian"
) -> dict[str, Tensor]:
    """Scores ``[B]`` of each picture: ``psnr`` (dB), ``ssim``, ``l1`` and ``l2``.

    Args:
        x: originals ``[B, C, H, W]`` in [-1, 1].
        x_hat: reconstructions of the same shape; clamped to [-1, 1], and rounded for ``pixels="uint8"``.
        pixels, window: see :class:`ImageMetrics`.
    """
    unit, unit_hat = ((_as_seen(picture, pixels) + 1) / 2 for picture in (x, x_hat))
    l2 = (unit - unit_hat).square().flatten(1).mean(1)
    return {
        "psnr": psnr(l2),
        "ssim": gaussian_ssim(unit, unit_hat) if window == "gaussian" else uniform_ssim(unit, unit_hat),
        "l1": (unit - unit_hat).abs().flatten(1).mean(1),
        "l2": l2,
    }


@torch.no_grad()
def lpips_scores(
    x: Tensor, x_hat: Tensor, lpips: Mapping[str, LPIPS], *, pixels: Pixels = "uint8"
) -> dict[str, Tensor]:
    """``lpips <network>`` ``[B]`` of pictures ``[B, 3, H, W]`` in [-1, 1], by the metrics of ``lpips``."""
    seen, seen_hat = _as_seen(x, pixels), _as_seen(x_hat, pixels)
    return {f"lpips {network}": metric.to(x.device)(seen, seen_hat) for network, metric in lpips.items()}


def psnr(mse: Tensor) -> Tensor:
    """``10 log10(1 / MSE)`` in dB, of mean squared errors of pictures in [0, 1]; at most 100 dB."""
    return -10 * mse.clamp(min=_MSE_FLOOR).log10()


def gaussian_ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity ``[B]`` of ``x, x_hat [B, C, H, W]`` in [0, 1] (Wang et al. 2004).

    Gaussian window 11x11 of sigma 1.5, K1 = 0.01, K2 = 0.03, reflected borders, mean over pixels and channels.

    Raises:
        ValueError: a side is shorter than 6 px.
        ModuleNotFoundError: torchmetrics is missing.
    """
    if min(x.shape[2:]) < _GAUSSIAN_MIN_PX:
        raise ValueError(f"SSIM needs pictures of at least {_GAUSSIAN_MIN_PX} px, got {x.shape[2]}x{x.shape[3]}")
    metrics = _torchmetrics()
    # All planes of some pictures as the channels of one: the window is then one convolution of many groups in memory
    # that stays near, several times as fast on a CPU as three groups of all, and the same to the last bit.
    means = []
    for some, some_hat in zip(x.split(_SSIM_PICTURES), x_hat.split(_SSIM_PICTURES), strict=True):
        _, values = metrics.structural_similarity_index_measure(
            some_hat.flatten(0, 1)[None], some.flatten(0, 1)[None], gaussian_kernel=True, sigma=1.5, k1=_K1, k2=_K2,
            data_range=1.0, return_full_image=True,
        )  # fmt: skip
        means.append(values.reshape(len(some), -1).mean(1))
    return torch.cat(means)


def _torchmetrics() -> Any:
    return require("torchmetrics.functional.image", extra="eval")


def uniform_ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity ``[B]`` as scikit-image's default computes it, and with it IBQ's and SimVQ's evaluation.

    Uniform window 7x7, covariances over N - 1, K1 = 0.01, K2 = 0.03, the border of 3 px cropped, in float64.

    Raises:
        ValueError: a side is shorter than 7 px.
    """
    if min(x.shape[2:]) < _UNIFORM_PX:
        raise ValueError(f"this SSIM needs pictures of at least {_UNIFORM_PX} px, got {x.shape[2]}x{x.shape[3]}")
    a, b = x.double(), x_hat.double()

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, _UNIFORM_PX, stride=1)

    count = _UNIFORM_PX**2
    sample = count / (count - 1)
    mean_a, mean_b = mean(a), mean(b)
    variance_a = sample * (mean(a * a) - mean_a.square())
    variance_b = sample * (mean(b * b) - mean_b.square())
    covariance = sample * (mean(a * b) - mean_a * mean_b)
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1).float()


def to_uint8(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as 8-bit values: clamped, then rounded to the nearest."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _as_seen(x: Tensor, pixels: Pixels) -> Tensor:
    x = x.float().clamp(-1, 1)
    if pixels == "float":
        return x
    # A thousandth of a level: what was a whole level stays one, through (v / 127.5 - 1 + 1) * 127.5 in float32.
    levels = to_uint8(x).float() if pixels == "uint8" else ((x + 1) * 127.5 + 1e-3).floor()
    return levels / 127.5 - 1
