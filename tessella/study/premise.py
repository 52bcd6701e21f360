"""The premise of coarse-to-fine generation (CTF, arXiv 2503.16194): codes near each other are interchangeable.

Every token of held-out pictures is replaced by another code: a random member of its cluster, a random member of the
cluster whose centre is nearest to its own, or a random code; and what that costs in PSNR and LPIPS is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tessella.checkpoint import load
from tessella.config import build_section
from tessella.data.loader import evaluation_batches
from tessella.evaluation.image import lpips_scores, picture_scores
from tessella.losses.perceptual import LPIPS
from tessella.ops import kmeans, nearest
from tessella.reporting.study import Points
from tessella.study.cells import Cell, Row
from tessella.study.collapse import MODEL
from tessella.study.verdicts import Case, Measured, Verdict, above, by_seed, judge

CODES_PER_CLUSTER = 32  # 16,384 codes in 512 clusters, as in the paper
SWAPS = ("none", "cluster", "neighbour", "random")
LITTLE_DB = 1.0

_ITERATIONS = 30


def cell(tokenizer: Cell, *, pictures: int) -> Cell:
    """The swaps over the tokenizer that a cell of :mod:`tessella.study.collapse` has trained."""
    settings = {
        "tokenizer": tokenizer.name, "data": tokenizer.settings["recipe"]["data"],
        "weights": tokenizer.settings["weights"], "pictures": pictures, "seed": tokenizer.labels["seed"],
    }  # fmt: skip
    return Cell(f"premise-{tokenizer.name}", tokenizer.labels, swap_and_measure, settings)


@torch.no_grad()
def swap_and_measure(folder: Path, settings: dict[str, Any]) -> Row:
    """The work of a cell. ``psnr_SWAP`` in dB and ``lpips_SWAP`` of each of :data:`SWAPS`.

    Only codes that occur in the pictures take part: those of a collapsed codebook that nothing is near are no choice.
    """
    started = time.monotonic()
    tokenizer = load(folder.parent / settings["tokenizer"] / MODEL)
    dataset = build_section({"data": settings["data"]}, "data", split="test")
    x = torch.cat([batch["x"] for batch in evaluation_batches(dataset, batch_size=50, limit=settings["pictures"])])
    indices = torch.cat([tokenizer.encode(part) for part in x.split(50)])
    used, place = indices[..., 0].unique(return_inverse=True)
    codes = tokenizer.quantizer.indices_to_codes(used[:, None])
    rng = torch.Generator().manual_seed(settings["seed"])
    num_clusters = max(2, len(used) // CODES_PER_CLUSTER)
    centres = kmeans(codes, num_clusters, num_iterations=_ITERATIONS, rng=rng)
    labels = nearest(codes, centres)
    distances = torch.cdist(centres, centres).fill_diagonal_(torch.inf)
    swapped = {
        "none": place,
        "cluster": other_member(place, labels, labels[place], rng),
        "neighbour": other_member(place, labels, distances.argmin(1)[labels[place]], rng),
        "random": torch.randint(len(used), place.shape, generator=rng),
    }
    metrics = (
        {} if settings["weights"] is None else {"alexnet": LPIPS.from_folder("alexnet", Path(settings["weights"]))}
    )
    row: Row = {"num_codes_used": len(used), "num_clusters": num_clusters}
    for name, chosen in swapped.items():
        scores: dict[str, list[float]] = {}
        for part, tokens in zip(x.split(50), used[chosen][..., None].split(50), strict=True):
            rebuilt = tokenizer.decode(tokens)
            for key, values in (picture_scores(part, rebuilt) | lpips_scores(part, rebuilt, metrics)).items():
                scores.setdefault(key, []).extend(values.tolist())
        row |= {f"{key.split()[0]}_{name}": mean(scores[key]) for key in scores if key.split()[0] in ("psnr", "lpips")}
    return {**row, "cost_db": row["psnr_none"] - row["psnr_cluster"], "seconds": time.monotonic() - started}


def other_member(place: Tensor, labels: Tensor, wanted: Tensor, rng: torch.Generator) -> Tensor:
    """A random code of the cluster ``wanted`` for each token, another than its own where there is one.

    Args:
        place: the tokens' codes, of any shape, in [0, V).
        labels: the codes' clusters ``[V]``.
        wanted: the clusters to draw from, of the shape of ``place``.
        rng: on the CPU.
    """
    order = labels.argsort(stable=True)
    sizes = labels.bincount(minlength=int(wanted.max()) + 1)
    starts = functional.pad(sizes.cumsum(0), (1, 0))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[labels[order]]
    size = sizes[wanted]
    own = labels[place] == wanted
    # Of its own cluster one of the other size - 1 members: a step of 1 to size - 1 round the ring.
    draw = torch.rand(place.shape, generator=rng)
    step = 1 + (draw * (size - 1)).long().clamp(max=(size - 2).clamp(min=0))
    round_the_ring = (rank[place] + step) % size.clamp(min=1)
    anywhere = (draw * size).long().clamp(max=(size - 1).clamp(min=0))
    return order[starts[wanted] + torch.where(own, round_the_ring, anywhere)]


def table(rows: Sequence[Row]) -> str:
    """Markdown of one row a method and size."""
    lines = [
        "| quantizer | codes | seeds | in use | clusters | " + " | ".join(f"PSNR {name}" for name in SWAPS) + " | "
        + " | ".join(f"LPIPS {name}" for name in SWAPS) + " | s a cell |",
        "|---|---|---|---|---|" + "---|" * (2 * len(SWAPS) + 1),
    ]  # fmt: skip
    for method, bits in _keys(rows):

        def shown(key: str, digits: int, method: str = method, bits: int = bits) -> str:
            values = by_seed(rows, key, method=method, bits=bits)
            return Measured.of(values).show(digits) if values else "-"

        numbers = [shown(f"psnr_{name}", 2) for name in SWAPS] + [shown(f"lpips_{name}", 3) for name in SWAPS]
        seeds = len(by_seed(rows, "seed", method=method, bits=bits))
        head = [method, f"2^{bits}", str(seeds), shown("num_codes_used", 0), shown("num_clusters", 0)]
        lines.append("| " + " | ".join([*head, *numbers, shown("seconds", 0)]) + " |")
    return "\n".join(lines) + "\n"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Whether the premise holds, and whether it does so better with more codes."""
    limit = Measured(LITTLE_DB, LITTLE_DB, LITTLE_DB)
    cases, grown = [], []
    for method, bits in _keys(rows):
        cost = _cost(rows, method, bits)
        cases.append(Case(f"{method} 2^{bits}", above(limit, cost), f"{cost.show(2)} dB"))
    for method in dict.fromkeys(method for method, _ in _keys(rows)):
        sizes = [bits for name, bits in _keys(rows) if name == method]
        if len(sizes) > 1:
            small, large = (_cost(rows, method, bits) for bits in (sizes[0], sizes[-1]))
            numbers = f"{small.show(2)} dB at 2^{sizes[0]}, {large.show(2)} dB at 2^{sizes[-1]}"
            grown.append(Case(method, above(small, large), numbers))
    needs = "three tokenizers of each size"
    return [
        judge(f"A random other code of the same cluster costs less than {LITTLE_DB:.0f} dB", cases, needs),
        judge(f"It costs less where there are more codes, {CODES_PER_CLUSTER} to a cluster", grown, needs),
    ]


def points(rows: Sequence[Row]) -> Points:
    """Of the plot: the cost in dB by method and log2 of the size."""
    found: dict[str, dict[float, list[float]]] = {}
    for method, bits in _keys(rows):
        found.setdefault(method, {})[bits] = by_seed(rows, "cost_db", method=method, bits=bits)
    return found


def _cost(rows: Sequence[Row], method: str, bits: int) -> Measured:
    return Measured.of(by_seed(rows, "cost_db", method=method, bits=bits))


def _keys(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return sorted({(row["method"], row["bits"]) for row in rows})
