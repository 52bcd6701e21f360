"""``tessella tokenize``: from signals to token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tessella.checkpoint import load
from tessella.commands._data import batches, data_of, open_data, total
from tessella.commands._device import pick_device
from tessella.data._variants import Variants
from tessella.data.base import Samples, Split, of_one_size, to_device
from tessella.data.tokens import TokenWriter
from tessella.errors import ConfigError


@dataclass(frozen=True)
class Tokenized:
    """What :func:`tokenize` did.

    Attributes:
        num_rows: written.
        num_signals: that they are of.
        num_available: that the data set holds in both its parts.
        num_skipped: that could not be read.
        split: which part was taken.
    """

    num_rows: int
    num_signals: int
    num_available: int
    num_skipped: int
    split: str

    def __str__(self) -> str:
        """In one line."""
        part = {"all": "all of it", "train": "the training part", "test": "the held-out part"}[self.split]
        skipped = f"; {self.num_skipped} could not be read" if self.num_skipped else ""
        return f"{self.num_rows:,} rows of {self.num_signals:,} of {self.num_available:,} signals ({part}){skipped}"


def tokenize(
    model: Path, out: Path, *, data: str | None = None, split: Split | Literal["all"] = "all",
    limit: int | None = None, whole: bool = False, variants: int = 0, device: str | None = None,
) -> Tokenized:  # fmt: skip
    """Write the tokens of a data set as Parquet shards into ``out``.

    Args:
        model: see :func:`tessella.load`.
        out: folder of the shards.
        data: a folder or file, ``NAME:PATH``, or ``photos``; the data set of the training by default.
        split: ``train``, ``test`` (what is held out), or all of it, training part first.
        limit: only the first so many signals.
        whole: signals at their own size, padded to the stride, instead of windows of them.
        variants: rows of each signal, its views in so many epochs of training; 0 for one row, its centre.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.

    Raises:
        CheckpointError, ConfigError, DataError: a model, a data set or a signal that cannot be used; variants without
            windows.
    """
    tokenizer = load(model, device=pick_device(device))
    section = data_of(tokenizer, data, whole=whole, split="train" if split == "all" else split)
    parts: dict[Split, Samples] = {part: open_data(section, part) for part in get_args(Split)}
    chosen = list(parts.values()) if split == "all" else [parts[split]]
    if variants and chosen[0].extent is None:
        wanted = " or ".join(f"data.{key}" for key in sorted(chosen[0].window)) or "data of one size"
        raise ConfigError(f"variants are random windows of a signal: they need {wanted}")
    num_rows = num_signals = num_skipped = 0
    with TokenWriter(out, tokenizer.token_space(), class_names=chosen[0].class_names) as writer:
        for part in chosen:
            taken = total(part, None if limit is None else limit - num_signals)
            if not taken:
                continue
            dataset = Variants(part, variants, seed=0) if variants else part
            for batch in batches(dataset, whole=whole, limit=taken * max(variants, 1), title="tokenize"):
                for one in of_one_size(batch):
                    moved = to_device(one, tokenizer.device)
                    indices = tokenizer.encode(moved["x"], moved.get("context"), pad=True).cpu()
                    for key, label, tokens in zip(one["key"], one["label"].tolist(), indices, strict=True):
                        writer.write(key=key, label=label, indices=tokens, extent=one["x"].shape[2:])
                num_rows += len(batch["key"])
                num_skipped += len(batch["skipped"])
            num_signals += taken
    return Tokenized(num_rows, num_signals, sum(map(len, parts.values())), num_skipped, split)
