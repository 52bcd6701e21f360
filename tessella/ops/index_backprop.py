"""Index backpropagation quantization (IBQ, arXiv 2412.02692) for codebooks of any size."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tessella.ops._softmax import softmax_codes
from tessella.ops._softmax_parts import row_weights
from tessella.ops._tiles import check_mask, check_temperature, check_vectors, compute_dtype, group_name


def index_backprop(
    z: Tensor,
    codebook: Tensor,
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.25,
    entropy_weight: float = 0.05,
    entropy_temperature: float = 0.01,
    mask: Tensor | None = None,
    replicas: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Quantize by the straight-through one-hot of ``s = softmax_k(z.c_k)``, whose gradient reaches every code.

    With ``k* = argmax_k z.c_k``, ``z_q = (onehot(k*) - sg(s) + s) C`` and ``c = c_{k*}``::

        loss = mean|z_q - z|^2 + commitment_weight mean|sg(c) - z|^2 + codebook_weight mean|c - sg(z)|^2
               + entropy_weight (S - A)
        p = softmax_k(z.c_k / entropy_temperature),  q = mean_n p_n
        S = mean_n H(p_n),  A = -sum_k q_k log(q_k + 1e-5)

    The means run over the rows that ``mask`` keeps. A row that it drops adds nothing to the loss, the statistics or
    their gradients; its ``z_q`` and the gradient that reaches it through ``z_q`` are those of any other row. The
    arithmetic is float32 (float64 for float64 inputs), whatever the dtype of the inputs and under autocast.

    Args:
        z: ``[N, D]``.
        codebook: ``[V, D]``.
        commitment_weight: weight of the term that moves ``z``.
        codebook_weight: weight of the term that moves the codes.
        entropy_weight: weight of ``S - A``; 0 skips its computation.
        entropy_temperature: temperature of ``p``.
        mask: bool ``[N]``; all rows where None.
        replicas: as in :func:`tessella.ops.softmax_entropy`.

    Returns:
        ``z_q`` ``[N, D]`` with the values ``codebook[indices]`` and the codebook's dtype; int64 ``indices`` ``[N]``;
        the scalar ``loss``; and detached scalars ``quantization_error`` (``mean|c - z|^2``), ``quantization_loss``
        (the three quadratic terms) and, unless ``entropy_weight`` is 0, ``sample_entropy`` S, ``batch_entropy`` A and
        ``entropy_loss`` ``S - A``.

    Raises:
        TypeError: ``z`` or ``codebook`` is not a floating tensor, or ``mask`` not a bool tensor.
        ValueError: shapes or devices that do not fit, an empty codebook, or a temperature that is not positive.
    """
    check_vectors(z, codebook)
    check_mask(mask, z)
    check_temperature("entropy_temperature", entropy_temperature)
    weights = (commitment_weight, codebook_weight, entropy_weight)
    return quantize(z, codebook, weights, entropy_temperature, mask, group="", replicas=group_name(replicas))


def quantize(
    z: Tensor,
    codebook: Tensor,
    weights: tuple[float, float, float],
    entropy_temperature: float,
    mask: Tensor | None,
    group: str,
    replicas: str = "",
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """`index_backprop` on the shard of a codebook that this rank of ``group`` holds; "" where there is one shard."""
    commitment_weight, codebook_weight, entropy_weight = weights
    dtype = compute_dtype(z, codebook)
    point = z.to(dtype)
    soft = torch.is_grad_enabled() and (z.requires_grad or codebook.requires_grad)
    z_q, code, indices, entropies, *_ = softmax_codes(
        point, codebook.to(dtype), mask, "dot", entropy_temperature, entropy_weight != 0, soft, group, replicas
    )
    row_mean = row_weights(mask, point)

    def mean_square(difference: Tensor) -> Tensor:
        return (row_mean * difference.square().mean(1)).sum()

    error = mean_square(code.detach() - point)
    loss = mean_square(z_q - point) + commitment_weight * error + codebook_weight * mean_square(code - point.detach())
    metrics = {"quantization_error": error.detach(), "quantization_loss": loss.detach()}
    if entropy_weight != 0:
        sample_entropy, batch_entropy = entropies.unbind()
        entropy_loss = sample_entropy - batch_entropy
        loss = loss + entropy_weight * entropy_loss
        metrics["sample_entropy"] = sample_entropy.detach()
        metrics["batch_entropy"] = batch_entropy.detach()
        metrics["entropy_loss"] = entropy_loss.detach()
    return z_q.to(codebook.dtype), indices, loss, metrics
