"""What the quantizers whose codes are arithmetic share: no table is stored, and none is built unless asked for."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tessella.quantizers.base import Quantizer

_MAX_MATERIALISED = 1 << 26


class ImplicitCodebook(Quantizer):
    """Codes are computed from integer digits; indices stay integers throughout, so they are exact at any size."""

    _like: Tensor

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__(dim, codebook_size)
        # Follows .to(dtype) as a parameter would: codes come in the dtype the neighbouring layers compute in.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @abstractmethod
    def digits_to_codes(self, digits: Tensor) -> Tensor:
        """Codes ``[..., D]`` of integer-valued ``digits [..., D]``."""

    @abstractmethod
    def indices_to_digits(self, indices: Tensor) -> Tensor:
        """Digits ``[..., D]`` (int64) of ``indices [...]``."""

    def _lookup(self, indices: Tensor) -> Tensor:
        return self.digits_to_codes(self.indices_to_digits(indices[..., 0]))

    @property
    def codebook(self) -> Tensor:
        """``[V, D]``, built on request; everything else works without it.

        Raises:
            ValueError: beyond 2^26 codes, where only arithmetic decoding is sensible.
        """
        if self.codebook_size > _MAX_MATERIALISED:
            raise ValueError(
                f"a table of {self.codebook_size} codes is not built; decode indices with indices_to_codes instead"
            )
        return self._lookup(torch.arange(self.codebook_size, device=self._like.device)[:, None])
