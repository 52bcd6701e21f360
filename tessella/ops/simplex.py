"""Euclidean projection of rows on the probability simplex."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 16
_MIN_GROUPED = 64


def project_simplex(v: Tensor) -> Tensor:
    r"""Nearest point of the probability simplex to every row.

    .. math:: p = argmin_p |p - v|^2 \;\text{s.t.}\; p \ge 0, 1'p = 1, \quad p = \max(v - \theta, 0)

    The gradient is the projection's own, with S = supp p and s its indicator:
    :math:`dL/dv = P_S\,dL/dp`, :math:`P_S = diag(s) - s s'/|S|`.

    Args:
        v: ``[..., V]``, float32 or float64.

    Returns:
        p ``[..., V]``: exact up to rounding; no iteration is cut short.

    Raises:
        TypeError: ``v`` is not float32 or float64.
        ValueError: ``v`` has no last axis, or an empty one.
    """
    if v.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"v must be float32 or float64, got {v.dtype}")
    if v.ndim == 0 or v.shape[-1] == 0:
        raise ValueError(f"v must have a last axis of at least one entry, got shape {tuple(v.shape)}")
    p: Tensor = _project(v)
    return p


def project_simplex_(v: Tensor) -> None:
    """:func:`project_simplex` of ``v [N, V]``, in place."""
    v -= v.amax(-1, keepdim=True)  # the projection ignores shifts; now 0 <= -theta <= 1 is as accurate as it can be
    v.sub_(_threshold(v)).relu_()


def _threshold(v: Tensor) -> Tensor:
    r"""The root theta ``[N, 1]`` of :math:`f(\theta) = \sum_i \max(v_i - \theta, 0) - 1` for the rows of ``v [N, V]``.

    Newton's method on f, which is convex and piecewise linear: from the left of the root it only moves right and only
    drops entries, so it ends after finitely many steps, at the exact root of the last piece.
    """
    theta = v.amax(-1, keepdim=True) - 1
    if v.shape[1] >= _MIN_GROUPED:
        # Fewer entries have a smaller f and so a smaller root. Those with the largest entry of every group hold most of
        # the support, and that root is close, at a fraction of the cost of a step.
        groups = v[:, : v.shape[1] // _GROUP * _GROUP].unflatten(1, (_GROUP, -1))
        theta = torch.maximum(theta, _threshold(groups.amax(1)))
    excess, size = torch.empty_like(v), torch.zeros_like(theta)
    while True:
        torch.sub(v, theta, out=excess).relu_()
        total = excess.sum(-1, keepdim=True)
        previous, size = size, excess.sign_().sum(-1, keepdim=True)
        # The maximum keeps an entry at the threshold from coming and going for ever by rounding.
        theta = torch.maximum(theta, theta + (total - 1) / size)
        if ((size == previous) | size.isnan()).all():
            return theta


def center_on_support(g: Tensor, support: Tensor) -> Tensor:
    """``P_S g``: zero outside ``support [..., V]`` (boolean), of mean zero inside."""
    g = torch.where(support, g, 0)
    size = support.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(support, g - g.sum(-1, keepdim=True) / size, 0)


# The number of Newton steps depends on the data, so the loop is opaque to torch.compile.
@torch.library.custom_op("tessella::project_simplex", mutates_args=())
def _project(v: Tensor) -> Tensor:
    p = v.reshape(-1, v.shape[-1]).clone()
    project_simplex_(p)
    return p.reshape(v.shape)


@_project.register_fake
def _(v: Tensor) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _save_support(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output > 0)


def _project_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
    (support,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return center_on_support(grad, support)


_project.register_autograd(_project_backward, setup_context=_save_support)
