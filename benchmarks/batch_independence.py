"""The share of tokens that change with the batch a signal is encoded in, of trained or fresh tokenizers.

    OMP_NUM_THREADS=2 python benchmarks/batch_independence.py [RUN ...]

Prints, for every tokenizer, float32 and bfloat16 autocast, and 1 and 2 threads, the largest share over batches of 2, 3, 7
and 64 signals against each signal alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tessella
from tessella.commands._data import data_of, open_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--signals", type=int, default=64)
    arguments = parser.parse_args()
    print("| tokenizer | number format | threads | tokens that differ |\n|---|---|---|---|")
    for run in arguments.runs:
        model = tessella.load(run)
        dataset = open_data(data_of(model, None), "test")
        x = torch.stack([dataset[index]["x"] for index in range(min(arguments.signals, len(dataset)))])
        for autocast in (False, True):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    alone = torch.cat([model.encode(row[None]) for row in x])
                    worst = max(
                        (torch.cat([model.encode(part) for part in x.split(size)]) != alone).double().mean().item()
                        for size in (2, 3, 7, 64)
                    )
                print(f"| {run.name} | {'bfloat16' if autocast else 'float32'} | {threads} | {100 * worst:.4f} % |")


if __name__ == "__main__":
    main()
