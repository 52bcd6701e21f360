"""What comes of the cells of ``collapse.py``: tables over seeds, and verdicts on usage and reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from tessella.reporting.study import plot_curves, plot_histograms, plot_points
from tessella.study.cells import Row
from tessella.study.verdicts import Case, Measured, Verdict, above, by_seed, is_flat, judge

FULL = 0.75  # share of what uniform use would show from which a codebook counts as used
ORDER_OF_MAGNITUDE = 10.0

_SEEDS = "three seeds of each and twice the steps"

Curve = Literal["psnr", "usage"]


def expected_usage(bits: int, num_tokens: float) -> float:
    """Fraction of 2^bits codes that ``num_tokens`` uniform draws hit: 1 - (1 - 2^-bits)^n."""
    return -math.expm1(num_tokens * math.log1p(-(2.0**-bits)))


def groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each (method, bits), in the order of the rows."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["bits"]), []).append(row)
    return found


def measured(rows: Sequence[Row], key: str, method: str, bits: int) -> Measured:
    """``key`` of one method and size over its seeds."""
    return _over_seeds(by_seed(rows, key, method=method, bits=bits), key)


def _over_seeds(values: Sequence[float], key: str) -> Measured:
    """No number of a table is negative, and no share above 1."""
    return Measured.of(values, least=0, most=1 if key == "usage" else math.inf)


_COLUMNS: dict[str, Callable[[list[Row]], str]] = {
    "seeds": lambda group: str(len(group)),
    "MSE (1e-3)": lambda group: _shown(group, "mse", 2, 1000),
    "PSNR dB": lambda group: _shown(group, "psnr", 2),
    "from indices dB": lambda group: _shown(group, "hard_psnr", 2),
    "LPIPS": lambda group: _shown(group, "lpips_alexnet", 4) if "lpips_alexnet" in group[0] else "-",
    "usage %": lambda group: _shown(group, "usage", 1, 100),
    "perplexity": lambda group: _shown(group, "perplexity", 0),
    "error / variance": lambda group: f"{_mean(group, 'quantization_error') / _mean(group, 'latent_variance'):.3g}",
    "support": lambda group: f"{_mean(group, 'support_size'):.1f}" if "support_size" in group[0] else "1",
    "bits a token": lambda group: f"{_mean(group, 'bits_per_token'):.0f}",
    "flat: usage, PSNR": lambda group: f"{_flat(group, 'usage')}, {_flat(group, 'psnr')}",
    "quantizer ms": lambda group: f"{_mean(group, 'quantizer_ms'):.1f}",
    "s a cell": lambda group: f"{_mean(group, 'seconds'):.0f}",
}


def _mean(group: list[Row], key: str) -> float:
    return _over_seeds([row[key] for row in group], key).mean


def _shown(group: list[Row], key: str, digits: int, scale: float = 1.0) -> str:
    return _over_seeds([row[key] for row in group], key).show(digits, scale)


def _flat(group: list[Row], key: Curve) -> str:
    return "yes" if all(is_flat(row["curve"], key) for row in group) else "no"


def table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Markdown of one row a method and size, methods in the order given; numbers over seeds with their intervals."""
    lines = [
        f"Usage over {int(rows[0]['num_tokens']):,} held-out tokens: uniform use of 2^b codes would show "
        + ", ".join(f"{100 * expected_usage(b, rows[0]['num_tokens']):.0f} % at 2^{b}"
                    for b in sorted({row["bits"] for row in rows})) + ".",
        "",
        "| quantizer | codes | " + " | ".join(_COLUMNS) + " |",
        "|---|---|" + "---|" * len(_COLUMNS),
    ]  # fmt: skip
    order = {method: position for position, method in enumerate(methods)}
    for (method, _), group in sorted(groups(rows).items(), key=lambda item: (order[item[0][0]], item[0][1])):
        cells = " | ".join(show(group) for show in _COLUMNS.values())
        lines.append(f"| {method} | {group[0]['codebook_size']:,} | {cells} |")
    return "\n".join(lines) + "\n"


def unfinished(rows: Sequence[Row], key: str, *where: tuple[str, int]) -> int | None:
    """The steps of these (method, bits) where the curve behind ``key`` still moves at its end; None where all are flat.

    The curve of ``usage`` is its own, that of any error is the PSNR's.
    """
    curve: Curve = "usage" if key == "usage" else "psnr"
    moving = [row for row in rows if (row["method"], row["bits"]) in where and not is_flat(row["curve"], curve)]
    return max((int(row["curve"][-1]["step"]) for row in moving if row["curve"]), default=0) if moving else None


