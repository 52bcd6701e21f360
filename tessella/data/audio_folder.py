"""A folder of sound files."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from tessella.data._errors import DataError, UnreadableImage
from tessella.data._splits import TRAIN_NAME, check_share, find_test_name, held_out_part
from tessella.data.base import UNKNOWN_LABEL, Sample, Samples, Split, Streamed
from tessella.data.sound import Sound, open_sound, sound_chunks, sound_extensions, trim_silence
from tessella.registry import Spec
from tessella.text import name_to_text

METADATA = "metadata.csv"

# Longer files go in pieces where whole ones are asked for one by one.
_LONG_SEC = 30.0


@dataclass(frozen=True)
class _Entry:
    """A file relative to the folder, and its speaker where one is known."""

    file: str
    speaker: str | None

    @property
    def key(self) -> str:
        """The file's name as text."""
        return name_to_text(self.file)


class AudioFolder(Samples):
    """The sound files in a folder and its sub-folders, in any format that libsndfile reads, as mono waveforms.

    Where the folder holds a ``metadata.csv`` with a column ``file``, its rows are the files, in their order; a column
    ``speaker`` names the classes and a column ``split`` (``train``, ``test``) the splits. Otherwise every file whose
    name ends as a sound's does belongs to it, hidden ones excepted; the first sub-folder is the speaker, and ``train/``
    and ``test/`` (``val/``, ``valid/``, ``validation/``) are the splits. Where nothing separates them, a share of the
    files is held out, picked by a hash of the key.

    Channels are averaged; other rates are resampled to ``sample_rate`` (soxr, high quality); samples beyond full scale
    are clipped. In training a clip begins anywhere in its file and is read alone, however long the file is; files
    shorter than a clip are repeated. In evaluation a clip is the middle of its file.

    Args:
        path: the folder.
        split: "train" or "test".
        sample_rate: of the waveforms, in Hz.
        clip_sec: length of the clips; None for whole files.
        gain_db: in training, the peak of a clip is brought to a level drawn between these two, in dB of full scale.
        trim_db: cut off what is more than so many dB below the file's loudest frame, at its start and end; None for
            nothing. It reads files whole.
        max_sec: files longer than this are refused where they would have to be held whole: in evaluation without
            ``clip_sec``, or with ``trim_db``. ``tessella tokenize`` takes files of any length.
        held_out: the share of files held out where the folder itself does not separate them; 1 for all.

    Raises:
        ValueError: no such folder, no sound in it, none for this split, or an argument out of its range.
        ModuleNotFoundError: soundfile is missing.
    """

    medium: ClassVar[str] = "audio"
    pads: ClassVar[bool] = True
    carries: ClassVar[frozenset[str]] = frozenset({"sample_rate", "clip_sec", "gain_db", "trim_db", "max_sec"})
    window: ClassVar[frozenset[str]] = frozenset({"clip_sec"})

    def __init__(
        self,
        path: str | Path,
        *,
        split: Split,
        sample_rate: int = 24_000,
        clip_sec: float | None = None,
        gain_db: Sequence[float] | None = None,
        trim_db: float | None = None,
        max_sec: float = 600.0,
        held_out: float = 0.05,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if sample_rate < 1:
            raise ValueError(f"sample_rate must be at least 1, got {sample_rate}")
        for name, value in (("clip_sec", clip_sec), ("trim_db", trim_db), ("max_sec", max_sec)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if gain_db is not None and (len(gain_db) != 2 or not gain_db[0] <= gain_db[1] <= 0):
            raise ValueError(f"gain_db must be two levels of at most 0, the lower first, got {list(gain_db)}")
        check_share(held_out)
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"path {str(path)!r} is no folder; give one that holds sound files")
        self.sample_rate = sample_rate
        self.clip_samples = None if clip_sec is None else max(1, round(clip_sec * sample_rate))
        self.gain_db = None if gain_db is None else (gain_db[0], gain_db[1])
        self.trim_db = trim_db
        self.max_sec = max_sec
        self.extent = None if self.clip_samples is None else (self.clip_samples,)
        entries, parts = _listed(self.path) if (self.path / METADATA).is_file() else _found(self.path)
        if parts is None:
            chosen = held_out_part([entry.file for entry in entries], split, held_out)
            self._entries = [entries[position] for position in chosen]
        else:
            self._entries = [entry for entry, part in zip(entries, parts, strict=True) if part == split]
        if not self._entries:
            raise DataError(f"{self.path} holds no sound file for split {split!r}")
        speakers = sorted({entry.speaker for entry in entries if entry.speaker is not None})
        self.class_names = tuple(map(name_to_text, speakers))
        self._labels = {name: label for label, name in enumerate(speakers)}

    @classmethod
    def medium_spec(cls, section: Spec) -> Spec:
        """Sound at the rate of the section."""
        return {"name": cls.medium, **({"sample_rate": section["sample_rate"]} if "sample_rate" in section else {})}

    def __len__(self) -> int:
        """The number of files."""
        return len(self._entries)

    def sources(self) -> Iterable[Path]:
        """The sound files."""
        return [self.path / entry.file for entry in self._entries]

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """``x [1, T]``: a clip that ``rng`` chooses, or the middle one; the whole file without ``clip_sec``.

        Raises:
            UnreadableImage: the file cannot be decoded, holds nothing or NaN, or is too long to be read whole.
        """
        entry = self._entries[index]
        with open_sound(self.path / entry.file, entry.key) as sound:
            return self._read(entry, sound, rng)

    def sample_or_stream(self, index: int, rng: np.random.Generator | None = None) -> Sample | Streamed:
        """:meth:`sample`, or in pieces a whole file of more than 30 s; silence is found in whole files alone.

        Raises:
            UnreadableImage: see :meth:`sample`.
        """
        entry = self._entries[index]
        with open_sound(self.path / entry.file, entry.key) as sound:
            long = sound.num_frames > _LONG_SEC * sound.rate
            if long and self.clip_samples is None and self.trim_db is None:
                return Streamed(self._label(entry), entry.key, self._pieces(entry))
            return self._read(entry, sound, rng)

    def _pieces(self, entry: _Entry) -> Iterator[torch.Tensor]:
        for samples in sound_chunks(self.path / entry.file, entry.key, self.sample_rate):
            yield torch.from_numpy(np.clip(samples, -1, 1))[None]

    def _label(self, entry: _Entry) -> int:
        return UNKNOWN_LABEL if entry.speaker is None else self._labels[entry.speaker]

    def _read(self, entry: _Entry, sound: Sound, rng: np.random.Generator | None) -> Sample:
        wave = self._whole(sound) if self.clip_samples is None or self.trim_db else self._clip(sound, rng)
        if self.clip_samples is not None:
            wave = _window(wave, self.clip_samples, rng)
        wave = np.clip(wave, -1, 1)
        peak = np.abs(wave).max()
        if self.gain_db is not None and rng is not None and peak > 0:
            wave = wave * (10 ** (rng.uniform(*self.gain_db) / 20) / peak)
        return Sample(x=torch.from_numpy(wave.astype(np.float32))[None], label=self._label(entry), key=entry.key)

    def _whole(self, sound: Sound) -> np.ndarray[Any, Any]:
        seconds = sound.num_frames / sound.rate
        if seconds > self.max_sec:
            raise UnreadableImage(
                sound.key, f"{seconds:,.0f} s are more than max_sec={self.max_sec:g} allows to be held whole; set "
                "clip_sec (tokenize takes files of any length, unless trim_db is set)",
            )  # fmt: skip
        wave = sound.read(0, sound.num_frames, self.sample_rate)
        if self.trim_db is not None:
            wave = trim_silence(wave, self.sample_rate, self.trim_db)
        return wave

    def _clip(self, sound: Sound, rng: np.random.Generator | None) -> np.ndarray[Any, Any]:
        """The clip alone, read by range."""
        assert self.clip_samples is not None
        needed = min(-(-self.clip_samples * sound.rate // self.sample_rate), sound.num_frames)
        room = sound.num_frames - needed
        start = room // 2 if rng is None else int(rng.integers(room, endpoint=True))
        return sound.read(start, needed, self.sample_rate)


def _window(wave: np.ndarray[Any, Any], length: int, rng: np.random.Generator | None) -> np.ndarray[Any, Any]:
    """``length`` samples of ``wave``, which is repeated where it is shorter."""
    if len(wave) < length:
        return np.tile(wave, -(-length // len(wave)))[:length]
    room = len(wave) - length
    start = room // 2 if rng is None else int(rng.integers(room, endpoint=True))
    return wave[start : start + length]


def _listed(root: Path) -> tuple[list[_Entry], list[str] | None]:
    """The files that ``metadata.csv`` names, and their splits if it has them."""
    file = root / METADATA
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no table of comma-separated values: {error}") from error
    if not rows or "file" not in rows[0]:
        columns = ", ".join(rows[0]) if rows else "none"
        raise DataError(f"{file} needs a column 'file' and at least one row; its columns are: {columns}")
    for row in rows:
        if not row["file"] or Path(row["file"]).is_absolute() or ".." in Path(row["file"]).parts:
            raise DataError(f"{file}: {row['file']!r} is no file below {root}")
    entries = [_Entry(row["file"], row.get("speaker") or None) for row in rows]
    if "split" not in rows[0]:
        return entries, None
    splits = ["test" if find_test_name([row["split"]]) else row["split"] for row in rows]
    return entries, splits


def _found(root: Path) -> tuple[list[_Entry], list[str] | None]:
    """The sound files below ``root``, and their splits if its folders separate them."""
    children = {child.name for child in root.iterdir() if child.is_dir()}
    test_name = find_test_name(children)
    entries, splits = [], []
    for file in _walk(root):
        parts = file.relative_to(root).parts
        inside = parts[1:] if parts[0] in (TRAIN_NAME, test_name) else parts
        entries.append(_Entry("/".join(parts), inside[0] if len(inside) > 1 else None))
        splits.append("test" if parts[0] == test_name else "train")
    if not entries:
        raise DataError(f"no sound in {root}; accepted are files ending in {', '.join(sorted(sound_extensions()))}")
    return entries, splits if test_name is not None else None


def _walk(root: Path) -> Iterator[Path]:
    """The sound files below ``root`` in the order of their names; hidden files and folders are left out."""
    accepted = sound_extensions()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(folder, name)
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in accepted
        )
