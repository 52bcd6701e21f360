"""Faults of tokenization: kills at random moments, flipped bytes. Prints a table; ends with status 1 if one was silent.

    python benchmarks/faults_tokenize.py kills --count 100 --workers 0
    python benchmarks/faults_tokenize.py flips --count 200

A kill ends the tokenization of some pictures, by SIGKILL or SIGTERM, to the process alone or to its whole group, at a
random moment of its work; it is started again until it is through. Its folder is then compared with that of an
undisturbed run, byte for byte. A flip changes one random byte of a file and reads everything; it must be noticed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tessella.autoencoders import Conv
from tessella.data.base import DataError
from tessella.data.token_shards import TokenShards
from tessella.data.tokens import read_tokens
from tessella.quantizers import FSQ
from tessella.tokenization.engine import tokenize_dataset
from tessella.tokenizer import Tokenizer

SHARD_ROWS = 64


def prepare(work: Path, pictures: int) -> None:
    torch.manual_seed(0)
    autoencoder = Conv(channels=8, multipliers=(1,), num_res_blocks=1, num_decoder_res_blocks=1, mid_attention=False,
                       latent_dim=8, patch_px=4)  # fmt: skip
    Tokenizer(autoencoder, FSQ([5, 5, 5])).save(work / "tokenizer")
    rng = np.random.default_rng(0)
    (work / "pictures").mkdir()
    for number in range(pictures):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(work / f"pictures/{number:04d}.png")


def tokenize(work: Path, out: str, workers: int) -> None:
    torch.set_num_threads(1)
    data = {"name": "folder", "path": str(work / "pictures"), "crop_px": 16}
    tokenize_dataset(work / "tokenizer", data, work / out, shard_rows=SHARD_ROWS, batch_size=4, workers=workers,
                     device="cpu")  # fmt: skip


def in_a_group(work: Path, workers: int) -> None:
    os.setsid()
    tokenize(work, "out", workers)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def state(folder: Path) -> str:
    """What a killed run left."""
    if (folder / "tokens.json").exists():
        return "finished"
    if not (folder / ".unfinished/plan.json").exists():
        return "before the plan"
    return "no shard yet" if not list(folder.glob("tokens-*.parquet")) else "some shards"


def kills(work: Path, args: argparse.Namespace) -> int:
    prepare(work, args.pictures)
    started = time.monotonic()
    tokenize(work, "whole", args.workers)
    longest = time.monotonic() - started
    whole, rng = content(work / "whole"), np.random.default_rng(args.seed)
    kinds = [(number, group) for number in (signal.SIGKILL, signal.SIGTERM) for group in (False, True)]
    table: Counter[tuple[str, str]] = Counter()
    wrong = killed = 0
    while killed < args.count:
        shutil.rmtree(work / "out", ignore_errors=True)
        while not (work / "out/tokens.json").exists():
            child = multiprocessing.get_context("fork").Process(target=in_a_group, args=(work, args.workers))
            child.start()
            while child.is_alive() and os.getpgid(child.pid or 0) != child.pid:
                time.sleep(0.001)  # its group is not made yet
            child.join(float(rng.uniform(0, longest)) if killed < args.count else None)
            if child.is_alive():
                number, group = kinds[killed % len(kinds)]
                (os.killpg if group else os.kill)(child.pid or 0, number)
                child.join()
                table[f"{number.name}{' group' if group else ''}", state(work / "out")] += 1
                killed += 1
        tokenize(work, "out", args.workers)
        wrong += content(work / "out") != whole
    print(f"{killed} kills, {args.pictures} pictures, workers={args.workers}, seed {args.seed}: {wrong} folders differ")
    for (kind, left), number_of in sorted(table.items()):
        print(f"  {kind:<14} {left:<16} {number_of:4d}")
    return wrong


def flips(work: Path, args: argparse.Namespace) -> int:
    prepare(work, args.pictures)
    tokenize(work, "out", 0)
    out, rng = work / "out", np.random.default_rng(args.seed)

    def read() -> list[tuple[str, list[int]]]:
        return [(row.key, row.indices.flatten().tolist()) for row in read_tokens(out)]

    def opened() -> list[tuple[str, list[int]]]:
        data = TokenShards(split="train", path=str(out))
        return [(data[index]["key"], data[index]["x"].flatten().tolist()) for index in range(len(data))]

    right = opened()
    caches = sorted((out / ".arrays").glob("*/*"))
    kinds: list[tuple[str, list[Path], Callable[[], Any]]] = [
        ("shards", sorted(out.glob("*.parquet")), read),
        ("manifest", [out / "tokens.json"], read),
        ("caches", caches, opened),
    ]
    silent = 0
    for kind, files, attempt in kinds:
        counts: Counter[str] = Counter()
        for turn in range(args.count):
            file = files[turn % len(files)]
            whole = file.read_bytes()
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
            file.write_bytes(damaged)
            try:
                found = attempt()
            except DataError:
                counts["refused"] += 1
                file.write_bytes(whole)
            else:
                made_anew = kind == "caches" and file.read_bytes() == whole
                counts["made anew" if made_anew and found == right else "silent"] += 1
        silent += counts["silent"]
        print(f"{kind:<10} {args.count} flips: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return silent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kills", "flips"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        wrong = {"kills": kills, "flips": flips}[args.part](Path(folder), args)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
