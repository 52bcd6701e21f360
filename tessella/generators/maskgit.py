"""Masked generation (MaskGIT, 2202.04200; with the training of FSQ, 2309.15505): many tokens in each of few steps."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tessella.attention import Linear
from tessella.conditioners.base import Conditioner
from tessella.conditioners.label import Label
from tessella.config import build
from tessella.generators.base import Generator, Guidance, Loss
from tessella.generators.sampling import (
    Rng,
    check_guidance,
    check_settings,
    choose,
    guided,
    inference,
    one_each,
    uniforms,
)
from tessella.generators.schedules import group_ends, low_discrepancy_order, num_remasked, random_masks
from tessella.quantizers.base import check_choice
from tessella.tokenizer import TokenSpace
from tessella.transformer import Transformer

# FSQ's bound on r: at least the share cos(pi/2 (1 - r)) = 0.45 of the tokens is hidden, 0.809 on average.
_MIN_MASK_RATIO = 1 - 2 * math.acos(0.45) / math.pi
_NORM_EPS = 1e-12

UnmaskingOrder = Literal["confidence", "random", "even"]
NormPlacement = Literal["post", "pre"]
_INIT_STD = 0.02


class MaskGIT(Generator):
    r"""BERT over the condition and N = prod(S) K tokens, some of them replaced by MASK.

    Training hides :math:`\lceil cos(\pi/2 (1 - r)) N \rceil` tokens, :math:`r \sim U[r_{min}, 1]`, and minimises their
    cross-entropy, averaged over the hidden tokens of each sample and then over samples. Sampling starts from MASK alone
    and in step t of T draws every hidden token, keeps the most confident and hides :math:`\lfloor cos(\pi/2 (t + 1)/T)
    N \rfloor` again, the confidence being :math:`ln p + c (1 - (t + 1)/T) G` with Gumbel noise G.

    Input and output share one table: the codes, then the conditioner's labels, then MASK. With labels, MASK is their
    null, so that guidance and masking have one "unknown". Each of K > 1 codebooks has V rows of its own in the table,
    and a position is trained against the whole of it but sampled among its own codebook alone. The output therefore
    reads the table rather than calling a layer: an adapter of ``codes`` changes what goes in, not what comes out.

    Args:
        space: the tokens.
        conditioner: the section of a conditioner; its vectors stand before the tokens.
        dim: width.
        num_layers: blocks.
        num_heads: of attention.
        hidden: width inside a block's MLP.
        dropout: after the embeddings, and of what a block adds.
        attention_dropout: of attention weights.
        label_smoothing: probability that the targets spread over the whole table.
        min_mask_ratio: r_min; 0 is MaskGIT's, the default FSQ's.
        num_steps: T, unless sampling says otherwise.
        choice_temperature: c, unless sampling says otherwise.
        order: which drawn tokens a step keeps, unless sampling says otherwise: the most confident; any, at ``random``
            (c beyond all bounds); or in a fixed ``even`` order, whose every prefix covers the grid, that of
            :meth:`bits`.
        norm: ``post``, after the residual sums, is BERT's and the papers'; ``pre``, before each layer and once at the
            end, bears larger learning rates.
    """

    _can_limit_codes = True

    def __init__(
        self,
        space: TokenSpace,
        *,
        conditioner: dict[str, Any],
        dim: int = 768,
        num_layers: int = 24,
        num_heads: int = 16,
        hidden: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        min_mask_ratio: float = _MIN_MASK_RATIO,
        num_steps: int = 12,
        choice_temperature: float = 4.5,
        order: UnmaskingOrder = "confidence",
        norm: NormPlacement = "post",
    ) -> None:
        super().__init__(space)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if not 0 <= min_mask_ratio <= 1:
            raise ValueError(f"min_mask_ratio must lie in [0, 1], got {min_mask_ratio}")
        check_choice("norm", norm, NormPlacement)
        _check_decoding(num_steps, choice_temperature, order)
        self.label_smoothing = label_smoothing
        self.min_mask_ratio = min_mask_ratio
        self.num_steps = num_steps
        self.choice_temperature = choice_temperature
        self.order: UnmaskingOrder = order
        self.conditioner: Conditioner = build("conditioners", conditioner, dim=dim)
        num_codes = space.num_codebooks * space.codebook_size
        self.codes = nn.Embedding(num_codes, dim)
        if not isinstance(self.conditioner, Label):
            self.mask = nn.Parameter(torch.empty(1, dim))
        self.bias = nn.Parameter(torch.zeros(num_codes + len(self._special)))
        self.positions = nn.Parameter(torch.empty(self.conditioner.length + space.sequence_length, dim))
        self.embedding_norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(
            dim,
            num_layers,
            num_heads,
            hidden=hidden,
            norm="layer",
            norm_eps=_NORM_EPS,
            post_norm=norm == "post",
            activation="gelu_tanh",
            bias=True,
            causal=False,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )
        self.head = nn.Sequential(Linear(dim, dim), nn.GELU(approximate="tanh"), nn.LayerNorm(dim, eps=_NORM_EPS))
        # [N]: where the codes of each position's codebook begin in the table.
        first_row = torch.arange(space.sequence_length) % space.num_codebooks * space.codebook_size
        self.register_buffer("first_row", first_row, persistent=False)
        self.reset_parameters()

    first_row: Tensor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """BERT's start: weights of a normal distribution of deviation 0.02 cut at 0.04, biases 0."""
        linear = [m for part in (self.transformer, self.head) for m in part.modules() if isinstance(m, nn.Linear)]
        for layer in linear:
            nn.init.zeros_(layer.bias)
        for weight in (*(layer.weight for layer in linear), self.codes.weight, self._special, self.positions):
            nn.init.trunc_normal_(weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)

    def forward(self, indices: Tensor, condition: Tensor | None) -> Loss:
        """See :meth:`Generator.forward`; the metrics are of the hidden tokens, without smoothing."""
        self.check_indices(indices)
        tokens = indices.flatten(1)
        ratio = self.min_mask_ratio + (1 - self.min_mask_ratio) * torch.rand(len(tokens), device=tokens.device)
        masked = random_masks(ratio, tokens.shape[1])
        features = self._features(tokens, masked, self.conditioner(condition, len(tokens)))
        logits = features @ torch.cat([self.codes.weight, self._special]).T + self.bias
        return masked_cross_entropy(logits, tokens + self.first_row, masked, self.label_smoothing)

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
        num_steps: int | None = None,
        choice_temperature: float | None = None,
        order: UnmaskingOrder | None = None,
    ) -> Tensor:
        """See :meth:`Generator.sample`; the temperature and the truncation are of the draw, not of the confidence.

        Args:
            condition, rng, temperature, top_k, top_p, guidance, known: see there; progress is t / T.
            num_steps: T.
            choice_temperature, order: as in the constructor, whose values are the default.
        """
        check_settings(self.space.codebook_size, temperature=temperature, top_k=top_k, top_p=top_p)
        rng = one_each(rng, condition)
        num_steps = self.num_steps if num_steps is None else num_steps
        choice_temperature = self.choice_temperature if choice_temperature is None else choice_temperature
        order = self.order if order is None else order
        _check_decoding(num_steps, choice_temperature, order)
        device, length = self.codes.weight.device, self.space.sequence_length
        contexts = torch.cat([self.conditioner(condition, len(rng)), self.conditioner.null(len(rng))])
        tokens = torch.zeros(len(rng), length, dtype=torch.long, device=device)
        masked = torch.ones_like(tokens, dtype=torch.bool)
        if known is not None:
            self.check_known(known, len(rng))
            tokens, masked = known.flatten(1).clamp(min=0), known.flatten(1) < 0
        num_hidden = masked.sum(-1, keepdim=True)
        for step in range(num_steps):
            scale = guidance(step / num_steps) if callable(guidance) else guidance
            logits = self._guided_logits(tokens, masked, contexts, scale)
            for_token, for_choice = uniforms(rng, 2, length, device=device).unbind(1)
            drawn = choose(logits, for_token, temperature=temperature, top_k=top_k, top_p=top_p)
            tokens = torch.where(masked, drawn, tokens)
            progress = (step + 1) / num_steps
            if step + 1 < num_steps:
                if order == "confidence":
                    confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
                    confidence += choice_temperature * (1 - progress) * gumbel(for_choice)
                else:
                    confidence = for_choice if order == "random" else self._late_first().expand(len(rng), -1)
                masked = least_confident(confidence, masked, progress, num_hidden)
        return tokens.view(-1, *self.space.grid, self.space.num_codebooks)

    @inference
    def bits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """See :meth:`Generator.bits`; groups of tokens in a fixed order, each given the groups before it (M2T)."""
        self.check_indices(indices)
        tokens = indices.flatten(1)
        context = self.conditioner(condition, len(tokens))
        order = self._even_order().to(tokens.device)
        masked = torch.ones_like(tokens, dtype=torch.bool)
        total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        begin = 0
        for end in group_ends(len(order)):
            group = order[begin:end]
            log_p = self._code_logits(self._features(tokens, masked, context)).log_softmax(-1)
            total -= log_p.gather(-1, tokens[..., None])[:, group, 0].double().sum(-1) / math.log(2)
            masked[:, group] = False
            begin = end
        return total

    def _even_order(self) -> Tensor:
        return low_discrepancy_order((*self.space.grid, self.space.num_codebooks))

    def _late_first(self) -> Tensor:
        """``[N]``, the higher the sooner a position is shown in the fixed order."""
        return -self._even_order().argsort().float().to(self.first_row.device)

    @property
    def _special(self) -> Tensor:
        """``[Q, dim]``, the rows of the table that are not codes; the last is MASK."""
        rows: Tensor = self.conditioner.embedding.weight if isinstance(self.conditioner, Label) else self.mask
        return rows

    def _features(self, tokens: Tensor, masked: Tensor, context: Tensor) -> Tensor:
        """``[B, N, dim]``, to be compared with the rows of the table."""
        embedded = torch.where(masked[..., None], self._special[-1], self.codes(tokens + self.first_row))
        x = self.embedding_norm(torch.cat([context, embedded], 1) + self.positions)
        x = self.transformer(self.dropout(x))
        features: Tensor = self.head(x[:, context.shape[1] :])
        return features

    def _code_logits(self, features: Tensor) -> Tensor:
        """``[B, N, V]`` float32: of the codes of each position's own codebook."""
        num_codebooks, num_codes = self.space.num_codebooks, self.codes.num_embeddings
        table = self.codes.weight.unflatten(0, (num_codebooks, -1))
        bias = self.bias[:num_codes].unflatten(0, (num_codebooks, -1))
        by_codebook = features.unflatten(1, (-1, num_codebooks))
        logits = self._within_limits(torch.einsum("bpkd,kvd->bpkv", by_codebook, table) + bias)
        return logits.flatten(1, 2).float()

    def _guided_logits(self, tokens: Tensor, masked: Tensor, contexts: Tensor, scale: float) -> Tensor:
        """``[B, N, V]``; ``contexts [2 B, M, dim]`` are those of the conditions, then of none."""
        check_guidance(scale)
        if scale == 1:
            return self._code_logits(self._features(tokens, masked, contexts[: len(tokens)]))
        both = self._code_logits(self._features(tokens.repeat(2, 1), masked.repeat(2, 1), contexts))
        conditional, null = both.chunk(2)
        return guided(conditional, null, scale)