def usage_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """On codebooks in use, of whatever cells there are."""
    sizes = _sizes(rows)
    found = []
    if len(vq := sizes.get("VQ", [])) > 1:
        pair = [measured(rows, "usage", "VQ", bits) for bits in (vq[0], vq[-1])]
        numbers = f"{pair[0].show(1, 100)} % against {pair[1].show(2, 100)} %"
        case = Case(f"2^{vq[0]} to 2^{vq[-1]} codes", above(pair[0], pair[1], 2), numbers)
        found.append(judge("VQ uses less than half the share of a large codebook that it uses of a small one", [case],
                           _SEEDS))  # fmt: skip
    for method in ("FSQ", "SimVQ", "LFQ", "BSQ", "IBQ", "IBQ scaled", "EMA split"):
        if method in sizes:
            claim = f"{method} uses at least {100 * FULL:.0f} % of what uniform use would show"
            found.append(judge(claim, [_full(rows, method, bits) for bits in sizes[method]], _SEEDS))
    for method in ("FSQ", "SimVQ", "IBQ", "EMA split"):
        common = [bits for bits in sizes.get(method, []) if bits in sizes.get("VQ", []) and bits >= 10]
        if common:
            cases = [_compared(rows, "usage", bits, method, "VQ", ORDER_OF_MAGNITUDE, 1, 100, " %") for bits in common]
            found.append(judge(f"{method} keeps ten times as many codes in use as VQ", cases, _SEEDS))
    if common := [bits for bits in sizes.get("EMA split", []) if bits in sizes.get("VQ", [])]:
        cases = [_compared(rows, "mse", bits, "VQ", "EMA split", 1, 2, 1000, "e-3") for bits in common]
        found.append(judge("Moving averages with splitting reconstruct better than VQ", cases, _SEEDS))
    if common := [bits for bits in sizes.get("IBQ", []) if bits in sizes.get("IBQ scaled", [])]:
        cases = [_compared(rows, "mse", bits, "IBQ", "IBQ scaled", 1, 2, 1000, "e-3") for bits in common]
        found.append(judge("IBQ reconstructs better from codes at the latents' scale than from N(0, 1)", cases, _SEEDS))
    for method in ("FSQ", "VQ"):
        if len(own := sizes.get(method, [])) > 1:
            small, large = (measured(rows, "mse", method, bits) for bits in (own[0], own[-1]))
            numbers = f"MSE {small.show(2, 1000)}e-3 against {large.show(2, 1000)}e-3"
            where = f"2^{own[0]} to 2^{own[-1]} codes"
            case = Case(
                where, above(small, large), numbers, unfinished(rows, "mse", (method, own[0]), (method, own[-1]))
            )
            found.append(judge(f"{method} reconstructs better with a larger codebook", [case], _SEEDS))
    return found


def scq_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """On SCQ's order of magnitude: against VQ of as many codes, and against VQ at no higher a rate."""
    sizes = _sizes(rows)
    found = []
    for method in (name for name in sizes if name.startswith("SCQ")):
        common = [bits for bits in sizes[method] if bits in sizes.get("VQ", [])]
        for other in ("VQ", "EMA split"):
            both_have = [bits for bits in common if bits in sizes.get(other, [])]
            cases = [
                _compared(rows, "mse", bits, other, method, ORDER_OF_MAGNITUDE, 2, 1000, "e-3") for bits in both_have
            ]
            claim = f"{method} has a tenth of the MSE of {other} with as many codes"
            found.append(judge(claim, cases, _SEEDS))
        cases = [_compared(rows, "usage", bits, method, "VQ", ORDER_OF_MAGNITUDE, 1, 100, " %") for bits in common]
        found.append(judge(f"{method} uses ten times as many codes as VQ", cases, _SEEDS))
        found.append(_at_rate(rows, method, sizes[method]))
    return found


