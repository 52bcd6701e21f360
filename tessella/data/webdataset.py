"""Pictures in tar files, as WebDataset lays them out."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tessella.data._errors import DataError, UnreadableImage
from tessella.data._names import identity_of
from tessella.data._pixels import BitDepth
from tessella.data._splits import TEST_NAMES, TRAIN_NAME, check_share, find_test_name, held_out_part
from tessella.data.base import UNKNOWN_LABEL, ImageDataset, Picture, Split
from tessella.data.decode import picture_extensions
from tessella.registry import Spec
from tessella.text import name_to_text

# A label is a small number in a small file; what is larger is none.
_MOST_LABEL_BYTES = 1 << 16


class WebDataset(ImageDataset):
    """The samples of a tar file, or of a folder's ``{train,test,val,valid,validation}-*.tar`` (or ``*.tar``).

    Members that follow each other and are called alike up to the first dot of their name make a sample: a picture
    (``.jpg``, ``.png``, ...), and its class as an integer in ``.cls``, or under ``label`` (or ``cls``) in ``.json``.
    Where no file is for test, a share of the training samples is held out instead, picked by a hash of the key.

    The headers are read once; a picture is then read from its place in the file. Compressed tar files have no places
    and are refused.

    Args:
        path: the file or the folder.
        split: "train" or "test".
        crop_px: side of the square crop in pixels; None keeps whole pictures.
        resize_px: length in pixels that the shorter side is brought to first.
        flip: in training, mirror half of the pictures left to right.
        channels: 1 grey, 3 RGB, 4 RGBA, or any other number; what becomes of pictures with others says
            :func:`~tessella.data.decode.decode`.
        bit_depth: 8, or 16 to keep the levels of 16-bit pictures.
        held_out: the share of samples held out where no file separates them; 1 for all.

    Raises:
        DataError: no such file, no tar file or a compressed one, no picture in it, none for this split.
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
    ) -> None:
        super().__init__(
            split=split, crop_px=crop_px, resize_px=resize_px, flip=flip, channels=channels, bit_depth=bit_depth
        )
        check_share(held_out)
        files, separate = _files_of_split(Path(path), split)
        base = Path(path) if Path(path).is_dir() else Path(path).parent
        self._base = base
        endings = picture_extensions(channels, bit_depth)
        samples = [sample for file in files for sample in _samples(file, base, endings)]
        if not samples:
            raise DataError(f"no picture in {', '.join(map(str, files))}")
        chosen = range(len(samples)) if separate else held_out_part([s.key for s in samples], split, held_out)
        self._samples = [samples[position] for position in chosen]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._samples)

    def identity(self) -> Spec:
        """Their number, and a hash over their keys and the sizes of their pictures."""
        return identity_of((sample.key, sample.picture.size) for sample in self._samples)

    def read(self, index: int) -> Picture:
        """The sample's picture, its label, and "file.tar/name" as the key."""
        sample = self._samples[index]
        return Picture(self.decode(self._bytes(sample, sample.picture), sample.key), self._label(sample), sample.key)

    def _label(self, sample: _Sample) -> int:
        if sample.label is None:
            return UNKNOWN_LABEL
        if sample.label.size > _MOST_LABEL_BYTES:
            raise UnreadableImage(sample.key, f"its label has {sample.label.size} bytes")
        try:
            found = json.loads(self._bytes(sample, sample.label))
            if isinstance(found, dict):
                found = found.get("label", found.get("cls", UNKNOWN_LABEL))
            if not isinstance(found, int) or isinstance(found, bool) or found < UNKNOWN_LABEL:
                raise ValueError(f"{found!r} is no class")
        except (ValueError, RecursionError) as error:
            raise UnreadableImage(sample.key, f"its label cannot be read: {error}") from error
        return found

    def _bytes(self, sample: _Sample, place: _Place) -> bytes:
        try:
            with (self._base / sample.file).open("rb") as opened:
                opened.seek(place.start)
                data = opened.read(place.size)
        except OSError as error:
            raise UnreadableImage(sample.key, f"{sample.file}: {error.strerror}") from error
        if len(data) < place.size:
            raise UnreadableImage(sample.key, f"{sample.file} ends before it does")
        return data


class _Place(NamedTuple):
    """Where a member's bytes are in the tar file."""

    start: int
    size: int


class _Sample(NamedTuple):
    key: str
    file: str
    picture: _Place
    label: _Place | None


def _files_of_split(path: Path, split: Split) -> tuple[list[Path], bool]:
    """The files that hold ``split``, in order, and whether they hold nothing else."""
    if path.is_file():
        return [path], False
    if not path.is_dir():
        raise DataError(f"path {str(path)!r} does not exist; give a tar file, or a folder of them")
    found = sorted(path.glob("*.tar"))
    if not found:
        raise DataError(f"path {str(path)!r} holds no file ending in .tar")
    by_split: dict[str, list[Path]] = {}
    for file in found:
        name = re.split(r"[-.]", file.name)[0]
        by_split.setdefault(name if name in (TRAIN_NAME, *TEST_NAMES) else "", []).append(file)
    test_name = find_test_name(by_split)
    if test_name is None:
        return by_split.get(TRAIN_NAME, found), False
    name = TRAIN_NAME if split == "train" else test_name
    if name not in by_split:
        raise DataError(f"path {str(path)!r} holds {test_name}-*.tar and no {name}-*.tar")
    return by_split[name], True


def _samples(file: Path, base: Path, endings: frozenset[str]) -> Iterator[_Sample]:
    """The samples of a tar file, in its order."""
    relative = file.relative_to(base).as_posix()

    def sample(group: str, picture: _Place, label: _Place | None) -> _Sample:
        return _Sample(name_to_text(f"{relative}/{group}"), relative, picture, label)

    group, picture, label = "", None, None
    for name, place in _members(file):
        folder, _, last = name.rpartition("/")
        stem, _, extension = last.partition(".")
        member = f"{folder}/{stem}" if folder else stem
        if member != group:
            if picture is not None:
                yield sample(group, picture, label)
            group, picture, label = member, None, None
        if f".{extension.lower().rpartition('.')[2]}" in endings and picture is None:
            picture = place
        elif extension == "cls" or (extension == "json" and label is None):
            label = place
    if picture is not None:
        yield sample(group, picture, label)


def _members(file: Path) -> Iterator[tuple[str, _Place]]:
    """Name and place of every plain member; links, folders and hidden files are none, a sparse one is refused."""
    try:
        with tarfile.open(file, "r:") as opened:
            for member in opened:
                hidden = any(part.startswith(".") for part in member.name.split("/") if part != ".")
                if member.isreg() and not hidden:
                    if member.issparse():
                        raise DataError(f"{file}: {member.name!r} is sparse, which is not read")
                    yield member.name.removeprefix("./"), _Place(member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{file} is no tar file, or not a whole one, or compressed: {error}") from error
