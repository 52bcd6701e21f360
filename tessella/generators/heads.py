"""From hidden states to logits: heads that are called as modules, so that hooks, adapters and sharding see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tessella.attention import Linear


class CodebookHeads(nn.ModuleList):
    """One linear layer for each of K codebooks, over sequences whose position t K + k is of codebook k.

    Loads a matrix ``[K V, dim]`` of all codebooks too, as earlier versions kept it. All weights start at 0, so that the
    first loss is ln V exactly.

    Args:
        dim: width of the hidden states.
        num_codebooks: K.
        codebook_size: V.
    """

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int) -> None:
        super().__init__(zero_head(dim, codebook_size) for _ in range(num_codebooks))

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, T, K, V]`` of ``hidden [B, T K, dim]``."""
        by_codebook = hidden.unflatten(1, (-1, len(self))).unbind(2)
        return torch.stack([head(part) for head, part in zip(self, by_codebook, strict=True)], 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The children load after this module, and find their part.
        whole = state_dict.pop(f"{prefix}weight", None)
        if whole is not None:
            state_dict |= {f"{prefix}{k}.weight": part for k, part in enumerate(whole.chunk(len(self)))}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def zero_head(dim: int, num_logits: int) -> Linear:
    """One linear layer without bias, of weights 0: the first loss is ln V exactly."""
    head = Linear(dim, num_logits, bias=False)
    nn.init.zeros_(head.weight)
    return head
