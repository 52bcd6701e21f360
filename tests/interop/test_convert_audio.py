"""SimVQ's audio checkpoints: the published names, shapes and container, against the original's arithmetic."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

import tessella
from tessella.interop import ConversionError, convert
from tessella.interop.base import Checkpoint, Options
from tessella.interop.convert import family_module, recognise
from tests.interop.originals_audio import EnCodec, SimVQAudio, as_transformers
from tests.interop.test_convert import averaged

NARROW = SimVQAudio(channels=8, features=16, dim=32, hidden=48, blocks=2, codes=64)


def test_encoded_and_decoded_as_the_original(tmp_path: Path) -> None:
    state = NARROW.shapes().random(1)
    content = averaged(state, frozen=("quantize.embedding.weight",))
    unused = NARROW.unused()
    content |= unused | {f"model_ema.{name.replace('.', '')}": x for name, x in unused.items() if "decoder" in name}
    torch.save({"state_dict": content}, tmp_path / "epoch=49-step=138600.ckpt")
    out = convert("simvq", tmp_path / "epoch=49-step=138600.ckpt", tmp_path / "model")
    tokenizer = tessella.load(out)
    x = torch.rand(2, 1, 12 * NARROW.hop) * 2 - 1
    z, codes = NARROW.latent(state, x), NARROW.codebook(state)
    indices = torch.cdist(z.double(), codes.double().expand(2, -1, -1)).argmin(-1)
    assert len(indices.unique()) > 2
    assert torch.equal(tokenizer.encode(x)[..., 0], indices)
    expected = NARROW.wave(state, codes[indices])
    assert expected.shape == x.shape
    size = float(expected.abs().max())
    torch.testing.assert_close(tokenizer.decode(indices[..., None]), expected, rtol=0, atol=1e-5 * max(1, size))
    recipe = tomllib.loads((out / "recipe.toml").read_text())
    assert recipe["medium"] == {"name": "audio", "sample_rate": 24000}
    assert recipe["source"]["model"] == "SimVQ audio 64"
    assert recipe["source"]["weights"] == "ema"


def test_every_tensor_of_the_released_size_has_its_place() -> None:
    shapes = SimVQAudio().shapes()
    encoder, backbone = (
        sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(part))
        for part in ("encoder.", "backbone.")
    )
    assert (encoder, backbone) == (8_802_816, 61_901_568)
    checkpoint = Checkpoint(Path("published.ckpt"), shapes.meta())
    assert recognise(checkpoint) == "simvq"
    converted = family_module("simvq").read(checkpoint, Options())
    assert converted.name == "SimVQ audio 65536"
    assert sum(x.numel() for x in converted.tokenizer.state_dict().values()) == shapes.count()


def test_without_its_basis(tmp_path: Path) -> None:
    state = NARROW.shapes().random(1)
    del state["quantize.embedding.weight"]
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(ConversionError, match=r"no tensor 'quantize\.embedding\.weight'"):
        convert("simvq", tmp_path / "a.ckpt", tmp_path / "model")


@pytest.mark.parametrize("names", ["meta", "transformers"])
def test_encodec_as_the_original(names: str, tmp_path: Path) -> None:
    model = EnCodec(channels=8, features=16, codes=32, codebooks=3)
    state = model.shapes().random(2)
    content = {**state, **model.statistics(state)}
    torch.save(content if names == "meta" else as_transformers(content), tmp_path / "encodec_24khz.th")
    out = convert("encodec", tmp_path / "encodec_24khz.th", tmp_path / "model")
    tokenizer = tessella.load(out)
    x = torch.rand(2, 1, 12 * model.hop) * 2 - 1
    indices, z_q = model.quantized(state, model.latent(state, x))
    assert len(indices.unique()) > 2
    assert torch.equal(tokenizer.encode(x), indices)
    expected = model.wave(state, z_q)
    size = float(expected.abs().max())
    torch.testing.assert_close(tokenizer.decode(indices), expected, rtol=0, atol=1e-5 * max(1, size))
    recipe = tomllib.loads((out / "recipe.toml").read_text())
    assert (recipe["medium"]["name"], recipe["source"]["family"]) == ("audio", "encodec")


def test_encodec_has_its_released_size() -> None:
    shapes = EnCodec().shapes()
    checkpoint = Checkpoint(Path("encodec_24khz.th"), shapes.meta())
    assert recognise(checkpoint) == "encodec"
    converted = family_module("encodec").read(checkpoint, Options())
    assert converted.name == "EnCodec, 32 codebooks"
    assert sum(x.numel() for x in converted.tokenizer.state_dict().values()) == shapes.count()


def test_encodec_with_norms_is_refused(tmp_path: Path) -> None:
    state = EnCodec(channels=8, features=16, codes=32, codebooks=1).shapes().random(2)
    torch.save({**state, "encoder.model.0.conv.norm.weight": torch.ones(8)}, tmp_path / "a.th")
    with pytest.raises(ConversionError, match="norms between its layers, as at 48 kHz"):
        convert(None, tmp_path / "a.th", tmp_path / "model")
