"""The commands as functions: from a recipe to a trained run, and from a run to tokens, pictures, numbers and a page."""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from tessella.checkpoint import RECIPE, fingerprint, load, load_recipe, write_text
from tessella.config import (
    ConfigError,
    Spec,
    build_section,
    differences,
    override,
    read_recipe,
    resolve_recipe,
    to_toml,
)
from tessella.data.base import Batch, DataError, ImageDataset, SkipBudget, Split, evaluation_batches
from tessella.data.tokens import TokenRow, TokenWriter, read_tokens
from tessella.evaluation.reconstruction import Pixels, ReconstructionRecord, evaluate_reconstruction
from tessella.losses.perceptual import LPIPS, Network
from tessella.report import save_image_grid, write_report
from tessella.tokenizer import Tokenizer
from tessella.training.logs import LOG, read_log
from tessella.training.loop import Loop
from tessella.training.tokenizer import TokenizerStep

logger = logging.getLogger("tessella")

EVALUATION = "evaluation.json"
_EVALUATION_BATCH = 64
_PICTURES_SHOWN = 12


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; without a name the accelerator there is, or the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return device


def train(
    recipe: str, *, data: str | None = None, out: Path | None = None, overrides: Sequence[str] = (),
    device: str | None = None,
    quiet: bool = False,
) -> Path:  # fmt: skip
    """Train what ``recipe`` (a name or a .toml file) describes; continue where an interrupted run stopped.

    Args:
        recipe: see :func:`tessella.config.read_recipe`.
        data: replaces the recipe's data set; see :func:`data_section`.
        out: folder of the run; ``runs/<recipe>`` if None.
        overrides: ``"section.key=value"``.
        device: see :func:`pick_device`.
        quiet: no progress on the terminal and no sample pictures.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: a recipe that cannot be built, or a folder that holds a run of another recipe.
        TrainingError, Interrupted: see :meth:`tessella.training.loop.Loop.run`.
    """
    raw = override(read_recipe(recipe), overrides)
    if data is not None:
        raw["data"] = data_section(raw.get("data", {}), data)
    resolved = resolve_recipe(raw)
    folder = out or Path("runs") / Path(recipe).stem
    _claim(folder, resolved)
    loop: Loop = build_section(resolved, "training")
    torch.manual_seed(loop.seed)
    dataset = build_section(resolved, "data", split="train")
    tokenizer = _tokenizer(resolved)
    step: TokenizerStep = build_section(resolved, "loss", tokenizer=tokenizer)
    loop.run(step, dataset, folder, device=pick_device(device), show=None if quiet else save_image_grid, quiet=quiet)
    return folder


def _claim(folder: Path, recipe: Spec) -> None:
    """Write the recipe into the run's folder, or see that it is the one already there."""
    file = folder / RECIPE
    text = to_toml(recipe)
    if file.is_file():
        changed = differences(load_recipe(folder), recipe)
        if changed:
            raise ConfigError(
                f"{folder} holds a run of another recipe ({'; '.join(changed)}); choose another --out, or delete it"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; choose another --out")
    else:
        write_text(file, text)


def _tokenizer(recipe: Spec) -> Tokenizer:
    autoencoder = build_section(recipe, "autoencoder")
    quantizer = build_section(recipe, "quantizer")
    tokenizer: Tokenizer = build_section(recipe, "tokenizer", autoencoder=autoencoder, quantizer=quantizer)
    tokenizer.recipe = recipe
    return tokenizer


def data_section(section: Spec, where: str) -> Spec:
    """The data section that reads ``where`` and keeps the recipe's crop, size and flip.

    Args:
        section: the recipe's.
        where: ``photos``, a folder of pictures, or a folder of Parquet files in the Hugging Face layout.

    Raises:
        ConfigError: no such folder.
    """
    if where == "photos":
        return section if section.get("name") == "photos" else {"name": "photos", **_geometry(section)}
    path = Path(where)
    if not path.exists():
        raise ConfigError(f"no data at {path}: expected a folder of pictures or of Parquet files, or 'photos'")
    parquet = path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))
    return {"name": "parquet" if parquet else "folder", "path": str(path), **_geometry(section)}


def _geometry(section: Spec) -> Spec:
    return {key: section[key] for key in ("crop_px", "resize_px", "flip") if section.get(key) is not None}


