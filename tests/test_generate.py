"""Generators from end to end: train, sample, interrupt, evaluate, report."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import single_threaded, tiny_tokenizer
from PIL import Image
from test_cli import run

import tessella
from tessella.checkpoint import CheckpointError, fingerprint, load_generator, load_recipe, load_state, save_generator
from tessella.commands.build import is_generator
from tessella.data.base import DataError
from tessella.data.folder import Folder
from tessella.data.loader import evaluation_batches
from tessella.data.token_shards import TokenShards
from tessella.errors import ConfigError
from tessella.generators.drawing import SampleSettings, balanced, draw
from tessella.training.logs import read_log

RECIPE = """
# A generator of seconds
[data]
name = "folder"
path = "pictures"
crop_px = 16
flip = true
[generator]
name = "ar"
conditioner = {name = "label"}
dim = 16
num_layers = 1
num_heads = 2
[training]
steps = 6
batch_size = 4
warmup_steps = 2
ema_decay = 0.9
log_every = 1
sample_every = 3
checkpoint_every = 2
num_workers = 0
"""


@pytest.fixture
def ready(workspace: Path) -> Path:
    """A workspace with a tokenizer and a generator's recipe."""
    tokenizer = tiny_tokenizer()
    tokenizer.recipe = {"data": {"name": "folder", "path": "pictures", "crop_px": 16, "flip": True}}
    tokenizer.save("tokenizer")
    (workspace / "generator.toml").write_text(RECIPE)
    return workspace


@pytest.fixture
def trained(ready: Path) -> Path:
    return tessella.train("generator.toml", tokenizer=Path("tokenizer"), out=Path("run"), device="cpu", quiet=True)


def test_training_stores_all_that_sampling_needs(trained: Path) -> None:
    generator, tokenizer = load_generator(trained)
    assert generator.space == tokenizer.token_space(16, 16)
    assert generator.arguments["conditioner"]["class_names"] == ["class_0", "class_1"]
    assert (trained / "samples" / "step-00000006.png").is_file() is False  # quiet
    indices = generator.sample(torch.tensor([0, 1]), rng=[torch.Generator().manual_seed(i) for i in range(2)])
    assert tokenizer.decode(indices).shape == (2, 3, 16, 16)
    names = load_state(trained / "checkpoints" / "step-00000006")["step"].keys()
    assert set(names) == {"model"}  # the frozen tokenizer is in no checkpoint


