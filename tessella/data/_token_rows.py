"""One Parquet shard of tokens: its columns, writing it whole, reading it with every row checked."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessella.data._errors import DataError
from tessella.data._token_manifest import FORMAT, Shard
from tessella.extras import require
from tessella.tokenizer import TokenSpace

# Of the columns, which have not changed since the first.
_VERSION = 1

# A key becomes a file name, with an ending and perhaps a number behind it: file systems take 255 bytes for a name.
_MAX_NAME_BYTES = 240
_MAX_KEY_BYTES = 4000
_MAX_SIDE = 2**31 - 1  # as the columns hold it


@dataclass(frozen=True)
class TokenRow:
    """The tokens of one signal.

    Attributes:
        key: the signal's name in its data set.
        label: its class, -1 where unknown.
        extent: its size along each axis, before it was padded: (H, W) of a picture, in pixels.
        indices: ``[*S, K]`` int64.
    """

    key: str
    label: int
    extent: tuple[int, ...]
    indices: Tensor


class Rows:
    """Rows of a shard that is being made; :meth:`to_bytes` is the file.

    Args:
        space: the tokenizer's.

    Raises:
        ImportError: pyarrow is not installed.
    """

    def __init__(self, space: TokenSpace) -> None:
        self.space = space
        self._schema = _schema(space)
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._dtype = index_dtype(space.codebook_size)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._columns["key"])

    def add(self, key: str, label: int, indices: Tensor, extent: Sequence[int]) -> None:
        """Add a row, if it can be read back.

        Args:
            key: the signal's name; bytes in it that are no UTF-8 are written out.
            label: its class, -1 where unknown.
            indices: ``[*S, K]`` integers in [0, V).
            extent: the signal's size along each axis.

        Raises:
            TypeError: indices that are no integers.
            ValueError: indices of another K.
            DataError: indices outside [0, V); a key that is no name, a grid or an extent that is none.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"{key}: indices must be integers, got {indices.dtype}")
        if indices.ndim < 1 or indices.shape[-1] != self.space.num_codebooks:
            raise ValueError(
                f"{key}: indices must be [*S, {self.space.num_codebooks}], got shape {list(indices.shape)}"
            )
        key = key.encode("utf-8", "backslashreplace").decode()
        tokens = indices.detach().cpu().numpy().reshape(-1)
        grid = list(indices.shape[:-1])
        if (reason := flaw_of(key, grid, extent)) is not None:
            raise DataError(f"{key!r} cannot be written: {reason}")
        check_range(tokens, self.space.codebook_size, key)
        row = {
            "key": key,
            "label": label,
            "extent": list(extent),
            "grid": grid,
            "indices": tokens.astype(self._dtype),
        }
        for name, value in row.items():
            self._columns[name].append(value)

    def to_bytes(self) -> bytes:
        """The shard's file; the same rows give the same bytes."""
        pa, pq = require("pyarrow", extra="data"), require("pyarrow.parquet", extra="data")
        table = pa.table(self._columns, schema=self._schema)
        target = io.BytesIO()
        pq.write_table(table, target, compression="zstd", write_page_checksum=True)
        return target.getvalue()


def flaw_of(key: str, grid: Sequence[int], extent: Sequence[int]) -> str | None:
    """What is wrong with a row that nothing could be made of; None where nothing is."""
    names = key.split("/")
    if not key or "\0" in key or "." in names or ".." in names:
        return "its key is no name of a signal"
    if max(len(name.encode("utf-8", "replace")) for name in names) > _MAX_NAME_BYTES or len(key) > _MAX_KEY_BYTES:
        return f"its key has {len(key)} characters; at most {_MAX_NAME_BYTES} bytes a name make a file"
    for what, sizes in (("grid", grid), ("extent", extent)):
        if not sizes or min(sizes) < 1 or max(sizes) > _MAX_SIDE:
            return f"its {what} is {list(sizes)}; every side must be at least 1 and at most {_MAX_SIDE}"
    if len(extent) < len(grid):
        return f"its extent {list(extent)} has fewer axes than its grid {list(grid)}"
    return None


