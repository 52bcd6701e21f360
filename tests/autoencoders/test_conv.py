from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tessella.autoencoders.conv import Attention, Conv, _DepthToSpace


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


SIMVQ = {
    "multipliers": (1, 2, 2, 4), "num_decoder_res_blocks": 2, "bias": False, "mid_attention": False, "out_kernel": 1,
    "downsample": "strided", "upsample": "depth_to_space", "latent_dim": 128,
}  # fmt: skip
MASKGIT = {
    "num_decoder_res_blocks": 2, "bias": False, "mid_attention": False, "out_kernel": 1, "downsample": "pool",
}  # fmt: skip


def on_meta(**settings: object) -> Conv:
    with torch.device("meta"):
        return Conv(**settings)  # type: ignore[arg-type]


def test_published_tokenizers_are_settings_of_it() -> None:
    ibq = on_meta(num_res_blocks=4, attention_strides=(16,))
    assert (count(ibq.encoder), count(ibq.decoder)) == (46_752_256, 59_903_875)
    assert (len(ibq.encoder.state_dict()), len(ibq.decoder.state_dict())) == (244, 294)

    def around(dim: int, size: int) -> int:  # the two 1x1 convolutions and the codebook
        return 256 * dim + dim + dim * 256 + 256 + size * dim

    assert count(on_meta(attention_strides=(16,))) + around(8, 16384) == 71_883_403  # LlamaGen VQ-16
    f8 = on_meta(attention_strides=(8,), multipliers=(1, 2, 2, 4))
    assert count(f8) + around(8, 16384) == 70_109_835  # LlamaGen VQ-8
    simvq = on_meta(**SIMVQ)
    assert (round(count(simvq.encoder) / 1e6, 2), round(count(simvq.decoder) / 1e6, 2)) == (24.28, 39.85)
    assert (len(simvq.encoder.state_dict()), len(simvq.decoder.state_dict())) == (73, 74)
    # The published 54.52 M includes the reference code's wider shortcuts, 81,920 weights more.
    assert count(on_meta(**MASKGIT, latent_dim=256)) + 1024 * 256 == 54_515_587 - 81_920
    assert count(on_meta(**MASKGIT, latent_dim=4)) == 52_962_951 - 81_920


@pytest.mark.parametrize(
    "settings",
    [
        {"multipliers": (1, 2)},
        {"multipliers": (1, 2), "downsample": "strided", "upsample": "depth_to_space", "bias": False},
        {"multipliers": (1, 1, 2), "downsample": "pool", "out_kernel": 1, "attention_strides": (2, 4)},
        {"multipliers": (1,), "patch_px": 4, "num_res_blocks": 0, "num_decoder_res_blocks": 0},
    ],
)
def test_non_square_inputs_and_gradients_everywhere(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Conv(channels=8, latent_dim=5, **settings)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 2 * model.stride, 3 * model.stride)
    latent = model.encode(x)
    assert latent.shape == (2, 2, 3, 5)
    x_hat = model.decode(latent)
    assert x_hat.shape == x.shape
    (x_hat - x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # a key bias shifts all logits of a softmax alike: its gradient is zero in exact arithmetic
        if not name.endswith("k.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_small_enough_for_tests() -> None:
    assert count(Conv(channels=14, multipliers=(1,), num_res_blocks=1, mid_attention=False, latent_dim=8)) < 30_000


def test_wrong_inputs_say_what_is_accepted() -> None:
    model = Conv(channels=8, multipliers=(1, 2, 2), num_res_blocks=1, latent_dim=4)
    with pytest.raises(ValueError, match=r"multiples of the stride 4, got 30 x 32"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        model.encode(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"attention_strides \[3\] are not among the levels' strides \[1, 2, 4\]"):
        Conv(multipliers=(1, 2, 2), attention_strides=(3,))
    with pytest.raises(ValueError, match="multipliers must hold"):
        Conv(multipliers=())
    with pytest.raises(ValueError, match="latent_dim must be at least 1"):
        Conv(latent_dim=0)


def test_attention_equals_the_written_out_formula() -> None:
    torch.manual_seed(0)
    attention = Attention(8)
    x = torch.randn(2, 8, 3, 4)
    h = attention.norm(x)
    q, k, v = (f(h).flatten(2) for f in (attention.q, attention.k, attention.v))  # [B, C, HW]
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * 8**-0.5, -1)
    mixed = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.proj_out(mixed))


def test_depth_to_space_puts_the_block_index_before_the_channel() -> None:
    up = _DepthToSpace(1)
    nn.init.zeros_(up.conv1.weight)
    with torch.no_grad():
        up.conv1.bias.copy_(torch.tensor([0.0, 1, 2, 3]))
    torch.testing.assert_close(up(torch.zeros(1, 1, 1, 1)), torch.tensor([[[[0.0, 1], [2, 3]]]]))
    wide = _DepthToSpace(2)
    nn.init.zeros_(wide.conv1.weight)
    with torch.no_grad():
        wide.conv1.bias.copy_(torch.arange(8.0))
    # DCR: output channel c of block (i, j) is input channel (2 i + j) * 2 + c, where pixel_shuffle takes 4 c + 2 i + j
    torch.testing.assert_close(wide(torch.zeros(1, 2, 1, 1))[0, :, 0, 0], torch.tensor([0.0, 1]))
    torch.testing.assert_close(F.pixel_shuffle(torch.arange(8.0).reshape(1, 8, 1, 1), 2)[0, :, 0, 0],
                               torch.tensor([0.0, 4]))  # fmt: skip
