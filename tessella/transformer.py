"""The one stack of transformer blocks: causal or full, rotary positions, adaptive norms, a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tessella.attention import CrossAttention, KVCache, Linear, Rotary, SelfAttention, StaticKVCache, remembered

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu", "gelu_tanh"]

_GELU: dict[str, Literal["none", "tanh"]] = {"gelu": "none", "gelu_tanh": "tanh"}


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
