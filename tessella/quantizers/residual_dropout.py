"""Quantizer dropout (SoundStream, arXiv 2107.03312): a residual stack that can be decoded from its first codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.quantizers.residual import Residual


class ResidualDropout(Residual):
    """A residual stack whose decoder, in training, is shown the sum of the first n codes alone, n uniform in 1 .. K.

    One n is drawn for each forward pass. All codebooks learn in every pass, and evaluation shows all of them; but
    ``indices_to_codes`` takes indices ``[..., n]`` of any n up to K, which is the choice of a bit rate.

    Args:
        quantizer, num_codebooks: see :class:`Residual`.
    """

    @property
    def is_soft(self) -> bool:  # type: ignore[override]
        """In training ``z_q`` is the sum of some of the codes that the indices name."""
        return self.training

    def check_indices(self, indices: Tensor) -> None:
        """Raise a clear error unless ``indices`` is ``[..., n]`` with n in 1 .. K, integers inside ``[0, V)``."""
        given = indices.shape[-1] if indices.ndim else 0
        if not 1 <= given < self.num_codebooks:
            super().check_indices(indices)
            return
        missing = indices.new_zeros(*indices.shape[:-1], self.num_codebooks - given)
        super().check_indices(torch.cat([indices, missing], -1))

    def _kept(self, device: torch.device) -> Tensor | None:
        if not self.training:
            return None
        count = torch.randint(1, self.num_codebooks + 1, (), device=device)
        return torch.arange(self.num_codebooks, device=device) < count
