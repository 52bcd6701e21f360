"""What every sweep over the N x V scores shares: argument checks, tile sizes, arithmetic, and sums over ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

Metric = Literal["euclidean", "dot"]

# A CPU tile of 8 MiB: large enough that the matrix product runs at full speed and that calls are few, small enough to
# stay in the shared cache for the elementwise passes that follow it.
CPU_TILE_ELEMENTS = 1 << 21
CUDA_TILE_ELEMENTS = 1 << 25
CUDA_FREE_FRACTION = 1 / 32
MAX_TILE_ROWS = 2048
MAX_TRITON_DIM = 256  # a row of z and of its gradient stay in registers

_forced_tile: tuple[int, int] | None = None


@contextmanager
def forced_tile(rows: int, codes: int) -> Iterator[None]:
    """Make every sweep use tiles of ``rows`` x ``codes``; for tests."""
    global _forced_tile
    before, _forced_tile = _forced_tile, (rows, codes)
    try:
        yield
    finally:
        _forced_tile = before


def tile_shape(num_rows: int, num_codes: int, device: torch.device) -> tuple[int, int]:
    """Rows and codes of one tile of scores."""
    if _forced_tile is not None:
        return _forced_tile
    rows = max(1, min(num_rows, MAX_TILE_ROWS))
    return rows, max(1, min(num_codes, _tile_elements(device) // rows))


def full_height_tile(num_rows: int, num_codes: int, device: torch.device) -> int:
    """Codes of one tile that holds all rows, for the passes that need a code's sum over the whole batch."""
    if _forced_tile is not None:
        return _forced_tile[1]
    return max(1, min(num_codes, 2 * _tile_elements(device) // max(1, num_rows)))


def _tile_elements(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_TILE_ELEMENTS
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(CPU_TILE_ELEMENTS, min(CUDA_TILE_ELEMENTS, int(free_bytes * CUDA_FREE_FRACTION) // 4))


def has_triton_form(z: Tensor) -> bool:
    """Whether the Triton kernels serve ``z`` ``[N, D]``: float32 on CUDA, or on the CPU under Triton's interpreter."""
    on_device = z.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    fits = z.dtype == torch.float32 and z.shape[1] <= MAX_TRITON_DIM
    return on_device and fits and find_spec("triton") is not None


def spans(total: int, step: int) -> Iterator[slice]:
    """``slice(0, step), slice(step, 2 step), ...`` up to ``total``."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in the tensors' own dtype: no autocast, no TF32 or bfloat16 inside float32 products.

    Scores are divided by temperatures like 0.01: the relative error of TF32, 1e-3, would be an error of several nats.
    """
    precision = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def corner(scratch: Tensor, i: slice, k: slice) -> Tensor:
    """The tile of rows ``i`` and codes ``k`` in a flat buffer that fits the largest tile."""
    rows, codes = i.stop - i.start, k.stop - k.start
    return scratch[: rows * codes].view(rows, codes)


def check_vectors(z: Tensor, codebook: Tensor, codebook_name: str = "codebook") -> None:
    """Raise unless ``z`` is a floating [N, D] and ``codebook`` a floating [V, D] with V >= 1 on the same device."""
    for name, value in (("z", z), (codebook_name, codebook)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {value.dtype}")
        if value.ndim != 2:
            raise ValueError(f"{name} must have two axes, got shape {tuple(value.shape)}")
    if z.shape[1] != codebook.shape[1]:
        raise ValueError(f"z has dimension {z.shape[1]} but {codebook_name} {codebook.shape[1]}; they must be equal")
    if codebook.shape[0] == 0:
        raise ValueError(f"{codebook_name} must hold at least one code, got shape {tuple(codebook.shape)}")
    if z.device != codebook.device:
        raise ValueError(f"z is on {z.device} but {codebook_name} is on {codebook.device}; they must be together")


def check_mask(mask: Tensor | None, z: Tensor) -> None:
    """Raise unless ``mask`` is None or a bool [N] beside ``z`` [N, D]."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool Tensor, got {mask.dtype if isinstance(mask, Tensor) else type(mask)}")
    if mask.ndim != 1 or mask.shape[0] != z.shape[0]:
        raise ValueError(f"mask must have shape ({z.shape[0]},), one entry per row of z, got {tuple(mask.shape)}")
    if mask.device != z.device:
        raise ValueError(f"mask is on {mask.device} but z is on {z.device}; they must be together")


def check_metric(metric: str) -> None:
    """Raise unless ``metric`` is a known name."""
    if metric not in get_args(Metric):
        raise ValueError(f"unknown metric {metric!r}; choose one of: {', '.join(get_args(Metric))}")


def check_temperature(name: str, value: float) -> None:
    """Raise unless ``value`` is a positive finite number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def group_name(group: dist.ProcessGroup | None) -> str:
    """Operators take names; "" for None."""
    return "" if group is None else group.group_name


def resolve_group(name: str) -> dist.ProcessGroup | None:
    """The process group called ``name``; None for ""."""
    if not name:
        return None
    from torch._C._distributed_c10d import _resolve_process_group  # absent where torch lacks distributed

    return _resolve_process_group(dist.distributed_c10d.GroupName(name))


class Shards:
    """Sums and extrema over the ranks that hold the shards of a codebook; the identity where nothing is sharded.

    And means over replicas, the ranks that hold other rows of the same batch.
    """

    def __init__(self, group_name: str, replicas: str = "") -> None:
        self.group = resolve_group(group_name)
        self._replicas = resolve_group(replicas)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def min(self, value: Tensor) -> Tensor:
        """Minimum over ranks, in place."""
        return self._reduce(value, dist.ReduceOp.MIN)

    def max_of_all(self, value: Tensor) -> Tensor:
        """Maximum over shards and replicas, in place."""
        if self._replicas is not None:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._replicas)
        return self.max(value)

    def mean_of_replicas(self, value: Tensor) -> Tensor:
        """Mean over replicas, in place."""
        if self._replicas is not None:
            dist.all_reduce(value, group=self._replicas)
            value /= dist.get_world_size(self._replicas)
        return value

    def first_code(self, num_codes: int, device: torch.device) -> int:
        """The global index of this rank's first code: the codes of all lower ranks."""
        if self.group is None:
            return 0
        sizes = torch.zeros(dist.get_world_size(self.group), dtype=torch.int64, device=device)
        rank = dist.get_rank(self.group)
        sizes[rank] = num_codes
        return int(self.sum(sizes)[:rank].sum())

    def _reduce(self, value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            dist.all_reduce(value, op=op, group=self.group)
        return value
