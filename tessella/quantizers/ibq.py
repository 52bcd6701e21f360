"""Index backpropagation quantization (Shi et al., arXiv 2412.02692): every code gets a gradient in every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.distributed import replicas
from tessella.ops import index_backprop, nearest
from tessella.quantizers.base import Quantized, Quantizer, check_positive, check_weights, mean_squared


class IBQ(Quantizer):
    r"""Largest dot product, and a straight-through one-hot whose gradient is that of the softmax over all codes.

    .. math:: p = softmax_k(z \cdot e_k), \; k^* = argmax_k p_k, \; \hat z = \sum_k (1_{k=k^*} + p_k - sg(p_k)) e_k

    .. math:: L = |\hat z - z|^2 + w_c |sg(e_{k^*}) - z|^2 + w_e |e_{k^*} - sg(z)|^2 + w_h (S - A)

    with means over all elements, S and A the sample and batch entropies of softmax(z.e / temperature). The paper writes
    a single beta on the commitment term, its code has 0.25 on the codebook term: the defaults are the code's. The
    decoder's gradient reaches z only through the softmax; where that saturates, it vanishes. Without gradients only
    the search is done and the loss holds the squared errors alone.

    The published code draws its codes from N(0, 1), whatever the latents are. Where these are smaller, products are
    decided by the lengths of the codes and the first losses pull both towards each other; ``codebook_std`` starts the
    codes at the latents' own scale.

    Args:
        codebook_size: V.
        dim: D.
        commitment_weight: w_c.
        codebook_weight: w_e.
        entropy_weight: w_h.
        entropy_temperature: of the entropies, not of p.
        codebook_std: standard deviation of each entry of the initial codes; 1 is the paper's.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        commitment_weight: float = 1.0,
        codebook_weight: float = 0.25,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
        codebook_std: float = 1.0,
    ) -> None:
        super().__init__(dim, codebook_size)
        check_weights(
            commitment_weight=commitment_weight, codebook_weight=codebook_weight, entropy_weight=entropy_weight
        )
        check_positive("entropy_temperature", entropy_temperature)
        check_positive("codebook_std", codebook_std)
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.codebook_std = codebook_std
        self.embedding = nn.Parameter(torch.empty(codebook_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See :meth:`Quantizer.reset_parameters`; N(0, ``codebook_std``^2)."""
        nn.init.normal_(self.embedding, std=self.codebook_std)

    @property
    def codebook(self) -> Tensor:
        """``[V, D]``."""
        return self.embedding

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        codebook = self.codebook.to(z.dtype)
        if not torch.is_grad_enabled():
            return self._search(z, codebook, mask)
        z_q, indices, loss, metrics = index_backprop(
            z,
            codebook,
            commitment_weight=self.commitment_weight,
            codebook_weight=self.codebook_weight,
            entropy_weight=self.entropy_weight,
            entropy_temperature=self.entropy_temperature,
            mask=mask,
            replicas=replicas(self.training),
        )
        return Quantized(z_q, indices[:, None], loss, metrics)

    def _search(self, z: Tensor, codebook: Tensor, mask: Tensor | None) -> Quantized:
        indices = nearest(z, codebook, metric="dot")
        codes = nn.functional.embedding(indices, codebook)
        error = mean_squared(codes, z, mask)
        loss = (1 + self.commitment_weight + self.codebook_weight) * error
        return Quantized(codes, indices[:, None], loss, {"quantization_error": error})

    def residual_stage(self, stage: int) -> Quantizer:
        """See :meth:`Quantizer.residual_stage`."""
        raise ValueError("IBQ learns its codes through its own softmax gradient; a residual stack passes the decoder's "
                         "gradient straight through once, from the sum of its codes")  # fmt: skip
