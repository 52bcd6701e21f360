"""What the forward and the backward sweep of the softmax operations share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LISTED = 1 << 20


GATHER_PAIRS = 1024


SWEPT = -1


class Forward(NamedTuple):
    """The operator's outputs: four results, then what the backward sweep needs."""

    z_q: Tensor  # [N, D] straight-through codes
    codes: Tensor  # [N, D] the same values, with a gradient to the codebook alone
    indices: Tensor  # int64 [N] over all shards
    entropies: Tensor  # [2] S, A
    row_stats: Tensor  # [5, N] m, sum_k exp(l - m); and where p is swept log sum_k exp(t), sum_k p t and sum_k p slope
    mean_code: Tensor  # [N, D] zbar_n = sum_k s_nk c_k
    slope: Tensor  # [V] dA/dq_k less a constant, where p is swept
    listed: Tensor  # int64 [2, capacity] rows and codes of the list
    listed_values: Tensor  # [3, capacity] dS/dl, dA/dl and s of the list
    num_listed: Tensor  # int64 [2] listed p and listed s; SWEPT where they are swept


class RowSums(NamedTuple):
    """Sums over the codes of each row, with ``m = max_k l`` and ``t = (l - m) / tau``."""

    best: Tensor  # m                        [N]
    mass: Tensor  # sum_k exp(l - m)         [N]
    code: Tensor  # sum_k exp(l - m) c_k     [N, D]
    sharp_mass: Tensor  # sum_k exp(t)       [N]
    sharp_moment: Tensor  # sum_k exp(t) t   [N]


class Near(NamedTuple):
    """The pairs of a row and a code whose score is within the window of the row's best."""

    rows: Tensor  # int64 [c]
    codes: Tensor  # int64 [c]
    scores: Tensor  # float64 [c]


class Found(NamedTuple):
    """What the forward sweep found, and whether the near pairs list all of ``p`` and all of ``s``."""

    sums: RowSums
    near: Near
    lists_p: bool
    lists_s: bool


def reach(dtype: torch.dtype) -> float:
    """``exp(-reach)`` is nothing beside 1: 40 nats in float32, 90 in float64."""
    return -2.5 * math.log(torch.finfo(dtype).eps)


def exponent_floor(dtype: torch.dtype) -> float:
    """The least exponent formed: still nothing in any sum, yet no denormal number, on which products are slow."""
    return 0.9 * math.log(torch.finfo(dtype).tiny)


def tail(dtype: torch.dtype, num_codes: int) -> float:
    """All codes with exponents below ``-tail`` add less than a rounding error to a sum over the codes."""
    return math.log(num_codes) + 1 - math.log(torch.finfo(dtype).eps)


def list_capacity(num_rows: int, num_codes: int) -> int:
    """Pairs above which sweeping is cheaper than listing (1/64 of all) or the list too large (28 MiB + O(N))."""
    per_row = torch.sym_min(num_codes // 64 + 4, 1024)
    capacity: int = torch.sym_min(num_rows * per_row, MAX_LISTED + 16 * num_rows)  # symbolic while tracing
    return capacity


def row_weights(mask: Tensor | None, z: Tensor) -> Tensor:
    """``w`` [N]: the average over the rows that the mask keeps; all zero where it keeps none."""
    keep = z.new_ones(z.shape[0]) if mask is None else mask.to(z.dtype)
    return keep / keep.sum().clamp_min(1)
