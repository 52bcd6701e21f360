"""The collapse study: one autoencoder with every quantizer at growing codebook sizes, and what comes of the claims.

A cell is one (quantizer, size, seed): train, evaluate, write ``result.json``. A cell that has its result is not run
again, and an interrupted cell goes on from its checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

import torch

from tessella.checkpoint import load
from tessella.commands._data import data_section
from tessella.commands.train import train
from tessella.config import build_section, resolve_recipe
from tessella.data.loader import evaluation_batches
from tessella.errors import ConfigError
from tessella.evaluation.codebook import CodeCounter
from tessella.evaluation.image import lpips_scores, picture_scores
from tessella.losses.perceptual import LPIPS
from tessella.processes import end_with_parent
from tessella.recipe import to_toml
from tessella.registry import Spec
from tessella.reporting.study import plot_study
from tessella.storage import write_text

logger = logging.getLogger("tessella")

# FSQ levels per power of two, Table 1 of arXiv 2309.15505 and its appendix.
FSQ_LEVELS = {
    4: [5, 3], 6: [8, 8], 8: [8, 6, 5], 9: [8, 8, 8], 10: [8, 5, 5, 5], 11: [8, 8, 6, 5], 12: [7, 5, 5, 5, 5],
    14: [8, 8, 8, 6, 5], 16: [8, 8, 8, 5, 5, 5],
}  # fmt: skip

DIM = 16

_MAX_COUNTS = 4096  # bars of a code-usage histogram that are kept

# Every method of the study: the quantizer section for 2^bits codes, and the largest number of bits it is run with.
METHODS: dict[str, tuple[Callable[[int], Spec], int]] = {
    "VQ": (lambda bits: {"name": "vq", "codebook_size": 2**bits, "dim": DIM}, 16),
    "VQ k-means": (
        lambda bits: {"name": "vq", "codebook_size": 2**bits, "dim": DIM, "codebook_init": "kmeans"}, 10
    ),
    "EMA": (lambda bits: {"name": "ema", "codebook_size": 2**bits, "dim": DIM}, 16),
    "EMA split": (
        lambda bits: {"name": "ema", "codebook_size": 2**bits, "dim": DIM, "dead_codes": "split"}, 16
    ),
    "Gumbel": (lambda bits: {"name": "gumbel", "codebook_size": 2**bits, "dim": DIM}, 12),
    "LFQ": (lambda bits: {"name": "lfq", "dim": bits}, 16),
    "FSQ": (lambda bits: {"name": "fsq", "levels": FSQ_LEVELS[bits]}, 16),
    "IBQ": (lambda bits: {"name": "ibq", "codebook_size": 2**bits, "dim": DIM}, 16),
    "SimVQ": (lambda bits: {"name": "simvq", "codebook_size": 2**bits, "dim": DIM}, 16),
    "SCQ exact": (lambda bits: {"name": "scq", "codebook_size": 2**bits, "dim": DIM, "solver": "exact"}, 8),
    "SCQ refined": (lambda bits: {"name": "scq", "codebook_size": 2**bits, "dim": DIM}, 10),
    "SCQ relaxed": (
        lambda bits: {"name": "scq", "codebook_size": 2**bits, "dim": DIM, "solver": "relaxed", "loss": "none"}, 12
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training run of the study."""

    method: str
    bits: int
    seed: int

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.method.replace(' ', '-')}-{self.bits}-{self.seed}"


