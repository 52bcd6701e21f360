"""Gumbel-softmax quantization (Jang et al., arXiv 1611.01144; Ramesh et al., arXiv 2102.12092), the baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.quantizers.base import Quantized, Quantizer, check_positive, check_weights, masked_mean


class GumbelVQ(Quantizer):
    r"""Logits are a linear map of z; training draws a code with Gumbel noise, evaluation takes the largest logit.

    .. math:: y = softmax((l + g) / temperature), \quad \hat z = \sum_k (onehot(argmax\,y) + y - sg(y))_k e_k

    .. math:: L = w_{KL}\,mean_n KL(softmax(l_n) \| uniform)

    The noise comes from torch's global generator. Logits and probabilities are [N, V] tensors: this is the classic
    dense form, for small codebooks.

    Args:
        codebook_size: V.
        dim: D.
        temperature: of the relaxation; :meth:`set_temperature` anneals it, and it is part of the state dict.
        kl_weight: w_KL.
    """

    temperature: Tensor

    def __init__(self, codebook_size: int, dim: int, *, temperature: float = 1.0, kl_weight: float = 5e-4) -> None:
        super().__init__(dim, codebook_size)
        check_weights(kl_weight=kl_weight)
        self.kl_weight = kl_weight
        self.projection = nn.Linear(dim, codebook_size)
        self.embedding = nn.Parameter(torch.empty(codebook_size, dim))
        # A tensor: a number that changes from step to step would make torch.compile start over.
        self.register_buffer("temperature", torch.empty(()))
        self.set_temperature(temperature)
        self.reset_parameters()

    def set_temperature(self, value: float) -> None:
        """Set the temperature of the relaxation.

        Raises:
            ValueError: not above 0.
        """
        check_positive("temperature", value)
        self.temperature.fill_(value)

    def reset_parameters(self) -> None:
        """Codes N(0, 1); the projection as every ``nn.Linear``."""
        nn.init.normal_(self.embedding)
        self.projection.reset_parameters()

    @property
    def codebook(self) -> Tensor:
        """``[V, D]``."""
        return self.embedding

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        codebook = self.codebook.to(z.dtype)
        logits = functional.linear(z, self.projection.weight.to(z.dtype), self.projection.bias.to(z.dtype))
        if self.training:
            noise = -torch.empty_like(logits).exponential_().log()
            y = ((logits + noise) / self.temperature.to(z.dtype)).softmax(-1)
        else:
            y = (logits / self.temperature.to(z.dtype)).softmax(-1)
        indices = y.argmax(-1)
        relaxed = y @ codebook.detach()
        kl = masked_mean(kl_to_uniform(logits), mask)
        return Quantized(
            # The difference is exactly zero: the value is the code's, the gradient both the code's and y's.
            z_q=functional.embedding(indices, codebook) + (relaxed - relaxed.detach()),
            indices=indices[:, None],
            loss=self.kl_weight * kl,
            metrics={"kl": kl.detach()},
        )

    def residual_stage(self, stage: int) -> Quantizer:
        """See :meth:`Quantizer.residual_stage`."""
        raise ValueError("GumbelVQ learns its codes through its own softmax gradient; a residual stack passes the "
                         "decoder's gradient straight through once, from the sum of its codes")  # fmt: skip


def kl_to_uniform(logits: Tensor) -> Tensor:
    """``KL(softmax(logits) | uniform) [N]`` of ``logits [N, V]``: log V - H, in nats."""
    log_p = logits.log_softmax(-1)
    return math.log(logits.shape[-1]) + (log_p.exp() * log_p).sum(-1)
