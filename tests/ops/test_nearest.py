from __future__ import annotations

import pytest
import torch
from dense_reference import dense_scores, largest_allocation, quantized_normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessella.ops import nearest
from tessella.ops._tiles import forced_tile

METRICS = ("euclidean", "dot")


def dense_nearest(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return dense_scores(z.double(), codebook.double(), metric).argmax(-1)


def test_worked_by_hand() -> None:
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [0.0, -1.0]])
    z = torch.tensor([[0.6, 0.1], [0.4, 0.1], [0.1, -3.0], [-1.0, 0.0]])
    assert nearest(z, codebook).tolist() == [1, 0, 3, 0]
    assert nearest(z, codebook, metric="dot").tolist() == [2, 2, 3, 0]


@settings(deadline=None)
@given(
    n=st.integers(0, 9),
    v=st.integers(1, 70),
    d=st.integers(1, 9),
    tile=st.tuples(st.integers(1, 10), st.integers(1, 71)),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 2**31),
)
def test_is_the_float64_answer_with_ties_to_the_first(
    n: int, v: int, d: int, tile: tuple[int, int], metric: str, seed: int
) -> None:
    # Multiples of 1/4 make every score exact, and ties common.
    z, codebook = quantized_normal(n, d, seed=seed), quantized_normal(v, d, seed=seed + 1)
    with forced_tile(*tile):
        torch.testing.assert_close(nearest(z, codebook, metric), dense_nearest(z, codebook, metric), rtol=0, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_codes_give_the_first(metric: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z, once = torch.randn(33, 19, dtype=dtype), torch.randn(57, 19, dtype=dtype)
    codebook = torch.cat([once, once.flip(0), once])
    for tile in ((33, 171), (33, 64), (8, 50), (1, 1)):
        with forced_tile(*tile):
            assert torch.equal(nearest(z, codebook, metric), nearest(z, once, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_scores_that_float32_cannot_order(metric: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(40, 64)
    codebook = torch.randn(1, 64) + 1e-6 * torch.randn(300, 64)
    expected = dense_nearest(z, codebook, metric)
    assert not torch.equal(dense_scores(z, codebook, metric).argmax(-1), expected)
    for tile in ((40, 300), (16, 64), (7, 31)):
        with forced_tile(*tile):
            assert torch.equal(nearest(z, codebook, metric), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_collapsed_codebook_and_zero_vectors(metric: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(12, 16)
    for tile in ((12, 256), (5, 64)):
        with forced_tile(*tile):
            assert nearest(z, torch.randn(1, 16).expand(256, 16), metric).unique().tolist() == [0]
            assert nearest(z, torch.zeros(256, 16), metric).unique().tolist() == [0]
    assert nearest(torch.zeros(3, 16), torch.randn(256, 16), "dot").tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_the_tokens_of_their_float32_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z, codebook = torch.randn(64, 32).to(dtype), torch.randn(500, 32).to(dtype)
    expected = nearest(z.float(), codebook.float())
    assert torch.equal(nearest(z, codebook), expected)
    assert torch.equal(nearest(z, codebook.float()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest(z, codebook), expected)
        assert torch.equal(nearest(z.float(), codebook.float()), expected)


def test_callers_matmul_precision_neither_matters_nor_changes() -> None:
    torch.manual_seed(0)
    z, codebook = torch.randn(256, 64), torch.randn(512, 64)
    expected = dense_nearest(z, codebook, "euclidean")
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest(z, codebook), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_no_gradient_and_no_score_matrix() -> None:
    z, codebook = torch.randn(500, 4, requires_grad=True), torch.randn(2000, 4, requires_grad=True)
    score_matrix = 500 * 2000 * 4
    with forced_tile(128, 256):
        assert not nearest(z, codebook).requires_grad
        assert largest_allocation(lambda: nearest(z, codebook)) < score_matrix / 4
    assert largest_allocation(lambda: dense_nearest(z.detach(), codebook.detach(), "dot")) >= score_matrix


def test_compiles_whole_with_any_number_of_rows() -> None:
    torch.manual_seed(0)
    codebook = torch.randn(100, 8)
    compiled = torch.compile(lambda z: nearest(z * 2, codebook) + 1, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 17, 40):
        z = torch.randn(n, 8)
        assert torch.equal(compiled(z), nearest(z * 2, codebook) + 1)


def test_rows_of_nan_get_a_valid_index() -> None:
    z = torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])
    assert nearest(z, torch.eye(2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("z", "codebook", "metric", "error", "match"),
    [
        ([[1.0]], torch.ones(2, 1), "dot", TypeError, "z must be a Tensor, got list"),
        (
            torch.ones(2, 1),
            torch.ones(2, 1, dtype=torch.int64),
            "dot",
            TypeError,
            "codebook must have a floating dtype",
        ),
        (torch.ones(2), torch.ones(2, 1), "dot", ValueError, "z must have two axes"),
        (torch.ones(2, 3), torch.ones(2, 1), "dot", ValueError, "z has dimension 3 but codebook 1"),
        (torch.ones(2, 1), torch.ones(0, 1), "dot", ValueError, "codebook must hold at least one code"),
        (torch.ones(2, 1), torch.ones(2, 1, device="meta"), "dot", ValueError, "z is on cpu but codebook is on meta"),
        (torch.ones(2, 1), torch.ones(2, 1), "cosine", ValueError, "'cosine'; choose one of: euclidean, dot"),
    ],
)
def test_errors_name_the_argument(z: Tensor, codebook: Tensor, metric: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        nearest(z, codebook, metric)
