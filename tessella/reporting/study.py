"""The plots of the studies: numbers over seeds with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessella.extras import require
from tessella.reporting.plots import render
from tessella.storage import write_bytes

# Values a seed, by method and by place on the horizontal axis.
Points = Mapping[str, Mapping[float, Sequence[float]]]
# The mean and the ends of its interval (None without one) of values over seeds.
Interval = Callable[[Sequence[float]], tuple[float, float | None, float | None]]

# A method has one colour and marker in every plot and every run.
_METHODS = (
    "VQ", "EMA split", "FSQ", "SimVQ", "IBQ", "IBQ scaled", "LFQ", "BSQ", "SCQ refined", "EMA", "VQ k-means", "Gumbel",
    "SCQ exact", "SCQ relaxed",
)  # fmt: skip
_COLOURS = (
    "#1f5fd0", "#c2571a", "#1a8a4b", "#d03a6a", "#7b4fb5", "#0f9aa8", "#f0a35e", "#8a8f99", "#7aa6f5", "#3c3c3c",
    "#b8860b", "#6f6f6f", "#a8a8a8", "#556b2f", "#cd5c5c", "#4682b4",
)  # fmt: skip
_MARKERS = "osv^xDP*hX<>pd1+"
_INK = "#3d4451"
_PER_ROW = 4
_DODGE = 0.09  # of the axis' unit: how far apart the methods stand, so that their intervals can be told


def _style(method: str, others: Sequence[str]) -> dict[str, Any]:
    known = [*_METHODS, *(name for name in others if name not in _METHODS)]
    index = known.index(method) % len(_COLOURS)
    return {"color": _COLOURS[index], "marker": _MARKERS[index]}


def plot_points(
    points: Points, file: Path, *, interval: Interval, x: str, y: str, lines: Mapping[float, float] | None = None,
    log: bool = False,
) -> None:  # fmt: skip
    """Write one panel of means with error bars, a line a method.

    Args:
        points: values.
        file: a PNG.
        interval: how values become a mean and an interval.
        x, y: labels of the axes, with units.
        lines: a dotted curve, what is expected at each place.
        log: whether y is logarithmic, and x too.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for index, (method, values) in enumerate(points.items()):
            shift = 0 if log else _DODGE * (index - (len(points) - 1) / 2)
            found = [(place, *interval(values[place])) for place in sorted(values)]
            bars = [
                [0.0, 0.0] if low is None or high is None else [mean - low, high - mean] for _, mean, low, high in found
            ]
            if log:  # an interval of a positive number may reach below it
                bars = [[min(below, 0.95 * mean), up] for (below, up), (_, mean, _, _) in zip(bars, found, strict=True)]
            axes.errorbar(
                [place + shift for place, *_ in found], [mean for _, mean, *_ in found],
                yerr=list(zip(*bars, strict=True)), label=method, lw=1.4, ms=5, capsize=3,
                **_style(method, list(points)),
            )  # fmt: skip
        if lines:
            axes.plot(list(lines), list(lines.values()), color=_INK, lw=1, ls=":", label="uniform use")
        if log:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_xticks(sorted({place for values in points.values() for place in values}))
        axes.set(xlabel=x, ylabel=y)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right", frameon=False)

    require("matplotlib", extra="eval")
    write_bytes(file, render(draw, size_in=(8.0, 4.2), ink=_INK, background="white"))


def plot_histograms(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write how often codes occur, most frequent first, a panel a method, of the first seed of each size.

    Args:
        rows: ``method``, ``bits``, ``seed``, ``counts``, ``num_tokens``, ``codebook_size``.
        file: a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def draw(figure: Any) -> None:
        first = [row for row in rows if row["seed"] == min(other["seed"] for other in rows)]
        grid = list(figure.subplots(-(-len(methods) // _PER_ROW), _PER_ROW, squeeze=False, sharey=True).flat)
        sizes = sorted({row["bits"] for row in first})
        for axes in grid[len(methods) :]:
            axes.set_axis_off()
        for axes, method in zip(grid, methods, strict=False):
            for row in sorted((row for row in first if row["method"] == method), key=lambda row: row["bits"]):
                share = [count / row["num_tokens"] * row["codebook_size"] for count in row["counts"]]
                rank = [(index + 1) / row["codebook_size"] for index in range(len(share))]
                colour = _COLOURS[sizes.index(row["bits"])]
                axes.plot(rank, share, lw=1.2, color=colour, label=f"2^{row['bits']}")
            axes.axhline(1, color=_INK, lw=0.8, ls=":")
            axes.set(title=method, xscale="log", yscale="log")
        figure.supxlabel("rank of the code / codebook size")
        figure.supylabel("frequency x size (1 = uniform)")
        labels = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        ordered = [f"2^{bits}" for bits in sizes if f"2^{bits}" in labels]
        figure.legend([labels[label] for label in ordered], ordered, loc="outside right", frameon=False)

    require("matplotlib", extra="eval")
    size = (11.0, 2.6 * -(-len(methods) // _PER_ROW) + 0.8)
    write_bytes(file, render(draw, size_in=size, ink=_INK, background="white"))


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """Write learning curves on held-out pictures: PSNR in dB and usage against steps, a line each.

    Args:
        curves: by name; points have ``step``, ``psnr`` and ``usage``.
        file: a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for name, curve in curves.items():
            steps = [point["step"] for point in curve]
            style = {**_style(name, list(curves)), "ms": 4}
            left.plot(steps, [point["psnr"] for point in curve], label=name, lw=1.2, **style)
            right.plot(steps, [100 * point["usage"] for point in curve], lw=1.2, **style)
        left.set(xlabel="step", ylabel="PSNR, dB")
        right.set(xlabel="step", ylabel="codes used on 500 held-out pictures, %", yscale="log")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right", frameon=False)

    require("matplotlib", extra="eval")
    write_bytes(file, render(draw, size_in=(11.0, 4.2), ink=_INK, background="white"))
