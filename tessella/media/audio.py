"""Sound."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from tessella.data.sound import open_sound, sound_chunks
from tessella.errors import ConfigError
from tessella.evaluation.base import Metrics
from tessella.evaluation.speech import SpeechMetrics, mel_distances
from tessella.media.base import Medium
from tessella.reporting.page import Card, Gallery, Section, Tile
from tessella.reporting.pictures import png, token_maps
from tessella.reporting.sound import spectrogram, token_strip, waveform
from tessella.storage import write_bytes, write_errors

_PCM_16 = 32767


class Audio(Medium):
    """Waveforms ``[C, T]`` in [-1, 1], in files as 16-bit WAV.

    Args:
        sample_rate: in Hz.
        channels: 1 mono, 2 stereo.

    Raises:
        ValueError: a number below 1.
    """

    unit: ClassVar[str] = "seconds"

    def __init__(self, *, sample_rate: int = 24_000, channels: int = 1) -> None:
        if min(sample_rate, channels) < 1:
            raise ValueError(f"sample_rate and channels must be at least 1, got {sample_rate} and {channels}")
        self.sample_rate = sample_rate
        self.channels = channels

    @property
    def suffix(self) -> str:
        """``.wav``."""
        return ".wav"

    def units(self, x: Tensor) -> float:
        """Seconds."""
        return len(x) * x.shape[-1] / self.sample_rate

    def read(self, path: Path) -> Tensor:
        """A sound file in any format that data sets read, at this rate, down-mixed."""
        with open_sound(path, str(path)) as sound:
            samples = sound.read(0, sound.num_frames, self.sample_rate)
        return torch.from_numpy(np.clip(samples, -1, 1))[None].expand(self.channels, -1)

    def accept(self, signal: Any) -> Tensor:
        """A file's path, a tensor ``[C, T]``, or a pair (waveform ``[T]`` or ``[C, T]``, its rate in Hz).

        Raises:
            ValueError: a waveform of another rate.
        """
        if not isinstance(signal, tuple):
            return super().accept(signal)
        waveform, rate = signal
        if rate != self.sample_rate:
            raise ValueError(f"expected a waveform of {self.sample_rate} Hz, got one of {rate}; files are resampled")
        x = torch.as_tensor(waveform, dtype=torch.float32)
        return x[None] if x.ndim == 1 else x

    def present(self, x: Tensor) -> tuple[Tensor, int]:
        """The waveform ``[C, T]`` and its rate in Hz."""
        return x, self.sample_rate

    def write(self, x: Tensor, path: Path) -> None:
        """Clamped to [-1, 1] and rounded to 16 bits."""
        write_bytes(path, wav(x, self.sample_rate))

    def read_pieces(self, path: Path) -> Iterator[Tensor]:
        """:meth:`read`, some ten seconds ``[C, T']`` at a time, of files of any length."""
        for samples in sound_chunks(path, str(path), self.sample_rate):
            yield torch.from_numpy(np.clip(samples, -1, 1))[None].expand(self.channels, -1)

    def write_pieces(self, pieces: Iterable[Tensor], path: Path) -> None:
        """:meth:`write` of pieces ``[C, T']``, as they come."""
        temporary = path.with_name(f".{path.name}.tmp")
        with write_errors(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as stream:
                    _write_wav(stream, pieces, self.channels, self.sample_rate)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def metrics(self, *, weights: Path | None = None, **options: Any) -> Metrics:
        """Of speech, see :class:`~tessella.evaluation.speech.SpeechMetrics`.

        Options are its ``transcripts`` and ``scorers``; no weights are needed.
        """
        if (protocol := options.pop("protocol", None)) is not None:
            raise ConfigError(f"no protocol {protocol!r} is known for sound")
        for name in options:
            if name not in ("transcripts", "scorers"):
                raise ConfigError(f"unknown option {name!r} of the metrics of sound; accepted: transcripts, scorers")
        return SpeechMetrics(self.sample_rate, **options)

    def show(self, x: Tensor, x_hat: Tensor, indices: Tensor, codebook: Tensor | None, keys: Sequence[str]) -> Section:
        """Originals and reconstructions as waveforms, spectrograms and players, with the tokens as a strip of colours.

        Raises:
            ValueError: tensors of different shapes or lengths.
        """
        if x.shape != x_hat.shape:
            raise ValueError(f"x and x_hat must have one shape, got {list(x.shape)} and {list(x_hat.shape)}")
        if len(indices) != len(x) or (keys and len(keys) != len(x)):
            raise ValueError(f"indices and keys must be of {len(x)} signals, got {len(indices)} and {len(keys)}")
        distances = mel_distances(x, x_hat, self.sample_rate).tolist()
        strips = [token_strip(picture) for picture in token_maps(indices, codebook)]
        cards, files = [], {}
        for position in range(len(x)):
            tiles = []
            for label, signal in (("original", x[position]), ("reconstruction", x_hat[position])):
                sound = wav(signal, self.sample_rate)
                tiles += [
                    Tile(f"{label}, waveform", waveform(signal)),
                    Tile(label, spectrogram(signal, self.sample_rate), sound=sound),
                ]
                files[f"{label}-{position + 1:02d}.wav"] = sound
            tiles.append(Tile("tokens", strips[position]))
            title = keys[position] if keys else f"sound {position + 1}"
            cards.append(Card(tiles, title=title, note=f"mel distance {distances[position]:.3f}"))
        files["spectrograms.png"] = png(np.concatenate([tile.picture for card in cards for tile in card.tiles[1:4:2]]))
        return Section("Sounds", _explanation(indices, x.shape[-1] / self.sample_rate), [Gallery(cards, files)])

    def show_samples(self, real: Mapping[str, Tensor], generated: Mapping[str, Tensor], settings: str) -> Section:
        """A card a class, with spectrograms and players."""
        cards = []
        for name in generated:
            tiles = [
                Tile(kind, spectrogram(signal, self.sample_rate), sound=wav(signal, self.sample_rate))
                for kind, signals in (("real, held out", real.get(name)), ("generated", generated[name]))
                if signals is not None
                for signal in signals
            ]
            cards.append(Card(tiles, title=name))
        text = f"Every sound was drawn token by token and then decoded. {settings}"
        return Section("Generated sounds", text, [Gallery(cards)])

    def preview(self, rows: Sequence[Tensor], stem: Path) -> Path:
        """Spectrograms, the rows below each other for each signal in turn."""
        path = stem.with_name(f"{stem.name}.png")
        pictures = [spectrogram(row[position], self.sample_rate) for position in range(len(rows[0])) for row in rows]
        write_bytes(path, png(np.concatenate(pictures)))
        return path


def wav(x: Tensor, sample_rate: int) -> bytes:
    """The 16-bit WAV file of ``x [C, T]`` in [-1, 1]; what is beyond is clamped."""
    stream = io.BytesIO()
    _write_wav(stream, [x], len(x), sample_rate)
    return stream.getvalue()


def _write_wav(stream: BinaryIO, pieces: Iterable[Tensor], channels: int, sample_rate: int) -> None:
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        for x in pieces:
            levels = (x.detach().float().cpu().clamp(-1, 1) * _PCM_16).round().to(torch.int16)
            file.writeframes(levels.T.contiguous().numpy().astype("<i2").tobytes())


def _explanation(indices: Tensor, seconds: float) -> str:
    positions, num_codebooks = indices.shape[1:]
    layers = f", a row for each of {num_codebooks} codebooks" if num_codebooks > 1 else ""
    return (
        f"Each sound of {seconds:.2f} s and what is left of it after {positions * num_codebooks:,} tokens: waveforms, "
        f"logarithmic mel spectrograms (0 to half the rate, 80 dB), players, and the tokens{layers}: a code has one "
        "colour on the whole page, and where the codebook is known, similar codes have similar colours."
    )
