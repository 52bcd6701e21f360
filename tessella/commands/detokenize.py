"""``tessella detokenize``: from token shards back to signals."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import get_args

from torch import Tensor

from tessella.checkpoint import fingerprint, load
from tessella.commands._data import data_of, medium_of, open_data
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath
from tessella.data.base import DataError, Split
from tessella.data.loader import evaluation_batches
from tessella.data.tokens import TokenRow, read_tokens
from tessella.registry import Spec
from tessella.tokenizer import Tokenizer

# Longer signals of one axis are decoded in chunks: 30 s of 75 positions.
_MOST_POSITIONS = 2250


def detokenize(
    model: AnyPath, shards: AnyPath, out: AnyPath, *, data: str | None = None, limit: int | None = None,
    device: str | None = None,
) -> int:  # fmt: skip
    """Write the signals that token shards stand for as files into ``out``; returns their number.

    A signal's file is named after its key, sub-folders included; the medium's ending is added where the key has
    another. Where keys are alike, as those of variants are, the files are ``name.png``, ``name.2.png``, ...

    Args:
        model: the tokenizer that made them; see :func:`tessella.load`.
        shards: their folder, or one of them.
        out: folder of the files.
        data: what was tokenized, for a tokenizer whose decoder sees more than tokens (UViM's picture); by default what
            it was trained on.
        limit: only the first so many rows.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.

    Raises:
        CheckpointError, DataError: a model that cannot be used, shards of another tokenizer, or damaged ones.
    """
    out = Path(out)
    tokenizer = load(model, device=pick_device(device))
    medium = medium_of(tokenizer)
    written: set[Path] = set()
    rows = itertools.islice(read_tokens(shards, fingerprint(tokenizer)), limit)
    contexts = _contexts(data_of(tokenizer, data)) if tokenizer.autoencoder.takes_context else None
    for row in rows:
        file = _unused(_file_for(out, row.key, medium.suffix), written)
        if contexts is None and len(row.extent) == 1 and len(row.indices) > _MOST_POSITIONS:
            medium.write_pieces(_pieces(tokenizer, row), file)
        else:
            medium.write(_signal(tokenizer, row, contexts), file)
        written.add(file)
    return len(written)


def _signal(tokenizer: Tokenizer, row: TokenRow, contexts: Iterator[tuple[str, Tensor]] | None) -> Tensor:
    """``[C, *X]`` in [-1, 1]."""
    indices, context = row.indices[None].to(tokenizer.device), None
    if contexts is not None:
        # Rows are in the data's order, so one pass over it meets them all.
        found = next((context for key, context in contexts if key == row.key), None)
        if found is None:
            raise DataError(f"the data has no '{row.key}', which the decoder needs beside its tokens; see --data")
        context = found[None].to(tokenizer.device)
    return tokenizer.decode(indices, context, extent=row.extent)[0].cpu()


def _pieces(tokenizer: Tokenizer, row: TokenRow) -> Iterator[Tensor]:
    """The same ``[C, T']`` at a time."""
    (left,) = row.extent
    for x_hat in tokenizer.stream().decode([row.indices[None].to(tokenizer.device)]):
        yield x_hat[0, :, :left].cpu()
        left -= min(left, x_hat.shape[-1])


def _contexts(section: Spec) -> Iterator[tuple[str, Tensor]]:
    """Key and context of every sample, training and held-out ones alike."""
    for split in get_args(Split):
        for batch in evaluation_batches(open_data(section, split), batch_size=1):
            yield batch["key"][0], batch["context"][0]


def _file_for(out: Path, key: str, suffix: str) -> Path:
    """A file below ``out`` for a key of any form: keys come from shards, which may be anybody's."""
    relative = Path(key.replace(":", "_"))
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise DataError(f"key {key!r} leads out of the folder {out}")
    # Another ending stays: a.jpg and a.png are two signals.
    return out / (relative if relative.suffix == suffix else relative.with_name(f"{relative.name}{suffix}"))


def _unused(file: Path, used: Collection[Path]) -> Path:
    """``name.png``, or the first of ``name.2.png``, ``name.3.png``, ... that is not among ``used``."""
    numbered = (file.with_stem(f"{file.stem}.{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([file], numbered) if name not in used)
