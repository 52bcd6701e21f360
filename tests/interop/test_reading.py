"""Whatever is wrong with a file is said, nothing is written, and nothing in it runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tessella
from tessella.interop import ConversionError, convert
from tessella.interop.reading import read_checkpoint
from tessella.interop.torchscript import read_torchscript
from tests.interop.originals import LLAMAGEN, TAMING, VQGAN, Magvit, Size, State

SMALL = Size(channels=32, mult=(1, 2), blocks=1, features=8, attention=())


def taming() -> State:
    return VQGAN(TAMING, SMALL, dim=8, codes=16).shapes().random(0)


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "weights.ckpt")
    return folder / "weights.ckpt"


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def truncated(folder: Path) -> Path:
    file = saved({"state_dict": taming()}, folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def raw_pickle(folder: Path) -> Path:
    (folder / "weights.ckpt").write_bytes(pickle.dumps(Payload(), protocol=2))
    return folder / "weights.ckpt"


def lying_header(folder: Path) -> Path:
    """More numbers announced than there are."""
    file = folder / "weights.safetensors"
    save_file(taming(), file)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["quantize.embedding.weight"]["shape"] = [1 << 20, 1 << 20]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return file


def cut_safetensors(folder: Path) -> Path:
    file = folder / "weights.safetensors"
    save_file(taming(), file)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def changed(change: Callable[[State], None]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        state = taming()
        change(state)
        return saved({"state_dict": state}, folder)

    return write


def rename(state: State) -> None:
    state["encoder.mid.block_1.conv9.weight"] = state.pop("encoder.mid.block_1.conv1.weight")
    state["encoder.mid.block_1.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    del state["decoder.conv_out.bias"]


def averages_of_other_codes(state: State) -> None:
    plain = dict(state)
    state.update({"model_ema." + name.replace(".", ""): x for name, x in plain.items()})
    state["model_ema.quantizeembeddingweight"] = torch.zeros(32, 8)


def lost_average(state: State) -> None:
    plain = dict(state)
    state.update({"model_ema." + name.replace(".", ""): x for name, x in plain.items()})
    del state["model_ema.decoderconv_inweight"]


def codes_of_another_length(state: State) -> None:
    state["quantize.embedding.weight"] = torch.zeros(16, 7)


@pytest.mark.parametrize(
    ("family", "write", "reason"),
    [
        ("taming", lambda folder: saved({"state_dict": taming(), "extra": Payload()}, folder),
         r"refused: its pickle asks for \w+\.system, which"),
        ("taming", raw_pickle, "damaged or cannot be read safely"),
        ("taming", truncated, "damaged or cannot be read safely"),
        ("taming", lying_header, "is damaged or no safetensors file"),
        ("taming", cut_safetensors, "is damaged or no safetensors file"),
        ("taming", lambda folder: folder / "nothing.ckpt", "no checkpoint file"),
        ("taming", lambda folder: saved({"state_dict": {"lr": 0.1}}, folder), "holds no tensors .* its keys are"),
        ("taming", lambda folder: saved([1, 2], folder), "holds a list, not a dictionary"),
        ("taming", changed(rename), r"(?s)1 tensors missing: decoder\.conv_out\.bias.*1 tensors of the wrong shape: "
         r"encoder\.mid\.block_1\.conv1\.weight \[64, 64, 1, 1\] instead of \[64, 64, 3, 3\].*1 tensors unknown: "
         r"encoder\.mid\.block_1\.conv9\.weight"),
        ("taming", changed(codes_of_another_length), r"quant_conv\.weight \[8, 8, 1, 1\] instead of \[7, 8\]"),
        ("ibq", changed(averages_of_other_codes),
         r"model_ema\.quantizeembeddingweight \[32, 8\] instead of \[16, 8\] as quantize\.embedding\.weight"),
        ("ibq", changed(lost_average), r"1 tensors missing: model_ema\.decoderconv_inweight"),
        ("ibq", changed(lambda state: None), "is not a checkpoint of ibq: its keys are those of taming"),
        ("llamagen", changed(lambda state: None), "is not a checkpoint of llamagen: its keys are those of taming"),
        ("taming", lambda folder: saved(VQGAN(LLAMAGEN, SMALL, dim=8, codes=16).shapes().random(0), folder),
         "is not a checkpoint of taming: its keys are those of llamagen"),
        (None, lambda folder: saved({"fc.weight": torch.zeros(2, 2)}, folder), r"known family .*begin with fc"),
        ("vqvae2", changed(lambda state: None), "unknown family 'vqvae2'; choose one of: ibq"),
    ],
)  # fmt: skip
def test_refused_with_the_reason_and_nothing_written(
    family: str | None, write: Callable[[Path], Path], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConversionError, match=reason) as caught:
        convert(family, file, tmp_path / "model")
    assert family == "vqvae2" or file.name in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_simvq_without_its_basis(tmp_path: Path) -> None:
    shapes = Magvit(Size(32, (1, 2), 2, 32), adaptive=False).shapes()
    shapes.linear("quantize.embedding_proj", 32, 32)
    with pytest.raises(ConversionError, match=r"no tensor 'quantize\.embedding\.weight'"):
        convert("simvq", saved({"state_dict": shapes.random(0)}, tmp_path), tmp_path / "model")


def test_what_was_there_is_not_overwritten_unless_a_model(tmp_path: Path) -> None:
    file = saved({"state_dict": taming()}, tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="exists and holds no model"):
        convert("taming", file, tmp_path / "notes")
    with pytest.raises(ConversionError, match="is a file"):
        convert("taming", file, file)
    convert("taming", file, tmp_path / "model")
    tessella.load(convert("taming", tmp_path, tmp_path / "model"))


def test_objects_of_trainers_are_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", module)

    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    content = {"state_dict": taming(), "callbacks": {ModelCheckpoint: {"best": 1.0}}, "args": argparse.Namespace(lr=1)}
    file = saved(content, tmp_path)
    monkeypatch.undo()
    assert read_checkpoint(file).tensors.keys() == taming().keys()


def test_prefixes_of_wrappers_go(tmp_path: Path) -> None:
    file = saved({"model": {f"module.{name}": x for name, x in taming().items()}}, tmp_path)
    assert read_checkpoint(file).tensors.keys() == taming().keys()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.steps.sum()  # type: ignore[operator,no-any-return]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Inner(), nn.GroupNorm(1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x)  # type: ignore[no-any-return]


def script(module: nn.Module, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module.eval(), torch.zeros(1, 2, 4, 4)), file)


def test_torchscript_gives_its_tensors(tmp_path: Path) -> None:
    module = Outer().to(torch.bfloat16).float()
    script(module, tmp_path / "model.jit")
    read = read_torchscript(tmp_path / "model.jit")
    expected = module.state_dict()
    assert read.tensors.keys() == expected.keys()
    assert all(torch.equal(read.tensors[name], x) for name, x in expected.items())
    with pytest.raises(ConversionError, match="is not of a known family"):
        convert(None, tmp_path / "model.jit", tmp_path / "out")


def test_a_malicious_torchscript_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "model.jit", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(Payload(), protocol=2))
        archive.writestr("model/code/__torch__.py", "")
    with pytest.raises(ConversionError, match=r"refused: the archive asks for \w+\.system"):
        convert("cosmos", tmp_path / "model.jit", tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "model.jit").write_bytes((tmp_path / "model.jit").read_bytes()[:60])
    with pytest.raises(ConversionError):
        convert("cosmos", tmp_path / "model.jit", tmp_path / "out")
