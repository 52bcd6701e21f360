"""The one stack of transformer blocks: causal or full, rotary positions, adaptive norms, a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu", "gelu_tanh"]

_GELU: dict[str, Literal["none", "tanh"]] = {"gelu": "none", "gelu_tanh": "tanh"}


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


_sampling: ContextVar[bool] = ContextVar("sampling", default=False)


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


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * value(x))`` (SwiGLU, gate and value in one matrix) or ``down(gelu(up(x)))``."""

    def __init__(self, dim: int, hidden: int, *, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(dim, 2 * hidden if activation == "swiglu" else hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, dim]``."""
        inner = self.up(x)
        if self.activation == "swiglu":
            gate, value = inner.chunk(2, dim=-1)
            inner = functional.silu(gate) * value
        else:
            inner = functional.gelu(inner, approximate=_GELU[self.activation])
        out: Tensor = self.down(inner)
        return out


class Modulation(nn.Module):
    """``num_parts`` vectors from the condition (AdaLN): a linear layer after SiLU."""

    def __init__(self, dim: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.linear = Linear(dim, num_parts * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """``num_parts`` tensors ``[B, 1, dim]`` of ``condition [B, dim]``."""
        parts: Tensor = self.linear(functional.silu(condition))
        return parts[:, None].chunk(self.num_parts, dim=-1)


class Block(nn.Module):
    r"""Attention, attention to the context if there is one, feed-forward; each with its norm and residual connection.

    .. math:: h = x + g_1 Attn(norm(x) (1 + s_1) + b_1), \; y = h + g_2 FFN(norm(h) (1 + s_2) + b_2)

    with g, s, b from the condition where norms are adaptive, else g = 1, s = b = 0. Post-norm: ``norm(x + f(x))``.
    """

    def __init__(
        self, layer: int, dim: int, num_heads: int, hidden: int, *, norm: Norm, norm_eps: float, post_norm: bool,
        activation: Activation, bias: bool, causal: bool, adaln: bool, context_attention: bool, dropout: float,
        attention_dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer = layer
        self.post_norm = post_norm
        self.attention_norm = make_norm(norm, dim, norm_eps)
        self.attention = SelfAttention(dim, num_heads, bias=bias, causal=causal, dropout=attention_dropout)
        if context_attention:
            self.context_norm = make_norm(norm, dim, norm_eps)
            self.context_attention = CrossAttention(dim, num_heads, bias=bias, dropout=attention_dropout)
        self.feed_forward_norm = make_norm(norm, dim, norm_eps)
        self.feed_forward = FeedForward(dim, hidden, activation=activation, bias=bias)
        self.modulation = Modulation(dim, 6) if adaln else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        condition: Tensor | None = None,
        context: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """``[B, L, dim]``; arguments as for :class:`Transformer`."""
        parts: tuple[Tensor, ...] = ()  # g_1, g_2, s_1, s_2, b_1, b_2
        if self.modulation is not None:
            assert condition is not None
            parts = remembered(cache, f"modulation.{self.layer}", partial(self.modulation, condition))
        x = self._add(
            x, self.attention_norm, lambda y: self.attention(y, rotation, cache, self.layer), parts[0::2]
        )  # fmt: skip
        if context is not None:
            x = self._add(x, self.context_norm, lambda y: self.context_attention(y, context, cache, self.layer))
        return self._add(x, self.feed_forward_norm, self.feed_forward, parts[1::2])

    def _add(
        self, x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor], modulation: tuple[Tensor, ...] = ()
    ) -> Tensor:
        out: Tensor
        if self.post_norm:
            out = norm(x + self.dropout(f(x)))
        elif modulation:
            gate, scale, shift = modulation
            out = x + gate * self.dropout(f(norm(x) * (1 + scale) + shift))
        else:
            out = x + self.dropout(f(norm(x)))
        return out


class Transformer(nn.Module):
    """Block stack ``[B, L, dim]`` to ``[B, L, dim]``; no embeddings, no head.

    Args:
        dim: width.
        num_layers: number of blocks.
        num_heads: of every attention; divides ``dim``.
        hidden: inner width of the feed-forward layers; by default 8/3 dim rounded up to a multiple of 256 for swiglu
            (LlamaGen's sizes), 4 dim for gelu.
        norm: RMSNorm or LayerNorm.
        norm_eps: added under the root of the norm.
        post_norm: norms after the residual sums (BERT) rather than before each layer; then there is no final norm.
        activation: of the feed-forward layers; gelu_tanh is its tanh approximation.
        bias: of all linear layers but those of adaptive norms, which have one.
        rotary: positions of the sequence; without, attention knows none.
        causal: whether a position sees only itself and those before it.
        adaln: adaptive norms, modulated by the condition.
        gate_init: with ``adaln``, scale of the initial weights that make the gates (g_1, g_2).
        context_attention: whether every block also attends to a context.
        dropout: after each attention and feed-forward layer.
        attention_dropout: on attention weights.
        final_norm: whether a norm follows the last block.
        init_std: standard deviation of the initial weights.
        checkpoint_activations: recompute blocks in the backward pass instead of keeping what is inside them.

    Raises:
        ValueError: sizes that do not go together.
    """

    rotation: Tensor | None

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        *,
        hidden: int | None = None,
        norm: Norm = "rms",
        norm_eps: float = 1e-5,
        post_norm: bool = False,
        activation: Activation = "swiglu",
        bias: bool = False,
        rotary: Rotary | None = None,
        causal: bool = True,
        adaln: bool = False,
        gate_init: float = 1e-3,
        context_attention: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        final_norm: bool = True,
        init_std: float = 0.02,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")
        if post_norm and adaln:
            raise ValueError("adaln modulates the norms before each layer; post_norm has none")
        self.causal = causal
        self.adaln = adaln
        self.gate_init = gate_init
        self.context_attention = context_attention
        self.init_std = init_std
        self.checkpoint_activations = checkpoint_activations
        self.blocks = nn.ModuleList(
            Block(
                layer, dim, num_heads, hidden or default_hidden(dim, activation), norm=norm, norm_eps=norm_eps,
                post_norm=post_norm, activation=activation, bias=bias, causal=causal, adaln=adaln,
                context_attention=context_attention, dropout=dropout, attention_dropout=attention_dropout,
            )
            for layer in range(num_layers)
        )  # fmt: skip
        self.norm = make_norm(norm, dim, norm_eps) if final_norm and not post_norm else None
        self.modulation = Modulation(dim, 2) if adaln and self.norm is not None else None
        table = None if rotary is None else rotary.table(dim // num_heads)[:, :, None]
        self.register_buffer("rotation", table, persistent=False)  # [2, L, 1, head]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers N(0, init_std), biases 0; modulations half of that, but gates ``gate_init`` of it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        for modulation in (module for module in self.modules() if isinstance(module, Modulation)):
            gates = max(0, modulation.num_parts - 4) * modulation.linear.in_features
            with torch.no_grad():
                modulation.linear.weight[:gates] *= self.gate_init
                modulation.linear.weight[gates:] *= 0.5

    def forward(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        context: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states ``[B, L, dim]``.

        Args:
            x: ``[B, L, dim]``; the sequence from its start, or with a cache what comes after the positions in it.
            condition: ``[B, dim]``, of adaptive norms.
            context: ``[B, M, dim]``, of attention to a context.
            cache: from :meth:`new_cache`; is extended by the L positions. Holds what follows from ``condition`` and
                ``context`` too, which must not change while it is in use.

        Raises:
            ValueError: an input that this stack needs is missing, one that it has no use for is given, or there are
                more positions than rotary ones.
        """
        self._check(x, condition, context, cache)
        count = x.shape[1]
        rows: slice | Tensor = slice(count)
        if cache is not None:
            cache.begin(count, x.device)
            rows = cache.rows
        rotation = None if self.rotation is None else self.rotation[:, rows]
        for block in self.blocks:
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, condition, context, use_reentrant=False)
            else:
                x = block(x, rotation, condition, context, cache)
        if self.norm is None:
            return x
        x = self.norm(x)
        if self.modulation is None:
            return x
        assert condition is not None
        scale, shift = remembered(cache, "modulation", partial(self.modulation, condition))
        return x * (1 + scale) + shift

    def new_cache(self, length: int, *, static: bool = False) -> KVCache:
        """An empty cache of ``length`` positions.

        Args:
            length: positions there is room for.
            static: all shapes the same at every step, for compiled steps.
        """
        device = next(self.parameters()).device
        return StaticKVCache(len(self.blocks), length, device) if static else KVCache(len(self.blocks), length)

    def _check(self, x: Tensor, condition: Tensor | None, context: Tensor | None, cache: KVCache | None) -> None:
        for name, value, used in (("condition", condition, self.adaln), ("context", context, self.context_attention)):
            if (value is not None) != used:
                raise ValueError(f"this transformer {'needs a' if used else 'takes no'} {name}")
        if cache is not None and not self.causal:
            raise ValueError("only a causal transformer can use a cache")
        length = x.shape[1] if cache is None else cache.length
        if self.rotation is not None and length > self.rotation.shape[1]:
            raise ValueError(f"{length} positions, but the rotary table has {self.rotation.shape[1]}")


def make_norm(norm: Norm, dim: int, eps: float) -> nn.Module:
    """RMSNorm or LayerNorm."""
    return nn.RMSNorm(dim, eps) if norm == "rms" else nn.LayerNorm(dim, eps)


def default_hidden(dim: int, activation: Activation) -> int:
    """Inner width of a feed-forward layer: as many weights as one of 4 dim has, for swiglu in multiples of 256."""
    return 4 * dim if activation != "swiglu" else math.ceil(int(8 * dim / 3) / 256) * 256


def remembered(cache: KVCache | None, name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``compute()``, once for the life of the cache if there is one."""
    return compute() if cache is None else cache.once(name, compute)
