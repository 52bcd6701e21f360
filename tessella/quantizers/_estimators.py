"""How the decoder's gradient passes a nearest-neighbour assignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tessella.quantizers.base import straight_through

Estimator = Literal["straight_through", "rotation"]

_EPS = 1e-6


def rotate_to(z: Tensor, z_q: Tensor) -> Tensor:
    r"""The rotation trick (Fifty et al., arXiv 2410.06424): the value of ``z_q``, its gradient turned back onto ``z``.

    .. math:: dL/dz = (|q|/|z|) R^T g, \quad R = I - 2ww^T + 2vu^T, \quad u = z/|z|, v = q/|q|, w = (u+v)/|u+v|

    R is the rotation from u to v; z, q and R count as constants. No gradient reaches the codes. A zero vector has no
    direction to turn from: there the gradient goes straight through.
    """
    z_norm, q_norm = z.detach().norm(dim=-1, keepdim=True), z_q.detach().norm(dim=-1, keepdim=True)
    u, v = z.detach() / z_norm.clamp(min=_EPS), z_q.detach() / q_norm.clamp(min=_EPS)
    w = functional.normalize(u + v, dim=-1, eps=_EPS)
    rotated = z - 2 * (z * w).sum(-1, keepdim=True) * w + 2 * (z * u).sum(-1, keepdim=True) * v
    turned = torch.where(z_norm > _EPS, q_norm / z_norm.clamp(min=_EPS) * rotated, z)
    return straight_through(turned, z_q)


ESTIMATORS: dict[Estimator, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": straight_through,
    "rotation": rotate_to,
}
