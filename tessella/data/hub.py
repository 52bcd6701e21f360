"""Pictures by their name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tessella.data._errors import DataError, UnreadableImage
from tessella.data._names import identity_of
from tessella.data._pixels import BitDepth
from tessella.data._splits import TRAIN_NAME, find_test_name
from tessella.data.base import UNKNOWN_LABEL, ImageDataset, Picture, Split
from tessella.extras import require
from tessella.registry import Spec
from tessella.text import name_to_text


class Hub(ImageDataset):
    """A data set that ``datasets.load_dataset`` finds: downloaded once into its cache, and mapped from there.

    The rows of "train" are its split ``train``; those of "test" its ``test``, or else ``val``, ``valid`` or
    ``validation``. Its own code is never run: repositories that consist of a script are refused by ``datasets``. Rows
    hold the pictures' bytes; paths in the place of bytes are not followed.

    Args:
        repo: its name, as in ``uoft-cs/cifar10``, or a local folder in the hub's layout.
        split: "train" or "test".
        crop_px: side of the square crop in pixels; None keeps whole pictures.
        resize_px: length in pixels that the shorter side is brought to first.
        flip: in training, mirror half of the pictures left to right.
        channels: 1 grey, 3 RGB, 4 RGBA, or any other number; what becomes of pictures with others says
            :func:`~tessella.data.decode.decode`.
        bit_depth: 8, or 16 to keep the levels of 16-bit pictures.
        config: which of the repository's data sets, where it holds several.
        revision: branch, tag or commit; None is the newest, which may change under a recipe.
        image_column: the column of pictures.
        label_column: the column of classes; None is "label" where there is one, and label -1 otherwise.
        streaming: fetch rows as they are asked for, and keep none. They are read in order, as tokenization and
            evaluation do; a jump skips what lies between, so training, which jumps, should not stream.

    Raises:
        ImportError: the package ``datasets`` is not installed.
        DataError: no such split or column, or no row.
        Exception: whatever ``datasets`` raises where the repository cannot be had.
    """

    def __init__(
        self,
        repo: str,
        *,
        split: Split,
        crop_px: int | None = None,
        resize_px: int | None = None,
        flip: bool = False,
        channels: int = 3,
        bit_depth: BitDepth = 8,
        config: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        label_column: str | None = None,
        streaming: bool = False,
    ) -> None:
        super().__init__(
            split=split, crop_px=crop_px, resize_px=resize_px, flip=flip, channels=channels, bit_depth=bit_depth
        )
        datasets = require("datasets", extra="hub")
        present = datasets.get_dataset_split_names(repo, config, revision=revision)
        name = TRAIN_NAME if split == "train" else find_test_name(present)
        if name not in present:
            raise DataError(f"{repo} has nothing for split {split!r}; its splits: {', '.join(present)}")
        rows = datasets.load_dataset(repo, config, split=name, revision=revision, streaming=streaming)
        about: Any = (rows.info.splits or {}).get(name)
        if streaming:
            if about is None or not about.num_examples:
                raise DataError(f"{repo} does not say how many rows its split {name!r} has; set streaming = false")
            rows = rows if rows.features else rows._resolve_features()
        for argument, column in (("image_column", image_column), ("label_column", label_column)):
            if column is not None and column not in rows.column_names:
                raise DataError(f"{repo} has no {argument} {column!r}; its columns: {', '.join(rows.column_names)}")
        if not streaming and len(rows) == 0:
            raise DataError(f"{repo} has no row in split {name!r}")
        self._label_column = label_column or ("label" if "label" in rows.column_names else None)
        self._image_column = image_column
        self._prefix = name_to_text(f"{repo}/{name}")
        self._size: int = about.num_bytes
        # The encoded bytes, not its decoded image: every source of pictures is decoded by the same rules.
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
        rows = rows.select_columns([c for c in (image_column, self._label_column) if c is not None])
        self._rows: Any = _Streamed(rows, about.num_examples) if streaming else rows
        if self._label_column is not None:
            self.class_names = tuple(getattr(rows.features[self._label_column], "names", None) or ())

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def identity(self) -> Spec:
        """The number of rows, and a hash over that, their size and the split's name."""
        return {**identity_of([(f"{self._prefix.rpartition('/')[2]} {len(self)}", self._size)]), "count": len(self)}

    def read(self, index: int) -> Picture:
        """The row's picture, its label, and "repo/split:row" as the key."""
        row = self._rows[index]
        key = f"{self._prefix}:{index}"
        image = row[self._image_column]
        data = image and image["bytes"]
        if not data:
            raise UnreadableImage(key, "the row holds no bytes; paths are not followed")
        label = None if self._label_column is None else row[self._label_column]
        return Picture(self.decode(data, key), UNKNOWN_LABEL if label is None else label, key)


class _Streamed:
    """Rows by number out of a stream, which is opened anew where they are not asked for in order."""

    def __init__(self, rows: Any, length: int) -> None:
        self._all, self._length = rows, length
        self._open: Iterator[dict[str, Any]] = iter(())
        self._next = -1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != self._next:
            self._open = iter(self._all.skip(index) if index else self._all)
        self._next = index + 1
        row = next(self._open, None)
        if row is None:
            raise DataError(f"the stream ends before row {index}, although {self._length} rows were announced")
        return row

    def __getstate__(self) -> dict[str, Any]:
        """For workers, each of which opens a stream of its own."""
        return {**self.__dict__, "_open": iter(()), "_next": -1}
