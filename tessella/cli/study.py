"""``tessella study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessella.cli.answers import say
from tessella.cli.options import Weights
from tessella.errors import ConfigError

Jobs = Annotated[int | None, typer.Option(min=1, help="Cells at a time, one core each; default: all cores.")]

study = typer.Typer(help="Experiments that test what the papers claim.", no_args_is_help=True)


@study.callback()
def about() -> None:
    """Experiments that test what the papers claim."""


@study.command()
def collapse(
    out: Annotated[Path, typer.Option(help="Folder of the study; the same command continues it.")] = Path(
        "runs/collapse"
    ),
    data: Annotated[str, typer.Option(help="A folder of pictures or Parquet files, or 'photos'.")] = "photos",
    methods: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
    bits: Annotated[str, typer.Option(help="Comma-separated log2 of the codebook sizes.")] = "6,8,10,12,14,16",
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method and size.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 8 pictures each.")] = 1500,
    pictures: Annotated[int, typer.Option(min=1, help="Held-out pictures measured.")] = 1000,
    jobs: Jobs = None,
    weights: Weights = None,
) -> None:
    """Train the same autoencoder with every quantizer at growing codebook sizes, and compare."""
    sizes = _numbers(bits)
    from tessella.study.collapse import METHODS, collapse

    chosen = list(METHODS) if methods is None else [name.strip() for name in methods.split(",")]
    collapse(
        out, data=data, methods=chosen, bits=sizes, seeds=seeds, steps=steps, pictures=pictures, jobs=jobs,
        weights=weights,
    )  # fmt: skip
    say("read {} and look at the plots beside it", out / "table.md")


@study.command()
def claims(
    out: Annotated[Path, typer.Option(help="Folder of the study; the same command continues it.")] = Path(
        "runs/claims"
    ),
    only: Annotated[
        str | None, typer.Option(help="Comma-separated, of usage, scq, premise, generation; default: all.")
    ] = None,
    data: Annotated[str, typer.Option(help="A folder of pictures or Parquet files with classes.")] = "photos",
    weights: Annotated[
        Path | None, typer.Option(help="Folder with the weights of LPIPS and EfficientNet-Lite0.")
    ] = None,
    jobs: Jobs = None,
) -> None:
    """Test the papers' claims, cell by cell, and write the page that says which of them hold."""
    from tessella.study.claims import EXPERIMENTS, PAGE, claims

    chosen = list(EXPERIMENTS) if only is None else [name.strip() for name in only.split(",")]
    claims(out, data=data, only=chosen, weights=weights, jobs=jobs)
    say("read {}", out / PAGE)


def _numbers(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(f"'{text}' is no comma-separated list of whole numbers") from None
