"""Pictures in Parquet files, as the Hugging Face hub lays them out."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from tessella.data._errors import DataError, UnreadableImage
from tessella.data._pixels import BitDepth
from tessella.data._rows import Row, RowFile
from tessella.data._splits import TEST_NAMES, TRAIN_NAME, check_share, find_test_name, held_out_part
from tessella.data.base import UNKNOWN_LABEL, ImageDataset, Picture, Split
from tessella.extras import require
from tessella.text import name_to_text

# Sets of more are not held in memory by every process that reads them.
_IN_MEMORY_BYTES = 256 * 2**20

_LARGEST_LABEL = 2**63 - 1
_BUFFER_BYTES = 2**20
_BATCH_ROWS = 32


class Parquet(ImageDataset):
    """The rows of a Parquet file, or of a folder's ``{train,test,val,valid,validation}-*.parquet``.

    ``image`` is a column of encoded bytes or of ``struct{bytes, path}``, ``label`` one of integers. The class names are
    those in the schema's metadata: under ``class_names``, one a line, or of the label's ClassLabel under
    ``huggingface``. Where no file is for test, a share of the training rows is held out instead, picked by a hash of
    the key.

    Bytes must be bytes: a column of paths is refused, and so is ``path`` in the struct, whatever it leads to.

    Of up to 256 MiB of pictures each process that reads keeps the encoded bytes in memory. Larger sets are copied once,
    uncompressed, into a hidden file beside each Parquet file, which gives any row without reading those before it: see
    :class:`tessella.data._rows.RowFile`.

    Args:
        path: the file or the folder.
        split: "train" or "test".
        crop_px: side of the square crop in pixels; None keeps whole pictures.
        resize_px: length in pixels that the shorter side is brought to first.
        flip: in training, mirror half of the pictures left to right.
        channels: 1 grey, 3 RGB, 4 RGBA, or any other number; what becomes of pictures with others says
            :func:`~tessella.data.decode.decode`.
        bit_depth: 8, or 16 to keep the levels of 16-bit pictures.
        held_out: the share of rows held out where no file separates them; 1 for all.
        image_column: its name.
        label_column: its name; None is "label" where there is one, and label -1 otherwise.

    Raises:
        ImportError: pyarrow is not installed.
        DataError: no such file, one that is not Parquet or damaged, no such column or two of its name, one of another
            kind, or no row for this split.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: Split,
        crop_px: int | None = None,
        resize_px: int | None = None,
        flip: bool = False,
        channels: int = 3,
        bit_depth: BitDepth = 8,
        held_out: float = 0.05,
        image_column: str = "image",
        label_column: str | None = None,
    ) -> None:
        super().__init__(
            split=split, crop_px=crop_px, resize_px=resize_px, flip=flip, channels=channels, bit_depth=bit_depth
        )
        check_share(held_out)
        files, separate = _files_of_split(Path(path), split)
        self._files = files
        base = Path(path) if Path(path).is_dir() else Path(path).parent
        layouts = [_layout(file, image_column, label_column) for file in files]
        for file, layout in zip(files, layouts, strict=True):
            if layout.columns != layouts[0].columns or layout.class_names != layouts[0].class_names:
                raise DataError(f"{file} and {files[0]} differ in their columns or class names")
        self.class_names = layouts[0].class_names
        self._columns = layouts[0].columns
        self._names = [name_to_text(file.relative_to(base).as_posix()) for file in files]
        self._starts = [0, *accumulate(layout.num_rows for layout in layouts)]
        num_rows = self._starts.pop()
        if num_rows == 0:
            raise DataError(f"no row in {', '.join(map(str, files))}")
        keys = None if separate else [self._key(row) for row in range(num_rows)]
        self._rows = range(num_rows) if keys is None else held_out_part(keys, split, held_out)
        readers = [partial(_read_rows, file, self._columns) for file in files]
        self._large = sum(layout.num_bytes for layout in layouts) > _IN_MEMORY_BYTES
        self._files_of_rows = [RowFile(file, read) for file, read in zip(files, readers, strict=True)]
        self._in_memory: list[Row] | None = None

    def __len__(self) -> int:
        """The number of rows in this split."""
        return len(self._rows)

    def read(self, index: int) -> Picture:
        """The row's picture, its label, and "file.parquet:row" as the key."""
        row = self._rows[index]
        key = self._key(row)
        data, label = self._row(row)
        if data is None:
            raise UnreadableImage(key, "the row holds no bytes")
        if label < UNKNOWN_LABEL or (self.class_names and label >= len(self.class_names)):
            raise DataError(f"{key}: label {label} is none of the {len(self.class_names)} classes, nor -1 for unknown")
        return Picture(self.decode(data, key), label, key)

    def sources(self) -> Iterable[Path]:
        """The Parquet files."""
        return self._files

    def _row(self, row: int) -> Row:
        if self._large:
            file = bisect_right(self._starts, row) - 1
            return self._files_of_rows[file].row(row - self._starts[file])
        if self._in_memory is None:
            self._in_memory = [row for file in self._files for row in _read_rows(file, self._columns)]
        return self._in_memory[row]

    def _key(self, row: int) -> str:
        file = bisect_right(self._starts, row) - 1
        return f"{self._names[file]}:{row - self._starts[file]}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the bytes: a worker process reads the files itself."""
        return {**self.__dict__, "_in_memory": None}


