"""The sweeps as fused Triton kernels for CUDA: no tile of scores leaves the chip.

Each kernel owns a block of rows or a block of codes and visits the other side block by block, as flash attention does;
the functions below stand for the tiled sweeps and return the same statistics. Importing this module imports Triton.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessella.ops._scores import Scores

# float32 products. "tf32x3" runs on tensor cores at nearly the same accuracy; "tf32", with its relative error of 1e-3,
# would not do at the temperatures in use.
INPUT_PRECISION = "ieee"
FLOOR = tl.constexpr(-80.0)  # exponents below add nothing to a float32 sum


@triton.jit
def _vectors(pointer, index, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (index < count)[:, None] & (d < D)[None, :]
    return tl.load(pointer + index.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def _store_vectors(pointer, value, index, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (index < count)[:, None] & (d < D)[None, :]
    tl.store(pointer + index.to(tl.int64)[:, None] * D + d[None, :], value, mask=inside)


@triton.jit
def _scores(z, c, half_norms, k, V, EUCLIDEAN: tl.constexpr, PRECISION: tl.constexpr):
    scores = tl.dot(z, tl.trans(c), input_precision=PRECISION)
    if EUCLIDEAN:
        scores -= tl.load(half_norms + k, mask=k < V, other=0.0)[None, :]
    return tl.where((k < V)[None, :], scores, float("-inf"))


@triton.jit
def _row_sums_kernel(
    z_, codebook, half_norms, best_, index_, mass_, code_, sharp_mass_, sharp_moment_, N, V, inverse_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EUCLIDEAN: tl.constexpr, SOFT: tl.constexpr, SHARP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = _vectors(z_, n, N, D, BLOCK_D)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_N,), tl.int64)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    code = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sharp_mass = tl.zeros((BLOCK_N,), tl.float32)
    sharp_moment = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, V, BLOCK_V):
        k = start + tl.arange(0, BLOCK_V)
        c = _vectors(codebook, k, V, D, BLOCK_D)
        scores = _scores(z, c, half_norms, k, V, EUCLIDEAN, PRECISION)
        top = tl.max(scores, 1)
        better = top > best
        index = tl.where(better, start + tl.argmax(scores, 1).to(tl.int64), index)
        new_best = tl.where(better, top, best)
        drop = best - new_best
        best = new_best
        y = scores - best[:, None]
        if SOFT:
            s = tl.exp(y)
            mass = mass * tl.exp(drop) + tl.sum(s, 1)
            code = code * tl.exp(drop)[:, None] + tl.dot(s, c, input_precision=PRECISION)
        if SHARP:
            t = tl.maximum(y * inverse_temperature, FLOOR)
            sharp_drop = tl.maximum(drop * inverse_temperature, FLOOR)
            p = tl.where((k < V)[None, :], tl.exp(t), 0.0)
            sharp_moment = (sharp_moment + sharp_mass * sharp_drop) * tl.exp(sharp_drop) + tl.sum(p * t, 1)
            sharp_mass = sharp_mass * tl.exp(sharp_drop) + tl.sum(p, 1)
    tl.store(best_ + n, best, mask=n < N)
    tl.store(index_ + n, index, mask=n < N)
    if SOFT:
        tl.store(mass_ + n, mass, mask=n < N)
        _store_vectors(code_, code, n, N, D, BLOCK_D)
    if SHARP:
        tl.store(sharp_mass_ + n, sharp_mass, mask=n < N)
        tl.store(sharp_moment_ + n, sharp_moment, mask=n < N)


@triton.jit
def _assignment(scores, best, log_mass, inverse_temperature):
    return tl.exp((scores - best[:, None]) * inverse_temperature - log_mass[:, None])


@triton.jit
def _mean_assignment_kernel(
    z_, codebook, half_norms, best_, log_mass_, weights_, q_, N, V, inverse_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EUCLIDEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = _vectors(codebook, k, V, D, BLOCK_D)
    q = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        scores = _scores(_vectors(z_, n, N, D, BLOCK_D), c, half_norms, k, V, EUCLIDEAN, PRECISION)
        best = tl.load(best_ + n, mask=n < N, other=0.0)
        log_mass = tl.load(log_mass_ + n, mask=n < N, other=0.0)
        p = _assignment(scores, best, log_mass, inverse_temperature)
        q += tl.sum(p * tl.load(weights_ + n, mask=n < N, other=0.0)[:, None], 0)
    tl.store(q_ + k, q, mask=k < V)


@triton.jit
def _mean_slope_kernel(
    z_, codebook, half_norms, best_, log_mass_, slope_, mean_, N, V, inverse_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EUCLIDEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = _vectors(z_, n, N, D, BLOCK_D)
    best = tl.load(best_ + n, mask=n < N, other=0.0)
    log_mass = tl.load(log_mass_ + n, mask=n < N, other=0.0)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, V, BLOCK_V):
        k = start + tl.arange(0, BLOCK_V)
        c = _vectors(codebook, k, V, D, BLOCK_D)
        scores = _scores(z, c, half_norms, k, V, EUCLIDEAN, PRECISION)
        p = _assignment(scores, best, log_mass, inverse_temperature)
        mean += tl.sum(p * tl.load(slope_ + k, mask=k < V, other=0.0)[None, :], 1)
    tl.store(mean_ + n, mean, mask=n < N)


@triton.jit
def _score_grad(
    z, g, c, n, k, half_norms, row_stats, slope_, weights_, g_mean_, ds, da, N, V, inverse_temperature,
    EUCLIDEAN: tl.constexpr, SOFT: tl.constexpr, SHARP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G of one tile; ``g`` is the gradient of z_q over the row's mass, ``row_stats`` [5, N] and ``weights`` w / tau."""
    inside = (n < N)[:, None] & (k < V)[None, :]
    best = tl.load(row_stats + n, mask=n < N, other=0.0)
    y = _scores(z, c, half_norms, k, V, EUCLIDEAN, PRECISION) - best[:, None]
    grad = tl.zeros(y.shape, tl.float32)
    if SOFT:
        a = tl.dot(g, tl.trans(c), input_precision=PRECISION) - tl.load(g_mean_ + n, mask=n < N, other=0.0)[:, None]
        grad += tl.exp(y) * a
    if SHARP:
        log_mass = tl.load(row_stats + 2 * N + n, mask=n < N, other=0.0)[:, None]
        mean_t = tl.load(row_stats + 3 * N + n, mask=n < N, other=0.0)[:, None]
        mean_slope = tl.load(row_stats + 4 * N + n, mask=n < N, other=0.0)[:, None]
        slope = tl.load(slope_ + k, mask=k < V, other=0.0)[None, :]
        weights = tl.load(weights_ + n, mask=n < N, other=0.0)[:, None]
        t = tl.maximum(y * inverse_temperature, FLOOR)
        p = tl.exp(y * inverse_temperature - log_mass)
        grad += p * weights * (da * (slope - mean_slope) - ds * (t - mean_t))
    return tl.where(inside, grad, 0.0)


