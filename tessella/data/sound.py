"""Sound files: opened by name, read by range, as mono waveforms of one rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tessella.data._errors import UnreadableImage
from tessella.extras import require

_MARGIN_SEC = 0.05  # read on both sides of a range that is resampled, for the filter to settle
_FRAME_SEC = 0.02
_SLACK_SEC = 0.1
# What libsndfile reads under other names than its formats'.
_MORE_EXTENSIONS = ("aif", "mp3", "oga", "opus", "snd")


@cache
def sound_extensions() -> frozenset[str]:
    """The file name endings of the formats that are read: lower case, with the dot. Raw samples are none of them."""
    formats = require("soundfile", extra="audio").available_formats()
    return frozenset(f".{name.lower()}" for name in (*formats, *_MORE_EXTENSIONS) if name != "RAW")


class Sound:
    """An open sound file.

    Attributes:
        key: its name in messages.
        rate: frames a second.
        num_frames: samples of each channel.
    """

    def __init__(self, opened: Any, key: str) -> None:
        self._opened = opened
        self.key = key
        self.rate: int = opened.samplerate
        self.num_frames: int = opened.frames

    def read(self, start: int, num_frames: int, sample_rate: int) -> np.ndarray[Any, Any]:
        """Mono float32 samples at ``sample_rate`` of ``num_frames`` frames of the file from ``start`` on.

        Raises:
            UnreadableImage: frames that cannot be decoded (more than 0.1 s of them), or NaN or infinity in them.
        """
        margin = 0 if self.rate == sample_rate else round(_MARGIN_SEC * self.rate)
        first, end = max(start - margin, 0), min(start + num_frames + margin, self.num_frames)
        self._opened.seek(first)
        frames = self._opened.read(end - first, dtype="float32", always_2d=True)
        # Decoders stop at damage without a word; the length that a header of MP3 promises may be a frame or two off.
        if len(frames) < end - first - _SLACK_SEC * self.rate or not len(frames):
            raise UnreadableImage(self.key, f"of frames {first:,} to {end:,} only {len(frames):,} can be decoded")
        wave = frames.mean(1)
        if not np.isfinite(wave).all():
            raise UnreadableImage(self.key, "NaN or infinite samples")
        if self.rate == sample_rate:
            return wave  # type: ignore[no-any-return]
        wave = require("soxr", extra="audio").resample(wave, self.rate, sample_rate, quality="HQ")
        skipped = round((start - first) * sample_rate / self.rate)
        wanted = max(1, round(num_frames * sample_rate / self.rate))
        return wave[skipped : skipped + wanted]  # type: ignore[no-any-return]


@contextmanager
def open_sound(path: Path, key: str) -> Iterator[Sound]:
    """The sound in a file; whatever is wrong with it, now or while it is read, is an error that names it.

    Args:
        path: the file.
        key: its name in messages.

    Raises:
        UnreadableImage: no sound file, a damaged one, or one without a sample or a rate.
        ModuleNotFoundError: soundfile is missing.
    """
    soundfile = require("soundfile", extra="audio")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as opened:  # of a str it takes no bytes that are no text
            if opened.samplerate < 1:
                raise UnreadableImage(key, f"a rate of {opened.samplerate} Hz in the header")
            if opened.frames < 1:
                raise UnreadableImage(key, "no samples")
            yield Sound(opened, key)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        if isinstance(error, UnreadableImage):
            raise
        if not path.is_file():
            raise UnreadableImage(key, "no such file") from error
        reason = getattr(error, "error_string", None) or str(error)
        raise UnreadableImage(key, f"no sound file that can be read: {reason}") from error


def trim_silence(wave: np.ndarray[Any, Any], sample_rate: int, below_db: float) -> np.ndarray[Any, Any]:
    """``wave`` without the frames of 20 ms at its ends that are ``below_db`` below the loudest; silence stays whole."""
    size = max(1, round(_FRAME_SEC * sample_rate))
    starts = np.arange(0, len(wave), size)
    power = np.add.reduceat(np.square(wave, dtype=np.float64), starts) / size
    loud = np.flatnonzero(power > power.max() * 10 ** (-below_db / 10))
    return wave if not len(loud) else wave[starts[loud[0]] : starts[loud[-1]] + size]


def sound_chunks(path: Path, key: str, sample_rate: int, *, chunk_sec: float = 10.0) -> Iterator[np.ndarray[Any, Any]]:
    """The mono samples of a file at ``sample_rate``, in order, about ``chunk_sec`` of them at a time.

    Raises:
        UnreadableImage: see :func:`open_sound`.
        ModuleNotFoundError: soundfile or soxr is missing.
    """
    with open_sound(path, key) as sound:
        size = max(1, round(chunk_sec * sound.rate))
        if sound.rate == sample_rate:
            for start in range(0, sound.num_frames, size):
                yield sound.read(start, min(size, sound.num_frames - start), sample_rate)
            return
        resampler = require("soxr", extra="audio").ResampleStream(sound.rate, sample_rate, 1, quality="HQ")
        for start in range(0, sound.num_frames, size):
            last = start + size >= sound.num_frames
            piece = sound.read(start, min(size, sound.num_frames - start), sound.rate)
            resampled = resampler.resample_chunk(piece, last=last)
            if len(resampled):
                yield resampled
