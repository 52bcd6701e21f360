"""The papers' claims: named experiments, run cell by cell, and the page that says what came of each claim."""

from __future__ import annotations

import itertools
import json
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from tessella.commands._data import data_section
from tessella.errors import ConfigError
from tessella.registry import Spec
from tessella.reporting.study import plot_points
from tessella.storage import write_text
from tessella.study import collapse, generation, premise, usage
from tessella.study.cells import Cell, Row, result_of, run_cells
from tessella.study.outside import OPEN, RULES, YARDSTICKS
from tessella.study.verdicts import FLAT_DB, FLAT_USAGE, Verdict, judge

PAGE = "claims.md"

# (method, bits, seeds): more than one where something is to be decided.
Plan = Sequence[tuple[str, int, int]]

USAGE_PLAN: Plan = (
    ("VQ", 6, 2), ("EMA split", 6, 2),
    ("VQ", 10, 2), ("EMA split", 10, 3), ("FSQ", 10, 2), ("SimVQ", 10, 2), ("IBQ", 10, 2), ("IBQ scaled", 10, 2),
    ("VQ", 14, 3), ("EMA split", 14, 3), ("FSQ", 14, 3), ("SimVQ", 14, 3), ("LFQ", 14, 1),
)  # fmt: skip
SCQ_PLAN: Plan = (
    ("VQ", 6, 2), ("EMA split", 6, 2), ("SCQ refined", 6, 3), ("EMA split", 10, 3), ("EMA split", 14, 3),
)  # fmt: skip
PREMISE_PLAN: Plan = (
    ("EMA split", 10, 3), ("FSQ", 10, 2), ("SimVQ", 10, 2), ("EMA split", 14, 3), ("FSQ", 14, 3), ("SimVQ", 14, 3),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How large the study is: what is trained for how long, and what of it is measured.

    Attributes:
        steps: of a tokenizer.
        pictures: held-out ones that a tokenizer is measured on.
        usage, scq, premise: the tokenizers of these experiments.
        generated_over: method and bits of the tokenizer whose tokens are generated; its seed is 0.
        generator_steps: of a generator.
        generator_seeds: runs of each generator.
        num_clusters: of coarse-to-fine generation.
        samples: judged of each generator.
    """

    steps: int = 1500
    pictures: int = 1000
    usage: Plan = USAGE_PLAN
    scq: Plan = SCQ_PLAN
    premise: Plan = PREMISE_PLAN
    generated_over: tuple[str, int] = ("EMA split", 14)
    generator_steps: int = 800
    generator_seeds: int = 2
    num_clusters: int = generation.NUM_CLUSTERS
    samples: int = 500


@dataclass(frozen=True)
class Setting:
    """What every experiment is built from."""

    data: Spec
    weights: Path | None
    size: Size

    def tokenizers(self, plan: Plan) -> list[Cell]:
        """Cells of a plan, small codebooks and first seeds first."""
        cells = [
            cell
            for method, bits, seeds in plan
            for cell in collapse.cells(
                [method], [bits], seeds, data=self.data, steps=self.size.steps, pictures=self.size.pictures,
                weights=self.weights,
            )
        ]  # fmt: skip
        return sorted(cells, key=lambda cell: (cell.labels["bits"], cell.labels["seed"]))


@dataclass(frozen=True)
class Experiment:
    """A question, the cells that answer it, and how the answer is written.

    Attributes:
        title: heading of its section.
        text: what is asked, and how.
        takes: what running it costs, for pages that are written without it.
        tokenizers: cells that others of its cells read; they run first.
        cells: those whose rows it shows.
        table, verdicts: of the rows.
        plots: write the pictures of the rows into a folder under names that begin with what is given, and say what
            each file shows.
    """

    title: str
    text: str
    takes: str
    cells: Callable[[Setting], list[Cell]]
    table: Callable[[Sequence[Row]], str]
    verdicts: Callable[[Sequence[Row]], list[Verdict]]
    plots: Callable[[Sequence[Row], Path, str], dict[str, str]]
    tokenizers: Callable[[Setting], list[Cell]] = field(default=lambda setting: [])


def _scq_plots(rows: Sequence[Row], out: Path, prefix: str) -> dict[str, str]:
    points: dict[str, dict[float, list[float]]] = {}
    for (method, _), group in usage.groups(rows).items():
        rate = sum(row["bits_per_token"] for row in group) / len(group)
        points.setdefault(method, {})[rate] = [1000 * row["mse"] for row in group]
    plot_points(points, out / f"{prefix}_rate.png", interval=usage.interval, x="bits a token", y="MSE, 1e-3", log=True)
    return {f"{prefix}_rate.png": "Error against rate; a soft code pays for each of its weights"}


def _premise_plots(rows: Sequence[Row], out: Path, prefix: str) -> dict[str, str]:
    plot_points(
        premise.points(rows), out / f"{prefix}_swaps.png", interval=usage.interval, x="log2 of the codebook size",
        y="PSNR lost by a random member of the cluster, dB",
    )  # fmt: skip
    return {f"{prefix}_swaps.png": "What a swap within the cluster costs, 95 % intervals over tokenizers"}


def _generation_cells(setting: Setting) -> list[Cell]:
    if setting.weights is None:
        return []
    size = setting.size
    tokenizer = setting.tokenizers([(*size.generated_over, 1)])[0]
    return generation.cells(
        tokenizer, seeds=size.generator_seeds, steps=size.generator_steps, samples=size.samples,
        weights=setting.weights, num_clusters=size.num_clusters,
    )  # fmt: skip


def _no_plots(rows: Sequence[Row], out: Path, prefix: str) -> dict[str, str]:
    return {}


EXPERIMENTS: Mapping[str, Experiment] = {
    "usage": Experiment(
        title="Codebook usage and collapse (SimVQ, IBQ, FSQ, LFQ)",
        text="One narrow convolutional autoencoder at stride 4 (64 tokens a picture of 32 px; 16 code dimensions, bits "
        "for LFQ and BSQ, levels for FSQ), MSE, the same schedule for all (AdamW, 1e-3, cosine to 0.02 of it), and "
        "only the quantizer differs. Every quantizer has its defaults, save for what its row says: splitting of dead "
        f"codes; codes that start at {collapse.LATENT_STD} of N(0, 1), the untrained latents' scale (IBQ scaled). A "
        f"step sees {64 * collapse.BATCH} tokens, so that is the most codes that one step can touch, whatever the "
        f"method: {100 * usage.expected_usage(14, 64 * collapse.BATCH):.1f} % of 2^14 under uniform use, and a code of "
        "2^14 is met every 32nd step.",
        takes="two hours of an idle core",
        cells=lambda setting: setting.tokenizers(setting.size.usage),
        table=partial(usage.table, methods=list(collapse.METHODS)),
        verdicts=usage.usage_verdicts,
        plots=usage.usage_plots,
    ),
    "scq": Experiment(
        title="Soft convex quantization's order of magnitude (SCQ)",
        text="Against the VQ that the paper compares with (plain, as many codes) and the fair one: moving averages "
        "with splitting, as many codes or at no higher a rate. A soft code costs its support times an index and "
        f"{collapse.WEIGHT_BITS} bits for its weight.",
        takes="half an hour of an idle core beyond those of usage",
        cells=lambda setting: setting.tokenizers(setting.size.scq),
        table=partial(usage.table, methods=list(collapse.METHODS)),
        verdicts=usage.scq_verdicts,
        plots=_scq_plots,
    ),
    "premise": Experiment(
        title="Coarse-to-fine's premise: codes near each other are interchangeable (CTF)",
        text="Each token of held-out pictures is replaced by a random other member of its cluster, by a random member "
        "of the neighbouring cluster, or by a random code; the codes are those that occur in these pictures, and "
        f"clusters hold {premise.CODES_PER_CLUSTER} of them in the mean, as 512 clusters of 16,384 codes do in the "
        "paper. PSNR in dB, LPIPS (AlexNet). The tokenizers are those above.",
        takes="half a minute of an idle core a tokenizer, beyond their training",
        tokenizers=lambda setting: setting.tokenizers(setting.size.premise),
        cells=lambda setting: [
            premise.cell(cell, pictures=min(500, setting.size.pictures))
            for cell in setting.tokenizers(setting.size.premise)
        ],
        table=premise.table,
        verdicts=premise.verdicts,
        plots=_premise_plots,
    ),
    "generation": Experiment(
        title="Coarse-to-fine against next-token generation (CTF)",
        text="Over the 16,384 codes of moving averages with splitting, seed 0. Two stages of half the layers each cost "
        "as many operations a token as the next-token model; two that are each as large are the paper's comparison. "
        "Sampled without guidance at temperature 1 and held against test pictures. KD is unbiased and near 0 for equal "
        "sets. 'Real' are training pictures, 'reconstructions' theirs by the tokenizer: no generator over it can be "
        "expected to do better. Fine bits are those of a code within its true cluster.",
        takes="six generators of five minutes of an idle core each, and hours for each until its curve is flat",
        tokenizers=lambda setting: setting.tokenizers([(*setting.size.generated_over, 1)]),
        cells=_generation_cells,
        table=generation.table,
        verdicts=generation.verdicts,
        plots=_no_plots,
    ),
}  # fmt: skip


def claims(
    out: Path,
    *,
    data: str,
    only: Sequence[str] = tuple(EXPERIMENTS),
    weights: Path | None = None,
    jobs: int | None = None,
    size: Size | None = None,
) -> dict[str, list[Verdict]]:
    """Run what is missing of the experiments, and write table, plots and verdicts of each, and the page of all.

    Into ``out``: ``NAME.md`` and ``claims_NAME_*.png`` of each experiment that has all its cells, ``results.json``, and
    ``claims.md``.

    Args:
        out: folder of the study; the same call continues it.
        data: pictures; see :func:`tessella.commands._data.data_section`.
        only: names from :data:`EXPERIMENTS` to run; of others the page has what an earlier call ran.
        weights: folder with the weights of LPIPS and of EfficientNet-Lite0; without it LPIPS is left out and
            ``generation`` refused.
        jobs: cells at a time, each on one core; all cores if None.
        size: how large the study is.

    Returns:
        The verdicts by experiment.

    Raises:
        ConfigError: an unknown experiment, missing weights, or a folder that holds a study with other settings.
    """
    for name in only:
        if name not in EXPERIMENTS:
            raise ConfigError(f"unknown experiment {name!r}; choose from: {', '.join(EXPERIMENTS)}")
    if "generation" in only and weights is None:
        raise ConfigError("the experiment 'generation' judges pictures by a network: give its weights with --weights")
    setting = Setting(data_section(collapse.DATA, data), weights, size or Size())
    command = ["tessella", "study", "claims", *([] if set(only) == set(EXPERIMENTS) else ["--only", ",".join(only)]),
               "--out", "OUT", "--data", Path(data).name, *(["--weights", "WEIGHTS"] if weights else [])]  # fmt: skip
    for name in only:
        run_cells(EXPERIMENTS[name].tokenizers(setting), out, jobs=jobs)
        run_cells(EXPERIMENTS[name].cells(setting), out, jobs=jobs)
        verdicts = _write(out, setting, shlex.join(command))
    return verdicts


def _write(out: Path, setting: Setting, command: str) -> dict[str, list[Verdict]]:
    """The page of all experiments that have their cells, and their files; their verdicts."""
    sections: list[str] = []
    verdicts: dict[str, list[Verdict]] = {}
    rows: dict[str, Row] = {}
    missing = []
    for name, experiment in EXPERIMENTS.items():
        cells = experiment.cells(setting)
        own = {cell.name: row for cell in cells if (row := result_of(cell, out)) is not None}
        if not cells or len(own) < len(cells):
            missing.append(judge(f"{experiment.title}: not run", [], experiment.takes))
            continue
        read = {cell.name: row for cell in experiment.tokenizers(setting) if (row := result_of(cell, out)) is not None}
        rows |= read | own
        verdicts[name] = experiment.verdicts(list(own.values()))
        sections.append(_section(name, experiment, list(own.values()), verdicts[name], out))
        write_text(out / f"{name}.md", sections[-1])
    undecided = [*missing, *OPEN]
    write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
    head = _head(rows, [*itertools.chain(*verdicts.values()), *undecided], setting, command)
    tail = "\n".join(["## Not tried at this size", "", *(verdict.line() for verdict in undecided), ""])
    write_text(out / PAGE, "\n".join([head, *sections, tail, YARDSTICKS]))
    return verdicts


def _section(name: str, experiment: Experiment, rows: list[Row], verdicts: list[Verdict], out: Path) -> str:
    pictures = experiment.plots(rows, out, f"claims_{name}")
    lines = [f"## {experiment.title}", "", experiment.text, "", *(verdict.line() for verdict in verdicts), ""]
    lines += [f"![{caption}]({file})\n" for file, caption in pictures.items()]
    lines += [
        f"*Made by `tessella study claims --only {name}`: {len(rows)} cells, {usage.cost(rows) / 60:.0f} minutes, "
        f"finished {min(row['finished'] for row in rows)} to {max(row['finished'] for row in rows)}.*",
        "",
        experiment.table(rows),
    ]
    return "\n".join(lines)


def _head(rows: Mapping[str, Row], verdicts: Sequence[Verdict], setting: Setting, command: str) -> str:
    size, data = setting.size, setting.data
    lines = [
        "# The papers' claims, tested where a test can decide", "",
        f"    {command}", "",
        f"{Path(data.get('path') or data['name']).name}; {_machine()}, one thread a cell; torch {torch.__version__}. "
        f"{len(rows)} cells, {usage.cost(list(rows.values())) / 3600:.1f} hours in all; each one's seconds are in its "
        "row, by the clock of a machine whose two cores others used too. Seeds count from 0. Tokenizers train for "
        f"{size.steps:,} steps of {collapse.BATCH} pictures and are measured on {size.pictures:,} held-out ones. This "
        "page is what the command wrote.", "",
        RULES.format(flat_db=FLAT_DB, flat_usage=f"{100 * FLAT_USAGE:.0f} %"), "",
        "| claim | verdict |", "|---|---|",
        *(f"| {verdict.claim} | {verdict.word} |" for verdict in verdicts),
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()
