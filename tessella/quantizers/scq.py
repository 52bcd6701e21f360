"""Soft convex quantization (Gautam et al., arXiv 2310.03004)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tessella.ops import nearest
from tessella.ops.convex import Solver, convex_combination
from tessella.quantizers.base import (
    Quantized,
    Quantizer,
    check_choice,
    check_positive,
    check_weights,
    masked_mean,
    mean_squared,
    straight_through,
)

Loss = Literal["vq", "joint", "none"]

_DEFAULT_LAMBDA_REL = 0.1
# A code counts as softly used if its mean weight exceeds this fraction of the uniform weight.
_SOFT_USAGE_FRACTION = 1e-3


class SCQ(Quantizer):
    r"""A convex combination of codes, in training and in evaluation; its exact derivative replaces straight-through.

    .. math:: p = argmin_p |z - C'p|^2 + \lambda |p - e_{k*}|^2 \;\text{s.t.}\; p \ge 0, 1'p = 1, \quad z_q = C'p

    with k* the nearest code. ``indices`` are k*, the tokens of the vector quantization that the problem starts from:
    they are the closest code to z at any lambda, where argmax p need not be. But ``z_q`` is *not* ``c_{k*}``: a token's
    code is p, some ``support_size`` real numbers, so SCQ is no match in rate for VQ of the same codebook size. The
    metric ``hard_gap`` tells how far the two are apart. As lambda grows z_q tends to c_{k*} and its gradient to zero.

    Of the paper are known the problem, that its scalable algorithm relaxes it at a cost of O(V^3), and that codes are
    not rounded afterwards; its constants, its losses, how it projects and its code are not public. ``relaxed`` is one
    reading of that description: minimise without the constraints, then project on the simplex. By itself it is a poor
    solution of the problem (its error is far above the optimum's), hence the ``refined`` default; with
    ``solver="relaxed"`` use ``loss="none"``. What they come to in an autoencoder is in ``docs/claims.md``.

    Metrics beside ``usage`` and ``perplexity`` (of k*): ``quantization_error`` mean :math:`(z - z_q)^2`; ``hard_gap``
    mean :math:`(z_q - c_{k*})^2` of the soft z_q; ``support_size``, the mean number of non-zero weights;
    ``soft_perplexity`` :math:`\exp H(\bar p)` and ``soft_usage``, the fraction of codes with
    :math:`\bar p_k > 10^{-3}/V`, of the mean weights; ``solver_residual`` (exact) the mean upper
    bound of :math:`|z_q - z_q^*|`.

    Args:
        codebook_size: V.
        dim: D.
        lambda_: the regularisation; give it, or ``lambda_rel``, or neither.
        lambda_rel: lambda as a multiple of the mean :math:`|c_k|^2`, hence of the codebook's scale; 0.1 by default.
        solver: ``refined``, ``exact`` or ``relaxed`` (our reading of the paper's scalable algorithm); see
            :func:`tessella.ops.convex.convex_combination`.
        num_refine_steps: accelerated steps of the refined solver.
        tolerance: of the exact solver, relative to the codes' size.
        loss: ``vq``: codebook_weight mean|sg(z) - z_q|^2 + commitment_weight mean|z - sg(z_q)|^2; ``joint``:
            mean|z - z_q|^2; ``none``: 0. z_q is a function of z: all but the commitment term reach z through it.
        commitment_weight: see ``loss``.
        codebook_weight: see ``loss``.
        hard: our extension, for generation: output c_{k*} with the gradient of the soft z_q,
            :math:`z_q + sg(c_{k*} - z_q)`, so that tokens decode to what the decoder was trained on; the loss is that
            of the output.
        return_weights: put p into ``Quantized.weights`` ``[..., V]``, differentiable.

    Raises:
        ValueError: both ``lambda_`` and ``lambda_rel``; one of them or ``tolerance`` not positive and finite; an
            unknown name; a negative weight or ``num_refine_steps``.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        lambda_: float | None = None,
        lambda_rel: float | None = None,
        solver: Solver = "refined",
        num_refine_steps: int = 20,
        tolerance: float = 1e-6,
        loss: Loss = "vq",
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        hard: bool = False,
        return_weights: bool = False,
    ) -> None:
        super().__init__(dim, codebook_size)
        if lambda_ is not None and lambda_rel is not None:
            raise ValueError(f"give lambda_ or lambda_rel, not both, got {lambda_} and {lambda_rel}")
        for name, value in (("lambda_", lambda_), ("lambda_rel", lambda_rel), ("tolerance", tolerance)):
            if value is not None:
                check_positive(name, value)
        check_choice("solver", solver, Solver)
        check_choice("loss", loss, Loss)
        check_weights(commitment_weight=commitment_weight, codebook_weight=codebook_weight)
        if num_refine_steps < 0:
            raise ValueError(f"num_refine_steps must be at least 0, got {num_refine_steps}")
        self.lambda_ = lambda_
        self.lambda_rel = _DEFAULT_LAMBDA_REL if lambda_ is None and lambda_rel is None else lambda_rel
        self.solver: Solver = solver
        self.num_refine_steps = num_refine_steps
        self.tolerance = tolerance
        self.loss: Loss = loss
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.return_weights = return_weights
        self.is_soft = not hard
        self.embedding = nn.Parameter(torch.empty(codebook_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See :meth:`Quantizer.reset_parameters`: codes of norm about 1."""
        nn.init.normal_(self.embedding, std=self.dim**-0.5)

    @property
    def codebook(self) -> Tensor:
        """``[V, D]``."""
        return self.embedding

    def regularization(self, codebook: Tensor) -> float | Tensor:
        """lambda for ``codebook [V, D]``; a constant of the problem: no gradient."""
        if self.lambda_rel is None:
            assert self.lambda_ is not None
            return self.lambda_
        # A codebook of zeros must not make the problem singular.
        floor = torch.finfo(codebook.dtype).eps ** 2
        return self.lambda_rel * codebook.detach().square().sum(-1).mean().clamp(min=floor)

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        codebook = self.codebook.to(z.dtype)
        indices = nearest(z, codebook)
        code = convex_combination(
            z,
            codebook,
            indices,
            self.regularization(codebook),
            solver=self.solver,
            num_refine_steps=self.num_refine_steps,
            tolerance=self.tolerance,
            mask=mask,
            return_weights=self.return_weights,
        )
        hard = codebook.detach()[indices]
        z_q = code.z_q if self.is_soft else straight_through(code.z_q, hard)
        metrics = {
            "quantization_error": mean_squared(z, z_q, mask),
            "hard_gap": mean_squared(code.z_q, hard, mask),
            "support_size": masked_mean(code.support_size.to(z.dtype), mask),
            "soft_perplexity": torch.special.entr(code.mean_weights).sum().exp(),
            "soft_usage": (code.mean_weights > _SOFT_USAGE_FRACTION / self.codebook_size).to(z.dtype).mean(),
        }
        if self.solver == "exact":
            metrics["solver_residual"] = masked_mean(code.residual, mask)
        return Quantized(
            z_q=z_q,
            indices=indices[:, None],
            loss=self._loss(z, z_q, mask),
            metrics={name: value.detach() for name, value in metrics.items()},
            weights=code.weights,
        )

    def _loss(self, z: Tensor, z_q: Tensor, mask: Tensor | None) -> Tensor:
        if self.loss == "none":
            return z.new_zeros(())
        if self.loss == "joint":
            return mean_squared(z, z_q, mask)
        codebook = mean_squared(z.detach(), z_q, mask)
        commitment = mean_squared(z, z_q.detach(), mask)
        return self.codebook_weight * codebook + self.commitment_weight * commitment
