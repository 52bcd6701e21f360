"""Forward and backward of every quantizer beside vector-quantize-pytorch, in alternation in one run.

    python benchmarks/quantizers.py [--repeats 15] [--out folder]

Times are medians of wall time, the ratio that of the medians; both sides get the same float32 input and do the same
rule: tokens, quantized vectors, loss, gradient. Ours also reports usage and perplexity, which theirs leaves out.
Writes quantizers.json and quantizers.md into the folder, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import vector_quantize_pytorch as peer
from torch import Tensor, nn

from tessella.quantizers import EMAVQ, FSQ, LFQ, VQ, Residual, SimVQ

SIZES = [(8192, 1024, 64), (4096, 16384, 64)]
LEVELS = [8, 8, 8, 5, 5, 5]


Maker = Callable[[], nn.Module]


def rows() -> list[tuple[str, tuple[int, int, int], Maker, Maker]]:
    """Name, (N, V, D), ours, theirs."""
    learned: dict[str, Any] = {"learnable_codebook": True, "ema_update": False, "rotation_trick": False}
    ema: dict[str, Any] = {"decay": 0.99, "rotation_trick": False}
    found: list[tuple[str, tuple[int, int, int], Maker, Maker]] = []
    for n, v, d in SIZES:
        pairs: list[tuple[str, Maker, Maker]] = [
            ("VQ", partial(VQ, v, d), partial(peer.VectorQuantize, d, v, **learned)),
            (
                "VQ, rotation",
                partial(VQ, v, d, estimator="rotation"),
                partial(peer.VectorQuantize, d, v, **learned | {"rotation_trick": True}),
            ),
            ("EMAVQ", partial(EMAVQ, v, d), partial(peer.VectorQuantize, d, v, **ema)),
            ("SimVQ", partial(SimVQ, v, d), partial(peer.SimVQ, d, v, rotation_trick=False)),
        ]
        found += [(name, (n, v, d), ours, theirs) for name, ours, theirs in pairs]
    n, v, d = SIZES[0]
    residual = partial(peer.ResidualVQ, dim=d, codebook_size=v, num_quantizers=4, **ema)
    lfq = partial(peer.LFQ, dim=10, codebook_size=1024, commitment_loss_weight=0.25)
    return [
        *found,
        ("Residual of 4 EMAVQ", (n, v, d), lambda: Residual(EMAVQ(v, d), 4), residual),
        ("LFQ, exact entropy", (n, 1024, 10), partial(LFQ, dim=10, entropy_group_bits=10), lfq),
        ("FSQ", (65536, 64000, len(LEVELS)), partial(FSQ, LEVELS), partial(peer.FSQ, LEVELS)),
    ]


def step(quantizer: nn.Module, z: Tensor) -> None:
    """Forward, backward and, where statistics are kept, their update."""
    leaf = z.detach().requires_grad_()
    out = quantizer(leaf)
    if isinstance(out, tuple):
        loss = out[0].sum() + sum(part.sum() for part in out[2:] if part.requires_grad)
    else:
        loss = out.z_q.sum() + out.loss
    loss.backward()
    for module in quantizer.modules():
        if hasattr(module, "after_step"):
            module.after_step()


def compare(ours: nn.Module, theirs: nn.Module, z: Tensor, repeats: int) -> tuple[float, float]:
    """Median seconds of each, measured in alternation."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 2):
        for quantizer, kept in zip((ours, theirs), times, strict=True):
            quantizer.zero_grad()
            start = time.perf_counter()
            step(quantizer, z)
            if repeat >= 2:
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    measured = []
    for name, (n, v, d), ours, theirs in rows():
        torch.manual_seed(0)
        a, b = compare(ours(), theirs(), torch.randn(1, n, d), arguments.repeats)
        measured.append(
            {"quantizer": name, "N": n, "V": v, "D": d, "ours_ms": 1e3 * a, "peer_ms": 1e3 * b, "ratio": b / a}
        )
        print(measured[-1], flush=True)
    ratios = [row["ratio"] for row in measured]
    summary = {
        "torch": torch.__version__,
        "peer": f"vector-quantize-pytorch {version('vector-quantize-pytorch')}",
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "median_ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "rows": measured,
    }
    lines = ["| quantizer | N | V | D | ours, ms | peer, ms | times as fast |", "|---|---|---|---|---|---|---|"]
    lines += [
        "| {quantizer} | {N} | {V} | {D} | {ours_ms:.1f} | {peer_ms:.1f} | {ratio:.2f} |".format(**row)
        for row in measured
    ]
    lines += ["", f"Median {summary['median_ratio']:.2f}, lowest {summary['lowest_ratio']:.2f}; {summary['peer']}, "
              f"torch {torch.__version__}, {summary['threads']} threads, medians of {arguments.repeats}."]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "quantizers.json").write_text(json.dumps(summary, indent=2) + "\n")
    (arguments.out / "quantizers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
