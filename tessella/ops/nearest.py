"""The nearest code of every vector, exactly, without the N x V score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.ops._scores import Scores, Shortlist, first_maximum, first_over_shards
from tessella.ops._tiles import (
    Metric,
    Shards,
    check_metric,
    check_vectors,
    compute_dtype,
    full_precision,
    has_triton_form,
    spans,
    tile_shape,
)


def nearest(z: Tensor, codebook: Tensor, metric: Metric = "euclidean") -> Tensor:
    """Index of the code at the least distance ``|z - c|`` or, for ``metric="dot"``, of the greatest product ``z.c``.

    The scores are formed in float32 (float64 for float64 inputs), whatever the dtype of the inputs and under autocast;
    codes that rounding could have misordered are compared again in float64. Ties go to the first index. No gradient.

    Args:
        z: ``[N, D]``.
        codebook: ``[V, D]``.
        metric: ``"euclidean"`` or ``"dot"``.

    Returns:
        int64 indices ``[N]``.

    Raises:
        TypeError: an input is not a floating tensor.
        ValueError: shapes or devices that do not fit, an empty codebook, or an unknown metric.
    """
    check_vectors(z, codebook)
    check_metric(metric)
    indices: Tensor = nearest_code(z.detach(), codebook.detach(), metric, "")
    return indices


@torch.library.custom_op("tessella::nearest", mutates_args=())
def nearest_code(z: Tensor, codebook: Tensor, metric: str, group: str) -> Tensor:
    """The operator behind `nearest`; ``group`` names the ranks that hold the other shards of the codebook."""
    shards = Shards(group)
    indices = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    with full_precision(z.device):
        scores = Scores(z.to(compute_dtype(z, codebook)), codebook, metric)
        first_code = shards.first_code(codebook.shape[0], z.device)
        if has_triton_form(scores.z):
            from tessella.ops import _triton

            best, index, *_ = _triton.row_sums(scores, False, None)
            return first_over_shards(best, index, first_code, shards)
        rows, codes = tile_shape(z.shape[0], codebook.shape[0], z.device)
        scratch = scores.z.new_empty(rows * codes)
        for i in spans(z.shape[0], rows):
            shortlist = Shortlist(scores, i, scores.margin[i])
            for k in spans(codebook.shape[0], codes):
                shortlist.update(scores.tile(i, k, scratch), k)
            near_rows, near_codes, exact = shortlist.pairs()
            best, index = first_maximum(exact, near_rows - i.start, near_codes, i.stop - i.start)
            indices[i] = first_over_shards(best, index, first_code, shards)
    return indices


@nearest_code.register_fake
def _(z: Tensor, codebook: Tensor, metric: str, group: str) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)
