"""How the planes of a label travel in a signal ``x [B, P, *X]``, which is of floats.

A *class plane* of n classes holds class k of a pixel as any number in [k, k + 1): its class is the floor. An integer
plane is therefore itself, and a measured quantity that is trained in bins (depth) keeps what the bins lose. Below 0
stands for "nothing to learn here": its one-hot vector is zero. From n on counts as the last class. A *value plane* (of
"1 class") is the number itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

IGNORED = -1


def plane_classes(plane: Tensor, num_classes: int) -> Tensor:
    """int64 classes in ``{-1 .. num_classes - 1}`` of a class plane ``[...]``; -1 where there is nothing to learn."""
    return plane.floor().clamp(IGNORED, num_classes - 1).long()


def split_planes(x_hat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """``[B, n_p, *X]`` for each plane p of ``x_hat [B, sum(sizes), *X]``: logits, or values where n_p is 1.

    Raises:
        ValueError: another number of channels.
    """
    if x_hat.shape[1] != sum(sizes):
        raise ValueError(f"planes of {list(sizes)} classes need {sum(sizes)} channels, got {x_hat.shape[1]}")
    parts: tuple[Tensor, ...] = x_hat.split(list(sizes), 1)
    return parts


def plane_cross_entropy(logits: Tensor, classes: Tensor, ignored: int = IGNORED) -> Tensor:
    """``-ln softmax(logits)[class]`` for each pixel ``[B, *X]``, and 0 where the class is ``ignored`` or -1.

    Args:
        logits: ``[B, n, *X]``.
        classes: int64 ``[B, *X]`` in ``{-1 .. n - 1}``.
        ignored: a further class that is not learned.
    """
    targets = classes.masked_fill(classes == ignored, IGNORED)
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
