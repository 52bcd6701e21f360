"""Metrics of speech: hand-computed numbers, their ends, and real speech."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("pesq", "pystoi", "soxr", "soundfile", "pocketsphinx"):
    pytest.importorskip(package, reason=f"{package} (the extra 'audio') is missing")

from tessella.data.base import Batch  # noqa: E402
from tessella.errors import ConfigError  # noqa: E402
from tessella.evaluation.pitch import track_pitch, voicing_f1  # noqa: E402
from tessella.evaluation.speech import (  # noqa: E402
    SpeechMetrics,
    as_written,
    mel_distances,
    pesq,
    recognise,
    si_sdr,
    spoken_words,
    stoi,
    word_errors,
)

RATE = 24000


def sine(hz: float, seconds: float = 0.5, rate: int = RATE) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hz * torch.arange(round(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def speech(shared_data: Path) -> torch.Tensor:
    import soundfile

    wave, _ = soundfile.read(shared_data / "speech_kathleen_24k" / "flac" / "arctic_a0002.flac", dtype="float32")
    return torch.from_numpy(wave)


def test_si_sdr_by_hand() -> None:
    x, noise = torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])
    # Orthogonal noise of a tenth of the amplitude: 20 dB, at any scale and offset.
    assert si_sdr(x, x + 0.1 * noise) == pytest.approx(20)
    assert si_sdr(x, 3 * (x + 0.1 * noise) + 7) == pytest.approx(20)
    assert si_sdr(x, x) == 100
    assert si_sdr(x, torch.zeros(4)) == -100
    assert si_sdr(torch.zeros(4), x) is None


@pytest.mark.parametrize("hz", [60, 110, 220, 500])
def test_the_pitch_of_a_tone(hz: float) -> None:
    harmonics = sine(hz) + 0.5 * sine(2 * hz) + 0.25 * sine(3 * hz)
    pitch = track_pitch(harmonics, RATE)
    assert pitch.median().item() == pytest.approx(hz, rel=0.02)


def test_noise_and_silence_are_unvoiced() -> None:
    assert (track_pitch(0.3 * torch.randn(RATE), RATE) > 0).float().mean() < 0.02
    assert not track_pitch(torch.zeros(RATE), RATE).any()
    assert not track_pitch(1e-4 * sine(200), RATE).any()  # -80 dB


def test_voicing_f1_by_hand() -> None:
    half = torch.cat([sine(200), torch.zeros(RATE // 2)])
    assert voicing_f1(half, half, RATE) == 1
    assert voicing_f1(half, torch.zeros(RATE), RATE) == 0
    assert voicing_f1(torch.zeros(RATE), torch.zeros(RATE), RATE) is None
    # Twice as many voiced frames as there are: precision 1/2, recall 1.
    assert voicing_f1(half, sine(200, 1.0), RATE) == pytest.approx(2 / 3, abs=0.04)


def test_word_errors_by_hand() -> None:
    words = spoken_words("Don't stop, read(2) it - 2 times!")
    assert words == ["don't", "stop", "read", "it", "2", "times"]
    assert word_errors(["a", "b", "c"], ["a", "c"]) == 1
    assert word_errors(["a", "b"], ["x", "a", "b", "y"]) == 2
    assert word_errors(["a", "b"], ["b", "a"]) == 2
    assert word_errors(["a"], []) == 1


def test_the_mel_distance_of_half_the_level_is_the_logarithm_of_two() -> None:
    x = 0.2 * torch.randn(2, 1, RATE)
    torch.testing.assert_close(mel_distances(x, x / 2, RATE), torch.full((2,), math.log(2)), rtol=1e-4, atol=1e-4)


def test_files_hold_16_bits() -> None:
    torch.testing.assert_close(as_written(torch.tensor([0.5, 2.0, 1e-6])), torch.tensor([16384 / 32767, 1.0, 0.0]))


def test_what_cannot_be_measured_is_none() -> None:
    short, silent = 0.1 * torch.randn(1000), torch.zeros(RATE)
    assert pesq(short, short, RATE) is None
    assert pesq(silent, silent, RATE) is None
    assert stoi(short, short, RATE) is None
    assert stoi(silent, silent, RATE) is None
    metrics = SpeechMetrics(RATE)
    metrics.update(silent[None, None], silent[None, None])
    found = metrics.compute()
    assert found["pesq"] is None
    assert found["mel_distance"] == 0
    assert metrics.protocol()["files_without"] == "pesq: 1, stoi: 1, si_sdr_db: 1, voicing_f1: 1"


def test_perfect_and_noisy_speech(speech: torch.Tensor) -> None:
    rng = torch.Generator().manual_seed(0)
    noisy = speech + 0.05 * torch.randn(len(speech), generator=rng)
    assert pesq(speech, speech, RATE) == pytest.approx(4.64, abs=0.01)
    assert stoi(speech, speech, RATE) == pytest.approx(1, abs=1e-6)
    assert 1 <= pesq(speech, noisy, RATE) < 3  # type: ignore[operator]
    assert stoi(speech, noisy, RATE) < 0.97  # type: ignore[operator]
    f1 = voicing_f1(speech, speech.roll(RATE // 2), RATE)
    assert f1 is not None
    assert 0.1 < f1 < 0.9


def test_the_recogniser_hears_words(speech: torch.Tensor, shared_data: Path) -> None:
    heard = recognise(speech, RATE)
    text = "Not at this particular case, Tom, apologized Whittemore."
    assert word_errors(spoken_words(text), heard) <= 4
    assert {"particular", "case"} <= set(heard)

    metrics = SpeechMetrics(RATE, transcripts=shared_data / "speech_kathleen_24k" / "metadata.csv")
    batch = Batch(x=speech[None, None], label=torch.tensor([-1]), key=["flac/arctic_a0002.flac"], skipped=[])
    metrics.update(batch["x"], torch.zeros_like(batch["x"]), batch)
    found = metrics.compute()
    assert found["wer"] == 1  # it hears nothing in silence
    assert found["wer_original"] == word_errors(spoken_words(text), heard) / 8
    assert "wer" not in metrics.protocol()["absent"]


def test_scorers_are_hooks_and_their_absence_is_told() -> None:
    x = 0.1 * torch.randn(1, 1, RATE)
    plain = SpeechMetrics(RATE)
    assert plain.protocol()["absent"] == "utmos, visqol, speaker_similarity, wer"
    hooked = SpeechMetrics(RATE, scorers={"utmos": lambda truth, rebuilt, rate: 3.5 + (rate == RATE)})
    hooked.update(x, x)
    assert hooked.compute()["utmos"] == 4.5
    assert hooked.protocol()["absent"] == "visqol, speaker_similarity, wer"


def test_what_holds_no_transcripts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "metadata.csv"
    wanted = r"; transcripts are a table \(\.csv\) with columns 'file' and 'text'$"
    file.write_text("file\na.wav\n")
    with pytest.raises(ConfigError, match=rf"metadata\.csv has columns file{wanted}"):
        SpeechMetrics(RATE, transcripts=file)
    with pytest.raises(ConfigError, match=rf"cannot be read: is a directory{wanted}"):
        SpeechMetrics(RATE, transcripts=tmp_path)
    with pytest.raises(ConfigError, match=rf"none\.csv cannot be read: no such file or directory{wanted}"):
        SpeechMetrics(RATE, transcripts=tmp_path / "none.csv")
    file.write_bytes(b"file,text\na.wav,caf\xe9\n")
    with pytest.raises(ConfigError, match=rf"metadata\.csv is no table: .*{wanted}"):
        SpeechMetrics(RATE, transcripts=file)


def test_files_without_a_transcript_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "metadata.csv"
    file.write_text("file,text\na.wav\nb.wav,\n")  # a row that is too short, and an empty one
    metrics = SpeechMetrics(RATE, transcripts=file)
    x = 0.1 * torch.randn(2, 1, RATE)
    metrics.update(x, x, Batch(x=x, label=torch.tensor([-1, -1]), key=["a.wav", "b.wav"], skipped=[]))
    assert metrics.compute()["wer"] is None
    assert metrics.protocol()["absent"].endswith(", wer")
    assert "wer: 2" in metrics.protocol()["files_without"]


def test_stereo_is_averaged() -> None:
    x = torch.from_numpy(np.stack([sine(200).numpy(), sine(300).numpy()]))[None]
    metrics = SpeechMetrics(RATE)
    metrics.update(x, x.mean(1, keepdim=True).expand(-1, 2, -1))
    assert metrics.compute()["si_sdr_db"] > 60
