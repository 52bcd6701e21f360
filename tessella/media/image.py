"""Pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from tessella.data._pixels import BitDepth
from tessella.data.base import to_tensor
from tessella.data.decode import decode
from tessella.errors import ConfigError
from tessella.evaluation.base import Metrics
from tessella.evaluation.codecs import available_codecs, coded
from tessella.evaluation.features import FeatureNetwork
from tessella.evaluation.image import ImageMetrics, picture_scores
from tessella.evaluation.protocols import EFFLITE0, find_protocol
from tessella.losses.perceptual import LPIPS, Network
from tessella.media.base import Codec, Coded, Medium
from tessella.reporting.generation import samples_section
from tessella.reporting.page import Card, Gallery, Section, Tile
from tessella.reporting.pictures import Array, error_maps, grid, png, save_image_grid, to_pictures, token_maps
from tessella.reporting.versions import versions_section
from tessella.storage import write_bytes

EFFLITE0_WEIGHTS = "efficientnet_lite0.fp16.safetensors"
ERROR_GAIN = 5.0

_IBQ_METRICS = {"pixels": "truncated", "lpips_pixels": "float", "window": "uniform"}


class Image(Medium):
    """Pictures ``[C, H, W]`` in [-1, 1], in files as PNG, or as .npy ``[H, W, C]`` where PNG has no such pixels.

    Args:
        channels: 1 grey, 3 RGB, 4 RGBA, or any other number; the first three of more than four are shown, and two as
            grey planes.
        bit_depth: of the files it reads and writes.
    """

    unit: ClassVar[str] = "images"

    def __init__(self, *, channels: int = 3, bit_depth: BitDepth = 8) -> None:
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.channels = channels
        self.bit_depth = bit_depth

    @property
    def suffix(self) -> str:
        """``.png``, or ``.npy`` for pixels that Pillow writes no PNG of: 16-bit colours, many channels."""
        return ".png" if self.channels in ((1, 3, 4) if self.bit_depth == 8 else (1,)) else ".npy"

    def units(self, x: Tensor) -> float:
        """Pictures."""
        return len(x)

    def read(self, path: Path) -> Tensor:
        """A picture file in any format that data sets read."""
        return self._decoded(path, str(path))

    def write(self, x: Tensor, path: Path) -> None:
        """Clamped to [-1, 1] and rounded to the bit depth."""
        pixels = self._pixels(x)
        write_bytes(path, png(pixels) if self.suffix == ".png" else _npy(pixels))

    def accept(self, signal: Any) -> Tensor:
        """A file's path, a tensor ``[C, H, W]``, a Pillow image, or an array ``[H, W]``, ``[H, W, C]`` or
        ``[C, H, W]`` of uint8 or uint16; channels and depth are converted as those of files are.
        """
        if isinstance(signal, PIL.Image.Image):
            stream = io.BytesIO()
            (signal.convert("RGB") if signal.mode in ("CMYK", "YCbCr", "LAB", "HSV") else signal).save(stream, "PNG")
            return self._decoded(stream.getvalue(), "the image")
        return self._decoded(_npy(signal), "the array") if isinstance(signal, np.ndarray) else super().accept(signal)

    def present(self, x: Tensor) -> PIL.Image.Image | Array:
        """A Pillow image, or an array ``[H, W, C]`` of pixels that Pillow has none of."""
        pixels = self._pixels(x)
        return PIL.Image.fromarray(pixels) if self.suffix == ".png" else pixels

    def _decoded(self, source: Path | bytes, key: str) -> Tensor:
        return to_tensor(decode(source, key, channels=self.channels, bit_depth=self.bit_depth))

    def _pixels(self, x: Tensor) -> Array:
        """``[H, W, C]``, or ``[H, W]`` of one channel that Pillow takes."""
        largest = 2**self.bit_depth - 1
        levels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * (largest / 2)).round().permute(1, 2, 0).numpy()
        pixels: Array = levels.astype(np.uint8 if self.bit_depth == 8 else np.uint16)
        return pixels[:, :, 0] if self.channels == 1 else pixels

    def metrics(self, *, weights: Path | None = None, **options: Any) -> Metrics:
        """PSNR, SSIM and, with ``weights``, LPIPS.

        Options are ``pixels`` and ``window`` of :class:`ImageMetrics`, and ``protocol``: under ``ibq`` the defaults are
        those of its evaluation, truncated pixels but floats for LPIPS, and scikit-image's SSIM.
        """
        networks = {} if weights is None else {name: LPIPS.from_folder(name, weights) for name in get_args(Network)}
        chosen = dict(_IBQ_METRICS if options.pop("protocol", None) == "ibq" else {}) | options
        accepted = ("pixels", "lpips_pixels", "window")
        for name in chosen:
            if name not in accepted:
                raise ConfigError(
                    f"unknown option {name!r} of the metrics of pictures; accepted: {', '.join(accepted)}"
                )
        return ImageMetrics(networks, **chosen)

    def feature_network(self, protocol: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
        """Inception-v3 or EfficientNet-Lite0, as the protocol says."""
        try:
            chosen = find_protocol(protocol)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        file = weights / EFFLITE0_WEIGHTS if weights and weights.is_dir() and chosen is EFFLITE0 else weights
        if file is None or file.is_dir():
            raise ConfigError(
                f"protocol {protocol!r} needs {chosen.network}'s weights: give their file with --features"
            )
        return FeatureNetwork.from_file(chosen, file, device=device)

    def show(self, x: Tensor, x_hat: Tensor, indices: Tensor, codebook: Tensor | None, keys: Sequence[str]) -> Section:
        """Originals, reconstructions, errors and tokens, each also as a file of its own beside the page.

        Raises:
            ValueError: tensors of different shapes or lengths.
        """
        if x.shape != x_hat.shape:
            raise ValueError(f"x and x_hat must have one shape, got {list(x.shape)} and {list(x_hat.shape)}")
        if len(indices) != len(x):
            raise ValueError(f"indices must hold {len(x)} pictures as x does, got {len(indices)}")
        if keys and len(keys) != len(x):
            raise ValueError(f"keys must name {len(x)} pictures or none, got {len(keys)}")
        x, x_hat = shown(x), shown(x_hat)
        pictures = {
            "original": to_pictures(x),
            "reconstruction": to_pictures(x_hat),
            f"error x {ERROR_GAIN:g}": error_maps(x, x_hat, gain=ERROR_GAIN),
            "tokens": token_maps(indices, codebook),
        }
        names = ("originals", "reconstructions", "errors", "tokens")
        grids = {f"{name}.png": png(grid(kind, columns=4)) for name, kind in zip(names, pictures.values(), strict=True)}
        return Section("Pictures", _explanation(indices), [Gallery(_cards(pictures, x, x_hat, keys), grids)])

    def codecs(self) -> dict[str, Codec]:
        """JPEG, WebP and AVIF of RGB pictures, as far as Pillow was built with them."""
        if self.channels != 3 or self.bit_depth != 8:
            return {}
        return {name.upper(): partial(_coded, name) for name in available_codecs()}

    def show_versions(
        self, x: Sequence[Tensor], versions: Mapping[str, Sequence[Tensor]], keys: Sequence[str]
    ) -> Section:
        """A row a picture, see :func:`tessella.reporting.versions.versions_section`."""
        shown_versions = {name: [shown(one[None])[0] for one in pictures] for name, pictures in versions.items()}
        return versions_section([shown(one[None])[0] for one in x], shown_versions, keys)

    def show_samples(self, real: Mapping[str, Tensor], generated: Mapping[str, Tensor], settings: str) -> Section:
        """A card a class, and all samples in one picture."""
        return samples_section(
            {name: shown(x) for name, x in real.items()}, {name: shown(x) for name, x in generated.items()},
            settings=settings,
        )  # fmt: skip

    def preview(self, rows: Sequence[Tensor], stem: Path) -> Path:
        """A grid of the rows; of one row alone, as near to a square as it comes."""
        path = stem.with_name(f"{stem.name}.png")
        save_image_grid(shown(torch.cat(list(rows))), path, columns=len(rows[0]) if len(rows) > 1 else None)
        return path


def _npy(pixels: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def _coded(codec: str, x: Tensor, budget: float) -> Coded:
    return Coded(*coded(x, codec, budget))


def shown(x: Tensor) -> Tensor:
    """Pictures ``[B, C, H, W]`` as ``[B, 3 or 1, H, W]``: the first three channels, or two planes side by side."""
    if x.shape[1] == 2:
        return torch.cat([x[:, :1], x[:, 1:]], 3)
    return x if x.shape[1] == 1 else x[:, :3]


def _cards(pictures: Mapping[str, list[Array]], x: Tensor, x_hat: Tensor, keys: Sequence[str]) -> list[Card]:
    scores = picture_scores(x, x_hat)
    cards = []
    for position, row in enumerate(zip(*pictures.values(), strict=True)):
        tiles = [
            Tile(label, picture, behind=row[0] if label == "reconstruction" else None)
            for label, picture in zip(pictures, row, strict=True)
        ]
        note = f"{scores['psnr'][position]:.1f} dB · SSIM {scores['ssim'][position]:.3f}"
        cards.append(Card(tiles, title=keys[position] if keys else f"picture {position + 1}", note=note))
    return cards


def _explanation(indices: Tensor) -> str:
    *grid_shape, num_codebooks = indices.shape[1:]
    layers = f", {num_codebooks} tiles for {num_codebooks} codebooks" if num_codebooks > 1 else ""
    return (
        f"Each picture, what is left of it after {math.prod(grid_shape) * num_codebooks:,} tokens, the difference, and "
        f"the tokens. Point at a reconstruction, or tap it, to see the original in its place. The difference is "
        f"|original - reconstruction|, {ERROR_GAIN:g} times amplified: black is exact. The last picture shows the "
        f"{' x '.join(map(str, grid_shape))} tokens{layers}: a code has one colour on the whole page, and where the "
        f"codebook is known, similar codes have similar colours."
    )
