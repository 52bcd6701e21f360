"""Attention: rotary positions on any grid, caches of keys and values, and the layers that use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Rotary:
    r"""Rotary positions (Su et al., arXiv 2104.09864) on a grid of any rank, after a prefix without positions.

    The r axes share the pairs of a head equally: the i-th pair of an axis turns by :math:`n \, base^{-2ir/d_{head}}` at
    coordinate n. Positions follow the grid in raster order; one axis is the usual table of a sequence.

    Args:
        grid: sizes of the axes.
        prefix: positions before the grid, which are not turned.
        prefix_zero: multiply queries and keys of the prefix by 0 instead, as LlamaGen and IBQ do: their tables hold
            cos = sin = 0 for the class token, so all others see it with logit 0.
        repeat: consecutive positions that share a place of the grid.
        overhang: positions after the grid, which continue its raster.
        base: of the geometric series of frequencies.
    """

    grid: tuple[int, ...]
    prefix: int = 0
    prefix_zero: bool = False
    repeat: int = 1
    overhang: int = 0
    base: float = 10000.0

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.prefix + math.prod(self.grid) * self.repeat + self.overhang

    def table(self, head_dim: int) -> Tensor:
        """``[2, length, head_dim]``: cos, and sin with the sign of the pair's first member turned.

        Raises:
            ValueError: ``head_dim`` is no multiple of twice the rank of the grid.
        """
        rank = len(self.grid)
        if head_dim % (2 * rank):
            raise ValueError(
                f"rotary positions on {rank} axes need a head size (dim / num_heads) divisible by {2 * rank}, "
                f"got {head_dim}"
            )
        places = torch.arange(self.length - self.prefix) // self.repeat
        frequencies = self.base ** (-torch.arange(0, head_dim // rank, 2).double() / (head_dim // rank))
        # Coordinates by division rather than unravelling: the first axis goes on past the grid.
        coordinates = []
        for size in reversed(self.grid[1:]):
            coordinates.append(places % size)
            places = places // size
        coordinates.append(places)
        angles = torch.cat([axis[:, None] * frequencies for axis in reversed(coordinates)], dim=-1)
        angles = angles.repeat_interleave(2, dim=-1)
        table = torch.stack([angles.cos(), angles.sin()])
        table[1, :, ::2].neg_()
        head = torch.zeros(2, self.prefix, head_dim, dtype=table.dtype)
        if not self.prefix_zero:
            head[0] = 1
        return torch.cat([head, table], dim=1).float()


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn the interleaved pairs of ``x [..., d]``: ``(a, b) -> (a cos - b sin, b cos + a sin)``."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, signed_sin).type_as(x)


_sampling: ContextVar[bool] = ContextVar("sampling", default=False)


class KVCache:
    """Keys and values of the positions so far, and whatever else stays the same from step to step.

    Written in place; attention reads the part that is filled.

    Args:
        num_layers: of the transformer.
        length: positions there is room for.
    """

    def __init__(self, num_layers: int, length: int) -> None:
        self.length = length
        self.filled = 0
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.constants: dict[str, tuple[Tensor, ...]] = {}
        # Of the inputs of the current step: where they go, what attention reads, and which of that each may see.
        self.rows: slice | Tensor = slice(0)
        self.visible = slice(0)
        self.mask: Tensor | None = None

    def begin(self, count: int, device: torch.device) -> None:
        """Make room for the next ``count`` positions.

        Raises:
            ValueError: there is none.
        """
        end = self.filled + count
        if end > self.length:
            raise ValueError(f"the cache has room for {self.length} positions, {end} are needed")
        self.rows, self.visible = slice(self.filled, end), slice(end)
        seen = torch.ones(count, end, dtype=torch.bool, device=device)
        self.mask = None if count == 1 else seen.tril(self.filled)
        self.filled = end

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``k``, ``v [B, H, count, d]``; returns those to attend to."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.keys[layer], self.values[layer] = keys, values = k.new_zeros(shape), v.new_zeros(shape)
        keys[:, :, self.rows] = k
        values[:, :, self.rows] = v
        return keys[:, :, self.visible], values[:, :, self.visible]

    def once(self, name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tensors ``[B, ...]`` that are the same in every step: computed in the first."""
        if name not in self.constants:
            self.constants[name] = compute()
        return self.constants[name]

    def keep(self, batch_size: int) -> None:
        """Forget all but the first ``batch_size`` samples."""
        self.keys = [None if keys is None else keys[:batch_size] for keys in self.keys]
        self.values = [None if values is None else values[:batch_size] for values in self.values]
        self.constants = {name: tuple(part[:batch_size] for part in parts) for name, parts in self.constants.items()}


