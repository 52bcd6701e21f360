"""A new kind of signal is a medium, an objective and a source: here waves, from outside the package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tessella
from tessella import registry
from tessella.autoencoders.base import Autoencoder
from tessella.checkpoint import load_state
from tessella.data.base import Batch, Sample, Samples
from tessella.evaluation.base import Metrics
from tessella.media.base import Medium
from tessella.objectives.base import Objective, StepOutput
from tessella.reporting import Section, Table
from tessella.tokenizer import Reconstruction


class WaveErrors(Metrics):
    def __init__(self) -> None:
        self.errors: list[float] = []

    def update(self, x: Tensor, x_hat: Tensor, batch: Batch | None = None) -> None:
        self.errors += (x - x_hat).abs().mean((1, 2)).tolist()

    def compute(self) -> dict[str, float]:
        return {"mean_error": sum(self.errors) / len(self.errors)}


class Wave(Medium):
    unit: ClassVar[str] = "waves"
    suffix = ".npy"

    def units(self, x: Tensor) -> float:
        return len(x)

    def read(self, path: Path) -> Tensor:
        return torch.from_numpy(np.load(path))

    def write(self, x: Tensor, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, x.numpy())

    def metrics(self, **options: Any) -> Metrics:
        return WaveErrors()

    def show(self, x: Tensor, x_hat: Tensor, indices: Tensor, codebook: Tensor | None, keys: Sequence[str]) -> Section:
        return Section(
            "Waves",
            "",
            [Table(("wave", "tokens"), [(key, str(len(row))) for key, row in zip(keys, indices, strict=True)])],
        )

    def show_samples(self, real: Mapping[str, Tensor], generated: Mapping[str, Tensor], settings: str) -> Section:
        return Section("Drawn waves", settings)

    def preview(self, rows: Sequence[Tensor], stem: Path) -> Path:
        self.write(torch.cat(list(rows)), stem.with_suffix(".npy"))
        return stem.with_suffix(".npy")


class Absolute(Objective):
    def forward(self, batch: Batch, out: Reconstruction, last_layer: nn.Parameter) -> StepOutput:
        error = (out.x_hat - batch["x"]).abs().mean()
        return StepOutput({"tokenizer": error}, {"error": error.detach()})


class Sines(Samples):
    """Sines of two speeds."""

    medium = "wave"
    extent = (32,)
    class_names = ("slow", "fast")

    def __init__(self, *, split: str, count: int = 12) -> None:
        self.shift, self.count = 0 if split == "train" else 1000, count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        phase = 0.0 if rng is None else rng.uniform(0, 6)
        x = torch.sin(torch.arange(32) * (0.2 + 0.4 * (index % 2)) + phase + self.shift + index)[None]
        return Sample(x=x, label=index % 2, key=f"wave-{self.shift + index}")


class Strided(Autoencoder):
    in_channels, latent_dim, stride = 1, 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv1d(1, 4, 4, stride=4), nn.ConvTranspose1d(4, 1, 4, stride=4)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).movedim(1, -1)

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent.movedim(-1, 1))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.weight


@pytest.fixture
def waves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    for family, name, cls in (
        ("media", "wave", Wave), ("objectives", "absolute", Absolute), ("data", "sines", Sines),
        ("autoencoders", "strided", Strided),
    ):  # fmt: skip
        tessella.register(family, name, cls)
    Path("waves.toml").write_text(
        'data = {name = "sines"}\nautoencoder = {name = "strided"}\nquantizer = {name = "fsq", levels = [8, 5]}\n'
        'loss = {name = "absolute"}\n'
        "[training]\nsteps = 4\nbatch_size = 4\nwarmup_steps = 1\n"
        "checkpoint_every = 2\nsample_every = 2\nnum_workers = 0\n"
    )
    Path("next.toml").write_text(
        '[generator]\nname = "ar"\nconditioner = {name = "label"}\ndim = 16\nnum_layers = 1\nnum_heads = 2\n'
        "[training]\nsteps = 2\nbatch_size = 4\nnum_workers = 0\n"
    )
    return


@pytest.mark.usefixtures("waves")
def test_a_new_signal_goes_through_every_command() -> None:
    short = tessella.train("waves.toml", out=Path("short"), overrides=["training.steps=2"], device="cpu")
    run = tessella.train("waves.toml", out=Path("run"), device="cpu")
    assert 'name = "wave"' in (run / "recipe.toml").read_text()
    assert load_state(run / "checkpoints/step-00000004")["units"] == 16
    assert "waves_per_s" in (run / "log.jsonl").read_text()
    assert (run / "samples/step-00000004.npy").is_file()

    # Stopped after two steps and continued, it is the same run.
    (short / "recipe.toml").write_text((run / "recipe.toml").read_text())
    for file in short.rglob("recipe.toml"):
        file.write_text((run / "recipe.toml").read_text())
    tessella.train("waves.toml", out=short, device="cpu")
    weights = [(folder / "checkpoints/step-00000004/model.safetensors").read_bytes() for folder in (run, short)]
    assert weights[0] == weights[1]

    result = tessella.tokenize(run, Path("tokens"), device="cpu")
    assert result.num_rows == 24  # what was trained on and what is held out
    assert tessella.detokenize(run, Path("tokens"), Path("files"), device="cpu") == 24
    tokenizer = tessella.load(run)
    x = Sines(split="test").sample(3)["x"]
    expected = tokenizer.decode(tokenizer.encode(x[None]))[0]
    torch.testing.assert_close(torch.from_numpy(np.load("files/wave-1003.npy")), expected, rtol=0, atol=0)

    evaluation = tessella.evaluate(run, device="cpu")
    assert evaluation.reconstruction is not None
    record = json.loads((run / "evaluation.json").read_text())
    assert record["mean_error"] > 0
    assert record["usage"] > 0
    page = tessella.report(run, device="cpu")
    assert "wave-1003" in page.read_text()

    generator = tessella.train("next.toml", tokenizer=run, out=Path("generator"), device="cpu")
    drawn = tessella.sample(generator, Path("drawn"), classes=["fast"], count=2, device="cpu")
    assert drawn.count == 2
    assert np.load("drawn/000001-fast.npy").shape == (1, 32)
    assert "Drawn waves" in tessella.report(generator, device="cpu").read_text()
    with pytest.raises(tessella.TessellaError, match="no network is known that tells distributions of waves apart"):
        tessella.evaluate(generator, device="cpu")


@pytest.mark.usefixtures("waves")
def test_registered_names_are_listed_and_their_rules_hold() -> None:
    assert "wave" in registry.names("media")
    assert registry.summary("data", "sines") == "Sines of two speeds."
    with pytest.raises(ValueError, match="'image' is the package's own medium"):
        tessella.register("media", "image", Wave)
    with pytest.raises(ValueError, match="Wave does not implement Objective"):
        tessella.register("objectives", "other", Wave)
    with pytest.raises(ValueError, match="unknown family 'mediums'"):
        tessella.register("mediums", "other", Wave)
