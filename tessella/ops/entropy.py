"""The entropies of the soft assignment of vectors to codes, differentiable, for codebooks of any size."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from tessella.ops._softmax import softmax_codes
from tessella.ops._tiles import (
    Metric,
    check_mask,
    check_metric,
    check_temperature,
    check_vectors,
    compute_dtype,
    group_name,
)


def softmax_entropy(
    z: Tensor, codebook: Tensor, temperature: float, metric: Metric = "euclidean", mask: Tensor | None = None,
    replicas: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean entropy ``S`` of each row's assignment, and entropy ``A`` of the batch's mean assignment.

    ::

        p = softmax_k(-|z - c_k|^2 / temperature)  (euclidean)   or   softmax_k(z.c_k / temperature)  (dot)
        S = mean_n H(p_n),   q = mean_n p_n,   A = -sum_k q_k log(q_k + 1e-5)

    A vector quantizer's entropy penalty is ``S - A``. The means run over the rows that ``mask`` keeps. The arithmetic
    is float32 (float64 for float64 inputs), whatever the dtype of the inputs and under autocast.

    Args:
        z: ``[N, D]``.
        codebook: ``[V, D]``.
        temperature: temperature of the assignment.
        metric: ``"euclidean"`` or ``"dot"``.
        mask: bool ``[N]``; all rows where None.
        replicas: ranks whose ``z`` are parts of one batch, as large on each: q is their mean, and the mean over them of
            A's gradients is that of the whole.

    Returns:
        The scalars S and A, with gradients to ``z`` and ``codebook``.

    Raises:
        TypeError: ``z`` or ``codebook`` is not a floating tensor, or ``mask`` not a bool tensor.
        ValueError: shapes or devices that do not fit, an empty codebook, an unknown metric, or a temperature that is
            not positive.
    """
    check_vectors(z, codebook)
    check_metric(metric)
    check_temperature("temperature", temperature)
    check_mask(mask, z)
    # |z - c|^2 / T = (|z|^2 - 2 (z.c - |c|^2/2)) / T: the operator's euclidean scores at half the temperature.
    score_temperature = temperature / 2 if metric == "euclidean" else temperature
    dtype = compute_dtype(z, codebook)
    outputs = softmax_codes(
        z.to(dtype), codebook.to(dtype), mask, metric, score_temperature, True, False, "", group_name(replicas)
    )
    sample_entropy, batch_entropy = outputs[3].unbind()
    return sample_entropy, batch_entropy
