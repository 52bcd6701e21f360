"""Losses of dense prediction, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.objectives.base import Objective, StepOutput
from tessella.objectives.color import Color
from tessella.objectives.depth import Depth
from tessella.objectives.panoptic import Panoptic
from tessella.quantizers import Quantized
from tessella.tokenizer import Reconstruction


def loss(objective: Objective, x: Tensor, x_hat: Tensor) -> StepOutput:
    quantized = Quantized(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(()))
    batch = Batch(x=x, label=torch.zeros(len(x), dtype=torch.int64), key=["a"] * len(x), skipped=[])
    out: StepOutput = objective(batch, Reconstruction(x_hat, quantized), nn.Parameter(torch.zeros(1)))
    return out


def test_depth_masks_bin_0_and_divides_by_all_pixels() -> None:
    x = torch.tensor([[[[0.0, 0.9, 1.2, 3.9]]]])  # bins 0, 0, 1, 3
    x_hat = torch.zeros(1, 4, 1, 4)
    assert loss(Depth(), x, x_hat).losses["tokenizer"].item() == pytest.approx(2 * math.log(4) / 4)
    x_hat[0, 1, 0, 2] = math.log(3)  # softmax 3 / 6
    out = loss(Depth(), x, x_hat)
    assert out.losses["tokenizer"].item() == pytest.approx((math.log(2) + math.log(4)) / 4)
    assert out.metrics["right_bins"].item() == pytest.approx(0.5)
    x_hat.requires_grad_()
    loss(Depth(), x, x_hat).losses["tokenizer"].backward()
    assert x_hat.grad is not None
    assert (x_hat.grad[..., :2] == 0).all()


def test_colour_is_the_mean_square() -> None:
    x, x_hat = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    x_hat[0, 0, 0, 0] = 0.6
    out = loss(Color(), x, x_hat)
    assert out.losses["tokenizer"].item() == pytest.approx(0.36 / 6)
    assert out.metrics["psnr_db"].item() == pytest.approx(10 * math.log10(4 / 0.06), abs=1e-3)


def test_panoptic_is_the_sum_of_both_planes_without_what_is_not_to_be_learned() -> None:
    x = torch.tensor([[[[0.0, 2, -1]], [[0, 1, -1]]]])
    x_hat = torch.zeros(1, 3 + 4, 1, 3)
    objective = Panoptic(num_categories=2, num_instances=4)
    out = loss(objective, x, x_hat)
    # Void is learned like any other class; one of three pixels costs nothing but counts.
    assert out.losses["tokenizer"].item() == pytest.approx(2 / 3 * (math.log(3) + math.log(4)))
    assert out.metrics["right_classes"].item() == pytest.approx(0.5)
    x_hat[0, 2, 0, 1] = math.log(2)
    expected = (math.log(3) + math.log(2)) / 3 + 2 / 3 * math.log(4)
    assert loss(objective, x, x_hat).losses["tokenizer"].item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"planes of \[3, 4\] classes need 7 channels, got 6"):
        loss(objective, x, x_hat[:, :6])
    with pytest.raises(ValueError, match="num_categories must be at least 1"):
        Panoptic(num_categories=0)
