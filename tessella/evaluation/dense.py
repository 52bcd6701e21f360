"""Scores of dense prediction: depth in metres, panoptic segments."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.labels.panoptic import VOID, check_segments
from tessella.labels.planes import IGNORED

DEPTH_METRICS = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")

_NO_DEPTH_M = 1e-3

Segmentation = tuple[Tensor, Mapping[int, int]]


def depth_metrics(predicted: Tensor, truth: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    r"""The usual errors of depth, each the mean over pictures of the picture's own.

    ============ =================================================================================================
    rmse         :math:`\sqrt{mean (p - t)^2}`, in metres
    abs_rel      :math:`mean |p - t| / t`
    log10        :math:`mean |log_{10} p - log_{10} t|`
    delta1..3    share of pixels with :math:`max(p / t, t / p) < 1.25^i`
    ============ =================================================================================================

    Args:
        predicted: ``[B, H, W]`` in metres, above 0 where it counts.
        truth: ``[B, H, W]`` in metres.
        mask: ``[B, H, W]``, which pixels count; by default those with a finite true depth above 1 mm. Pictures without
            any are left out.

    Raises:
        ValueError: other shapes, a depth that is not above 0 where it counts, or nothing that counts.
    """
    if predicted.ndim != 3 or predicted.shape != truth.shape:
        raise ValueError(f"predicted and truth must both be [B, H, W], got {list(predicted.shape)} and "
                         f"{list(truth.shape)}")  # fmt: skip
    if mask is None:
        mask = truth.isfinite() & (truth > _NO_DEPTH_M)
    elif mask.shape != truth.shape:
        raise ValueError(f"mask must be {list(truth.shape)} as the depths are, got {list(mask.shape)}")
    rows = [_picture_errors(p[m].double(), t[m].double()) for p, t, m in zip(predicted, truth, mask.bool(), strict=True)
            if m.any()]  # fmt: skip
    if not rows:
        raise ValueError("no picture has a pixel that counts: every true depth is missing or masked")
    return dict(zip(DEPTH_METRICS, torch.stack(rows).mean(0).tolist(), strict=True))


def _picture_errors(p: Tensor, t: Tensor) -> Tensor:
    """The errors of the pixels ``p [n]``, ``t [n]`` in the order of :data:`DEPTH_METRICS`."""
    for name, depth in (("predicted", p), ("truth", t)):
        if not (depth.isfinite() & (depth > 0)).all():
            low, high = depth.min().item(), depth.max().item()
            raise ValueError(f"{name} depth must be finite and above 0 m where it counts, got {low:g} .. {high:g}")
    ratio = torch.maximum(p / t, t / p)
    return torch.stack([
        (p - t).square().mean().sqrt(), ((p - t).abs() / t).mean(), (p.log10() - t.log10()).abs().mean(),
        *((ratio < 1.25**i).double().mean() for i in (1, 2, 3)),
    ])  # fmt: skip


@dataclass
class _Count:
    """Of one category over all pictures: matches with the sum of their overlaps, and what has no match."""

    overlap: float = 0.0
    matches: int = 0
    false_positives: int = 0
    misses: int = 0

    @property
    def seen(self) -> int:
        return self.matches + self.false_positives + self.misses

    @property
    def sq(self) -> float:
        return self.overlap / self.matches if self.matches else 0.0

    @property
    def rq(self) -> float:
        return self.matches / (self.matches + 0.5 * self.false_positives + 0.5 * self.misses)


class PanopticQuality:
    r"""PQ over a data set, picture by picture (Kirillov et al., arXiv 1801.00868), as COCO counts it.

    A predicted and a true segment of one category match where they overlap in more than half of their union, void of
    the truth not counted in it:

    .. math:: IoU(p, t) = \frac{|p \cap t|}{|p| + |t| - |p \cap t| - |p \cap void|}, \quad
              PQ_c = \underbrace{\frac{\sum_{matches} IoU}{TP}}_{SQ_c}
                     \underbrace{\frac{TP}{TP + FP / 2 + FN / 2}}_{RQ_c}

    A predicted segment without a match is no false positive where more than half of it is void or a crowd of its
    category. A crowd itself is never matched and never missed.

    Args:
        things: the categories that are things; all others are stuff.
    """

    def __init__(self, things: Collection[int]) -> None:
        self.things = frozenset(things)
        self._counts: defaultdict[int, _Count] = defaultdict(_Count)

    def update(self, predicted: Segmentation, truth: Segmentation, crowds: Collection[int] = ()) -> None:
        """Count one picture: ids ``[H, W]`` int64, 0 for void, with each id's category; crowds are ids of the truth.

        Pixels of the truth that are not to be learned (-1) count as void.

        Raises:
            ValueError: shapes that differ, ids without category, or a crowd that is no segment of the truth.
        """
        (p_ids, p_categories), (t_ids, t_categories) = predicted, truth
        p_found = check_segments(p_ids, p_categories, None, "predicted")
        t_found = check_segments(t_ids, t_categories, None, "truth")
        if p_ids.shape != t_ids.shape:
            raise ValueError(f"predicted and true segments differ in size: {list(p_ids.shape)} and {list(t_ids.shape)}")
        if unknown := set(crowds) - set(t_categories):
            raise ValueError(f"crowds {sorted(unknown)} are no ids of the truth")
        t_ids = t_ids.masked_fill(t_ids == IGNORED, VOID)
        # Pixels of every pair of segments, one pass over the picture.
        p_values, p_rows = p_ids.flatten().unique(return_inverse=True)
        t_values, t_rows = t_ids.flatten().unique(return_inverse=True)
        counts = (p_rows * len(t_values) + t_rows).bincount(minlength=len(p_values) * len(t_values))
        p_list, t_list = p_values.tolist(), t_values.tolist()
        pixels = {(p_list[i // len(t_list)], t_list[i % len(t_list)]): n for i, n in enumerate(counts.tolist()) if n}
        p_area = {p: sum(n for (q, _), n in pixels.items() if q == p) for p in p_found}
        t_area = {t: sum(n for (_, u), n in pixels.items() if u == t) for t in t_found}

        p_matched, t_matched = set(), set()
        for (p, t), common in pixels.items():
            if p not in p_area or t not in t_area or t in crowds or p_categories[p] != t_categories[t]:
                continue
            union = p_area[p] + t_area[t] - common - pixels.get((p, VOID), 0)
            if common > union / 2:
                count = self._counts[t_categories[t]]
                count.matches += 1
                count.overlap += common / union
                p_matched.add(p)
                t_matched.add(t)
        for t in t_found:
            if t not in t_matched and t not in crowds:
                self._counts[t_categories[t]].misses += 1
        for p in p_found:
            forgiven = {VOID, *(t for t in crowds if t_categories[t] == p_categories[p])}
            if p not in p_matched and sum(pixels.get((p, t), 0) for t in forgiven) <= p_area[p] / 2:
                self._counts[p_categories[p]].false_positives += 1

    def compute(self) -> dict[str, float]:
        """``pq``, ``sq``, ``rq`` and the same of things and of stuff (``pq_things``, ...): means over the categories
        that occur, in the truth or as false positives; NaN where none does."""
        seen = {category: count for category, count in self._counts.items() if count.seen}
        kinds = {
            "": list(seen.values()),
            "_things": [count for category, count in seen.items() if category in self.things],
            "_stuff": [count for category, count in seen.items() if category not in self.things],
        }
        out = {}
        for kind, counts in kinds.items():
            out[f"pq{kind}"] = _mean([count.sq * count.rq for count in counts])
            out[f"sq{kind}"] = _mean([count.sq for count in counts])
            out[f"rq{kind}"] = _mean([count.rq for count in counts])
        return out


def panoptic_quality(
    predicted: Sequence[Segmentation],
    truth: Sequence[Segmentation],
    *,
    things: Collection[int],
    crowds: Sequence[Collection[int]] | None = None,
) -> dict[str, float]:
    """:class:`PanopticQuality` of whole sequences of pictures.

    Args:
        predicted: for each picture its ids ``[H, W]`` int64, 0 for void, and the category of each id.
        truth: the same.
        things: the categories that are things; all others are stuff.
        crowds: for each picture the ids of the truth that are crowds.

    Raises:
        ValueError: sequences of different lengths, or see :meth:`PanopticQuality.update`.
    """
    if crowds is None:
        crowds = [()] * len(truth)
    if not len(predicted) == len(truth) == len(crowds):
        raise ValueError(f"{len(predicted)} predictions, {len(truth)} truths and {len(crowds)} sets of crowds")
    quality = PanopticQuality(things)
    for one, other, of_picture in zip(predicted, truth, crowds, strict=True):
        quality.update(one, other, of_picture)
    return quality.compute()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
