"""Lookup-free quantization (Yu et al., arXiv 2310.05737): the signs of z are the bits of its index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tessella.distributed import mean_over_ranks
from tessella.quantizers._implicit import ImplicitCodebook
from tessella.quantizers.base import (
    Quantized,
    Quantizer,
    check_positive,
    check_weights,
    masked_mean,
    mean_squared,
    straight_through,
)

_MAX_DIM = 62  # indices are int64
_MAX_GROUP_BITS = 12
_DEFAULT_GROUP_BITS = 10
_LOG_EPS = 1e-5


class LFQ(ImplicitCodebook):
    r"""Codes in {-s, s}^D; bit i of the index is [z_i > 0], the first channel the lowest bit (zero counts as -s).

    .. math:: L = w_c\,mean|z - sg(\hat z)|^2 + w_h (S - A)

    S and A are the entropies of p_n = softmax_c(-|z_n - c|^2 / temperature) over all 2^D codes: mean over n of H(p_n),
    and H of the mean of p_n. Given z the bits are independent with logit 4 s z_i / temperature, so S is exactly the sum
    of their entropies. A is taken over groups of ``entropy_group_bits`` consecutive bits and summed,

    .. math:: A = -\sum_g \sum_{b \in \{0,1\}^{|g|}} q_g(b) \log(q_g(b) + 10^{-5}), \quad q_g = mean_n p_n(bits\ of\ g)

    an upper bound of the joint entropy that is exact where the groups are independent over the batch, and always with
    one group of all D bits. Nothing of size 2^D is built, only [N, 2^group]. As with VQ, the penalty is part of the
    loss where gradients are enabled.

    Args:
        codebook_size: V = 2^D; give it, or ``dim``, or both.
        dim: D.
        scale: s.
        commitment_weight: w_c.
        entropy_weight: w_h.
        entropy_temperature: of the softmax over codes.
        entropy_group_bits: 1 to 12; the last group is smaller where it does not divide D. None is min(D, 10): groups
            of one bit are blind to collapse, for two opposite codes already have every bit set half of the time.
    """

    def __init__(
        self,
        codebook_size: int | None = None,
        dim: int | None = None,
        *,
        scale: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        entropy_group_bits: int | None = None,
    ) -> None:
        dim = number_of_bits(codebook_size, dim)
        super().__init__(dim, 2**dim)
        check_positive("scale", scale)
        check_weights(commitment_weight=commitment_weight, entropy_weight=entropy_weight)
        check_positive("entropy_temperature", entropy_temperature)
        if entropy_group_bits is None:
            entropy_group_bits = min(dim, _DEFAULT_GROUP_BITS)
        if not 1 <= entropy_group_bits <= _MAX_GROUP_BITS:
            raise ValueError(f"entropy_group_bits must be from 1 to {_MAX_GROUP_BITS}, got {entropy_group_bits}")
        self.scale = scale
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.entropy_group_bits = entropy_group_bits

    def digits_to_codes(self, digits: Tensor) -> Tensor:
        """``-s`` and ``s`` for bits 0 and 1, in the dtype of the module."""
        return (2 * digits.to(self._like.dtype) - 1) * self.scale

    def indices_to_digits(self, indices: Tensor) -> Tensor:
        """The bits ``[..., D]`` of ``indices [...]``, lowest first."""
        return indices[..., None] >> self._shifts(indices) & 1

    def digits_to_indices(self, digits: Tensor) -> Tensor:
        """``sum_i bit_i 2^i`` of ``digits [..., D]``; int64."""
        return (digits.long() << self._shifts(digits)).sum(-1)

    def quantize(self, z: Tensor, mask: Tensor | None) -> Quantized:
        """See :meth:`Quantizer.quantize`."""
        bits = z > 0
        codes = self.digits_to_codes(bits).to(z.dtype)
        error = mean_squared(z, codes, mask)
        loss, metrics = self.commitment_weight * error, {"quantization_error": error.detach()}
        if self.entropy_weight and torch.is_grad_enabled():
            logits = 4 * self.scale / self.entropy_temperature * z
            sample, batch = bit_entropy(logits, mask), self.batch_entropy(logits.sigmoid(), mask)
            loss = loss + self.entropy_weight * (sample - batch)
            metrics |= {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
        return Quantized(straight_through(z, codes), self.digits_to_indices(bits)[:, None], loss, metrics)

    def batch_entropy(self, p: Tensor, mask: Tensor | None) -> Tensor:
        """A of bit probabilities ``p [N, D]``, in nats."""
        q = torch.cat([_batch_mean(_joint(group), mask) for group in p.split(self.entropy_group_bits, dim=-1)])
        q = mean_over_ranks(q) if self.training else q
        return -(q * (q + _LOG_EPS).log()).sum()

    def residual_stage(self, stage: int) -> Quantizer:
        """With codes 2^-stage times as long: residuals of |z_i| <= 2s halve from stage to stage."""
        other = super().residual_stage(stage)
        assert isinstance(other, LFQ)
        other.scale = self.scale * 2.0**-stage
        return other

    def _shifts(self, like: Tensor) -> Tensor:
        return torch.arange(self.dim, device=like.device)


def number_of_bits(codebook_size: int | None, dim: int | None) -> int:
    """D, given D or 2^D or both.

    Raises:
        ValueError: neither, two that do not agree, or more bits than an index has.
    """
    if codebook_size is None and dim is None:
        raise ValueError("binary codes need dim, or codebook_size = 2^dim")
    if codebook_size is not None:
        if codebook_size < 2 or codebook_size & (codebook_size - 1):
            raise ValueError(f"codebook_size must be a power of 2 and at least 2, got {codebook_size}")
        bits = codebook_size.bit_length() - 1
        if dim not in (None, bits):
            raise ValueError(f"codebook_size must be 2^dim: {codebook_size} is 2^{bits}, but dim is {dim}")
        dim = bits
    assert dim is not None
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if dim > _MAX_DIM:
        raise ValueError(f"dim must be at most {_MAX_DIM}, got {dim}: indices are int64")
    return dim


def bit_entropy(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over unmasked n of the summed entropies (nats) of independent bits with ``logits [N, D]``."""
    # H = softplus(l) - l sigmoid(l), even in l; with |l| nothing cancels.
    size = logits.abs()
    return masked_mean((functional.softplus(-size) + size * (-size).sigmoid()).sum(-1), mask)


def _joint(p: Tensor) -> Tensor:
    """Probabilities ``[N, 2^g]`` of all patterns of independent bits ``p [N, g]``."""
    joint = torch.ones_like(p[:, :1])
    for bit in p.unbind(-1):
        joint = torch.cat([joint * (1 - bit[:, None]), joint * bit[:, None]], dim=-1)
    return joint


def _batch_mean(p: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return p.sum(0) / max(p.shape[0], 1)
    return torch.where(mask[:, None], p, 0).sum(0) / mask.sum().clamp(min=1)
