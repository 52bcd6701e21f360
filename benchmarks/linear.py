"""The CPU paths of tessella.transformer beside torch's defaults: products of few rows, and the gradient of attention.

    OMP_NUM_THREADS=2 python benchmarks/linear.py [--rows 1 2 4 16 64 512] [--repeats 7] [--out folder]

Products are those of LlamaGen-B in float32 while sampling, each over weights of 60 MB and more, so that they come
from memory and not from a cache, as in sampling. Attention is forward and backward under bfloat16 autocast, 64
sequences of 64 tokens in 6 heads of 32. Sides alternate; times are medians. Writes linear.json and linear.md into the
folder, and prints the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tessella.attention import Linear, attend, sampling

SHAPES = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 4096), "down": (2048, 768), "head": (768, 16384)}
WEIGHTS_BYTES = 60e6
LEAST_SECONDS = 0.05


def milliseconds(run: Callable[[], Any]) -> float:
    """Of one call, over at least LEAST_SECONDS of them."""
    start = time.perf_counter()
    for count in itertools.count(1):
        run()
        took = time.perf_counter() - start
        if took > LEAST_SECONDS:
            return took / count * 1e3
    raise AssertionError


def compare(repeats: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of each, measured in alternation after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {name: statistics.median(some[1:]) for name, some in times.items()}


@sampling()
def product(rows: int, in_features: int, out_features: int, repeats: int) -> dict[str, float]:
    count = int(WEIGHTS_BYTES / (in_features * out_features * 4)) + 1
    layers = [Linear(in_features, out_features, bias=False) for _ in range(count)]
    turn = itertools.cycle(layers)
    x = torch.randn(rows, in_features)
    torch.testing.assert_close(layers[0](x), nn.Linear.forward(layers[0], x), rtol=1e-4, atol=1e-4)
    return compare(repeats, default=lambda: nn.Linear.forward(next(turn), x), ours=lambda: next(turn)(x))


def attention(repeats: int) -> dict[str, float]:
    q, k, v, gradient = (torch.randn(64, 6, 64, 32, requires_grad=True) for _ in range(4))

    def default() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.backward(gradient.to(out))

    def ours() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(q, k, v, None, dropout=0.0, is_causal=True)
        out.backward(gradient.to(out))

    return compare(repeats, default=default, ours=ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 16, 64, 512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for count in arguments.rows:
        for name, (in_features, out_features) in SHAPES.items():
            took = product(count, in_features, out_features, arguments.repeats)
            rows.append({"what": f"{name} {in_features} x {out_features}", "rows": count, "ms": took})
    rows.append({"what": "attention, with gradients", "rows": 4096, "ms": attention(arguments.repeats)})
    lines = ["| product | rows | default ms | ours ms | times as fast |", "|---|---|---|---|---|"]
    for row in rows:
        default, ours = row["ms"]["default"], row["ms"]["ours"]
        lines.append(f"| {row['what']} | {row['rows']} | {default:.3f} | {ours:.3f} | {default / ours:.2f} |")
    summary = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "repeats": arguments.repeats,
        "rows": rows,
    }
    lines += ["", f"{summary['threads']} threads, {summary['cpu']}, torch {torch.__version__}."]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "linear.json").write_text(json.dumps(summary, indent=2) + "\n")
    (arguments.out / "linear.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
