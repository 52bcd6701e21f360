"""An encoder of the condition and an autoregressive decoder that attends to it: stage II of UViM (arXiv 2205.10337)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.attention import KVCache, Linear
from tessella.conditioners.base import Conditioner
from tessella.config import build
from tessella.generators.base import Generator, Guidance, Loss
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

_START = 0


class EncoderDecoder(Generator):
    r"""A causal transformer over the tokens in raster order, with cross-attention to the condition's vectors.

    .. math:: L = -\frac{1}{N} \sum_n ln \, p(k_n + 1 | 0, k_{<n} + 1, c)

    The condition's encoder is its conditioner: for dense prediction a ViT. Code k is token k + 1; token 0 starts the
    sequence. The loss is over all V + 1 tokens, as published; in sampling and in code lengths token 0 has no
    probability. Positions are learned, blocks are pre-norm with LayerNorm and tanh GELU, the head starts at zero.

    Args:
        space: the tokens, of one codebook.
        conditioner: the section of a conditioner; its vectors are what every block attends to.
        dim: width.
        num_layers: blocks.
        num_heads: of attention.
        hidden: inner width of the feed-forward layers; None is 4 ``dim``.
        dropout: after each attention and feed-forward layer.
        attention_dropout: on attention weights.
        checkpoint_activations: trade time for memory in training.

    Raises:
        ValueError: several codebooks.
    """

    _can_limit_codes = True

    def __init__(
        self,
        space: TokenSpace,
        *,
        conditioner: dict[str, Any],
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(space)
        if space.num_codebooks != 1:
            raise ValueError(f"encoder_decoder writes tokens of one codebook, these are of {space.num_codebooks}")
        self.conditioner: Conditioner = build("conditioners", conditioner, dim=dim)
        self.num_steps = math.prod(space.grid)
        self.embedding = nn.Embedding(1 + space.codebook_size, dim)
        self.positions = nn.Parameter(torch.randn(self.num_steps, dim) * dim**-0.5)
        self.transformer = Transformer(
            dim, num_layers, num_heads, hidden=hidden, norm="layer", activation="gelu_tanh", bias=True,
            context_attention=True, dropout=dropout, attention_dropout=attention_dropout,
            checkpoint_activations=checkpoint_activations,
        )  # fmt: skip
        self.head = Linear(dim, 1 + space.codebook_size)
        # N(0, 1) rows as published; zero weights, so that the first loss is ln(V + 1) exactly.
        nn.init.normal_(self.embedding.weight)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, indices: Tensor, condition: Tensor | None) -> Loss:
        """See :meth:`Generator.forward`."""
        logits, tokens = self._teacher_forced(indices, condition)
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return Loss(loss, {"bits_per_token": loss.detach() / math.log(2)})

    @inference
    def bits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """See :meth:`Generator.bits`."""
        logits = self.logits(indices, condition)
        nats = functional.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none")
        return nats.view(len(indices), -1).double().sum(1) / math.log(2)

    def logits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """``[B, N, V]`` (float32) for every token of ``indices [B, *S, 1]``, given those before it.

        Raises:
            ValueError: indices of another shape or range.
        """
        return self._codes_alone(self._teacher_forced(indices, condition)[0])

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
    ) -> Tensor:
        """See :meth:`Generator.sample`; progress is the share of tokens drawn. Dense prediction takes temperature 0."""
        check_settings(self.space.codebook_size, temperature=temperature, top_k=top_k, top_p=top_p)
        scales = [guidance(n / self.num_steps) if callable(guidance) else guidance for n in range(self.num_steps)]
        for scale in scales:
            check_guidance(scale)
        rng = one_each(rng, condition)
        if known is not None:
            self.check_known(known, len(rng))
            known = known.flatten(1)
        context = self.conditioner(condition, len(rng))
        guides = condition is not None and any(scale != 1 for scale in scales)
        if guides:
            context = torch.cat([context, self.conditioner.null(len(rng))])
        cache = self.transformer.new_cache(self.num_steps, static=context.is_cuda)
        uniform = uniforms(rng, self.num_steps, device=context.device)
        tokens = torch.full((len(rng), 1), _START, device=context.device)
        drawn = []
        for step, scale in enumerate(scales):
            both = torch.cat([tokens, tokens]) if guides else tokens
            logits = self._codes_alone(self._step(both, step, context, cache))
            logits = guided_halves(logits, scale if guides else None)
            codes = choose(logits, uniform[:, step], temperature=temperature, top_k=top_k, top_p=top_p)
            if known is not None:
                codes = torch.where(known[:, step] < 0, codes, known[:, step])
            drawn.append(codes)
            tokens = codes[:, None] + 1
        return torch.stack(drawn, 1).view(-1, *self.space.grid, 1)

    def _teacher_forced(self, indices: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits ``[B, N, V + 1]`` (float32) and the tokens ``[B, N]`` they are for."""
        self.check_indices(indices)
        tokens = indices.flatten(1) + 1
        context = self.conditioner(condition, len(indices))
        before = functional.pad(tokens[:, :-1], (1, 0), value=_START)
        hidden = self.transformer(self.embedding(before) + self.positions, context=context)
        return self.head(hidden).float(), tokens

    def _step(self, tokens: Tensor, step: int, context: Tensor, cache: KVCache) -> Tensor:
        """Logits ``[B, V + 1]`` of the token after ``tokens [B, 1]``, which is number ``step``."""
        x = self.embedding(tokens) + self.positions[step]
        logits: Tensor = self.head(self.transformer(x, context=context, cache=cache)[:, -1])
        return logits.float()

    def _codes_alone(self, logits: Tensor) -> Tensor:
        """``[..., V]`` of ``[..., V + 1]``: the start token is no code."""
        return self._within_limits(logits[..., 1:], 0)
