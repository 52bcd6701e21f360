"""Reconstruction quality over a data set, together with the protocol that makes the numbers comparable."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from tessella.checkpoint import write_text
from tessella.evaluation.codebook import CodeCounter
from tessella.extras import require

if TYPE_CHECKING:
    from rich.console import Console

    from tessella.data.base import Batch
    from tessella.losses.perceptual import LPIPS
    from tessella.tokenizer import Tokenizer

Pixels = Literal["uint8", "truncated", "float"]

_ROUNDING: dict[Pixels, str] = {
    "uint8": "x_hat clamped to [-1, 1] and rounded to 8 bits before every metric",
    "truncated": "x_hat clamped to [-1, 1] and cut off to 8 bits before every metric, as in IBQ's evaluation",
    "float": "x_hat clamped to [-1, 1], not rounded",
}
_MSE_FLOOR = 1e-10  # 100 dB: one exact picture must not make the mean of a set infinite
_SSIM_MIN_PX = 6  # the window's reflection padding takes 5


@dataclass(frozen=True)
class Protocol:
    """How the numbers of a :class:`ReconstructionRecord` were measured; two records compare only if this agrees.

    Attributes:
        pixels: ``"uint8"``, ``"truncated"`` or ``"float"``: what the metrics saw.
        num_images: pictures measured.
        sizes: how many pictures of each size, ``{"64x64": 1000}`` (height x width in px).
        lpips_files: weights file -> first 16 hexadecimal digits of its SHA-256.
        data: the data section of the recipe, or whatever says which pictures these were.
    """

    pixels: Pixels
    num_images: int
    sizes: dict[str, int]
    lpips_files: dict[str, str]
    data: dict[str, Any]

    def describe(self) -> dict[str, str]:
        """What each number means, in words, by the name of the number."""
        return {
            "pixels": _ROUNDING[self.pixels],
            "path": "encode to indices, decode from indices, in eval mode; sides padded to the stride, then cropped",
            "num_images": "pictures measured",
            "num_skipped": "pictures that could not be read",
            "psnr": "10 log10(1 / MSE) of each picture in [0, 1], at most 100 dB; then the mean",
            "ssim": "RGB in [0, 1], Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, reflected borders; mean",
            "lpips": "version 0.1 on pictures in [-1, 1], their own size; mean",
            "l1": "mean |x - x_hat| of pictures in [0, 1]",
            "l2": "mean (x - x_hat)^2 of pictures in [0, 1]",
            "usage": "share of the codes that occur anywhere in the set; mean over codebooks",
            "perplexity": "exp of the entropy of the code frequencies of the whole set; mean over codebooks",
            "bits_per_pixel": "K log2(V) bits at each latent position, without entropy coding",
            "images_per_sec": "encode and decode only; the first batch (warm-up) is left out if there are more",
        }


@dataclass(frozen=True)
class ReconstructionRecord:
    """The result of :func:`evaluate_reconstruction`.

    Attributes:
        psnr: dB, the mean of the pictures' PSNR.
        ssim: the mean of the pictures' SSIM.
        lpips: network name -> mean LPIPS.
        l1: mean absolute error on [0, 1].
        l2: mean squared error on [0, 1].
        usage: fraction of the codes used by the whole set.
        perplexity: of the whole set.
        bits_per_pixel: length of the tokens as fixed-length codes, over the pictures' pixels.
        images_per_sec: encode plus decode.
        seconds: wall-clock time of the evaluation.
        num_skipped: pictures that could not be read.
        protocol: how it was measured.
        codes: the counts behind usage and perplexity; not part of the JSON.
    """

    psnr: float
    ssim: float
    lpips: dict[str, float]
    l1: float
    l2: float
    usage: float
    perplexity: float
    bits_per_pixel: float
    images_per_sec: float
    seconds: float
    num_skipped: int
    protocol: Protocol
    codes: CodeCounter = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dictionaries: what the JSON holds."""
        plain = {name: value for name, value in vars(self).items() if name not in ("codes", "protocol")}
        return {**plain, "protocol": {**asdict(self.protocol), "meaning": self.protocol.describe()}}

    def to_json(self) -> str:
        """Strict JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def write(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file that appears complete or not at all."""
        write_text(Path(path), self.to_json() + "\n")

    @property
    def protocol_line(self) -> str:
        """The protocol in one line, to stand beside the numbers wherever they are quoted."""
        return protocol_line(self.to_dict())

    def print(self, console: Console) -> None:
        """Show the numbers as a table, with the protocol below."""
        from rich.table import Table

        table = Table("metric", "value")
        for number in readable(self.to_dict()):
            table.add_row(number.label, number.value)
        console.print(table)
        console.print(self.protocol_line, style="dim", markup=False, highlight=False)