def cells(methods: Sequence[str], bits: Sequence[int], seeds: int) -> list[Cell]:
    """The grid, cheap sizes first; methods whose cost grows too fast stop at their own largest size.

    Raises:
        ConfigError: an unknown method, or a size that FSQ has no published levels for.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}; choose from: {', '.join(METHODS)}")
    for size in bits:
        if size not in FSQ_LEVELS:
            raise ConfigError(f"no size 2^{size}; choose from: {', '.join(map(str, FSQ_LEVELS))}")
    return [
        Cell(method, size, seed)
        for size in sorted(bits)
        for seed in range(seeds)
        for method in methods
        if size <= METHODS[method][1]
    ]


def recipe_of(cell: Cell, data: Spec, steps: int) -> Spec:
    """The recipe of a cell; only the quantizer differs between methods."""
    return {
        "data": data,
        "autoencoder": {
            "name": "conv", "channels": 48, "multipliers": [1], "num_res_blocks": 1, "num_decoder_res_blocks": 2,
            "mid_attention": False, "latent_dim": 48, "patch_px": 4,
        },
        "quantizer": METHODS[cell.method][0](cell.bits),
        "training": {
            "steps": steps, "batch_size": 32, "lr": 2e-3, "warmup_steps": 50, "seed": cell.seed, "num_workers": 0,
            "log_every": 50, "sample_every": steps, "checkpoint_every": 200, "keep_checkpoints": 1,
        },
    }  # fmt: skip


def collapse(
    out: Path,
    *,
    data: str,
    methods: Sequence[str] = tuple(METHODS),
    bits: Sequence[int] = (6, 8, 10, 12, 14, 16),
    seeds: int = 1,
    steps: int = 400,
    pictures: int = 2000,
    jobs: int | None = None,
    weights: Path | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing of the grid, then write ``table.md``, ``results.json`` and the plots into ``out``.

    Args:
        out: folder of the study.
        data: as for :func:`tessella.pipeline.data_section`.
        methods: names from :data:`METHODS`.
        bits: log2 of the codebook sizes.
        seeds: runs per method and size.
        steps: optimizer steps of 32 pictures each.
        pictures: held-out pictures measured.
        jobs: cells at a time, each on one core; all cores if None.
        weights: folder with LPIPS weights; LPIPS (AlexNet) is left out without it.

    Returns:
        One row per cell.

    Raises:
        ConfigError: an unknown method or size, or a folder that holds a study with other settings.
    """
    grid = cells(methods, bits, seeds)
    section = data_section({"crop_px": 32, "flip": True}, data)
    settings = {"data": section, "steps": steps, "pictures": pictures, "lpips": weights is not None}
    _claim(out, settings)
    jobs = jobs or os.cpu_count() or 1
    missing = [cell for cell in grid if not (out / "cells" / cell.name / "result.json").is_file()]
    _run_all(missing, out, settings, weights, jobs)
    rows = [json.loads((out / "cells" / cell.name / "result.json").read_text(encoding="utf-8")) for cell in grid]
    write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
    write_text(out / "table.md", markdown(rows, settings))
    plot_study(rows, out)
    return rows


def _claim(out: Path, settings: dict[str, Any]) -> None:
    file = out / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != settings:
            raise ConfigError(f"{out} holds a study with other settings: {before}; choose another --out")
    else:
        write_text(file, json.dumps(settings, indent=1) + "\n")


