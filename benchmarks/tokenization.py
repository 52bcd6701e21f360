"""Pictures a second of whole tokenizations and evaluations, beside the model's own: this process, more of them, Ray.

    OMP_NUM_THREADS=2 python benchmarks/tokenization.py DATA [--model RUN] [--pictures 40000] [--ways 0 1 evaluate]

DATA is a folder of Parquet files of 32 x 32 pictures (CIFAR-10). Without a model `cifar10_fsq` is built untrained: its
work is the same. `model` encodes pictures that are in memory already, 64 at once, for ten seconds, with as many torch
threads as a whole tokenization by this process has; a number is that of worker processes (one torch thread each), 0 is
this process. Starting the processes counts. `evaluate` measures reconstructions, without LPIPS; of its seconds `model`
is what encoding and decoding took. Every way runs in a process of its own; the peak is the largest resident memory of
any one process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import tessella
from tessella.checkpoint import load
from tessella.processes import keep_freed_memory
from tessella.tokenization.engine import tokenize_dataset

BATCH = 64
MODEL_SEC = 10.0


def model_rate(model: Path) -> dict[str, Any]:
    tokenizer = load(model)
    x = torch.rand(BATCH, 3, 32, 32) * 2 - 1
    tokenizer.encode(x)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < MODEL_SEC:
        tokenizer.encode(x)
        count += BATCH
    return {"pictures": count, "seconds": time.perf_counter() - started, "profile": {}}


def whole(way: str, model: Path, data: Path, pictures: int) -> dict[str, Any]:
    section = {"name": "parquet", "path": str(data), "crop_px": 32}
    with tempfile.TemporaryDirectory() as out:
        result = tokenize_dataset(
            model, section, Path(out) / "tokens", limit=pictures, batch_size=BATCH, device="cpu", profile=True,
            workers=0 if way == "ray" else int(way), engine="ray" if way == "ray" else "local",
        )  # fmt: skip
    return {"pictures": result.num_rows, "seconds": result.seconds, "profile": result.profile}


def whole_evaluation(model: Path, data: Path, pictures: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        found = tessella.evaluate(model, data=f"parquet:{data}", limit=pictures, out=Path(out), device="cpu")
    record = found.reconstruction
    count = record.protocol["num_images"]
    return {"pictures": count, "seconds": record["seconds"], "profile": {"model": count / record["images_per_sec"]}}


def measure(way: str, model: Path, data: Path, pictures: int, answer: Any) -> None:
    keep_freed_memory()  # as the command line does
    if way == "model":
        found = model_rate(model)
    elif way == "evaluate":
        found = whole_evaluation(model, data, pictures)
    else:
        found = whole(way, model, data, pictures)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    answer.send({**found, "peak_mib": max(peaks) / 1024})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--ways", nargs="+", default=["model", "0", "1", "2", "ray", "evaluate"])
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "model"
        if args.model is None:
            tessella.build("cifar10_fsq").save(model)
        print("| way | pictures | seconds | pictures/s | read | decode | model | write | peak MiB |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for way in args.ways:
            ours, theirs = context.Pipe()
            process = context.Process(target=measure, args=(way, model, args.data, args.pictures, theirs))
            process.start()
            found = ours.recv()
            process.join()
            rate = found["pictures"] / found["seconds"]
            parts = [f"{found['profile'].get(part, 0):.1f}" for part in ("read", "decode", "model", "write")]
            cells = [way, f"{found['pictures']:,}", f"{found['seconds']:.1f}", f"{rate:.0f}", *parts]
            print(f"| {' | '.join(cells)} | {found['peak_mib']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