class StaticKVCache(KVCache):
    """The same with fixed shapes: attention masks what is not filled, and a compiled step serves every position.

    The number of positions filled is on the device, so reaching the end of the cache goes unnoticed.
    """

    def __init__(self, num_layers: int, length: int, device: torch.device) -> None:
        super().__init__(num_layers, length)
        self.places = torch.arange(length, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, count: int, device: torch.device) -> None:
        """See :meth:`KVCache.begin`."""
        self.rows, self.visible = self.position + self.places[:count], slice(None)
        self.mask = self.places <= self.rows[:, None]
        self.position = self.position + count


@contextmanager
def sampling() -> Iterator[None]:
    """No gradients, and the products of :class:`Linear` in the fastest way, which rounds otherwise than training does.

    For generators alone, drawing tokens or counting their bits: what a tokenizer encodes and decodes must not depend on
    whether gradients are on.
    """
    token = _sampling.set(True)
    try:
        with torch.no_grad():
            yield
    finally:
        _sampling.reset(token)


class Linear(nn.Linear):
    """nn.Linear, within :func:`sampling` faster on the CPU, where a step's time is that of reading the weights.

    With weights W [N, D] and rows X [R, D] there are three ways, each faster than the others somewhere
    (``benchmarks/linear.py``): the BLAS computes W X^T of two columns at the speed of the memory and on all threads,
    where X W^T takes two to four times as long; oneDNN is faster than the BLAS for any other number of rows; and
    training is the default's alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` of ``[..., in]``."""
        dtypes = {x.dtype, self.weight.dtype}
        if (
            torch.compiler.is_compiling() or not _sampling.get() or torch.is_autocast_enabled(x.device.type)
            or x.device.type != "cpu" or dtypes != {torch.float32} or not x.numel()
        ):  # fmt: skip
            return super().forward(x)
        if x.numel() == 2 * self.in_features:
            out = torch.mm(self.weight, x.reshape(2, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
            return out if self.bias is None else out + self.bias
        if torch.backends.mkldnn.is_available():
            # What torch's compiler calls for a linear layer: through F.linear, oneDNN takes and gives only tensors in a
            # layout of its own, and converting them costs a tenth of the time of a row.
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return super().forward(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, is_causal: bool) -> Tensor:
    """Attention ``[B, heads, L, head]`` of ``q`` to ``k`` and ``v``."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # The CPU's gradient in bfloat16 takes over three times that in float32 (benchmarks/linear.py).
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal)
    return functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal)


class SelfAttention(nn.Module):
    """Multi-head attention among the positions."""

    def __init__(self, dim: int, num_heads: int, *, bias: bool, causal: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.out = Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, rotation: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """``x [B, L, dim]``; ``rotation [2, L, 1, head]``, see :meth:`Rotary.table`."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if rotation is None:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        else:
            q, k = rotate(qkv[:, :, :2], *rotation.unsqueeze(2)).transpose(1, 3).unbind(2)
            v = qkv[:, :, 2].transpose(1, 2)
        mask = None
        if cache is not None:
            k, v = cache.append(layer, k, v)
            mask = cache.mask
        dropout = self.dropout if self.training else 0.0
        attended = attend(q, k, v, mask, dropout=dropout, is_causal=self.causal and cache is None)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention to a context of the same width."""

    def __init__(self, dim: int, num_heads: int, *, bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q = Linear(dim, dim, bias=bias)
        self.kv = Linear(dim, 2 * dim, bias=bias)
        self.out = Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """``x [B, L, dim]``, ``context [B, M, dim]``."""

        def keys_and_values() -> tuple[Tensor, ...]:
            k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
            return k.transpose(1, 2), v.transpose(1, 2)

        k, v = remembered(cache, f"context.{layer}", keys_and_values)
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        attended = attend(q, k, v, None, dropout=self.dropout if self.training else 0.0, is_causal=False)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


def remembered(cache: KVCache | None, name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``compute()``, once for the life of the cache if there is one."""
    return compute() if cache is None else cache.once(name, compute)