def masked_cross_entropy(logits: Tensor, targets: Tensor, masked: Tensor, label_smoothing: float) -> Loss:
    r"""Mean over samples of the mean over their masked positions of :math:`-(1 - e) ln p_y - e/R \sum_j ln p_j`.

    Args:
        logits: ``[B, N, R]``.
        targets: y ``[B, N]``.
        masked: ``[B, N]``, at least one True in each row.
        label_smoothing: e.
    """
    log_p = logits.float().log_softmax(-1)
    nll = -log_p.gather(-1, targets[..., None])[..., 0]
    weight = masked / (masked.sum(-1, keepdim=True) * len(masked))
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
    hits = logits.argmax(-1) == targets
    return Loss(
        (weight * loss).sum(),
        {"bits_per_masked_token": (weight * nll).sum().detach() / math.log(2), "accuracy": (weight * hits).sum()},
    )


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise ``-ln(-ln u)`` of numbers in [0, 1); finite at 0."""
    return -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log()


def least_confident(confidence: Tensor, masked: Tensor, progress: float, num_hidden: Tensor | None = None) -> Tensor:
    """The positions ``[B, N]`` to hide again: see :func:`num_remasked`; of those tied with the first kept one, none.

    Args:
        confidence: ``[B, N]``; only that of masked positions counts, others stay shown.
        masked: ``[B, N]``, before the step.
        progress: (t + 1) / T.
        num_hidden: ``[B, 1]``, how many were hidden at the start; all of them by default.
    """
    confidence = confidence.masked_fill(~masked, torch.inf)
    length = masked.shape[1]
    num_masked = masked.sum(-1, keepdim=True)
    all_of_them = torch.full_like(num_masked, length) if num_hidden is None else num_hidden
    first_kept = num_remasked(progress, num_masked, all_of_them).clamp(max=length - 1)
    return confidence < confidence.sort(-1).values.gather(-1, first_kept)


def _check_decoding(num_steps: int, choice_temperature: float, order: UnmaskingOrder) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not choice_temperature >= 0:
        raise ValueError(f"choice_temperature must be >= 0, got {choice_temperature}")
    check_choice("order", order, UnmaskingOrder)
