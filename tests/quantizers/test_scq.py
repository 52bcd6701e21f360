from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tessella.ops import _convex_solver, convex, nearest
from tessella.ops._convex_solver import Problem, spectrum
from tessella.ops.convex import ConvexCode, Solver, convex_combination
from tessella.ops.simplex import project_simplex
from tessella.quantizers.scq import SCQ

SOLVERS = get_args(Solver)
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def problem(num_rows: int, num_codes: int, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and codes ``[N, D], [V, D]`` in float64 with |c| about 1; half of the tokens lie well inside the hull."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randn(num_codes, dim, generator=rng, dtype=torch.float64) / dim**0.5
    z = torch.randn(num_rows, dim, generator=rng, dtype=torch.float64) / dim**0.5
    z[::2] *= 0.3
    return z, codes


def solve(z: Tensor, codes: Tensor, lambda_: float, **options: Any) -> ConvexCode:
    options = {"solver": "exact", "tolerance": 1e-12, "return_weights": True, **options}
    return convex_combination(z, codes, nearest(z, codes), lambda_, **options)


def weights(z: Tensor, codes: Tensor, lambda_: float, **options: Any) -> Tensor:
    p = solve(z, codes, lambda_, **options).weights
    assert p is not None
    return p


def one_hot(z: Tensor, codes: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(nearest(z, codes), len(codes)).to(z.dtype)


def objective(z: Tensor, codes: Tensor, p: Tensor, lambda_: float) -> Tensor:
    return (z - p @ codes).square().sum(-1) + lambda_ * (p - one_hot(z, codes)).square().sum(-1)


def test_the_docstring_claims_no_more_than_is_known() -> None:
    told = " ".join((SCQ.__doc__ or "").split())
    assert "as published" not in told
    assert "our reading of the paper's scalable algorithm" in told
    assert "how it projects and its code are not public" in told


class TestByHand:
    """Codes 0 and 1 on a line, z between them and closer to 0: p_1 = z / (1 + 2 lambda)."""

    # d/dp [(z - p)^2 + 2 lambda p^2] = 0
    @pytest.mark.parametrize("solver", ["exact", "refined"])
    @pytest.mark.parametrize("lambda_", [1e-3, 0.5, 3.0])
    def test_two_codes(self, solver: Solver, lambda_: float) -> None:
        codes = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)
        z = torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
        out = solve(z, codes, lambda_, solver=solver, num_refine_steps=100)
        assert out.weights is not None
        p = 0.4 / (1 + 2 * lambda_)
        assert out.weights[0].tolist() == pytest.approx([1 - p, p], abs=1e-9)
        assert out.z_q.item() == pytest.approx(p, abs=1e-9)
        assert out.support_size.tolist() == [2]
        assert out.mean_weights.tolist() == pytest.approx([1 - p, p], abs=1e-9)
        out.z_q.sum().backward()
        assert z.grad is not None
        assert z.grad.item() == pytest.approx(1 / (1 + 2 * lambda_), abs=1e-9)
        # For codes a, b: z_q = a + (z - a) D / (D + 2 lambda), D = (b - a)^2, at a = 0, b = 1
        factor = 1 / (1 + 2 * lambda_)
        slope = 0.4 * 2 * 2 * lambda_ * factor**2  # z dfactor/db
        assert codes.grad is not None
        assert codes.grad[:, 0].tolist() == pytest.approx([1 - factor - slope, slope], abs=1e-9)

    def test_relaxed(self) -> None:
        # y_0 = (z - 0) / (lambda + 0 + 1) = 0.2 at lambda = 1; p_r = (1, 0) + (0, 1) y_0, theta = 0.1
        codes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        p = weights(torch.tensor([[0.4]], dtype=torch.float64), codes, 1.0, solver="relaxed")
        torch.testing.assert_close(p, torch.tensor([[0.9, 0.1]], dtype=torch.float64))

    def test_beyond_the_hull_is_the_code(self) -> None:
        codes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        z = torch.tensor([[-3.0], [1.5]], dtype=torch.float64, requires_grad=True)
        out = solve(z, codes, 0.5)
        assert out.z_q[:, 0].tolist() == [0.0, 1.0]
        out.z_q.sum().backward()
        assert z.grad is not None
        assert z.grad[:, 0].tolist() == [0.0, 0.0]


class TestFacts:
    @pytest.mark.parametrize("lambda_", [1e-3, 0.05, 1.0, 100.0])
    def test_optimality_conditions_and_fixed_point(self, lambda_: float) -> None:
        z, codes = problem(24, 64, 8)
        p = weights(z, codes, lambda_)
        r = z - p @ codes
        # gradient - nu: zero on the support, not below zero elsewhere
        gradient = lambda_ * (p - one_hot(z, codes)) - r @ codes.T
        support = p > 0
        nu = torch.where(support, gradient, 0).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        assert (gradient - nu)[support].abs().max() < 1e-10
        assert (gradient - nu).min() > -1e-10
        torch.testing.assert_close(p.sum(-1), p.new_ones(len(z)), atol=1e-13, rtol=0)
        assert (p >= 0).all()
        fixed = project_simplex(one_hot(z, codes) + r @ codes.T / lambda_)
        torch.testing.assert_close(fixed, p, atol=1e-9, rtol=0)

    def test_equals_vq_exactly_in_the_normal_cone(self) -> None:
        z, codes = problem(200, 12, 2)
        z = 2.5 * z
        c = codes[nearest(z, codes)]
        inside = ((codes - c[:, None]) @ (z - c)[..., None])[..., 0].amax(-1) <= 0
        assert 20 < inside.sum() < 180
        for lambda_ in (0.01, 1.0):
            is_hard = (weights(z, codes, lambda_) == one_hot(z, codes)).all(-1)
            assert torch.equal(is_hard, inside)

    @pytest.mark.parametrize("solver", ["exact", "relaxed"])
    def test_large_lambda_tends_to_vq_at_rate_one(self, solver: Solver) -> None:
        z, codes = problem(32, 40, 6)
        c = codes[nearest(z, codes)]
        gaps = [(solve(z, codes, lambda_, solver=solver).z_q - c).norm() for lambda_ in (1e4, 1e5, 1e6)]
        assert gaps[0] > 0
        assert (gaps[0] / gaps[1]).item() == pytest.approx(10, rel=0.02)
        assert (gaps[1] / gaps[2]).item() == pytest.approx(10, rel=0.02)

    def test_small_lambda_tends_to_the_projection_on_the_hull(self) -> None:
        z, codes = problem(12, 64, 4)
        corners = torch.eye(2, dtype=torch.float64)
        errors = [(solve(z[::2], codes, lambda_).z_q - z[::2]).square().mean() for lambda_ in (1e-3, 1e-4)]
        assert (errors[0] / errors[1]).item() == pytest.approx(100, rel=0.05)  # inside: the error is O(lambda^2)
        # Outside the segment from (1, 0) to (0, 1), whose nearest point to (1, 0.8) is (0.6, 0.4)
        out = solve(torch.tensor([[1.0, 0.8]], dtype=torch.float64), corners, 1e-9)
        assert out.z_q[0].tolist() == pytest.approx([0.6, 0.4], abs=1e-6)

    def test_error_grows_with_lambda_up_to_that_of_vq(self) -> None:
        z, codes = problem(40, 50, 5)
        errors = torch.stack(
            [(z - solve(z, codes, 10.0**power).z_q).square().sum(-1) for power in range(-3, 4)]
            + [(z - codes[nearest(z, codes)]).square().sum(-1)]
        )
        assert (errors.diff(dim=0) >= -1e-12).all()

    def test_jacobian(self) -> None:
        z, codes = problem(1, 20, 4)
        lambda_ = 0.2
        jacobian = torch.autograd.functional.jacobian(lambda x: solve(x, codes, lambda_).z_q[0], z)[:, 0]
        support = weights(z, codes, lambda_)[0] > 0
        active = codes[support] - codes[support].mean(0)
        eye = torch.eye(4, dtype=torch.float64)
        expected = eye - lambda_ * torch.linalg.inv(lambda_ * eye + active.T @ active)
        torch.testing.assert_close(jacobian, expected)
        eigenvalues = torch.linalg.eigvalsh(jacobian)
        assert eigenvalues.min() > -1e-12
        assert eigenvalues.max() < 1
        assert (eigenvalues > 1e-9).sum() <= support.sum() - 1

    def test_support_may_exceed_dimension_plus_one(self) -> None:
        z, codes = problem(60, 64, 3)
        assert solve(z, codes, 0.5).support_size.max() > 4

    @every_solver
    def test_translation(self, solver: Solver) -> None:
        z, codes = problem(10, 30, 4)
        p, moved = weights(z, codes, 0.1, solver=solver), weights(z + 3, codes + 3, 0.1, solver=solver)
        if solver == "relaxed":
            assert (p - moved).abs().max() > 1e-2  # dropping 1'p = 1 gives this up
        else:
            torch.testing.assert_close(p, moved, atol=1e-9, rtol=0)


class TestSolvers:
    @pytest.mark.parametrize("lambda_", [1e-2, 0.3, 5.0])
    def test_against_an_interior_point_solver(self, lambda_: float) -> None:
        cvxpy = pytest.importorskip("cvxpy", reason="cvxpy is the oracle of this test")
        z, codes = problem(6, 24, 4)
        p = weights(z, codes, lambda_)
        for row, target in enumerate(one_hot(z, codes)):
            x = cvxpy.Variable(len(codes))
            cost = cvxpy.sum_squares(z[row].numpy() - codes.numpy().T @ x)
            cost += lambda_ * cvxpy.sum_squares(x - target.numpy())
            oracle = cvxpy.Problem(cvxpy.Minimize(cost), [x >= 0, cvxpy.sum(x) == 1])
            oracle.solve(solver="CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
            torch.testing.assert_close(p[row], torch.from_numpy(x.value), atol=1e-6, rtol=0)
            assert objective(z, codes, p, lambda_)[row].item() <= oracle.value + 1e-10

    @pytest.mark.parametrize("lambda_", [0.01, 0.1, 1.0])
    def test_relaxed_equals_the_system_of_all_codes(self, lambda_: float) -> None:
        z, codes = problem(10, 50, 6)
        eye = torch.eye(50, dtype=torch.float64)
        rhs = codes @ z.T + lambda_ * one_hot(z, codes).T
        ridge = torch.linalg.solve(codes @ codes.T + lambda_ * eye, rhs).T
        expected = project_simplex(ridge)
        torch.testing.assert_close(weights(z, codes, lambda_, solver="relaxed"), expected, atol=1e-12, rtol=0)

    def test_refining_lowers_the_objective_to_the_optimum(self) -> None:
        z, codes = problem(40, 64, 8)
        best = objective(z, codes, weights(z, codes, 0.1), 0.1)
        gaps = []
        for steps in (0, 5, 20, 80, 400):
            p = weights(z, codes, 0.1, solver="refined", num_refine_steps=steps)
            gaps.append((objective(z, codes, p, 0.1) - best).mean().item())
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[2] < 0.02 * gaps[0]
        assert abs(gaps[-1]) < 1e-10

    @pytest.mark.parametrize("lambda_", [1e-2, 0.1, 10.0])
    def test_float32(self, lambda_: float) -> None:
        z, codes = problem(50, 100, 16)
        out = solve(z.float(), codes.float(), lambda_, tolerance=1e-6)
        z_q = solve(z.float().double(), codes.float().double(), lambda_).z_q
        error = (out.z_q.double() - z_q).norm(dim=-1)
        assert (error <= out.residual + 1e-6).all()
        assert out.residual.max() < 1e-3
        assert error.max() < 1e-6 * (1 + 1 / lambda_)

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        z, codes = problem(13, 40, 5)
        z.requires_grad_()
        codes.requires_grad_()
        results = []
        for elements in (1, 200, 1 << 20):
            monkeypatch.setattr(_convex_solver, "CPU_TILE_ELEMENTS", elements)
            z_q = solve(z, codes, 0.1).z_q
            results.append((z_q, *torch.autograd.grad(z_q.square().sum(), (z, codes))))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], atol=1e-11, rtol=0)

    def test_names_and_dtypes_are_checked(self) -> None:
        z, codes = problem(3, 8, 2)
        with pytest.raises(ValueError, match="unknown solver 'newton'"):
            solve(z, codes, 0.1, solver="newton")
        with pytest.raises(TypeError, match="both be float32 or both float64"):
            convex_combination(z.float(), codes, nearest(z, codes), 0.1, solver="exact")


