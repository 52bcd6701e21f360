"""In which order tokens of several codebooks are generated, and how many at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Order(nn.Module):
    """A sequence of steps; each generates some of the T K tokens.

    Args:
        slots: ``[S, W]`` int64, the tokens of each step: ``t K + k`` for codebook k at position t, -1 for none.
        codebooks: ``[S, W]`` int64, the codebook of each slot, of the empty ones too.

    Raises:
        ValueError: not every token exactly once.
    """

    slots: Tensor
    codebooks: Tensor
    _places: Tensor

    def __init__(self, slots: Tensor, codebooks: Tensor) -> None:
        super().__init__()
        self.num_steps, self.width = slots.shape
        self.num_codebooks = int(codebooks.max()) + 1
        filled = slots[slots >= 0]
        if (
            not torch.equal(filled.sort().values, torch.arange(len(filled), device="cpu"))
            or len(filled) % self.num_codebooks
        ):
            raise ValueError("an order must hold every token exactly once")
        self.has_empty = len(filled) < slots.numel()
        self._raster = torch.equal(slots.flatten(), torch.arange(slots.numel(), device="cpu"))
        places = torch.empty_like(filled)
        places[filled] = (slots.flatten() >= 0).nonzero()[:, 0]
        self.register_buffer("slots", slots, persistent=False)
        # An expanded tensor could not be copied into, as averaging of weights does.
        self.register_buffer("codebooks", codebooks.contiguous(), persistent=False)
        self.register_buffer("_places", places.view(-1, self.num_codebooks), persistent=False)

    def to_steps(self, indices: Tensor, *, empty: int = -1) -> Tensor:
        """``[B, S, W]`` of ``indices [B, T, K]``, with ``empty`` where a step has no token."""
        return indices.flatten(1)[:, self.slots].masked_fill(self.slots < 0, empty)

    def from_steps(self, steps: Tensor) -> Tensor:
        """``[B, T, K, ...]`` of ``steps [B, S, W, ...]``; what stands in empty slots is ignored."""
        tokens = steps.flatten(1, 2)
        return tokens.unflatten(1, self._places.shape) if self._raster else tokens[:, self._places]


def flattened(num_positions: int, num_codebooks: int) -> Order:
    """One token a step: all codebooks of a position, then the next position; T K steps."""
    slots = torch.arange(num_positions * num_codebooks, device="cpu")[:, None]
    return Order(slots, slots % num_codebooks)


def parallel(num_positions: int, num_codebooks: int) -> Order:
    """All codebooks of a position in one step, then the next position; T steps."""
    slots = torch.arange(num_positions * num_codebooks, device="cpu").view(num_positions, num_codebooks)
    return Order(slots, slots % num_codebooks)


def delay(num_positions: int, num_codebooks: int) -> Order:
    """All codebooks in every step, codebook k as many positions late (MusicGen, arXiv 2306.05284); T + K - 1 steps."""
    codebooks = torch.arange(num_codebooks, device="cpu")
    positions = torch.arange(num_positions + num_codebooks - 1, device="cpu")[:, None] - codebooks
    inside = (positions >= 0) & (positions < num_positions)
    return Order((positions * num_codebooks + codebooks).where(inside, -1), codebooks.expand_as(positions))