@triton.jit
def _dz_kernel(
    z_, g_, codebook, half_norms, row_stats, slope, weights, g_mean, entropy_grads, dz_, N, V, inverse_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EUCLIDEAN: tl.constexpr, SOFT: tl.constexpr, SHARP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = _vectors(z_, n, N, D, BLOCK_D)
    g = _vectors(g_, n, N, D, BLOCK_D)
    ds, da = tl.load(entropy_grads), tl.load(entropy_grads + 1)
    dz = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, V, BLOCK_V):
        k = start + tl.arange(0, BLOCK_V)
        c = _vectors(codebook, k, V, D, BLOCK_D)
        grad = _score_grad(z, g, c, n, k, half_norms, row_stats, slope, weights, g_mean, ds, da, N, V,
                           inverse_temperature, EUCLIDEAN, SOFT, SHARP, PRECISION)  # fmt: skip
        dz += tl.dot(grad, c, input_precision=PRECISION)
    _store_vectors(dz_, dz, n, N, D, BLOCK_D)


@triton.jit
def _dcodebook_kernel(
    z_, g_, codebook, half_norms, row_stats, slope, weights, g_mean, entropy_grads, dcodebook, N, V,
    inverse_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EUCLIDEAN: tl.constexpr, SOFT: tl.constexpr, SHARP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = _vectors(codebook, k, V, D, BLOCK_D)
    ds, da = tl.load(entropy_grads), tl.load(entropy_grads + 1)
    dc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        z = _vectors(z_, n, N, D, BLOCK_D)
        g = _vectors(g_, n, N, D, BLOCK_D)
        grad = _score_grad(z, g, c, n, k, half_norms, row_stats, slope, weights, g_mean, ds, da, N, V,
                           inverse_temperature, EUCLIDEAN, SOFT, SHARP, PRECISION)  # fmt: skip
        dc += tl.dot(tl.trans(grad), z, input_precision=PRECISION)
        if EUCLIDEAN:
            dc -= tl.sum(grad, 0)[:, None] * c
    _store_vectors(dcodebook, dc, k, V, D, BLOCK_D)


def _common(scores: Scores) -> tuple[list[Tensor], dict[str, Any], int, int]:
    """Leading pointers, compile-time constants, and the numbers of row blocks and code blocks."""
    (n, d), v = scores.z.shape, len(scores.codebook)
    block_d = max(16, triton.next_power_of_2(d))
    block_n = 64 if block_d <= 64 else 32
    block_v = block_n if block_d <= 128 else 16  # within 100 KiB of shared memory, the least of the devices in use
    constants = {"D": d, "BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_D": block_d, "num_stages": 1,
                 "EUCLIDEAN": scores.half_norms is not None, "PRECISION": INPUT_PRECISION}  # fmt: skip
    half_norms = scores.z if scores.half_norms is None else scores.half_norms
    pointers = [scores.codebook.to(scores.z.dtype).contiguous(), half_norms]
    return pointers, constants, triton.cdiv(n, block_n), triton.cdiv(v, block_v)


def row_sums(scores: Scores, soft: bool, temperature: float | None) -> tuple[Tensor, ...]:
    """Best score, its first index, and the sums of `RowSums` after ``best``, of every row."""
    (n, d), v = scores.z.shape, len(scores.codebook)
    z = scores.z.contiguous()
    best, mass, sharp_mass, sharp_moment = z.new_zeros(4, n)
    index = z.new_zeros(n, dtype=torch.int64)
    code = z.new_zeros(n if soft else 0, d)
    pointers, constants, row_blocks, _ = _common(scores)
    if n > 0:
        _row_sums_kernel[(row_blocks,)](
            z, *pointers, best, index, mass, code, sharp_mass, sharp_moment, n, v, 1 / (temperature or 1),
            SOFT=soft, SHARP=temperature is not None, **constants,
        )  # fmt: skip
    return best, index, mass, code, sharp_mass, sharp_moment


def mean_assignment(scores: Scores, best: Tensor, log_mass: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """q_k = sum_n w_n p_nk: ``[V]``."""
    n, v = len(scores.z), len(scores.codebook)
    pointers, constants, _, code_blocks = _common(scores)
    q = best.new_empty(v)
    _mean_assignment_kernel[(code_blocks,)](
        scores.z.contiguous(), *pointers, best, log_mass, weights, q, n, v, 1 / temperature, **constants
    )
    return q


def mean_slope(scores: Scores, best: Tensor, log_mass: Tensor, slope: Tensor, temperature: float) -> Tensor:
    """sum_k p_nk slope_k: ``[N]``."""
    n, v = len(scores.z), len(scores.codebook)
    pointers, constants, row_blocks, _ = _common(scores)
    mean = torch.empty_like(best)
    if n > 0:
        _mean_slope_kernel[(row_blocks,)](
            scores.z.contiguous(), *pointers, best, log_mass, slope, mean, n, v, 1 / temperature, **constants
        )
    return mean


def sweep_backward(
    scores: Scores,
    stats: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_z_q: Tensor | None,
    grad_entropies: Tensor | None,
    temperature: float,
    dz: Tensor,
    dcodebook: Tensor,
) -> None:
    """Write G C into ``dz`` and G^T z into ``dcodebook``, both zero before."""
    (row_stats, mean_code, slope, weights), z = stats, scores.z.contiguous()
    n, v = len(z), len(scores.codebook)
    pointers, constants, row_blocks, code_blocks = _common(scores)
    g, g_mean = z, row_stats[0]
    if grad_z_q is not None:
        g = grad_z_q / row_stats[1, :, None]  # s_nk (a_nk - g_n.zbar_n) = exp(l_nk - m_n) (g_n/mass_n).(c_k - zbar_n)
        g_mean = (g * mean_code).sum(1)
    entropy_grads = z.new_zeros(2) if grad_entropies is None else grad_entropies.contiguous()
    constants |= {"SOFT": grad_z_q is not None, "SHARP": grad_entropies is not None}
    arguments = (z, g.contiguous(), *pointers, row_stats, slope, weights, g_mean, entropy_grads)
    if n > 0:
        _dz_kernel[(row_blocks,)](*arguments, dz, n, v, 1 / temperature, **constants)
        _dcodebook_kernel[(code_blocks,)](*arguments, dcodebook, n, v, 1 / temperature, **constants)
