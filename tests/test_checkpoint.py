from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import single_threaded, tiny_tokenizer, write_pictures
from safetensors.torch import load_file, save_file

import tessella
from tessella import registry
from tessella.checkpoint import (
    CheckpointError,
    fingerprint,
    latest_checkpoint,
    load_recipe,
    load_state,
    migrate,
    save_checkpoint,
    write_recipe,
)
from tessella.data.tokens import read_tokens
from tessella.quantizers import FSQ, VQ, SimVQ
from tessella.training.logs import read_log


@pytest.mark.parametrize("quantizer", [None, VQ(16, 3), SimVQ(16, 3)])
def test_what_is_saved_loads_as_the_same_tokenizer(tmp_path: Path, quantizer: tessella.quantizers.Quantizer) -> None:
    tokenizer = tiny_tokenizer(quantizer)
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    tokenizer.save(tmp_path / "model")
    again = tessella.load(tmp_path / "model")
    assert not again.training
    indices = tokenizer.encode(x)
    assert torch.equal(again.encode(x), indices)
    assert torch.equal(again.decode(indices), tokenizer(x).x_hat)
    assert fingerprint(again) == fingerprint(tokenizer)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "checksums.json",
        "model.safetensors",
        "recipe.toml",
    ]


def test_saving_again_replaces(tmp_path: Path) -> None:
    tiny_tokenizer(seed=0).save(tmp_path / "model")
    other = tiny_tokenizer(seed=1)
    other.save(tmp_path / "model")
    assert fingerprint(tessella.load(tmp_path / "model")) == fingerprint(other)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fingerprint_follows_weights_and_settings() -> None:
    base = fingerprint(tiny_tokenizer())
    assert fingerprint(tiny_tokenizer()) == base
    assert fingerprint(tiny_tokenizer(seed=1)) != base
    paper = tessella.quantizers.FSQ([5, 5, 5], convention="paper")
    assert fingerprint(tiny_tokenizer(paper)) != base
    changed = tiny_tokenizer()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(changed) != base


def test_damage_is_named(tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path / "model")
    weights, recipe = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "recipe.toml"
    whole, text = weights.read_bytes(), recipe.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        tessella.load(tmp_path / "model")
    weights.write_bytes(whole)
    recipe.write_text(text.replace("conv", "vit"))
    with pytest.raises(CheckpointError, match=r"recipe\.toml is damaged"):
        tessella.load(tmp_path / "model")
    recipe.write_text(text)
    (tmp_path / "model" / "checksums.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checksums\.json is damaged"):
        tessella.load(tmp_path / "model")
    recipe.unlink()
    with pytest.raises(CheckpointError, match="no recipe beside the weights"):
        tessella.load(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no model in"):
        tessella.load(tmp_path / "nothing")


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path / "model")
    weights, recipe = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "recipe.toml"
    whole = weights.read_bytes()
    (tmp_path / "model" / "checksums.json").unlink()
    state = load_file(weights)
    save_file(state, weights, {"tessella": '{"version": 99}'})
    with pytest.raises(CheckpointError, match="format version 99; this program reads versions up to 2"):
        tessella.load(tmp_path / "model")
    state["intruder"] = state.pop("to_code.bias")
    save_file(state, weights, {"tessella": '{"version": 1}'})
    with pytest.raises(CheckpointError, match=r"(?s)does not fit.*to_code\.bias.*intruder"):
        tessella.load(tmp_path / "model")
    weights.write_bytes(whole)
    sections = recipe.read_text().partition("\n")[2]
    recipe.write_text(sections.replace("fsq", "fsk"))
    with pytest.raises(CheckpointError, match=r"recipe\.toml: unknown quantizer 'fsk'"):
        tessella.load(tmp_path / "model")
    recipe.write_text("][")
    with pytest.raises(CheckpointError, match=r"recipe\.toml is damaged"):
        tessella.load(tmp_path / "model")


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_nothing_read_can_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_checkpoint(tmp_path, 1, tiny_tokenizer(), {"position": 1}, keep=1)
    assert load_state(folder) == {"position": 1}
    (folder / "checksums.json").unlink()
    (folder / "state.pt").write_bytes(pickle.dumps(_Payload(), protocol=2))
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(folder)
    torch.save(_Payload(), folder / "state.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Payload(), protocol=2))
    with pytest.raises(CheckpointError, match="damaged"):
        tessella.load(folder)
    assert not (tmp_path / "executed").exists()


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, tiny_tokenizer(), {"position": step}, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000010"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000010"
    assert latest_checkpoint(tmp_path / "nowhere") is None


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import tiny_tokenizer
from tessella.checkpoint import save_checkpoint
from tessella.storage import StorageError
run = Path({run!r})
big = {{"position": 2, "optimizers": [0.5] * 100_000}}
save_checkpoint(run, 1, tiny_tokenizer(), big, keep=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing past the limit fails as on a full disk: OSError
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    save_checkpoint(run, 2, tiny_tokenizer(), big, keep=1)
except StorageError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("limit", [1_000, 50_000])  # within the weights, within the training state
def test_a_full_disk_spares_the_previous_checkpoint(tmp_path: Path, limit: int) -> None:
    script = FULL_DISK.format(tests=str(Path(__file__).parent), run=str(tmp_path), limit=limit)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=single_threaded(), check=False
    )
    assert done.returncode == 7, done.stderr
    assert re.search(r"could not write .*checkpoints/step-00000002/\S+: File too large", done.stdout)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    assert load_state(folder)["position"] == 2
    tessella.load(tmp_path)


# --- what earlier formats wrote ---------------------------------------------------------------------------------------

V1 = Path(__file__).parent / "data_formats" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())


