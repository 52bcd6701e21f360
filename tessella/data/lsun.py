"""LSUN as it is distributed, one LMDB a category, and as its own tool exports it, one folder a category."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from tessella.data._errors import DataError, UnreadableImage
from tessella.data._names import file_size, identity_of
from tessella.data._pixels import BitDepth
from tessella.data.base import ImageDataset, Picture, Split
from tessella.data.decode import picture_extensions
from tessella.extras import require
from tessella.registry import Spec
from tessella.storage import write_bytes
from tessella.text import name_to_text

logger = logging.getLogger("tessella")

_LMDB_ENDING = "_lmdb"
_FOLDER = re.compile(rf"(?P<category>.+)_(?P<part>train|val)(?P<lmdb>{_LMDB_ENDING})?")
_PARTS = {"train": "train", "test": "val"}
_DATA = "data.mdb"

# The export nests one folder for each of so many first letters of a key.
_NESTING = 6
_SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+")

# LMDB must not open the same file twice in a process: data sets of one folder share it, as long as one of them lives.
_environments: WeakValueDictionary[str, Any] = WeakValueDictionary()

_Keys = np.ndarray[tuple[int], np.dtype[np.bytes_]]


class LSUN(ImageDataset):
    """LSUN: the LMDBs ``<category>_<train|val>_lmdb/``, or the folders ``<category>_<train|val>/`` exported from them.

    An LMDB holds encoded pictures by name. A folder holds them as files of those names, in sub-folders of any depth;
    where both are there, the LMDB is read. Pictures are in the order of their names, category after category, and are
    called ``bedroom_train/<name>`` in both layouts. The class is the category.

    The list of an LMDB's names is kept beside it in a hidden file, since reading it off millions of entries may take
    minutes. Where no file can be written there, it is read off at every start.

    Args:
        split: "train"; or "test", which is LSUN's ``val``.
        path: the folder that holds the categories' folders.
        categories: those to read, in the order of their classes; all there are, in alphabetical order, if empty.
        crop_px: side of the square crop in pixels; None keeps whole pictures.
        resize_px: length in pixels that the shorter side is brought to first.
        flip: in training, mirror half of the pictures left to right.
        channels: 1 grey, 3 RGB, 4 RGBA, or any other number; what becomes of pictures with others says
            :func:`~tessella.data.decode.decode`.
        bit_depth: 8, or 16 to keep the levels of 16-bit pictures.

    Raises:
        ImportError: lmdb is not installed, and an LMDB is to be read.
        DataError: no such folder or category, one without a picture, or an LMDB that is damaged or cut off.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        split: Split,
        path: str | Path,
        categories: Sequence[str] = (),
        crop_px: int | None = None,
        resize_px: int | None = None,
        flip: bool = False,
        channels: int = 3,
        bit_depth: BitDepth = 8,
    ) -> None:
        super().__init__(
            split=split, crop_px=crop_px, resize_px=resize_px, flip=flip, channels=channels, bit_depth=bit_depth
        )
        if isinstance(categories, str) or len(set(categories)) < len(categories):
            raise ValueError(f"categories must be a list of different names, got {categories!r}")
        self.path = Path(path)
        found = _find_folders(self.path)
        part = _PARTS[split]
        self.class_names = tuple(categories) or tuple(sorted({category for category, _ in found}))
        wanted = [category for category in self.class_names if categories or (category, part) in found]
        for category in wanted or ["<category>"]:
            if (category, part) not in found:
                raise DataError(
                    f"{self.path} has neither {category}_{part}{_LMDB_ENDING}/, an LMDB, nor {category}_{part}/, "
                    f"pictures exported from one; it holds: {_list_names(self.path)}"
                )
        self._labels = [self.class_names.index(category) for category in wanted]
        self._parts = [
            _open_part(found[category, part], picture_extensions(channels, bit_depth)) for category in wanted
        ]
        self._starts = list(accumulate(map(len, self._parts), initial=0))

    def __len__(self) -> int:
        """The number of pictures."""
        return self._starts[-1]

    def identity(self) -> Spec:
        """The number of pictures, and a hash over each LMDB's name, number of entries and size, or over all files'."""
        return {**identity_of(item for part in self._parts for item in part.sizes()), "count": len(self)}

    def read(self, index: int) -> Picture:
        """The picture, its category, and "<category>_<train|val>/<name>" as the key."""
        position = bisect_right(self._starts, index) - 1
        key, encoded = self._parts[position].entry(index - self._starts[position])
        return Picture(self.decode(encoded, key), self._labels[position], key)