def test_a_generator_continues_with_the_same_bits(ready: Path) -> None:
    settings = {"tokenizer": Path("tokenizer"), "device": "cpu", "quiet": True}
    whole = tessella.train("generator.toml", out=Path("whole"), **settings)  # type: ignore[arg-type]
    shutil.copytree(whole, "parts")
    shutil.rmtree("parts/checkpoints/step-00000006")  # as if killed after step 4
    parts = tessella.train("generator.toml", out=Path("parts"), **settings)  # type: ignore[arg-type]
    weights = [(run / "checkpoints/step-00000006/model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]


def test_a_generator_starts_from_the_weights_of_another(ready: Path) -> None:
    settings = {"tokenizer": Path("tokenizer"), "device": "cpu", "quiet": True}
    first = tessella.train("generator.toml", out=Path("first"), **settings)  # type: ignore[arg-type]
    still = ["training.steps=1", "training.lr=1e-30", "training.ema_decay=0.5"]
    second = tessella.train("generator.toml", init=first, out=Path("second"), overrides=still, **settings)  # type: ignore[arg-type]
    weights = [load_generator(folder)[0].state_dict() for folder in (first, second)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert load_recipe(second)["training"]["init"] == "first"
    with pytest.raises(ConfigError, match=r"training.init: 'first' -> "):
        tessella.train("generator.toml", out=Path("second"), overrides=still, **settings)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError):
        tessella.train("generator.toml", init=Path("nowhere"), out=Path("third"), **settings)  # type: ignore[arg-type]


def test_clusters_are_made_once(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = """
num_clusters = 5
coarse = {name = "ar", dim = 16, num_layers = 1, num_heads = 2}
fine = {dim = 16, num_layers = 1, num_heads = 2}
"""
    text = RECIPE.replace('"ar"', '"coarse_to_fine"').replace("dim = 16\nnum_layers = 1\nnum_heads = 2\n", stages)
    Path("ctf.toml").write_text(text)
    settings = {"tokenizer": Path("tokenizer"), "out": Path("ctf"), "device": "cpu", "quiet": True}
    folder = tessella.train("ctf.toml", **settings)  # type: ignore[arg-type]
    before = load_generator(folder)[0].state_dict()
    shutil.rmtree(folder / "checkpoints/step-00000006")
    with monkeypatch.context() as patch:
        patch.setattr("tessella.generators.coarse_to_fine.CoarseToFine.fit_codebook", None)
        tessella.train("ctf.toml", **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(load_generator(folder)[0].state_dict(), before, rtol=0, atol=0)


def test_a_generator_of_digits_from_end_to_end(ready: Path) -> None:
    section = 'generator = {name = "ar", order = "delay", dim = 16, num_layers = 1, num_heads = 2}'
    text = RECIPE.replace('"ar"', '"digits"\nbases = [5, 5, 5]').replace(
        "dim = 16\nnum_layers = 1\nnum_heads = 2", section
    )
    Path("digits.toml").write_text(text)
    tessella.train("digits.toml", tokenizer=Path("tokenizer"), out=Path("digits"), device="cpu", quiet=True)
    assert tessella.sample(Path("digits"), Path("drawn"), classes=["class_1"], count=2, device="cpu").count == 2
    with pytest.raises(ConfigError, match=r"bases must be at least 2 and have the product 125"):
        tessella.train(
            "digits.toml", tokenizer=Path("tokenizer"), out=Path("bad"), overrides=["generator.bases=[5,5]"],
            device="cpu", quiet=True,
        )  # fmt: skip


def test_one_batch_is_learned_by_heart_in_a_folder_of_its_own(ready: Path) -> None:
    folder = tessella.train(
        "generator.toml", tokenizer=Path("tokenizer"), overfit_batch=True, device="cpu", quiet=True,
        overrides=["training.steps=150", "training.lr=1e-2", "generator.dim=32"],
    )  # fmt: skip
    assert folder == Path("runs/generator-overfit")
    losses = [row["loss/generator"] for row in read_log(folder / "log.jsonl")]
    assert losses[0] == pytest.approx(math.log(125), abs=0.01)
    assert losses[-1] < 0.1 * losses[0]


def test_shards_replace_pictures(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tessella.tokenize(Path("tokenizer"), Path("tokens"), split="train", device="cpu")
    shards = TokenShards(split="train", path="tokens")
    assert shards.class_names == ("class_0", "class_1")
    folder = tessella.train("generator.toml", tokenizer=Path("tokenizer"), data="tokens", out=Path("run"), device="cpu")
    generator, _ = load_generator(folder)
    assert generator.space == shards.space
    assert run(monkeypatch, "sample", "run", "--class", "class_1", "-n", "2") == 0
    assert len(list(Path("run/generated").glob("*class_1.png"))) == 2


def test_samples_do_not_depend_on_batches_and_are_not_drawn_twice(trained: Path) -> None:
    assert tessella.sample(trained, Path("all"), count=6, device="cpu").count == 6
    files = sorted(Path("all").glob("0*.png"))
    assert [file.name for file in files] == [f"{i:06d}-class_{i % 2}.png" for i in range(6)]
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    files[2].unlink()
    files[5].unlink()
    assert tessella.sample(trained, Path("all"), count=6, batch_size=1, device="cpu").count == 2
    for file in files:
        data, written = before[file.name]
        assert file.read_bytes() == data
        assert (file.stat().st_mtime_ns == written) == (file not in (files[2], files[5]))
    with Image.open("all/grid.png") as grid:
        assert np.asarray(grid).shape == (2 * 16 + 2, 3 * 16 + 4, 3)
    with pytest.raises(ConfigError, match=r"all holds other samples \(seed: 0 -> 1\)"):
        tessella.sample(trained, Path("all"), count=6, settings=SampleSettings(seed=1), device="cpu")
    with pytest.raises(ConfigError, match="is not empty and holds no samples"):
        tessella.sample(trained, Path("pictures"), device="cpu")


def test_an_interrupted_sampling_run_leaves_whole_files(trained: Path) -> None:
    command = [sys.executable, "-m", "tessella", "sample", "run", "-n", "400", "--out", "many", "--batch-size", "2",
               "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, env=single_threaded(), stderr=subprocess.DEVNULL)
    while len(list(Path("many").glob("0*.png"))) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    files = list(Path("many").glob("0*.png"))
    assert 4 <= len(files) < 400
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (16, 16)
    whole = {file.name: file.read_bytes() for file in files}
    assert tessella.sample(trained, Path("many"), count=len(files) + 3, device="cpu").count == 3
    assert all((Path("many") / name).read_bytes() == data for name, data in whole.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["2"]}, r"unknown class '2'; classes are 0 to 1; names: class_0, class_1"),
        ({"classes": ["owl"]}, "unknown class 'owl'"),
        ({"settings": {"top_k": 126}}, r"top_k must lie in \[1, 125\]"),
        ({"settings": {"guidance": "-0.5"}}, "guidance must be >= 0"),
        ({"settings": {"guidance": "steep:1,2"}}, "guidance must be a number, interval:SCALE"),
        ({"settings": {"options": {"num_steps": 3}}}, "unknown option 'num_steps' of AR; accepted: num_positions"),
        ({"settings": {"temperature": -1.0}}, "temperature must be a finite number of at least 0"),
    ],
)
def test_bad_requests_are_explained(trained: Path, arguments: dict[str, Any], message: str) -> None:
    settings = arguments.pop("settings", {})
    with pytest.raises(ConfigError, match=message):
        tessella.sample(trained, Path("out"), device="cpu", settings=SampleSettings(**settings), **arguments)
    assert not Path("out").exists()


def test_models_that_do_not_fit_are_refused(trained: Path) -> None:
    generator, tokenizer = load_generator(trained)
    other = tiny_tokenizer(seed=1)
    with pytest.raises(ValueError, match="is for tokens of tokenizer"):
        save_generator(generator, other, "bad")
    save_generator(generator, tokenizer, "good")
    assert is_generator(Path("good"))
    again, its_tokenizer = load_generator("good")
    torch.testing.assert_close(again.state_dict(), generator.state_dict(), rtol=0, atol=0)
    assert fingerprint(its_tokenizer) == fingerprint(tokenizer)
    other.save("good/tokenizer")
    with pytest.raises(CheckpointError, match="generates tokens of tokenizer"):
        load_generator("good")
    with pytest.raises(CheckpointError, match="holds a tokenizer, not a generator"):
        load_generator("tokenizer")
    tessella.tokenize(Path("tokenizer"), Path("tokens"), split="train", device="cpu")
    other.save("other")
    with pytest.raises(ConfigError, match="the shards hold tokens of tokenizer"):
        tessella.train("generator.toml", tokenizer=Path("other"), data="tokens", out=Path("run2"), device="cpu")
    with pytest.raises(ConfigError, match="give its run or folder with --tokenizer"):
        tessella.train("generator.toml", out=Path("run3"), device="cpu")


def test_classes_must_be_known(ready: Path) -> None:
    for file in sorted(Path("pictures").rglob("*.png")):
        file.rename(Path("pictures") / f"{file.parent.name}-{file.name}")
    with pytest.raises((ConfigError, DataError), match="names no classes"):
        tessella.train("generator.toml", tokenizer=Path("tokenizer"), out=Path("run"), device="cpu")


def test_evaluation_and_report(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tessella.evaluation.backbones import EfficientNetLite0
    from tessella.evaluation.features import FeatureNetwork
    from tessella.evaluation.protocols import EFFLITE0

    torch.manual_seed(0)
    network = FeatureNetwork(EFFLITE0, EfficientNetLite0())
    monkeypatch.setattr("tessella.media.image.Image.feature_network", lambda *_: network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained.parent / "cache"))
    assert run(monkeypatch, "evaluate", "run", "--samples", "12", "--split", "train") == 0
    record = json.loads((trained / "samples-efflite0.json").read_text())
    names = ("FD", "IS", "precision", "recall", "KD", "density", "coverage")
    assert set(record["values"]) == {f"{name}-EffLite0" for name in names}
    assert record["samples"]["num_images"] == 12
    assert record["sampling"]["temperature"] == 1.0
    assert record["rates"]["tokens_per_second"] == pytest.approx(16 * record["rates"]["samples_per_second"])
    assert record["rates"]["log2_codebook_size"] == math.log2(125)
    generator, tokenizer = load_generator(trained)
    (every,) = evaluation_batches(Folder(split="train", path="pictures", crop_px=16), batch_size=100)
    bits = generator.bits(tokenizer.encode(every["x"]), every["label"]).mean().item() / 16
    assert record["rates"]["bits_per_token"] == pytest.approx(bits, rel=1e-5)
    assert run(monkeypatch, "evaluate", "run", "--samples", "12", "--reference", "train", "--out", "against") == 0
    other = json.loads(Path("against/samples-efflite0.json").read_text())
    assert set(other["values"]) == {"FD-EffLite0", "IS-EffLite0"}
    assert other["values"]["FD-EffLite0"]["value"] == pytest.approx(record["values"]["FD-EffLite0"]["value"], rel=1e-6)
    with Image.open(trained / "samples-efflite0.png") as neighbours:
        assert neighbours.size == (5 * 16 + 8, 8 * 16 + 14)
    for file in sorted(Path("pictures").rglob("*.png")):
        (Path("mixed") / file.name).parent.mkdir(exist_ok=True)
        shutil.copy(file, Path("mixed") / file.name)
    with pytest.raises(ConfigError, match="signals of mixed, test do not fit this generator: label"):
        tessella.evaluate(trained, protocol="efflite0", data="mixed", samples=4, device="cpu")
    assert run(monkeypatch, "report", "run") == 0
    page = (trained / "report.html").read_text()
    assert "FD-EffLite0" in page
    assert "class_1" in page


def test_labels_are_balanced() -> None:
    assert balanced(3, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_a_sample_is_a_function_of_its_number(trained: Path) -> None:
    generator, tokenizer = load_generator(trained)
    alone = draw(generator, tokenizer, labels=[1], numbers=[5], settings=SampleSettings())
    together = draw(generator, tokenizer, labels=[0, 1, 0], numbers=[3, 5, 9], settings=SampleSettings())
    torch.testing.assert_close(alone[0], together[1])
    other = draw(generator, tokenizer, labels=[1], numbers=[5], settings=SampleSettings(seed=1))
    assert not torch.equal(alone, other)


def test_quickstart_in_miniature(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    train = tessella.train
    short = ["training.steps=2", "training.batch_size=2", "training.ema_decay=0.5"]
    monkeypatch.setattr(
        "tessella.commands.quickstart.train", lambda recipe, **given: train(recipe, overrides=short, **given)
    )
    results = tessella.quickstart(Path("out"), device="cpu")
    assert set(results) == {
        "psnr", "ssim", "l1", "l2", "bits_per_pixel", "usage", "perplexity", "images_per_sec", "num_skipped",
        "generator_seconds", "samples_per_second", "seconds",
    }  # fmt: skip
    assert json.loads(Path("out/results.json").read_text()) == results
    page = Path("out/report.html").read_text()
    assert "Generated pictures" in page
    assert "astronaut" in page
    assert len(list(Path("out/samples").glob("0*.png"))) == 80
