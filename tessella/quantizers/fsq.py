"""Finite scalar quantization (Mentzer et al., arXiv 2309.15505): a rounded, bounded grid; nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tessella.quantizers._implicit import ImplicitCodebook
from tessella.quantizers.base import Quantized, Quantizer, check_choice, full_precision, straight_through

Convention = Literal["corrected", "paper", "wide", "symmetric"]

_EPS = 1e-3
_MAX_CODEBOOK_SIZE = 2**63 - 1  # indices are int64
_EXACT_IN_FLOAT64 = 2**53


class FSQ(ImplicitCodebook):
    r"""Bound each channel, round it to L_i levels, number the codes in mixed radix (first channel fastest).

    .. math:: f(z) = \tanh(z + s)\,h - o, \quad q = round(f(z)), \quad \hat z = q / \lfloor L/2 \rfloor

    with h = (L-1)(1-eps)/2, o = 0 for odd and 1/2 for even L, eps = 1e-3, and the gradient of f straight through the
    rounding. The shift s makes f(0) = 0. A trained model is tied to its ``convention``:

    ========== ===== ============= =========================================================
    corrected  1-eps s = atanh(o/h) the author's correction of the paper's shift; the default
    paper      1-eps s = tan(o/h)   as printed; f(0) is off by up to 4e-4
    wide       1+eps s = atanh(o/h) other public packages since 2024, e.g. image and video tokenizers
    symmetric  codes 2t/(L-1) - 1, t = floor((L-1)(tanh z + 1)/2 + 1/2): reaches both ends for even L; allows L = 2
    ========== ===== ============= =========================================================

    Args:
        levels: L_i per channel; ``dim`` is their number and ``codebook_size`` their product.
        convention: see the table.

    Raises:
        ValueError: a level is below 3 (2 if symmetric) or above 1000, or the product exceeds int64.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int], *, convention: Convention = "corrected") -> None:
        check_choice("convention", convention, Convention)
        low = 2 if convention == "symmetric" else 3
        if not levels or any(level < low or level > 1000 for level in levels):
            # Below 3 the shift of an even level diverges; above 1000 eps costs the outermost levels.
            raise ValueError(f"levels must hold numbers from {low} to 1000 for convention {convention!r}, got {levels}")
        size = math.prod(levels)
        if size > _MAX_CODEBOOK_SIZE:
            raise ValueError(f"levels {list(levels)} make {size} codes; int64 indices end at 2^63 - 1")
        super().__init__(len(levels), size)
        self.convention: Convention = convention
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """f(z) ``[..., D]``, whose nearest integer is the level (before the offset that makes digits start at 0)."""
        grid = self._grid(z.dtype)
        return (z + grid.shift).tanh() * grid.half - grid.offset

    def digits_to_codes(self, digits: Tensor) -> Tensor:
        """Codes ``[..., D]`` of ``digits [..., D]`` in ``{0..L_i - 1}``, in the dtype of the module."""
        return self._codes(digits, self._grid(full_precision(self._like).dtype))

    def indices_to_digits(self, indices: Tensor) -> Tensor:
        """Digits ``[..., D]`` of ``indices [...]``: t_i = (index // b_i) mod L_i, in integers throughout."""
        return indices[..., None] // self.basis % self.levels

    def digits_to_indices(self, digits: Tensor) -> Tensor:
        """``sum_i t_i b_i`` of ``digits [..., D]``, with b_i the product of the levels before i; int64."""
        if self.codebook_size <= _EXACT_IN_FLOAT64:  # one product instead of two passes over integers
            return (digits.double() @ self.basis.double()).long()
        return (digits.long() * self.basis).sum(-1)

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        rows = _rows_per_block(z)
        grid = self._grid(z.dtype, rows)
        t = (z.reshape(-1, rows * self.dim) + grid.shift).tanh_()
        level = (t.detach() * grid.half).sub_(grid.offset)
        # Ties go up on the symmetric grid, as published, and to even on the others, as in the reference.
        digits = level.add_(0.5).floor_() if self.convention == "symmetric" else level.round_().add_(grid.width)
        codes = self._codes(digits, grid).to(z.dtype)
        return Quantized(
            z_q=straight_through(t * (grid.half / grid.width), codes).reshape(z.shape),
            indices=self.digits_to_indices(digits.reshape(z.shape))[:, None],
            loss=z.new_zeros(()),
        )

    def _codes(self, digits: Tensor, grid: _Grid) -> Tensor:
        return (digits - grid.width).div_(grid.width).to(self._like.dtype)

    def _grid(self, dtype: torch.dtype, repeats: int = 1) -> _Grid:
        levels = self.levels.repeat(repeats).to(dtype)
        if self.convention == "symmetric":
            half = (levels - 1) / 2
            return _Grid(half, offset=-half, shift=torch.zeros_like(half), width=half)
        eps = -_EPS if self.convention == "wide" else _EPS
        half = (levels - 1) / 2 * (1 - eps)
        offset = (1 - levels % 2) / 2
        shift = (offset / half).tan() if self.convention == "paper" else (offset / half).atanh()
        return _Grid(half, offset, shift, width=(levels / 2).floor())

    def residual_stage(self, stage: int) -> Quantizer:
        """See :meth:`Quantizer.residual_stage`."""
        raise ValueError("FSQ bounds its input, so what it leaves over is not in the space of z and shrinks with every "
                         "stage; a finer grid is FSQ with more levels, more indices are grouped FSQ")  # fmt: skip


class _Grid(NamedTuple):
    """The formula's constants, one per channel: f(z) = tanh(z + shift) half - offset, and levels per unit of code."""

    half: Tensor
    offset: Tensor
    shift: Tensor
    width: Tensor


_BLOCK_ROWS = 64


def _rows_per_block(z: Tensor) -> int:
    """How many rows of ``z [N, D]`` to treat as one: rows of few channels are too short for a CPU's vector units."""
    return 1 if torch.compiler.is_compiling() or len(z) == 0 else math.gcd(len(z), _BLOCK_ROWS)
