r"""Soft convex quantization: every token as the convex combination of codes that is nearest to it.

.. math:: p(z, C) = argmin_p |z - C'p|^2 + \lambda |p - e_{k*}|^2 \;\text{s.t.}\; p \ge 0, 1'p = 1, \quad z_q = C'p

with the codes in the rows of C ``[V, D]`` and k* the nearest one. Only D x D systems and systems of the size of a
token's support S = supp p are ever solved, and tokens are taken in chunks: memory is O(N (D + capacity) + V D).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tessella.ops._tiles import CPU_TILE_ELEMENTS, CUDA_TILE_ELEMENTS, check_mask, check_vectors, full_precision, spans
from tessella.ops.simplex import center_on_support, project_simplex_

Solver = Literal["exact", "relaxed", "refined"]

# Rounds of the exact solver; the r-th takes 2^r times as many accelerated steps, then at most so many Newton steps.
_NUM_ROUNDS = 6
_FIRST_ROUND_STEPS = 20
_NUM_NEWTON_STEPS = 12


class ConvexCode(NamedTuple):
    """The convex combinations of N tokens.

    Attributes:
        z_q: ``[N, D]`` = C'p, differentiable.
        weights: p ``[N, V]``, differentiable; None unless asked for.
        support_size: ``[N]`` number of non-zero weights.
        mean_weights: ``[V]`` p averaged over unmasked tokens; zero where there is none.
        residual: ``[N]`` upper bound of the distance between z - z_q and its optimum (exact solver; zero otherwise).
    """

    z_q: Tensor
    weights: Tensor | None
    support_size: Tensor
    mean_weights: Tensor
    residual: Tensor


def convex_combination(
    z: Tensor,
    codebook: Tensor,
    nearest: Tensor,
    lambda_: float | Tensor,
    *,
    solver: Solver,
    num_refine_steps: int = 20,
    tolerance: float = 1e-6,
    mask: Tensor | None = None,
    return_weights: bool = False,
) -> ConvexCode:
    r"""Solve the problem above for every row of ``z`` and differentiate its solution.

    ``"exact"`` runs accelerated projected gradient steps and polishes with semismooth Newton steps until
    ``residual <= tolerance`` times the root mean square norm of the centred codes (or rounding forbids more);
    ``"relaxed"`` drops the constraints and then projects, :math:`p = Proj(e_{k*} + C y_0)`,
    :math:`y_0 = (\lambda I + C'C)^{-1} (z - c_{k*})`; ``"refined"`` takes ``num_refine_steps`` accelerated steps from
    there. Gradients: the optimality conditions (exact, refined), the formula itself (relaxed); none through k*.

    ``lambda_`` below 32 eps s_max(C)^2 cannot be resolved in the dtype of ``z`` and is raised to that.

    Args:
        z: ``[N, D]`` float32 or float64.
        codebook: ``[V, D]``, of the dtype of ``z``.
        nearest: k* ``[N]`` int64.
        lambda_: positive.
        solver: see above.
        num_refine_steps: of the refined solver.
        tolerance: of the exact solver.
        mask: ``[N]`` bool; false rows are left out of ``mean_weights``.
        return_weights: whether to build p ``[N, V]``.

    Raises:
        TypeError: ``z`` or ``codebook`` is not float32 or float64, or their dtypes differ.
        ValueError: shapes or devices that do not fit, or an unknown solver.
    """
    check_vectors(z, codebook)
    check_mask(mask, z)
    if z.dtype not in (torch.float32, torch.float64) or z.dtype != codebook.dtype:
        raise TypeError(f"z and codebook must both be float32 or both float64, got {z.dtype} and {codebook.dtype}")
    if solver not in get_args(Solver):
        raise ValueError(f"unknown solver {solver!r}; choose one of: {', '.join(get_args(Solver))}")
    if solver != "relaxed":
        # p does not depend on a common shift of z and the codes; centred, the problem is better conditioned. The
        # relaxed solution does depend on it, and is kept as defined.
        center = codebook.detach().mean(0)
        z, codebook = z - center, codebook - center
    else:
        center = torch.zeros_like(codebook[0])
    energy, lambda_ = _spectrum(codebook.detach(), lambda_)
    num_codes = codebook.shape[0]
    # Supports are seldom larger than D; the few that are get recomputed in the backward pass.
    capacity = num_codes if return_weights else min(num_codes, max(64, 2 * z.shape[1]))
    z_q, values, columns, support_size, mean_weights, residual = _combine(
        z, codebook, nearest, lambda_, energy, mask, solver, num_refine_steps, tolerance, capacity
    )
    weights = None
    if return_weights:
        weights = torch.zeros_like(values).scatter_add(1, columns.long(), values)
    return ConvexCode(z_q + center, weights, support_size, mean_weights.detach(), residual.detach())


def _spectrum(codes: Tensor, lambda_: float | Tensor) -> tuple[Tensor, Tensor]:
    """``s_max(C)^2``, and ``lambda_`` raised to what the dtype can resolve beside it."""
    energy = torch.linalg.eigvalsh(codes.T @ codes)[-1].clamp(min=0)
    lambda_ = torch.as_tensor(lambda_, dtype=codes.dtype, device=codes.device)
    return energy, torch.maximum(lambda_, 32 * torch.finfo(codes.dtype).eps * energy)


@dataclass(frozen=True)
class _Problem:
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
    ) -> _Problem:
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
            return _solve_exactly(self, z, nearest, p)
        if self.solver == "refined":
            p = _accelerate(self, z, nearest, p, self.num_refine_steps)
        return p, z.new_zeros(z.shape[0])


def _accelerate(problem: _Problem, z: Tensor, nearest: Tensor, p: Tensor, num_steps: int) -> Tensor:
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


def _solve_exactly(problem: _Problem, z: Tensor, nearest: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Accelerated steps, then Newton steps, then twice as many, until every row has converged."""
    residual = z.new_empty(z.shape[0])
    open_rows = torch.arange(z.shape[0], device=z.device)
    for attempt in range(_NUM_ROUNDS):
        z_open, nearest_open = z[open_rows], nearest[open_rows]
        p_open = _accelerate(problem, z_open, nearest_open, p[open_rows], _FIRST_ROUND_STEPS << attempt)
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
    def at(cls, problem: _Problem, z: Tensor, nearest: Tensor, y: Tensor) -> _Dual:
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


