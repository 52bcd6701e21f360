"""Depth, colour and segments through every command: oracle, generator, evaluation, report, prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image
from typer.testing import CliRunner

import tessella
from tessella.checkpoint import load_generator
from tessella.cli.app import app
from tessella.commands._predictions import Predictor
from tessella.data.base import DataError
from tessella.errors import ConfigError
from tessella.recipe import read_recipe, recipe_names

TASKS = ("depth", "color", "panoptic")
TINY = ["autoencoder.size_px=16", "autoencoder.code_grid=2", "autoencoder.width=16", "autoencoder.encoder_depth=1",
        "autoencoder.decoder_depth=1", "training.steps=2", "training.batch_size=2", "training.log_every=1",
        "training.warmup_steps=1", "training.sample_every=2"]  # fmt: skip
TINY_LM = ["generator.conditioner.size_px=[16, 16]", "generator.conditioner.num_layers=1", "generator.dim=32",
           "generator.num_layers=1", *TINY[5:]]  # fmt: skip


def data_of(task: str, folder: Path) -> tuple[str | None, list[str]]:
    """Data of a task, and the settings that read it."""
    if task == "depth":
        pytest.importorskip("skimage")
        return None, ["data.size_px=16", "data.num_scenes=4", "data.num_test_scenes=3"]
    if task == "color":
        write_pictures(folder / "pictures/train", 4)
        write_pictures(folder / "pictures/test", 3)
        picture = '{name = "folder", path = "pictures", crop_px = 16}'
        return None, [f"data.pictures={picture}"]
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(3):
            for kind in ("images", "masks"):
                (folder / "street" / split / kind).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "street" / split / "images" / f"{i}.png")
            mask = np.kron(rng.integers(0, 12, (2, 3)), np.ones((10, 8))).astype(np.uint8)
            Image.fromarray(mask).save(folder / "street" / split / "masks" / f"{i}.png")
    return "street", ["data.size_px=16"]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_goes_through_every_command(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, settings = data_of(task, tmp_path)
    oracle = tessella.train(
        f"uvim_{task}_small", data=data, overrides=[*TINY, *settings], out=Path("oracle"), device="cpu"
    )
    assert (oracle / "samples/step-00000002.png").is_file()
    # The recipe of depth has scenes of its own.
    more = settings if task == "depth" else []
    run = tessella.train(
        f"uvim_{task}_lm_small", tokenizer=oracle, overrides=[*TINY_LM, *more], out=Path("lm"), device="cpu"
    )

    # The oracle's codes as files, and back with the pictures beside them.
    tessella.tokenize(oracle, Path("tokens"), split="test", device="cpu")
    assert tessella.detokenize(oracle, Path("tokens"), Path("again"), device="cpu") == 3

    tessella.evaluate(oracle, device="cpu")
    evaluation = tessella.evaluate(run, device="cpu")
    (file,) = evaluation.files
    name = {"depth": "rmse", "color": "psnr", "panoptic": "pq"}[task]
    record = json.loads(file.read_text())
    assert record[name] == evaluation.reconstruction[name]  # type: ignore[index]
    assert record["protocol"]["num_images"] == 3

    for model, parts in ((oracle, ("picture", "truth", "oracle", "code")),
                         (run, ("picture", "truth", "oracle", "prediction"))):  # fmt: skip
        page = tessella.report(model, device="cpu")
        assert all((model / f"{part}.png").is_file() for part in parts)
        assert "prediction" in page.read_text() or model == oracle

    # Predictions have the size of their pictures; a grey picture and one with a name in capitals are pictures too.
    write_pictures(tmp_path / "new", 2, size=30, classes=1)
    Image.new("L", (40, 20), 90).save("new/GREY.PNG")
    (tmp_path / "new/class_0/000.png").rename("new/a.png")
    answer = CliRunner().invoke(app, ["predict", str(run), "new", "--device", "cpu"])
    assert answer.exit_code == 0, answer.output
    assert "GREY" in answer.output
    first, second = tessella.predict(run, [Path("new/a.png"), Path("new/GREY.PNG")], device="cpu")
    with Image.open(first.values) as values:
        assert values.size == (30, 30)
        assert values.mode == ("RGB" if task == "color" else "I;16")
    with Image.open(second.values) as values, Image.open(second.shown) as shown:
        assert values.size == (40, 20)
        assert shown.height >= 20 * 6
    if task == "depth":
        levels = np.asarray(Image.open(first.values))
        assert levels.min() > 100
        assert levels.max() < 10_000  # millimetres


def small_run(tmp_path: Path) -> Path:
    _, settings = data_of("depth", tmp_path)
    oracle = tessella.train("uvim_depth_small", overrides=[*TINY, *settings], out=tmp_path / "oracle", device="cpu",
                            quiet=True)  # fmt: skip
    return tessella.train("uvim_depth_lm_small", tokenizer=oracle, overrides=[*TINY_LM, *data_of("depth", tmp_path)[1]],
                          out=tmp_path / "lm", device="cpu", quiet=True)  # fmt: skip


def test_prediction_is_the_decoder_on_generated_codes(tmp_path: Path) -> None:
    generator, tokenizer = load_generator(small_run(tmp_path), device=torch.device("cpu"))
    predictor = Predictor(tokenizer, generator).eval()
    picture = torch.rand(3, 3, 16, 16) * 2 - 1
    indices = generator.sample(picture, rng=[torch.Generator()] * 3, temperature=0)
    assert torch.equal(predictor.encode(torch.zeros(3, 1, 16, 16), picture), indices)
    assert torch.equal(predictor.predict(picture), tokenizer.decode(indices, picture))


def test_what_predict_refuses(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    write_pictures(tmp_path / "p", 2)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"no file .*absent.png"):
        tessella.predict(run, [tmp_path / "absent.png"])
    with pytest.raises(DataError, match=r"text.png: not a picture"):
        tessella.predict(run, [tmp_path / "p/class_0/000.png", tmp_path / "text.png"])
    assert not (run / "predicted").exists()
    with pytest.raises(DataError, match=r"no picture in .*"):
        tessella.predict(run, [tmp_path / "p"])
    with pytest.raises(ConfigError, match="two files are called '000'"):
        tessella.predict(run, [tmp_path / "p/class_0/000.png", tmp_path / "p/class_0"])
    with pytest.raises(ConfigError, match="name at least one file"):
        tessella.predict(run, [])
    with pytest.raises(ConfigError, match="draws nothing of its own: it reads files, see tessella predict"):
        tessella.sample(run)
    with pytest.raises(ConfigError, match="temperature must be at least 0"):
        tessella.predict(run, [tmp_path / "p/class_0"], temperature=-1)


@pytest.mark.parametrize("task", TASKS)
def test_small_recipes_build_by_name(task: str) -> None:
    tokenizer = tessella.build(f"uvim_{task}_small")
    x, picture = torch.zeros(1, tokenizer.autoencoder.in_channels, 64, 64), torch.zeros(1, 3, 64, 64)
    out = tokenizer.eval()(x, picture)
    assert out.x_hat.shape[1:] == (sum(tokenizer.autoencoder.planes), 64, 64)  # type: ignore[arg-type, call-overload]
    indices = tokenizer.encode(x, picture)
    assert torch.equal(tokenizer.decode(indices, picture), out.x_hat)
    if task != "depth":  # the others need their data to know the size of its samples
        return
    generator = tessella.build(f"uvim_{task}_lm_small", tokenizer=tokenizer)
    assert generator.sample(picture, rng=[torch.Generator()], temperature=0).shape == indices.shape


def test_recipes_have_the_published_settings() -> None:
    fsq = {"depth": 4375, "color": 4375, "panoptic": 4375}
    for task, size in fsq.items():
        with torch.device("meta"):
            ours, vq = tessella.build(f"uvim_{task}"), tessella.build(f"uvim_{task}_vq")
        assert ours.quantizer.codebook_size == size
        assert ours.autoencoder.latent_grid(512, 512) == (16, 16)
        fewer = sum(p.numel() for p in vq.parameters()) - sum(p.numel() for p in ours.parameters())
        assert fewer == 1_172_731  # the published difference of the two layers around the quantizer
        assert vq.quantizer.codebook_size == 4096
    for name in recipe_names():
        if name.startswith("uvim_") and "_lm" not in name:
            recipe = read_recipe(name)
            assert recipe["loss"]["name"] in name
            assert ("drop_codes" in recipe["autoencoder"]) == ("no_dropout" in name)
            assert ("encoder_context" in recipe["autoencoder"]) == ("no_context" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("uvim_depth") and n.endswith("_small")])
def test_small_depth_recipes_train(name: str, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    short = ["training.steps=2", "training.batch_size=2", "training.log_every=1"]
    tokenizer = None
    if "_lm" in name:
        tokenizer = tessella.train("uvim_depth_small", overrides=short, out=tmp_path / "a", device="cpu", quiet=True)
    folder = tessella.train(name, tokenizer=tokenizer, overrides=short, out=tmp_path / "b", device="cpu", quiet=True)
    assert (folder / "checkpoints/step-00000002").is_dir()