class _Database:
    """The pictures of one LMDB. It is opened, and its keys are mapped, by each process that reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment: Any = None
        self._keys: _Keys | None = _read_keys(folder, _open(folder))
        self._length = len(self._keys)

    def __len__(self) -> int:
        return self._length

    def entry(self, index: int) -> tuple[str, bytes]:
        """The picture's key and encoded bytes."""
        if self._environment is None:
            self._environment = _open(self.folder)
        if self._keys is None:
            self._keys = _read_keys(self.folder, self._environment)
        raw = bytes(self._keys[index])
        key = f"{_exported_name(self.folder)}/{raw.decode(errors='backslashreplace')}"
        try:
            with self._environment.begin() as transaction:
                data: bytes | None = transaction.get(raw)
        except require("lmdb", extra="data").Error as error:
            raise UnreadableImage(key, str(error)) from error
        if data is None:
            raise DataError(f"{self.folder} has lost its entry {raw!r}: it changed while it was read")
        return key, data

    def sizes(self) -> list[tuple[str, int]]:
        """The names and sizes of what holds the pictures."""
        return [(f"{_exported_name(self.folder)} {len(self)}", file_size(self.folder / _DATA))]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: a worker process opens it itself."""
        return {**self.__dict__, "_environment": None, "_keys": None}


class _Exported:
    """The pictures of one exported folder."""

    def __init__(self, folder: Path, endings: frozenset[str]) -> None:
        self.folder = folder
        files: dict[str, str] = {}
        for root, _, names in os.walk(folder, onerror=_raise):
            for name in names:
                stem, ending = os.path.splitext(name)
                if not name.startswith(".") and ending.lower() in endings:
                    file = os.path.join(root, name)
                    if files.setdefault(stem, file) != file:
                        raise DataError(f"{folder} has two pictures of one name: {files[stem]} and {file}")
        if not files:
            raise DataError(f"no picture in {folder}; LSUN's are files that end in .webp or .jpg, in any sub-folder")
        self._files = [files[stem] for stem in sorted(files)]  # LMDB's order: that of UTF-8 is that of the characters

    def __len__(self) -> int:
        return len(self._files)

    def entry(self, index: int) -> tuple[str, Path]:
        """The picture's key and file."""
        file = Path(self._files[index])
        return name_to_text(f"{self.folder.name}/{file.stem}"), file

    def sizes(self) -> list[tuple[str, int]]:
        """The names and sizes of the files."""
        return [(os.path.relpath(file, self.folder.parent), file_size(file)) for file in self._files]


def _raise(error: OSError) -> None:
    raise error


def export_lmdb(folder: str | Path, out: str | Path) -> int:
    """Write the pictures of an LMDB into files, laid out as LSUN's own tool does it; return their number.

    ``bedroom_train_lmdb`` becomes ``out/bedroom_train``, and its entry ``0123abcd`` there ``0/1/2/3/a/b/0123abcd.webp``
    (``.jpg`` where the bytes are those of a JPEG). The folder takes that name once it is complete; interrupted, the
    same call goes on where it was.

    Args:
        folder: the LMDB.
        out: where the folder of pictures is made.

    Raises:
        ImportError: lmdb is not installed.
        DataError: no LMDB, a damaged one, one with keys that cannot be the names of files, or a folder of pictures that
            is already there.
    """
    from rich.console import Console
    from rich.progress import Progress

    source = Path(folder)
    target = Path(out) / _exported_name(source)
    if target.exists():
        raise DataError(f"{target} is already there; delete it to export {source} anew")
    environment = _open(source)
    unfinished = target.with_name(f".{target.name}.unfinished")
    count: int = environment.stat()["entries"]
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        environment.begin(buffers=True) as transaction,
    ):
        for key, data in progress.track(transaction.cursor(), total=count, description=f"export {target.name}"):
            file = unfinished / _exported_file(bytes(key), data, source)
            # Views into the LMDB: of a picture that is there already no more than its first page is read.
            if not (file.is_file() and file.stat().st_size == len(data)):
                write_bytes(file, bytes(data))
    unfinished.rename(target)
    return count


def _exported_name(folder: Path) -> str:
    return folder.name.removesuffix(_LMDB_ENDING)


