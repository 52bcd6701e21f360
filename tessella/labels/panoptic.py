"""Panoptic segments as a plane of classes and a plane of instances (UViM, arXiv 2205.10337)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tessella.labels.planes import IGNORED

VOID = 0


@dataclass(frozen=True)
class Segments:
    """A segmentation: ``ids [H, W]`` int64 and the category of each id; id 0 is void, -1 is not to be learned.

    Categories count from 0. ``crowds`` holds ids that stand for several objects.
    """

    ids: Tensor
    categories: dict[int, int]
    crowds: frozenset[int] = field(default_factory=frozenset)


def check_segments(ids: Tensor, categories: Mapping[int, int], num_categories: int | None, name: str) -> list[int]:
    """The ids that occur, in ascending order, without void and -1.

    Raises:
        ValueError: not an integer plane, an id without category, or a category outside the table.
    """
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"{name}: ids must be integers [H, W], got {ids.dtype} {list(ids.shape)}")
    found = [int(i) for i in ids.unique().tolist() if i not in (VOID, IGNORED)]
    unknown = [i for i in found if i not in categories]
    if unknown:
        raise ValueError(f"{name}: ids {unknown[:5]} have no category; known are {sorted(categories)[:20]}")
    if num_categories is not None:
        wrong = {i: categories[i] for i in found if not 0 <= categories[i] < num_categories}
        if wrong:
            raise ValueError(f"{name}: categories {sorted(set(wrong.values()))} lie outside [0, {num_categories})")
    return found


@dataclass(frozen=True)
class PanopticPlanes:
    r"""Segments to planes ``x [2, H, W]`` and back.

    Plane 0 is the class, category + 1, plane 1 the number of the instance; both are 0 for void, and -1 where nothing
    is to be learned. Every segment, thing or stuff, is an instance. They are numbered 1..N from top to bottom and
    then from left to right, by :math:`x_c + H y_c` of their centres of mass, in the picture as it is encoded: after its
    crop.

    Where there are more segments than numbers, the largest have one, and the pixels of the others are -1.

    Args:
        num_categories: the plane has one class more, void.
        num_instances: numbers of the plane, 0 included.
        min_share: in decoding logits, segments of at most this share of the picture become void.

    Raises:
        ValueError: a number out of range.
    """

    num_categories: int
    num_instances: int = 100
    min_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.num_categories < 1 or self.num_instances < 2:
            raise ValueError("num_categories must be at least 1 and num_instances at least 2, "
                             f"got {self.num_categories} and {self.num_instances}")  # fmt: skip
        if not 0 <= self.min_share < 1:
            raise ValueError(f"min_share must lie in [0, 1), got {self.min_share}")

    @property
    def sizes(self) -> list[int]:
        """Classes of each plane."""
        return [self.num_categories + 1, self.num_instances]

    def to_planes(self, segments: Segments, name: str = "segments") -> Tensor:
        """``[2, H, W]`` float32.

        Raises:
            ValueError: see :func:`check_segments`.
        """
        found = check_segments(segments.ids, segments.categories, self.num_categories, name)
        masks = {i: segments.ids == i for i in found}
        if len(found) >= self.num_instances:
            by_size = sorted(found, key=lambda i: (-int(masks[i].sum()), i))
            found = by_size[: self.num_instances - 1]
        planes = torch.full((2, *segments.ids.shape), float(IGNORED))
        planes[:, segments.ids == VOID] = VOID
        height = segments.ids.shape[0]
        for number, i in enumerate(sorted(found, key=lambda i: (_place(masks[i], height), i)), 1):
            planes[0, masks[i]] = segments.categories[i] + 1
            planes[1, masks[i]] = number
        return planes

    def from_planes(self, planes: Tensor) -> Segments:
        """The segments of integer planes ``[2, H, W]``; the ids are the instances' numbers.

        Raises:
            ValueError: an instance of two classes, or numbers outside the planes.
        """
        classes, instances = planes.long()
        for plane, size, what in ((classes, self.sizes[0], "class"), (instances, self.sizes[1], "instance")):
            if plane.numel() and (plane.min() < IGNORED or plane.max() >= size):
                low, high = plane.min().item(), plane.max().item()
                raise ValueError(f"{what} plane holds {low} .. {high}, not -1 .. {size - 1}")
        categories = {}
        for number in instances[instances > 0].unique().tolist():
            of_instance = classes[instances == number].unique().tolist()
            if len(of_instance) != 1 or of_instance[0] < 1:
                raise ValueError(f"instance {number} must have one class, got {of_instance}")
            categories[number] = of_instance[0] - 1
        return Segments(instances, categories)

    def from_logits(self, class_logits: Tensor, instance_logits: Tensor) -> Segments:
        """The segments of ``class_logits [num_categories + 1, H, W]`` and ``instance_logits [num_instances, H, W]``.

        A pixel belongs to its likeliest instance, and an instance is of the class whose logits have the largest sum
        over its pixels. Instance 0, class 0 and what is too small are void.
        """
        instances = instance_logits.argmax(0)
        flat = instances.flatten()
        sums = class_logits.new_zeros(self.num_instances, self.sizes[0])
        sums.index_add_(0, flat, class_logits.flatten(1).T)
        classes = sums.argmax(1)
        counts = flat.bincount(minlength=self.num_instances)
        kept = (classes > 0) & (counts > self.min_share * flat.numel())
        kept[0] = False
        categories = {int(i): int(classes[i]) - 1 for i in kept.nonzero()[:, 0]}
        return Segments(instances * kept[instances], categories)


def _place(mask: Tensor, height: int) -> float:
    rows, columns = mask.nonzero().double().mean(0).tolist()
    return float(columns + height * rows)
