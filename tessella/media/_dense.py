"""What the media of dense prediction share: labels of pictures, shown as pictures that people can read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tessella.data._dense import square_picture
from tessella.data._errors import DataError
from tessella.data.base import to_tensor
from tessella.data.decode import decode_rgb, picture_extensions
from tessella.media.base import Medium
from tessella.reporting.page import Card, Gallery, Section, Tile
from tessella.reporting.pictures import Array, grid, png, to_pictures, token_maps
from tessella.storage import write_bytes

_MARGIN = 6
_TEXT_PX = 14

# The longest side of a picture for people: what is larger is shrunk, what is much smaller enlarged.
_SHOWN_PX = 512


class Seen(NamedTuple):
    """A picture as a model sees it, ``context [3, size_px, size_px]``, and the size it has itself."""

    context: Tensor
    height: int
    width: int


class DenseMedium(Medium, ABC):
    """Labels with a value for every pixel of a picture.

    A signal is a label's planes ``[P, H, W]``, as data gives them, or a model's outputs ``[C, H, W]``, with one channel
    for each class of a plane (:mod:`tessella.labels.planes`); every method takes both.
    """

    unit: ClassVar[str] = "images"

    @property
    def suffix(self) -> str:
        """``.png``."""
        return ".png"

    def units(self, x: Tensor) -> float:
        """Pictures."""
        return len(x)

    def context(self, picture: Tensor) -> Tensor:
        """What a model sees of ``picture [3, H, W]``: all of it, unless overridden."""
        return picture

    def find(self, paths: Sequence[Path]) -> list[Path]:
        """The picture files among ``paths`` and in those that are folders.

        Raises:
            DataError: nothing at a path, or no picture in a folder.
        """
        found: list[Path] = []
        for path in paths:
            if path.is_dir():
                inside = sorted(one for one in path.iterdir() if one.suffix.lower() in picture_extensions())
                if not inside:
                    raise DataError(f"no picture in {path}")
                found += inside
            elif path.is_file():
                found.append(path)
            else:
                raise DataError(f"no file {path}")
        return found

    def look(self, path: Path, size_px: int) -> Seen:
        """What a model of ``size_px`` sees of a picture file.

        Raises:
            DataError: it is no picture.
        """
        image = decode_rgb(path, str(path))
        return Seen(self.context(to_tensor(square_picture(image, size_px))), image.height, image.width)

    def write_shown(self, x: Tensor, path: Path) -> None:
        """Write a label or output ``[C, H, W]`` for people: :meth:`annotated`, at a size that can be read."""
        height, width = _shown_size(*x.shape[-2:])
        write_bytes(path, png(self.annotated(self.resized(x, height, width))))

    @abstractmethod
    def pictures(self, x: Tensor) -> list[Array]:
        """Labels or outputs ``[B, C, H, W]`` as pictures, pixel for pixel."""

    @abstractmethod
    def annotated(self, x: Tensor) -> Array:
        """One label or output ``[C, H, W]`` as a picture with what it takes to read it: a scale, a legend."""

    @abstractmethod
    def resized(self, x: Tensor, height: int, width: int) -> Tensor:
        """A label or output ``[C, H, W]`` as a label ``[P, height, width]``."""

    def show(self, x: Tensor, x_hat: Tensor, indices: Tensor, codebook: Tensor | None, keys: Sequence[str]) -> Section:
        """Labels, what the oracle makes of them, and its code."""
        return self._section(
            "Oracle",
            f"Each label, what its {indices[0].numel()} guiding codes leave of it, and the codes. The oracle sees the "
            "label: this is the most that a model of the codes can reach.",
            {"truth": self.pictures(x), "oracle": self.pictures(x_hat), "code": token_maps(indices, codebook)},
            keys,
        )

    def show_with_context(
        self, x: Tensor, x_hat: Tensor, context: Tensor, indices: Tensor, codebook: Tensor | None, keys: Sequence[str]
    ) -> Section:
        """The same with the pictures ``context [B, 3, H, W]`` before them."""
        return self._section(
            "Oracle",
            f"Each picture, its label, what the picture and the {indices[0].numel()} guiding codes make of it, and the "
            "codes. The oracle sees the label: this is the most that a model of the codes can reach.",
            {"picture": to_pictures(context), "truth": self.pictures(x), "oracle": self.pictures(x_hat),
             "code": token_maps(indices, codebook)},
            keys,
        )  # fmt: skip

    def show_predictions(
        self, context: Tensor, x: Tensor, oracle: Tensor, predicted: Tensor, keys: Sequence[str], settings: str
    ) -> Section:
        """Pictures, labels, the oracle's outputs and those of generated codes.

        Args:
            context: ``[B, 3, H, W]``.
            x: the labels.
            oracle: outputs from codes of the labels.
            predicted: outputs from codes that a generator read off the pictures.
            keys: the pictures' names.
            settings: how the codes were drawn.
        """
        return self._section(
            "Predictions",
            "Each picture, its label, what the oracle's code (which has seen the label) makes of it, and the "
            f"prediction, from the picture alone. Codes were drawn with {settings}",
            {"picture": to_pictures(context), "truth": self.pictures(x), "oracle": self.pictures(oracle),
             "prediction": self.pictures(predicted)},
            keys,
        )  # fmt: skip

    def show_samples(self, real: Mapping[str, Tensor], generated: Mapping[str, Tensor], settings: str) -> Section:
        """Labels and generated ones of each class side by side."""
        cards = []
        for name, x in generated.items():
            kinds = {"real": self.pictures(real[name]) if name in real else [], "generated": self.pictures(x)}
            tiles = [Tile(kind, grid(rows, columns=4)) for kind, rows in kinds.items() if rows]
            cards.append(Card(tiles, title=name))
        return Section("Samples", f"Labels, and generated ones. {settings}", [Gallery(cards)])

    def preview(self, rows: Sequence[Tensor], stem: Path) -> Path:
        """A grid of the rows."""
        path = stem.with_name(f"{stem.name}.png")
        pictures = [picture for row in rows for picture in self.pictures(row)]
        write_bytes(path, png(grid(pictures, columns=len(rows[0]))))
        return path

    def _section(self, title: str, text: str, kinds: Mapping[str, list[Array]], keys: Sequence[str]) -> Section:
        cards = []
        for position, row in enumerate(zip(*kinds.values(), strict=True)):
            tiles = [Tile(kind, picture) for kind, picture in zip(kinds, row, strict=True)]
            cards.append(Card(tiles, title=keys[position] if keys else f"picture {position + 1}"))
        grids = {f"{kind}.png": png(grid(pictures, columns=4)) for kind, pictures in kinds.items()}
        return Section(title, text, [Gallery(cards, grids)])


def _shown_size(height: int, width: int) -> tuple[int, int]:
    longest = max(width, height)
    factor = _SHOWN_PX / longest if longest > _SHOWN_PX else max(1, round(_SHOWN_PX / longest / 2))
    return max(1, round(height * factor)), max(1, round(width * factor))


def beside(picture: Array, panel: Array) -> Array:
    """A picture and a panel to its right, on white."""
    height = max(len(picture), len(panel))
    width = picture.shape[1] + _MARGIN + panel.shape[1]
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[: len(picture), : picture.shape[1]] = picture
    canvas[: len(panel), picture.shape[1] + _MARGIN :] = panel
    return canvas


def legend(rows: Sequence[tuple[Array, str]]) -> Array:
    """Swatches of colours ``[3]``, each with its name."""
    font = ImageFont.load_default(_TEXT_PX)
    line = _TEXT_PX + 6
    width = 2 * line + max((int(font.getlength(name)) for _, name in rows), default=0)
    image = Image.new("RGB", (width, max(line * len(rows), 1)), "white")
    draw = ImageDraw.Draw(image)
    for position, (colour, name) in enumerate(rows):
        top = position * line
        draw.rectangle((4, top + 2, 4 + _TEXT_PX, top + 2 + _TEXT_PX), fill=tuple(map(int, colour)))
        draw.text((line + 4, top + 1), name, fill="black", font=font)
    return np.asarray(image)


def scale(colours: Array, height: int, marks: Mapping[float, str]) -> Array:
    """A bar of ``colours [n, 3]`` from top to bottom, with marks at shares of its height."""
    font = ImageFont.load_default(_TEXT_PX)
    bar = colours[np.linspace(0, len(colours) - 1, height).round().astype(int)][:, None].repeat(_TEXT_PX, 1)
    width = _TEXT_PX + 8 + max(int(font.getlength(mark)) for mark in marks.values())
    image = Image.new("RGB", (width, height), "white")
    image.paste(Image.fromarray(np.ascontiguousarray(bar)), (0, 0))
    draw = ImageDraw.Draw(image)
    for share, mark in marks.items():
        top = min(max(share * height - _TEXT_PX / 2, 0), height - _TEXT_PX - 3)
        draw.text((_TEXT_PX + 6, top), mark, fill="black", font=font)
    return np.asarray(image)


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """``[P, height, width]`` of integer planes ``[P, H, W]``, each pixel the nearest."""
    return torch.nn.functional.interpolate(x[None].float(), (height, width), mode="nearest-exact")[0]
