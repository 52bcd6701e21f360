"""Parquet shards of tokens: what a tokenizer makes of a data set, kept with the name of the tokenizer that made it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tessella.data._errors import DataError
from tessella.extras import require
from tessella.storage import write_text
from tessella.tokenizer import TokenSpace

MANIFEST = "tokens.json"
_FORMAT, _VERSION = "tessella-tokens", 1
_UNFINISHED = ".unfinished"


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


class TokenWriter:
    """Writes a folder of shards ``tokens-00000.parquet``, ..., and last ``tokens.json``, which names them all.

    Rows that follow each other under one key are variants of one picture: its crops.

    Columns: ``key`` string; ``label`` int64; ``extent`` and ``grid`` lists of int32, the grid being S; ``indices``, the
    row-major list of S x K integers in the smallest unsigned type that holds them. The schema's metadata holds the
    format's version, the tokenizer's fingerprint, V and K.

    A context manager. Shards grow in a hidden sub-folder and take their final names when the block ends without an
    exception; until then earlier shards in the folder stay as they were, afterwards they are gone. A folder without
    ``tokens.json`` is incomplete. One writer at a time.

    Args:
        folder: made where missing.
        space: the tokenizer's; its grid has no part, since every row has its own.
        shard_rows: rows a file.
        class_names: what the labels are called; kept in ``tokens.json``.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: ``folder`` is a file, or ``shard_rows`` below 1.
    """

    def __init__(
        self, folder: str | Path, space: TokenSpace, *, shard_rows: int = 10_000, class_names: Sequence[str] = ()
    ) -> None:
        if shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder {str(folder)!r} is a file")
        self.space = space
        self.shard_rows = shard_rows
        self.class_names = list(class_names)
        self._schema = _schema(space)
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._shards: list[str] = []

    def write(self, *, key: str, label: int, indices: Tensor, extent: Sequence[int]) -> None:
        """Add a row.

        Args:
            key: the signal's name.
            label: its class, -1 where unknown.
            indices: ``[*S, K]`` integers in [0, V).
            extent: the signal's size along each axis.

        Raises:
            TypeError: indices that are no integers.
            ValueError: indices of another K.
            DataError: indices outside [0, V).
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"{key}: indices must be integers, got {indices.dtype}")
        if indices.ndim < 1 or indices.shape[-1] != self.space.num_codebooks:
            raise ValueError(
                f"{key}: indices must be [*S, {self.space.num_codebooks}], got shape {list(indices.shape)}"
            )
        tokens = indices.detach().cpu().numpy().reshape(-1)
        _check_range(tokens, self.space.codebook_size, f"{key}")
        row = {
            "key": key,
            "label": label,
            "extent": list(extent),
            "grid": list(indices.shape[:-1]),
            "indices": tokens.astype(index_dtype(self.space.codebook_size)),
        }
        for name, value in row.items():
            self._columns[name].append(value)
        if len(self._columns["key"]) == self.shard_rows:
            self._flush()

    def __enter__(self) -> Self:
        """Clear what an interrupted writer left behind."""
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the shards their names, or after an exception remove them."""
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._unfinished)

    @property
    def _unfinished(self) -> Path:
        return self.folder / _UNFINISHED

    def _flush(self) -> None:
        pa, pq = require("pyarrow", extra="data"), require("pyarrow.parquet", extra="data")
        name = f"tokens-{len(self._shards):05d}.parquet"
        table = pa.table(self._columns, schema=self._schema)
        pq.write_table(table, self._unfinished / name, compression="zstd", write_page_checksum=True)
        self._shards.append(name)
        self._columns = {column: [] for column in self._columns}

    def _publish(self) -> None:
        if self._columns["key"] or not self._shards:
            self._flush()
        # From here to the last line the folder has no manifest: interrupted in between, it is known to be incomplete.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for old in self.folder.glob("tokens-*.parquet"):
            old.unlink()
        for name in self._shards:
            (self._unfinished / name).replace(self.folder / name)
        manifest = {"format": _FORMAT, "version": _VERSION, "shards": self._shards, "class_names": self.class_names}
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_tokens(path: str | Path, expect_fingerprint: str | None = None) -> Iterator[TokenRow]:
    """The rows of a folder of shards, in the order they were written; or those of one shard.

    Args:
        path: the folder, or one of its files.
        expect_fingerprint: that of the tokenizer that is to decode them; None takes any.

    Raises:
        ImportError: pyarrow is not installed.
        DataError: nothing there, an incomplete folder, a file that is no token shard or is damaged, another tokenizer's
            tokens; while iterating, indices outside [0, V), or a grid that does not match their number.
    """
    space = read_token_space(path)
    if expect_fingerprint is not None and space.fingerprint != expect_fingerprint:
        raise DataError(
            f"{_shards(Path(path))[0]} holds tokens of tokenizer {space.fingerprint}, not of {expect_fingerprint}"
        )
    return (row for shard in _shards(Path(path)) for row in _rows(shard, space))


def read_token_space(path: str | Path) -> TokenSpace:
    """K, V and fingerprint of the tokens in ``path``, once every shard's header has been checked; the grid is empty.

    Raises:
        ImportError: pyarrow is not installed.
        DataError: as for :func:`read_tokens`.
    """
    first, *others = shards = _shards(Path(path))
    spaces = [_read_header(shard) for shard in shards]
    for shard, space in zip(others, spaces[1:], strict=True):
        if space != spaces[0]:
            raise DataError(
                f"{shard} holds tokens of tokenizer {space.fingerprint}, {first.name} those of {spaces[0].fingerprint}"
            )
    return spaces[0]


def read_class_names(folder: Path) -> tuple[str, ...]:
    """What the labels in a folder of shards are called; empty where that is unknown."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return tuple(manifest.get("class_names", ()))


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"no tokens at {path}: neither a folder of token shards nor one of them")
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path} has no {MANIFEST}: it holds no tokens, or the run that wrote them was interrupted")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["version"]) != (_FORMAT, _VERSION):
            raise DataError(
                f"{path / MANIFEST} is of format {manifest['format']!r}, version {manifest['version']!r}; "
                f"read are {_FORMAT!r}, version {_VERSION}"
            )
        shards = [path / name for name in manifest["shards"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path / MANIFEST} is damaged: {error!r}") from error
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard} is missing, which {MANIFEST} names")
    return shards


