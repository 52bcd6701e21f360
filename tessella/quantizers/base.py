"""The quantizer protocol: a quantizer sees only the last axis of ``z``; every other axis is batch."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.config import Configurable
from tessella.distributed import all_reduce_sum, gather_rows, world_size
from tessella.errors import NotFiniteError


@dataclass
class Quantized:
    """What every quantizer returns.

    Attributes:
        z_q: ``[..., D]``, what the decoder sees; carries the estimator's gradient. Same dtype as ``z``.
        indices: ``[..., K]`` int64 in ``[0, V)``.
        loss: ``[]`` float32 (float64 where ``z`` is), already weighted; zero where the rule has none.
        metrics: detached scalars: ``usage`` and ``perplexity`` of this batch, and the named parts of ``loss``.
        weights: ``[..., V]`` convex weights of a soft quantizer, where it was asked to return them.
    """

    z_q: Tensor
    indices: Tensor
    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None


class Quantizer(Configurable, nn.Module, ABC):
    """Base of all quantizers.

    ``forward`` checks the input, flattens the leading axes and hands ``z [N, D]`` in float32 (float64 stays float64),
    outside autocast, to :meth:`quantize`; so tokens depend neither on autocast nor on the layout of the batch.

    A quantizer that keeps running statistics also defines ``after_step()``, which the training loop calls on every
    module that has one, once after each optimizer step, however many forward passes that step accumulated.

    Attributes:
        dim: D, the size of the last axis of ``z``.
        codebook_size: V, the number of codes of each codebook.
        num_codebooks: K, the number of indices a vector is described by.
        is_soft: whether ``z_q`` may differ from ``indices_to_codes(indices)`` (soft quantization).
    """

    dim: int
    codebook_size: int
    num_codebooks: int = 1
    is_soft: bool = False

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {codebook_size}: one code carries no information")
        self.dim = dim
        self.codebook_size = codebook_size

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """``[V, D]`` in the dtype of the module, the only definition of the codes.

        Composites (K > 1) give ``[K, V, D']``, one codebook per index; their docstrings say how codes combine.
        """

    @abstractmethod
    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """Quantize ``z [N, D]`` (float32 or float64); ``mask [N]`` is true where a position counts.

        Returns ``z_q [N, D]``, ``indices [N, K]``, the loss and the rule's own metrics; :meth:`forward` adds ``usage``
        and ``perplexity`` and restores the leading axes and the dtype.
        """

    if TYPE_CHECKING:

        def __call__(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
            """See :meth:`forward`."""

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize the last axis of ``z``.

        Latents are channels-last, and nothing but the size of the last axis is checked: a channels-first
        ``[2, 16, 16, 16]`` given to a quantizer of dim 16 is taken for channels-last, and its rows are quantized in
        place of its channels. ``z.movedim(1, -1)`` turns channels-first latents round; a :class:`Tokenizer` does so
        inside its autoencoder.

        Args:
            z: ``[..., D]``, floating point and finite.
            mask: ``[...]`` bool, false at padded positions: those change neither loss nor statistics.

        Raises:
            TypeError: ``z`` is not floating point, or ``mask`` not boolean.
            ValueError: wrong last dimension, wrong mask shape.
            NotFiniteError: NaN or infinity in ``z``.
        """
        self._check(z, mask)
        leading = z.shape[:-1]
        with torch.autocast(z.device.type, enabled=False):
            flat = full_precision(z.reshape(-1, self.dim))
            flat_mask = None if mask is None else mask.reshape(-1)
            out = self.quantize(flat, flat_mask)
            usage, perplexity = index_statistics(out.indices, self.codebook_size, flat_mask, of_all_ranks=self.training)
        return Quantized(
            z_q=out.z_q.to(z.dtype).reshape(z.shape),
            indices=out.indices.reshape(*leading, self.num_codebooks),
            loss=out.loss,
            metrics={"usage": usage, "perplexity": perplexity, **out.metrics},
            weights=None if out.weights is None else out.weights.reshape(*leading, self.codebook_size),
        )

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes ``[..., D]`` of ``indices [..., K]`` (integers in ``[0, V)``); the inverse of quantization.

        Raises:
            TypeError: ``indices`` are not integers.
            ValueError: the last axis is not K, or an index is outside ``[0, V)``.
        """
        self.check_indices(indices)
        return self._lookup(indices.long())

    def _lookup(self, indices: Tensor) -> Tensor:
        return functional.embedding(indices[..., 0], self._read_codebook())

    def _read_codebook(self) -> Tensor:
        """:attr:`codebook` to be read from, where a rule need not compute it anew; not to be handed out."""
        return self.codebook

    def reset_parameters(self) -> None:
        """Draw the initial codes anew; nothing where no code is learned."""

    def residual_stage(self, stage: int) -> Quantizer:
        """The quantizer for what ``stage`` earlier ones of a residual stack left over: itself, then fresh copies.

        Raises:
            ValueError: the rule cannot quantize residuals; the message says why.
        """
        if self.is_soft:
            raise ValueError(f"{type(self).__name__} is soft: what it leaves over is not what its indices leave over")
        return self.fresh_copy() if stage else self

    def fresh_copy(self) -> Quantizer:
        """A copy with codes of its own."""
        other = copy.deepcopy(self)
        other.reset_parameters()
        return other

    def check_indices(self, indices: Tensor) -> None:
        """Raise a clear error unless ``indices`` is ``[..., K]``, of an integer type and inside ``[0, V)``."""
        if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if indices.ndim == 0 or indices.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"the last axis of indices must be num_codebooks = {self.num_codebooks}, got {tuple(indices.shape)}"
            )
        inside = ((indices >= 0) & (indices < self.codebook_size)).all()
        _require(inside, f"indices must lie in [0, {self.codebook_size})")

    def _check(self, z: Tensor, mask: Tensor | None) -> None:
        if not z.dtype.is_floating_point:
            raise TypeError(f"z must be floating point, got {z.dtype}")
        if z.ndim == 0 or z.shape[-1] != self.dim:
            raise ValueError(
                f"the last axis of z must be dim = {self.dim}, got z of shape {tuple(z.shape)}; "
                "latents are channels-last, [B, *S, D]"
            )
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool (true where a position counts), got {mask.dtype}")
            if mask.shape != z.shape[:-1]:
                raise ValueError(f"mask must have the shape of z without its last axis, {tuple(z.shape[:-1])}, "
                                 f"got {tuple(mask.shape)}")  # fmt: skip
        _require(_all_finite(z), "z must be finite, but holds NaN or infinity", NotFiniteError)

    def extra_repr(self) -> str:
        """Shown by ``print(quantizer)``."""
        return f"codebook_size={self.codebook_size}, dim={self.dim}, num_codebooks={self.num_codebooks}"


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _all_finite(z: Tensor) -> Tensor:
    if z.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=z.device)
    # One reading pass without a tensor of booleans: NaN and infinity both survive to an extremum.
    low, high = torch.aminmax(z.detach())
    return low.isfinite() & high.isfinite()


def _require(condition: Tensor, message: str, kind: type[ValueError] = ValueError) -> None:
    """Raise ``kind(message)`` unless the scalar ``condition`` holds."""
    if torch.compiler.is_compiling():
        # An assertion inside the graph, which a Python branch on a tensor would break in two.
        torch._assert_async(condition, message)
    elif not condition:
        raise kind(message)


def check_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be above 0 and finite, got {value}")


def check_weights(**weights: float) -> None:
    """Raise ``ValueError`` naming the first weight that is negative or not finite."""
    for name, value in weights.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one of the strings of the ``Literal`` type ``choices``."""
    if value not in get_args(choices):
        raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(get_args(choices))}")


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """``z + sg(z_q - z)``: the value of ``z_q`` to the last bit, the gradient of the identity on ``z``."""
    return (z - z.detach()).add_(z_q.detach())


