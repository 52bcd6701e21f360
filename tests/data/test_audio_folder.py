"""Folders of sound: what is found, how clips are drawn, and every odd file there is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sounds = pytest.importorskip("sounds")

from tessella.data.audio_folder import AudioFolder  # noqa: E402
from tessella.data.base import DataError, UnreadableImage, random_for  # noqa: E402
from tessella.data.loader import evaluation_batches, training_batches  # noqa: E402
from tessella.data.sound import Sound, open_sound, trim_silence  # noqa: E402

tone, write = sounds.tone, sounds.write
RATE = 16000


def folder(path: Path, **options: Any) -> AudioFolder:
    return AudioFolder(path, **{"split": "test", "sample_rate": RATE, "held_out": 1.0, **options})


def only(path: Path, **options: Any) -> torch.Tensor:
    return folder(path, **options)[0]["x"]


def test_speakers_are_folders_and_files_are_found_in_all_of_them(tmp_path: Path) -> None:
    write(tmp_path / "ann" / "deep" / "b.flac", tone(0.1, RATE))
    write(tmp_path / "bob" / "a.ogg", tone(0.1, RATE))
    write(tmp_path / "c.WAV", tone(0.1, RATE))
    write(tmp_path / ".hidden" / "d.wav", tone(0.1, RATE))
    (tmp_path / "notes.txt").write_text("no sound")
    data = folder(tmp_path)
    assert [data[i]["key"] for i in range(len(data))] == ["c.WAV", "ann/deep/b.flac", "bob/a.ogg"]
    assert [data[i]["label"] for i in range(3)] == [-1, 0, 1]
    assert data.class_names == ("ann", "bob")


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "train" / "ann" / "a.wav", tone(0.1, RATE))
    write(tmp_path / "valid" / "ann" / "b.wav", tone(0.1, RATE))
    for split, key in (("train", "train/ann/a.wav"), ("test", "valid/ann/b.wav")):
        data = folder(tmp_path, split=split, held_out=0.5)
        assert [entry["key"] for entry in data] == [key]
        assert data.class_names == ("ann",)


def test_names_that_are_no_text_become_keys_that_are(tmp_path: Path) -> None:
    speaker = tmp_path / os.fsdecode(b"caf\xe9")
    write(tmp_path / "a.wav", tone(0.1, RATE))
    speaker.mkdir()
    (tmp_path / "a.wav").rename(speaker / os.fsdecode(b"na\xefve.wav"))
    (speaker / os.fsdecode(b"\xff.wav")).write_text("no sound")
    data = folder(tmp_path)
    assert data[0]["key"] == r"caf\xe9/na\xefve.wav"
    assert data.class_names == (r"caf\xe9",)
    with pytest.raises(UnreadableImage) as caught:
        data[1]
    assert caught.value.key == r"caf\xe9/\xff.wav"
    assert data.identity()["count"] == 2


def test_metadata_names_files_splits_and_speakers(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / "flac" / f"{name}.flac", tone(0.1, RATE))
    (tmp_path / "metadata.csv").write_text(
        'split,file,seconds,text,speaker\ntrain,flac/c.flac,0.1,"One, two.",zoe\ntest,flac/a.flac,0.1,Three.,amy\n'
    )
    train, test = folder(tmp_path, split="train"), folder(tmp_path)
    assert [train[0]["key"], test[0]["key"]] == ["flac/c.flac", "flac/a.flac"]
    assert (train[0]["label"], test[0]["label"], train.class_names) == (1, 0, ("amy", "zoe"))
    (tmp_path / "metadata.csv").write_text("split,file\ntrain,../../secret.wav\n")
    with pytest.raises(DataError, match=r"'../../secret.wav' is no file below"):
        folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("name\nx\n")
    with pytest.raises(DataError, match=r"metadata.csv needs a column 'file'.*its columns are: name"):
        folder(tmp_path)


def test_real_speech(shared_data: Path) -> None:
    data = AudioFolder(shared_data / "speech_kathleen_24k", split="test")
    assert len(data) == 34
    assert data[0]["x"].shape[1] > 24000


def test_clips_are_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    wave = np.arange(RATE, dtype=np.float32) / RATE
    write(tmp_path / "ramp.wav", wave, subtype="FLOAT")
    data = folder(tmp_path, clip_sec=0.1)
    clips = [data.sample(0, random_for(3, epoch, 0))["x"] for epoch in (0, 0, 1)]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
    assert clips[0].shape == (1, 1600)
    torch.testing.assert_close(clips[0][0].diff(), torch.full((1599,), 1 / RATE), rtol=0, atol=1e-6)
    middle = data[0]["x"][0]
    assert middle[0].item() == pytest.approx(0.45, abs=1e-6)
    batch = next(training_batches(data, batch_size=3, seed=3))
    assert batch["x"].shape == (3, 1, 1600)


def test_short_files_are_repeated(tmp_path: Path) -> None:
    write(tmp_path / "short.wav", np.array([0.25, -0.5, 0.75], np.float32), subtype="FLOAT")
    clip = only(tmp_path, clip_sec=8 / RATE)
    torch.testing.assert_close(clip, torch.tensor([[0.25, -0.5, 0.75, 0.25, -0.5, 0.75, 0.25, -0.5]]))


def test_only_the_clip_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "long.wav", np.zeros(300 * RATE, np.float32))
    read: list[int] = []
    original = Sound.read

    def counted(self: Sound, start: int, num_frames: int, rate: int) -> Any:
        read.append(num_frames)
        return original(self, start, num_frames, rate)

    monkeypatch.setattr(Sound, "read", counted)
    folder(tmp_path, clip_sec=0.5).sample(0, random_for(0, 0, 0))
    assert read == [8000]


def test_three_hours_are_read_by_range_and_refused_whole(tmp_path: Path) -> None:
    seconds = 3 * 3600
    with (tmp_path / "long.wav").open("wb") as file:  # zeros that take no room
        file.write(sounds.wav_header(1000, 2000 * seconds))
        file.truncate(44 + 2000 * seconds)
    assert only(tmp_path, clip_sec=1.0, sample_rate=1000).shape == (1, 1000)
    with pytest.raises(UnreadableImage, match=r"long.wav: 10,800 s are more than max_sec=600 allows"):
        only(tmp_path, sample_rate=1000)


def test_other_rates_are_resampled(tmp_path: Path) -> None:
    write(tmp_path / "phone.wav", tone(1.0, 8000), 8000)
    whole = only(tmp_path, sample_rate=24000)
    assert whole.shape == (1, 24000)
    expected = torch.from_numpy(tone(1.0, 24000))
    torch.testing.assert_close(whole[0, 2400:-2400], expected[2400:-2400], rtol=0, atol=2e-3)
    clip = only(tmp_path, sample_rate=24000, clip_sec=0.25)
    assert clip.shape == (1, 6000)
    torch.testing.assert_close(clip[0], expected[9000:15000], rtol=0, atol=2e-3)  # the middle: 0.375 s on


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "PCM_U8", "ULAW"])
def test_every_kind_of_sample(tmp_path: Path, subtype: str) -> None:
    wave = tone(0.1, RATE)
    write(tmp_path / "a.wav", wave, subtype=subtype)
    tolerance = 0.02 if subtype in ("PCM_U8", "ULAW") else 1e-4
    np.testing.assert_allclose(only(tmp_path)[0].numpy(), wave, atol=tolerance)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(0.1, RATE), tone(0.1, RATE, 330)
    write(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT")
    np.testing.assert_allclose(only(tmp_path)[0].numpy(), (left + right) / 2, atol=1e-6)


def test_samples_beyond_full_scale_are_clipped(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", tone(0.1, RATE, level=3.0), subtype="FLOAT")
    x = only(tmp_path)
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)


def test_gain_sets_the_peak_in_training_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", tone(0.2, RATE, level=0.1), subtype="FLOAT")
    data = folder(tmp_path, gain_db=[-6.0206, -6.0206])
    assert data.sample(0, random_for(0, 0, 0))["x"].abs().max().item() == pytest.approx(0.5, abs=1e-4)
    assert data[0]["x"].abs().max().item() == pytest.approx(0.1, abs=1e-4)


def test_silence_is_a_signal_and_its_ends_are_trimmed_on_request(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.zeros(RATE // 4, np.float32))
    assert not only(tmp_path, gain_db=[-3, 0]).any()
    assert only(tmp_path, trim_db=40).shape == (1, RATE // 4)
    sound = np.concatenate([np.zeros(3200), tone(0.1, RATE), np.zeros(1600)]).astype(np.float32)
    write(tmp_path / "a.wav", sound, subtype="FLOAT")
    np.testing.assert_allclose(only(tmp_path, trim_db=40)[0].numpy(), tone(0.1, RATE), atol=1e-6)
    assert len(trim_silence(sound, RATE, 40)) == 1600


def unreadable(path: Path, **options: Any) -> str:
    with pytest.raises(UnreadableImage) as error:
        only(path, **options)
    return str(error.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.wav"
    file.write_text("this is no sound")
    assert unreadable(tmp_path).startswith("bad.wav: no sound file that can be read")
    write(file, np.zeros(0, np.float32))
    assert unreadable(tmp_path) == "bad.wav: no samples"
    wave = tone(0.1, RATE)
    wave[100] = np.nan
    write(file, wave, subtype="FLOAT")
    assert unreadable(tmp_path) == "bad.wav: NaN or infinite samples"
    file.write_bytes(sounds.wav_header(0, 200) + bytes(200))
    assert unreadable(tmp_path).startswith("bad.wav: ")
    file.write_bytes(b"")
    assert unreadable(tmp_path).startswith("bad.wav: no sound file that can be read")
    file.unlink()
    with pytest.raises(UnreadableImage, match=r"bad\.wav: no such file"), open_sound(file, "bad.wav"):
        pass


def test_an_mp3_with_a_broken_frame_is_named_and_its_sound_part_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp3", tone(2.0, RATE), format="MP3")
    assert only(tmp_path).shape[1] == pytest.approx(2 * RATE, abs=0.1 * RATE)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = b"\xff" * 400
    file.write_bytes(data)
    assert re.match(r"a\.mp3: of frames 0 to \d+,\d+ only \d+,\d+ can be decoded", unreadable(tmp_path))
    with open_sound(file, "a.mp3") as sound:
        start = sound.read(0, RATE // 4, RATE)
    np.testing.assert_allclose(start[2000:], tone(0.25, RATE)[2000:], atol=0.05)


def test_bad_files_are_skipped_in_batches(tmp_path: Path) -> None:
    sounds.write_speech(tmp_path, 4)
    (tmp_path / "zzz.wav").write_text("no sound")
    batch = next(evaluation_batches(folder(tmp_path), batch_size=8))
    assert [key for key, _ in batch["skipped"]] == ["zzz.wav"]
    assert sorted(batch["extent"][:, 0].tolist()) == [6400, 6400, 7200, 8000]
    longest = batch["extent"].amax().item()
    assert batch["x"].shape == (4, 1, longest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be at least 1, got 0"), ({"clip_sec": 0.0}, "clip_sec must be above 0"),
        ({"gain_db": [-1.0, -6.0]}, "gain_db must be two levels"),
        ({"split": "dev"}, "split must be 'train' or 'test'"),
        ({"held_out": 0.0}, "held_out must be above 0"), ({"trim_db": -3.0}, "trim_db must be above 0"),
    ],
)  # fmt: skip
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options)


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sound in .* accepted are files ending in .*wav"):
        folder(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        folder(tmp_path / "nowhere")
