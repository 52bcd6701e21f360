"""The scores of dense prediction as a medium's metrics: batch by batch, with their protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor
from torch.nn import functional

from tessella.data.base import Batch
from tessella.evaluation.base import Metrics, Number
from tessella.evaluation.dense import DEPTH_METRICS, PanopticQuality, depth_metrics
from tessella.labels.depth import DepthBins
from tessella.labels.panoptic import Segments

_DEPTH_MEANINGS = {
    "rmse": "root of the mean squared error of each picture, in metres; then the mean over pictures",
    "abs_rel": "mean of |predicted - true| / true of each picture; mean",
    "log10": "mean of |log10 predicted - log10 true| of each picture; mean",
    "delta1": "share of a picture's pixels with a ratio below 1.25 either way; mean",
    "delta2": "the same below 1.25^2",
    "delta3": "the same below 1.25^3",
}
_QUALITY_MEANINGS = {
    "pq": "panoptic quality: segmentation quality times recognition quality of each category; mean over categories",
    "sq": "mean overlap of matched segments",
    "rq": "matches by matches and half of all that has no match",
}


class DepthMetrics(Metrics):
    """Means over pictures of :func:`depth_metrics`, where the true depth lies strictly inside the bins' range.

    Pictures without any such pixel are left out.

    Args:
        bins: of planes and logits.
    """

    signals: ClassVar[str] = "images"
    bits_name: ClassVar[str] = "bits_per_pixel"
    headline: ClassVar[frozenset[str]] = frozenset({"rmse", "abs_rel", "delta1"})

    def __init__(self, bins: DepthBins) -> None:
        self.bins = bins
        self._rows: list[dict[str, float]] = []

    def update(self, x: Tensor, x_hat: Tensor, batch: Batch | None = None) -> None:
        """Score logits ``x_hat [B, num_bins, H, W]`` against planes ``x [B, 1, H, W]``.

        Where the batch holds ``depth_m [B, H', W']``, the true depth at its own size, predictions are resized to it
        (nearest pixel) and scored there.
        """
        truth, predicted = self.bins.to_metres(x[:, 0]), self.bins.from_logits(x_hat)
        whole = cast(dict[str, Tensor], batch or {}).get("depth_m")
        if whole is not None:
            truth = whole.to(predicted.device)
            predicted = functional.interpolate(predicted[:, None], truth.shape[1:], mode="nearest-exact")[:, 0]
        mask = self.bins.valid(truth)
        for row in range(len(x)):
            if mask[row].any():
                one = slice(row, row + 1)
                self._rows.append(depth_metrics(predicted[one], truth[one], mask[one]))

    def compute(self) -> dict[str, Any]:
        """The means.

        Raises:
            ValueError: no picture has a true depth.
        """
        if not self._rows:
            raise ValueError("no picture has a true depth inside the range of the bins")
        return {name: math.fsum(row[name] for row in self._rows) / len(self._rows) for name in DEPTH_METRICS}

    def protocol(self) -> dict[str, Any]:
        """The range that counts."""
        return {"depth_range_m": [self.bins.low_m, self.bins.high_m], "num_bins": self.bins.num_bins}

    def meanings(self) -> dict[str, str]:
        """See :meth:`Metrics.meanings`."""
        return dict(_DEPTH_MEANINGS)

    def readable(self, record: Mapping[str, Any]) -> list[Number]:
        """See :meth:`Metrics.readable`."""
        labels = {"rmse": "RMSE", "abs_rel": "abs-rel", "log10": "log10"}
        units = {"rmse": " m"}
        return [
            Number(name, labels.get(name, name), f"{record[name]:.4f}{units.get(name, '')}", _DEPTH_MEANINGS[name])
            for name in DEPTH_METRICS
        ]

    def protocol_parts(self, protocol: Mapping[str, Any]) -> list[str]:
        """See :meth:`Metrics.protocol_parts`."""
        low, high = protocol["depth_range_m"]
        return [f"true depths between {low:g} and {high:g} m"]


class PanopticMetrics(Metrics):
    """:class:`PanopticQuality` of planes and logits.

    Args:
        segments: of planes ``[2, H, W]`` or logits ``[C, H, W]``.
        things: the categories that are things.
        min_share: that ``segments`` of logits drops, for the protocol.
    """

    signals: ClassVar[str] = "images"
    bits_name: ClassVar[str] = "bits_per_pixel"
    headline: ClassVar[frozenset[str]] = frozenset({"pq", "pq_things", "pq_stuff"})

    def __init__(self, segments: Callable[[Tensor], Segments], things: Sequence[int], min_share: float) -> None:
        self.segments = segments
        self.min_share = min_share
        self._quality = PanopticQuality(things)

    def update(self, x: Tensor, x_hat: Tensor, batch: Batch | None = None) -> None:
        """Score logits ``x_hat`` against planes ``x``."""
        for true, predicted in zip(x, x_hat, strict=True):
            t, p = self.segments(true), self.segments(predicted)
            self._quality.update((p.ids, p.categories), (t.ids, t.categories))

    def compute(self) -> dict[str, Any]:
        """The qualities; None of a kind of which nothing occurs."""
        return {name: None if math.isnan(value) else value for name, value in self._quality.compute().items()}

    def protocol(self) -> dict[str, Any]:
        """The share of a picture that a predicted segment must exceed."""
        return {"min_share": self.min_share}

    def meanings(self) -> dict[str, str]:
        """See :meth:`Metrics.meanings`."""
        kinds = {"": "", "_things": "; of things alone", "_stuff": "; of stuff alone"}
        return {
            f"{name}{kind}": f"{meaning}{told}"
            for kind, told in kinds.items()
            for name, meaning in _QUALITY_MEANINGS.items()
        }

    def readable(self, record: Mapping[str, Any]) -> list[Number]:
        """See :meth:`Metrics.readable`."""
        return [
            Number(name, name.upper().replace("_THINGS", " things").replace("_STUFF", " stuff"),
                   f"{100 * record[name]:.2f}", meaning)
            for name, meaning in self.meanings().items()
            if record[name] is not None
        ]  # fmt: skip

    def protocol_parts(self, protocol: Mapping[str, Any]) -> list[str]:
        """See :meth:`Metrics.protocol_parts`."""
        return [f"predicted segments above {100 * protocol['min_share']:g} % of the picture"]