def _at_rate(rows: Sequence[Row], method: str, sizes: Sequence[int]) -> Verdict:
    cases = []
    for bits in sizes:
        rate = _mean(groups(rows)[method, bits], "bits_per_token")
        rivals = [
            (_mean(group, "mse"), name, size) for (name, size), group in groups(rows).items()
            if not name.startswith("SCQ") and _mean(group, "bits_per_token") <= rate
        ]  # fmt: skip
        if rivals:
            _, name, size = min(rivals)
            mine, theirs = measured(rows, "mse", method, bits), measured(rows, "mse", name, size)
            their_rate = _mean(groups(rows)[name, size], "bits_per_token")
            numbers = (
                f"MSE {mine.show(2, 1000)}e-3 at {rate:.0f} bits a token against {theirs.show(2, 1000)}e-3 of {name} "
                f"2^{size} at {their_rate:.0f}"
            )
            cases.append(Case(f"2^{bits} codes", above(theirs, mine), numbers, unfinished(rows, "mse", (method, bits))))
    return judge(f"{method} reconstructs better than the best of the others at no higher a rate", cases, _SEEDS)


def _sizes(rows: Sequence[Row]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for method, bits in sorted(groups(rows), key=lambda key: key[1]):
        found.setdefault(method, []).append(bits)
    return found


def _full(rows: Sequence[Row], method: str, bits: int) -> Case:
    usage = measured(rows, "usage", method, bits)
    uniform = expected_usage(bits, groups(rows)[method, bits][0]["num_tokens"])
    return Case(
        f"2^{bits}", above(usage, FULL * uniform), f"{usage.show(1, 100)} %", unfinished(rows, "usage", (method, bits))
    )


def _compared(
    rows: Sequence[Row], key: str, bits: int, larger: str, smaller: str, factor: float, digits: int, scale: float,
    unit: str,
) -> Case:  # fmt: skip
    """Whether ``key`` of one method is above ``factor`` times that of another, at one size."""
    a, b = (measured(rows, key, method, bits) for method in (larger, smaller))
    numbers = f"{a.show(digits, scale)}{unit} of {larger} against {b.show(digits, scale)}{unit} of {smaller}"
    return Case(
        f"2^{bits} codes", above(a, b, factor), numbers, unfinished(rows, key, (larger, bits), (smaller, bits))
    )  # fmt: skip


def interval(values: Sequence[float], most: float = math.inf) -> tuple[float, float | None, float | None]:
    """Mean and interval of values over seeds, for the plots; none is negative or above ``most``."""
    found = Measured.of(values, least=0, most=most)
    return found.mean, found.low, found.high


def _points(rows: Sequence[Row], key: str, scale: float = 1.0) -> dict[str, dict[float, list[float]]]:
    found: dict[str, dict[float, list[float]]] = {}
    for method, bits in groups(rows):
        values = by_seed(rows, key, method=method, bits=bits)
        found.setdefault(method, {})[bits] = [scale * value for value in values]
    return found


def usage_plots(rows: Sequence[Row], out: Path, prefix: str) -> dict[str, str]:
    """Write the plots of the rows as ``prefix_*.png`` into ``out``, and say what each file shows."""
    sizes = sorted({row["bits"] for row in rows})
    uniform = {bits: 100 * expected_usage(bits, rows[0]["num_tokens"]) for bits in sizes}
    bits_axis = "log2 of the codebook size"
    plot_points(
        _points(rows, "usage", 100), out / f"{prefix}_usage.png", interval=partial(interval, most=100), x=bits_axis,
        y="codes used on held-out pictures, %", lines=uniform,
    )  # fmt: skip
    plot_points(_points(rows, "psnr"), out / f"{prefix}_psnr.png", interval=interval, x=bits_axis, y="PSNR, dB")
    plot_histograms(rows, out / f"{prefix}_histograms.png")
    largest = [row for row in rows if row["bits"] == sizes[-1] and row["seed"] == 0]
    plot_curves({row["method"]: row["curve"] for row in largest}, out / f"{prefix}_curves.png")
    return {
        f"{prefix}_usage.png": "Codes in use against codebook size, 95 % intervals over seeds",
        f"{prefix}_psnr.png": "Reconstruction against codebook size, 95 % intervals over seeds",
        f"{prefix}_histograms.png": "How often codes occur, most frequent first (the first 4,096)",
        f"{prefix}_curves.png": f"Learning curves on held-out pictures, 2^{sizes[-1]} codes, seed 0",
    }


def cost(rows: Sequence[Row]) -> float:
    """Seconds of one core that the rows took."""
    return sum(float(row["seconds"]) for row in rows)
