from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from dense_reference import dense_index_backprop, largest_allocation, quantized_normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessella.ops import index_backprop
from tessella.ops._softmax import softmax_codes
from tessella.ops._softmax_parts import SWEPT
from tessella.ops._tiles import forced_tile

TILES = [(7, 13), (23, 64), (1024, 1024)]
TEMPERATURES = [0.01, 0.2, 1.0]  # the first lists the codes near the best, the others sweep them all
WEIGHTS = {
    "soft term": (0.0, 0.0, 0.0),
    "commitment": (1.5, 0.0, 0.0),
    "codebook": (0.0, 0.7, 0.0),
    "entropy": (0.0, 0.0, 0.3),
    "all": (1.0, 0.25, 0.05),
}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, codebook, upstream = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (23, 150, 23))
    return (z * 0.7).to(dtype), (codebook * 0.7).to(dtype), upstream.to(dtype)


def results(
    operation: Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]],
    z: Tensor,
    codebook: Tensor,
    upstream: Tensor,
    *arguments: object,
) -> dict[str, Tensor]:
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    z_q, indices, loss, metrics = operation(z, codebook, *arguments)
    (2 * loss + (z_q * upstream).sum()).backward()
    assert z.grad is not None
    assert codebook.grad is not None
    return {"z_q": z_q, "indices": indices, "loss": loss, "dz": z.grad, "dcodebook": codebook.grad, **metrics}


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    """Float64 agreement; the rounding of the dense form's logits is magnified by 1 / temperature."""
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_worked_by_hand() -> None:
    z, codebook = torch.tensor([[0.8]], requires_grad=True), torch.tensor([[0.0], [1.0]], requires_grad=True)
    z_q, indices, loss, metrics = index_backprop(z, codebook, 1.0, 0.25, 0.0, 0.01)
    assert indices.tolist() == [1]
    assert z_q.tolist() == [[1.0]]
    assert loss.item() == pytest.approx((1 + 1 + 0.25) * 0.2**2)
    assert metrics["quantization_error"].item() == pytest.approx(0.2**2)
    loss.backward()
    # s = (1 - s1, s1), s1 = sigmoid(0.8); the soft term sends 2 (1 - 0.8) through Cov_s(c) = s1 (1 - s1) and -0.4 to z.
    s1 = 1 / (1 + math.exp(-0.8))
    covariance = s1 * (1 - s1)
    assert z.grad is not None
    assert codebook.grad is not None
    assert z.grad.item() == pytest.approx(0.4 * covariance - 0.4 - 0.4)
    assert codebook.grad[0].item() == pytest.approx(-0.4 * covariance * 0.8)
    assert codebook.grad[1].item() == pytest.approx(0.4 * covariance * 0.8 + 0.4 + 0.25 * 0.4)


@pytest.mark.parametrize(("size", "batch_entropy"), [(1024, 6.921284), (16384, 9.552336)])
def test_uniform_assignment(size: int, batch_entropy: float) -> None:
    metrics = index_backprop(torch.zeros(5, 2), torch.randn(size, 2))[3]
    assert metrics["sample_entropy"].item() == pytest.approx(math.log(size), rel=1e-5)
    assert metrics["batch_entropy"].item() == pytest.approx(batch_entropy, rel=1e-5)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_dense_autograd(
    tile: tuple[int, int], temperature: float, weights: tuple[float, float, float], masked: bool
) -> None:
    mask = torch.arange(23) % 3 != 0 if masked else None
    expected = results(dense_index_backprop, *problem(), *weights, temperature, mask)
    with forced_tile(*tile):
        actual = results(index_backprop, *problem(), *weights, temperature, mask)
    assert_agree(actual, expected, atol=1e-12 + 5e-14 / temperature)


