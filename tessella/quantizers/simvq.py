"""SimVQ (Zhu et al., arXiv 2411.02038): the codes are one linear map of a frozen random basis."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.quantizers._estimators import Estimator
from tessella.quantizers._nearest import NearestNeighbour
from tessella.quantizers._remembered import Remembered
from tessella.quantizers.base import full_precision


class SimVQ(NearestNeighbour):
    r"""VQ with codes e = C W^T + b: C frozen, W and b learned, so that every step moves every code.

    .. math:: L = w_c |z - sg(e_k)|^2 + w_e |sg(z) - e_k|^2, \quad k = argmin_k |z - e_k|

    The bias lets the codes follow data that are off centre.

    Args:
        codebook_size: V.
        dim: D.
        commitment_weight: w_c.
        codebook_weight: w_e.
        estimator: ``"straight_through"`` or ``"rotation"``.
    """

    basis: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        estimator: Estimator = "straight_through",
    ) -> None:
        super().__init__(
            codebook_size,
            dim,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            estimator=estimator,
        )
        self.register_buffer("basis", torch.empty(codebook_size, dim))
        self.projection = nn.Linear(dim, dim)
        self._projected = Remembered()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Basis N(0, 1/D) per entry; the projection as every ``nn.Linear``."""
        nn.init.normal_(self.basis, std=self.dim**-0.5)
        self.projection.reset_parameters()

    @property
    def codebook(self) -> Tensor:
        """``[V, D]``, the projected basis, computed in float32 at least, under autocast too."""
        weight, bias = self.projection.weight, self.projection.bias
        with torch.autocast(weight.device.type, enabled=False):
            codes = functional.linear(full_precision(self.basis), full_precision(weight), full_precision(bias))
        return codes.to(weight.dtype)

    def _read_codebook(self) -> Tensor:
        """See :meth:`Quantizer._read_codebook`; projecting 4,096 codes of 512 takes longer than a search."""
        if self.training:
            return self.codebook
        return self._projected(lambda: self.codebook, (self.basis, self.projection.weight, self.projection.bias))
