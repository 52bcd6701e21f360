"""Sound through every command: train, tokenize, detokenize, evaluate, report, and a generator of its tokens."""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("pesq", "pystoi", "soxr", "soundfile"):
    pytest.importorskip(package, reason=f"{package} (the extra 'audio') is missing")

from sounds import write, write_speech  # noqa: E402

import tessella  # noqa: E402
from tessella import cli  # noqa: E402
from tessella.data.audio_folder import AudioFolder  # noqa: E402
from tessella.data.loader import evaluation_batches  # noqa: E402
from tessella.data.tokens import read_tokens  # noqa: E402
from tessella.evaluation.reconstruction import evaluate_reconstruction  # noqa: E402
from tessella.media.audio import Audio, wav  # noqa: E402
from tessella.training.logs import read_log  # noqa: E402

RECIPE = """
[data]
name = "audio_folder"
path = "speech"
sample_rate = 8000
clip_sec = 0.1
held_out = 0.4
[autoencoder]
name = "vocos"
channels = 4
latent_dim = 8
strides = [4, 5]
dim = 16
hidden = 32
num_blocks = 1
n_fft = 80
[quantizer]
name = "fsq"
levels = [5, 5]
[loss]
name = "audio"
sample_rate = 8000
mel_weight = 1.0
spectral_weight = 0.5
l1_weight = 0.1
balance = true
[loss.adversary]
discriminators = ["period", "resolution"]
width = 0.0625
start_step = 1
[training]
steps = 4
batch_size = 4
warmup_steps = 1
log_every = 1
checkpoint_every = 2
sample_every = 4
num_workers = 0
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_speech(folder / "speech", 10)
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return workspace / tessella.train("tiny.toml", out=Path("run"), device="cpu", quiet=False)


@pytest.fixture(autouse=True)
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def test_training_writes_what_it_should(run: Path) -> None:
    recipe = (run / "recipe.toml").read_text()
    assert 'name = "audio"\nsample_rate = 8000' in recipe
    last = read_log(run / "log.jsonl")[-1]
    assert {"mel", "spectral", "l1", "adversarial", "features", "seconds_per_s", "grad_norm/discriminator"} <= set(last)
    assert (run / "samples/step-00000004.png").is_file()


def test_a_continued_run_is_the_same_run(run: Path) -> None:
    short = tessella.train("tiny.toml", out=Path("short"), overrides=["training.steps=2"], device="cpu", quiet=True)
    for file in Path(short).rglob("recipe.toml"):
        file.write_text((run / "recipe.toml").read_text())
    tessella.train("tiny.toml", out=Path("short"), device="cpu", quiet=True)
    weights = [(folder / "checkpoints/step-00000004/model.safetensors").read_bytes() for folder in (run, Path(short))]
    assert weights[0] == weights[1]


def test_whole_files_through_tokens_and_back(run: Path) -> None:
    tokenizer = tessella.load(run)
    result = tessella.tokenize(run, Path("tokens"), whole=True, device="cpu")
    assert result.num_rows == 10
    rows = {row.key: row for row in read_tokens("tokens")}
    data = AudioFolder("speech", split="test", sample_rate=8000, held_out=1.0)
    for sample in data:
        alone = tokenizer.encode(sample["x"][None], pad=True)[0]
        assert torch.equal(rows[sample["key"]].indices, alone)
        assert rows[sample["key"]].extent == tuple(sample["x"].shape[1:])
    assert tessella.detokenize(run, Path("tokens"), Path("files"), device="cpu") == 10
    with wave.open(f"files/{data[0]['key']}", "rb") as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
        levels = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    row = rows[data[0]["key"]]
    expected = tokenizer.decode(row.indices[None], extent=row.extent)[0, 0].clamp(-1, 1)
    np.testing.assert_array_equal(levels, (expected * 32767).round().numpy().astype("<i2"))


def test_files_are_measured_without_their_padding(run: Path) -> None:
    tokenizer = tessella.load(run)
    data = AudioFolder("speech", split="test", sample_rate=8000, held_out=1.0)
    records = []
    for batch_size in (1, 10):
        batches = evaluation_batches(data, batch_size=batch_size)
        records.append(evaluate_reconstruction(tokenizer, batches, Audio(sample_rate=8000).metrics()))
    for name in ("mel_distance", "si_sdr_db", "usage", "kbps"):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-5)


def test_evaluation_and_report(run: Path) -> None:
    page = tessella.report(run, device="cpu").read_text()
    record = json.loads((run / "evaluation.json").read_text())
    assert record["kbps"] == pytest.approx(8000 / 20 * np.log2(25) / 1000)
    assert record["mel_distance"] > 0
    assert record["real_time_factor"] > 0
    assert "utmos" in record["protocol"]["absent"]
    assert page.count("<audio controls") >= 2
    assert "media-src data:" in page
    assert (run / "original-01.wav").read_bytes()[:4] == b"RIFF"


def test_word_errors_from_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx (the extra 'audio') is missing")
    keys = [sample["key"] for sample in AudioFolder("speech", split="test", sample_rate=8000, held_out=0.4)]
    Path("texts.csv").write_text("file,text\n" + "".join(f"{key},one two three\n" for key in keys[:-1]))
    monkeypatch.setattr(sys, "argv", ["tessella", "evaluate", str(run), "--whole", "--transcripts", "texts.csv"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    record = json.loads((run / "evaluation.json").read_text())
    assert record["wer"] >= 0
    assert record["wer_original"] >= 0
    assert "wer" not in record["protocol"]["absent"]
    assert "wer: 1" in record["protocol"]["files_without"]


@pytest.mark.parametrize("rate", [8000, 12000])
def test_files_go_through_in_pieces(run: Path, tmp_path: Path, rate: int) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 25 * rate).astype(np.float32)
    write(tmp_path / "long.flac", noise, rate)
    medium, tokenizer = Audio(sample_rate=8000), tessella.load(run)
    pieces = list(medium.read_pieces(tmp_path / "long.flac"))
    whole = medium.read(tmp_path / "long.flac")
    assert len(pieces) == 3
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4)
    stream = tokenizer.stream()
    indices = list(stream.encode(piece[None] for piece in medium.read_pieces(tmp_path / "long.flac")))
    assert torch.equal(torch.cat(indices, 1), tokenizer.encode(torch.cat(pieces, 1)[None], pad=True))
    medium.write_pieces((x_hat[0] for x_hat in stream.decode(indices)), tmp_path / "back.wav")
    back = medium.read(tmp_path / "back.wav")
    assert back.shape == whole.shape
    medium.write(torch.cat([x_hat[0] for x_hat in stream.decode(indices)], 1), tmp_path / "at_once.wav")
    assert (tmp_path / "back.wav").read_bytes() == (tmp_path / "at_once.wav").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_medium_reads_what_it_writes(tmp_path: Path) -> None:
    medium = Audio(sample_rate=8000)
    x = torch.tensor([[0.5, -1.5, 0.25, 0.0]])
    medium.write(x, tmp_path / "a.wav")
    torch.testing.assert_close(medium.read(tmp_path / "a.wav"), x.clamp(-1, 1), rtol=0, atol=1e-4)
    assert medium.units(torch.zeros(3, 1, 4000)) == 1.5
    assert len(wav(torch.zeros(2, 100), 8000)) == 44 + 400
    with pytest.raises(tessella.TessellaError, match="unknown option 'pixels' of the metrics of sound"):
        medium.metrics(pixels="uint8")
