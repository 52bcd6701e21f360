"""Compression cost: how many bits a token takes when a generator drives an entropy coder."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor

from tessella.generators.base import Generator


def compression_cost(generator: Generator, batches: Iterable[tuple[Tensor, Tensor | None]]) -> float:
    """Bits per token over a data set; log2(V) for a generator that knows nothing.

    A generator of low cost has learnt more of its tokens, but costs compare only where the tokens are of the same
    tokenizer: one that uses few codes makes cheap tokens.

    Args:
        generator: on the device it is on. The order of coding is its own: position by position, or the groups of a
            fixed unmasking schedule.
        batches: ``indices [B, *S, K]`` and their conditions.

    Raises:
        ValueError: no token at all, or indices that are not of the generator's token space.
        NotImplementedError: see :meth:`Generator.bits`.
    """
    device = next(itertools.chain(generator.parameters(), generator.buffers())).device
    total_bits, num_tokens = 0.0, 0
    for indices, condition in batches:
        condition = None if condition is None else condition.to(device)
        total_bits += generator.bits(indices.to(device), condition).sum().item()
        num_tokens += indices.numel()
    if not num_tokens:
        raise ValueError("batches held no token to code")
    return total_bits / num_tokens