def _run_all(missing: list[Cell], out: Path, settings: dict[str, Any], weights: Path | None, jobs: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("cells"), MofNCompleteColumn(), BarColumn(), TextColumn("left"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("cells", total=len(missing))
        context = multiprocessing.get_context("spawn")
        with (
            _terminable(),
            ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_worker, initargs=(os.getpid(),)) as pool,
        ):
            futures = {pool.submit(run_cell, cell, out, settings, weights): cell for cell in missing}
            try:
                for future in as_completed(futures):
                    row = future.result()
                    progress.advance(task)
                    console.print(
                        f"{row['method']:12s} 2^{row['bits']:<2d} seed {row['seed']}  {row['psnr']:.2f} dB  "
                        f"usage {100 * row['usage']:.1f} %", highlight=False,
                    )  # fmt: skip
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()  # a cell in training writes its checkpoint first
                raise


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that the processes at work end too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _prepare_worker(parent: int) -> None:
    end_with_parent(parent)
    torch.set_num_threads(1)
    logging.getLogger("tessella").setLevel(logging.WARNING)


def run_cell(cell: Cell, out: Path, settings: dict[str, Any], weights: Path | None) -> dict[str, Any]:
    """Train and measure one cell; writes and returns its row."""
    folder = out / "cells" / cell.name
    recipe = folder / "cell.toml"
    write_text(recipe, to_toml(resolve_recipe(recipe_of(cell, settings["data"], settings["steps"]))))
    run = train(str(recipe), out=folder / "run", device="cpu", quiet=True)
    row = {**asdict(cell), **measure(run, settings["pictures"], weights)}
    write_text(folder / "result.json", json.dumps(row, indent=1) + "\n")
    shutil.rmtree(run)
    return row


@torch.no_grad()
def measure(run: Path, pictures: int, weights: Path | None) -> dict[str, Any]:
    """Numbers of a trained tokenizer on held-out pictures.

    ``mse`` and ``psnr`` (of [0, 1]) are those of what the quantizer passes on, soft where it is soft; ``hard_psnr``
    that of pictures decoded from the indices alone. ``quantizer_ms`` is one forward pass over a batch's tokens.
    """
    tokenizer = load(run)
    quantizer = tokenizer.quantizer
    dataset = build_section(tokenizer.recipe or {}, "data", split="test")
    metrics = {} if weights is None else {"alexnet": LPIPS.from_folder("alexnet", weights)}
    codes = CodeCounter(quantizer.codebook_size, quantizer.num_codebooks)
    sums: dict[str, list[float]] = {}
    timings = []
    for batch in evaluation_batches(dataset, batch_size=50, limit=pictures):
        x = batch["x"]
        z = tokenizer.to_code(tokenizer.autoencoder.encode(x))
        start = time.perf_counter()
        out = quantizer(z)
        timings.append(time.perf_counter() - start)
        codes.update(out.indices)
        soft = tokenizer.autoencoder.decode(tokenizer.from_code(out.z_q))
        scores = picture_scores(x, soft) | lpips_scores(x, soft, metrics)
        scores["hard_psnr"] = picture_scores(x, tokenizer.decode(out.indices))["psnr"]
        scores["quantization_error"] = (z - out.z_q).square().mean((1, 2, 3))
        scores["latent_variance"] = z.var(dim=(0, 1, 2), unbiased=False).mean().expand(len(x))
        if "support_size" in out.metrics:
            scores["support_size"] = out.metrics["support_size"].expand(len(x))
        for name, values in scores.items():
            sums.setdefault(name, []).extend(values.tolist())
    row: dict[str, Any] = {("mse" if name == "l2" else name.replace(" ", "_")): mean(v) for name, v in sums.items()}
    row |= {
        "codebook_size": quantizer.codebook_size,
        "soft": quantizer.is_soft,
        "usage": codes.usage,
        "perplexity": codes.perplexity,
        "num_tokens": codes.num_positions,
        "bits_per_token": math.log2(quantizer.codebook_size),
        "quantizer_ms": 1000 * sorted(timings)[len(timings) // 2],
        "counts": sorted(codes.histogram()[1].tolist(), reverse=True)[:_MAX_COUNTS],
    }
    return row


# --- what comes of it -------------------------------------------------------------------------------------------------

_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "MSE (1e-3)": lambda row: f"{1000 * row['mse']:.2f}",
    "PSNR dB": lambda row: f"{row['psnr']:.2f}",
    "from indices dB": lambda row: f"{row['hard_psnr']:.2f}",
    "LPIPS": lambda row: f"{row['lpips_alexnet']:.4f}" if "lpips_alexnet" in row else "-",
    "usage %": lambda row: f"{100 * row['usage']:.1f}",
    "perplexity": lambda row: f"{row['perplexity']:.0f}",
    "quant. error / variance": lambda row: f"{row['quantization_error'] / row['latent_variance']:.3g}",
    "support": lambda row: f"{row['support_size']:.1f}" if "support_size" in row else "1",
    "quantizer ms": lambda row: f"{row['quantizer_ms']:.1f}",
}


def averaged(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Means over seeds by (method, bits), in the order of the rows."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["bits"]), []).append(row)
    return {
        key: {
            name: mean(row[name] for row in group) if isinstance(value, (int, float)) else value
            for name, value in group[0].items()
        }
        for key, group in groups.items()
    }


def markdown(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The table and the verdicts."""
    means = averaged(rows)
    order = {method: position for position, method in enumerate(METHODS)}
    lines = [
        f"# Collapse study: {settings['data']['name']}, {settings['steps']} steps of 32 pictures, "
        f"{settings['pictures']} held-out pictures, {len({row['seed'] for row in rows})} seed(s)",
        "",
        f"Usage over {int(rows[0]['num_tokens'])} held-out tokens: uniform use of 2^b codes would show "
        + ", ".join(f"{100 * expected_usage(b, rows[0]['num_tokens']):.0f} % at 2^{b}"
                    for b in sorted({row["bits"] for row in rows})) + ".",
        "",
        "| quantizer | codes | " + " | ".join(_COLUMNS) + " |",
        "|---|---|" + "---|" * len(_COLUMNS),
    ]  # fmt: skip
    for (method, _), row in sorted(means.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        cells_ = " | ".join(show(row) for show in _COLUMNS.values())
        lines.append(f"| {method} | {round(row['codebook_size'])} | {cells_} |")
    lines += ["", "## Claims", ""]
    lines += [f"- **{'holds' if holds else 'does not hold'}**: {claim}. {evidence}" for claim, holds, evidence
              in verdicts(means)]  # fmt: skip
    return "\n".join(lines) + "\n"


def expected_usage(bits: int, num_tokens: float) -> float:
    """Fraction of 2^bits codes that ``num_tokens`` uniform draws hit: 1 - (1 - 2^-bits)^n."""
    return -math.expm1(num_tokens * math.log1p(-(2.0**-bits)))


def verdicts(means: dict[tuple[str, int], dict[str, Any]]) -> list[tuple[str, bool, str]]:
    """(claim, whether it holds, evidence) for every claim that the cells there are can decide."""
    found: list[tuple[str, bool, str]] = []

    def curve(method: str) -> dict[int, dict[str, Any]]:
        return {bits: row for (name, bits), row in sorted(means.items()) if name == method}

    def usage(method: str) -> str:
        return ", ".join(f"{100 * row['usage']:.1f} % at 2^{bits}" for bits, row in curve(method).items())

    vq = curve("VQ")
    if len(vq) > 1:
        least, most = min(vq), max(vq)
        found.append(("VQ's usage falls as the codebook grows", vq[most]["usage"] < vq[least]["usage"] / 2,
                      f"{usage('VQ')}"))  # fmt: skip
    for method in ("FSQ", "SimVQ", "IBQ", "LFQ"):
        rows = curve(method)
        if rows:
            share = {bits: row["usage"] / expected_usage(bits, row["num_tokens"]) for bits, row in rows.items()}
            found.append((f"{method} uses at least 75 % of what uniform use would show, at every size",
                          min(share.values()) >= 0.75, usage(method)))  # fmt: skip
    for method in ("SCQ exact", "SCQ refined", "SCQ relaxed"):
        common = sorted(set(curve(method)) & set(vq))
        if common:
            ratios = {bits: vq[bits]["mse"] / curve(method)[bits]["mse"] for bits in common}
            found.append((
                f"{method} reconstructs with an order of magnitude less MSE than VQ of the same size",
                min(ratios.values()) >= 10,
                "VQ's MSE over its: " + ", ".join(f"{ratio:.1f} at 2^{bits}" for bits, ratio in ratios.items())
                + "; but a token is not one index: support "
                + ", ".join(f"{curve(method)[bits]['support_size']:.1f}" for bits in common)
                + " weights; decoded from indices alone "
                + ", ".join(f"{curve(method)[bits]['hard_psnr']:.1f} dB" for bits in common),
            ))  # fmt: skip
    split = curve("EMA split")
    common = sorted(set(split) & set(vq))
    if common:
        full = all(split[b]["usage"] >= 0.75 * expected_usage(b, split[b]["num_tokens"]) for b in common)
        better = all(split[b]["mse"] < vq[b]["mse"] for b in common)
        gains = ", ".join(f"{vq[b]['mse'] / split[b]['mse']:.1f} at 2^{b}" for b in common)
        found.append((
            "EMA with splitting repairs VQ: less MSE and at least 75 % of uniform usage, at every size",
            full and better,
            f"{usage('EMA split')}; VQ's MSE over its: {gains}",
        ))  # fmt: skip
    return found
