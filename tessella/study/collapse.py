"""The collapse study: one autoencoder with every quantizer at growing codebook sizes, and what comes of the claims.

A cell is one (quantizer, size, seed).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from tessella.checkpoint import load
from tessella.commands._data import data_section
from tessella.commands.train import train
from tessella.config import build_section, resolve_recipe
from tessella.data.base import Batch
from tessella.data.loader import evaluation_batches
from tessella.errors import ConfigError
from tessella.evaluation.codebook import CodeCounter
from tessella.evaluation.image import lpips_scores, picture_scores
from tessella.losses.perceptual import LPIPS
from tessella.recipe import to_toml
from tessella.registry import Spec
from tessella.storage import write_text
from tessella.study.cells import Cell, Row, run_cells
from tessella.study.usage import scq_verdicts, table, usage_plots, usage_verdicts
from tessella.tokenizer import Tokenizer
from tessella.training.logs import LOG, read_log

# FSQ levels per power of two, Table 1 of arXiv 2309.15505 and its appendix.
FSQ_LEVELS = {
    4: [5, 3], 6: [8, 8], 8: [8, 6, 5], 9: [8, 8, 8], 10: [8, 5, 5, 5], 11: [8, 8, 6, 5], 12: [7, 5, 5, 5, 5],
    14: [8, 8, 8, 6, 5], 16: [8, 8, 8, 5, 5, 5],
}  # fmt: skip

DIM = 16

_MAX_COUNTS = 4096  # bars of a code-usage histogram that are kept

DATA: Spec = {"crop_px": 32, "flip": True}
BATCH = 8  # pictures a step
WEIGHT_BITS = 8  # of one weight of a soft code, beside its index
LATENT_STD = 0.25  # of the untrained encoder's latents: 0.22 over seeds 0 to 2
MODEL = "model"

_POINTS = 10  # of a learning curve
_CURVE_BATCHES = 10  # of 50 pictures each


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
    "BSQ": (lambda bits: {"name": "bsq", "dim": bits}, 16),
    "IBQ": (lambda bits: {"name": "ibq", "codebook_size": 2**bits, "dim": DIM}, 16),
    "IBQ scaled": (
        lambda bits: {"name": "ibq", "codebook_size": 2**bits, "dim": DIM, "codebook_std": LATENT_STD}, 16
    ),
    "SimVQ": (lambda bits: {"name": "simvq", "codebook_size": 2**bits, "dim": DIM}, 16),
    "SCQ exact": (lambda bits: {"name": "scq", "codebook_size": 2**bits, "dim": DIM, "solver": "exact"}, 8),
    "SCQ refined": (lambda bits: {"name": "scq", "codebook_size": 2**bits, "dim": DIM}, 10),
    "SCQ relaxed": (
        lambda bits: {"name": "scq", "codebook_size": 2**bits, "dim": DIM, "solver": "relaxed", "loss": "none"}, 12
    ),
}  # fmt: skip


def cells(
    methods: Sequence[str], bits: Sequence[int], seeds: int, *, data: Spec, steps: int, pictures: int,
    weights: Path | None = None,
) -> list[Cell]:  # fmt: skip
    """The grid, cheap sizes first; methods whose cost grows too fast stop at their own largest size.

    Args:
        methods: names from :data:`METHODS`.
        bits: log2 of the codebook sizes.
        seeds: runs per method and size.
        data: the section of the pictures.
        steps: optimizer steps of :data:`BATCH` pictures each.
        pictures: held-out pictures measured.
        weights: folder with LPIPS weights; LPIPS (AlexNet) is left out without it.

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
        Cell(
            f"{method.replace(' ', '-')}-{size}-{seed}",
            {"method": method, "bits": size, "seed": seed},
            train_and_measure,
            {
                "recipe": recipe_of(method, size, seed, data=data, steps=steps),
                "pictures": pictures,
                "weights": None if weights is None else str(weights),
            },
        )
        for size in sorted(bits)
        for seed in range(seeds)
        for method in methods
        if size <= METHODS[method][1]
    ]


