from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import single_threaded, tiny_tokenizer
from PIL import Image

import tessella
from tessella import cli
from tessella.commands.detokenize import _file_for, _unused
from tessella.data.base import random_for
from tessella.data.folder import Folder
from tessella.data.loader import evaluation_batches
from tessella.data.token_shards import TokenShards
from tessella.data.tokens import read_tokens
from tessella.reporting.pictures import to_pictures


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of ``tessella`` called with ``arguments``."""
    monkeypatch.setattr(sys, "argv", ["tessella", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def model(workspace: Path) -> Path:
    tiny_tokenizer().save(workspace / "model")
    return Path("model")


def test_every_command_in_turn(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ("train", "tiny.toml", "--set", "training.steps=4", "--set", "quantizer.codebook_size=16")
    assert run(monkeypatch, *train, "--out", "run", "--device", "cpu") == 0
    assert run(monkeypatch, "tokenize", "run", "--out", "tokens") == 0
    assert run(monkeypatch, "detokenize", "run", "tokens", "--out", "pngs") == 0
    assert run(monkeypatch, "evaluate", "run", "--limit", "3") == 0
    assert json.loads((workspace / "run" / "evaluation.json").read_text())["protocol"]["num_images"] <= 3
    assert run(monkeypatch, "report", "run") == 0
    page = (workspace / "run" / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert run(monkeypatch, "list") == 0
    assert tessella.load("run").quantizer.codebook_size == 16


def test_tokens_turn_back_into_exactly_what_the_tokenizer_decodes(
    workspace: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for whole in ([], ["--whole"]):
        tokens = "whole" if whole else "tokens"
        data = ["--data", "pictures", "--split", "train", *whole]
        assert run(monkeypatch, "tokenize", "model", "--out", tokens, *data) == 0
        assert run(monkeypatch, "detokenize", "model", tokens, "--out", "pngs") == 0
        tokenizer = tessella.load(model)
        dataset = Folder("pictures", split="train")
        seen = 0
        rows = {row.key: row for row in read_tokens(tokens)}
        for batch in evaluation_batches(dataset, batch_size=1):
            indices = tokenizer.encode(batch["x"], pad=True)
            row = rows[batch["key"][0]]
            assert torch.equal(row.indices, indices[0])
            assert row.label == batch["label"].item()
            (expected,) = to_pictures(tokenizer.decode(indices, extent=batch["x"].shape[2:]))
            with Image.open(Path("pngs") / batch["key"][0]) as written:
                assert (np.asarray(written) == expected).all()
            assert expected.shape == (20, 20, 3)
            seen += 1
        assert seen == len(rows) == len(dataset)


def test_variants_are_crops_that_a_generator_chooses_among(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.recipe = {"data": {"name": "folder", "path": "pictures", "crop_px": 16, "flip": True}}
    tokenizer.save(workspace / "model")
    command = ("tokenize", "model", "--out", "tokens", "--split", "train", "--limit", "5", "--variants", "3")
    assert run(monkeypatch, *command) == 0
    shards = TokenShards(split="train", path="tokens")
    pictures = Folder("pictures", split="train", crop_px=16, flip=True)
    assert len(shards) == 5
    for index in range(5):
        views = [pictures.sample(index, random_for(0, variant, index)) for variant in range(3)]
        expected = tokenizer.encode(torch.stack([view["x"] for view in views]))
        assert (shards[index]["key"], shards[index]["label"]) == (views[0]["key"], views[0]["label"])
        seen = {shards.sample(index, np.random.default_rng(seed))["x"].numpy().tobytes() for seed in range(30)}
        assert seen == {tokens.numpy().tobytes() for tokens in expected}
    assert run(monkeypatch, "detokenize", "model", "tokens", "--out", "pngs") == 0
    rows = list(read_tokens("tokens"))
    assert len(rows) == 15
    names = [name for row in rows[::3] for name in (row.key, row.key[:-4] + ".2.png", row.key[:-4] + ".3.png")]
    assert sorted(names) == sorted(file.relative_to("pngs").as_posix() for file in Path("pngs").rglob("*.png"))
    for row, name in zip(rows, names, strict=True):
        (expected_pixels,) = to_pictures(tokenizer.decode(row.indices[None], extent=row.extent))
        with Image.open(Path("pngs") / name) as written:
            assert (np.asarray(written) == expected_pixels).all()


def test_files_of_like_names_are_numbered() -> None:
    used: set[Path] = set()
    for expected in ("a/b.png", "a/b.2.png", "a/b.3.png"):
        used.add(_unused(Path("a/b.png"), used))
        assert Path(expected) in used
    assert _unused(Path("a/b.2.png"), used) == Path("a/b.2.2.png")
    assert _unused(Path("a/c.jpg.png"), used) == Path("a/c.jpg.png")


def test_shards_of_another_tokenizer_are_refused(
    workspace: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer(seed=1).save("other")
    assert run(monkeypatch, "tokenize", "model", "--out", "tokens", "--data", "pictures") == 0
    assert run(monkeypatch, "detokenize", "other", "tokens", "--out", "pngs") == 2
    assert "holds tokens of tokenizer" in capsys.readouterr().err
    assert not Path("pngs").exists()


def test_keys_cannot_lead_out_of_the_folder() -> None:
    for key in ("../../evil.png", "/etc/evil.png"):
        with pytest.raises(ValueError, match="leads out of the folder"):
            _file_for(Path("out"), key, ".png")
    assert _file_for(Path("out"), "a/b.jpeg", ".png") == Path("out/a/b.jpeg.png")
    assert _file_for(Path("out"), "a/b.png", ".png") == Path("out/a/b.png")
    assert _file_for(Path("out"), "train-0.parquet:7", ".png") == Path("out/train-0.parquet_7.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "photos_fsk"), "unknown recipe 'photos_fsk'; choose one of:"),
        (("train", "tiny.toml", "--set", "quantizer.sizes=3"), "unknown key 'quantizer.sizes'; accepted:"),
        (("train", "tiny.toml", "--set", "training.lr=fast"), "'training.lr' must be a valid number, got 'fast'"),
        (("train", "tiny.toml", "--set", "quantizer.name=vqq"), "unknown quantizer 'vqq'; choose one of:"),
        (("train", "tiny.toml", "--data", "nowhere"), "no data at nowhere"),
        (("train", "tiny.toml", "--set", "data.path=empty"), "empty"),
        (("train", "tiny.toml", "--device", "abacus"), "device 'abacus' cannot be used here"),
        (("evaluate", "nowhere"), "no model in nowhere"),
        (("evaluate", "model", "--data", "pictures", "--weights", "nowhere"), "nowhere"),
        (("tokenize", "model", "--out", "t"), "was saved without a data set; name one with --data"),
        (("tokenize", "model", "--out", "t", "--data", "pictures", "--variants", "2"), "they need data.crop_px"),
        (("detokenize", "model", "pictures", "--out", "p"), "holds no tokens"),
    ],
)
def test_mistakes_end_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    Path("empty").mkdir()
    assert run(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_importing_the_package_loads_no_extra() -> None:
    heavy = [
        "typer", "pydantic", "pyarrow", "matplotlib", "skimage", "sklearn", "torchmetrics", "tensorboard", "triton",
        "rich", "scipy", "datasets",
    ]  # fmt: skip
    code = f"import sys, torch; before = set(sys.modules); import tessella; print([m for m in {heavy!r} if m in " \
           "set(sys.modules) - before])"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=single_threaded(), check=True
    )
    assert done.stdout.strip() == "[]"


def test_distributions_of_reconstructions(workspace: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tessella.evaluation.backbones import EfficientNetLite0
    from tessella.evaluation.features import FeatureNetwork
    from tessella.evaluation.protocols import EFFLITE0

    torch.manual_seed(0)
    network = FeatureNetwork(EFFLITE0, EfficientNetLite0())
    monkeypatch.setattr("tessella.media.image.Image.feature_network", lambda *_: network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    command = ("evaluate", "model", "--data", "pictures", "--split", "train")
    records = {}
    for name, more in {
        "originals": ("--protocol", "efflite0"),
        "train": ("--protocol", "efflite0", "--reference", "train"),
        "test": ("--protocol", "ibq", "--reference", "test"),
    }.items():
        assert run(monkeypatch, *command, "--out", name, *more) == 0
        (file,) = Path(name).glob("distribution-*.json")
        assert file.name == f"distribution-{more[1]}.json"
        records[name] = json.loads(file.read_text())
    own, train, test = (records[name]["values"]["FD-EffLite0"]["value"] for name in records)
    assert own == pytest.approx(train, rel=1e-6)  # the originals of the training part are all of it
    assert abs(test - own) > 1e-3 * own
    assert records["train"]["reference"]["name"].endswith("pictures, train")
    pixels = {name: json.loads((Path(name) / "evaluation.json").read_text())["protocol"]["pixels"] for name in records}
    assert pixels == {"originals": "uint8", "train": "uint8", "test": "truncated"}
    assert run(monkeypatch, *command, "--protocol", "efflite0", "--reference", "nothing.npz") == 2
