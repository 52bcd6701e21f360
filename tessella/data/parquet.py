"""Pictures in Parquet files, as the Hugging Face hub lays them out."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

from tessella.data._errors import DataError, UnreadableImage
from tessella.data._pixels import BitDepth
from tessella.data._splits import TEST_NAMES, TRAIN_NAME, check_share, find_test_name, held_out_part
from tessella.data.base import UNKNOWN_LABEL, ImageDataset, Picture, Split
from tessella.extras import require


class Parquet(ImageDataset):
    """The rows of a Parquet file, or of a folder's ``{train,test,val,valid,validation}-*.parquet``.

    ``image`` is a column of encoded bytes or of ``struct{bytes, path}``, ``label`` one of integers. The class names are
    those in the schema's metadata: under ``class_names``, one a line, or of the label's ClassLabel under
    ``huggingface``. Where no file is for test, a share of the training rows is held out instead, picked by a hash of
    the key.

    Each process that reads keeps the encoded bytes of its split in memory, and decodes what is asked for. For sets
    larger than memory :class:`tessella.data.hub.Hub` maps files instead.

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
        ValueError: no such file, not Parquet, no such column, no row for this split, or an argument out of its range.
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
        self._base = Path(path) if Path(path).is_dir() else Path(path).parent
        layouts = [_layout(file, image_column, label_column) for file in files]
        for file, layout in zip(files, layouts, strict=True):
            if layout.columns != layouts[0].columns or layout.class_names != layouts[0].class_names:
                raise DataError(f"{file} and {files[0]} differ in their columns or class names")
        self.class_names = layouts[0].class_names
        self._columns = layouts[0].columns
        self._starts = [sum(layout.num_rows for layout in layouts[:i]) for i in range(len(layouts))]
        num_rows = sum(layout.num_rows for layout in layouts)
        if num_rows == 0:
            raise DataError(f"no row in {', '.join(map(str, files))}")
        keys = None if separate else [self._key(row) for row in range(num_rows)]
        self._rows = range(num_rows) if keys is None else held_out_part(keys, split, held_out)
        self._table: Any = None

    def __len__(self) -> int:
        """The number of rows in this split."""
        return len(self._rows)

    def read(self, index: int) -> Picture:
        """The row's picture, its label, and "file.parquet:row" as the key."""
        if self._table is None:
            self._table = _read_columns(self._files, self._columns)
        row = self._rows[index]
        key = self._key(row)
        data = self._table[self._columns.image][row].as_py()
        if data is None:
            raise UnreadableImage(key, "the row holds no bytes")
        return Picture(self.decode(data, key), self._label(row, key), key)

    def _label(self, row: int, key: str) -> int:
        if self._columns.label is None:
            return UNKNOWN_LABEL
        label = self._table[self._columns.label][row].as_py()
        if label is None:
            return UNKNOWN_LABEL
        if label < UNKNOWN_LABEL or (self.class_names and label >= len(self.class_names)):
            raise DataError(f"{key}: label {label} is none of the {len(self.class_names)} classes, nor -1 for unknown")
        return int(label)

    def _key(self, row: int) -> str:
        file = bisect_right(self._starts, row) - 1
        return f"{self._files[file].relative_to(self._base).as_posix()}:{row - self._starts[file]}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the bytes: a worker process reads the files itself."""
        return {**self.__dict__, "_table": None}


class _Columns(NamedTuple):
    image: str  # the leaf that holds the encoded bytes: "image", or "image.bytes"
    label: str | None


class _Layout(NamedTuple):
    columns: _Columns
    class_names: tuple[str, ...]
    num_rows: int


def _files_of_split(path: Path, split: Split) -> tuple[list[Path], bool]:
    """The files that hold ``split``, in order, and whether they hold nothing else."""
    if path.is_file():
        return [path], False
    if not path.is_dir():
        raise DataError(f"path {str(path)!r} does not exist; give a Parquet file, or a folder of them")
    found = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
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


def _layout(file: Path, image_column: str, label_column: str | None) -> _Layout:
    """What the file's footer says, checked."""
    pa, pq = require("pyarrow", extra="data"), require("pyarrow.parquet", extra="data")
    try:
        with pq.ParquetFile(file) as opened:
            schema, num_rows = opened.schema_arrow, opened.metadata.num_rows
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is not a Parquet file, or not a whole one: {error}") from None
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in schema.names:
            raise ValueError(f"{file} has no {argument} {column!r}; its columns: {', '.join(schema.names)}")
    label = label_column or ("label" if "label" in schema.names else None)
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{file}: column {label!r} must hold integers, not {schema.field(label).type}")
    columns = _Columns(_bytes_leaf(file, schema.field(image_column)), label)
    return _Layout(columns, _class_names(schema.metadata or {}, label), num_rows)


def _bytes_leaf(file: Path, field: Any) -> str:
    types = require("pyarrow", extra="data").types
    kind = field.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return str(field.name)
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{field.name}.bytes"
    raise DataError(f"{file}: column {field.name!r} must hold bytes, or a struct with 'bytes', not {kind}")


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...]:
    if label is None:
        return ()
    if b"class_names" in metadata:
        return tuple(metadata[b"class_names"].decode().splitlines())
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return tuple(features.get(label, {}).get("names", ()))


def _read_columns(files: list[Path], columns: _Columns) -> Any:
    """A table of the encoded bytes, and of the labels where there are any."""
    pa, pq = require("pyarrow", extra="data"), require("pyarrow.parquet", extra="data")
    names = [name for name in columns if name is not None]
    tables = []
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                tables.append(opened.read(columns=names, use_threads=False).flatten())  # a leaf is named "image.bytes"
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
    return pa.concat_tables(tables)
