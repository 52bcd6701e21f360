"""Generation of large codebooks digit by digit: a code's number in mixed radix is several tokens of few values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tessella.config import build
from tessella.generators.base import Generator, Guidance, Loss
from tessella.generators.sampling import Rng, inference
from tessella.tokenizer import TokenSpace


class Digits(Generator):
    r"""Any generator over the digits of codes, which are codebooks of their own (flattened, delayed, masked).

    .. math:: k = \sum_i t_i b_i, \quad b_i = \prod_{j < i} L_j, \quad 0 \le t_i < L_i

    With FSQ's levels as bases the digits are the quantized channels; 2^18 codes in two digits of 512 are the factorised
    tokens of Open-MAGVIT2 (arXiv 2409.04410). The embedding and the head have :math:`\sum L_i` rows in place of
    :math:`\prod L_i`. Every codebook of the inner generator has max L values; it never gives one beyond its own L.

    Args:
        space: the whole codes.
        bases: L_i, the fastest first, as in FSQ; their product is the codebook size.
        generator: the section of a generator, without its conditioner; its tokens are the digits.
        conditioner: the section of a conditioner.

    Raises:
        ValueError: bases below 2, or of another product; a generator whose tokens cannot be limited.
    """

    bases: Tensor
    places: Tensor

    def __init__(
        self, space: TokenSpace, *, bases: Sequence[int], generator: dict[str, Any], conditioner: dict[str, Any]
    ) -> None:
        super().__init__(space)
        if any(base < 2 for base in bases) or math.prod(bases) != space.codebook_size:
            raise ValueError(
                f"bases must be at least 2 and have the product {space.codebook_size} (the codebook size), "
                f"got {list(bases)} of product {math.prod(bases)}"
            )
        digits = replace(space, num_codebooks=space.num_codebooks * len(bases), codebook_size=max(bases))
        self.generator: Generator = build("generators", {"conditioner": conditioner, **generator}, space=digits)
        places = list(itertools.accumulate(bases[:-1], lambda x, y: x * y, initial=1))
        self.register_buffer("bases", torch.tensor(list(bases)), persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.generator.limit_codes(self.bases.repeat(space.num_codebooks))

    def to_digits(self, indices: Tensor) -> Tensor:
        """``[..., K I]`` of ``indices [..., K]``: the I digits of a code side by side."""
        return (indices[..., None] // self.places % self.bases).flatten(-2)

    def from_digits(self, digits: Tensor) -> Tensor:
        """The inverse of :meth:`to_digits`."""
        indices: Tensor = (digits.unflatten(-1, (-1, len(self.bases))) * self.places).sum(-1)
        return indices

    def forward(self, indices: Tensor, condition: Tensor | None) -> Loss:
        """See :meth:`Generator.forward`; the loss is the inner generator's, a mean over digits."""
        self.check_indices(indices)
        out: Loss = self.generator(self.to_digits(indices), condition)
        return out

    @inference
    def sample(
        self,
        condition: Tensor | None,
        *,
        rng: Rng = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: Guidance = 1.0,
        known: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Generator.sample`; the settings are those of each digit."""
        if known is not None:
            self.check_known(known, len(known))
            to_draw = (known < 0).repeat_interleave(len(self.bases), -1)
            known = self.to_digits(known.clamp(min=0)).masked_fill(to_draw, -1)
        digits = self.generator.sample(
            condition, rng=rng, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, known=known
        )
        return self.from_digits(digits)

    @inference
    def bits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """See :meth:`Generator.bits`."""
        self.check_indices(indices)
        return self.generator.bits(self.to_digits(indices), condition)