class Number(NamedTuple):
    """One result for people: a label, the value with its unit, and what it means."""

    key: str
    label: str
    value: str
    meaning: str


def readable(record: Mapping[str, Any]) -> list[Number]:
    """The numbers of ``ReconstructionRecord.to_dict()`` for people."""
    meaning = record["protocol"]["meaning"]
    rows = [
        ("psnr", "PSNR", f"{record['psnr']:.2f} dB"),
        ("ssim", "SSIM", f"{record['ssim']:.4f}"),
        *(("lpips", f"LPIPS ({network})", f"{value:.4f}") for network, value in record["lpips"].items()),
        ("l1", "L1", f"{record['l1']:.5f}"),
        ("l2", "L2", f"{record['l2']:.6f}"),
        ("usage", "codebook usage", f"{100 * record['usage']:.2f} %"),
        ("perplexity", "perplexity", f"{record['perplexity']:,.1f}"),
        ("bits_per_pixel", "bits per pixel", f"{record['bits_per_pixel']:.4f}"),
        ("images_per_sec", "images per second", f"{record['images_per_sec']:,.1f}"),
        ("num_images", "images", f"{record['protocol']['num_images']:,}"),
        ("num_skipped", "skipped", f"{record['num_skipped']:,}"),
    ]
    return [Number(*row, meaning[row[0]]) for row in rows]


def protocol_line(record: Mapping[str, Any]) -> str:
    """The protocol of ``ReconstructionRecord.to_dict()`` in one line."""
    protocol = record["protocol"]
    sizes = sorted(protocol["sizes"].items(), key=lambda item: -item[1])
    shown = ", ".join(size for size, _ in sizes[:3]) + (f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else "")
    parts = [
        f"{protocol['num_images']:,} images of {shown} px",
        {"uint8": "8-bit pixels", "truncated": "truncated 8-bit pixels", "float": "float pixels"}[protocol["pixels"]],
        "SSIM 11x11 Gaussian",
        *(f"{key} {value}" for key, value in protocol["data"].items() if value is not None),
    ]
    if protocol["lpips_files"]:
        parts.append("LPIPS weights " + ", ".join(digest[:8] for digest in protocol["lpips_files"].values()))
    return "; ".join(parts)


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    *,
    lpips: Mapping[str, LPIPS] | None = None,
    pixels: Pixels = "uint8",
    data: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReconstructionRecord:
    """Encode and decode every picture and compare.

    Args:
        tokenizer: evaluated in eval mode on the device it is on, and left in the mode it was in.
        batches: pictures ``x [B, 3, H, W]`` in [-1, 1]; sizes may differ between batches.
        lpips: metrics by network name; they are moved to the tokenizer's device.
        pixels: ``"uint8"`` rounds the reconstruction to 8 bits as saving it would, ``"truncated"`` cuts the rest off;
            ``"float"`` does neither.
        data: says which pictures these are (JSON values); stored in the protocol.
        progress: called with the number of pictures done, after each batch.

    Raises:
        ValueError: no picture at all, an unknown ``pixels``, NaN in a reconstruction (its key is named), or pictures
            smaller than a metric's window.
        ModuleNotFoundError: torchmetrics is missing.
    """
    if pixels not in _ROUNDING:
        raise ValueError(f"unknown pixels {pixels!r}; choose one of: {', '.join(_ROUNDING)}")
    lpips = dict(lpips or {})
    device = _device_of(tokenizer)
    for metric in lpips.values():
        metric.to(device)
    codes = CodeCounter(tokenizer.quantizer.codebook_size, tokenizer.quantizer.num_codebooks)
    scores: dict[str, list[float]] = {}
    sizes: Counter[str] = Counter()
    timings: list[tuple[int, float]] = []
    num_skipped = num_pixels = 0
    start = time.perf_counter()
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        for batch in batches:
            num_skipped += len(batch["skipped"])
            x = batch["x"].to(device)
            if not len(x):
                continue
            indices, x_hat, seconds = _reconstruct(tokenizer, x)
            _check_finite(x_hat, batch["key"])
            codes.update(indices)
            for name, values in picture_scores(x, x_hat, lpips=lpips, pixels=pixels).items():
                scores.setdefault(name, []).extend(values.tolist())
            timings.append((len(x), seconds))
            sizes[f"{x.shape[2]}x{x.shape[3]}"] += len(x)
            num_pixels += len(x) * x.shape[2] * x.shape[3]
            if progress is not None:
                progress(sizes.total())
    finally:
        tokenizer.train(was_training)
    if not sizes:
        raise ValueError(f"batches held no picture to evaluate ({num_skipped} were skipped as unreadable)")
    mean = {name: math.fsum(values) / len(values) for name, values in scores.items()}
    files = {name: digest for metric in lpips.values() for name, digest in metric.files.items()}
    return ReconstructionRecord(
        psnr=mean["psnr"],
        ssim=mean["ssim"],
        lpips={network: mean[f"lpips {network}"] for network in lpips},
        l1=mean["l1"],
        l2=mean["l2"],
        usage=codes.usage,
        perplexity=codes.perplexity,
        bits_per_pixel=codes.num_positions * codes.num_codebooks * math.log2(codes.codebook_size) / num_pixels,
        images_per_sec=_rate(timings),
        seconds=time.perf_counter() - start,
        num_skipped=num_skipped,
        protocol=Protocol(pixels, sizes.total(), dict(sizes), files, dict(data or {})),
        codes=codes,
    )


