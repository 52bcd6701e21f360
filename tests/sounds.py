"""Sound files for tests."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile", reason="soundfile (the extra 'audio') is missing")


def tone(seconds: float, rate: int, hz: float = 220.0, level: float = 0.5) -> np.ndarray[Any, Any]:
    """A sine."""
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write(path: Path, wave: np.ndarray[Any, Any], rate: int = 16000, **options: Any) -> Path:
    """A sound file of ``wave [T]`` or ``[T, C]``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), wave, rate, **options)
    return path


def wav_header(rate: int, num_bytes: int) -> bytes:
    """The header of a 16-bit mono WAV file."""
    return b"".join([
        b"RIFF", struct.pack("<I", 36 + num_bytes), b"WAVEfmt ",
        struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16), b"data", struct.pack("<I", num_bytes),
    ])  # fmt: skip


def write_speech(folder: Path, count: int = 8, rate: int = 16000, seconds: float = 0.4) -> Path:
    """Files ``speaker_<n>/<n>.wav`` of gliding tones, of slightly different lengths."""
    for index in range(count):
        length = seconds + 0.05 * (index % 3)
        time = np.arange(round(length * rate)) / rate
        glide = 0.4 * np.sin(2 * np.pi * (150 + 40 * index + 200 * time) * time)
        write(folder / f"speaker_{index % 2}" / f"{index}.wav", glide.astype(np.float32), rate)
    return folder
