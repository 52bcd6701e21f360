"""From logits to tokens: temperature, truncation, guidance, and noise that belongs to a sample, not to its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tessella.attention import sampling

# What `sample` draws with: a seed, one generator, one for each sample, or whatever torch's own generator gives.
Rng = int | torch.Generator | Sequence[torch.Generator] | None

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One random generator (on the CPU, the same on every machine) for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample_seed(seed: int, number: int) -> int:
    """A seed of its own for each sample of each run: neighbours share nothing.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"a seed must be at least 0, got {seed}")
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def one_each(rng: Rng, condition: Tensor | None) -> list[torch.Generator]:
    """One random generator (on the CPU) for each sample, of whatever ``sample`` was given.

    Args:
        rng: a sequence holds one for each sample. A seed s gives sample n that of :func:`sample_seed` (s, n), so a
            sample is the same in any batch that it is the n-th of. One generator, on any device, gives each sample a
            seed and moves on; None does so with torch's global one.
        condition: says how many samples there are where ``rng`` does not; there is one without.

    Raises:
        ValueError: a negative seed.
    """
    if not (rng is None or isinstance(rng, int | torch.Generator)):
        return list(rng)
    count = 1 if condition is None else len(condition)
    if isinstance(rng, int):
        return generators(sample_seed(rng, number) for number in range(count))
    device = "cpu" if rng is None else rng.device
    return generators(torch.randint(2**63 - 1, (count,), generator=rng, device=device).tolist())


def inference(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Run a module's method in eval mode and without gradients; the mode of every part is restored."""

    @wraps(method)
    def run(self: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        try:
            with sampling():
                return method(self, *args, **kwargs)
        finally:
            for part, training in modes:
                part.training = training

    return run


def uniforms(rng: Sequence[torch.Generator], *shape: int, device: torch.device | None = None) -> Tensor:
    """Uniform numbers in [0, 1) ``[B, *shape]``, row b drawn from ``rng[b]`` alone."""
    return torch.stack([torch.rand(shape, generator=one) for one in rng]).to(device)


def check_settings(codebook_size: int, *, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse sampling settings out of range.

    Raises:
        ValueError: names the setting and what is accepted.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= codebook_size:
        raise ValueError(f"top_k must lie in [1, {codebook_size}] (the codebook size), got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def check_guidance(scale: float) -> None:
    """Refuse a guidance scale that is negative or no finite number.

    Raises:
        ValueError: it is.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance must be >= 0 (1 is none), got {scale}")


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``l_null + s (l_cond - l_null)``; MaskGIT's ``l_cond + a (l_cond - l_null)`` is s = 1 + a."""
    return unconditional + scale * (conditional - unconditional)


def guided_halves(logits: Tensor, scale: float | None) -> Tensor:
    """``[B, ...]`` of ``logits [2 B, ...]``, those of the conditions and then of none; unchanged where not guided."""
    if scale is None:
        return logits
    conditional, null = logits.chunk(2)
    # Without the difference where it does not count: 1 is none to the last bit.
    return conditional if scale == 1 else guided(conditional, null, scale)


def truncated(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """``logits [..., V]`` with -inf for tokens outside the k likeliest, then outside the nucleus of mass ``top_p``.

    The token that crosses ``top_p`` is kept; tokens tied with the k-th likeliest are all kept.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def choose(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Tokens ``[...]`` drawn from ``softmax(logits / temperature)`` by inverting its distribution function.

    Args:
        logits: ``[..., V]``.
        uniform: ``[...]`` in [0, 1).
        temperature: 0 takes the likeliest token, the first one of equals.
        top_k, top_p: see :func:`truncated`, after the temperature.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = truncated(logits / temperature, top_k=top_k, top_p=top_p).softmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # Relative to the last entry, which rounding keeps from being exactly 1; right: a token of probability 0 is skipped.
    threshold = uniform.to(torch.float64)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
