from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from dense_reference import dense_softmax_entropy, largest_allocation
from torch import Tensor

from tessella.ops import softmax_entropy
from tessella.ops._tiles import forced_tile


def results(
    operation: Callable[..., tuple[Tensor, Tensor]],
    z: Tensor,
    codebook: Tensor,
    weights: tuple[float, float],
    *rest: object,
) -> dict[str, Tensor]:
    z, codebook = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    sample, batch = operation(z, codebook, *rest)
    (weights[0] * sample + weights[1] * batch).backward()
    assert z.grad is not None
    assert codebook.grad is not None
    return {"sample": sample, "batch": batch, "dz": z.grad, "dcodebook": codebook.grad}


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, codebook = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (19, 140))
    return z, codebook


def test_worked_by_hand() -> None:
    # z = 0 is as far from -1 as from 1; z = 1 has distances 4 and 0, so p = sigmoid(4 / 2) at temperature 2.
    codebook = torch.tensor([[-1.0], [1.0]])
    p = 1 / (1 + math.exp(-2))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    sample, _ = softmax_entropy(torch.tensor([[0.0], [1.0]]), codebook, 2.0)
    assert sample.item() == pytest.approx((math.log(2) + entropy) / 2)
    _, batch = softmax_entropy(torch.tensor([[-50.0], [50.0]]), codebook, 0.01)
    assert batch.item() == pytest.approx(-math.log(0.5 + 1e-5))


@pytest.mark.parametrize("tile", [(5, 1), (7, 13), (19, 64), (1024, 1024)])
@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, -1.0)], ids=["sample", "batch", "penalty"])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_dense_autograd(
    tile: tuple[int, int], metric: str, temperature: float, weights: tuple[float, float], masked: bool
) -> None:
    mask = torch.arange(19) % 4 != 1 if masked else None
    expected = results(dense_softmax_entropy, *problem(), weights, temperature, metric, mask)
    with forced_tile(*tile):
        actual = results(softmax_entropy, *problem(), weights, temperature, metric, mask)
    scale = 1 / temperature  # of the gradients' rounding
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-12, atol=1e-13 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_float32_errs_at_most_twice_as_much_as_the_dense_form(metric: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, codebook = (torch.randn(n, 32, generator=generator) for n in (64, 2000))
    arguments = ((1.0, -1.0), temperature, metric)
    exact = results(dense_softmax_entropy, z.double(), codebook.double(), *arguments)
    dense, actual = (results(f, z, codebook, *arguments) for f in (dense_softmax_entropy, softmax_entropy))
    for name, value in exact.items():
        unit = value.abs().max() * 2 * torch.finfo(torch.float32).eps
        dense_error, error = ((out[name] - value).abs().max() for out in (dense, actual))
        assert error <= 2 * torch.maximum(dense_error, unit), (name, error / unit, dense_error / unit)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_makes_no_tensor_of_the_scores_size(temperature: float) -> None:
    data = (torch.randn(400, 4), torch.randn(1500, 4))
    with forced_tile(128, 128):
        run = lambda: results(softmax_entropy, *data, (1.0, -1.0), temperature)  # noqa: E731
        assert largest_allocation(run) < 400 * 1500 * 4 / 3


def test_no_rows_and_no_kept_row() -> None:
    codebook = torch.randn(5, 3)
    assert [value.item() for value in softmax_entropy(torch.empty(0, 3), codebook, 0.1)] == [0, 0]
    assert [v.item() for v in softmax_entropy(torch.ones(2, 3), codebook, 0.1, mask=torch.zeros(2).bool())] == [0, 0]


def test_compiles_whole_with_any_number_of_rows() -> None:
    z, codebook = problem()
    compiled = torch.compile(softmax_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9, 19):
        expected, actual = (results(f, z[:n], codebook, (1.0, -1.0), 0.5) for f in (softmax_entropy, compiled))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(2, 3), torch.ones(4, 3), -1.0), ValueError, "temperature must be positive and finite, got -1.0"),
        ((torch.ones(2, 3), torch.ones(4, 3), 1.0, "cosine"), ValueError, "unknown metric 'cosine'"),
        ((torch.ones(2, 3), torch.ones(4, 2), 1.0), ValueError, "z has dimension 3 but codebook 2"),
        ((torch.ones(2, 3), torch.ones(4, 3), 1.0, "dot", torch.ones(2)), TypeError, "mask must be a bool Tensor"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[object, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        softmax_entropy(*arguments)  # type: ignore[arg-type]
