"""One picture in several versions, side by side: what a comparison of tokenizers shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tessella.evaluation.image import picture_scores
from tessella.reporting.page import Card, Gallery, Section, Tile
from tessella.reporting.pictures import to_pictures

_WINDOW_PX = 288


def versions_section(x: Sequence[Tensor], versions: Mapping[str, Sequence[Tensor]], keys: Sequence[str]) -> Section:
    """A row a picture: the original, and what is left of it in each version.

    Args:
        x: originals ``[3, H, W]`` in [-1, 1], of any sizes.
        versions: name -> pictures of the same sizes.
        keys: the originals' names.
    """
    cards = []
    for place, original in enumerate(x):
        (behind,) = to_pictures(_window(original)[None])
        tiles = [Tile("original", behind)]
        for name, pictures in versions.items():
            decibel = picture_scores(original[None], pictures[place][None])["psnr"].item()
            (picture,) = to_pictures(_window(pictures[place])[None])
            tiles.append(Tile(f"{name} {decibel:.1f} dB", picture, behind=behind))
        cards.append(Card(tiles, title=keys[place]))
    cut = f" Of larger pictures the middle {_WINDOW_PX} px are shown, pixel for pixel."
    larger = max((max(original.shape[1:]) for original in x), default=0) > _WINDOW_PX
    text = (
        "A row is one picture: the original, and what is left of it. Point at a version, or tap it, to see the "
        f"original in its place; the decibels are of the whole picture.{cut if larger else ''}"
    )
    return Section("Pictures", text, [Gallery(cards)])


def _window(x: Tensor) -> Tensor:
    """The middle of a picture, no larger than is shown pixel for pixel."""
    height, width = (min(size, _WINDOW_PX) for size in x.shape[1:])
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]
