"""A folder of picture files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tessella.data._errors import DataError
from tessella.data._splits import TRAIN_NAME, check_share, find_test_name, held_out_part
from tessella.data.base import UNKNOWN_LABEL, ImageDataset, Picture, Split
from tessella.data.decode import decode_rgb, picture_extensions


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
        held_out: float = 0.05,
    ) -> None:
        super().__init__(split=split, crop_px=crop_px, resize_px=resize_px, flip=flip)
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
        files = [file.relative_to(self.path).as_posix() for file in sorted(_walk(root), key=_natural)]
        if not files:
            raise DataError(
                f"no picture in {root}; accepted are files ending in {', '.join(sorted(picture_extensions()))}"
            )
        self._files = files if test_name is not None else [files[i] for i in held_out_part(files, split, held_out)]
        self._depth = len(root.relative_to(self.path).parts)
        self.class_names = _class_names({other for other in roots.values() if other.is_dir()})
        self._labels = {name: label for label, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._files)

    def read(self, index: int) -> Picture:
        """The picture, its label by sub-folder, and its path relative to the folder as the key."""
        key = self._files[index]
        folders = key.split("/")[self._depth : -1]
        label = self._labels[folders[0]] if folders else UNKNOWN_LABEL
        return Picture(decode_rgb(self.path / key, key), label, key)


def _class_names(roots: set[Path]) -> tuple[str, ...]:
    """The first-level sub-folders with a picture anywhere in them, of all splits, so that labels agree between them."""
    folders = {child for root in roots for child in root.iterdir() if child.is_dir() and not _is_hidden(child.name)}
    names = {folder.name for folder in folders if any(_walk(folder))}
    return tuple(sorted(names, key=lambda name: _natural(Path(name))))


def _walk(root: Path) -> Iterator[Path]:
    """The picture files below ``root``; every folder in natural order and once, however many links lead to it."""
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            children = sorted((Path(entry.path) for entry in entries if not _is_hidden(entry.name)), key=_natural)
        waiting += [child for child in reversed(children) if child.is_dir()]
        yield from (child for child in children if child.suffix.lower() in picture_extensions() and _is_file(child))


def _is_file(path: Path) -> bool:
    """A file, or a broken link to one: reading that one says so, instead of a data set that is silently smaller."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _natural(path: Path) -> tuple[list[list[tuple[str, int]]], str]:
    """Sorts by folder and name, digits as numbers; the path itself where 1.png and 01.png would be alike."""
    return [
        [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", part)] for part in path.parts
    ], str(path)