def _data_of(tokenizer: Tokenizer, data: str | None, *, split: Split, whole: bool) -> tuple[ImageDataset, Spec]:
    """The data set to apply a tokenizer to, and its section; by default the one it was trained on."""
    section: Spec = (tokenizer.recipe or {}).get("data", {})
    if data is not None:
        section = data_section(section, data)
    if not section:
        raise ConfigError("the tokenizer was saved without a data set; name one with --data")
    if whole:
        section = {key: value for key, value in section.items() if key not in ("crop_px", "resize_px")}
    dataset: ImageDataset = build_section({"data": section}, "data", split=split)
    return dataset, {**section, "split": split}


def _batches(
    dataset: ImageDataset, *, whole: bool, limit: int | None, title: str, num_workers: int = 0
) -> Iterator[Batch]:
    """Evaluation batches behind a progress bar; skipped pictures are named, and too many of them end it."""
    from rich.console import Console
    from rich.progress import Progress

    budget = SkipBudget()
    total = len(dataset) if limit is None else min(limit, len(dataset))
    batch_size = 1 if whole else _EVALUATION_BATCH
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        for batch in evaluation_batches(dataset, batch_size=batch_size, num_workers=num_workers, limit=limit):
            for key, reason in batch["skipped"]:
                logger.warning("skipped %s: %s", key, reason)
            budget.count(batch)
            yield batch
            progress.advance(task, len(batch["key"]) + len(batch["skipped"]))
        budget.check()


def tokenize(
    model: Path, out: Path, *, data: str | None = None, split: Split = "test", limit: int | None = None,
    whole: bool = False, device: str | None = None,
) -> int:  # fmt: skip
    """Write the tokens of a data set as Parquet shards into ``out``; returns the number of pictures.

    Args:
        model: see :func:`tessella.load`.
        out: folder of the shards.
        data: see :func:`data_section`; the data set of the training by default.
        split: which part of it.
        limit: only the first so many pictures.
        whole: whole pictures at their own size, padded to the stride, instead of crops.
        device: see :func:`pick_device`.

    Raises:
        CheckpointError, ConfigError, DataError: a model, a data set or a picture that cannot be used.
    """
    tokenizer = load(model, device=pick_device(device))
    dataset, _ = _data_of(tokenizer, data, split=split, whole=whole)
    count = 0
    with TokenWriter(out, tokenizer.token_space()) as writer:
        for batch in _batches(dataset, whole=whole, limit=limit, title="tokenize"):
            indices = tokenizer.encode(batch["x"].to(tokenizer.device), pad=True).cpu()
            for key, label, tokens in zip(batch["key"], batch["label"].tolist(), indices, strict=True):
                writer.write(key=key, label=label, indices=tokens, extent=batch["x"].shape[2:])
                count += 1
    return count


def reconstructions(tokenizer: Tokenizer, shards: Path) -> Iterator[tuple[TokenRow, Tensor]]:
    """Each row of token shards with its picture ``[3, H, W]`` in [-1, 1].

    Raises:
        DataError: shards of another tokenizer, or damaged ones.
    """
    for row in read_tokens(shards, fingerprint(tokenizer)):
        indices = row.indices[None].to(tokenizer.device)
        yield row, tokenizer.decode(indices, extent=row.extent)[0].cpu()


def detokenize(model: Path, shards: Path, out: Path, *, limit: int | None = None, device: str | None = None) -> int:
    """Write the pictures that token shards stand for as PNGs into ``out``; returns their number.

    A picture's file is named after its key, sub-folders included; ``.png`` is added where the key does not end in it.
    """
    tokenizer = load(model, device=pick_device(device))
    count = 0
    for row, picture in itertools.islice(reconstructions(tokenizer, shards), limit):
        save_image_grid(picture[None], _file_for(out, row.key))
        count += 1
    return count


def _file_for(out: Path, key: str) -> Path:
    """A file below ``out`` for a key of any form: keys come from shards, which may be anybody's."""
    relative = Path(key.replace(":", "_"))
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"key {key!r} leads out of the folder {out}")
    # The ending stays, a.jpg and a.png being two pictures.
    return out / (relative if relative.suffix == ".png" else relative.with_name(f"{relative.name}.png"))


