"""How alike speech sounds: PESQ, STOI, SI-SDR, mel distance, voicing, and what a recogniser still understands."""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from tessella.data.base import Batch
from tessella.errors import ConfigError
from tessella.evaluation.base import Metrics, Number
from tessella.evaluation.pitch import voicing_f1
from tessella.extras import require
from tessella.losses.mel import MelSpectrogram, log_mel
from tessella.text import name_to_text

# Of an original and its reconstruction, both [T] in [-1, 1], and their rate: a number.
Scorer = Callable[[Tensor, Tensor, int], float]
# Metrics whose networks no package brings along: measured where a scorer is given, otherwise named as absent.
HOOKS = ("utmos", "visqol", "speaker_similarity")

_PESQ_HZ = _RECOGNISER_HZ = 16_000
_STOI_LEAST_SEC = 0.4  # 30 frames of 25.6 ms, hop 12.8 ms: below, STOI is not defined


class SpeechMetrics(Metrics):
    """Means over files of the scores of mono speech.

    Args:
        sample_rate: of the waveforms, in Hz.
        transcripts: a ``metadata.csv`` with columns ``file`` and ``text``; with it the word error rates of originals
            and reconstructions are measured by an offline recogniser.
        scorers: further metrics by name, those of :data:`HOOKS` among them; absent ones are named in the record.

    Raises:
        ConfigError: transcripts without these columns.
    """

    signals: ClassVar[str] = "files"
    bits_name: ClassVar[str] = "kbps"
    headline: ClassVar[frozenset[str]] = frozenset({"stoi", "pesq", "mel_distance", "wer"})

    def __init__(
        self, sample_rate: int, *, transcripts: str | Path | None = None, scorers: Mapping[str, Scorer] | None = None
    ) -> None:
        self.sample_rate = sample_rate
        self.scorers = dict(scorers or {})
        self.texts = None if transcripts is None else _read_transcripts(Path(transcripts))
        self._scores: dict[str, list[float]] = {}
        self._errors = {"wer": 0, "wer_original": 0}
        self._num_words = 0
        self._num_unmeasured: dict[str, int] = {}

    @property
    def bits_scale(self) -> float:
        """From bits a sample to kbit a second."""
        return self.sample_rate / 1000

    def update(self, x: Tensor, x_hat: Tensor, batch: Batch | None = None) -> None:
        """Score waveforms ``[B, C, T]``; channels are averaged."""
        x, x_hat = as_written(x), as_written(x_hat)
        keys = [""] * len(x) if batch is None else batch["key"]
        mels = mel_distances(x, x_hat, self.sample_rate).tolist()
        for key, truth, rebuilt, mel in zip(keys, x.mean(1), x_hat.mean(1), mels, strict=True):
            scores: dict[str, float | None] = {
                "pesq": pesq(truth, rebuilt, self.sample_rate),
                "stoi": stoi(truth, rebuilt, self.sample_rate),
                "si_sdr_db": si_sdr(truth, rebuilt),
                "mel_distance": mel,
                "voicing_f1": voicing_f1(truth, rebuilt, self.sample_rate),
                **{name: scorer(truth, rebuilt, self.sample_rate) for name, scorer in self.scorers.items()},
            }
            for name, value in scores.items():
                if value is None:
                    self._num_unmeasured[name] = self._num_unmeasured.get(name, 0) + 1
                else:
                    self._scores.setdefault(name, []).append(value)
            if self.texts is not None and key not in self.texts:
                self._num_unmeasured["wer"] = self._num_unmeasured.get("wer", 0) + 1
            elif self.texts is not None:
                words = spoken_words(self.texts[key])
                self._num_words += len(words)
                for name, wave in (("wer", rebuilt), ("wer_original", truth)):
                    self._errors[name] += word_errors(words, recognise(wave, self.sample_rate))

    def compute(self) -> dict[str, Any]:
        """The means; None for what could not be measured in any file."""
        names = ("pesq", "stoi", "si_sdr_db", "mel_distance", "voicing_f1", *self.scorers)
        means: dict[str, Any] = {name: _mean(self._scores.get(name, [])) for name in names}
        if self.texts is not None:
            means |= {
                name: count / self._num_words if self._num_words else None for name, count in self._errors.items()
            }
        return means

    def rates(self, positions_per_sec: float) -> dict[str, float]:
        """See :meth:`Metrics.rates`."""
        return {"real_time_factor": positions_per_sec / self.sample_rate}

    def protocol(self) -> dict[str, Any]:
        """The rate, what is absent, and how many files a metric refused."""
        absent = [name for name in HOOKS if name not in self.scorers] + ([] if self._num_words else ["wer"])
        return {
            "sample_rate": self.sample_rate,
            "absent": ", ".join(absent) or "none",
            "files_without": ", ".join(f"{name}: {count}" for name, count in self._num_unmeasured.items()) or "none",
        }

    def meanings(self) -> dict[str, str]:
        """See :meth:`Metrics.meanings`."""
        return {
            "sample_rate": "in Hz; both signals clamped to [-1, 1] and rounded to 16 bits before every metric",
            "absent": "not measured, for want of a network or of transcripts",
            "files_without": "files too short or silent for a metric, or without a transcript: left out of its mean",
            "pesq": "wide-band PESQ (ITU-T P.862.2, package pesq) at 16 kHz, 1.04 to 4.64; mean",
            "stoi": "short-time objective intelligibility (package pystoi), 0 to 1; mean",
            "si_sdr_db": "scale-invariant signal-to-distortion ratio of samples without offset, in dB; mean",
            "mel_distance": "mean |difference| of natural logarithms of 100 HTK mels, 1024 samples a frame, hop 256",
            "voicing_f1": "F1 of voiced frames, 10 ms apart, by normalised cross-correlation of at least 0.5; mean",
            "real_time_factor": "seconds of sound encoded and decoded in a second",
            "wer": "word errors per word of the transcripts (pocketsphinx, its own English model) of reconstructions",
            "wer_original": "the same of the originals: the recogniser's own error",
        }

    def readable(self, record: Mapping[str, Any]) -> list[Number]:
        """See :meth:`Metrics.readable`."""
        speed = f"{record['real_time_factor']:.3g} x real time"
        meaning = record["protocol"]["meaning"]["real_time_factor"]
        return [*super().readable(record), Number("real_time_factor", "speed", speed, meaning)]

    def protocol_parts(self, protocol: Mapping[str, Any]) -> list[str]:
        """See :meth:`Metrics.protocol_parts`."""
        return [f"{protocol['sample_rate']} Hz", f"absent: {protocol['absent']}"]


