"""The processes of one run: sums, copies and gathered rows over all ranks; no-ops on one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


def world_size() -> int:
    """The number of processes; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks in place and return it; the result is the same to the last bit on each."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite ``tensor`` with that of rank ``source`` and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """``[sum_r N_r, D]``: the rows ``[N_r, D]`` of every rank in the order of ranks; N may differ between them."""
    if world_size() == 1:
        return rows
    size = torch.tensor([rows.shape[0]], device=rows.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(s) for s in sizes]
    padded = functional.pad(rows, (0, 0, 0, max(lengths) - rows.shape[0])).contiguous()
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])
