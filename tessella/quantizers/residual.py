"""Residual quantization (SoundStream, arXiv 2107.03312): each codebook refines what the ones before it left over."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tessella.quantizers.base import Quantized, Quantizer, mean_squared, straight_through


class Residual(Quantizer):
    r"""K copies of a quantizer in a row; the code is the sum of theirs.

    .. math:: r_1 = z, \quad r_{k+1} = r_k - sg(e^k), \quad \hat z = \sum_k e^k

    Every stage's loss moves the encoder, since the codes taken off are constants; the loss is the mean over stages. The
    decoder's gradient goes straight through once, from the sum to z (through each stage it would count K times).

    Args:
        quantizer: the first stage; the others are copies with codes of their own.
        num_codebooks: K.

    Raises:
        ValueError: ``quantizer`` cannot refine residuals (soft, bounded, of fixed length, or with a gradient estimator
            of its own); the message says which.
    """

    def __init__(self, quantizer: Quantizer, num_codebooks: int) -> None:
        super().__init__(quantizer.dim, quantizer.codebook_size)
        if num_codebooks < 1:
            raise ValueError(f"num_codebooks must be at least 1, got {num_codebooks}")
        if quantizer.num_codebooks != 1:
            raise ValueError(f"quantizer must give one index per vector, {type(quantizer).__name__} gives "
                             f"{quantizer.num_codebooks}; for several groups put the residual inside")  # fmt: skip
        self.num_codebooks = num_codebooks
        self.stages = nn.ModuleList(quantizer.residual_stage(stage) for stage in range(num_codebooks))

    def reset_parameters(self) -> None:
        """See :meth:`Quantizer.reset_parameters`."""
        for stage in self._quantizers():
            stage.reset_parameters()

    @property
    def codebook(self) -> Tensor:
        """``[K, V, D]``; the code of ``indices [K]`` is ``sum_k codebook[k, indices[k]]``."""
        return torch.stack([stage.codebook for stage in self._quantizers()])

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        residual, total = z, torch.zeros_like(z)
        indices, losses = [], []
        kept = self._kept(z.device)
        for position, stage in enumerate(self._quantizers()):
            out = stage.quantize(residual, mask)
            code = out.z_q.detach()
            residual = residual - code
            total = total + (code if kept is None else code * kept[position])
            indices.append(out.indices)
            losses.append(out.loss)
        return Quantized(
            z_q=straight_through(z, total),
            indices=torch.cat(indices, dim=-1),
            loss=torch.stack(losses).mean(),
            metrics={"quantization_error": mean_squared(residual.detach(), torch.zeros_like(residual), mask)},
        )

    def _lookup(self, indices: Tensor) -> Tensor:
        first, *rest = self._quantizers()
        total = first._lookup(indices[..., :1])
        # In the order of the forward pass, so that the sums agree to the last bit.
        for k, stage in enumerate(rest[: indices.shape[-1] - 1], start=1):
            total = total + stage._lookup(indices[..., k : k + 1])
        return total

    def _kept(self, device: torch.device) -> Tensor | None:
        """Which of the codes ``[K]`` count towards the sum; None for all."""
        return None

    def _quantizers(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.stages))
