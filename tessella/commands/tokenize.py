"""``tessella tokenize``: from signals to token shards."""

from __future__ import annotations

from pathlib import Path

from tessella.checkpoint import load
from tessella.commands._data import data_of
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath
from tessella.tokenization.engine import Engine, TokenizeResult, tokenize_dataset
from tessella.tokenization.source import AnySplit


def tokenize(
    model: AnyPath, out: AnyPath, *, data: str | None = None, split: AnySplit = "all", limit: int | None = None,
    whole: bool = False, variants: int = 0, shard_rows: int | None = None, batch_size: int = 64, workers: int = 0,
    engine: Engine = "local", profile: bool = False, device: str | None = None,
) -> TokenizeResult:  # fmt: skip
    """Write the tokens of a data set as Parquet shards into ``out``; the same call does what an interrupted one left.

    Args:
        model: see :func:`tessella.load`.
        out: folder of the shards.
        data: a folder or file, ``NAME:PATH``, or ``photos``; the data set of the training by default.
        split: ``train``, ``test`` (what is held out), or all of it, training part first.
        limit, whole, variants, shard_rows, batch_size, workers, engine, profile: see
            :func:`tessella.tokenization.engine.tokenize_dataset`.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.

    Raises:
        CheckpointError, ConfigError, DataError, WorkerError: see there.
    """
    model, out = Path(model), Path(out)
    place = str(pick_device(device))
    section = data_of(load(model), data, whole=whole, split="train" if split == "all" else split)
    return tokenize_dataset(
        model, section, out, split=split, limit=limit, whole=whole, variants=variants, shard_rows=shard_rows,
        batch_size=batch_size, workers=workers, engine=engine, profile=profile, device=place,
    )  # fmt: skip
