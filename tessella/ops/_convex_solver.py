"""The solver of the convex code: an accelerated start, an exact finish, and what both need to know of a problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tessella.ops._tiles import CPU_TILE_ELEMENTS, CUDA_TILE_ELEMENTS
from tessella.ops.simplex import center_on_support, project_simplex_

# Rounds of the exact solver; the r-th takes 2^r times as many accelerated steps, then at most so many Newton steps.
_NUM_ROUNDS = 6


_FIRST_ROUND_STEPS = 20


_NUM_NEWTON_STEPS = 12


def spectrum(codes: Tensor, lambda_: float | Tensor) -> tuple[Tensor, Tensor]:
    """``s_max(C)^2``, and ``lambda_`` raised to what the dtype can resolve beside it."""
    energy = torch.linalg.eigvalsh(codes.T @ codes)[-1].clamp(min=0)
    lambda_ = torch.as_tensor(lambda_, dtype=codes.dtype, device=codes.device)
    return energy, torch.maximum(lambda_, 32 * torch.finfo(codes.dtype).eps * energy)


@dataclass(frozen=True)
class Problem:
    """What the solvers share: codes ``[V, D]``, lambda, energy = s_max(C)^2, the Cholesky factor of lambda I + C'C."""

    codes: Tensor
    lambda_: Tensor
    energy: Tensor
    factor: Tensor
    solver: str
    num_refine_steps: int
    tolerance: float

    @classmethod
    def build(
        cls, codes: Tensor, lambda_: Tensor, energy: Tensor, solver: str, num_refine_steps: int, tolerance: float
    ) -> Problem:
        factor = torch.linalg.cholesky(codes.T @ codes + lambda_ * _eye(codes))
        return cls(codes, lambda_, energy, factor, solver, num_refine_steps, tolerance)

    def ridge(self, rhs: Tensor) -> Tensor:
        """``(lambda I + C'C)^{-1} rhs`` for the rows of ``rhs [n, D]``."""
        return torch.cholesky_solve(rhs.T, self.factor).T

    def dual_weights(self, y: Tensor, nearest: Tensor, scale: float | Tensor) -> Tensor:
        """``Proj(e_{k*} + C y / scale)``: the optimum where y is its residual z - C'p and scale is lambda (the fixed
        point of the optimality conditions), the relaxation where y is y_0 and scale is 1."""
        p = (y / scale) @ self.codes.T
        _add_at(p, nearest, 1.0)
        project_simplex_(p)
        return p

    def weights(self, z: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
        """p ``[n, V]`` and its residual ``[n]``."""
        p = self.dual_weights(self.ridge(z - self.codes[nearest]), nearest, 1.0)
        if self.solver == "exact":
            return solve_exactly(self, z, nearest, p)
        if self.solver == "refined":
            p = accelerate(self, z, nearest, p, self.num_refine_steps)
        return p, z.new_zeros(z.shape[0])


def accelerate(problem: Problem, z: Tensor, nearest: Tensor, p: Tensor, num_steps: int) -> Tensor:
    """FISTA with gradient restart per token, from ``p [n, V]``; overwrites ``p``.

    p_{t+1} = Proj(v - (C (C'v - z) + lambda (v - e_k*)) / L), v = p_{t+1} + beta (p_{t+1} - p_t), L = s_max^2 + lambda
    """
    # The margin keeps L an upper bound under rounding.
    lipschitz = problem.energy * (1 + 1e-4) + problem.lambda_
    decay = problem.lambda_ / lipschitz
    v, momentum = p.clone(), p.new_ones(p.shape[0], 1)
    new, work = torch.empty_like(p), torch.empty_like(p)
    for _ in range(num_steps):
        torch.mm((z - v @ problem.codes) / lipschitz, problem.codes.T, out=new)
        new.addcmul_(v, 1 - decay)
        _add_at(new, nearest, decay)
        project_simplex_(new)
        step = torch.sub(new, p, out=p)
        uphill = torch.sub(v, new, out=work).mul_(step).sum(-1, keepdim=True) > 0
        grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        beta = torch.where(uphill, 0, (momentum - 1) / grown)
        momentum = torch.where(uphill, 1, grown)
        torch.addcmul(new, step, beta, out=v)
        p, new = new, p
    return p


def solve_exactly(problem: Problem, z: Tensor, nearest: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Accelerated steps, then Newton steps, then twice as many, until every row has converged."""
    residual = z.new_empty(z.shape[0])
    open_rows = torch.arange(z.shape[0], device=z.device)
    for attempt in range(_NUM_ROUNDS):
        z_open, nearest_open = z[open_rows], nearest[open_rows]
        p_open = accelerate(problem, z_open, nearest_open, p[open_rows], _FIRST_ROUND_STEPS << attempt)
        p_open, size, converged = _polish(problem, z_open, nearest_open, p_open)
        p[open_rows], residual[open_rows] = p_open, size
        open_rows = open_rows[~converged]
        if open_rows.numel() == 0:
            break
    return p, residual


class _Dual(NamedTuple):
    """The dual function phi at y ``[n, D]``, its gradient F, and the weights they came from.

    F(y) = y - z + C'p,  p = Proj(e_k* + C y / lambda);  phi is 1-strongly convex, so |y - y*| <= |F(y)|
    """

    y: Tensor
    p: Tensor
    gradient: Tensor
    value: Tensor

    @classmethod
    def at(cls, problem: Problem, z: Tensor, nearest: Tensor, y: Tensor) -> _Dual:
        p = problem.dual_weights(y, nearest, problem.lambda_)
        z_q = p @ problem.codes
        at_nearest = p.gather(1, nearest[:, None])[:, 0]
        value = (y * (y / 2 - z + z_q)).sum(-1) + problem.lambda_ * (at_nearest - p.square().sum(-1) / 2)
        return cls(y, p, y - z + z_q, value)

    def where(self, condition: Tensor, other: _Dual) -> _Dual:
        """Per row: self where ``condition [n]`` holds, else ``other``."""
        rows = condition[:, None]
        return _Dual(
            torch.where(rows, self.y, other.y),
            torch.where(rows, self.p, other.p),
            torch.where(rows, self.gradient, other.gradient),
            torch.where(condition, self.value, other.value),
        )


def _polish(problem: Problem, z: Tensor, nearest: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Damped semismooth Newton on F(y) = 0 from the primal ``p [n, V]``.

    Returns the better of the old and the new weights, a bound of |z - C'p - y*| ``[n]`` and whether it is small enough.
    """
    dual = _Dual.at(problem, z, nearest, z - p @ problem.codes)
    bound_before = _norm(dual.gradient)
    length = torch.ones_like(dual.value)
    for _ in range(_NUM_NEWTON_STEPS):
        size = _norm(dual.gradient)
        converged = 2 * size <= _threshold(problem, dual.y)
        if converged.all():
            break
        direction = _newton_direction(problem, dual)
        trial = _Dual.at(problem, z, nearest, dual.y + length[:, None] * direction)
        slope = (dual.gradient * direction).sum(-1)
        # Close to the root the values differ by less than rounding; there the gradient's size decides.
        better = (trial.value <= dual.value + 1e-4 * length * slope) | (_norm(trial.gradient) <= 0.5 * size)
        dual = trial.where(better & ~converged, dual)
        length = torch.where(better, 1, length / 2)
    # z - C'p = y - F, so it is within |F| + |y - y*| <= 2 |F| of the optimum.
    bound = 2 * _norm(dual.gradient)
    converged = bound <= _threshold(problem, dual.y)
    take = converged | (_objective(problem, z, nearest, dual.p) <= _objective(problem, z, nearest, p))
    return torch.where(take[:, None], dual.p, p), torch.where(take, bound, bound_before), converged


def _newton_direction(problem: Problem, dual: _Dual) -> Tensor:
    """``-(I + C' P_S C / lambda)^{-1} F = -(F - (dz_q/dz) F)`` ``[n, D]``."""
    direction = torch.empty_like(dual.gradient)
    columns, _, counts = pack(dual.p)
    for rows, width in by_support(counts, problem.codes):
        gradient = dual.gradient[rows]
        support = Support.gather(problem, columns[rows, :width], counts[rows])
        direction[rows] = support.combine(support.multipliers(gradient, None)) - gradient
    return direction


def _objective(problem: Problem, z: Tensor, nearest: Tensor, p: Tensor) -> Tensor:
    """``|z - C'p|^2 + lambda (|p|^2 - 2 p_k*)`` ``[n]``: the primal objective up to a constant."""
    at_nearest = p.gather(1, nearest[:, None])[:, 0]
    return (z - p @ problem.codes).square().sum(-1) + problem.lambda_ * (p.square().sum(-1) - 2 * at_nearest)


def _threshold(problem: Problem, y: Tensor) -> Tensor:
    """The residual ``[n]`` at which to stop: ``tolerance`` beside the codes' size, or what rounding leaves of F(y)."""
    norms = problem.codes.square().sum(-1)
    largest = norms.max().sqrt()
    # Products of z - C'p with the codes, divided by lambda and multiplied by the codes again.
    rounding = 4 * torch.finfo(y.dtype).eps * (largest + _norm(y) * (1 + largest.square() / problem.lambda_))
    return torch.maximum(problem.tolerance * norms.mean().sqrt(), rounding)


@dataclass(frozen=True)
class Support:
    """The codes that carry weight, padded: differences from their mean B = P_S C ``[n, M, D]``, which are valid."""

    codes: Tensor
    valid: Tensor
    lambda_: Tensor

    @classmethod
    def gather(cls, problem: Problem, columns: Tensor, counts: Tensor) -> Support:
        valid = torch.arange(columns.shape[1], device=counts.device) < counts[:, None]
        active = center_on_support(problem.codes[columns.long()].mT, valid[:, None]).mT
        return cls(active, valid, problem.lambda_)

    def combine(self, u: Tensor) -> Tensor:
        """``B'u`` ``[n, D]``, which is C'u for every u of sum zero on the support."""
        return (u[:, None] @ self.codes)[:, 0]

    def tangent(self, g_q: Tensor, g_p: Tensor | None) -> Tensor:
        """``h = P_S (g_p + C g_q)`` ``[n, M]``."""
        h = (self.codes @ g_q[..., None])[..., 0]
        return h if g_p is None else h + center_on_support(g_p, self.valid)

    def multipliers(self, g_q: Tensor, g_p: Tensor | None) -> Tensor:
        """``u = (lambda I + B B')^{-1} h`` ``[n, M]``, solved in the smaller of the two spaces."""
        h, codes = self.tangent(g_q, g_p), self.codes
        if codes.shape[1] <= codes.shape[2]:
            return _solve(codes @ codes.mT + self.lambda_ * _eye(codes.mT), h)
        w = _solve(codes.mT @ codes + self.lambda_ * _eye(codes), self.combine(h))
        return (h - (codes @ w[..., None])[..., 0]) / self.lambda_


def _solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve symmetric positive definite ``[n, d, d]`` systems for ``rhs [n, d]``."""
    solution: Tensor = torch.cholesky_solve(rhs[..., None], torch.linalg.cholesky(matrix))
    return solution[..., 0]


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


def _add_at(p: Tensor, columns: Tensor, value: float | Tensor) -> None:
    """``p[i, columns[i]] += value``."""
    p[torch.arange(p.shape[0], device=p.device), columns] += value


def pack(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zero entries of ``p [n, V]``: columns and values ``[n, M]``, padded with zeros, and how many ``[n]``."""
    rows, columns = p.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=p.shape[0])
    width = int(counts.max()) if p.shape[0] else 0
    place = torch.arange(rows.shape[0], device=p.device) - (counts.cumsum(0) - counts)[rows]
    packed = p.new_zeros(p.shape[0], width)
    packed[rows, place] = p[rows, columns]
    packed_columns = columns.new_zeros(p.shape[0], width, dtype=torch.int32)
    packed_columns[rows, place] = columns.int()
    return packed_columns, packed, counts


def by_support(counts: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, int]]:
    """All rows, in chunks of like support: their numbers, and the largest support among them."""
    order = counts.argsort()
    while order.numel():
        # The last row has the largest support of those left, so it bounds the memory of the chunk.
        width = int(counts[order[-1]])
        dim = codes.shape[1]
        size = chunk_size(width * dim + min(width, dim) ** 2, codes)
        order, rows = order[:-size], order[-size:]
        yield rows, width


def chunk_size(elements_per_row: int, like: Tensor) -> int:
    """Rows of a chunk whose largest temporary has ``elements_per_row``."""
    return max(1, (CUDA_TILE_ELEMENTS if like.is_cuda else CPU_TILE_ELEMENTS) // elements_per_row)