def recipe_of(method: str, bits: int, seed: int, *, data: Spec, steps: int) -> Spec:
    """The recipe of a cell; only the quantizer differs between methods."""
    return {
        "data": data,
        "autoencoder": {
            "name": "conv", "channels": 32, "multipliers": [1], "num_res_blocks": 1, "num_decoder_res_blocks": 1,
            "mid_attention": False, "latent_dim": 32, "patch_px": 4,
        },
        "quantizer": METHODS[method][0](bits),
        "training": {
            "steps": steps, "batch_size": BATCH, "lr": 1e-3, "warmup_steps": 50, "seed": seed, "num_workers": 0,
            "log_every": 50, "sample_every": steps, "checkpoint_every": max(1, steps // _POINTS),
            "keep_checkpoints": _POINTS + 1,
        },
    }  # fmt: skip


def train_and_measure(folder: Path, settings: dict[str, Any]) -> Row:
    """The work of a cell: train, measure on the way and at the end, keep the tokenizer in ``folder/model``."""
    recipe = folder / "cell.toml"
    write_text(recipe, to_toml(resolve_recipe(settings["recipe"])))
    run = train(str(recipe), out=folder / "run", device="cpu", quiet=True)
    trained_s = read_log(run / LOG)[-1]["seconds"]
    started = time.monotonic()
    batches = list(evaluation_batches(
        build_section(settings["recipe"], "data", split="test"), batch_size=50, limit=settings["pictures"]
    ))  # fmt: skip
    curve = [learning_point(checkpoint, batches) for checkpoint in sorted((run / "checkpoints").glob("step-*"))]
    tokenizer = load(run)
    row = {**measure(tokenizer, batches, settings["weights"]), "curve": curve}
    tokenizer.save(folder / MODEL)
    shutil.rmtree(run)
    return {**row, "train_seconds": trained_s, "seconds": trained_s + time.monotonic() - started}


@torch.no_grad()
def learning_point(checkpoint: Path, batches: Sequence[Batch]) -> dict[str, float]:
    """``step``, and PSNR in dB and usage on the first held-out pictures, of a checkpoint."""
    tokenizer = load(checkpoint)
    codes = CodeCounter(tokenizer.quantizer.codebook_size, tokenizer.quantizer.num_codebooks)
    errors: list[float] = []
    for batch in batches[:_CURVE_BATCHES]:
        out = tokenizer(batch["x"])
        codes.update(out.quantized.indices)
        errors += picture_scores(batch["x"], out.x_hat)["psnr"].tolist()
    return {"step": int(checkpoint.name.removeprefix("step-")), "psnr": mean(errors), "usage": codes.usage}


@torch.no_grad()
def measure(tokenizer: Tokenizer, batches: Sequence[Batch], weights: str | None) -> Row:
    """Numbers of a trained tokenizer on held-out pictures.

    ``mse`` and ``psnr`` (of [0, 1]) are those of what the quantizer passes on, soft where it is soft; ``hard_psnr``
    that of pictures decoded from the indices alone. ``bits_per_token`` is the rate of what is passed on: a soft code
    costs each of its weights an index and :data:`WEIGHT_BITS`. ``quantizer_ms`` is one forward pass over a batch's
    tokens.
    """
    quantizer = tokenizer.quantizer
    metrics = {} if weights is None else {"alexnet": LPIPS.from_folder("alexnet", Path(weights))}
    codes = CodeCounter(quantizer.codebook_size, quantizer.num_codebooks)
    sums: dict[str, list[float]] = {}
    timings = []
    for batch in batches:
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
    row: Row = {("mse" if name == "l2" else name.replace(" ", "_")): mean(v) for name, v in sums.items()}
    index_bits = math.log2(quantizer.codebook_size)
    soft_bits = row.get("support_size", 0.0) * (index_bits + WEIGHT_BITS)
    row |= {
        "codebook_size": quantizer.codebook_size,
        "soft": quantizer.is_soft,
        "usage": codes.usage,
        "perplexity": codes.perplexity,
        "num_tokens": codes.num_positions,
        "bits_per_token": soft_bits or quantizer.num_codebooks * index_bits,
        "quantizer_ms": 1000 * sorted(timings)[len(timings) // 2],
        "counts": sorted(codes.histogram()[1].tolist(), reverse=True)[:_MAX_COUNTS],
    }
    return row


def collapse(
    out: Path,
    *,
    data: str,
    methods: Sequence[str] = tuple(METHODS),
    bits: Sequence[int] = (6, 8, 10, 12, 14, 16),
    seeds: int = 1,
    steps: int = 1500,
    pictures: int = 1000,
    jobs: int | None = None,
    weights: Path | None = None,
) -> list[Row]:
    """Run what is missing of the grid, then write ``table.md``, ``results.json`` and the plots into ``out``.

    Args:
        out: folder of the study.
        data: as for :func:`tessella.commands._data.data_section`.
        methods, bits, seeds, steps, pictures, weights: see :func:`cells`.
        jobs: cells at a time, each on one core; all cores if None.

    Returns:
        One row per cell.

    Raises:
        ConfigError: an unknown method or size, or a folder that holds a study with other settings.
    """
    section = data_section(DATA, data)
    grid = cells(methods, bits, seeds, data=section, steps=steps, pictures=pictures, weights=weights)
    rows = run_cells(grid, out, jobs=jobs)
    title = f"# Collapse study: {section['name']}, {steps} steps of {BATCH} pictures, {pictures} held-out pictures"
    verdicts = [verdict.line() for verdict in (*usage_verdicts(rows), *scq_verdicts(rows))]
    parts = [title, table(rows, list(METHODS)), "## Claims", "\n".join(verdicts)]
    write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
    write_text(out / "table.md", "\n\n".join(parts) + "\n")
    usage_plots(rows, out, "collapse")
    return rows
