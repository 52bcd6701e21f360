"""Muon: what it does to a matrix, beside torch's own, and which parameters have it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import picture_step, tiny_tokenizer
from torch import Tensor, nn

from tessella.losses.adversarial import Adversary
from tessella.quantizers import VQ, SimVQ
from tessella.training.loop import Loop
from tessella.training.optimizers import Muon, make_optimizer, orthogonalized


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, s, vh


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4)])
def test_singular_vectors_stay_and_values_become_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    u, s, vh = spectrum(matrices)
    matrices = (u @ torch.diag_embed(s.clamp(min=0.2 * s.max())) @ vh).float()
    found = u.mT @ orthogonalized(matrices).double() @ vh.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalized(torch.zeros(1, 3, 2)).any()


def test_the_first_step_by_hand() -> None:
    """One row has one singular value, its norm: five times p(1) with p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5."""
    value = 1.0
    for _ in range(5):
        value = 3.4445 * value - 4.775 * value**3 + 2.0315 * value**5
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    weight.grad = torch.tensor([[3.0, 4.0]])
    Muon([{"params": [weight], "weight_decay": 0.5, "matrices": True}], lr=0.1, betas=(0.9, 0.99)).step()
    length = 0.1 * 0.2 * math.sqrt(2) * value
    expected = torch.tensor([[0.95 * 1 - length * 0.6, 0.95 * 2 - length * 0.8]])
    torch.testing.assert_close(weight.detach(), expected)


def test_is_torchs_muon_on_matrices() -> None:
    """Up to the bfloat16 that torch iterates in; its momentum is an average, which the iteration does not see."""
    torch.manual_seed(0)
    start = torch.randn(6, 10)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one = Muon([{"params": [ours], "weight_decay": 0.1, "matrices": True}], lr=0.02, betas=(0.9, 0.99))
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(6, 10)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_convolutions_are_matrices_of_their_first_axis() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(4, 3, 2, 2)
    weights = [nn.Parameter(torch.zeros(4, 3, 2, 2)), nn.Parameter(torch.zeros(4, 12))]
    for weight in weights:
        weight.grad = gradient.reshape(weight.shape)
        Muon([{"params": [weight], "weight_decay": 0.0, "matrices": True}], lr=1.0, betas=(0.9, 0.99)).step()
    assert torch.equal(weights[0].flatten(1), weights[1])


def settings(**more: object) -> Loop:
    return Loop(**{"optimizer": "muon", "weight_decay": 0.1, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("quantizer", [VQ(16, 4), SimVQ(16, 4)])
def test_layers_have_muon_and_the_rest_adamw(quantizer: nn.Module) -> None:
    model = tiny_tokenizer(quantizer)
    step = picture_step(model, adversary=Adversary(discriminator_channels=4))
    layers = {p for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in [m.weight]}
    layers -= set(model.quantizer.parameters())
    made = {
        name: make_optimizer(settings(), parameters, model=step.model, modules=step.modules())
        for name, parameters in step.parameter_groups().items()
    }
    for name, parameters in step.parameter_groups().items():
        groups = made[name].param_groups
        with_muon = {p for group in groups if group["matrices"] for p in group["params"]}
        assert with_muon == (layers if name == "tokenizer" else set())
        others = [p for group in groups if not group["matrices"] for p in group["params"]]
        assert with_muon.isdisjoint(others)
        assert with_muon | set(others) == set(parameters)


def test_the_rest_is_adamw_to_the_bit() -> None:
    torch.manual_seed(0)
    start, matrix = torch.randn(5), nn.Parameter(torch.randn(2, 2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = [{"params": [ours], "weight_decay": 0.0}, {"params": [matrix], "weight_decay": 0.1, "matrices": True}]
    one = Muon(groups, lr=0.1, betas=(0.9, 0.95))
    other = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        ours.grad, matrix.grad = torch.randn(5), torch.randn(2, 2)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    assert torch.equal(ours, theirs)