def _schema(space: TokenSpace) -> Any:
    pa = require("pyarrow", extra="data")
    metadata = {
        "format": _FORMAT,
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


def _read_header(shard: Path) -> TokenSpace:
    pq = require("pyarrow.parquet", extra="data")
    with _named(shard), pq.ParquetFile(shard) as opened:
        schema = opened.schema_arrow
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if metadata.get("format") != _FORMAT:
        raise DataError(f"{shard} is no token shard: a Parquet file with columns {', '.join(schema.names)}")
    if metadata.get("version") != str(_VERSION):
        raise DataError(f"{shard} is of version {metadata.get('version')}; read is version {_VERSION}")
    try:
        space = TokenSpace(
            grid=(),
            num_codebooks=int(metadata["num_codebooks"]),
            codebook_size=int(metadata["codebook_size"]),
            fingerprint=metadata["tokenizer_fingerprint"],
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"{shard}: damaged metadata: {error!r}") from error
    if not schema.equals(_schema(space)):
        raise DataError(f"{shard} is no token shard: its columns are {schema.to_string(show_schema_metadata=False)}")
    return space


def _rows(shard: Path, space: TokenSpace) -> Iterator[TokenRow]:
    pq = require("pyarrow.parquet", extra="data")
    with _named(shard), pq.ParquetFile(shard, page_checksum_verification=True) as opened:
        for batch in opened.iter_batches(batch_size=1000, use_threads=False):
            keys, labels = batch["key"].to_pylist(), batch["label"].to_pylist()
            extents, grids = batch["extent"].to_pylist(), batch["grid"].to_pylist()
            for key, label, extent, grid, row in zip(keys, labels, extents, grids, batch["indices"], strict=True):
                tokens = row.values.to_numpy()
                shape = (*grid, space.num_codebooks)
                if math.prod(shape) != len(tokens):
                    raise DataError(f"{shard}, {key}: {len(tokens)} indices do not fill grid x K = {list(shape)}")
                _check_range(tokens, space.codebook_size, f"{shard}, {key}")
                indices = torch.from_numpy(tokens.astype(np.int64)).reshape(shape)
                yield TokenRow(key, label, tuple(extent), indices)


@contextmanager
def _named(shard: Path) -> Iterator[None]:
    """Errors of the reader as ones that name the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shard} is no Parquet file, or not a whole one: {error}") from error


def _check_range(tokens: np.ndarray[Any, Any], codebook_size: int, where: str) -> None:
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < codebook_size):
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(f"{where}: index {wrong} is outside [0, {codebook_size})")


def index_dtype(codebook_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds [0, V)."""
    return np.min_scalar_type(codebook_size - 1)
