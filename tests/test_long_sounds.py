"""Files of any length through ``tokenize`` and ``detokenize``, in memory that does not grow with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("pyarrow", "soxr", "soundfile"):
    pytest.importorskip(package, reason=f"{package} is missing")

from conftest import single_threaded  # noqa: E402
from sounds import tone, wav_header, write, write_speech  # noqa: E402

import tessella  # noqa: E402
from tessella.data.audio_folder import AudioFolder  # noqa: E402
from tessella.data.base import Streamed  # noqa: E402
from tessella.data.tokens import read_manifest, read_tokens  # noqa: E402
from tessella.media.audio import Audio  # noqa: E402
from tessella.tokenization.engine import tokenize_dataset  # noqa: E402

ROOT = Path(__file__).parents[1]
RATE = 4000
CAUSAL = 'name = "seanet"\nchannels = 2\nlatent_dim = 4\nstrides = [5, 8]\nnum_lstm_layers = 1\n'
SPECTRAL = (
    'name = "spectral"\nlatent_dim = 4\nhop = 200\nn_fft = 400\ndim = 8\nhidden = 8\n'
    "num_encoder_blocks = 1\nnum_decoder_blocks = 1\n"
)
RECIPE = """
[data]
name = "audio_folder"
path = "speech"
sample_rate = 4000
clip_sec = 0.2
held_out = 0.4
[autoencoder]
{autoencoder}
[quantizer]
name = "fsq"
levels = [5, 5]
[loss]
name = "audio"
sample_rate = 4000
mel_weight = 1.0
[training]
steps = 1
batch_size = 2
warmup_steps = 0
num_workers = 0
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_speech(folder / "speech", 4, RATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, autoencoder in (("causal", CAUSAL), ("spectral", SPECTRAL)):
            Path(f"{name}.toml").write_text(RECIPE.format(autoencoder=autoencoder))
            tessella.train(f"{name}.toml", out=Path(name), device="cpu", quiet=True)
    return folder


@pytest.fixture(autouse=True)
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def noise(seconds: float) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def files(workspace: Path) -> Path:
    """Long and short ones in turn, and two that cannot be used."""
    folder = workspace / "files"
    write(folder / "a.wav", tone(0.5, RATE), RATE)
    write(folder / "b.flac", noise(51.003), RATE)
    write(folder / "c.wav", noise(31.0), 2 * RATE)  # 15.5 s
    write(folder / "d.wav", noise(80.0), 2 * RATE)  # 40 s that are resampled
    broken = noise(60.0)
    broken[RATE * 45] = np.nan
    write(folder / "e.wav", broken, RATE, subtype="FLOAT")
    whole = write(folder / "f.flac", noise(60.0), RATE).read_bytes()
    (folder / "f.flac").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("name", ["causal", "spectral"])
def test_the_tokens_of_a_long_file_are_those_of_the_whole(name: str, files: Path) -> None:
    model = tessella.load(Path(name))
    assert model.autoencoder.chunks_encoder or model.autoencoder.reach is not None
    arguments: Any = {"data": f"audio_folder:{files}", "whole": True, "device": "cpu"}
    section = {"name": "audio_folder", "path": str(files), "sample_rate": RATE, "held_out": 1.0}
    tokenize_dataset(Path(name), section, Path(f"tokens of {name}"), split="test", whole=True, device="cpu",
                     max_skip_share=0.5)  # fmt: skip
    with pytest.raises(tessella.TessellaError, match="2 of 6 inputs cannot be used"):
        tessella.tokenize(Path(name), Path(f"refused by {name}"), **arguments)
    rows = {row.key: row for row in read_tokens(f"tokens of {name}")}
    assert list(rows) == ["a.wav", "b.flac", "c.wav", "d.wav"]
    skipped = dict(read_manifest(Path(f"tokens of {name}")).skipped)
    assert skipped["e.wav"] == "NaN or infinite samples"
    assert "f.flac" in skipped
    medium = Audio(sample_rate=RATE)
    for key, row in rows.items():
        x = medium.read(files / key)
        assert row.extent == (x.shape[1],)
        alone = model.encode(x[None], pad=True)[0]
        assert row.indices.shape == alone.shape
        # Resampled at once or in pieces, samples differ by rounding.
        assert (row.indices == alone).double().mean() > (0.999 if key == "d.wav" else 0.9999)
    tessella.detokenize(Path(name), Path(f"tokens of {name}"), Path(f"back from {name}"), device="cpu")
    for key, row in rows.items():
        back = medium.read(Path(f"back from {name}") / f"{key.removesuffix('.wav')}.wav")
        assert back.shape == (1, *row.extent)
        whole = model.decode(row.indices[None], extent=row.extent)[0]
        torch.testing.assert_close(back, whole.clamp(-1, 1), rtol=0, atol=2e-4)


def test_only_long_whole_files_come_in_pieces(files: Path) -> None:
    def kinds(**options: Any) -> list[bool]:
        data = AudioFolder(files, split="test", sample_rate=RATE, held_out=1.0, **options)
        return [isinstance(data.sample_or_stream(index), Streamed) for index in range(4)]

    assert kinds() == [False, True, False, True]
    assert kinds(clip_sec=1.0) == [False] * 4
    assert kinds(trim_db=40.0) == [False] * 4


MEASURED = r"""
import re, sys, tessella
from pathlib import Path
run, folder = map(Path, sys.argv[1:])
tessella.tokenize(run, folder / "tokens", data=f"audio_folder:{folder / 'file'}", whole=True, device="cpu")
tessella.detokenize(run, folder / "tokens", folder / "back", device="cpu")
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak memory of a process in /proc")
def test_three_hours_take_the_memory_of_ten_seconds(workspace: Path, tmp_path: Path) -> None:
    peaks = {}
    for seconds in (10, 3 * 3600):
        file = tmp_path / str(seconds) / "file" / "a.wav"
        file.parent.mkdir(parents=True)
        with file.open("wb") as stream:  # zeros that take no room
            stream.write(wav_header(RATE, 2 * RATE * seconds))
            stream.truncate(44 + 2 * RATE * seconds)
        command = [sys.executable, "-c", MEASURED, str(workspace / "spectral"), str(file.parents[1])]
        done = subprocess.run(command, capture_output=True, text=True, env=single_threaded(), cwd=ROOT, timeout=300,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[seconds] = float(done.stdout.splitlines()[-1])
        (row,) = read_tokens(file.parents[1] / "tokens")
        assert row.extent == (RATE * seconds,)
        assert (file.parents[1] / "back" / "a.wav").stat().st_size == 44 + 2 * RATE * seconds
    assert peaks[3 * 3600] < peaks[10] + 60, peaks  # the samples alone would be 165 MiB
