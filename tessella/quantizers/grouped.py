"""Product quantization (Jegou et al., 2011): the axis is cut into groups, each with a quantizer of its own."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tessella.quantizers.base import Quantized, Quantizer


class Grouped(Quantizer):
    """G copies of a quantizer side by side on G equal parts of the last axis.

    ``dim`` is G times that of ``quantizer``, ``num_codebooks`` G times its own; the loss is the mean over groups.

    Args:
        quantizer: of the first group; the others are copies with codes of their own.
        num_groups: G.
    """

    def __init__(self, quantizer: Quantizer, num_groups: int) -> None:
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        super().__init__(num_groups * quantizer.dim, quantizer.codebook_size)
        self.num_codebooks = num_groups * quantizer.num_codebooks
        self.is_soft = quantizer.is_soft
        self.groups = nn.ModuleList([quantizer, *(quantizer.fresh_copy() for _ in range(num_groups - 1))])

    def reset_parameters(self) -> None:
        """See :meth:`Quantizer.reset_parameters`."""
        for group in self._quantizers():
            group.reset_parameters()

    @property
    def codebook(self) -> Tensor:
        """``[K, V, D/G]``; the codes of a vector's groups stand side by side (within a group, its own rule holds)."""
        tables = [group.codebook for group in self._quantizers()]
        return torch.cat([table.reshape(-1, *table.shape[-2:]) for table in tables])

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        parts = z.chunk(len(self.groups), dim=-1)
        outs = [group.quantize(part, mask) for group, part in zip(self._quantizers(), parts, strict=True)]
        return Quantized(
            z_q=torch.cat([out.z_q for out in outs], dim=-1),
            indices=torch.cat([out.indices for out in outs], dim=-1),
            loss=torch.stack([out.loss for out in outs]).mean(),
            metrics={name: torch.stack([out.metrics[name] for out in outs]).mean() for name in outs[0].metrics},
        )

    def residual_stage(self, stage: int) -> Quantizer:
        """See :meth:`Quantizer.residual_stage`."""
        raise ValueError("put the residual stack inside the groups, not the groups inside the stack")

    def _lookup(self, indices: Tensor) -> Tensor:
        parts = indices.chunk(len(self.groups), dim=-1)
        return torch.cat([group._lookup(part) for group, part in zip(self._quantizers(), parts, strict=True)], dim=-1)

    def _quantizers(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.groups))
