"""A folder of picture files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tessella.data._errors import DataError
from tessella.data._names import NaturalKey, file_size, identity_of
from tessella.data._pixels import BitDepth
from tessella.data._splits import TRAIN_NAME, check_share, find_test_name, held_out_part
from tessella.data.base import UNKNOWN_LABEL, ImageDataset, Picture, Split
from tessella.data.decode import picture_extensions
from tessella.registry import Spec
from tessella.text import name_to_text


class Folder(ImageDataset):
    """The pictures in a folder and its sub-folders, in natural order (2.png before 10.png).

    Every file whose name ends as a picture's does (:func:`~tessella.data.decode.picture_extensions`) belongs to it;
    hidden files and folders do not. Links are followed, and each folder is read once, so that loops end. A picture's
    class is the first sub-folder on its way; pictures in none have label -1.

    Where the folder holds ``train/`` or ``test/`` (``val/``, ``valid/``, ``validation/``), these are the splits, and
    the classes lie inside. Where it holds no such folder for test, a share of the training pictures is held out
    instead, picked by a hash of the key.

    Args:
        path: the folder.
        split: "train" or "test".
        crop_px: side of the square crop in pixels; None keeps whole pictures.
        resize_px: length in pixels that the shorter side is brought to first.
        flip: in training, mirror half of the pictures left to right.
        channels: 1 grey, 3 RGB, 4 RGBA, or any other number; what becomes of pictures with others says
            :func:`~tessella.data.decode.decode`.
        bit_depth: 8, or 16 to keep the levels of 16-bit pictures.
        held_out: the share of pictures held out where the folder itself does not separate them; 1 for all.

    Raises:
        ValueError: no such folder, no picture in it, none for this split, or an argument out of its range.
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
    ) -> None:
        super().__init__(
            split=split, crop_px=crop_px, resize_px=resize_px, flip=flip, channels=channels, bit_depth=bit_depth
        )
        check_share(held_out)
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"path {str(path)!r} is no folder; give one that holds pictures")
        children = {child.name for child in self.path.iterdir() if child.is_dir()}
        test_name = find_test_name(children)
        train_root = self.path / TRAIN_NAME if TRAIN_NAME in children else self.path
        if test_name is None:
            roots = {"train": train_root, "test": train_root}
        else:
            roots = {"train": self.path / TRAIN_NAME, "test": self.path / test_name}
        root = roots[split]
        if not root.is_dir():
            raise DataError(f"path {str(path)!r} has {test_name}/ but no {TRAIN_NAME}/: nothing for split {split!r}")
        endings = picture_extensions(channels, bit_depth)
        below = "" if root == self.path else f"{root.name}/"
        files = [below + file for file in _walk(root, endings)]
        if not files:
            raise DataError(f"no picture in {root}; accepted are files ending in {', '.join(sorted(endings))}")
        files.sort(key=NaturalKey())
        self._depth = below.count("/")
        found = {folders[0] for folders in map(self._folders, files) if folders}
        names = sorted(
            _class_folders({other for other in roots.values() if other.is_dir()}, endings, found), key=NaturalKey()
        )
        self.class_names = tuple(map(name_to_text, names))
        self._labels = {name: label for label, name in enumerate(names)}
        self._files = files if test_name is not None else [files[i] for i in held_out_part(files, split, held_out)]

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._files)

    def read(self, index: int) -> Picture:
        """The picture, its label by sub-folder, and its path relative to the folder as the key."""
        file = self._files[index]
        folders = self._folders(file)
        label = self._labels[folders[0]] if folders else UNKNOWN_LABEL
        key = name_to_text(file)
        return Picture(self.decode(self.path / file, key), label, key)

    def _folders(self, file: str) -> list[str]:
        """The sub-folders on the way to a file, the first of which is its class."""
        return file.split("/")[self._depth : -1]

    def identity(self) -> Spec:
        """Their number, and a hash over their paths in the folder and the sizes of the files."""
        return identity_of((file, file_size(f"{self.path}/{file}")) for file in self._files)


def _class_folders(roots: set[Path], endings: frozenset[str], found: set[str]) -> set[str]:
    """The first-level sub-folders with a picture anywhere in them, of all splits, so that labels agree between them.

    Args:
        roots: of the splits.
        endings: of pictures.
        found: those folders among them in which pictures were found already.
    """
    names = set(found)
    for root in roots:
        children = {child for child in os.listdir(root) if not _is_hidden(child)} - names
        names |= {child for child in children if (root / child).is_dir() and any(_walk(root / child, endings))}
    return names


def _walk(root: Path, endings: frozenset[str]) -> Iterator[str]:
    """The picture files below ``root``, by their paths in it; each folder once, however many links lead to it.

    Folders come in natural order: that decides by which of several ways one is reached.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        status = os.stat(root / prefix)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                is_file, is_folder = _kind(entry)
                if is_folder:
                    folders.append(f"{prefix}{entry.name}/")
                elif is_file and os.path.splitext(entry.name)[1].lower() in endings:
                    yield prefix + entry.name
        waiting += sorted(folders, key=NaturalKey(), reverse=True)


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether it is a file, and whether it is a folder.

    A file is also a broken link to one: reading that one says so, instead of a data set that is silently smaller.
    Pipes, devices and sockets are neither.
    """
    if entry.is_symlink():  # asked by its path, since one that leads to itself is an error to ask by its entry
        return os.path.isfile(entry.path) or not os.path.exists(entry.path), os.path.isdir(entry.path)
    return entry.is_file(), entry.is_dir()


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
