"""Which data a command reads, and reading it behind a progress bar."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from tessella import config
from tessella.config import build_section
from tessella.data.base import Batch, Samples, SkipBudget, Split
from tessella.data.loader import ahead, evaluation_batches
from tessella.data.tokens import MANIFEST
from tessella.errors import ConfigError
from tessella.media.base import Medium
from tessella.registry import Spec, find, names
from tessella.text import printable
from tessella.tokenizer import Tokenizer

logger = logging.getLogger("tessella")

_BATCH = 64


def data_section(section: Spec, where: str) -> Spec:
    """The data section that reads ``where`` and keeps what the recipe's says of every sample: its size, its flips.

    Args:
        section: the recipe's.
        where: a folder or file that one of the data sets reads; ``NAME:PATH`` says which of them; ``photos`` alone is
            the built-in one.

    Raises:
        ConfigError: nothing there.
    """
    chosen, path = _source(section, where)
    own = {key: value for key, value in section.items() if key != "path"} if section.get("name") == chosen else {}
    source = source_class(chosen)
    taken = sorted(source.carries & inspect.signature(source).parameters.keys())  # one order in every record
    carried = {key: section[key] for key in taken if section.get(key) is not None}
    return {"name": chosen, **carried, **own, **path}


def _source(section: Spec, where: str) -> tuple[str, Spec]:
    """Name and path of the data set that reads ``where``."""
    known = names("data")
    if where == "photos":
        return where, {}
    prefix, colon, rest = where.partition(":")
    if colon and prefix in known:
        return prefix, {"path": rest} if rest else {}
    path = Path(where)
    if (path / MANIFEST).is_file() or (path / "train" / MANIFEST).is_file():
        return "token_shards", {"path": where}
    if not path.exists():
        raise ConfigError(f"no data at {path}: expected a folder or file of signals, or 'photos'")
    trained = section.get("name")
    if trained is not None and source_class(trained).medium != "image":
        return trained, {"path": where}
    if trained == "lsun" or (path.is_dir() and any(path.glob("*_lmdb"))):
        return "lsun", {"path": where}
    parquet = path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))
    return "parquet" if parquet else "folder", {"path": where}


def source_class(name: str) -> type[Samples]:
    """The class of a data set."""
    return cast(type[Samples], find("data", name))


def data_of(tokenizer: Tokenizer, data: str | None, *, whole: bool = False, split: Split = "test") -> Spec:
    """:func:`data_for` a tokenizer: by default what it was trained on."""
    return data_for((tokenizer.recipe or {}).get("data", {}), data, whole=whole, split=split)


def data_for(trained: Spec, data: str | None, *, whole: bool = False, split: Split = "test") -> Spec:
    """The section of the data to apply a tokenizer to.

    Args:
        trained: the section that it was trained on, or nothing; taken where no ``data`` is named.
        data: see :func:`data_section`.
        whole: signals at their own size instead of windows of them.
        split: ``test`` of data that nothing was trained on is all of it.

    Raises:
        ConfigError: no such data, or none was named and the tokenizer knows of none.
    """
    section = trained
    if data is not None:
        section = data_section(trained, data)
        takes = inspect.signature(source_class(section["name"])).parameters
        if "held_out" in takes and section.get("path") != trained.get("path") and split == "test":
            section["held_out"] = 1.0
    if not section:
        raise ConfigError("the tokenizer was saved without a data set; name one with --data")
    if not whole:
        return section
    windows = source_class(section["name"]).window
    if not windows:
        raise ConfigError(f"data set '{section['name']}' has no whole signals, only windows of a fixed size")
    return {key: value for key, value in section.items() if key not in windows}


def open_data(section: Spec, split: Split) -> Samples:
    """The data set that a section describes."""
    dataset: Samples = build_section({"data": section}, "data", split=split)
    return dataset


def describe(section: Spec, split: str) -> Spec:
    """The section with its split: what a record says its numbers are of."""
    return {**section, "split": split}


def named(section: Spec, split: str) -> str:
    """A data set in a few words."""
    return f"{section.get('path', section['name'])}, {split}"


def medium_of(tokenizer: Tokenizer, section: Spec | None = None) -> Medium:
    """What the signals of a tokenizer are: as its recipe says, or the data it is applied to."""
    recipe = tokenizer.recipe or {}
    if "medium" not in recipe and section:
        recipe = {"medium": source_class(section["name"]).medium_spec(section)}
    medium: Medium = config.medium_of(recipe)
    return medium


def total(dataset: Samples, limit: int | None) -> int:
    """How many samples a command takes."""
    return len(dataset) if limit is None else min(limit, len(dataset))


def batches(dataset: Samples, *, whole: bool = False, limit: int | None, title: str) -> Iterator[Batch]:
    """Evaluation batches behind a progress bar; what is skipped is named, and too much of it ends the command."""
    from rich.console import Console
    from rich.progress import Progress

    budget = SkipBudget()
    batch_size = 1 if whole and not dataset.pads else _BATCH
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total(dataset, limit))
        # Read in a thread while the model works: Pillow and numpy let it.
        for batch in ahead(evaluation_batches(dataset, batch_size=batch_size, limit=limit)):
            for key, reason in batch["skipped"]:
                logger.warning("skipped %s: %s", printable(key), reason)
            budget.count(batch)
            yield batch
            progress.advance(task, len(batch["key"]) + len(batch["skipped"]))
        budget.check()
