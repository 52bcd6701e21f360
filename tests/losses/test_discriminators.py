"""Discriminators: sizes, published keys, and their parts against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tessella.config import Configurable, spec_of
from tessella.losses.discriminators import BlurPool, PatchGAN, StyleGAN, _DownBlock, minibatch_stddev


def test_patchgan_is_the_published_one() -> None:
    model = PatchGAN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_765_633
    state = model.state_dict()
    assert len(state) == 22
    assert sorted({int(key.removeprefix("main.").split(".")[0]) for key in state}) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert {key: list(value.shape) for key, value in state.items() if value.ndim == 4} == {
        "main.0.weight": [64, 3, 4, 4],
        "main.2.weight": [128, 64, 4, 4],
        "main.5.weight": [256, 128, 4, 4],
        "main.8.weight": [512, 256, 4, 4],
        "main.11.weight": [1, 512, 4, 4],
    }
    assert [key for key in state if key.endswith("bias") and int(key.split(".")[1]) in (0, 2, 5, 8, 11)] == [
        "main.0.bias", "main.11.bias",
    ]  # fmt: skip
    assert [module.stride[0] for module in model.main if isinstance(module, nn.Conv2d)] == [2, 2, 2, 1, 1]


def test_patchgan_starts_as_published() -> None:
    torch.manual_seed(0)
    model = PatchGAN()
    for module in model.main:
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert module.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("layers", "size", "grid"), [(3, (256, 256), (30, 30)), (3, (24, 37), (1, 2)), (1, (6, 8), (1, 2))]
)
def test_patchgan_gives_a_logit_a_patch(layers: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert PatchGAN(2, layers)(torch.zeros(1, 3, *size)).shape == (1, 1, *grid)


def test_a_patchgan_logit_sees_70_pixels() -> None:
    model = PatchGAN(2).eval()
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    model(x)[0, 0, 15, 15].backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


@pytest.mark.parametrize("size", [16, 32, 64])
def test_stylegan_gives_a_logit_a_picture(size: int) -> None:
    torch.manual_seed(0)
    model = StyleGAN(size, 4)
    assert len(model.blocks) == {16: 2, 32: 3, 64: 4}[size]
    logits = model(torch.randn(4, 3, size, size))
    assert logits.shape == (4, 1)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_stylegan_has_stylegan2s_widths() -> None:
    with torch.device("meta"):
        model = StyleGAN(256)
    assert [len(block.get_parameter("conv2.weight")) for block in model.blocks] == [128, 256, 512, 512, 512, 512]
    # 513 channels into the last 3x3, then 4 * 4 * 512 features into 512, then into one.
    last = (513 * 9 + 1) * 512 + (512 * 16 + 1) * 512 + 513
    blocks = zip([64, 128, 256, 512, 512, 512], [128, 256, 512, 512, 512, 512], strict=True)
    middle = sum((9 * a + 1) * a + (9 * a + 1) * b + a * b for a, b in blocks)
    assert sum(parameter.numel() for parameter in model.parameters()) == (27 + 1) * 64 + middle + last


def test_blur_halves_with_the_filter_1_3_3_1() -> None:
    blur = BlurPool()
    out = blur(torch.ones(2, 3, 6, 6))
    assert out.shape == (2, 3, 3, 3)
    # At an edge one of the four taps, the outer 1/8, lies on zeros.
    expected = torch.outer(torch.tensor([7 / 8, 1, 7 / 8]), torch.tensor([7 / 8, 1, 7 / 8]))
    torch.testing.assert_close(out, expected.expand(2, 3, 3, 3))
    impulse = torch.zeros(1, 2, 4, 4)
    impulse[0, 1, 1, 2] = 64
    assert blur(impulse)[0, 1].tolist() == [[3, 9], [1, 3]]
    assert blur(impulse)[0, 0].abs().max() == 0
    assert not blur.state_dict()


def test_down_block_is_the_mean_of_two_branches_at_unit_variance() -> None:
    block = _DownBlock(1, 1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.conv1.weight[0, 0, 1, 1] = 1
        block.conv2.weight[0, 0, 1, 1] = 1
        block.shortcut.weight[:] = 3
    x = -torch.ones(1, 1, 12, 12)
    # -1 -> 0.2 * -1 -> blurred -> 0.2 * -0.2 = -0.04, and 3 * -1 beside it.
    assert block(x)[0, 0, 2, 2].item() == pytest.approx((-3 - 0.04) / math.sqrt(2))


def test_minibatch_stddev_by_hand() -> None:
    x = torch.tensor([0.0, 0, 2, 2])[:, None, None, None].expand(4, 3, 2, 5)
    torch.testing.assert_close(minibatch_stddev(x), torch.ones(4, 1, 2, 5))
    # Groups of 4 out of 8: every second picture. The even ones are 0, 2, 4, 6, whose variance is 5; the odd ones equal.
    x = torch.tensor([0.0, 9, 2, 9, 4, 9, 6, 9])[:, None, None, None]
    expected = torch.tensor([math.sqrt(5), 1e-4]).repeat(4)
    torch.testing.assert_close(minibatch_stddev(x).flatten(), expected)
    # The mean over channels of their own deviations, 1 and 3.
    x = torch.tensor([[0.0, 0], [2, 6]])[:, :, None, None]
    assert minibatch_stddev(x).flatten().tolist() == pytest.approx([2, 2])


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (2, 2), (3, 3), (5, 1), (6, 3), (8, 4)])
def test_minibatch_groups_divide_the_batch(batch: int, group: int) -> None:
    x = torch.arange(batch).float()[:, None, None, None]
    groups = [x[start :: batch // group].flatten() for start in range(batch // group)]
    expected = torch.stack([g.var(correction=0) for g in groups]).add(1e-8).sqrt().repeat(group)
    torch.testing.assert_close(minibatch_stddev(x).flatten(), expected)


def test_a_stylegan_logit_knows_other_pictures_by_their_deviation_alone() -> None:
    torch.manual_seed(0)
    model = StyleGAN(16, 4)
    x = torch.randn(4, 3, 16, 16)
    other = torch.cat([x[:1], torch.randn(3, 3, 16, 16)])
    assert not torch.allclose(model(x)[0], model(other)[0])
    with torch.no_grad():
        model.conv_out.weight[:, -1] = 0
    torch.testing.assert_close(model(x)[0], model(other)[0])


def test_minibatch_stddev_has_a_finite_gradient_on_equal_pictures() -> None:
    x = torch.ones(4, 2, 3, 3, requires_grad=True)
    minibatch_stddev(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (PatchGAN(2), (1, 1, 32, 32), r"x must be \[B, 3, H, W\], got \[1, 1, 32, 32\]"),
        (PatchGAN(2), (1, 3, 64, 23), "at least 24 px, got 64 x 23"),
        (PatchGAN(2, 2), (1, 3, 11, 12), "at least 12 px, got 11 x 12"),
        (StyleGAN(16, 2), (1, 4, 16, 16), r"x must be \[B, 3, H, W\]"),
        (StyleGAN(16, 2), (1, 3, 16, 32), "16 x 16 px, got 16 x 32"),
    ],
)
def test_bad_pictures(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


def test_bad_settings() -> None:
    for size in (8, 24, 0, -16):
        with pytest.raises(ValueError, match=f"size_px must be a power of two from 16, got {size}"):
            StyleGAN(size)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        PatchGAN(num_layers=0)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        StyleGAN(16, 0)


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (PatchGAN(4), {"channels": 4, "num_layers": 3, "in_channels": 3}),
        (StyleGAN(16, 4), {"size_px": 16, "channels": 4, "in_channels": 3}),
    ],
)
def test_settings_are_remembered(model: Configurable, spec: dict[str, int]) -> None:
    assert spec_of(model) == spec
