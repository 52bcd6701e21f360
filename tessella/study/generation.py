"""Next-token against coarse-to-fine generation (CTF, arXiv 2503.16194) over the tokens of one tokenizer.

Beside the generators stand training pictures and their reconstructions, held against the same test pictures: what a
perfect generator would score, and what one would that is perfect but for the tokenizer.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from tessella.checkpoint import load, load_generator
from tessella.commands.evaluate import evaluate
from tessella.commands.train import train
from tessella.config import build_section
from tessella.data.base import Batch
from tessella.data.loader import evaluation_batches
from tessella.evaluation.distribution import (
    DistributionRecord,
    DistributionSettings,
    Metric,
    evaluate_distribution,
)
from tessella.evaluation.features import pictures_of
from tessella.generators.coarse_to_fine import CoarseToFine
from tessella.media.image import Image
from tessella.recipe import to_toml
from tessella.registry import Spec
from tessella.storage import write_text
from tessella.study.cells import Cell, Row
from tessella.study.collapse import MODEL
from tessella.study.verdicts import Case, Measured, Verdict, above, by_seed, judge
from tessella.tokenizer import Tokenizer
from tessella.training.generator import GeneratorStep
from tessella.training.logs import LOG, read_log

PROTOCOL = "efflite0"
BATCH = 8  # pictures a step
NUM_CLUSTERS = 512

_NETWORK = {"dim": 128, "num_heads": 4, "dropout": 0.0}


def _coarse_to_fine(num_layers: int, num_clusters: int) -> Spec:
    coarse = {"name": "ar", **_NETWORK, "num_layers": num_layers, "token_dropout": 0.0}
    return {
        "name": "coarse_to_fine", "num_clusters": num_clusters, "normalize": False, "coarse": coarse,
        "fine": {**_NETWORK, "num_layers": num_layers},
    }  # fmt: skip


def methods(num_clusters: int) -> dict[str, Spec]:
    """The generators compared: each stage of the last is as large as the next-token model, as in the paper."""
    return {
        "next token": {"name": "ar", **_NETWORK, "num_layers": 4, "token_dropout": 0.0},
        "coarse to fine, half each": _coarse_to_fine(2, num_clusters),
        "coarse to fine, each as large": _coarse_to_fine(4, num_clusters),
    }


def cells(
    tokenizer: Cell, *, seeds: int, steps: int, samples: int, weights: Path, num_clusters: int = NUM_CLUSTERS
) -> list[Cell]:
    """The references, then every generator with every seed, over the tokenizer that a cell has trained.

    Args:
        tokenizer: a cell of :mod:`tessella.study.collapse`.
        seeds: runs of each generator.
        steps: optimizer steps of :data:`BATCH` pictures.
        samples: judged of each, and as many test pictures.
        weights: folder with those of EfficientNet-Lite0.
        num_clusters: of the codes.
    """
    data = tokenizer.settings["recipe"]["data"]
    common = {"tokenizer": tokenizer.name, "weights": str(weights), "samples": samples}
    found = [Cell("generation-references", {"seed": 0}, measure_references, {**common, "data": data})]
    for seed in range(seeds):
        for method, generator in methods(num_clusters).items():
            recipe = {
                "data": data,
                "generator": {"conditioner": {"name": "label"}, **generator},
                "training": {
                    "steps": steps, "batch_size": BATCH, "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.05,
                    "warmup_steps": 50, "seed": seed, "num_workers": 0, "log_every": 20, "sample_every": steps,
                    "checkpoint_every": 200, "keep_checkpoints": 1, "precision": "fp32",
                },
            }  # fmt: skip
            name = f"generation-{method.replace(',', '').replace(' ', '-')}-{seed}"
            labels = {"method": method, "seed": seed}
            found.append(Cell(name, labels, train_and_sample, {**common, "recipe": recipe}))
    return found


def train_and_sample(folder: Path, settings: dict[str, Any]) -> Row:
    """The work of a generator's cell: train it, judge its samples, and count its bits a token of test pictures."""
    recipe = folder / "cell.toml"
    write_text(recipe, to_toml(settings["recipe"]))
    model = folder.parent / settings["tokenizer"] / MODEL
    run = train(str(recipe), tokenizer=model, out=folder / "run", device="cpu", quiet=True)
    trained_s = read_log(run / LOG)[-1]["seconds"]
    started = time.monotonic()
    found = evaluate(
        run, weights=Path(settings["weights"]), samples=settings["samples"], limit=settings["samples"], out=folder,
        device="cpu",
    )  # fmt: skip
    assert found.distribution is not None
    assert found.rates is not None
    generator, tokenizer = load_generator(run)
    row = {
        **_values(found.distribution), "bits": found.rates.bits_per_token,
        "samples_per_second": found.rates.samples_per_second,
        "num_parameters": sum(parameter.numel() for parameter in generator.parameters()),
    }  # fmt: skip
    if isinstance(generator, CoarseToFine):
        batches = evaluation_batches(
            build_section(settings["recipe"], "data", split="test"), batch_size=50, limit=settings["samples"]
        )
        coarse = coarse_bits(generator, tokenizer, batches)
        row |= {"coarse_bits": coarse, "fine_bits": row["bits"] - coarse}  # of a code within its cluster
    shutil.rmtree(run)
    return {**row, "train_seconds": trained_s, "seconds": trained_s + time.monotonic() - started}