def picture() -> torch.Tensor:
    """The one that ``expected.json`` speaks of."""
    return torch.arange(3 * 24 * 24).mul(37).remainder(256).view(1, 3, 24, 24) / 127.5 - 1


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders of format 1, in the working directory, with the pictures that they were made from."""
    shutil.copytree(V1, tmp_path / "v1")
    write_pictures(tmp_path / "pictures", 24, size=24)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "v1"


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_run", "generator_run/tokenizer"])
def test_tokenizers_of_format_1_make_the_same_tokens(old: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "tessella"):
        tokenizer = tessella.load(old / name)
        tessella.load(old / name)
    assert tokenizer.encode(picture()).flatten().tolist() == EXPECTED[name]
    assert [record.message.partition(" has no ")[2] for record in caplog.records] == [
        "checksums.json: what is read from it cannot be verified"
    ]  # once
    assert tokenizer.recipe is not None
    assert tokenizer.recipe["medium"] == {"name": "image"}
    tokenizer.save(old / "again")
    again = tessella.load(old / "again")
    assert fingerprint(again) == fingerprint(tokenizer)


def test_generators_of_format_1_load(old: Path) -> None:
    generator, tokenizer = tessella.load_generator(old / "generator_run")
    with torch.no_grad():
        loss = generator(tokenizer.encode(picture()), torch.tensor([1])).loss
    assert loss.item() == pytest.approx(EXPECTED["generator_loss"], rel=1e-5)
    assert generator.recipe is not None
    assert "medium" not in generator.recipe


def test_token_shards_of_format_1_load(old: Path) -> None:
    rows = list(
        read_tokens(old / "tokens", expect_fingerprint=fingerprint(tessella.load(old / "generator_run/tokenizer")))
    )
    assert {row.key: row.indices.flatten().tolist() for row in rows} == EXPECTED["tokens"]


def test_runs_of_format_1_go_on(old: Path) -> None:
    folder = tessella.train(str(old / "tokenizer_run" / "recipe.toml"), out=old / "tokenizer_run", quiet=True)
    rows = read_log(folder / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name, value in EXPECTED["last_row"].items():
        assert rows[-1][name] == pytest.approx(value, rel=1e-4), name
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert newest.name == "step-00000006"
    assert load_state(newest)["position"] == 6
    out = tessella.train(
        str(old / "generator_run" / "recipe.toml"), tokenizer=old / "generator_run" / "tokenizer",
        out=old / "generator_run", quiet=True,
    )  # fmt: skip
    assert [row["step"] for row in read_log(out / "log.jsonl")] == [1, 2, 3]


def test_migration_of_recipes() -> None:
    tokenizer = {"data": {"name": "folder"}, "loss": {"l2_weight": 1.0}}
    now = {"data": {"name": "folder"}, "medium": {"name": "image"}, "loss": {"name": "image", "l2_weight": 1.0}}
    assert migrate(tokenizer, 1) == now
    assert migrate(now, 2) == now
    assert "loss" not in migrate({"autoencoder": {"name": "conv"}}, 1)  # saved without a training
    generator = {"data": {"name": "folder"}, "generator": {"name": "ar"}}
    assert migrate(generator, 1) == generator


# --- which folders are ours, and which of them is damaged -------------------------------------------------------------


def test_only_step_and_eight_digits_are_ours(tmp_path: Path) -> None:
    for step in (4, 8):
        save_checkpoint(tmp_path, step, tiny_tokenizer(seed=step), {"position": step}, keep=2)
    checkpoints = tmp_path / "checkpoints"
    kept = ["step-best", "step-00000004-keep", "step-000000099", "step-٠٠٠٠٠٠٩٩"]
    for name in kept:
        shutil.copytree(checkpoints / "step-00000004", checkpoints / name)
    assert latest_checkpoint(tmp_path) == checkpoints / "step-00000008"
    save_checkpoint(tmp_path, 12, tiny_tokenizer(seed=12), {"position": 12}, keep=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted([*kept, "step-00000012"])
    assert fingerprint(tessella.load(tmp_path)) == fingerprint(tiny_tokenizer(seed=12))


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.toml", "state.pt", "checksums.json"])
def test_a_damaged_checkpoint_says_what_to_delete(tmp_path: Path, name: str) -> None:
    for step in (4, 8):
        newest = save_checkpoint(tmp_path, step, tiny_tokenizer(), {"position": step}, keep=2)
    flip(newest / name, 100)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*; delete {newest} to go on from step-00000004"):
        read_checkpoint(tmp_path)
    shutil.rmtree(newest)
    assert read_checkpoint(tmp_path) == {"position": 4}
    flip(tmp_path / "checkpoints" / "step-00000004" / name, 100)
    with pytest.raises(CheckpointError, match=r"delete \S+-00000004 to start anew; there is no checkpoint before it"):
        read_checkpoint(tmp_path)


def test_a_model_that_cannot_say_its_step_is_given_no_advice(tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path / "model")
    flip(tmp_path / "model" / "model.safetensors", 500)
    with pytest.raises(CheckpointError, match=r"damaged: its SHA-256 is [0-9a-f]{64}, [0-9a-f]{64} was written$"):
        tessella.load(tmp_path / "model")


def read_checkpoint(run: Path) -> dict[str, object]:
    """All that continuing reads."""
    newest = latest_checkpoint(run)
    assert newest is not None
    tessella.load(newest)
    return load_state(newest)


def flip(file: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= mask
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.toml", "state.pt", "checksums.json"])
def test_no_flipped_byte_goes_unseen(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, 1, tiny_tokenizer(), {"position": 1, "rng": torch.get_rng_state()}, keep=1)
    whole, rng = (folder / name).read_bytes(), random.Random(0)
    for _ in range(20):
        flip(folder / name, rng.randrange(len(whole)), 1 << rng.randrange(8))
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            read_checkpoint(tmp_path)
        (folder / name).write_bytes(whole)
    assert read_checkpoint(tmp_path)["position"] == 1


def test_no_flipped_byte_of_a_run_s_recipe_goes_unseen(tmp_path: Path) -> None:
    recipe = {"data": {"name": "folder", "path": "pictures"}, "training": {"steps": 3, "lr": 1e-3}}
    write_recipe(tmp_path, recipe)
    file = tmp_path / "recipe.toml"
    assert load_recipe(tmp_path) == recipe
    assert tomllib.loads(file.read_text()) == recipe  # its first line is a comment
    for offset in range(0, len(file.read_bytes()), 3):
        flip(file, offset, 1 << offset % 8)
        with pytest.raises(CheckpointError, match=r"recipe\.toml"):
            load_recipe(tmp_path)
        flip(file, offset, 1 << offset % 8)
    assert load_recipe(tmp_path) == recipe


class Before(FSQ):
    def __init__(self, levels: list[int]) -> None:
        super().__init__(levels)


class After(FSQ):
    def __init__(self, levels: list[int], num_spins: int = 3) -> None:
        super().__init__(levels)
        self.num_spins = num_spins


def test_an_argument_that_came_later_changes_no_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(registry._registered, ("quantizers", "spun"), Before)
    tiny_tokenizer(Before([5, 5, 5])).save(tmp_path / "model")
    before = fingerprint(tessella.load(tmp_path / "model"))
    monkeypatch.setitem(registry._registered, ("quantizers", "spun"), After)
    again = tessella.load(tmp_path / "model")
    assert again.quantizer.arguments["num_spins"] == 3
    assert fingerprint(again) == before
    again.save(tmp_path / "again")
    assert fingerprint(tessella.load(tmp_path / "again")) == before
    new = fingerprint(tiny_tokenizer(After([5, 5, 5])))
    assert new != before  # a new one is described in full
    assert fingerprint(tiny_tokenizer(After([5, 5, 5], num_spins=4))) not in (before, new)
