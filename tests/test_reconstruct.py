"""What people hold goes through a tokenizer and comes back as they would expect it; models say what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_tokenizer
from generators.examples import EXAMPLES

import tessella
from tessella.autoencoders import ViT
from tessella.data.base import UnreadableImage
from tessella.media.audio import Audio
from tessella.media.image import Image
from tessella.quantizers import FSQ, VQ, Residual
from tessella.reporting.pictures import to_pictures
from tessella.tokenizer import Tokenizer


@pytest.fixture
def picture() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 23, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def expected(tokenizer: Tokenizer, picture: PIL.Image.Image) -> np.ndarray[Any, Any]:
    """What ``tokenize --whole`` and ``detokenize`` make of it."""
    x = torch.from_numpy(np.asarray(picture).astype(np.float32) / np.float32(127.5) - 1).permute(2, 0, 1)[None]
    (pixels,) = to_pictures(tokenizer.decode(tokenizer.encode(x, pad=True), extent=x.shape[2:]))
    return pixels


def test_pictures_in_any_form(picture: PIL.Image.Image, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    picture.save(tmp_path / "cat.png")
    forms = (picture, np.asarray(picture), np.asarray(picture).transpose(2, 0, 1), tmp_path / "cat.png",
             str(tmp_path / "cat.png"))  # fmt: skip
    for form in forms:
        again = tokenizer.reconstruct(form, out=tmp_path / "again.png")
        assert again.size == picture.size
        assert (np.asarray(again) == expected(tokenizer, picture)).all()
        with PIL.Image.open(tmp_path / "again.png") as written:
            assert (np.asarray(written) == np.asarray(again)).all()
    deep = PIL.Image.merge("RGBA", (*picture.split(), PIL.Image.new("L", picture.size, 255)))
    assert (np.asarray(tokenizer.reconstruct(deep)) == expected(tokenizer, picture)).all()
    assert tokenizer.reconstruct(picture.convert("CMYK")).mode == "RGB"


def test_tensors_stay_tensors_and_the_mode_stays() -> None:
    tokenizer = tiny_tokenizer(VQ(16, 3)).train()
    x = torch.rand(3, 18, 23) * 2 - 1
    x_hat = tokenizer.reconstruct(x)
    assert tokenizer.training
    assert not x_hat.requires_grad
    assert torch.equal(x_hat, tokenizer.eval()(tokenizer.pad(x[None])).x_hat[0, :, :18, :23])


def test_what_cannot_be_read_is_named(picture: PIL.Image.Image, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UnreadableImage, match=r"nowhere.jpg: No such file"):
        tokenizer.reconstruct("nowhere.jpg")
    with pytest.raises(UnreadableImage, match="values of type float64"):
        tokenizer.reconstruct(np.zeros((4, 4)))
    with pytest.raises(TypeError, match="a file's path or a tensor"):
        tokenizer.reconstruct(3)
    with pytest.raises(ValueError, match=r"out must end in .png, got .*again.jpg"):
        tokenizer.reconstruct(picture, out=tmp_path / "again.jpg")
    assert not list(tmp_path.iterdir())


def test_the_recipe_says_what_the_signal_is(tmp_path: Path) -> None:
    sounds = pytest.importorskip("sounds")
    codec = tessella.build("fsq_audio_small").eval()
    path = sounds.write(tmp_path / "hello.wav", sounds.tone(0.1, 24000), 24000)
    waveform, rate = codec.reconstruct(path, out=tmp_path / "again.wav")
    assert (rate, waveform.shape) == (24000, (1, 2400))
    medium = Audio(sample_rate=24000)
    assert torch.equal(codec.reconstruct((medium.read(path)[0].numpy(), 24000))[0], waveform)
    assert (medium.read(tmp_path / "again.wav") - waveform.clamp(-1, 1)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="expected a waveform of 24000 Hz, got one of 16000"):
        codec.reconstruct((waveform, 16000))
    assert "1.495 kbps" in str(codec)


def test_pixels_that_pillow_has_none_of_come_back_as_arrays() -> None:
    medium = Image(channels=2)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 2), dtype=np.uint8)
    assert (medium.present(medium.accept(pixels)) == pixels).all()
    assert Image(channels=1).present(torch.zeros(1, 2, 3)).mode == "L"


def test_a_tokenizer_says_what_it_is_and_costs() -> None:
    tokenizer = tiny_tokenizer(Residual(VQ(16, 3), 2))
    assert tokenizer.bits_per_sample == pytest.approx(2 * 4 / 4**2)
    count = sum(parameter.numel() for parameter in tokenizer.parameters())
    encoder = sum(parameter.numel() for parameter in tokenizer.autoencoder.encoder.parameters())
    text = str(tokenizer)
    assert f"encoder {encoder:,} parameters" in text
    assert f"in all       {count:,} parameters" in text
    assert "Residual, 2 codebooks of 16 codes, 3 dimensions: 96 parameters" in text
    assert "0.5 bits per pixel" in text
    page = tokenizer._repr_html_()
    assert "<td" in page
    assert all(f">{value}<" in page for value in tokenizer.facts().values())
    assert "(encoder)" in repr(tokenizer)  # every layer


def test_tokens_that_do_not_grow_with_the_signal_are_counted_of_one() -> None:
    small = ViT(size_px=16, patch_px=4, width=16, depth=1, num_heads=2, latent_dim=4, num_latents=3)
    assert Tokenizer(small, FSQ([8, 8])).bits_per_sample == pytest.approx(3 * 6 / 16**2)


def test_generators_say_what_they_are() -> None:
    for example in EXAMPLES:
        generator = example.make()
        count = sum(parameter.numel() for parameter in generator.parameters())
        assert f"{count:,} parameters" in str(generator) or f"{count / 1e6:.2f} M" in str(generator), str(example)
        assert generator.space.fingerprint in generator._repr_html_()
