"""The plots of the collapse study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessella.extras import require
from tessella.reporting.plots import render
from tessella.storage import write_bytes

# Fixed, so that a method has one colour and marker in every plot and every run.
_COLOURS = (
    "#1f5fd0", "#7aa6f5", "#c2571a", "#f0a35e", "#8a8f99", "#7b4fb5", "#1a8a4b", "#d03a6a", "#0f9aa8", "#3c3c3c",
    "#6f6f6f", "#a8a8a8",
)  # fmt: skip
_MARKERS = "osv^xDP*hX<>"
_INK = "#3d4451"
_PER_ROW = 4


def plot_study(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write ``usage.png``, ``reconstruction.png`` and ``histograms.png`` into ``out``.

    Args:
        rows: the study's cells; see :func:`tessella.study.measure`.
        out: a folder.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require("matplotlib", extra="eval")
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def lines(axes: Any, key: str, scale: float) -> None:
        for index, method in enumerate(methods):
            by_bits: dict[int, list[float]] = {}
            for row in rows:
                if row["method"] == method:
                    by_bits.setdefault(row["bits"], []).append(scale * row[key])
            bits = sorted(by_bits)
            means = [sum(by_bits[b]) / len(by_bits[b]) for b in bits]
            axes.plot(bits, means, marker=_MARKERS[index], color=_COLOURS[index], label=method, lw=1.6, ms=5)
        axes.set_xticks(sorted({row["bits"] for row in rows}))
        axes.set(xlabel="log2 of the codebook size")

    def usage(figure: Any) -> None:
        axes = figure.subplots()
        lines(axes, "usage", 100)
        axes.set(ylabel="codes used on held-out pictures, %", ylim=(-2, 104))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right", frameon=False)

    def reconstruction(figure: Any) -> None:
        soft, hard = figure.subplots(1, 2, sharey=True)
        lines(soft, "psnr", 1)
        lines(hard, "hard_psnr", 1)
        soft.set(ylabel="PSNR, dB", title="as the decoder is trained (SCQ: soft)")
        hard.set(title="decoded from the indices alone")
        figure.legend(*soft.get_legend_handles_labels(), loc="outside right", frameon=False)

    def histograms(figure: Any) -> None:
        first = [row for row in rows if row["seed"] == min(other["seed"] for other in rows)]
        grid = list(figure.subplots(-(-len(methods) // _PER_ROW), _PER_ROW, squeeze=False, sharey=True).flat)
        for axes in grid[len(methods) :]:
            axes.set_axis_off()
        for axes, method in zip(grid, methods, strict=False):
            for row in first:
                if row["method"] == method:
                    share = [count / row["num_tokens"] * row["codebook_size"] for count in row["counts"]]
                    rank = [(index + 1) / row["codebook_size"] for index in range(len(share))]
                    axes.plot(rank, share, lw=1.2, label=f"2^{row['bits']}")
            axes.axhline(1, color=_INK, lw=0.8, ls=":")
            axes.set(title=method, xscale="log", yscale="log")
        figure.supxlabel("rank of the code / codebook size")
        figure.supylabel("frequency x codebook size (1 = uniform)")
        figure.legend(*next(iter(figure.axes)).get_legend_handles_labels(), loc="outside right", frameon=False)

    for name, draw, size in (
        ("usage", usage, (7.5, 4.0)),
        ("reconstruction", reconstruction, (10.0, 4.2)),
        ("histograms", histograms, (11.0, 2.4 * -(-len(methods) // _PER_ROW) + 0.6)),
    ):
        write_bytes(out / f"{name}.png", render(draw, size_in=size, ink=_INK, background="white"))
