"""Commands that exchange models with other programs and with people: convert, compare, export, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tessella.cli.answers import console, say
from tessella.cli.options import Data, Device, Limit, Model, Split, Weights

exchange = typer.Typer()


@exchange.command()
def convert(
    family: Annotated[str, typer.Argument(help="ibq, llamagen, simvq, taming, ...; 'auto' recognises it by its keys.")],
    path: Annotated[Path, typer.Argument(help="The published checkpoint, or a folder that holds it.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    licence: Annotated[str | None, typer.Option(help="Of the weights; default: what their authors state.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of a generator that comes without its own.")] = None,
    size_px: Annotated[int | None, typer.Option(help="Side of a generator's pictures, if the name has it not.")] = None,
) -> None:
    """Turn a published checkpoint into a folder that encodes and decodes as the original does."""
    from tessella.interop.convert import convert

    chosen = None if family == "auto" else family
    say("converted: {}", convert(chosen, path, out, licence=licence, tokenizer=tokenizer, size_px=size_px))


@exchange.command()
def convert_config(
    path: Annotated[Path, typer.Argument(help="A YAML configuration of taming, LlamaGen, SEED-Voken or SimVQ.")],
    out: Annotated[Path, typer.Argument(help="The recipe to write, a .toml file.")],
) -> None:
    """Turn another program's training configuration into a recipe."""
    from tessella.interop.configs import convert_config

    say("wrote {}", convert_config(path, out))


@exchange.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Runs, saved models, published checkpoints, hf://owner/name.")],
    out: Annotated[Path, typer.Option(help="Folder of the page and the record.")],
    data: Data = None,
    split: Split = "test",
    limit: Limit = None,
    crop_px: Annotated[int | None, typer.Option(min=1, help="Windows of this side instead of whole signals.")] = None,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Measure tokenizers side by side on the same signals, codecs at the same bits beside them, on one page."""
    from tessella.commands.compare import compare

    comparison = compare(
        models, data=data, out=out, split=split, limit=limit, crop_px=crop_px, weights=weights, device=device
    )  # fmt: skip
    comparison.print(console)
    say("open {}", comparison.page)


@exchange.command()
def export(
    model: Model,
    to: Annotated[Literal["onnx", "torch"], typer.Option(help="The format.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the programs; default: TO, in the model's.")] = None,
) -> None:
    """Write encode and decode of a tokenizer as programs of their own, for any batch and size."""
    from tessella.interop.export import export

    say("wrote {}", export(model, to=to, out=out or (model if model.is_dir() else model.parent) / to))


@exchange.command()
def push(
    model: Model,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it does not exist.")],
    licence: Annotated[str | None, typer.Option(help="Of the weights; default: what the recipe says.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Only its owner sees it.")] = False,
    device: Device = None,
) -> None:
    """Upload an evaluated model with a card that says what it is and how good."""
    from tessella.commands.push import push

    say("uploaded: {}", push(model, repository, licence=licence, private=private, device=device))
