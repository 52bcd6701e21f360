"""What is exported gives the tokens of eager, at other batches and sizes than it was traced with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import single_threaded

from tessella.autoencoders import Conv, ViT
from tessella.interop import ConversionError
from tessella.interop.export import export
from tessella.quantizers import FSQ, IBQ, VQ, Grouped, Residual
from tessella.quantizers.base import Quantizer
from tessella.tokenizer import Tokenizer


def conv(quantizer: Quantizer) -> Tokenizer:
    autoencoder = Conv(
        channels=8, multipliers=(1,), num_res_blocks=1, num_decoder_res_blocks=1, latent_dim=8, patch_px=2
    )  # fmt: skip
    return Tokenizer(autoencoder, quantizer).eval()


def onnx(file: Path, given: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: given.numpy()})[0])


SLOW = (FSQ([5, 5, 5]), IBQ(32, 4), Residual(VQ(16, 4), 2))


@pytest.mark.parametrize(
    "quantizer", [VQ(32, 4), *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)],
    ids=["vq", "fsq", "ibq", "residual"],
)  # fmt: skip
def test_onnx_gives_the_same_tokens_and_pictures(quantizer: Quantizer, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    tokenizer = conv(quantizer)
    with torch.no_grad():
        for codes in quantizer.parameters():  # as spread as the latents
            codes.normal_(std=0.3)
    tokenizer.save(tmp_path / "model")
    out = export(tmp_path / "model", to="onnx", out=tmp_path / "onnx")
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".onnx") == ["decode.onnx", "encode.onnx"]
    for shape in ((1, 3, 10, 6), (3, 3, 16, 20)):
        x = torch.rand(shape) * 2 - 1
        indices = tokenizer.encode(x)
        assert len(indices.unique()) > 2
        assert torch.equal(onnx(out / "encode.onnx", x), indices)
        torch.testing.assert_close(onnx(out / "decode.onnx", indices), tokenizer.decode(indices), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_one_dimensional_latents_keep_their_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    autoencoder = ViT(patch_px=4, width=16, depth=1, num_heads=2, latent_dim=4, num_latents=5, size_px=8)
    tokenizer = Tokenizer(autoencoder, Grouped(VQ(8, 2), 2)).eval()
    tokenizer.save(tmp_path / "model")
    out = export(tmp_path / "model", to="onnx", out=tmp_path / "onnx")
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    indices = tokenizer.encode(x)
    assert torch.equal(onnx(out / "encode.onnx", x), indices)
    torch.testing.assert_close(onnx(out / "decode.onnx", indices), tokenizer.decode(indices), rtol=0, atol=1e-4)


ALONE = """
import sys, torch
x, indices, x_hat = torch.load(sys.argv[1])
encode, decode = (torch.export.load(f"{sys.argv[2]}/{name}.pt2").module() for name in ("encode", "decode"))
assert "tessella" not in sys.modules
assert torch.equal(encode(x), indices)
torch.testing.assert_close(decode(indices), x_hat, rtol=0, atol=1e-4)
"""


@pytest.mark.slow
def test_torch_programs_need_torch_alone(tmp_path: Path) -> None:
    tokenizer = conv(VQ(32, 4))
    tokenizer.save(tmp_path / "model")
    out = export(tmp_path / "model", to="torch", out=tmp_path / "torch")
    x = torch.rand(3, 3, 12, 8) * 2 - 1
    indices = tokenizer.encode(x)
    torch.save((x, indices, tokenizer.decode(indices)), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "expected.pt"), str(out)], capture_output=True, text=True,
        env=single_threaded(), check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="unknown target 'tflite'; choose one of: onnx, torch"):
        export(tmp_path, to="tflite", out=tmp_path / "out")  # type: ignore[arg-type]
