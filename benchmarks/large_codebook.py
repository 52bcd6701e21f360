"""Time and memory of the large-codebook operations, beside the bare matrix products they cannot do without.

    python benchmarks/large_codebook.py [--repeats 5] [--sizes 3] [--out large_codebook.json]

Prints a markdown table and writes JSON. Operations are timed in turn and each is compared with the products timed just
before it, so that a machine busy with other work slows both alike; medians are given. The floor of index
backpropagation, forward and backward, is seven products ``z @ codebook.T`` (14 N V D operations), that of nearest is
one, in float32, tile by tile into one buffer, which is the strictest floor; "full product" is ``z @ codebook.T`` as one
would write it, into a new N x V matrix. Memory is the peak
resident size of a fresh process above its inputs, less the codebook's gradient, in MiB (Linux). The dense autograd form
is run where its N x V tensors are small.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ops")]

from dense_reference import dense_index_backprop  # noqa: E402

from tessella.ops import index_backprop, nearest  # noqa: E402
from tessella.ops._tiles import corner, spans, tile_shape  # noqa: E402

SIZES = [(1024, 16384, 256), (4096, 65536, 64), (1024, 262144, 256)]  # N, V, D
DENSE_SIZE = SIZES[0]
PRODUCTS = 7

Data = tuple[Tensor, Tensor, Tensor]


def inputs(n: int, v: int, d: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    z, codebook, upstream = (torch.randn(rows, d, generator=generator) for rows in (n, v, n))
    return z.requires_grad_(), codebook.requires_grad_(), upstream / n


def train_step(operation: Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]], data: Data) -> None:
    z, codebook, upstream = data
    z.grad = codebook.grad = None
    z_q, _, loss, _ = operation(z, codebook, 1.0, 0.25, 0.05, 0.01)
    (loss + (z_q * upstream).sum()).backward()


def product(data: Data) -> None:
    z, codebook = data[0].detach(), data[1].detach()
    rows, codes = tile_shape(len(z), len(codebook), z.device)
    scratch = torch.empty(rows * codes)
    for i in spans(len(z), rows):
        for k in spans(len(codebook), codes):
            torch.mm(z[i], codebook[k].T, out=corner(scratch, i, k))


def full_product(data: Data) -> None:
    _ = data[0].detach() @ data[1].detach().T


def run_nearest(data: Data) -> None:
    nearest(data[0], data[1])


OPERATIONS: dict[str, Callable[[Data], None]] = {
    "product": product,
    "full product": full_product,
    "nearest": run_nearest,
    "index_backprop": lambda data: train_step(index_backprop, data),
    "dense": lambda data: train_step(dense_index_backprop, data),
}


def seconds(operation: str, data: Data) -> float:
    start = time.perf_counter()
    OPERATIONS[operation](data)
    return time.perf_counter() - start


def extra_mib(operation: str, size: tuple[int, int, int]) -> float:
    """Peak memory above the inputs and the codebook's gradient, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", operation, *map(str, size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_mib(name: str) -> float:
    """``VmRSS``, the resident size of this process, or ``VmHWM``, its peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def measure_memory(operation: str, size: tuple[int, int, int]) -> float:
    OPERATIONS[operation](inputs(64, 128, size[2]))  # libraries load and threads start
    data = inputs(*size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_mib("VmRSS")
    OPERATIONS[operation](data)
    gradient = 0 if data[1].grad is None else data[1].grad.nbytes / 2**20
    return memory_mib("VmHWM") - before - gradient


def measure(size: tuple[int, int, int], repeats: int) -> dict[str, object]:
    data = inputs(*size)
    operations = ["full product", "nearest", "index_backprop", *(["dense"] if size == DENSE_SIZE else [])]
    times: dict[str, list[float]] = {name: [] for name in ["product", *operations]}
    ratios: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(repeats):
        for name in operations:
            times["product"].append(seconds("product", data))
            times[name].append(seconds(name, data))
            ratios[name].append(times[name][-1] / times["product"][-1])
    del data
    ratio = {name: statistics.median(values) for name, values in ratios.items()}
    row: dict[str, object] = {
        "N, V, D": size,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "index_backprop / 7 products": ratio["index_backprop"] / PRODUCTS,
        "nearest / product": ratio["nearest"],
        "nearest / full product": ratio["nearest"] / ratio["full product"],
        "MiB of index_backprop": extra_mib("index_backprop", size),
        "MiB of nearest": extra_mib("nearest", size),
    }
    if "dense" in ratio:
        row["dense / index_backprop"] = ratio["dense"] / ratio["index_backprop"]
        row["MiB of dense"] = extra_mib("dense", size)
    return row


def markdown(rows: list[dict[str, object]]) -> str:
    columns = [name for name in rows[0] if name != "seconds"]

    def cell(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes to run, smallest first")
    parser.add_argument("--out", type=Path, default=Path("large_codebook.json"))
    parser.add_argument("--memory-of", nargs=4, metavar=("OPERATION", "N", "V", "D"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        operation, *size = arguments.memory_of
        n, v, d = map(int, size)
        print(measure_memory(operation, (n, v, d)))
        return
    rows = [measure(size, arguments.repeats) for size in SIZES[: arguments.sizes]]
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