class TestGradients:
    # Many steps: the implicit gradient of the refined solver is that of the optimum it tends to.
    OPTIONS: dict[str, Any] = {"tolerance": 1e-13, "num_refine_steps": 200}  # noqa: RUF012

    @every_solver
    @pytest.mark.parametrize(("num_codes", "dim"), [(12, 3), (30, 1), (6, 8), (2, 2)])
    def test_gradcheck(self, solver: Solver, num_codes: int, dim: int) -> None:
        z, codes = problem(5, num_codes, dim, seed=1)

        def both(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
            out = solve(z, codes, 0.3, solver=solver, **self.OPTIONS)
            assert out.weights is not None
            return out.z_q, out.weights

        assert torch.autograd.gradcheck(both, (z.requires_grad_(), codes.requires_grad_()), rtol=1e-5, fast_mode=True)

    @every_solver
    def test_support_beyond_the_capacity_is_recomputed(self, solver: Solver) -> None:
        # One dimension, and codes on one side of every token: nearly all of them share the weight.
        z = torch.full((2, 1), -1.0, dtype=torch.float64)
        codes = torch.linspace(0.95, 1.0, 300, dtype=torch.float64)[:, None]
        codes[0], z[1] = -1.4, -0.9
        results = []
        for return_weights in (False, True):
            leaves = z.clone().requires_grad_(), codes.clone().requires_grad_()
            out = solve(*leaves, 50.0, solver=solver, return_weights=return_weights, **self.OPTIONS)
            assert out.support_size.max() > 64
            results.append(torch.autograd.grad(out.z_q.square().sum(), leaves))
        torch.testing.assert_close(results[0], results[1])
        assert results[0][1].count_nonzero() > 64

    def test_large_lambda_does_not_lose_the_gradient(self) -> None:
        # dz_q/dz = 1 / (1 + 2 lambda); as g - lambda A^{-1} g it would have an error of a percent in float32.
        z = torch.tensor([[0.4]], requires_grad=True)
        solve(z, torch.tensor([[0.0], [1.0]]), 1e5, tolerance=1e-6).z_q.sum().backward()
        assert z.grad is not None
        assert z.grad.item() == pytest.approx(1 / (1 + 2e5), rel=1e-4)


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@every_solver
def test_memory_is_bounded(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    # V x V would be 4e6 elements and N x V 1e5, against a budget of 2e4 and codes of 8e3.
    monkeypatch.setattr(_convex_solver, "CPU_TILE_ELEMENTS", 20_000)
    z, codes = (x.float() for x in problem(50, 2000, 4))
    energy, lambda_ = spectrum(codes, 0.1)
    with _LargestTensor() as forward:
        shared = Problem.build(codes, lambda_, energy, solver, 3, 1e-2)
        z_q, values, columns, support_size, _, _ = convex.combine_rows(shared, z, nearest(z, codes), None, 64)
    saved = convex._Saved(z, nearest(z, codes), z_q, values, columns, support_size)
    with _LargestTensor() as backward:
        convex.combine_rows_backward(shared, saved, torch.ones_like(z), torch.zeros_like(values))
    assert forward.elements <= 20_000
    assert backward.elements <= 20_000


@settings(deadline=None, max_examples=40)
@given(
    num_codes=st.integers(2, 40),
    dim=st.integers(1, 6),
    log_scale=st.floats(-5, 5),
    log_lambda=st.floats(-12, 12),
    offset=st.sampled_from([0.0, 100.0]),
    repeated=st.booleans(),
    solver=st.sampled_from(["relaxed", "refined"]),
    seed=st.integers(0, 2**31),
)
def test_any_scale(
    num_codes: int,
    dim: int,
    log_scale: float,
    log_lambda: float,
    offset: float,
    repeated: bool,
    solver: Solver,
    seed: int,
) -> None:
    check_any_scale(num_codes, dim, log_scale, log_lambda, offset, repeated, solver, seed)


@pytest.mark.parametrize("log_lambda", [-12.0, -2.0, 0.0, 12.0])
@pytest.mark.parametrize("repeated", [False, True])
def test_any_scale_exactly(log_lambda: float, repeated: bool) -> None:
    check_any_scale(12, 3, 0.0, log_lambda, 0.0, repeated, "exact", 0)


def check_any_scale(
    num_codes: int,
    dim: int,
    log_scale: float,
    log_lambda: float,
    offset: float,
    repeated: bool,
    solver: Solver,
    seed: int,
) -> None:
    """Finite, in the simplex, no farther from z than the nearest code; tokens at codes, inside, far away, repeated."""
    torch.manual_seed(seed)
    quantizer = SCQ(num_codes, dim, lambda_=10**log_lambda, solver=solver, return_weights=True)
    codes = 10**log_scale * torch.randn(num_codes, dim) + offset
    if repeated:
        codes[1:] = codes[:1]
    quantizer.embedding.data.copy_(codes)
    z = torch.cat([codes[:3], codes.mean(0, keepdim=True), torch.randn(3, dim), 1e4 * torch.randn(2, dim)])
    z.requires_grad_()
    out = quantizer(z)
    (out.z_q.sum() + out.loss).backward()
    assert out.weights is not None
    assert z.grad is not None
    assert quantizer.embedding.grad is not None
    for tensor in (out.z_q, out.loss, out.weights, z.grad, quantizer.embedding.grad, *out.metrics.values()):
        assert tensor.isfinite().all()
    assert (out.weights >= 0).all()
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(len(z)), atol=1e-5, rtol=0)
    if solver != "relaxed":
        soft = (z - out.z_q).norm(dim=-1)
        hard = (z - quantizer.indices_to_codes(out.indices)).norm(dim=-1)
        assert (soft <= hard * (1 + 1e-5) + 1e-5 * (1 + codes.norm(dim=-1).max())).all()


class TestModule:
    def test_losses(self) -> None:
        # z_q = 0.4 / (1 + 2 * 0.5) = 0.2, so the error is 0.2^2 = 0.04, and dz_q/dz = 1/2
        expected = {"vq": (1.25 * 0.04, -0.2 + 0.25 * 0.4), "joint": (0.04, 0.2), "none": (0.0, None)}
        for loss, (value, slope) in expected.items():
            quantizer = SCQ(2, 1, lambda_=0.5, solver="exact", loss=loss)  # type: ignore[arg-type]
            quantizer.embedding.data = torch.tensor([[0.0], [1.0]])
            z = torch.tensor([[0.4]], requires_grad=True)
            out = quantizer(z)
            assert out.loss.item() == pytest.approx(value, abs=1e-6)
            assert out.metrics["quantization_error"].item() == pytest.approx(0.04, abs=1e-6)
            if slope is None:
                assert not out.loss.requires_grad
                continue
            out.loss.backward()
            assert z.grad is not None
            # vq: codebook term -2 r dz_q/dz = -0.2, commitment 0.25 * 2 r = 0.1; joint: 2 r (1 - dz_q/dz) = 0.2
            assert z.grad.item() == pytest.approx(slope, abs=1e-5)

    def test_metrics_by_hand(self) -> None:
        quantizer = SCQ(3, 1, lambda_=0.5, solver="exact", return_weights=True)
        quantizer.embedding.data = torch.tensor([[0.0], [1.0], [-9.0]])
        out = quantizer(torch.tensor([[0.4], [2.0], [0.4], [2.0]]))
        # p = (.8, .2, 0) and (0, 1, 0) alternate: mean (.4, .6, 0)
        torch.testing.assert_close(out.weights, torch.tensor([[0.8, 0.2, 0.0], [0.0, 1.0, 0.0]] * 2))
        entropy = -0.4 * math.log(0.4) - 0.6 * math.log(0.6)
        assert out.metrics["soft_perplexity"].item() == pytest.approx(math.exp(entropy), rel=1e-5)
        assert out.metrics["soft_usage"].item() == pytest.approx(2 / 3)
        assert out.metrics["support_size"].item() == pytest.approx(1.5)
        assert out.metrics["hard_gap"].item() == pytest.approx(0.02, rel=1e-4)
        assert out.metrics["quantization_error"].item() == pytest.approx((0.04 + 1) / 2, rel=1e-4)
        assert out.metrics["perplexity"].item() == pytest.approx(2)
        assert out.metrics["solver_residual"].item() < 1e-5
        assert out.indices[:, 0].tolist() == [0, 1, 0, 1]

    def test_tokens_are_the_nearest_codes(self) -> None:
        torch.manual_seed(0)
        quantizer, z = SCQ(40, 4, lambda_rel=1e-2, solver="exact", return_weights=True), torch.randn(60, 4)
        out = quantizer(z)
        assert out.weights is not None
        assert torch.equal(out.indices[:, 0], torch.cdist(z, quantizer.codebook).argmin(-1))

    @every_solver
    def test_soft_in_both_modes(self, solver: Solver) -> None:
        torch.manual_seed(0)
        quantizer, z = SCQ(30, 4, solver=solver), 0.3 * torch.randn(20, 4)
        assert quantizer.is_soft
        training, evaluation = quantizer.train()(z), quantizer.eval()(z)
        assert torch.equal(training.z_q, evaluation.z_q)
        assert training.metrics["hard_gap"] > 1e-4

    def test_hard_output_with_the_soft_gradient(self) -> None:
        torch.manual_seed(0)
        soft = SCQ(30, 4, loss="none")
        hard = SCQ(30, 4, loss="none", hard=True)
        hard.load_state_dict(soft.state_dict())
        assert not hard.is_soft
        g, grads = torch.randn(20, 4), []
        for quantizer in (soft, hard):
            z = (0.3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(1))).requires_grad_()
            out = quantizer(z)
            (out.z_q * g).sum().backward()
            grads.append((z.grad, quantizer.embedding.grad))
        assert torch.equal(out.z_q, hard.indices_to_codes(out.indices))
        torch.testing.assert_close(grads[0], grads[1])

    def test_lambda_relative_to_the_codes(self) -> None:
        torch.manual_seed(0)
        z, relative = torch.randn(10, 4), SCQ(16, 4, lambda_rel=0.2, return_weights=True)
        absolute = SCQ(16, 4, lambda_=0.2 * relative.codebook.square().sum(-1).mean().item(), return_weights=True)
        absolute.load_state_dict(relative.state_dict())
        torch.testing.assert_close(relative(z).weights, absolute(z).weights, atol=1e-5, rtol=1e-4)
        larger = SCQ(16, 4, lambda_rel=0.2, return_weights=True)
        larger.embedding.data = 50 * relative.embedding.data
        torch.testing.assert_close(larger(50 * z).weights, relative(z).weights, atol=1e-4, rtol=1e-3)
        assert SCQ(16, 4).lambda_rel == 0.1
        assert SCQ(16, 4, lambda_=1.0).lambda_rel is None

    @every_solver
    def test_masked_rows_count_for_nothing(self, solver: Solver) -> None:
        torch.manual_seed(0)
        quantizer = SCQ(20, 3, solver=solver, tolerance=1e-5)
        z, mask = torch.randn(12, 3), torch.arange(12) % 3 != 0
        results = []
        for rows in (z, torch.where(mask[:, None], z, 77.0), z[mask]):
            leaf = rows.clone().requires_grad_()
            quantizer.zero_grad()
            out = quantizer(leaf, mask if len(rows) == 12 else None)
            out.loss.backward()
            assert leaf.grad is not None
            assert len(rows) < 12 or not leaf.grad[~mask].any()
            results.append((out.loss, out.metrics, quantizer.embedding.grad))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-4)

    @every_solver
    def test_weights_and_empty_batch(self, solver: Solver) -> None:
        out = SCQ(9, 3, solver=solver, return_weights=True)(torch.zeros(2, 0, 3, requires_grad=True))
        assert out.weights is not None
        assert out.weights.shape == (2, 0, 9)
        (out.z_q.sum() + out.weights.sum() + out.loss).backward()
        assert SCQ(9, 3)(torch.zeros(2, 3)).weights is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lambda_": 1.0, "lambda_rel": 1.0}, "lambda_ or lambda_rel, not both"),
            ({"lambda_": 0.0}, "lambda_ must be above 0"),
            ({"lambda_rel": float("inf")}, "lambda_rel must be above 0 and finite"),
            ({"tolerance": -1.0}, "tolerance must be above 0"),
            ({"solver": "admm"}, "unknown solver 'admm'; choose one of: exact, relaxed, refined"),
            ({"loss": "mse"}, "unknown loss 'mse'; choose one of: vq, joint, none"),
            ({"num_refine_steps": -1}, "num_refine_steps must be at least 0, got -1"),
        ],
    )
    def test_bad_arguments_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SCQ(8, 2, **options)
