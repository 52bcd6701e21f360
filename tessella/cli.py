"""The command line: parse, call, print."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from tessella import pipeline
from tessella.checkpoint import CheckpointError
from tessella.config import FAMILIES, ConfigError, find, names, override, recipe_names, recipe_summary
from tessella.data.base import DataError
from tessella.generate import GRID, SampleSettings
from tessella.study import METHODS
from tessella.study import collapse as run_collapse
from tessella.training.loop import Interrupted, TrainingError

app = typer.Typer(
    help="Train discrete tokenizers on pictures, turn pictures into tokens and back, generate, measure, and look.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
errors = Console(stderr=True)

Recipe = Annotated[str, typer.Argument(help="A recipe's name (see 'tessella list recipes') or a .toml file.")]
Model = Annotated[Path, typer.Argument(help="A training run, one of its checkpoints, or a saved tokenizer.")]
Data = Annotated[
    str | None,
    typer.Option(help="A folder of pictures, a folder of Parquet files, or 'photos'; default: as in the recipe."),
]
Split = Annotated[Literal["train", "test"], typer.Option(help="Which part of the data.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first so many pictures.")]
Whole = Annotated[bool, typer.Option("--whole", help="Whole pictures at their own size instead of crops.")]
Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Keep only the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep only the likeliest tokens of this total probability.")]
Guidance = Annotated[
    str,
    typer.Option(help="Classifier-free guidance: 1 is none; or interval:SCALE,START,STOP, linear:A,B, cosine:A,B."),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="More of this generator: num_steps=8, ..."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Weights = Annotated[Path | None, typer.Option(help="Folder with LPIPS weights; without it LPIPS is left out.")]


@app.command()
def train(
    recipe: Recipe,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/RECIPE.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override the recipe; repeatable.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer whose tokens a generator learns.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder with LPIPS weights, for perceptual losses.")] = None,
    init: Annotated[Path | None, typer.Option(help="A run or model whose weights to start from.")] = None,
    overfit_batch: Annotated[
        bool, typer.Option("--overfit-batch", help="Learn one batch by heart: a first check of a recipe.")
    ] = False,
    device: Device = None,
) -> None:
    """Train what a recipe describes. The same command continues an interrupted run where it was."""
    folder = pipeline.train(
        recipe, data=data, tokenizer=tokenizer, weights=weights, init=init, out=out, overrides=set_ or [],
        overfit_batch=overfit_batch, device=device,
    )  # fmt: skip
    console.print(f"trained: [bold]{folder}[/bold]; next: tessella evaluate {folder}, tessella report {folder}")


@app.command()
def tokenize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the Parquet shards.")],
    data: Data = None,
    split: Split = "test",
    limit: Limit = None,
    whole: Whole = False,
    variants: Annotated[
        int,
        typer.Option(
            min=0,
            help="Random training crops of each picture instead of its centre: rows that a generator chooses among.",
        ),
    ] = 0,
    device: Device = None,
) -> None:
    """Turn pictures into Parquet token shards."""
    count = pipeline.tokenize(
        model, out, data=data, split=split, limit=limit, whole=whole, variants=variants, device=device
    )
    console.print(f"wrote the tokens of {count // (variants or 1)} pictures to [bold]{out}[/bold]")


@app.command()
def detokenize(
    model: Model,
    shards: Annotated[Path, typer.Argument(help="A folder of token shards, or one of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")],
    limit: Limit = None,
    device: Device = None,
) -> None:
    """Turn token shards back into pictures; shards of another tokenizer are refused."""
    count = pipeline.detokenize(model, shards, out, limit=limit, device=device)
    console.print(f"wrote {count} pictures to [bold]{out}[/bold]")


@app.command()
def evaluate(
    model: Model,
    data: Data = None,
    split: Split = "test",
    limit: Limit = None,
    whole: Whole = False,
    pixels: Annotated[
        Literal["uint8", "truncated", "float"] | None,
        typer.Option(help="Measure on 8-bit pictures, rounded (default) or truncated (default for ibq), or on floats."),
    ] = None,
    weights: Weights = None,
    protocol: Annotated[
        Literal["adm", "pytorch-fid", "ibq", "torchvision", "efflite0"] | None,
        typer.Option(help="Also the Frechet distance and score of this protocol; for a generator its samples'."),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Weights of the protocol's network; default for efflite0: in --weights.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="'train' or 'test' of the data, or a published .npz (mu, sigma), instead of the originals."),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples of a generator to judge.")] = 1000,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance: Guidance = "1",
    option: Options = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the records; default: the model's folder.")] = None,
    device: Device = None,
) -> None:
    """Measure reconstructions (PSNR, SSIM, LPIPS, usage, rFID) or samples, with the protocol beside the numbers."""
    if pipeline.is_generator(model):
        settings = SampleSettings(seed, temperature, top_k, top_p, guidance, override({}, option or []))
        record, rates, file = pipeline.evaluate_samples(
            model, protocol=protocol or "efflite0", features=features or weights, data=data, split=split,
            limit=limit, reference=reference, count=samples, settings=settings, out=out, device=device,
        )  # fmt: skip
        record.print(console)
        console.print(
            f"{rates.bits_per_token:.3f} of {rates.log2_codebook_size:.3f} bits per token of real pictures; sampling "
            f"{rates.images_per_second:.1f} images/s, {rates.tokens_per_second:.0f} tokens/s"
        )
        console.print(f"written to [bold]{file}[/bold]; nearest training pictures: {file.with_suffix('.png')}")
        return
    result, file = pipeline.evaluate(
        model, data=data, split=split, limit=limit, whole=whole, weights=weights, out=out,
        pixels=pixels or ("truncated" if protocol == "ibq" else "uint8"),
        device=device,
    )  # fmt: skip
    result.print(console)
    console.print(f"written to [bold]{file}[/bold]")
    if protocol is not None:
        record, file = pipeline.evaluate_distribution_of_reconstructions(
            model, protocol=protocol, features=features or weights, data=data, split=split, limit=limit, whole=whole,
            reference=reference, out=out, device=device,
        )  # fmt: skip
        record.print(console)
        console.print(f"written to [bold]{file}[/bold]")


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="The run of a generator, one of its checkpoints, or a saved one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the PNGs; default: generated, in the model's.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="A class's name or number; repeatable. Default: all in turn.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Pictures of each class, or in all.")] = 16,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance: Guidance = "1",
    option: Options = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time; changes no picture.")] = 64,
    device: Device = None,
) -> None:
    """Draw pictures from a generator. The same command continues an interrupted one."""
    out = out or (model if model.is_dir() else model.parent) / "generated"
    drawn, seconds = pipeline.sample(
        model, out, classes=classes or (), count=count, batch_size=batch_size, device=device,
        settings=SampleSettings(seed, temperature, top_k, top_p, guidance, override({}, option or [])),
    )  # fmt: skip
    rate = f" at {drawn / seconds:.2f} images/s" if drawn else " (all were there)"
    console.print(f"drew {drawn} pictures{rate}; look at [bold]{out / GRID}[/bold]")


@app.command()
def report(
    model: Model,
    data: Data = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the page; default: the run's own.")] = None,
    device: Device = None,
) -> None:
    """Write one HTML page that shows a run: pictures, tokens, codebook, curves, numbers."""
    page = pipeline.report(model, data=data, weights=weights, out=out, device=device)
    console.print(f"open [bold]{page}[/bold]")


study_app = typer.Typer(help="Experiments that test what the papers claim.", no_args_is_help=True)
app.add_typer(study_app, name="study")


@study_app.command()
def collapse(
    out: Annotated[Path, typer.Option(help="Folder of the study; the same command continues it.")] = Path(
        "runs/collapse"
    ),
    data: Annotated[str, typer.Option(help="A folder of pictures or Parquet files, or 'photos'.")] = "photos",
    methods: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = ",".join(METHODS),
    bits: Annotated[str, typer.Option(help="Comma-separated log2 of the codebook sizes.")] = "6,8,10,12,14,16",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method and size.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 32 pictures each.")] = 400,
    pictures: Annotated[int, typer.Option(min=1, help="Held-out pictures measured.")] = 2000,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells at a time, one core each; default: all cores.")] = None,
    weights: Weights = None,
) -> None:
    """Train the same autoencoder with every quantizer at growing codebook sizes, and compare."""
    run_collapse(
        out, data=data, methods=[name.strip() for name in methods.split(",")], bits=_numbers(bits), seeds=seeds,
        steps=steps, pictures=pictures, jobs=jobs, weights=weights,
    )  # fmt: skip
    console.print(f"read [bold]{out / 'table.md'}[/bold] and look at the plots beside it")


def _numbers(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(f"'{text}' is no comma-separated list of whole numbers") from None


@app.command(name="list")
def list_(
    what: Annotated[
        Literal["recipes", "quantizers", "autoencoders", "generators", "conditioners", "data"] | None,
        typer.Argument(help="Only these."),
    ] = None,
) -> None:
    """Show the recipes and everything a recipe can name."""
    if what in (None, "recipes"):
        table = Table("recipe", "what it is", title="recipes", title_justify="left")
        for name in recipe_names():
            table.add_row(name, recipe_summary(name))
        console.print(table)
    for family in FAMILIES:
        if what in (None, family):
            table = Table("name", "what it is", title=family, title_justify="left")
            for name in names(family):
                table.add_row(name, (find(family, name).__doc__ or "").split("\n")[0])
            console.print(table)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("quickstart"),
    device: Device = None,
) -> None:
    """Train a tokenizer on real photographs, tokenize, reconstruct, measure, and write a page to look at."""
    results = pipeline.quickstart(out, device=device)
    table = Table(title="quickstart", title_justify="left", show_header=False)
    for name, value in results.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    console.print(f"open [bold]{out / 'report.html'}[/bold]")


@contextmanager
def _messages() -> Iterator[None]:
    """Expected failures end in one readable line and an exit status, not in a traceback."""
    try:
        yield
    except Interrupted as stop:
        errors.print(f"{stop}; the same command continues from there", soft_wrap=True, highlight=False)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        errors.print("stopped at once; work since the last checkpoint is lost")
        sys.exit(128 + signal.SIGINT)
    except (ConfigError, CheckpointError, DataError, TrainingError, ImportError) as error:
        errors.print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)


def main() -> None:
    """Entry point of ``tessella``."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with _messages():
        app()