@pytest.mark.parametrize(
    ("scale", "temperature", "lists_p", "lists_s"),
    [(0.7, 1.0, False, False), (2.0, 0.01, True, False), (8.0, 0.01, True, True), (8.0, 1.0, True, True)],
)
@pytest.mark.parametrize("tile", TILES)
def test_agrees_with_dense_autograd_whether_listed_or_swept(
    scale: float, temperature: float, lists_p: bool, lists_s: bool, tile: tuple[int, int]
) -> None:
    z, codebook, upstream = problem()
    data = (z * scale / 0.7, codebook * scale / 0.7, upstream)
    expected = results(dense_index_backprop, *data, *WEIGHTS["all"], temperature)
    with forced_tile(*tile):
        actual = results(index_backprop, *data, *WEIGHTS["all"], temperature)
        num_listed = softmax_codes(data[0], data[1], None, "dot", temperature, True, True, "")[-1]
    assert [count != SWEPT for count in num_listed.tolist()] == [lists_p, lists_s]
    assert_agree(actual, expected, atol=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_agrees_with_dense_autograd_in_tiles_of_one(temperature: float) -> None:
    data = tuple(value[:rows] for value, rows in zip(problem(), (5, 40, 5), strict=True))
    mask = torch.tensor([True, False, True, True, True])
    expected = results(dense_index_backprop, *data, *WEIGHTS["all"], temperature, mask)
    with forced_tile(1, 1):
        actual = results(index_backprop, *data, *WEIGHTS["all"], temperature, mask)
    assert_agree(actual, expected, atol=1e-12 + 5e-14 / temperature)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 9),
    v=st.integers(1, 70),
    d=st.integers(1, 9),
    tile=st.tuples(st.integers(1, 10), st.integers(1, 71)),
    temperature=st.sampled_from([0.02, 0.5, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_dense_autograd_at_any_shape(
    n: int, v: int, d: int, tile: tuple[int, int], temperature: float, seed: int
) -> None:
    data = tuple(quantized_normal(rows, d, seed=seed + i).double() for i, rows in enumerate((n, v, n)))
    expected = results(dense_index_backprop, *data, 1.0, 0.25, 0.1, temperature)
    with forced_tile(*tile):
        actual = results(index_backprop, *data, 1.0, 0.25, 0.1, temperature)
    assert_agree(actual, expected, atol=1e-11)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_float32_errs_at_most_twice_as_much_as_the_dense_form(temperature: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    data = tuple(torch.randn(n, 64, generator=generator, dtype=torch.float64) * scale for n in (200, 3000, 200))
    data32 = tuple(value.float() for value in data)
    data = tuple(value.double() for value in data32)
    # A large weight makes the entropies' gradient, the one that temperature makes delicate, dominate.
    arguments = (1.0, 0.25, 5.0, temperature)
    exact = results(dense_index_backprop, *data, *arguments)
    dense, actual = (results(f, *data32, *arguments) for f in (dense_index_backprop, index_backprop))
    for name in ("quantization_loss", "dz", "dcodebook", "sample_entropy", "batch_entropy"):
        unit = exact[name].abs().max() * torch.finfo(torch.float32).eps
        dense_error, error = ((value[name] - exact[name]).abs().max() for value in (dense, actual))
        assert error <= 2 * torch.maximum(dense_error, unit), (name, error / unit, dense_error / unit)


def test_masked_rows_pass_on_what_reaches_their_codes_and_nothing_else() -> None:
    z, codebook, upstream = problem()
    mask = torch.arange(23) < 17
    kept = results(index_backprop, z[:17], codebook, torch.zeros_like(upstream[:17]))
    whole = results(index_backprop, z, codebook, torch.zeros_like(upstream), 1.0, 0.25, 0.05, 0.01, mask)
    for name in ("loss", "dcodebook", "quantization_error", "sample_entropy", "batch_entropy"):
        torch.testing.assert_close(whole[name], kept[name])
    assert whole["dz"][17:].count_nonzero() == 0
    torch.testing.assert_close(whole["z_q"], codebook[whole["indices"]], rtol=0, atol=0)
    assert results(index_backprop, z, codebook, upstream, 1.0, 0.25, 0.05, 0.01, mask)["dz"][17:].count_nonzero() > 0


def test_no_kept_row_costs_nothing() -> None:
    z, codebook, upstream = problem()
    out = results(index_backprop, z, codebook, upstream * 0, 1.0, 0.25, 0.05, 0.01, torch.zeros(23, dtype=torch.bool))
    assert out["loss"].item() == 0
    assert out["dz"].count_nonzero() == 0
    assert out["dcodebook"].count_nonzero() == 0


def test_no_rows() -> None:
    z = torch.empty(0, 8, requires_grad=True)
    z_q, indices, loss, _ = index_backprop(z, torch.randn(5, 8, requires_grad=True))
    assert z_q.shape == (0, 8)
    assert indices.shape == (0,)
    assert indices.dtype == torch.int64
    assert loss.item() == 0
    loss.backward()
    assert z.grad is not None
    assert z.grad.shape == (0, 8)


def test_no_entropy_weight_skips_the_entropies() -> None:
    z, codebook, upstream = problem()
    out = results(index_backprop, z, codebook, upstream, 1.0, 0.25, 0.0)
    assert set(out) == {"z_q", "indices", "loss", "dz", "dcodebook", "quantization_error", "quantization_loss"}
    torch.testing.assert_close(out["loss"], out["quantization_loss"])


def test_without_gradients_gives_the_same_values() -> None:
    z, codebook, upstream = problem(torch.float32)
    expected = results(index_backprop, z, codebook, upstream)
    with torch.no_grad():
        z_q, indices, loss, _ = index_backprop(z, codebook)
    torch.testing.assert_close((z_q, indices, loss), (expected["z_q"], expected["indices"], expected["loss"]))
    assert not loss.requires_grad


def test_bfloat16_inputs_give_the_tokens_and_gradients_of_their_float32_values() -> None:
    data = problem(torch.bfloat16)
    expected = results(index_backprop, *(value.float() for value in data))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            actual = results(index_backprop, *data)
        assert torch.equal(actual["indices"], expected["indices"])
        assert torch.equal(actual["z_q"], data[1][actual["indices"]])
        assert actual["loss"].dtype == torch.float32
        torch.testing.assert_close(actual["loss"], expected["loss"])
        torch.testing.assert_close(actual["dz"].float(), expected["dz"], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_makes_no_tensor_of_the_scores_size(temperature: float) -> None:
    data = (torch.randn(400, 4), torch.randn(1500, 4), torch.randn(400, 4))
    score_matrix = 400 * 1500 * 4
    with forced_tile(128, 128):
        run = lambda: results(index_backprop, *data, 1.0, 0.25, 0.05, temperature)  # noqa: E731
        assert largest_allocation(run) < score_matrix / 3
    assert largest_allocation(lambda: results(dense_index_backprop, *data)) >= score_matrix


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_compiles_whole_with_any_number_of_rows(temperature: float) -> None:
    z, codebook, upstream = problem(torch.float32)

    def step(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        return index_backprop(z, codebook, 1.0, 0.25, 0.05, temperature)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 11, 23):
        expected, actual = (results(f, z[:n], codebook, upstream[:n]) for f in (step, compiled))
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(actual["indices"], expected["indices"])


def test_operator_registrations() -> None:
    z, codebook, _ = problem()
    arguments = (z[:5].requires_grad_(), codebook[:9].requires_grad_(), None, "dot", 0.1, True, True, "")
    torch.library.opcheck(
        softmax_codes, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"entropy_temperature": 0.0}, ValueError, "entropy_temperature must be positive and finite, got 0.0"),
        ({"entropy_temperature": math.nan}, ValueError, "entropy_temperature must be positive and finite, got nan"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must have shape \(2,\)"),
        ({"mask": torch.ones(2)}, TypeError, "mask must be a bool Tensor, got torch.float32"),
        ({"codebook": torch.ones(4, 5)}, ValueError, "z has dimension 3 but codebook 5"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, object], error: type[Exception], match: str) -> None:
    arguments: dict[str, object] = {"z": torch.ones(2, 3), "codebook": torch.ones(4, 3)}
    with pytest.raises(error, match=match):
        index_backprop(**(arguments | changes))  # type: ignore[arg-type]
