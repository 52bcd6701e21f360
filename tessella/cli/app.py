"""The commands of ``tessella``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tessella.cli.answers import console, say
from tessella.cli.exchange import exchange
from tessella.cli.options import (
    AnySplit,
    Data,
    Device,
    Guidance,
    Limit,
    Model,
    Options,
    Recipe,
    Seed,
    Split,
    Temperature,
    TopK,
    TopP,
    Weights,
    Whole,
)
from tessella.cli.study import study

app = typer.Typer(
    help="Train discrete tokenizers, turn signals into tokens and back, generate, measure, and look.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(study, name="study")
app.add_typer(exchange)


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
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Continue although the data is not what the run began with.")
    ] = False,
    device: Device = None,
) -> None:
    """Train what a recipe describes. The same command continues an interrupted run where it was."""
    from tessella.recipe import check_recipe_name

    check_recipe_name(recipe)  # before anything heavy is imported
    from tessella.commands.train import train

    folder = train(
        recipe, data=data, tokenizer=tokenizer, weights=weights, init=init, out=out, overrides=set_ or [],
        overfit_batch=overfit_batch, allow_changed_data=allow_changed_data, device=device,
    )  # fmt: skip
    say("trained: {}; next: tessella evaluate {}, tessella report {}", folder, folder, folder)


@app.command()
def tokenize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the Parquet shards.")],
    data: Data = None,
    split: AnySplit = "all",
    limit: Limit = None,
    whole: Whole = False,
    variants: Annotated[
        int,
        typer.Option(
            min=0,
            help="Random training crops of each signal instead of its centre: rows that a generator chooses among.",
        ),
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Signals at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that tokenize; 0 does it in this one.")] = 0,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Who runs the processes.")] = "local",
    profile: Annotated[bool, typer.Option("--profile", help="Print where the time went.")] = False,
    device: Device = None,
) -> None:
    """Turn signals into Parquet token shards. The same command does what an interrupted one left."""
    from tessella.commands.tokenize import tokenize

    result = tokenize(
        model, out, data=data, split=split, limit=limit, whole=whole, variants=variants, batch_size=batch_size,
        workers=workers, engine=engine, profile=profile, device=device,
    )  # fmt: skip
    say(f"{result}, written to {{}}", out)


@app.command()
def detokenize(
    model: Model,
    shards: Annotated[Path, typer.Argument(help="A folder of token shards, or one of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    data: Data = None,
    limit: Limit = None,
    device: Device = None,
) -> None:
    """Turn token shards back into signals; shards of another tokenizer are refused."""
    from tessella.commands.detokenize import detokenize

    count = detokenize(model, shards, out, data=data, limit=limit, device=device)
    say(f"wrote {count} files to {{}}", out)


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
    transcripts: Annotated[
        Path | None, typer.Option(help="Table of files and texts: measure the word error rate of speech against it.")
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
    from tessella.commands.evaluate import evaluate
    from tessella.generators.drawing import SampleSettings
    from tessella.recipe import override

    options = {"pixels": pixels, "transcripts": transcripts}
    chosen = {name: value for name, value in options.items() if value is not None}
    evaluation = evaluate(
        model, data=data, split=split, limit=limit, whole=whole, weights=weights, protocol=protocol, features=features,
        reference=reference, metrics=chosen, samples=samples,
        settings=SampleSettings(seed, temperature, top_k, top_p, guidance, override({}, option or [])),
        out=out, device=device,
    )  # fmt: skip
    evaluation.print(console)
    for file in evaluation.files:
        say("written to {}", file)


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="The run of a generator, one of its checkpoints, or a saved one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: generated, in the model's.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="A class's name or number; repeatable. Default: all in turn.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Samples of each class, or in all.")] = 16,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance: Guidance = "1",
    option: Options = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time; changes none of them.")] = 64,
    device: Device = None,
) -> None:
    """Draw from a generator. The same command continues an interrupted one."""
    from tessella.commands.sample import sample
    from tessella.generators.drawing import SampleSettings
    from tessella.recipe import override

    drawn = sample(
        model, out, classes=classes or (), count=count, batch_size=batch_size, device=device,
        settings=SampleSettings(seed, temperature, top_k, top_p, guidance, override({}, option or [])),
    )  # fmt: skip
    rate = f" at {drawn.count / drawn.seconds:.2f} samples/s" if drawn.count else " (all were there)"
    say(f"drew {drawn.count} of {drawn.total} samples{rate}; look at {{}}", drawn.overview)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="The run of a generator that reads pictures (stage II of UViM).")],
    files: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: predicted, in the model's.")] = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest code.")] = 0.0,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Predict depth, colours or segments: a picture to look at and the values, for each picture."""
    from tessella.commands.predict import predict

    for prediction in predict(model, files, out=out, temperature=temperature, seed=seed, device=device):
        say("{}: look at {}, values in {}", prediction.file, prediction.shown, prediction.values)


@app.command()
def report(
    model: Model,
    data: Data = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the page; default: the run's own.")] = None,
    device: Device = None,
) -> None:
    """Write one HTML page that shows a run: signals, tokens, codebook, curves, numbers."""
    from tessella.commands.report import report

    say("open {}", report(model, data=data, weights=weights, out=out, device=device))


@app.command()
def explore(
    model: Model,
    generator: Annotated[Path | None, typer.Argument(help="The run of a generator of its tokens.")] = None,
    data: Data = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8765,
    device: Device = None,
) -> None:
    """Open a page to touch a tokenizer: replace tokens, see its codes, draw and fill with a generator."""
    from tessella.commands.explore import explore

    explore(
        model, generator, data=data, host=host, port=port, device=device,
        ready=lambda address: say("open {} (Ctrl-C ends it)", address),
    )  # fmt: skip


@app.command(name="list")
def list_(
    what: Annotated[
        Literal[
            "recipes", "data", "media", "autoencoders", "quantizers", "objectives", "conditioners", "generators"
        ] | None,
        typer.Argument(help="Only these."),
    ] = None,
) -> None:  # fmt: skip
    """Show the recipes and everything a recipe can name."""
    from rich.table import Table

    from tessella.recipe import recipe_names, recipe_summary
    from tessella.registry import FAMILIES, names, summary

    if what in (None, "recipes"):
        table = Table("recipe", "what it is", title="recipes", title_justify="left")
        for name in recipe_names():
            table.add_row(name, recipe_summary(name))
        console.print(table)
    for family in FAMILIES:
        if what in (None, family):
            table = Table("name", "what it is", title=family, title_justify="left")
            for name in names(family):
                table.add_row(name, summary(family, name))
            console.print(table)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("quickstart"),
    device: Device = None,
) -> None:
    """Train a tokenizer on real photographs, tokenize, reconstruct, measure, and write a page to look at."""
    from rich.table import Table

    from tessella.commands.quickstart import quickstart

    results = quickstart(out, device=device)
    table = Table(title="quickstart", title_justify="left", show_header=False)
    for name, value in results.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    say("open {}", out / "report.html")