def evaluate(
    model: Path, *, data: str | None = None, split: Split = "test", limit: int | None = None, whole: bool = False,
    pixels: Pixels = "uint8", weights: Path | None = None, out: Path | None = None, device: str | None = None,
) -> tuple[ReconstructionRecord, Path]:  # fmt: skip
    """Measure a tokenizer's reconstructions and write the record; see :func:`evaluate_reconstruction`.

    Args:
        model, data, split, limit, whole, device: as for :func:`tokenize`.
        pixels: what the metrics see.
        weights: folder with LPIPS weights; LPIPS is left out without it.
        out: JSON file; ``evaluation.json`` beside the model by default.

    Returns:
        The record, and the file it was written to.
    """
    tokenizer = load(model, device=pick_device(device))
    dataset, section = _data_of(tokenizer, data, split=split, whole=whole)
    record = evaluate_reconstruction(
        tokenizer,
        _batches(dataset, whole=whole, limit=limit, title="evaluate"),
        lpips={} if weights is None else {name: LPIPS.from_folder(name, weights) for name in get_args(Network)},
        pixels=pixels,
        data=section,
    )
    file = out or (model if model.is_dir() else model.parent) / EVALUATION
    record.write(file)
    return record, file


def report(
    model: Path, *, data: str | None = None, weights: Path | None = None, out: Path | None = None,
    device: str | None = None, command: str | None = None,
) -> Path:  # fmt: skip
    """Evaluate a tokenizer and write a page that shows the result; returns the page.

    Args:
        model, data, weights, device: as for :func:`evaluate`.
        out: folder of the page; the model's by default.
        command: shown on the page; the command line of this process by default.
    """
    folder = out or model
    record, _ = evaluate(model, data=data, weights=weights, out=folder / EVALUATION, device=device)
    tokenizer = load(model, device=pick_device(device))
    dataset, _ = _data_of(tokenizer, data, split="test", whole=False)
    chosen = _spread_batch(dataset, _PICTURES_SHOWN)
    x = chosen["x"].to(tokenizer.device)
    indices = tokenizer.encode(x, pad=True)
    try:
        codebook: Tensor | None = tokenizer.quantizer.codebook
    except ValueError:  # too large to build; the page then colours tokens by their number
        codebook = None
    return write_report(
        folder,
        title=f"{type(tokenizer.quantizer).__name__} tokenizer on {(tokenizer.recipe or {})['data']['name']}",
        command=command or shlex.join(["tessella", *sys.argv[1:]]),
        evaluation=record.to_dict(),
        log_rows=[_for_report(row) for row in read_log(model / LOG)],
        originals=chosen["x"],
        reconstructions=tokenizer.decode(indices, extent=x.shape[2:]).cpu(),
        indices=indices.cpu(),
        codebook=codebook,
        codes=record.codes,
        keys=chosen["key"],
    )


def _spread_batch(dataset: ImageDataset, count: int) -> Batch:
    """``count`` pictures from all over a data set, the same ones every time; its first ones may all be alike."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    samples = [dataset[index] for index in sorted(chosen)]
    return Batch(
        x=torch.stack([sample["x"] for sample in samples]),
        label=torch.tensor([sample["label"] for sample in samples]),
        key=[sample["key"] for sample in samples],
        skipped=[],
    )


def _for_report(row: dict[str, float]) -> dict[str, float]:
    return {**row, "loss": row["loss/tokenizer"], "psnr": row["psnr_db"]}


def quickstart(out: Path, *, device: str | None = None) -> dict[str, float]:
    """The whole main job on the built-in photographs; returns the numbers that ``results.json`` holds.

    ``out`` gets ``run/`` (training), ``tokens/`` (shards), ``reconstructions/`` (PNGs made from the shards alone),
    ``report.html`` and ``results.json``. Interrupted, it goes on where it was.
    """
    started = time.monotonic()
    run = train("photos_fsq", out=out / "run", device=device)
    tokenize(run, out / "tokens", device=device)
    detokenize(run, out / "tokens", out / "reconstructions", device=device)
    page = report(run, out=out, device=device, command="tessella quickstart")
    record = json.loads((out / EVALUATION).read_text(encoding="utf-8"))
    results = {
        "psnr_db": record["psnr"],
        "ssim": record["ssim"],
        "bits_per_pixel": record["bits_per_pixel"],
        "usage": record["usage"],
        "perplexity": record["perplexity"],
        "seconds": time.monotonic() - started,
    }
    write_text(page.with_name("results.json"), json.dumps(results, indent=2) + "\n")
    return results