def as_written(x: Tensor) -> Tensor:
    """``x`` as a 16-bit file would hold it: clamped to [-1, 1], rounded to 1 / 32767."""
    return (x.detach().float().cpu().clamp(-1, 1) * 32767).round() / 32767


def mel_distances(x: Tensor, x_hat: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference ``[B]`` of the log-mel spectrograms of ``[B, C, T]``, as in training."""
    spectrogram = _mel(sample_rate)
    return (log_mel(spectrogram, x.cpu()) - log_mel(spectrogram, x_hat.cpu())).abs().flatten(1).mean(1)


def si_sdr(x: Tensor, x_hat: Tensor) -> float | None:
    """``10 log10(|a x|^2 / |a x - x_hat|^2)`` in dB with a = <x_hat, x> / |x|^2, of ``[T]`` less their means.

    At most 100 dB and at least -100; None for a silent original.
    """
    truth, rebuilt = (signal.double() - signal.double().mean() for signal in (x, x_hat))
    power = truth.square().sum()
    if power == 0:
        return None
    target = (rebuilt @ truth) / power * truth
    ratio = target.square().sum() / (target - rebuilt).square().sum().clamp(min=1e-30)
    return float(10 * ratio.clamp(1e-10, 1e10).log10())


def pesq(x: Tensor, x_hat: Tensor, sample_rate: int) -> float | None:
    """Wide-band PESQ of ``[T]``; None for silence, where it finds no utterance, or less than a quarter of a second.

    Raises:
        ModuleNotFoundError: pesq or soxr is missing.
    """
    package = require("pesq", extra="audio")
    if not x.any() or not x_hat.any():
        return None
    pair = [resampled(signal, sample_rate, _PESQ_HZ) for signal in (x, x_hat)]
    try:
        return float(package.pesq(_PESQ_HZ, *pair, "wb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return None


def stoi(x: Tensor, x_hat: Tensor, sample_rate: int) -> float | None:
    """STOI of ``[T]``; None where fewer than 30 frames of the original are not silent.

    Raises:
        ModuleNotFoundError: pystoi is missing.
    """
    package = require("pystoi", extra="audio")
    if len(x) < _STOI_LEAST_SEC * sample_rate or not x.any():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(package.stoi(x.double().numpy(), x_hat.double().numpy(), sample_rate, extended=False))
        except RuntimeWarning:  # it warns and gives 1e-5
            return None


def recognise(x: Tensor, sample_rate: int) -> list[str]:
    """The words that pocketsphinx hears in ``[T]``, with the American English model of its package.

    Raises:
        ModuleNotFoundError: pocketsphinx or soxr is missing.
    """
    decoder = _recogniser()
    levels = np.clip(resampled(x, sample_rate, _RECOGNISER_HZ) * 32767, -32768, 32767).astype(np.int16)
    decoder.start_utt()
    decoder.process_raw(levels.tobytes(), full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    return spoken_words(hypothesis.hypstr) if hypothesis is not None else []


def spoken_words(text: str) -> list[str]:
    """The words of a text in lower case: letters, digits and apostrophes; variants as ``read(2)`` lose their number."""
    return re.findall(
        r"[a-z0-9']+", re.sub(r"\(\d+\)", "", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    )


def word_errors(words: Sequence[str], heard: Sequence[str]) -> int:
    """The least number of words to replace, leave out or put in that turns ``words`` into ``heard``."""
    row = list(range(len(heard) + 1))
    for count, word in enumerate(words, start=1):
        above, row = row, [count]
        for position, other in enumerate(heard):
            row.append(min(above[position] + (word != other), above[position + 1] + 1, row[position] + 1))
    return row[-1]


def resampled(x: Tensor, sample_rate: int, wanted: int) -> np.ndarray[Any, Any]:
    """``x [T]`` at another rate, as float32."""
    wave = x.float().numpy()
    if sample_rate == wanted:
        return wave
    return require("soxr", extra="audio").resample(wave, sample_rate, wanted)  # type: ignore[no-any-return]


@cache
def _recogniser() -> Any:
    return require("pocketsphinx", extra="audio").Decoder(samprate=float(_RECOGNISER_HZ), loglevel="FATAL")


@cache
def _mel(sample_rate: int) -> MelSpectrogram:
    return MelSpectrogram(sample_rate)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _read_transcripts(file: Path) -> dict[str, str]:
    """Text by key; what has none is left out."""
    wanted = "transcripts are a table (.csv) with columns 'file' and 'text'"
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns, rows = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}; {wanted}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file} is no table: {error}; {wanted}") from error
    if not {"file", "text"} <= set(columns):
        raise ConfigError(f"{file} has columns {', '.join(columns) or 'none'}; {wanted}")
    return {name_to_text(row["file"]): row["text"] for row in rows if row["file"] and row["text"]}
