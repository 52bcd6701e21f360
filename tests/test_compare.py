"""Tokenizers side by side, and codecs beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer, write_pictures

from tessella.commands.compare import compare
from tessella.errors import ConfigError
from tessella.evaluation.codecs import coded
from tessella.quantizers import VQ


def pictures(count: int, size: int) -> torch.Tensor:
    """Smooth ones with some noise, in [-1, 1]."""
    small = torch.rand(count, 3, 4, 4) * 2 - 1
    smooth = torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic")
    return (smooth + 0.1 * torch.randn(count, 3, size, size)).clamp(-1, 1)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_a_codec_keeps_its_budget_and_uses_it(codec: str) -> None:
    (x,) = pictures(1, 64)
    (poor, small), (good, large) = coded(x, codec, 12_000), coded(x, codec, 40_000)
    assert small <= 12_000 < large <= 40_000
    assert (good - x).square().mean() < (poor - x).square().mean()
    worst, tight = coded(x, codec, 10)  # none is as small: the smallest there is, and its true size
    assert 10 < tight <= small
    assert worst.shape == x.shape


def test_unknown_codecs_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 1)
    tiny_tokenizer().save(tmp_path / "model")
    with pytest.raises(ConfigError, match="no codec 'bpg' for images here; there are: JPEG"):
        compare([tmp_path / "model"], data=str(tmp_path / "pictures"), out=tmp_path / "out", codecs=["bpg"])


def test_side_by_side(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 5, size=24)
    tiny_tokenizer().save(tmp_path / "fsq")
    tiny_tokenizer(VQ(16, 3)).save(tmp_path / "vq")
    found = compare(
        [tmp_path / "fsq", tmp_path / "vq"], data=str(tmp_path / "pictures"), out=tmp_path / "out",
        codecs=["jpeg", "webp"], num_shown=2, device="cpu", command="tessella compare fsq vq",
    )  # fmt: skip
    assert list(found.rows) == ["fsq", "vq", "JPEG as fsq", "JPEG as vq", "WEBP as fsq", "WEBP as vq"]
    assert found.rows["vq"].values["bits"] == pytest.approx(6 * 6 * 4)  # 6 x 6 positions, 16 codes
    assert found.rows["vq"].values["bits_per_pixel"] == pytest.approx(0.25)
    assert found.rows["fsq"].values["bits_per_pixel"] == pytest.approx(torch.tensor(125.0).log2().item() / 16)
    assert 0 < found.rows["vq"].values["usage"] <= 1
    assert found.rows["vq"].values["memory_mib"] > 0
    assert found.rows["vq"].values["parameters"] == sum(p.numel() for p in tiny_tokenizer(VQ(16, 3)).parameters())
    recorded = json.loads(found.record.read_text())["rows"]
    assert recorded == {name: row.values for name, row in found.rows.items()}
    page = found.page.read_text()
    assert page.count("original") >= 2
    assert all(name in page for name in ("fsq", "JPEG", "WEBP", "tessella compare fsq vq", "bits per pixel"))


def test_crops_make_one_size(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 3, size=40)
    tiny_tokenizer().save(tmp_path / "a" / "model")
    tiny_tokenizer(seed=1).save(tmp_path / "b" / "model")
    found = compare(
        [tmp_path / "a" / "model", tmp_path / "b" / "model"], data=str(tmp_path / "pictures"), out=tmp_path / "out",
        crop_px=16, codecs=[], num_shown=1, device="cpu",
    )  # fmt: skip
    assert list(found.rows) == [str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model")]
    assert found.protocol["sizes"] == {"16x16": 3}
    with pytest.raises(ConfigError, match="one model is named twice"):
        compare([tmp_path / "a" / "model"] * 2, data=str(tmp_path / "pictures"), out=tmp_path / "out")
