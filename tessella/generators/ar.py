"""Autoregressive generation: one token, or one step of several codebooks, after another (LlamaGen, IBQ, MusicGen)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.attention import Rotary
from tessella.conditioners.base import Conditioner
from tessella.config import build
from tessella.generators.base import Generator, Guidance, Loss
from tessella.generators.heads import CodebookHeads, zero_head
from tessella.generators.orders import Order, delay, flattened, parallel
from tessella.generators.sampling import (
    Rng,
    check_guidance,
    check_settings,
    choose,
    guided_halves,
    inference,
    one_each,
    uniforms,
)
from tessella.tokenizer import TokenSpace
from tessella.transformer import Transformer

_ORDERS = {"flattened": flattened, "delay": delay, "parallel": parallel}

# Draws a step's tokens [B, W] from hidden states [B, dim], or with a scale of guidance [2 B, dim]: of the conditions,
# then of none. Also takes the number of the step, that scale or None, and the step's uniform numbers [B, U].
Draw = Callable[[Tensor, int, float | None, Tensor], Tensor]


class AR(Generator):
    r"""A causal transformer over the condition's vectors and then the tokens in raster order.

    .. math:: L = -\frac{1}{N} \sum_n ln \, p(k_n | k_{<n}, c)

    The class-conditional model of LlamaGen (arXiv 2406.06525) with a label, one codebook and ``grid_zero_prefix``; that
    of IBQ (arXiv 2412.02692) with ``adaln`` too. Each of several codebooks has rows of its own in the embedding and the
    head; the vectors of tokens that are generated together are summed.

    Args:
        space: the tokens.
        conditioner: the section of a conditioner; its vectors start the sequence.
        dim: width.
        num_layers: blocks.
        num_heads: of attention.
        hidden: inner width of the feed-forward layers; None is the transformer's own.
        adaln: modulate the norms by the (mean) condition vector.
        gate_init: see :class:`Transformer`, with ``adaln``.
        order: of several codebooks, see :mod:`tessella.generators.orders`.
        rotary: positions as one sequence; or on the latent grid after a prefix without positions, or after one whose
            queries and keys are zero.
        dropout: after each attention and feed-forward layer.
        token_dropout: on the input vectors.
        attention_dropout: on attention weights.
        checkpoint_activations: trade time for memory in training.
    """

    _can_limit_codes = True
    _takes_shorter = True

    def __init__(
        self,
        space: TokenSpace,
        *,
        conditioner: dict[str, Any],
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden: int | None = None,
        adaln: bool = False,
        gate_init: float = 1e-3,
        order: Literal["flattened", "delay", "parallel"] = "flattened",
        rotary: Literal["sequence", "grid", "grid_zero_prefix"] = "grid",
        dropout: float = 0.1,
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(space)
        self.adaln = adaln
        self.conditioner: Conditioner = build("conditioners", conditioner, dim=dim)
        num_positions, num_tokens = math.prod(space.grid), space.num_codebooks * space.codebook_size
        self._make_order = _ORDERS[order]
        self._shorter: dict[int, Order] = {}
        self.order = _ORDERS[order](num_positions, space.num_codebooks)
        # Where a step has no token for a codebook, one more row says so.
        self.embedding = nn.Embedding(num_tokens + self.order.has_empty, dim)
        self.token_dropout = nn.Dropout(token_dropout)
        self.transformer = Transformer(
            dim, num_layers, num_heads, hidden=hidden, rotary=self._rotary(rotary), adaln=adaln, gate_init=gate_init,
            dropout=dropout, attention_dropout=attention_dropout, checkpoint_activations=checkpoint_activations,
        )  # fmt: skip
        # Steps of one token need the logits of one codebook only.
        self.head: nn.Module = (
            zero_head(dim, num_tokens) if self.order.width == space.num_codebooks
            else CodebookHeads(dim, space.num_codebooks, space.codebook_size)
        )  # fmt: skip
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, indices: Tensor, condition: Tensor | None) -> Loss:
        """See :meth:`Generator.forward`."""
        cross_entropy = self._cross_entropy(indices, condition)
        loss = cross_entropy.mean()
        bits = cross_entropy.detach().mean((0, 1)) / math.log(2)
        metrics = {"bits_per_token": bits.mean()}
        if len(bits) > 1:
            metrics |= {f"bits_per_token_{k}": one for k, one in enumerate(bits)}
        return Loss(loss, metrics)

    @inference
    def bits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """See :meth:`Generator.bits`."""
        bits: Tensor = self._cross_entropy(indices, condition).double().sum((1, 2)) / math.log(2)
        return bits

    def logits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """``[B, T, K, V]`` (float32) for every token of ``indices [B, *S, K]``, given those generated before it.

        Raises:
            ValueError: indices of another shape or range.
        """
        return self._logits(self.hidden_states(indices, condition)).float()

    def hidden_states(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """``[B, S, dim]``, each to predict a step of ``indices [B, *S, K]`` from those before it.

        Raises:
            ValueError: indices of another shape or range.
        """
        self.check_indices(indices)
        flat = indices.flatten(1, -2)
        steps = self._order_of(flat.shape[1]).to_steps(flat)
        prefix = self.conditioner(condition, len(indices))
        x = self.token_dropout(torch.cat([prefix, self._embed(steps[:, :-1], 0)], 1))
        hidden: Tensor = self.transformer(x, condition=self._modulator(prefix))[:, prefix.shape[1] - 1 :]
        return hidden

    @inference
    def sample(
        self,
        condition: Tensor | None,
        *,
        rng: Rng = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: Guidance = 1.0,
        known: Tensor | None = None,
        start: Tensor | None = None,
        num_positions: int | None = None,
    ) -> Tensor:
        """See :meth:`Generator.sample`; progress is the share of steps done.

        Args:
            condition, rng, temperature, top_k, top_p, guidance, known: see there.
            start: ``[B, t, K]``, the first tokens of each sample, which it goes on from.
            num_positions: length of the samples, where the latent grid has one axis; all of it by default.

        Raises:
            ValueError: a setting, a condition or a known token out of range, or a start longer than the samples.

        With guidance the batch is doubled: both halves see the tokens that were drawn from the guided logits. The
        second half ends where no later step is guided.
        """
        check_settings(self.space.codebook_size, temperature=temperature, top_k=top_k, top_p=top_p)

        def draw(hidden: Tensor, step: int, scale: float | None, uniform: Tensor) -> Tensor:
            logits = guided_halves(self._step_logits(hidden, step), scale)
            return choose(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)

        return self._generate(
            condition, one_each(rng, condition), guidance, draw, self.order.width, known=known, start=start,
            num_positions=num_positions,
        )  # fmt: skip

    def _generate(
        self,
        condition: Tensor | None,
        rng: list[torch.Generator],
        guidance: Guidance,
        draw: Draw,
        num_uniforms: int,
        *,
        known: Tensor | None = None,
        start: Tensor | None = None,
        num_positions: int | None = None,
    ) -> Tensor:
        """Indices ``[B, *S, K]``, ``draw`` choosing those of each step with ``num_uniforms`` random numbers."""
        grid = self.space.grid if num_positions is None else (num_positions,)
        order = self._order_of(math.prod(grid))
        given = self._given(known, start, len(rng), grid)
        scales = self._scales(guidance, order.num_steps)
        guides = condition is not None  # without a condition both halves were the same
        num_guided = max((step + 1 for step, scale in enumerate(scales) if guides and scale != 1), default=0)
        x = self.conditioner(condition, len(rng))
        if num_guided:
            x = torch.cat([x, self.conditioner.null(len(rng))])
        modulator = self._modulator(x)
        cache = self.transformer.new_cache(x.shape[1] + order.num_steps - 1, static=x.is_cuda)
        uniform = uniforms(rng, order.num_steps, num_uniforms, device=x.device)
        steps = torch.empty(len(rng), order.num_steps, order.width, dtype=torch.int64, device=x.device)
        for step, scale in enumerate(scales):
            hidden = self.transformer(x, condition=modulator, cache=cache)[:, -1]
            tokens = draw(hidden, step, scale if step < num_guided else None, uniform[:, step])
            if given is not None:
                tokens = torch.where(given[:, step] < 0, tokens, given[:, step])
            steps[:, step] = tokens.masked_fill(order.slots[step] < 0, -1)
            x = self._embed(steps[:, step : step + 1], step)
            if step + 1 < num_guided:
                x = torch.cat([x, x])
            elif step + 1 == num_guided:
                cache.keep(len(rng))
                modulator = None if modulator is None else modulator[: len(rng)]
        return order.from_steps(steps).view(-1, *grid, self.space.num_codebooks)

    def _given(
        self, known: Tensor | None, start: Tensor | None, batch_size: int, grid: tuple[int, ...]
    ) -> Tensor | None:
        """``[B, S, W]``, the tokens of ``known`` or ``start`` in their steps, -1 for those to be drawn."""
        if known is not None:
            self.check_known(known, batch_size)
            if start is not None or known.shape[1:-1] != grid:
                raise ValueError(f"known must cover the samples, {list(grid)} positions, and leaves no room for start")
            return self._order_of(math.prod(grid)).to_steps(known.flatten(1, -2))
        if start is None:
            return None
        self.check_indices(start)
        flat = start.flatten(1, -2)
        if len(grid) != 1 or len(start) != batch_size or flat.shape[1] > grid[0]:
            raise ValueError(
                f"start must be [{batch_size}, t, {self.space.num_codebooks}] with t at most {math.prod(grid)}, of a "
                f"grid of one axis, got {list(start.shape)}"
            )
        whole = functional.pad(flat, (0, 0, 0, grid[0] - flat.shape[1]), value=-1)
        return self._order_of(grid[0]).to_steps(whole)

    def _order_of(self, num_positions: int) -> Order:
        """The order of so many positions."""
        longest = math.prod(self.space.grid)
        if num_positions == longest:
            return self.order
        if len(self.space.grid) != 1 or not 1 <= num_positions <= longest:
            raise ValueError(f"num_positions must be in [1, {longest}] on a grid of one axis, got {num_positions}")
        if num_positions not in self._shorter:
            order = self._make_order(num_positions, self.space.num_codebooks)
            self._shorter[num_positions] = order.to(self.order.slots.device)
        return self._shorter[num_positions]

    def _rotary(self, kind: str) -> Rotary:
        prefix, num_steps = self.conditioner.length, self.order.num_steps
        if kind == "sequence":
            return Rotary((prefix + num_steps,))
        # Flattened, K steps share a place of the grid; delayed, the sequence is K - 1 steps longer than the grid.
        repeat = self.space.num_codebooks if self.order.width == 1 else 1
        overhang = num_steps - repeat * math.prod(self.space.grid)
        return Rotary(
            self.space.grid, prefix=prefix, prefix_zero=kind == "grid_zero_prefix", repeat=repeat, overhang=overhang
        )

    def _scales(self, guidance: Guidance, num_steps: int) -> list[float]:
        scales = [guidance(step / num_steps) if callable(guidance) else guidance for step in range(num_steps)]
        for scale in scales:
            check_guidance(scale)
        return scales

    def _modulator(self, prefix: Tensor) -> Tensor | None:
        return prefix.mean(1) if self.adaln else None

    def _embed(self, steps: Tensor, first: int) -> Tensor:
        """``[B, L, dim]`` of ``steps [B, L, W]`` that begin with step ``first``."""
        codebooks = self.order.codebooks[first : first + steps.shape[1]]
        rows = steps + codebooks * self.space.codebook_size
        if self.order.has_empty:
            rows = torch.where(steps < 0, self.embedding.num_embeddings - 1, rows)
        return self.embedding(rows).sum(-2)  # type: ignore[no-any-return]

    def _cross_entropy(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """``[B, T, K]`` in nats."""
        logits, target = self.logits(indices, condition), indices.flatten(1, -2)
        each: Tensor = functional.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
        return each.view_as(target)

    def _logits(self, hidden: Tensor) -> Tensor:
        """``[B, T, K, V]`` of ``hidden [B, S, dim]``."""
        logits = self.head(hidden)
        if not isinstance(self.head, CodebookHeads):
            overhang = self.order.num_steps - math.prod(self.space.grid)
            order = self._order_of(hidden.shape[1] - overhang)
            logits = order.from_steps(logits.unflatten(-1, (self.space.num_codebooks, -1)))
        return self._within_limits(logits)

    def _step_logits(self, hidden: Tensor, step: int) -> Tensor:
        """``[B, W, V]`` of ``hidden [B, dim]``."""
        if not isinstance(self.head, CodebookHeads):
            return self._within_limits(self.head(hidden).unflatten(-1, (self.space.num_codebooks, -1)))
        codebook = step % self.space.num_codebooks
        return self._within_limits(self.head[codebook](hidden)[:, None], codebook)
