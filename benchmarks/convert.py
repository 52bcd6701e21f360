"""Converting the largest IBQ tokenizer: memory and time of `tessella.convert` on random weights of the true shapes.

    python benchmarks/convert.py [--codes 262144] [--out benchmarks/results]

Writes a checkpoint as a trainer stores it (plain weights, their moving averages, a discriminator), converts it in a
process of its own and writes what that process took beside the file's size. The limits are 1.5 times the file in memory
and a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from tessella.interop._vqgan import TAMING, projections, table
from tessella.interop.base import empty_tokenizer
from tessella.losses.discriminators import PatchGAN
from tessella.recipe import read_recipe

CONVERT = """
import re, sys, time
started = time.perf_counter()
import torch
from tessella.interop import convert
imported = time.perf_counter()

def peak():  # of this program; what getrusage says begins with the process that started it
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])

base = peak()
convert("ibq", sys.argv[1], sys.argv[2])
print(imported - started, time.perf_counter() - imported, base, peak())
"""


def checkpoint(codes: int) -> dict[str, Tensor]:
    """Random weights under IBQ's names, with moving averages and a discriminator of the published size."""
    recipe = read_recipe("ibq_262144")
    recipe["quantizer"]["codebook_size"] = codes
    tokenizer = empty_tokenizer(recipe)
    names = {**table(tokenizer.autoencoder, TAMING), **projections()}
    shapes = {names[name].names[0]: x.shape for name, x in tokenizer.state_dict().items() if name in names}
    shapes["quantize.embedding.weight"] = tokenizer.quantizer.codebook.shape
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    state |= {"model_ema." + name.replace(".", ""): torch.randn(x.shape) for name, x in state.items()}
    for name, x in PatchGAN(3).state_dict().items():
        state[f"loss.discriminator.{name}"] = x
    return state


def measure(codes: int) -> dict[str, float | int | str]:
    """Convert in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"imagenet256_{codes}.ckpt"
        torch.save({"state_dict": checkpoint(codes), "epoch": 330}, file)
        size = file.stat().st_size
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CONVERT, str(file), str(Path(scratch) / "model")], capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        wall = time.perf_counter() - start
    importing, converting, base, peak = map(float, done.stdout.split())
    return {
        "codes": codes, "file_mib": size / 2**20, "peak_mib": peak / 2**20, "before_mib": base / 2**20,
        "peak_over_file": peak / size, "seconds": converting, "import_seconds": importing, "wall_seconds": wall,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=262_144)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    found = measure(arguments.codes)
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.out is not None:
        (arguments.out / "convert.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
