"""Masked bit autoregressive modelling (BAR, 2602.09024): position by position, the bits of each in a few rounds."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.attention import Linear
from tessella.config import resolve
from tessella.generators.ar import AR
from tessella.generators.base import Guidance, Loss
from tessella.generators.heads import CodebookHeads
from tessella.generators.maskgit import gumbel, least_confident
from tessella.generators.sampling import Rng, check_settings, choose, guided_halves, inference, one_each
from tessella.tokenizer import TokenSpace
from tessella.transformer import Transformer


class MaskedHead(nn.Module):
    """p(hidden digits | shown digits, h) of one position: a small bidirectional transformer whose norms h modulates.

    Args:
        in_dim: width of h.
        num_codebooks: K digits.
        codebook_size: V values of each.
        dim: width.
        num_layers: blocks.
        num_heads: of attention.
        hidden: width inside a block's MLP; None is the transformer's own.
    """

    def __init__(
        self,
        in_dim: int,
        num_codebooks: int,
        codebook_size: int,
        *,
        dim: int,
        num_layers: int = 3,
        num_heads: int = 4,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        # A digit's vector, or that of its absence, also tells which digit it is: attention needs no positions.
        self.values = nn.Embedding(num_codebooks * codebook_size, dim)
        self.masks = nn.Parameter(torch.empty(num_codebooks, dim))
        self.condition = Linear(in_dim, dim)
        self.transformer = Transformer(
            dim, num_layers, num_heads, hidden=hidden, causal=False, adaln=True, gate_init=1.0
        )
        self.heads = CodebookHeads(dim, num_codebooks, codebook_size)
        for weight in (self.values.weight, self.masks):
            nn.init.normal_(weight, std=dim**-0.5)

    def forward(self, h: Tensor, digits: Tensor, masked: Tensor) -> Tensor:
        """Logits ``[N, K, V]`` of every digit, for ``h [N, in_dim]`` and ``digits [N, K]``, hidden where ``masked``."""
        first = torch.arange(len(self.masks), device=digits.device) * self.codebook_size
        x = torch.where(masked[..., None], self.masks, self.values(digits + first))
        logits: Tensor = self.heads(self.transformer(x, condition=self.condition(h)))
        return logits[:, 0]


class MaskedBits(AR):
    r"""A causal transformer over positions, and a masked model of the K digits of each position.

    Its tokens are the K codebooks of a space; inside :class:`Digits` they are the channels of FSQ or the bits of LFQ
    and BSQ (``bases`` all 2), so no layer has the size of the codebook. The paper's head is residual blocks over all
    bits of a code at once; this one attends among the digits, of any number of values. Both are modulated by h. How
    many digits training hides is our choice, for what the loss then is.

    .. math:: L = E_m E_{|M| = m} \frac{1}{m} \sum_{i \in M} -ln \, p(t_i | t_{\notin M}, h), \quad m \sim U\{1..K\}

    with the hidden digits M any m of the K, and h the transformer's state before the position. So K L is the mean code
    length of a position over all orders of showing its digits one by one, and compares with that of other generators.

    Sampling shows all digits of a position in R rounds. As in MaskGIT, a round draws every hidden digit, keeps the most
    confident and leaves :math:`\lfloor K cos(\pi/2 \, r/R) \rfloor` hidden, the confidence being ln p plus
    :math:`c (1 - r/R)` times Gumbel noise: of 16 bits in four rounds 2, 3, 5 and 6. Code length is counted digit by
    digit, each given those before it, which a decoder can follow.

    Args:
        space: the tokens, of at least two codebooks.
        conditioner, dim, num_layers, num_heads, hidden, adaln, gate_init, rotary, dropout, token_dropout,
            attention_dropout, checkpoint_activations: of the transformer over positions; see :class:`AR`.
        head: the arguments of :class:`MaskedHead` that are not here.
        num_rounds: R, unless sampling says otherwise; more than K are K.
        choice_temperature: c, unless sampling says otherwise.

    Raises:
        ValueError: one codebook only, or a setting out of range.
    """

    head: MaskedHead

    def __init__(
        self,
        space: TokenSpace,
        *,
        conditioner: dict[str, Any],
        dim: int,
        num_layers: int,
        num_heads: int,
        head: dict[str, Any],
        hidden: int | None = None,
        adaln: bool = False,
        gate_init: float = 1e-3,
        rotary: Literal["sequence", "grid", "grid_zero_prefix"] = "grid",
        dropout: float = 0.1,
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        checkpoint_activations: bool = False,
        num_rounds: int = 4,
        choice_temperature: float = 0.0,
    ) -> None:
        if space.num_codebooks < 2:
            raise ValueError("masked_bits needs several codebooks a position, got one; put it inside digits, as its "
                             "generator, for the channels or bits of a code")  # fmt: skip
        _check_rounds(num_rounds, choice_temperature)
        super().__init__(
            space, conditioner=conditioner, dim=dim, num_layers=num_layers, num_heads=num_heads, hidden=hidden,
            adaln=adaln, gate_init=gate_init, order="parallel", rotary=rotary, dropout=dropout,
            token_dropout=token_dropout, attention_dropout=attention_dropout,
            checkpoint_activations=checkpoint_activations,
        )  # fmt: skip
        given = frozenset({"in_dim", "num_codebooks", "codebook_size"})
        settings = resolve(MaskedHead, head, where="head", given=given)
        self.head = MaskedHead(dim, space.num_codebooks, space.codebook_size, **settings)
        self.num_rounds = num_rounds
        self.choice_temperature = choice_temperature

    def forward(self, indices: Tensor, condition: Tensor | None) -> Loss:
        """See :meth:`Generator.forward`; ``bits_per_token`` is the mean over all orders, of each of the K tokens."""
        h = self.hidden_states(indices, condition).flatten(0, 1)
        digits = indices.flatten(0, -2)
        num_masked = torch.randint(1, digits.shape[1] + 1, (len(digits), 1), device=digits.device)
        masked = torch.rand(digits.shape, device=digits.device).argsort(-1) < num_masked
        logits = self._within_limits(self.head(h, digits, masked)).float()
        nll = functional.cross_entropy(logits.flatten(0, 1), digits.flatten(), reduction="none").view_as(digits)
        loss = (nll * masked / num_masked).sum(-1).mean()
        return Loss(loss, {"bits_per_token": loss.detach() / math.log(2)})

    def logits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """``[B, T, K, V]`` (float32) for every digit, given the positions and the digits of its own before it.

        Raises:
            ValueError: indices of another shape or range.
        """
        h = self.hidden_states(indices, condition)
        digits = indices.flatten(0, -2)
        places = torch.arange(digits.shape[1], device=digits.device)
        by_digit = [self.head(h.flatten(0, 1), digits, (places >= k).expand_as(digits))[:, k] for k in places.tolist()]
        logits: Tensor = self._within_limits(torch.stack(by_digit, 1)).float().unflatten(0, h.shape[:2])
        return logits

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
        num_rounds: int | None = None,
        choice_temperature: float | None = None,
    ) -> Tensor:
        """See :meth:`AR.sample`; temperature and truncation are of the draw of each digit, not of the confidence.

        Args:
            condition, rng, temperature, top_k, top_p, guidance, known, start, num_positions: see there.
            num_rounds, choice_temperature: as in the constructor, whose values are the default.
        """
        check_settings(self.space.codebook_size, temperature=temperature, top_k=top_k, top_p=top_p)
        num_rounds = self.num_rounds if num_rounds is None else num_rounds
        noise = self.choice_temperature if choice_temperature is None else choice_temperature
        _check_rounds(num_rounds, noise)
        num_digits = self.space.num_codebooks
        num_rounds = min(num_rounds, num_digits)

        def draw(h: Tensor, step: int, scale: float | None, uniform: Tensor) -> Tensor:
            digits = torch.zeros(len(uniform), num_digits, dtype=torch.int64, device=h.device)
            masked = torch.ones_like(digits, dtype=torch.bool)
            copies = len(h) // len(digits)  # both halves of a guided batch see the same digits
            for number, numbers in enumerate(uniform.unflatten(1, (num_rounds, 2, -1)).unbind(1), start=1):
                for_digit, for_choice = numbers.unbind(1)
                every = self._within_limits(self.head(h, digits.repeat(copies, 1), masked.repeat(copies, 1)))
                logits = guided_halves(every, scale).float()
                drawn = choose(logits, for_digit, temperature=temperature, top_k=top_k, top_p=top_p)
                digits = torch.where(masked, drawn, digits)
                if number < num_rounds:
                    confidence = logits.log_softmax(-1).gather(-1, digits[..., None])[..., 0]
                    confidence += noise * (1 - number / num_rounds) * gumbel(for_choice)
                    masked = least_confident(confidence, masked, number / num_rounds)
            return digits

        return self._generate(
            condition, one_each(rng, condition), guidance, draw, num_rounds * 2 * num_digits, known=known,
            start=start, num_positions=num_positions,
        )  # fmt: skip


def _check_rounds(num_rounds: int, choice_temperature: float) -> None:
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
    if not choice_temperature >= 0:
        raise ValueError(f"choice_temperature must be >= 0, got {choice_temperature}")
