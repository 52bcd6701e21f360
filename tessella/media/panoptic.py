"""Panoptic segments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessella.data._dense import read_plane
from tessella.data._errors import DataError
from tessella.errors import ConfigError
from tessella.evaluation.base import Metrics
from tessella.evaluation.dense_records import PanopticMetrics
from tessella.labels.panoptic import PanopticPlanes, Segments
from tessella.labels.planes import IGNORED
from tessella.media._dense import DenseMedium, beside, legend, nearest
from tessella.reporting.pictures import Array, oklab_to_rgb, png
from tessella.storage import write_bytes

_NUMBERS_A_CLASS = 1000
_IGNORED_LEVEL = 2**16 - 1


class Panoptic(DenseMedium):
    """Segments ``x [2, H, W]`` (:class:`tessella.labels.panoptic.PanopticPlanes`).

    In files 16-bit PNG of 1000 class + instance, where class is 1 + the category, 0 void and 65535 not to be learned.
    In pictures every category has a hue, its instances differ in lightness, void is black, and segments have dark
    borders.

    Args:
        class_names: of the categories.
        things: names of those that are things.
        num_instances: numbers of the instance plane, 0 included.
        min_share: predicted segments of at most this share of the picture become void.

    Raises:
        ValueError: things that are no categories, or a number out of range.
    """

    def __init__(
        self, *, class_names: Sequence[str], things: Sequence[str], num_instances: int = 100, min_share: float = 1e-3
    ) -> None:
        if unknown := set(things) - set(class_names):
            raise ValueError(f"things {sorted(unknown)} are no class_names; accepted: {', '.join(class_names)}")
        if len(class_names) >= _IGNORED_LEVEL // _NUMBERS_A_CLASS and num_instances > 1:
            # Such tables are rare in street scenes and usual in COCO: files then count instances in steps of less.
            self._step = _IGNORED_LEVEL // (len(class_names) + 2)
        else:
            self._step = _NUMBERS_A_CLASS
        if num_instances > self._step:
            raise ValueError(f"num_instances must be at most {self._step} to fit into files, got {num_instances}")
        self.class_names = tuple(class_names)
        self.things = tuple(things)
        self.codec = PanopticPlanes(len(class_names), num_instances, min_share)

    def segments(self, x: Tensor) -> Segments:
        """The segments of planes ``[2, H, W]`` or of logits.

        Raises:
            ValueError: another number of channels.
        """
        x = x.detach().cpu()
        if len(x) == 2:
            return self.codec.from_planes(x)
        if len(x) != sum(self.codec.sizes):
            raise ValueError(f"segments have 2 channels, or {sum(self.codec.sizes)} of logits, got {len(x)}")
        classes, instances = x.float().split(self.codec.sizes)
        return self.codec.from_logits(classes, instances)

    def planes(self, x: Tensor) -> Tensor:
        """Integer planes ``[2, H, W]`` of planes or logits."""
        segments = self.segments(x)
        classes = segments.ids.clamp(max=0).float()
        for i, category in segments.categories.items():
            classes[segments.ids == i] = category + 1
        return torch.stack([classes, segments.ids.float()])

    def read(self, path: Path) -> Tensor:
        """See the class."""
        levels = read_plane(path, str(path))
        planes = torch.from_numpy(np.stack([levels // self._step, levels % self._step])).float()
        planes[:, torch.from_numpy(levels == _IGNORED_LEVEL)] = IGNORED
        try:
            self.codec.from_planes(planes)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        return planes

    def write(self, x: Tensor, path: Path) -> None:
        """See the class."""
        classes, instances = self.planes(x).long().numpy()
        levels = np.where(classes == IGNORED, _IGNORED_LEVEL, classes * self._step + instances)
        write_bytes(path, png(levels.astype(np.uint16)))

    def metrics(self, *, weights: Path | None = None, **options: Any) -> Metrics:
        """PQ, SQ and RQ of all, things and stuff; there are no options."""
        if rest := {name: value for name, value in options.items() if value is not None}:
            raise ConfigError(f"the metrics of segments have no options, got {', '.join(rest)}")
        things = [number for number, name in enumerate(self.class_names) if name in self.things]
        return PanopticMetrics(self.segments, things, self.codec.min_share)

    def pictures(self, x: Tensor) -> list[Array]:
        """See the class."""
        return [self._picture(one) for one in x]

    def annotated(self, x: Tensor) -> Array:
        """With a legend of the categories that occur."""
        found = sorted(set(self.segments(x).categories.values()))
        rows = [(self._colour(category, 0), self.class_names[category]) for category in found]
        return beside(self._picture(x), legend(rows))

    def resized(self, x: Tensor, height: int, width: int) -> Tensor:
        """See :class:`DenseMedium`."""
        return nearest(self.planes(x), height, width)

    def _picture(self, x: Tensor) -> Array:
        segments = self.segments(x)
        picture = np.zeros((*segments.ids.shape, 3), np.uint8)
        counts: dict[int, int] = {}
        for i, category in segments.categories.items():
            counts[category] = counts.get(category, -1) + 1
            picture[(segments.ids == i).numpy()] = self._colour(category, counts[category])
        ids = segments.ids.numpy()
        border = np.zeros(ids.shape, bool)
        border[1:] |= ids[1:] != ids[:-1]
        border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        picture[border] //= 2
        return picture

    def _colour(self, category: int, number: int) -> Array:
        """Of the segment ``number`` of a category: hues by the golden angle, lightness in five steps."""
        hue = 2 * np.pi * (category * 0.6180339887498949 % 1)
        lightness = 0.75 - 0.09 * (number % 5) if self.class_names[category] in self.things else 0.6
        lab = torch.tensor([lightness, 0.14 * np.cos(hue), 0.14 * np.sin(hue)])
        return oklab_to_rgb(lab).numpy()
