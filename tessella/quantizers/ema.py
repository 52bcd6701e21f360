"""Vector quantization whose codes are moving averages of what they were assigned (arXiv 1711.00937, appendix A.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tessella.distributed import all_reduce_sum, gather_rows
from tessella.quantizers._estimators import Estimator
from tessella.quantizers._nearest import CodebookInit, LearnedCodebook
from tessella.quantizers.base import Quantized, Quantizer, check_choice, check_positive

DeadCodes = Literal["keep", "revive", "split"]

_MIN_COUNT = 1e-6
_SPLIT_NOISE = 1e-3


class EMAVQ(LearnedCodebook):
    r"""Nearest codeword; codes follow discounted sums over all ranks instead of a gradient.

    .. math:: c_k \leftarrow d\,c_k + n_k, \quad s_k \leftarrow d\,s_k + \sum_{n: k_n = k} z_n, \quad e_k = s_k / c_k

    Forward passes in training mode only collect n and the sums of z; :meth:`after_step` applies them once per optimizer
    step, however many micro-batches it took. Evaluation changes nothing. Only the commitment loss has a gradient.

    A code is dead when its count falls below ``dead_threshold`` times the mean count, so the limit grows with the
    number of tokens per batch. ``"revive"`` moves it onto a vector of the last batch, with the mean count;
    ``"split"`` (Linde, Buzo and Gray; UViM) onto the most used code times U(1 - 0.001, 1 + 0.001) per entry, halving
    that code's count and sum between the two. The random numbers depend on the number of updates alone and are the
    same on every rank.

    The paper does not fix how much the start weighs. Every code begins with the count ``init_count``, so its first
    update by n vectors takes it the share n / (d init_count + n) of the way to their mean: with d = 0.99 and n = 13,
    93 % for the count 1 (UViM), but 12 % for 1 / (1 - d) = 100, the start of packages that average n and the sums with
    weight 1 - d from the count 1. From the same start the two then do the same. The small count forgets a random start
    at once; the large one keeps a fitted start, and moves few codes far where the first batches are few or alike.

    Args:
        codebook_size: V.
        dim: D.
        decay: d, in [0, 1).
        commitment_weight: of mean|z - sg(e_k)|^2.
        unit_norm: codes are the means divided by their norm (UViM, whose encoder standardises z).
        dead_codes: see above.
        dead_threshold: see above; below 1/3, else splitting need not end.
        estimator: ``"straight_through"`` or ``"rotation"``.
        codebook_init: ``"random"`` is N(0, 1/D) per entry; ``"kmeans"`` takes the first training batch.
        init_count: how many vectors the start of a code counts for; see above.
    """

    counts: Tensor
    sums: Tensor
    num_updates: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        unit_norm: bool = False,
        dead_codes: DeadCodes = "keep",
        dead_threshold: float = 0.01,
        estimator: Estimator = "straight_through",
        codebook_init: CodebookInit = "random",
        init_count: float = 1.0,
    ) -> None:
        super().__init__(
            codebook_size,
            dim,
            commitment_weight=commitment_weight,
            codebook_weight=0.0,
            estimator=estimator,
            codebook_init=codebook_init,
        )
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if not 0 < dead_threshold < 1 / 3:
            raise ValueError(f"dead_threshold must be in (0, 1/3), a fraction of the mean count, got {dead_threshold}")
        check_choice("dead_codes", dead_codes, DeadCodes)
        check_positive("init_count", init_count)
        self.init_count = init_count
        self.decay = decay
        self.unit_norm = unit_norm
        self.dead_codes: DeadCodes = dead_codes
        self.dead_threshold = dead_threshold
        self.register_buffer("counts", torch.empty(codebook_size))
        self.register_buffer("sums", torch.empty(codebook_size, dim))
        self.register_buffer("num_updates", torch.empty((), dtype=torch.long))
        # Of this rank alone until the step ends, so not buffers: data-parallel wrappers overwrite those with rank 0's.
        self._pending: tuple[Tensor, Tensor] | None = None
        self._last_batch: tuple[Tensor, Tensor | None] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See :meth:`Quantizer.reset_parameters`."""
        self._set_codes(self.sums.normal_(std=self.dim**-0.5))
        self.num_updates.zero_()
        self._pending = self._last_batch = None
        self._mark_fitted(False)

    @property
    def codebook(self) -> Tensor:
        """``[V, D]``, the averages; unit vectors with ``unit_norm``."""
        self._require_fitted()
        return functional.normalize(self.sums, dim=-1) if self.unit_norm else self.sums / self.counts[:, None]

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        out = super().quantize(z, mask)
        if self.training:
            self._collect(z.detach(), out.indices[:, 0], mask)
        return out

    @torch.no_grad()
    def after_step(self) -> None:
        """Apply the statistics of all forward passes since the last call, summed over ranks; every rank must call it.

        Raises:
            TypeError: the statistics are in half precision, in which counts would stop to grow.
        """
        if self.counts.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"EMAVQ must be float32 or float64 in training, got {self.counts.dtype}")
        counts, sums = self._pending or (torch.zeros_like(self.counts), torch.zeros_like(self.sums))
        self._pending = None
        all_reduce_sum(counts)
        all_reduce_sum(sums)
        # A count at its floor no longer decays, nor does its sum: so an unused code keeps its place for ever.
        decays = (self.counts > _MIN_COUNT) & (counts.sum() > 0)
        decay = torch.where(decays, self.decay, 1.0)
        self.counts.mul_(decay).add_(counts)
        self.sums.mul_(decay[:, None]).add_(sums)
        self.num_updates.add_(1)
        if self.dead_codes == "split":
            self._split()
        elif self.dead_codes == "revive":
            self._revive()
        self._last_batch = None

    def residual_stage(self, stage: int) -> Quantizer:
        """See :meth:`Quantizer.residual_stage`."""
        if self.unit_norm:
            raise ValueError("unit_norm fixes the length of the codes, while residuals shrink from stage to stage")
        return super().residual_stage(stage)

    @torch.no_grad()
    def _collect(self, z: Tensor, indices: Tensor, mask: Tensor | None) -> None:
        hits = z.new_ones(z.shape[0]) if mask is None else mask.to(z.dtype)
        counts = torch.zeros_like(self.counts).index_add_(0, indices, hits.to(self.counts.dtype))
        rows = z if mask is None else torch.where(mask[:, None], z, 0)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, rows.to(self.sums.dtype))
        if self._pending is not None:
            counts, sums = counts + self._pending[0], sums + self._pending[1]
        self._pending = (counts, sums)
        if self.dead_codes == "revive":
            self._last_batch = (z, mask)

    def _rng(self) -> torch.Generator:
        return torch.Generator().manual_seed(int(self.num_updates))

    def _draw(self, rows: Tensor, count: int) -> Tensor:
        """At most ``count`` different rows; the same on every rank where the rows are."""
        return rows[torch.randperm(len(rows), generator=self._rng())[:count].to(rows.device)]

    def _split(self) -> None:
        rng = self._rng()
        limit = self.dead_threshold * self.counts.mean()
        while (self.counts < limit).any():
            least, most = self.counts.argmin(), self.counts.argmax()
            noise = 1 + _SPLIT_NOISE * (2 * torch.rand(self.dim, generator=rng) - 1).to(self.sums)
            self.counts[most] /= 2
            self.sums[most] /= 2
            self.counts[least] = self.counts[most]
            self.sums[least] = self.sums[most] * noise

    def _revive(self) -> None:
        dead = (self.counts < self.dead_threshold * self.counts.mean()).nonzero()[:, 0]
        if len(dead) == 0:
            return
        z, mask = self._last_batch or (self.sums[:0], None)
        seen = (z if mask is None else z[mask]).to(self.sums.dtype)
        pool = gather_rows(self._draw(seen, len(dead)))
        chosen = self._draw(pool, len(dead))
        dead = dead[: len(chosen)]
        mean_count = self.counts.mean()
        self.counts[dead] = mean_count
        self.sums[dead] = chosen * mean_count

    @torch.no_grad()
    def _set_codes(self, codes: Tensor) -> None:
        self.counts.fill_(self.init_count)
        self.sums.copy_(codes * self.init_count)
