"""Tensors to 8-bit pictures: grids, error maps and token maps. Pictures here are arrays ``[H, W, 3]`` of uint8."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tessella.evaluation.image import to_uint8
from tessella.storage import write_bytes

Array = NDArray[np.uint8]

_MAX_TABLE = 1 << 26  # numbers in a codebook up to which colours are taken from it: half a GiB in double precision


def to_pictures(x: Tensor) -> list[Array]:
    """Pictures of ``x [B, 3, H, W]`` (or ``[B, 1, H, W]``) in [-1, 1].

    Raises:
        ValueError: another shape.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"pictures must be [B, 3, H, W] or [B, 1, H, W], got {list(x.shape)}")
    rgb = to_uint8(x.detach().float().cpu()).expand(-1, 3, -1, -1)
    return list(rgb.permute(0, 2, 3, 1).contiguous().numpy())


def error_maps(x: Tensor, x_hat: Tensor, *, gain: float) -> list[Array]:
    """``gain * |x - x_hat|`` per channel, as pictures: black is exact, white is 1/gain of the range or more."""
    error = (x.detach().float() - x_hat.detach().float().clamp(-1, 1)).abs()
    return to_pictures((gain * error - 1).clamp(max=1))


def grid(pictures: Sequence[Array], *, columns: int, gap: int = 2, background: int = 255) -> Array:
    """Pictures of any sizes in rows of ``columns``, each in a cell of the largest one's size."""
    if not pictures:
        raise ValueError("pictures is empty; a grid needs at least one")
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    rows = math.ceil(len(pictures) / columns)
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    canvas = np.full(size, background, np.uint8)
    for position, picture in enumerate(pictures):
        top, left = (position // columns) * (height + gap), (position % columns) * (width + gap)
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def png(picture: Array) -> bytes:
    """The PNG file of a picture."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def save_image_grid(x: Tensor, path: str | Path, *, columns: int | None = None) -> None:
    """Write ``x [B, 3, H, W]`` in [-1, 1] as one PNG, pixel for pixel; the file appears complete or not at all.

    Args:
        x: pictures, row by row.
        path: ends in ``.png``.
        columns: pictures in a row; the square root of B by default.

    Raises:
        ValueError: no picture, another shape, or another file type.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png (lossless), got {path}")
    pictures = to_pictures(x)
    write_bytes(path, png(grid(pictures, columns=columns or math.ceil(math.sqrt(len(pictures))))))


# --- tokens -----------------------------------------------------------------------------------------------------------


def token_maps(indices: Tensor, codebook: Tensor | None) -> list[Array]:
    """A picture of the tokens of each of ``indices [B, h, w, K]`` or ``[B, n, K]``: a pixel a token, a tile a codebook.

    Args:
        indices: int64 in [0, V).
        codebook: ``[V, D]``, shared by the K codebooks, or one for each, ``[K, V, D]``; then similar codes get similar
            colours (:func:`similarity_colours`). Without it, or where it holds more than 2^26 numbers, different
            indices get clearly different colours (:func:`distinct_colours`).

    Raises:
        ValueError: indices or codebook of another shape, or an index outside the codebook.
    """
    if indices.ndim == 3:  # tokens in a row
        indices = indices[:, None]
    if indices.ndim != 4:
        raise ValueError(f"indices must be [B, h, w, K] or [B, n, K], got {list(indices.shape)}")
    layers = indices.cpu().unbind(-1)
    if codebook is None or codebook.numel() > _MAX_TABLE:
        colours = [distinct_colours(layer) for layer in layers]
    else:
        tables = colour_tables(codebook.detach().cpu(), len(layers))
        if indices.numel() and not (indices.min() >= 0 and indices.max() < len(tables[0])):
            raise ValueError(f"indices must lie in [0, {len(tables[0])}), got {indices.min()} to {indices.max()}")
        colours = [table[layer] for table, layer in zip(tables, layers, strict=True)]
    tiles = torch.stack(colours, 1).numpy()  # [B, K, h, w, 3]
    return [grid(list(picture), columns=math.ceil(math.sqrt(len(layers))), gap=1) for picture in tiles]


def colour_tables(codebook: Tensor, num_codebooks: int) -> list[Tensor]:
    """For each codebook the colours ``[V, 3]`` of its codes, see :func:`token_maps`.

    Raises:
        ValueError: a codebook of another shape.
    """
    if codebook.ndim == 2:
        return [similarity_colours(codebook)] * num_codebooks
    if codebook.ndim == 3 and len(codebook) == num_codebooks:
        return [similarity_colours(table) for table in codebook]
    raise ValueError(f"codebook must be [V, D] or [{num_codebooks}, V, D], got {list(codebook.shape)}")


def similarity_colours(codebook: Tensor) -> Tensor:
    """Colours ``[V, 3]`` (uint8) in which near codes of ``codebook [V, D]`` look alike.

    The three directions in which the codes vary most become lightness and the two colour axes of Oklab, a space in
    which distance is perceived difference. Along each, codes are spread evenly by rank, so that no colour is wasted on
    outliers. A function of the codebook alone: a code keeps its colour in every picture.
    """
    level = _ranks(principal_components(codebook, 3))
    lightness = 0.30 + 0.62 * level[:, 0]
    ab = 2 * level[:, 1:] - 1
    # From grey at the centre to the strongest displayable colour at the border: clamping would merge codes.
    strength = ab.abs().amax(1)
    direction = ab / ab.norm(dim=1, keepdim=True).clamp(min=1e-9)
    chroma = 0.98 * strength * _largest_chroma(lightness, direction)
    return oklab_to_rgb(torch.cat([lightness[:, None], chroma[:, None] * direction], 1))


def _largest_chroma(lightness: Tensor, direction: Tensor) -> Tensor:
    """The chroma ``[V]`` at which Oklab colours of ``lightness [V]`` and ``direction [V, 2]`` leave sRGB."""
    low, high = torch.zeros_like(lightness), torch.full_like(lightness, 0.35)
    for _ in range(10):
        middle = (low + high) / 2
        linear = _linear_rgb(torch.cat([lightness[:, None], middle[:, None] * direction], 1))
        inside = ((linear >= 0) & (linear <= 1)).all(1)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return low


def distinct_colours(indices: Tensor) -> Tensor:
    """Colours ``[..., 3]`` (uint8) of ``indices [...]``: the golden angle keeps hues of neighbours far apart."""
    hue = 2 * math.pi * ((indices.double() * 0.6180339887498949) % 1)
    lightness = 0.45 + 0.4 * ((indices.double() * 0.7548776662466927) % 1)
    return oklab_to_rgb(torch.stack([lightness, 0.15 * hue.cos(), 0.15 * hue.sin()], -1).float())


def principal_components(codes: Tensor, count: int) -> Tensor:
    """Projections ``[V, count]`` of ``codes [V, D]`` on the directions of largest variance; 0 where D is too small.

    A direction's sign is fixed by its largest entry, so the result does not depend on the machine.
    """
    centred = codes.double() - codes.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    projected = centred @ (directions * largest.sign())
    return torch.nn.functional.pad(projected, (0, count - projected.shape[1]))


def _ranks(x: Tensor) -> Tensor:
    """Each column's values as evenly spaced ranks in [0, 1]; equal values share one, a constant column gets 1/2."""
    columns = []
    for column in x.unbind(1):
        scale = column.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
        distinct, rank = (column / scale * 1e6).round().unique(return_inverse=True)
        columns.append(rank / (len(distinct) - 1) if len(distinct) > 1 else torch.full_like(column, 0.5))
    return torch.stack(columns, 1).float()


def oklab_to_rgb(lab: Tensor) -> Tensor:
    """sRGB ``[..., 3]`` (uint8) of Oklab ``[..., 3]``; colours outside the gamut are clamped (Ottosson 2020)."""
    linear = _linear_rgb(lab).clamp(0, 1)
    srgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.pow(1 / 2.4) - 0.055)
    return (255 * srgb).round().to(torch.uint8)


def _linear_rgb(lab: Tensor) -> Tensor:
    to_lms = lab.new_tensor(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_linear = lab.new_tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    return (lab @ to_lms.T).pow(3) @ to_linear.T
