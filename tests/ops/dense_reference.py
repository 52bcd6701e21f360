"""The dense forms, with N x V tensors and plain autograd, that the operations must agree with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def dense_scores(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    scores = z @ codebook.T
    return scores if metric == "dot" else scores - 0.5 * codebook.square().sum(-1)


def dense_entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    q = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -(q * (q + 1e-5).log()).sum()


def dense_softmax_entropy(
    z: Tensor, codebook: Tensor, temperature: float, metric: str = "euclidean", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    z = z if mask is None else z[mask]
    if metric == "dot":
        return dense_entropies(z @ codebook.T / temperature)
    return dense_entropies(-(z[:, None] - codebook).square().sum(-1) / temperature)


def dense_index_backprop(
    z: Tensor,
    codebook: Tensor,
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.25,
    entropy_weight: float = 0.05,
    entropy_temperature: float = 0.01,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    keep = torch.ones(len(z), dtype=torch.bool) if mask is None else mask
    logits = z @ codebook.T
    s = logits.softmax(-1)
    indices = s.argmax(-1)
    hard = one_hot(indices, len(codebook)).to(s)
    z_q = (hard - s.detach() + s) @ codebook
    code = hard @ codebook

    def mean_square(difference: Tensor) -> Tensor:
        return difference[keep].square().mean()

    loss = mean_square(z_q - z)
    loss = loss + commitment_weight * mean_square(code.detach() - z) + codebook_weight * mean_square(code - z.detach())
    sample, batch = dense_entropies(logits[keep] / entropy_temperature)
    metrics = {
        "quantization_error": mean_square(code - z).detach(),
        "quantization_loss": loss.detach(),
        "sample_entropy": sample.detach(),
        "batch_entropy": batch.detach(),
        "entropy_loss": (sample - batch).detach(),
    }
    return z_q, indices, loss + entropy_weight * (sample - batch), metrics


def quantized_normal(*shape: int, seed: int) -> Tensor:
    """Normal numbers rounded to multiples of 1/4."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4).round() / 4


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest tensor that any one operator made, custom operators' insides included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return max(event.self_cpu_memory_usage for event in profiler.events())
