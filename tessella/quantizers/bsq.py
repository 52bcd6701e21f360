"""Binary spherical quantization (Zhao et al., arXiv 2406.07548): lookup-free quantization on the unit sphere."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from tessella.quantizers.base import Quantized, Quantizer
from tessella.quantizers.lfq import LFQ, number_of_bits


class BSQ(LFQ):
    r"""The direction of z, each entry rounded to its sign: codes are the corners of a cube in the unit sphere.

    .. math:: u = z / |z|, \quad \hat u = sign(u) / \sqrt D, \quad L = w_c\,mean|u - sg(\hat u)|^2 + w_h (S - A)

    Bit i of the index is [u_i > 0], the first channel the lowest bit. The decoder's gradient goes straight through the
    sign to u, and so reaches only the part of z across its direction. However far z lies out, the error is bounded:
    :math:`|u - \hat u| \le \sqrt{2 - 2/\sqrt D}`.

    S and A are the entropies of :class:`LFQ` with u for z and :math:`1 / \sqrt D` for its scale, in which bit i has the
    probability :math:`\sigma(4 u_i / (\sqrt D\,temperature))`. The paper takes A from each bit by itself, an upper
    bound of the joint entropy and the default here; larger groups bound it more closely, and see what single bits
    cannot, codes that collapse to two opposite ones.

    Args:
        codebook_size: V = 2^D; give it, or ``dim``, or both.
        dim: D.
        commitment_weight: w_c; 0 in the published image tokenizers.
        entropy_weight: w_h; 0.1 there.
        entropy_temperature: of the softmax over codes; 1 in the authors' code.
        entropy_group_bits: 1 to 12; see above.
    """

    def __init__(
        self,
        codebook_size: int | None = None,
        dim: int | None = None,
        *,
        commitment_weight: float = 0.0,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 1.0,
        entropy_group_bits: int = 1,
    ) -> None:
        dim = number_of_bits(codebook_size, dim)
        super().__init__(
            dim=dim,
            scale=dim**-0.5,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            entropy_group_bits=entropy_group_bits,
        )

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        return super().quantize(functional.normalize(z, dim=-1), mask)

    def residual_stage(self, stage: int) -> Quantizer:
        """See :meth:`Quantizer.residual_stage`."""
        raise ValueError("BSQ drops the length of z, which a residual stack has to refine; use LFQ")
