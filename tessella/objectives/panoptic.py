"""What panoptic segments are learned by: the cross-entropies of classes and of instances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.labels.planes import plane_classes, plane_cross_entropy, split_planes
from tessella.objectives.base import Objective, StepOutput
from tessella.tokenizer import Reconstruction


class Panoptic(Objective):
    r"""Cross-entropy of the class plus that of the instance of each pixel (UViM, arXiv 2205.10337).

    .. math:: L = \frac{1}{H W} \sum_i CE(\hat s_i, s_i) + CE(\hat n_i, n_i)

    Void is a class, and instance 0, like any other; pixels of -1 cost nothing. The mean is over all pixels.

    Args:
        num_categories: the plane of classes has one more, void.
        num_instances: numbers of the plane of instances, 0 included.

    Raises:
        ValueError: a number out of range.
    """

    headline: ClassVar[Mapping[str, str]] = {"right_classes": "", "right_instances": ""}

    def __init__(self, *, num_categories: int, num_instances: int = 100) -> None:
        super().__init__()
        if num_categories < 1 or num_instances < 2:
            raise ValueError("num_categories must be at least 1 and num_instances at least 2, "
                             f"got {num_categories} and {num_instances}")  # fmt: skip
        self.sizes = (num_categories + 1, num_instances)

    def forward(self, batch: Batch, out: Reconstruction, last_layer: nn.Parameter) -> StepOutput:
        """See the class; ``x [B, 2, H, W]``, ``x_hat [B, num_categories + 1 + num_instances, H, W]``."""
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        names = ("classes", "instances")
        parts = zip(names, split_planes(out.x_hat, self.sizes), batch["x"].unbind(1), strict=True)
        for name, logits, plane in parts:
            classes = plane_classes(plane, logits.shape[1])
            losses.append(plane_cross_entropy(logits, classes).mean())
            known = classes >= 0
            right = (logits.detach().argmax(1) == classes) & known
            metrics |= {f"cross_entropy_{name}": losses[-1].detach(),
                        f"right_{name}": right.sum() / known.sum().clamp(min=1)}  # fmt: skip
        return StepOutput({"tokenizer": losses[0] + losses[1]}, metrics)