def mean_squared(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """``mean |a - b|^2`` over all elements of ``[N, D]``, of unmasked rows only; 0 where there is none."""
    if mask is None:
        return functional.mse_loss(a, b, reduction="sum") / max(a.numel(), 1)
    return masked_mean((a - b).square().mean(-1), mask)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``x [N]`` over unmasked rows; 0 (not NaN) where there is none."""
    if mask is None:
        return x.sum() / max(x.shape[0], 1)
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


# Up to this size a histogram over all codes is cheaper than sorting the indices of a batch.
_HISTOGRAM_LIMIT = 1 << 20


def index_statistics(
    indices: Tensor, codebook_size: int, mask: Tensor | None = None, *, of_all_ranks: bool = False
) -> tuple[Tensor, Tensor]:
    """Usage and perplexity of ``indices [N, K]`` in one batch, averaged over the K codebooks.

    Usage is the fraction of the V codes that occur; perplexity ``exp(-sum_k f_k ln f_k)`` of their frequencies f. With
    ``of_all_ranks`` the batch is that of all ranks together, which must all ask.
    """
    statistics = _histogram_statistics if codebook_size <= _HISTOGRAM_LIMIT else _sorted_statistics
    shared = of_all_ranks and world_size() > 1
    pairs = [statistics(column, codebook_size, mask, shared) for column in indices.unbind(-1)]
    return torch.stack([usage for usage, _ in pairs]).mean(), torch.stack([p for _, p in pairs]).mean()


def _histogram_statistics(
    column: Tensor, codebook_size: int, mask: Tensor | None, shared: bool
) -> tuple[Tensor, Tensor]:
    hits = torch.ones(column.shape, device=column.device) if mask is None else mask.float()
    counts = torch.zeros(codebook_size, device=column.device).scatter_add_(0, column, hits)
    counts = all_reduce_sum(counts) if shared else counts
    total = counts.sum().clamp(min=1)
    entropy = total.log() - torch.dot(counts, counts.clamp(min=1).log_()) / total
    return counts.count_nonzero() / codebook_size, entropy.exp()


def _sorted_statistics(column: Tensor, codebook_size: int, mask: Tensor | None, shared: bool) -> tuple[Tensor, Tensor]:
    kept = column if mask is None else torch.where(mask, column, -1)
    ordered = (gather_rows(kept[:, None])[:, 0] if shared else kept).sort().values
    valid = ordered >= 0
    total = valid.sum().clamp(min=1)
    run = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    # Every member of a run of length c contributes ln(c/N)/N, so the run contributes f ln f.
    entropy = -torch.where(valid, (run / total).log(), 0.0).sum() / total
    used = torch.where(valid, 1.0 / run, 0.0).sum().round()
    return used / codebook_size, entropy.exp()
