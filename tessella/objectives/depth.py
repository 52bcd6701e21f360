"""What depth is learned by: the cross-entropy of its bins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from tessella.data.base import Batch
from tessella.labels.depth import NO_DEPTH
from tessella.labels.planes import plane_classes, plane_cross_entropy
from tessella.objectives.base import Objective, StepOutput
from tessella.tokenizer import Reconstruction


class Depth(Objective):
    r"""Cross-entropy of the bin of each pixel (UViM, arXiv 2205.10337); pixels in bin 0 cost nothing.

    .. math:: L = -\frac{1}{H W} \sum_{i: k_i > 0} ln \, softmax(\hat x_i)_{k_i}

    The mean is over all pixels, those without a depth too.
    """

    headline: ClassVar[Mapping[str, str]] = {"right_bins": ""}

    def forward(self, batch: Batch, out: Reconstruction, last_layer: nn.Parameter) -> StepOutput:
        """See the class; ``x [B, 1, H, W]`` counts bins, ``x_hat [B, num_bins, H, W]`` are logits."""
        logits = out.x_hat
        classes = plane_classes(batch["x"][:, 0], logits.shape[1])
        loss = plane_cross_entropy(logits, classes, ignored=NO_DEPTH).mean()
        known = classes > NO_DEPTH
        right = ((logits.detach().argmax(1) == classes) & known).sum() / known.sum().clamp(min=1)
        return StepOutput({"tokenizer": loss}, {"cross_entropy": loss.detach(), "right_bins": right})