def _polish(problem: _Problem, z: Tensor, nearest: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _newton_direction(problem: _Problem, dual: _Dual) -> Tensor:
    """``-(I + C' P_S C / lambda)^{-1} F = -(F - (dz_q/dz) F)`` ``[n, D]``."""
    direction = torch.empty_like(dual.gradient)
    columns, _, counts = _pack(dual.p)
    for rows, width in _by_support(counts, problem.codes):
        gradient = dual.gradient[rows]
        support = _Support.gather(problem, columns[rows, :width], counts[rows])
        direction[rows] = support.combine(support.multipliers(gradient, None)) - gradient
    return direction


def _objective(problem: _Problem, z: Tensor, nearest: Tensor, p: Tensor) -> Tensor:
    """``|z - C'p|^2 + lambda (|p|^2 - 2 p_k*)`` ``[n]``: the primal objective up to a constant."""
    at_nearest = p.gather(1, nearest[:, None])[:, 0]
    return (z - p @ problem.codes).square().sum(-1) + problem.lambda_ * (p.square().sum(-1) - 2 * at_nearest)


def _threshold(problem: _Problem, y: Tensor) -> Tensor:
    """The residual ``[n]`` at which to stop: ``tolerance`` beside the codes' size, or what rounding leaves of F(y)."""
    norms = problem.codes.square().sum(-1)
    largest = norms.max().sqrt()
    # Products of z - C'p with the codes, divided by lambda and multiplied by the codes again.
    rounding = 4 * torch.finfo(y.dtype).eps * (largest + _norm(y) * (1 + largest.square() / problem.lambda_))
    return torch.maximum(problem.tolerance * norms.mean().sqrt(), rounding)


@dataclass(frozen=True)
class _Support:
    """The codes that carry weight, padded: differences from their mean B = P_S C ``[n, M, D]``, which are valid."""

    codes: Tensor
    valid: Tensor
    lambda_: Tensor

    @classmethod
    def gather(cls, problem: _Problem, columns: Tensor, counts: Tensor) -> _Support:
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


def _pack(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _by_support(counts: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, int]]:
    """All rows, in chunks of like support: their numbers, and the largest support among them."""
    order = counts.argsort()
    while order.numel():
        # The last row has the largest support of those left, so it bounds the memory of the chunk.
        width = int(counts[order[-1]])
        dim = codes.shape[1]
        size = _chunk_size(width * dim + min(width, dim) ** 2, codes)
        order, rows = order[:-size], order[-size:]
        yield rows, width


def _chunk_size(elements_per_row: int, like: Tensor) -> int:
    """Rows of a chunk whose largest temporary has ``elements_per_row``."""
    return max(1, (CUDA_TILE_ELEMENTS if like.is_cuda else CPU_TILE_ELEMENTS) // elements_per_row)


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass, for N tokens; see :func:`combine_rows`."""

    z: Tensor
    nearest: Tensor
    z_q: Tensor
    values: Tensor
    columns: Tensor
    support_size: Tensor

    def select(self, rows: Tensor) -> _Saved:
        return _Saved(*(tensor[rows] for tensor in self))


def combine_rows(
    problem: _Problem, z: Tensor, nearest: Tensor, mask: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward pass, chunk by chunk.

    Returns z_q ``[N, D]``, the first ``capacity`` non-zero weights and their columns ``[N, capacity]``, the number of
    non-zero weights ``[N]``, the mean weights ``[V]`` and the residual ``[N]``.
    """
    num_rows, num_codes = z.shape[0], problem.codes.shape[0]
    z_q, values, columns, support_size, total, residual = _allocate(z, problem.codes, capacity)
    counted = torch.ones_like(residual) if mask is None else mask.to(z.dtype)
    total.zero_()
    for rows in spans(num_rows, _chunk_size(num_codes, z)):
        p, residual[rows] = problem.weights(z[rows], nearest[rows])
        z_q[rows] = p @ problem.codes
        total += counted[rows] @ p
        packed_columns, packed, support_size[rows] = _pack(p)
        values[rows], columns[rows] = _fit(packed, capacity), _fit(packed_columns, capacity)
    return z_q, values, columns, support_size, total / counted.sum().clamp(min=1), residual


def combine_rows_backward(
    problem: _Problem, saved: _Saved, grad_z_q: Tensor, grad_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients ``dz [N, D]`` and ``dC [V, D]`` of :func:`combine_rows`."""
    grad_z = torch.empty_like(saved.z)
    grad_codes = torch.zeros_like(problem.codes)
    differentiate = _differentiate_relaxed if problem.solver == "relaxed" else _differentiate_optimum
    for rows, width in _by_support(saved.support_size, problem.codes):
        part = saved.select(rows)
        g_p = grad_values[rows]
        if width > saved.values.shape[1]:
            columns, values, _ = _pack(problem.weights(part.z, part.nearest)[0])
            width = columns.shape[1]
            part, g_p = part._replace(values=values, columns=columns), _fit(g_p, width)
        part = part._replace(values=part.values[:, :width], columns=part.columns[:, :width])
        grad_z[rows] = differentiate(problem, part, grad_z_q[rows], g_p[:, :width], grad_codes)
    return grad_z, grad_codes


def _differentiate_optimum(problem: _Problem, saved: _Saved, g_q: Tensor, g_p: Tensor, grad_codes: Tensor) -> Tensor:
    """From the optimality conditions, with r = z - z_q and u the multipliers of :class:`_Support`:

    dL/dz = C'u,  dL/dC = u r' + p (g_q - C'u)'  (added to ``grad_codes``)
    """
    support = _Support.gather(problem, saved.columns, saved.support_size)
    u = support.multipliers(g_q, g_p)
    grad_z = support.combine(u)
    _add_rows(grad_codes, saved.columns, _outer(u, saved.z - saved.z_q) + _outer(saved.values, g_q - grad_z))
    return grad_z


def _differentiate_relaxed(problem: _Problem, saved: _Saved, g_q: Tensor, g_p: Tensor, grad_codes: Tensor) -> Tensor:
    """From p = Proj(p_r), p_r = e_k* + C y_0, with A = lambda I + C'C, h = P_S (g_p + C g_q), t = A^{-1} C'h:

    dL/dz = t,  dL/dC = (h - C t) y_0' - p_r t' + p g_q'  (added to ``grad_codes``)
    """
    support = _Support.gather(problem, saved.columns, saved.support_size)
    y = problem.ridge(saved.z - problem.codes[saved.nearest])
    h = support.tangent(g_q, g_p)
    t = problem.ridge(support.combine(h))
    _add_rows(grad_codes, saved.columns, _outer(h, y) + _outer(saved.values, g_q))
    # The dense terms, summed over tokens first: C t y_0' and C y_0 t', then e_k* t'.
    grad_codes -= problem.codes @ (t.T @ y + y.T @ t)
    _add_rows(grad_codes, saved.nearest[:, None], -t[:, None])
    return t


def _outer(weights: Tensor, x: Tensor) -> Tensor:
    """``[n, M], [n, D] -> [n, M, D]``."""
    return weights[..., None] * x[:, None]


def _add_rows(grad_codes: Tensor, columns: Tensor, x: Tensor) -> None:
    """``grad_codes[columns[i, j]] += x[i, j]`` for ``columns [n, M]`` and ``x [n, M, D]``."""
    grad_codes.index_add_(0, columns.flatten(), x.flatten(0, 1))


def _fit(x: Tensor, width: int) -> Tensor:
    """``x [n, M]`` cut or padded with zeros to ``[n, width]``."""
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


def _allocate(z: Tensor, codes: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty results of :func:`combine_rows`."""
    shape = (z.shape[0], capacity)
    return (
        torch.empty_like(z, memory_format=torch.contiguous_format),
        z.new_empty(shape),
        torch.empty(shape, dtype=torch.int32, device=z.device),
        torch.empty(shape[:1], dtype=torch.int64, device=z.device),
        z.new_empty(codes.shape[0]),
        z.new_empty(z.shape[0]),
    )


# The solvers stop when the data says so, and supports differ in size: opaque to torch.compile, hence custom operators.
@torch.library.custom_op("tessella::convex_combination", mutates_args=())
def _combine(
    z: Tensor,
    codes: Tensor,
    nearest: Tensor,
    lambda_: Tensor,
    energy: Tensor,
    mask: Tensor | None,
    solver: str,
    num_refine_steps: int,
    tolerance: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with full_precision(z.device):
        problem = _Problem.build(codes, lambda_, energy, solver, num_refine_steps, tolerance)
        return combine_rows(problem, z, nearest, mask, capacity)


@_combine.register_fake
def _(
    z: Tensor,
    codes: Tensor,
    nearest: Tensor,
    lambda_: Tensor,
    energy: Tensor,
    mask: Tensor | None,
    solver: str,
    num_refine_steps: int,
    tolerance: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _allocate(z, codes, capacity)


@torch.library.custom_op("tessella::convex_combination_backward", mutates_args=())
def _combine_backward(
    grad_z_q: Tensor,
    grad_values: Tensor,
    codes: Tensor,
    lambda_: Tensor,
    energy: Tensor,
    saved: list[Tensor],
    solver: str,
    num_refine_steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    with full_precision(codes.device):
        problem = _Problem.build(codes, lambda_, energy, solver, num_refine_steps, tolerance)
        return combine_rows_backward(problem, _Saved(*saved), grad_z_q, grad_values)


@_combine_backward.register_fake
def _(
    grad_z_q: Tensor,
    grad_values: Tensor,
    codes: Tensor,
    lambda_: Tensor,
    energy: Tensor,
    saved: list[Tensor],
    solver: str,
    num_refine_steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_z_q), torch.empty_like(codes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codes, nearest, lambda_, energy, _, *ctx.options, _ = inputs
    z_q, values, columns, support_size, _, _ = output
    ctx.save_for_backward(codes, lambda_, energy, *_Saved(z, nearest, z_q, values, columns, support_size))


def _differentiate(ctx: Any, grad_z_q: Tensor, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    codes, lambda_, energy, *saved = ctx.saved_tensors
    grad_z, grad_codes = _combine_backward(grad_z_q, grad_values, codes, lambda_, energy, saved, *ctx.options)
    return grad_z, grad_codes, None, None, None, None, None, None, None, None


_combine.register_autograd(_differentiate, setup_context=_save)