def read_rows(folder: Path, shard: Shard, space: TokenSpace) -> Iterator[TokenRow]:
    """The rows of a shard, which is hashed first and must hold as many as its manifest says.

    Raises:
        DataError: see :func:`tessella.data.tokens.read_tokens`.
    """
    pq = require("pyarrow.parquet", extra="data")
    file = folder / shard.name
    shard.check_bytes(folder)
    found = read_header(file)
    if found != space:
        raise DataError(f"{file} holds tokens of tokenizer {found.fingerprint}, not of {space.fingerprint}")
    num_rows = 0
    with _named(file), pq.ParquetFile(file, page_checksum_verification=True) as opened:
        for batch in opened.iter_batches(batch_size=1000, use_threads=False):
            keys, labels = batch["key"].to_pylist(), batch["label"].to_pylist()
            extents, grids = batch["extent"].to_pylist(), batch["grid"].to_pylist()
            for key, label, extent, grid, row in zip(keys, labels, extents, grids, batch["indices"], strict=True):
                tokens = row.values.to_numpy()
                if (reason := flaw_of(key, grid, extent)) is not None:
                    raise DataError(f"{file}, {key!r}: {reason}")
                shape = (*grid, space.num_codebooks)
                if math.prod(shape) != len(tokens):
                    raise DataError(f"{file}, {key}: {len(tokens)} indices do not fill grid x K = {list(shape)}")
                check_range(tokens, space.codebook_size, f"{file}, {key}")
                indices = torch.from_numpy(tokens.astype(np.int64)).reshape(shape)
                yield TokenRow(key, label, tuple(extent), indices)
                num_rows += 1
    if shard.num_rows is not None and num_rows != shard.num_rows:
        raise DataError(f"{file} holds {num_rows} rows; its manifest says {shard.num_rows}")


def read_header(file: Path) -> TokenSpace:
    """K, V and fingerprint, as the file's footer says them.

    Raises:
        DataError: no token shard, or a damaged one.
    """
    pq = require("pyarrow.parquet", extra="data")
    with _named(file), pq.ParquetFile(file) as opened:
        schema = opened.schema_arrow
    try:
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if metadata.get("format") != FORMAT:
            raise DataError(f"{file} is no token shard: a Parquet file with columns {', '.join(schema.names)}")
        if metadata.get("version") != str(_VERSION):
            raise DataError(f"{file} is of version {metadata.get('version')}; read is version {_VERSION}")
        space = TokenSpace(
            grid=(),
            num_codebooks=int(metadata["num_codebooks"]),
            codebook_size=int(metadata["codebook_size"]),
            fingerprint=metadata["tokenizer_fingerprint"],
        )
    except (KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: damaged metadata: {error!r}") from error
    if not schema.equals(_schema(space)):
        raise DataError(f"{file} is no token shard: its columns are {schema.to_string(show_schema_metadata=False)}")
    return space


def _schema(space: TokenSpace) -> Any:
    pa = require("pyarrow", extra="data")
    metadata = {
        "format": FORMAT,
        "version": str(_VERSION),
        "tokenizer_fingerprint": space.fingerprint,
        "codebook_size": str(space.codebook_size),
        "num_codebooks": str(space.num_codebooks),
    }
    columns = {
        "key": pa.string(),
        "label": pa.int64(),
        "extent": pa.list_(pa.int32()),
        "grid": pa.list_(pa.int32()),
        "indices": pa.list_(pa.from_numpy_dtype(index_dtype(space.codebook_size))),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()], metadata=metadata)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of the reader as ones that name the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no Parquet file, or not a whole one: {error}") from error


def check_range(tokens: np.ndarray[Any, Any], codebook_size: int, where: str) -> None:
    """Raise DataError unless all ``tokens`` are in [0, V)."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < codebook_size):
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(f"{where}: index {wrong} is outside [0, {codebook_size})")


def index_dtype(codebook_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds [0, V)."""
    return np.min_scalar_type(codebook_size - 1)
