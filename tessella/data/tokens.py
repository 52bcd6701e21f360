"""Parquet shards of tokens: what a tokenizer makes of a data set, kept with the name of the tokenizer that made it.

A folder holds ``tokens-00000.parquet``, ... and ``tokens.json``, the manifest (format version 2). The manifest names
every shard with its number of rows, its length and SHA-256, and the inputs it was made from; the tokenizer's
fingerprint, V and K; class names, medium, split and source; and what was skipped, with the reason. It carries its own
checksum. A folder without manifest is unfinished. Shards are hashed when they are read, once a process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from tessella.data._errors import DataError
from tessella.data._token_manifest import MANIFEST as MANIFEST
from tessella.data._token_manifest import Manifest as Manifest
from tessella.data._token_manifest import Shard, foreign_shards, parse_manifest, shard_name
from tessella.data._token_manifest import read_manifest as read_manifest
from tessella.data._token_rows import Rows, read_header, read_rows
from tessella.data._token_rows import TokenRow as TokenRow
from tessella.data._token_rows import index_dtype as index_dtype
from tessella.registry import Spec
from tessella.storage import lock_folder, read_sealed, write_sealed
from tessella.tokenizer import TokenSpace

_UNFINISHED = ".unfinished"
_OWN = "own.json"


class TokenWriter:
    """Writes a folder of shards, and last the manifest that names them all: for tokens from a loop of one's own.

    :func:`tessella.tokenization.engine.tokenize_dataset` tokenizes a data set, with any number of processes, and goes
    on where it was interrupted; this class starts anew.

    Rows that follow each other under one key are variants of one picture: its crops.

    Columns: ``key`` string; ``label`` int64; ``extent`` and ``grid`` lists of int32, the grid being S; ``indices``, the
    row-major list of S x K integers in the smallest unsigned type that holds them. The schema's metadata holds the
    columns' version, the tokenizer's fingerprint, V and K.

    A context manager. Shards grow in a hidden sub-folder and take their final names when the block ends without an
    exception; until then earlier shards in the folder stay as they were, afterwards they are gone.

    Args:
        folder: made where missing.
        space: the tokenizer's; its grid has no part, since every row has its own.
        shard_rows: rows a file.
        class_names: what the labels are called; kept in ``tokens.json``.
        medium: what the signals are, as the recipe's ``[medium]``.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: ``folder`` is a file, or ``shard_rows`` below 1.
        DataError: ``folder`` holds ``tokens-*.parquet`` that its manifest does not name.
        StorageError: another process writes into it, when the block begins.
    """

    def __init__(
        self, folder: str | Path, space: TokenSpace, *, shard_rows: int = 10_000, class_names: Sequence[str] = (),
        medium: Spec | None = None,
    ) -> None:  # fmt: skip
        if shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder {str(folder)!r} is a file")
        self.space = TokenSpace((), space.num_codebooks, space.codebook_size, space.fingerprint)
        self.shard_rows = shard_rows
        self.class_names = tuple(class_names)
        self.medium = medium or {"name": "image"}
        self._rows = Rows(self.space)
        self._lock = lock_folder(self.folder, what="writing tokens")
        self._shards: list[Shard] = []
        refuse_foreign(self.folder, _own_shards(self.folder))

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
            DataError: indices outside [0, V); a key, a grid or an extent that cannot be read back.
        """
        self._rows.add(key, label, indices, extent)
        if len(self._rows) == self.shard_rows:
            self._flush()

    def __enter__(self) -> Self:
        """Be the folder's one writer, and clear what an interrupted one left behind."""
        self._lock.__enter__()
        self._unfinished.mkdir(parents=True, exist_ok=True)
        self._clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the shards their names, or after an exception remove them."""
        try:
            if kind is None:
                self._publish()
                (self._unfinished / _OWN).unlink()
        finally:
            self._clear()
            if not (self._unfinished / _OWN).exists():
                self._unfinished.rmdir()
            self._lock.__exit__(kind, error, traceback)

    @property
    def _unfinished(self) -> Path:
        return self.folder / _UNFINISHED

    def _clear(self) -> None:
        for file in self._unfinished.glob("tokens-*.parquet"):
            file.unlink()

    def _flush(self) -> None:
        data, name = self._rows.to_bytes(), shard_name(len(self._shards))
        (self._unfinished / name).write_bytes(data)
        self._shards.append(Shard(name, len(self._rows), len(data), hashlib.sha256(data).hexdigest()))
        self._rows = Rows(self.space)

    def _publish(self) -> None:
        if len(self._rows) or not self._shards:
            self._flush()
        # From here to the last line the folder has no manifest: interrupted in between, it is known to be incomplete,
        # and the list says which of its files the next writer may replace.
        old = _own_shards(self.folder)
        own = sorted(old | {shard.name for shard in self._shards})
        write_sealed(self._unfinished / _OWN, {"shards": own})
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for name in old:
            (self.folder / name).unlink(missing_ok=True)
        for shard in self._shards:
            (self._unfinished / shard.name).replace(self.folder / shard.name)
        Manifest(self.space, tuple(self._shards), self.class_names, self.medium).write(self.folder)


def refuse_foreign(folder: Path, own: set[str]) -> None:
    """Raise DataError where ``folder`` holds files called as shards that are not among ``own``: they are not ours."""
    if foreign := foreign_shards(folder, own):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise DataError(
            f"{folder} holds {foreign[0]}{more}, which no {MANIFEST} there names: choose another folder, or move them"
        )


def _own_shards(folder: Path) -> set[str]:
    """The names that the manifest of ``folder`` gives, or an interrupted writer there left; none without either."""
    own: set[str] = set()
    if (folder / MANIFEST).is_file():
        own |= {shard.name for shard in parse_manifest(folder).shards}
    if (folder / _UNFINISHED / _OWN).is_file():
        own |= set(read_sealed(folder / _UNFINISHED / _OWN)["shards"])
    return own


def read_tokens(path: str | Path, expect_fingerprint: str | None = None) -> Iterator[TokenRow]:
    """The rows of a folder of shards, in the order they were written; or those of one shard.

    A shard is hashed before its first row is given.

    Args:
        path: the folder, or one of its files.
        expect_fingerprint: that of the tokenizer that is to decode them; None takes any.

    Raises:
        ImportError: pyarrow is not installed.
        DataError: nothing there, an incomplete folder, a file that is no token shard or is damaged, another tokenizer's
            tokens; while iterating, bytes that are not those that were written, indices outside [0, V), a grid that
            does not match their number, or a row whose key, grid or extent is none.
    """
    folder, shards, space = _contents(Path(path))
    if expect_fingerprint is not None and space.fingerprint != expect_fingerprint:
        raise DataError(
            f"{folder / shards[0].name} holds tokens of tokenizer {space.fingerprint}, not of {expect_fingerprint}"
        )
    return (row for shard in shards for row in read_rows(folder, shard, space))


def read_token_space(path: str | Path) -> TokenSpace:
    """K, V and fingerprint of the tokens in ``path``; the grid is empty.

    Raises:
        ImportError: pyarrow is not installed.
        DataError: as for :func:`read_tokens`.
    """
    return _contents(Path(path))[2]


def _contents(path: Path) -> tuple[Path, tuple[Shard, ...], TokenSpace]:
    """Folder, shards and space of what is read: a whole folder, or one of its files."""
    if path.is_file():
        folder = path.parent
        listed = read_manifest(folder).shards if (folder / MANIFEST).is_file() else ()
        # A file on its own has no checksum beside those of its pages.
        shard = next((shard for shard in listed if shard.name == path.name), Shard(path.name))
        return folder, (shard,), read_header(path)
    manifest = read_manifest(path)
    if not manifest.shards:
        raise DataError(f"{path / MANIFEST} names no shard")
    if manifest.space is not None:
        return path, manifest.shards, manifest.space
    first, *others = [read_header(path / shard.name) for shard in manifest.shards]
    for shard, space in zip(manifest.shards[1:], others, strict=True):
        if space != first:
            raise DataError(
                f"{path / shard.name} holds tokens of tokenizer {space.fingerprint}, {manifest.shards[0].name} those "
                f"of {first.fingerprint}"
            )
    return path, manifest.shards, first
