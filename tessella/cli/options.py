"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Recipe = Annotated[str, typer.Argument(help="A recipe's name (see 'tessella list recipes') or a .toml file.")]
Model = Annotated[Path, typer.Argument(help="A training run, one of its checkpoints, or a saved model.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="A folder or file of signals, NAME:PATH for a data set by name, or 'photos'; default: the recipe's."
    ),
]
Split = Annotated[Literal["train", "test"], typer.Option(help="Which part of the data.")]
AnySplit = Annotated[Literal["all", "train", "test"], typer.Option(help="Which part of the data.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first so many.")]
Whole = Annotated[bool, typer.Option("--whole", help="Signals at their own size instead of crops of them.")]
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
