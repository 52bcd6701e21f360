"""The same operations on a codebook whose rows are divided over the ranks of a process group (V >= 2^20)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from tessella.ops._tiles import Metric, check_mask, check_metric, check_temperature, check_vectors
from tessella.ops.index_backprop import quantize
from tessella.ops.nearest import nearest_code


def sharded_index_backprop(
    z: Tensor,
    codebook_shard: Tensor,
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.25,
    entropy_weight: float = 0.05,
    entropy_temperature: float = 0.01,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """`tessella.ops.index_backprop` where each rank holds consecutive rows of the codebook, in the order of the ranks.

    Every rank passes the same ``z`` ``[N, D]`` and ``mask``, receives the same results (``indices`` count over all
    shards) and must send the same gradients back. The gradient to ``z`` is complete on every rank; that to
    ``codebook_shard`` ``[V_rank, D]`` is the shard's. Only per-row statistics and O(N D) sums cross between ranks.

    Raises:
        TypeError, ValueError: as `tessella.ops.index_backprop` does, on the rank whose arguments do not fit.
        ValueError: there is no process group.
    """
    check_vectors(z, codebook_shard, "codebook_shard")
    check_mask(mask, z)
    check_temperature("entropy_temperature", entropy_temperature)
    weights = (commitment_weight, codebook_weight, entropy_weight)
    return quantize(z, codebook_shard, weights, entropy_temperature, mask, _name(group))


def sharded_nearest(
    z: Tensor, codebook_shard: Tensor, metric: Metric = "euclidean", group: dist.ProcessGroup | None = None
) -> Tensor:
    """`tessella.ops.nearest` over all shards: the same ``z`` ``[N, D]`` and the same int64 indices on every rank.

    Raises:
        TypeError, ValueError: as `tessella.ops.nearest` does, on the rank whose arguments do not fit.
        ValueError: there is no process group.
    """
    check_vectors(z, codebook_shard, "codebook_shard")
    check_metric(metric)
    indices: Tensor = nearest_code(z.detach(), codebook_shard.detach(), metric, _name(group))
    return indices


def _name(group: dist.ProcessGroup | None) -> str:
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("group is None and there is no default process group; call init_process_group first")
    return group.group_name
