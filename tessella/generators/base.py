"""The protocol of generators: token indices to a loss, and back by sampling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tessella.config import Configurable
from tessella.described import Described, parts, size
from tessella.generators.sampling import Rng
from tessella.ops.ranges import check_range
from tessella.registry import Spec
from tessella.tokenizer import TokenSpace

# Guidance scale s in l_null + s (l_cond - l_null): constant, or a function of the progress of sampling in [0, 1).
Guidance = float | Callable[[float], float]

_NEVER = -1e9


@dataclass
class Loss:
    """A scalar to minimise and detached scalars for the log."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Generator(Described, Configurable, nn.Module, ABC):
    """A distribution over the tokens of a :class:`TokenSpace`, under a condition; it never sees a picture.

    Args:
        space: the tokens, with the fingerprint of the tokenizer that made them.
    """

    recipe: Spec | None = None  # the whole recipe of the training run, if there was one; saving keeps it
    _can_limit_codes = False
    _takes_shorter = False  # whether a grid of one axis is the largest one, and signals may be shorter
    _beyond: Tensor | None  # [K, V]

    def __init__(self, space: TokenSpace) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("_beyond", None, persistent=False)

    if TYPE_CHECKING:

        def __call__(self, indices: Tensor, condition: Tensor | None) -> Loss:
            """See :meth:`forward`."""

    @abstractmethod
    def forward(self, indices: Tensor, condition: Tensor | None) -> Loss:
        """The training loss of ``indices [B, *S, K]``.

        Args:
            indices: int64 in ``[0, V)``.
            condition: what the conditioner takes, one for each sample (labels ``[B]``); None without a condition.

        Raises:
            ValueError: indices of another shape or range.
        """

    @abstractmethod
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
        """Draw indices ``[B, *S, K]``; in eval mode and without gradients, whatever the mode is.

        Args:
            condition: see :meth:`forward`; one for each of B samples.
            rng: where randomness comes from: a seed, a ``torch.Generator``, a sequence of one for each sample, or None
                for torch's global one. Each sample draws from a generator of its own, so it does not depend on its
                batch; see :func:`tessella.generators.sampling.one_each`. Without a condition B is the length of the
                sequence, else 1.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: keep the k likeliest tokens.
            top_p: keep the likeliest tokens that together have this probability.
            guidance: s of classifier-free guidance; 1 is none.
            known: ``[B, *S, K]``, tokens that stay as they are, and -1 where one is to be drawn; None draws all. A
                model that draws in a fixed order sees only those known ones that come before.

        Raises:
            ValueError: a setting, a condition or a known token out of range.
        """

    def limit_codes(self, sizes: Tensor) -> None:
        """From now on give no code of codebook k beyond its first ``sizes[k]`` (``sizes [K]``, at most V).

        Raises:
            ValueError: this kind of generator has no such limit.
        """
        if not self._can_limit_codes:
            raise ValueError(f"the codes of {type(self).__name__} cannot be limited")
        beyond = torch.arange(self.space.codebook_size, device=sizes.device) >= sizes[:, None]
        self.register_buffer("_beyond", beyond, persistent=False)

    def _within_limits(self, logits: Tensor, codebook: int | None = None) -> Tensor:
        """``logits [..., K, V]``, or ``[..., V]`` of one codebook, with no probability for codes beyond the limits."""
        if self._beyond is None:
            return logits
        # Finite, for guidance takes differences of logits.
        return logits.masked_fill(self._beyond if codebook is None else self._beyond[codebook], _NEVER)

    def fit_codebook(self, codebook: Tensor, *, seed: int) -> None:
        """Prepare for the codes ``[V, D]`` of the tokenizer, before the first training step."""

    def bits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """Bits ``[B]`` (float64) that an entropy coder driven by this generator needs for ``indices [B, *S, K]``.

        In eval mode and without gradients, whatever the mode is; arguments and errors are those of :meth:`forward`.

        Raises:
            NotImplementedError: this generator gives no probabilities that a decoder could follow.
        """
        raise NotImplementedError(f"{type(self).__name__} has no code length")

    def check_known(self, known: Tensor, count: int) -> None:
        """Refuse known tokens that are not of this generator's token space, or not of ``count`` samples.

        Raises:
            ValueError: another shape or range.
        """
        if len(known) != count:
            raise ValueError(f"known must hold {count} samples, got {len(known)}")
        if (known < -1).any():
            raise ValueError(f"known tokens must be at least -1, which is to be drawn, got {int(known.min())}")
        self.check_indices(known.clamp(min=0))

    def facts(self) -> dict[str, str]:
        """See :class:`Described`."""
        grid, codebooks = " x ".join(map(str, self.space.grid)), self.space.num_codebooks
        return {
            "tokens": f"{grid} of {self.space.codebook_size:,} codes"
            + (f" in each of {codebooks} codebooks" if codebooks > 1 else ""),
            "of tokenizer": self.space.fingerprint,
            "parts": parts(self),
            "in all": size(self),
        }

    def check_indices(self, indices: Tensor) -> None:
        """Refuse indices that are not of this generator's token space.

        Raises:
            ValueError: another shape or range.
        """
        expected = (*self.space.grid, self.space.num_codebooks)
        fits = tuple(indices.shape[1:]) == expected
        if self._takes_shorter and len(expected) == 2 and indices.ndim == 3:
            fits = 1 <= indices.shape[1] <= expected[0] and indices.shape[2] == expected[1]
        if not fits:
            raise ValueError(f"indices must be [B, {', '.join(map(str, expected))}], got {list(indices.shape)}")
        if indices.is_floating_point():
            raise ValueError(f"indices must be integers, got {indices.dtype}")
        check_range(indices, self.space.codebook_size, "indices", "; were they made by another tokenizer?")
