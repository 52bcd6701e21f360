"""The Triton kernels against the dense forms: under Triton's interpreter in a process of its own, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from dense_reference import dense_index_backprop, dense_scores, dense_softmax_entropy
from torch import Tensor

from tessella.ops import index_backprop, nearest, softmax_entropy
from tessella.ops._tiles import has_triton_form


def check(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z, codebook, upstream = (torch.randn(n, 20, generator=generator).mul(0.6).to(device) for n in (37, 150, 37))
    mask = (torch.arange(37) % 3 != 0).to(device)
    codebook[100] = codebook[20]
    assert has_triton_form(z)

    for metric in ("euclidean", "dot"):
        expected = dense_scores(z.double(), codebook.double(), metric).argmax(1)
        assert torch.equal(nearest(z, codebook, metric), expected)

    def leaves() -> tuple[Tensor, Tensor]:
        return z.clone().requires_grad_(), codebook.clone().requires_grad_()

    for temperature in (0.05, 1.0):
        results = []
        for quantize in (index_backprop, dense_index_backprop):
            a, b = leaves()
            z_q, indices, loss, metrics = quantize(a, b, 1.0, 0.25, 0.3, temperature, mask)
            (loss + (z_q * upstream).sum()).backward()
            results.append({"z_q": z_q, "indices": indices, "loss": loss, "dz": a.grad, "dc": b.grad, **metrics})
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        for metric in ("euclidean", "dot"):
            results = []
            for entropies in (softmax_entropy, dense_softmax_entropy):
                a, b = leaves()
                sample, batch = entropies(a, b, temperature, metric, mask)
                (2 * sample - batch).backward()
                results.append({"sample": sample, "batch": batch, "dz": a.grad, "dc": b.grad})
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)

    empty = torch.empty(0, 20, device=device)
    assert nearest(empty, codebook).shape == (0,)
    assert index_backprop(empty, codebook)[2].item() == 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_under_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_operations_does_not_import_triton() -> None:
    code = "import sys, tessella.ops; sys.exit('triton' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    check("cuda")


if __name__ == "__main__":
    check("cpu")
