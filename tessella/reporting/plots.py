"""The report's plots, each drawn for a light and a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessella.extras import require
from tessella.reporting.page import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Curves of a training log worth a panel: key -> (file, title, unit). Others in the log are left to its reader.
PANELS = {
    "loss/tokenizer": ("loss", "Loss", ""),
    "loss/generator": ("loss", "Loss", ""),
    "psnr_db": ("psnr", "PSNR", "dB"),
    "usage": ("usage", "Codebook usage", ""),
    "perplexity": ("perplexity", "Perplexity", ""),
}

_SIZE_IN = (6.4, 3.2)
_DPI = 200


def curves(log_rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One plot for each of :data:`PANELS` in the log; rows need a ``step`` and may lack other keys."""
    plots = []
    for key, (file, title, unit) in PANELS.items():
        points = [(row["step"], row[key]) for row in log_rows if "step" in row and row.get(key) is not None]
        if len(points) < 2:
            continue
        steps, values = zip(*points, strict=True)
        first, last = f"{values[0]:.4g} at step {steps[0]:,}", f"{values[-1]:.4g} at step {steps[-1]:,}"
        label = f"{title} ({unit})" if unit else title
        plots.append(Plot(f"curve_{file}", f"{title}: {first}, {last}.", *themed(_curve(steps, values, label))))
    return plots


def _curve(steps: Sequence[float], values: Sequence[float], label: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        crowded = len(values) > 100
        axes.plot(steps, values, lw=0.8 if crowded else 1.8, alpha=0.35 if crowded else 1, color="C0")
        if crowded:
            axes.plot(steps, smooth(values, len(values) // 50), lw=1.8, color="C0")
        axes.set(xlabel="step", ylabel=label)

    return draw


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the ``width`` before and after it, as far as there are so many on both sides."""
    x = torch.tensor(values, dtype=torch.float64)
    total = torch.cat([x.new_zeros(1), x.cumsum(0)])
    position = torch.arange(len(x))
    reach = torch.minimum(torch.minimum(position, len(x) - 1 - position), torch.tensor(width))
    means: list[float] = ((total[position + reach + 1] - total[position - reach]) / (2 * reach + 1)).tolist()
    return means


def usage_histogram(counts: Tensor, codebook_size: int, *, name: str = "usage") -> Plot:
    """Frequencies of the codes that occur, ``counts [U]``, most frequent first, on a logarithmic scale."""
    frequency = (counts.double() / counts.sum()).sort(descending=True).values
    used = len(frequency)

    def draw(axes: Axes) -> None:
        rarest = frequency[-1].item()
        axes.stairs(frequency.numpy(), fill=True, color="C0", alpha=0.85, baseline=rarest / 3)
        axes.axhline(1 / codebook_size, color="C1", lw=1.4, ls="--", label=f"uniform, 1/{codebook_size:,}")
        if used < codebook_size:
            unused = f"{codebook_size - used:,} codes unused"
            axes.axvspan(used, codebook_size, color="C2", alpha=0.18, lw=0, label=unused)
        axes.set(yscale="log", xlim=(0, codebook_size), xlabel="code, by rank", ylabel="frequency")
        axes.legend(frameon=False, loc="upper right")

    caption = (
        f"How often each code occurs, most frequent first: {used:,} of {codebook_size:,} codes are used. "
        f"The flatter the curve, the more a token tells."
    )
    return Plot(name, caption, *themed(draw))


def themed(draw: Callable[[Axes], None]) -> tuple[bytes, bytes]:
    """PNG files of the plot for a light and for a dark page; the background is transparent."""

    def on(figure: Figure) -> None:
        draw(figure.add_subplot())

    return render(on, size_in=_SIZE_IN, ink="#3d4451"), render(on, size_in=_SIZE_IN, ink="#c3c9d4")


def render(
    draw: Callable[[Figure], None], *, size_in: tuple[float, float], ink: str, background: str | None = None
) -> bytes:
    """The PNG file of what ``draw`` puts on a figure; transparent without a ``background``."""
    matplotlib = require("matplotlib", extra="eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], ink),
        "axes.prop_cycle": matplotlib.cycler(color=["#4c7df0", "#e8803c", "#9aa3b2", "#3aa66b", "#8a5cc2", "#d0477d"]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": ink,
        "grid.alpha": 0.15,
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size_in, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", transparent=background is None, facecolor=background or "none")
    return stream.getvalue()