@torch.no_grad()
def picture_scores(
    x: Tensor, x_hat: Tensor, *, lpips: Mapping[str, LPIPS], pixels: Pixels = "uint8"
) -> dict[str, Tensor]:
    """Scores ``[B]`` of each picture: ``psnr`` (dB), ``ssim``, ``l1``, ``l2`` and ``lpips <network>``.

    Args:
        x: originals ``[B, C, H, W]`` in [-1, 1].
        x_hat: reconstructions of the same shape; clamped to [-1, 1], and rounded for ``pixels="uint8"``.
        lpips: metrics by network name.
        pixels: see :func:`evaluate_reconstruction`.
    """
    x, x_hat = _as_seen(x, pixels), _as_seen(x_hat, pixels)
    unit, unit_hat = (x + 1) / 2, (x_hat + 1) / 2
    l2 = (unit - unit_hat).square().flatten(1).mean(1)
    return {
        "psnr": psnr(l2),
        "ssim": ssim(unit, unit_hat),
        "l1": (unit - unit_hat).abs().flatten(1).mean(1),
        "l2": l2,
        **{f"lpips {network}": metric(x, x_hat) for network, metric in lpips.items()},
    }


def psnr(mse: Tensor) -> Tensor:
    """``10 log10(1 / MSE)`` in dB, of mean squared errors of pictures in [0, 1]; at most 100 dB."""
    return -10 * mse.clamp(min=_MSE_FLOOR).log10()


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity ``[B]`` of ``x, x_hat [B, C, H, W]`` in [0, 1] (Wang et al. 2004).

    Gaussian window 11x11 of sigma 1.5, K1 = 0.01, K2 = 0.03, reflected borders, mean over pixels and channels.

    Raises:
        ValueError: a side is shorter than 6 px.
        ModuleNotFoundError: torchmetrics is missing.
    """
    if min(x.shape[2:]) < _SSIM_MIN_PX:
        raise ValueError(f"SSIM needs pictures of at least {_SSIM_MIN_PX} px, got {x.shape[2]}x{x.shape[3]}")
    metrics = require("torchmetrics.functional.image", extra="eval")
    values: Tensor = metrics.structural_similarity_index_measure(
        x_hat, x, gaussian_kernel=True, sigma=1.5, k1=0.01, k2=0.03, data_range=1.0, reduction="none"
    )
    return values


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


def _reconstruct(tokenizer: Tokenizer, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Indices, reconstruction and the seconds that both took."""
    _synchronize(x.device)
    start = time.perf_counter()
    indices = tokenizer.encode(x, pad=True)
    x_hat = tokenizer.decode(indices, extent=x.shape[2:])
    _synchronize(x.device)
    return indices, x_hat, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _check_finite(x_hat: Tensor, keys: list[str]) -> None:
    finite = x_hat.isfinite().flatten(1).all(1).tolist()
    broken = [key for key, good in zip(keys, finite, strict=True) if not good]
    if broken:
        raise ValueError(f"the reconstruction holds NaN or infinity for: {', '.join(broken[:5])}")


def _rate(timings: list[tuple[int, float]]) -> float:
    counted = timings[1:] or timings
    return sum(count for count, _ in counted) / sum(seconds for _, seconds in counted)


def _device_of(tokenizer: Tokenizer) -> torch.device:
    first = next(itertools.chain(tokenizer.parameters(), tokenizer.buffers()), None)
    return torch.device("cpu") if first is None else first.device