@torch.no_grad()
def coarse_bits(generator: CoarseToFine, tokenizer: Tokenizer, batches: Iterable[Batch]) -> float:
    """Bits a token that the coarse labels take of all that the tokens take."""
    step = GeneratorStep(generator, tokenizer).eval()
    total, count = 0.0, 0
    for batch in batches:
        indices, condition = step.tokens_and_condition(batch)
        total += generator.coarse.bits(generator.coarse_indices(indices), condition).sum().item()
        count += indices.numel()
    return total / count


@torch.no_grad()
def measure_references(folder: Path, settings: dict[str, Any]) -> Row:
    """The work of the references' cell: ``real`` and ``reconstructions``, each with its values."""
    started = time.monotonic()
    tokenizer = load(folder.parent / settings["tokenizer"] / MODEL)
    network = Image().feature_network(PROTOCOL, Path(settings["weights"]), torch.device("cpu"))
    count = settings["samples"]

    def pictures(split: str) -> Iterable[Tensor]:
        dataset = build_section({"data": settings["data"]}, "data", split=split)
        return pictures_of(evaluation_batches(dataset, batch_size=50, limit=count), count)

    test = network.extract(pictures("test"))
    everything = DistributionSettings(metrics=get_args(Metric))
    rebuilt = (tokenizer.decode(tokenizer.encode(x)) for x in pictures("train"))
    return {
        "real": _values(evaluate_distribution(pictures("train"), test, network, settings=everything)),
        "reconstructions": _values(evaluate_distribution(rebuilt, test, network, settings=everything)),
        "seconds": time.monotonic() - started,
    }


def _values(record: DistributionRecord) -> dict[str, float]:
    return {name: estimate.value for name, estimate in record.values.items()}


def table(rows: Sequence[Row]) -> str:
    """Markdown: the references, then one row a generator."""
    references = [row for row in rows if "real" in row]
    generators = [row for row in rows if "method" in row]
    names = list((references[0]["real"] if references else generators[0]).keys())
    if generators:
        names = [name for name in names if name in generators[0]]
    columns = {**dict.fromkeys(names, 3), "bits": 3, "coarse_bits": 3, "fine_bits": 3, "samples_per_second": 1}
    lines = [
        "| | seeds | parameters | " + " | ".join(name.replace("_", " ") for name in columns) + " | s a cell |",
        "|---|---|---|" + "---|" * (len(columns) + 1),
    ]
    for row in references:
        for name in ("real", "reconstructions"):
            shown = [f"{row[name][key]:.{digits}f}" if key in row[name] else "-" for key, digits in columns.items()]
            lines.append(f"| {name} | | | " + " | ".join(shown) + f" | {row['seconds']:.0f} |")
    for method in dict.fromkeys(row["method"] for row in generators):
        group = [row for row in generators if row["method"] == method]
        shown = [
            Measured.of([row[key] for row in group]).show(digits) if key in group[0] else "-"
            for key, digits in columns.items()
        ]
        seconds = Measured.of([row["seconds"] for row in group]).mean
        lines.append(f"| {method} | {len(group)} | {group[0]['num_parameters']:,} | " + " | ".join(shown)
                     + f" | {seconds:.0f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Whether coarse to fine spends fewer bits, and whether its samples are nearer to real pictures."""
    needs = "three seeds, and training until the curves are flat: hours of a GPU at these sizes, days at the paper's"
    generators = [row for row in rows if "method" in row]
    found = []
    for key, words in (("bits", "spends fewer bits a token"), ("FD-EffLite0", "draws pictures nearer to real ones")):
        cases = []
        for method in dict.fromkeys(row["method"] for row in generators if row["method"].startswith("coarse")):
            mine, base = (Measured.of(by_seed(generators, key, method=name)) for name in (method, "next token"))
            cases.append(Case(method, above(base, mine), f"{key} {mine.show(2)} against {base.show(2)}"))
        found.append(judge(f"Coarse-to-fine generation {words} than next-token generation", cases, needs))
    return found