class _Columns(NamedTuple):
    image: str  # the leaf that holds the encoded bytes: "image", or "image.bytes"
    label: str | None


class _Layout(NamedTuple):
    columns: _Columns
    class_names: tuple[str, ...]
    num_rows: int
    num_bytes: int  # of the pictures, uncompressed


def _files_of_split(path: Path, split: Split) -> tuple[list[Path], bool]:
    """The files that hold ``split``, in order, and whether they hold nothing else."""
    if path.is_file():
        return [path], False
    if not path.is_dir():
        raise DataError(f"path {str(path)!r} does not exist; give a Parquet file, or a folder of them")
    found = _parquet_files(path) or _parquet_files(path / "data")
    if not found:
        raise DataError(f"path {str(path)!r} holds no file ending in .parquet")
    by_split: dict[str, list[Path]] = {}
    for file in found:
        name = re.split(r"[-.]", file.name)[0]
        by_split.setdefault(name if name in (TRAIN_NAME, *TEST_NAMES) else "", []).append(file)
    test_name = find_test_name(by_split)
    if test_name is None:
        return by_split.get(TRAIN_NAME, found), False
    name = TRAIN_NAME if split == "train" else test_name
    if name not in by_split:
        raise DataError(f"path {str(path)!r} holds {test_name}-*.parquet and no {name}-*.parquet")
    return by_split[name], True


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.parquet") if file.is_file())


def _layout(file: Path, image_column: str, label_column: str | None) -> _Layout:
    """What the file's footer says, checked."""
    pa, pq = require("pyarrow", extra="data"), require("pyarrow.parquet", extra="data")
    try:
        with pq.ParquetFile(file) as opened:
            schema, footer = opened.schema_arrow, opened.metadata
            names = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} is not a Parquet file, or not a whole one: {error}") from None
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in names:
            raise DataError(f"{file} has no {argument} {column!r}; its columns: {', '.join(names)}")
    label = label_column or ("label" if "label" in names else None)
    for column in (image_column, label):
        if names.count(column) > 1:
            raise DataError(f"{file} has {names.count(column)} columns {column!r}")
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{file}: column {label!r} must hold integers, not {schema.field(label).type}")
    columns = _Columns(_bytes_leaf(file, schema.field(image_column)), label)
    try:
        class_names = _class_names(schema.metadata or {}, label)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{file}: the class names in its metadata cannot be read: {error}") from error
    return _Layout(columns, class_names, footer.num_rows, _num_bytes(footer, columns.image))


def _bytes_leaf(file: Path, field: Any) -> str:
    types = require("pyarrow", extra="data").types
    kind, name = field.type, str(field.name)
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # -1 also where there are two
        name, kind = f"{name}.bytes", kind.field("bytes").type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return name
    raise DataError(f"{file}: column {name!r} must hold bytes, or a struct with 'bytes', not {kind}")


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """Those of the label, as the metadata have them.

    Raises:
        ValueError, AttributeError, TypeError: they have them in a form of their own.
    """
    if label is None:
        return ()
    if b"class_names" in metadata:
        return tuple(metadata[b"class_names"].decode().splitlines())
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(label, {}).get("names", ())
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names {str(names)[:100]}")
    return tuple(names)


def _num_bytes(footer: Any, leaf: str) -> int:
    """Of one column in all row groups, uncompressed."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == leaf)


def _read_rows(file: Path, columns: _Columns) -> Iterator[Row]:
    """Each row's bytes and label, with a few rows in memory at a time.

    Raises:
        DataError: the file is damaged.
    """
    pa, pq = require("pyarrow", extra="data"), require("pyarrow.parquet", extra="data")
    names = [name for name in columns if name is not None]
    try:
        # Without a buffer of its own pyarrow would hold all of a row group's column; with threads, several.
        with pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as opened:
            for batch in opened.iter_batches(batch_size=_BATCH_ROWS, columns=names, use_threads=False):
                table = pa.Table.from_batches([batch]).flatten()  # a leaf is named "image.bytes"
                images = table[columns.image]
                labels = [UNKNOWN_LABEL] * len(images) if columns.label is None else table[columns.label].to_pylist()
                for image, label in zip(images, labels, strict=True):
                    if label is not None and label > _LARGEST_LABEL:
                        raise DataError(f"{file}: label {label} does not fit into 64 bits with a sign")
                    yield image.as_py(), UNKNOWN_LABEL if label is None else label
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    finally:
        pa.default_memory_pool().release_unused()  # a page, which may hold a thousand pictures
