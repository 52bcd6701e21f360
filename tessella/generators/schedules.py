"""Which tokens are hidden, and when they are shown: the schedules of masked generation, without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def num_masked(ratio: Tensor, length: int) -> Tensor:
    """Tokens that training hides of ``length``: ``ceil(cos(pi/2 (1 - r)) N)``, at least 1; int64.

    Args:
        ratio: r in [0, 1], of any shape; 1 hides all.
        length: N.
    """
    fraction = torch.cos(math.pi / 2 * (1 - ratio.double()))
    return (fraction * length).ceil().long().clamp(min=1)


def random_masks(ratio: Tensor, length: int) -> Tensor:
    """Boolean ``[B, N]``, True where hidden: ``num_masked(ratio [B], N)`` positions of each row, all sets as likely."""
    permutation = torch.rand(len(ratio), length, device=ratio.device).argsort(-1)
    return permutation < num_masked(ratio, length)[:, None]


def num_remasked(progress: float, masked: Tensor, length: int | Tensor) -> Tensor:
    """Tokens that stay hidden after a decoding step: ``floor(N cos(pi/2 progress))``, at least 1; int64.

    Fewer than before, so that every step shows at least one, until one is left.

    Args:
        progress: (t + 1) / T after step t of T.
        masked: how many were hidden before the step, of any shape.
        length: N, how many were hidden at the start.
    """
    fraction = min(max(math.cos(math.pi / 2 * progress), 1e-6), 1.0)
    most = (torch.as_tensor(length, dtype=torch.float64, device=masked.device) * fraction).floor().long()
    return torch.minimum(masked - 1, most).clamp(min=1)


def low_discrepancy_order(shape: Sequence[int]) -> Tensor:
    r"""All cells of a grid, row-major numbers ``[prod(shape)]``, so that every prefix covers the grid evenly.

    The cells that Roberts' sequence :math:`x_n = (1/2 + n \alpha) mod 1`, :math:`\alpha_i = \phi^{-i}`,
    :math:`\phi^{d+1} = \phi + 1`, falls into, in the order of their first hit; axes of one cell do not count.
    """
    sides = np.array([side for side in shape if side > 1])
    if not len(sides):
        return torch.zeros(1, dtype=torch.int64)
    alpha = _generalised_golden_ratio(len(sides)) ** -np.arange(1.0, len(sides) + 1)
    num_points = num_cells = int(sides.prod())
    while True:
        points = (0.5 + np.arange(num_points)[:, None] * alpha) % 1
        cells = np.ravel_multi_index(tuple((points * sides).astype(np.int64).T), tuple(sides))
        first_hits = np.sort(np.unique(cells, return_index=True)[1])
        if len(first_hits) == num_cells:
            return torch.from_numpy(cells[first_hits])
        num_points *= 2


def _generalised_golden_ratio(num_axes: int) -> float:
    """The root above 1 of ``x^(d+1) = x + 1``: 1.618 for one axis, 1.3247 for two."""
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (num_axes + 1))
    return root


def group_ends(length: int, num_groups: int = 12, exponent: float = 2.2) -> list[int]:
    """Where each group of a fixed unmasking schedule ends: ``ceil(N (i / S)^exponent)``, i = 1 .. S (M2T, 2304.07313).

    No group is empty: where N or its first groups are too small, they take one token each.
    """
    num_groups = min(num_groups, length)
    return [max(i, math.ceil(length * (i / num_groups) ** exponent)) for i in range(1, num_groups + 1)]
