"""Vector quantization with a learned codebook (van den Oord et al., arXiv 1711.00937)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.distributed import replicas
from tessella.ops import softmax_entropy
from tessella.quantizers._estimators import Estimator
from tessella.quantizers._nearest import CodebookInit, LearnedCodebook
from tessella.quantizers.base import Quantized, Quantizer, check_choice, check_positive, check_weights

Metric = Literal["euclidean", "cosine"]


class VQ(LearnedCodebook):
    r"""Nearest codeword, straight-through gradient, two squared errors.

    .. math:: L = w_c |z - sg(e_k)|^2 + w_e |sg(z) - e_k|^2 + w_h (S - A), \quad k = argmin_k |z - e_k|

    ``commitment_weight`` moves the encoder, ``codebook_weight`` the codes; both terms are means over all elements.
    S is the mean entropy of p_n = softmax_k(-|z_n - e_k|^2 / temperature), A the entropy of the batch mean of p
    (MaskGIT: w_h = 0.1, temperature 0.01): confident assignments, evenly used codes. The penalty is part of the loss
    where gradients are enabled; without them it would be computed for nothing.

    Args:
        codebook_size: V.
        dim: D.
        commitment_weight: w_c.
        codebook_weight: w_e.
        entropy_weight: w_h.
        entropy_temperature: of the softmax over codes.
        metric: ``"cosine"`` divides z and the codes by their norms first (ViT-VQGAN, LlamaGen); ``codebook`` and
            ``z_q`` then are the unit vectors, and so is the start of the learned ones: a step of given size turns a
            shorter vector further.
        estimator: ``"straight_through"``, or ``"rotation"`` (arXiv 2410.06424).
        codebook_init: ``"random"`` is uniform in +-``init_scale``; ``"kmeans"`` takes the first training batch.
        init_scale: largest entry of a code at the start; None is 1/V, that of the VQGAN family. Codes much smaller than
            the learning rate go where the first step sends them.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        metric: Metric = "euclidean",
        estimator: Estimator = "straight_through",
        codebook_init: CodebookInit = "random",
        init_scale: float | None = None,
    ) -> None:
        super().__init__(
            codebook_size,
            dim,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            estimator=estimator,
            codebook_init=codebook_init,
        )
        check_weights(entropy_weight=entropy_weight)
        check_positive("entropy_temperature", entropy_temperature)
        check_choice("metric", metric, Metric)
        if init_scale is not None:
            check_positive("init_scale", init_scale)
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.metric: Metric = metric
        self.init_scale = 1 / codebook_size if init_scale is None else init_scale
        self.embedding = nn.Parameter(torch.empty(codebook_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See :meth:`Quantizer.reset_parameters`."""
        with torch.no_grad():
            self._set_codes(self.embedding.uniform_(-self.init_scale, self.init_scale))
        self._mark_fitted(False)

    @property
    def codebook(self) -> Tensor:
        """``[V, D]``; unit vectors with ``metric="cosine"``."""
        self._require_fitted()
        return self._scaled(self.embedding)

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        z = self._scaled(z)
        out = super().quantize(z, mask)
        if self.entropy_weight and torch.is_grad_enabled():
            sample, batch = softmax_entropy(
                z, self.codebook.to(z.dtype), self.entropy_temperature, mask=mask, replicas=replicas(self.training)
            )
            out.loss = out.loss + self.entropy_weight * (sample - batch)
            out.metrics |= {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
        return out

    def residual_stage(self, stage: int) -> Quantizer:
        """See :meth:`Quantizer.residual_stage`."""
        if self.metric == "cosine":
            raise ValueError("metric = 'cosine' drops the length of z, which a residual stack has to refine")
        return super().residual_stage(stage)

    def _scaled(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1) if self.metric == "cosine" else x

    @torch.no_grad()
    def _set_codes(self, codes: Tensor) -> None:
        self.embedding.copy_(self._scaled(codes))