def _exported_file(key: bytes, data: memoryview, source: Path) -> Path:
    name = key.decode(errors="replace")
    if not _SAFE_KEY.fullmatch(name):
        raise DataError(f"{source}: key {key!r} cannot name a file; accepted are letters, digits, '-' and '_'")
    ending = ".jpg" if bytes(data[:3]) == b"\xff\xd8\xff" else ".webp"
    return Path(*name[:_NESTING], name + ending)


def _find_folders(path: Path) -> dict[tuple[str, str], Path]:
    """The folder of each category and part, the LMDB where there are both."""
    if not path.is_dir():
        raise DataError(
            f"path {str(path)!r} is no folder; give the one that holds LSUN's, such as bedroom_train{_LMDB_ENDING}/"
        )
    found = {}
    for folder in sorted(path.iterdir()):  # the LMDB comes after the exported folder
        match = _FOLDER.fullmatch(folder.name)
        if match and folder.is_dir():
            found[match["category"], match["part"]] = folder
    return found


def _open_part(folder: Path, endings: frozenset[str]) -> _Database | _Exported:
    return _Database(folder) if folder.name.endswith(_LMDB_ENDING) else _Exported(folder, endings)


def _list_names(path: Path) -> str:
    """The first few names in a folder, for messages."""
    names = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
    rest = [f"and {len(names) - 10} more"] if len(names) > 10 else []
    return ", ".join(names[:10] + rest) or "nothing"


def _open(folder: Path) -> Any:
    """The LMDB's environment, shared by all who read it in this process.

    Raises:
        DataError: it is none, is damaged, is cut off, or holds nothing.
    """
    lmdb = require("lmdb", extra="data")
    name = os.path.realpath(folder)
    environment = _environments.get(name)
    if environment is None:
        if not (folder / _DATA).is_file():
            held = _list_names(folder) if folder.is_dir() else "nothing"
            raise DataError(f"{folder} is no LMDB: it has no {_DATA}; it holds: {held}")
        try:
            # readahead would read the neighbours of every picture, which are not asked for next. No lock: nobody
            # writes, and the folder may not be writable.
            environment = lmdb.open(name, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise DataError(f"{folder} is no LMDB, or a damaged one: {error}") from error
        _environments[name] = environment
    pages, size = environment.info()["last_pgno"] + 1, (folder / _DATA).stat().st_size
    if size < pages * environment.stat()["psize"]:  # reading past its end would kill the process (SIGBUS)
        raise DataError(
            f"{folder / _DATA} is cut off: {size} bytes of {pages * environment.stat()['psize']}; copy it again"
        )
    if environment.stat()["entries"] == 0:
        raise DataError(f"{folder} is an LMDB without an entry")
    return environment


def _read_keys(folder: Path, environment: Any) -> _Keys:
    """All keys in order, mapped from the file beside the LMDB; that is made where it is missing, old or damaged."""
    state = (folder / _DATA).stat()
    identity = state.st_size, state.st_mtime_ns, environment.info()["last_txnid"], environment.stat()["entries"]
    stamp = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    for file in folder.glob(f".keys-{stamp}-*.npy"):
        kept = _load_keys(file)
        if kept is not None:
            return kept
    with environment.begin() as transaction:
        keys: _Keys = np.array(list(transaction.cursor().iternext(values=False)), dtype=np.bytes_)
    file = folder / f".keys-{stamp}-{_checksum(keys)}.npy"
    buffer = io.BytesIO()
    np.save(buffer, keys, allow_pickle=False)
    try:
        write_bytes(file, buffer.getvalue())
        for other in folder.glob(".keys-*.npy"):
            if other != file:
                other.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the keys of %s cannot be kept beside it, and are read off at every start: %s", folder, error)
    return keys


def _load_keys(file: Path) -> _Keys | None:
    """The keys in ``file``, whose name ends in their checksum; None where it is damaged."""
    try:
        keys = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        logger.warning("%s is damaged and is made anew: %s", file, error)
        return None
    if keys.dtype.kind != "S" or not file.stem.endswith(f"-{_checksum(keys)}"):
        logger.warning("%s is damaged and is made anew: its checksum differs", file)
        return None
    return keys  # type: ignore[no-any-return]


def _checksum(keys: _Keys) -> str:
    return f"{zlib.crc32(keys.view(np.uint8).data):08x}"
