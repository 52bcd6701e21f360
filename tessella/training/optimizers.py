"""The optimizers of a run: Adam, AdamW, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tessella.distributed import full, like
from tessella.quantizers.base import Quantizer

if TYPE_CHECKING:
    from tessella.training.loop import Loop

# Of the quintic whose iteration brings every singular value in (0, 1] near 1 (Jordan et al. 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_RMS_OF_ADAM = 0.2
_EPS = 1e-7


def make_optimizer(
    settings: Loop, parameters: Sequence[nn.Parameter], *, model: nn.Module, modules: Iterable[nn.Module]
) -> torch.optim.Optimizer:
    """What ``settings.optimizer`` names.

    Weight decay is for what has more than one axis and is no part of a quantizer. Muon is for the weights of the
    model's linear and convolutional layers; what else trains, adversaries included, has AdamW beside it.

    Args:
        settings: rates, betas and weight decay.
        parameters: what it updates.
        model: the network that is trained for its own sake.
        modules: all that are part of the step, for quantizers among them.
    """
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr, betas=settings.betas)
    codes = {p for module in modules if isinstance(module, Quantizer) for p in module.parameters()}
    matrices = _matrices(model) - codes if settings.optimizer == "muon" else set()
    apart = codes | matrices
    decay = settings.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1 and p not in apart], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1 or p in codes], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    groups.append({"params": [p for p in parameters if p in matrices], "weight_decay": decay, "matrices": True})
    return Muon([group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas)


class Muon(torch.optim.AdamW):
    r"""Muon for groups with ``matrices=True``, AdamW for all others, at one learning rate.

    Muon (Jordan et al. 2024) steps along the momentum of a matrix's gradient with all its singular values brought near
    1. Scaled as in Moonlight (arXiv 2502.16982), the step's entries have the root mean square of AdamW's, so that a
    learning rate and a weight decay mean the same for both:

    .. math:: B_t = \mu B_{t-1} + g_t, \quad
        W_t = (1 - \eta\lambda) W_{t-1} - 0.2\,\eta\sqrt{\max(m, n)}\,\mathrm{NS}(g_t + \mu B_t)

    A weight of more axes is the matrix of its first axis by all others. torch's own Muon takes two axes alone.

    Args:
        groups: of parameters.
        lr: learning rate.
        betas: of AdamW.
        momentum: mu.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], momentum: float = 0.95
    ) -> None:
        super().__init__([{"matrices": False, "momentum": momentum, **group} for group in groups], lr=lr, betas=betas)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())  # AdamW loads no state without one
                state["momentum"] = torch.zeros_like(weight)
            state["step"] += 1
            state["momentum"].mul_(group["momentum"]).add_(weight.grad)
            ahead = full(weight.grad + group["momentum"] * state["momentum"]).flatten(1)
            by_shape.setdefault(ahead.shape, []).append((weight, ahead))
        for shape, of_shape in by_shape.items():
            directions = orthogonalized(torch.stack([ahead for _, ahead in of_shape]))
            length = _RMS_OF_ADAM * math.sqrt(max(shape))
            for (weight, _), direction in zip(of_shape, directions, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(like(direction.reshape(weight.shape), weight), alpha=-group["lr"] * length)


def orthogonalized(matrices: Tensor) -> Tensor:
    """``[N, m, n]`` of the same singular vectors and singular values of about 1 (0.68 to 1.21), by Newton and Schulz.

    Singular values far below the largest, under a hundredth of the norm, come out smaller; zero stays zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + _EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    turned: Tensor = x.mT if tall else x
    return turned


def _matrices(model: nn.Module) -> set[nn.Parameter]:
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {layer.get_parameter("weight") for layer in model.modules() if isinstance(layer, layers)}
