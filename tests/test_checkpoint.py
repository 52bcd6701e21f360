from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import single_threaded, tiny_tokenizer
from safetensors.torch import load_file, save_file

import tessella
from tessella.checkpoint import (
    CheckpointError,
    fingerprint,
    latest_checkpoint,
    load_state,
    save_checkpoint,
)
from tessella.quantizers import VQ, SimVQ


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
