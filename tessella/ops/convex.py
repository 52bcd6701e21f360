r"""Soft convex quantization: every token as the convex combination of codes that is nearest to it.

.. math:: p(z, C) = argmin_p |z - C'p|^2 + \lambda |p - e_{k*}|^2 \;\text{s.t.}\; p \ge 0, 1'p = 1, \quad z_q = C'p

with the codes in the rows of C ``[V, D]`` and k* the nearest one. Only D x D systems and systems of the size of a
token's support S = supp p are ever solved, and tokens are taken in chunks: memory is O(N (D + capacity) + V D).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tessella.ops._convex_solver import Problem, Support, by_support, chunk_size, pack, spectrum
from tessella.ops._tiles import check_mask, check_vectors, full_precision, spans

Solver = Literal["exact", "relaxed", "refined"]


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
    energy, lambda_ = spectrum(codebook.detach(), lambda_)
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
    problem: Problem, z: Tensor, nearest: Tensor, mask: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward pass, chunk by chunk.

    Returns z_q ``[N, D]``, the first ``capacity`` non-zero weights and their columns ``[N, capacity]``, the number of
    non-zero weights ``[N]``, the mean weights ``[V]`` and the residual ``[N]``.
    """
    num_rows, num_codes = z.shape[0], problem.codes.shape[0]
    z_q, values, columns, support_size, total, residual = _allocate(z, problem.codes, capacity)
    counted = torch.ones_like(residual) if mask is None else mask.to(z.dtype)
    total.zero_()
    for rows in spans(num_rows, chunk_size(num_codes, z)):
        p, residual[rows] = problem.weights(z[rows], nearest[rows])
        z_q[rows] = p @ problem.codes
        total += counted[rows] @ p
        packed_columns, packed, support_size[rows] = pack(p)
        values[rows], columns[rows] = _fit(packed, capacity), _fit(packed_columns, capacity)
    return z_q, values, columns, support_size, total / counted.sum().clamp(min=1), residual


def combine_rows_backward(
    problem: Problem, saved: _Saved, grad_z_q: Tensor, grad_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients ``dz [N, D]`` and ``dC [V, D]`` of :func:`combine_rows`."""
    grad_z = torch.empty_like(saved.z)
    grad_codes = torch.zeros_like(problem.codes)
    differentiate = _differentiate_relaxed if problem.solver == "relaxed" else _differentiate_optimum
    for rows, width in by_support(saved.support_size, problem.codes):
        part = saved.select(rows)
        g_p = grad_values[rows]
        if width > saved.values.shape[1]:
            columns, values, _ = pack(problem.weights(part.z, part.nearest)[0])
            width = columns.shape[1]
            part, g_p = part._replace(values=values, columns=columns), _fit(g_p, width)
        part = part._replace(values=part.values[:, :width], columns=part.columns[:, :width])
        grad_z[rows] = differentiate(problem, part, grad_z_q[rows], g_p[:, :width], grad_codes)
    return grad_z, grad_codes


def _differentiate_optimum(problem: Problem, saved: _Saved, g_q: Tensor, g_p: Tensor, grad_codes: Tensor) -> Tensor:
    """From the optimality conditions, with r = z - z_q and u the multipliers of :class:`Support`:

    dL/dz = C'u,  dL/dC = u r' + p (g_q - C'u)'  (added to ``grad_codes``)
    """
    support = Support.gather(problem, saved.columns, saved.support_size)
    u = support.multipliers(g_q, g_p)
    grad_z = support.combine(u)
    _add_rows(grad_codes, saved.columns, _outer(u, saved.z - saved.z_q) + _outer(saved.values, g_q - grad_z))
    return grad_z


def _differentiate_relaxed(problem: Problem, saved: _Saved, g_q: Tensor, g_p: Tensor, grad_codes: Tensor) -> Tensor:
    """From p = Proj(p_r), p_r = e_k* + C y_0, with A = lambda I + C'C, h = P_S (g_p + C g_q), t = A^{-1} C'h:

    dL/dz = t,  dL/dC = (h - C t) y_0' - p_r t' + p g_q'  (added to ``grad_codes``)
    """
    support = Support.gather(problem, saved.columns, saved.support_size)
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
        problem = Problem.build(codes, lambda_, energy, solver, num_refine_steps, tolerance)
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
        problem = Problem.build(codes, lambda_, energy, solver, num_refine_steps, tolerance)
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
