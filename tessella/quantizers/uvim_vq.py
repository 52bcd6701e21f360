"""The VQ of UViM (arXiv 2205.10337), FSQ's baseline in dense prediction: standardised vectors, codes of unit norm."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from tessella.quantizers.base import Quantized
from tessella.quantizers.ema import EMAVQ, DeadCodes


class UViMVQ(EMAVQ):
    r"""EMA vector quantization of :math:`(z - mean_D z) / std_D z`, with codewords split rather than left unused.

    The codes are means divided by their norm, so the nearest one is that of the largest cosine. There is no commitment
    loss: what the decoder says is the encoder's only guide.

    Args:
        codebook_size: V.
        dim: D, at least 2.
        decay: of the discounted sums.
        dead_codes: ``"split"`` as published; ``"keep"`` is FSQ's ablation, which uses 1 % of the codes.
        dead_threshold: share of the mean count below which a code is dead.

    Raises:
        ValueError: a dimension that cannot be standardised, or see :class:`EMAVQ`.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        decay: float = 0.995,
        dead_codes: DeadCodes = "split",
        dead_threshold: float = 0.01,
    ) -> None:
        super().__init__(
            codebook_size, dim, decay=decay, commitment_weight=0.0, unit_norm=True, dead_codes=dead_codes,
            dead_threshold=dead_threshold,
        )  # fmt: skip
        if dim == 1:
            raise ValueError("dim must be at least 2: a single number cannot be standardised, got 1")

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        return super().quantize(functional.layer_norm(z, (self.dim,)), mask)
