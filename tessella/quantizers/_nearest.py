"""What the quantizers that search the nearest code share: the assignment, the estimator and the losses."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tessella.distributed import broadcast, gather_rows
from tessella.ops import kmeans, nearest
from tessella.quantizers._estimators import ESTIMATORS, Estimator
from tessella.quantizers.base import Quantized, Quantizer, check_choice, check_weights, mean_squared

CodebookInit = Literal["random", "kmeans"]

_KMEANS_ITERATIONS = 10


class NearestNeighbour(Quantizer):
    r"""k = argmin_k |z - e_k|, an estimator for the decoder's gradient, and two squared errors.

    .. math:: L = w_c \, mean|z - sg(e_k)|^2 + w_e \, mean|sg(z) - e_k|^2

    Subclasses say what the ``codebook`` is.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        commitment_weight: float,
        codebook_weight: float,
        estimator: Estimator,
    ) -> None:
        super().__init__(dim, codebook_size)
        check_weights(commitment_weight=commitment_weight, codebook_weight=codebook_weight)
        check_choice("estimator", estimator, Estimator)
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.estimator: Estimator = estimator

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        codebook = self._read_codebook().to(z.dtype)
        indices = nearest(z, codebook)
        codes = functional.embedding(indices, codebook)
        error = mean_squared(z, codes.detach(), mask)
        loss = self.commitment_weight * error
        if self.codebook_weight:
            loss = loss + self.codebook_weight * mean_squared(z.detach(), codes, mask)
        return Quantized(
            z_q=ESTIMATORS[self.estimator](z, codes),
            indices=indices[:, None],
            loss=loss,
            metrics={"quantization_error": error.detach()},
        )

    def residual_stage(self, stage: int) -> Quantizer:
        """See :meth:`Quantizer.residual_stage`."""
        if self.estimator != "straight_through":
            raise ValueError("a residual stack passes the gradient straight through once, from the sum of its codes; "
                             f"set estimator = 'straight_through', not {self.estimator!r}")  # fmt: skip
        return super().residual_stage(stage)


class LearnedCodebook(NearestNeighbour):
    """A codebook that starts at random or, with ``codebook_init="kmeans"``, from the first training batch.

    The fit happens in the first forward pass in training mode, on the vectors of all ranks together, and every rank
    gets the result of rank 0. Run that pass outside torch.compile (or call :meth:`fit`); from then on the compiled
    module has one graph. Whether the codes are fitted is part of the state dict, and of nothing else: whoever copies
    the buffers (an averaged model does in every step) copies that too.
    """

    fitted: Tensor

    def __init__(self, codebook_size: int, dim: int, *, codebook_init: CodebookInit, **options: Any) -> None:
        super().__init__(codebook_size, dim, **options)
        check_choice("codebook_init", codebook_init, CodebookInit)
        self.codebook_init: CodebookInit = codebook_init
        self._seen_fitted = codebook_init == "random"
        if codebook_init == "kmeans":
            self.register_buffer("fitted", torch.tensor(False))

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """``[V, D]``.

        Raises:
            RuntimeError: ``codebook_init="kmeans"`` and no training batch was seen yet.
        """

    @abstractmethod
    def _set_codes(self, codes: Tensor) -> None:
        """Make ``codes [V, D]`` the codebook."""

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        if self.training and not self._is_fitted():
            if torch.compiler.is_compiling():
                raise RuntimeError("codebook_init='kmeans' fits in the first training pass, which must run outside "
                                   "torch.compile: run one batch, or call fit(z), before compiling")  # fmt: skip
            self.fit(z, mask)
        return super().quantize(z, mask)

    @torch.no_grad()
    def fit(self, z: Tensor, mask: Tensor | None = None) -> None:
        """Set the codes to the k-means centres of ``z [..., D]``, of unmasked positions and of all ranks together.

        Raises:
            ValueError: fewer than ``codebook_size`` vectors.
        """
        self._check(z, mask)
        rows = gather_rows((z if mask is None else z[mask]).reshape(-1, self.dim).float())
        if rows.shape[0] < self.codebook_size:
            raise ValueError(f"codebook_init='kmeans' needs at least codebook_size = {self.codebook_size} vectors in "
                             f"the first batch (over all ranks, without padding), got {rows.shape[0]}")  # fmt: skip
        # A seed of its own: the result depends on the data alone, and nobody else's random numbers move.
        rng = torch.Generator().manual_seed(0)
        centres = kmeans(rows, self.codebook_size, num_iterations=_KMEANS_ITERATIONS, rng=rng)
        self._set_codes(broadcast(centres.contiguous()))
        self._mark_fitted(True)

    def _mark_fitted(self, fitted: bool) -> None:
        if self.codebook_init == "kmeans":
            self.fitted.fill_(fitted)
            self._seen_fitted = fitted

    def _is_fitted(self) -> bool:
        # Reading the buffer waits for the device, so only until it was once seen set: nothing but reset_parameters and
        # a state dict unsets it, and both pass through here. A compiled graph cannot branch on it.
        if not self._seen_fitted and not torch.compiler.is_compiling():
            self._seen_fitted = bool(self.fitted)
        return self._seen_fitted

    def _require_fitted(self) -> None:
        if self._is_fitted():
            return
        message = ("the codebook is not fitted: codebook_init='kmeans' takes its codes from the first batch in "
                   "training mode (or from fit(z), or a state dict)")  # fmt: skip
        if not torch.compiler.is_compiling():
            raise RuntimeError(message)
        torch._assert_async(self.fitted, message)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.codebook_init == "kmeans":
            # Codes that were trained without this option come without the buffer, and need no fit.
            own = (*self._parameters, *self._buffers)
            if any(f"{prefix}{name}" in state_dict for name in own):
                state_dict.setdefault(f"{prefix}fitted", torch.tensor(True))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.codebook_init == "kmeans":
            self._seen_fitted = bool(self.fitted)
