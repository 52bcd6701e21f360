from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessella.autoencoders import Conv, ViT
from tessella.autoencoders.vit import sincos_positions
from tessella.config import build, spec_of
from tessella.quantizers import FSQ
from tessella.tokenizer import Tokenizer

GRID: dict[str, Any] = {}
SEQUENCE: dict[str, Any] = {"num_latents": 5, "size_px": 16}


def tiny(**settings: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"patch_px": 4, "width": 16, "depth": 2, "num_heads": 2, "latent_dim": 6, **settings})


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (16, 16), (32, 12)])
def test_any_multiple_of_the_patch_and_latents_channels_last(size: tuple[int, int]) -> None:
    model = tiny()
    x = pictures(2, 3, *size)
    latent = model.encode(x)
    assert latent.shape == (2, size[0] // 4, size[1] // 4, 6)
    assert model.latent_grid(*size) == latent.shape[1:3]
    assert model.decode(latent).shape == x.shape


def test_latents_of_a_whole_picture() -> None:
    model = tiny(**SEQUENCE)
    x = pictures(2, 3, 16, 16)
    latent = model.encode(x)
    assert latent.shape == (2, 5, 6)
    assert model.latent_grid(16, 16) == (5,)
    assert model.stride == 16
    assert model.decode(latent).shape == x.shape
    # They are what became of the queries: equal queries, equal latents.
    assert (latent[:, 0] - latent[:, 1]).abs().max() > 1e-3
    with torch.no_grad():
        model.queries[1] = model.queries[0]
    latent = model.encode(x)
    torch.testing.assert_close(latent[:, 0], latent[:, 1])


@pytest.mark.parametrize("settings", [GRID, SEQUENCE])
def test_gradients_everywhere(settings: dict[str, Any]) -> None:
    model = tiny(**settings)
    x = pictures(2, 3, 16, 16)
    (model.decode(model.encode(x)) - x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("settings", [GRID, SEQUENCE])
def test_pictures_of_a_batch_are_independent(settings: dict[str, Any]) -> None:
    model = tiny(**settings).double()
    x = pictures(3, 3, 16, 16).double()
    latent = model.encode(x)
    torch.testing.assert_close(model.encode(x[1:2]), latent[1:2])
    torch.testing.assert_close(model.decode(latent[1:2]), model.decode(latent)[1:2])


def test_every_latent_knows_the_whole_picture_and_where_patches_are() -> None:
    for model in (tiny(), tiny(**SEQUENCE)):
        x = pictures(1, 3, 16, 16)
        changed = x.clone()
        changed[..., :4, :4] = 0
        difference = (model.encode(changed) - model.encode(x)).abs().amax(-1)
        assert (difference > 1e-5).all()
        # Without positions the order of patches would not matter to the latents' mean.
        swapped = torch.cat([x[..., 4:], x[..., :4]], -1)
        means = [model.encode(picture).flatten(1, -2).mean(1) for picture in (x, swapped)]
        assert (means[0] - means[1]).abs().max() > 1e-4


def test_every_latent_of_a_whole_picture_shows_everywhere() -> None:
    model = tiny(**SEQUENCE)
    latent = model.encode(pictures(1, 3, 16, 16)).detach()
    x_hat = model.decode(latent)
    for position in range(5):
        changed = latent.clone()
        changed[:, position] += 1
        difference = (model.decode(changed) - x_hat).abs().amax(1)
        assert (nn.functional.max_pool2d(difference, 4) > 1e-5).all()
    # and their order matters
    assert (model.decode(latent.flip(1)) - x_hat).abs().max() > 1e-4


# Which query should look where takes longer to learn than what to make of a patch.
@pytest.mark.parametrize(("settings", "steps"), [(GRID, 60), (SEQUENCE, 250)])
def test_overfits_pictures(settings: dict[str, Any], steps: int) -> None:
    model = tiny(width=32, **settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 if settings else 1e-2)
    x = nn.functional.interpolate(pictures(4, 3, 4, 4), scale_factor=4, mode="bilinear")
    errors = []
    for _ in range(steps):
        loss = (model.decode(model.encode(x)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    grey = x.square().mean().item()
    assert errors[0] > grey
    assert errors[-1] < 0.6 * grey


@pytest.mark.parametrize(("settings", "extent", "grid"), [(GRID, (13, 18), (4, 5)), (SEQUENCE, (13, 10), (5,))])
def test_round_trip_through_a_tokenizer(
    settings: dict[str, Any], extent: tuple[int, int], grid: tuple[int, ...]
) -> None:
    tokenizer = Tokenizer(tiny(**settings), FSQ([5, 5, 5])).eval()
    x = pictures(2, 3, *extent)
    with pytest.raises(ValueError, match="pad=True"):
        tokenizer.encode(x)
    indices = tokenizer.encode(x, pad=True)
    assert indices.shape == (2, *grid, 1)
    padded = tokenizer.pad(x)
    out = tokenizer(padded)
    assert torch.equal(indices, out.quantized.indices)
    assert torch.equal(tokenizer.decode(indices, extent=extent), out.x_hat[..., : extent[0], : extent[1]])
    space = tokenizer.token_space(*padded.shape[2:])
    assert space.grid == grid
    assert space.sequence_length == math.prod(grid)


@pytest.mark.parametrize("num_pictures", [1, 2, 3])
def test_what_is_encoded_and_decoded_does_not_depend_on_gradients(num_pictures: int) -> None:
    """At a width where other ways of multiplying round otherwise."""
    torch.manual_seed(0)
    model = ViT(patch_px=8, width=192, depth=2, num_heads=4, latent_dim=16, num_latents=num_pictures, size_px=32).eval()
    x = pictures(num_pictures, 3, 32, 32)
    z = model.encode(x)
    x_hat = model.decode(z)
    assert x_hat.requires_grad
    with torch.no_grad():
        assert torch.equal(model.encode(x), z)
        assert torch.equal(model.decode(z), x_hat)


@pytest.mark.parametrize("model", [tiny(), tiny(**SEQUENCE), Conv(channels=8, multipliers=(1, 1), num_res_blocks=1)])
def test_last_layer_is_the_last_weight_on_the_way_to_the_picture(model: ViT | Conv) -> None:
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    assert parameters[id(model.last_layer)] in ("patch_out.weight", "decoder.conv_out.weight")
    x_hat = model.decode(model.encode(pictures(1, 3, 16, 16)))
    with torch.no_grad():
        model.last_layer.zero_()
    silent = model.decode(model.encode(pictures(1, 3, 16, 16)))
    assert x_hat.std() > 0
    assert silent.flatten(2).std(2).max() == 0  # nothing else reaches the picture


def test_positions_by_hand() -> None:
    positions = sincos_positions(2, 3, 8, like=torch.zeros((), dtype=torch.float64))
    assert positions.shape == (6, 8)
    assert positions.dtype == torch.float64
    assert positions[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    # Row 1, column 2, at frequencies 1 and 10000^(-1/2) = 0.01.
    row, column = (1, 0.01), (2, 0.02)
    expected = [*map(math.sin, row), *map(math.cos, row), *map(math.sin, column), *map(math.cos, column)]
    assert positions[5].tolist() == pytest.approx(expected, abs=1e-6)
    assert len(positions.unique(dim=0)) == 6


def test_small_enough_for_tests_and_published_sizes() -> None:
    with torch.device("meta"):
        small = ViT(latent_dim=32)
    block = 4 * (512 * 512 + 512) + 2 * (512 * 2048) + 2048 + 512 + 4 * 512
    ends = 2 * (192 * 512) + 512 + 192 + 2 * (512 * 32) + 32 + 512
    norms = 2 * 2 * 512
    assert sum(parameter.numel() for parameter in small.parameters()) == 2 * 8 * block + ends + norms


def test_stays_in_half_precision_and_runs_under_autocast() -> None:
    x = pictures(1, 3, 16, 16)
    for settings in (GRID, SEQUENCE):
        model = tiny(**settings)
        expected = model.decode(model.encode(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert (model.decode(model.encode(x)).float() - expected).abs().max() < 0.1
        model = model.bfloat16()
        assert model.decode(model.encode(x.bfloat16())).dtype == torch.bfloat16


def test_is_found_by_its_name() -> None:
    for settings in (GRID, SEQUENCE):
        model = tiny(**settings)
        spec = spec_of(model)
        assert spec["name"] == "vit"
        again = build("autoencoders", spec)
        assert isinstance(again, ViT)
        assert spec_of(again) == spec
        again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 10}, r"width must be a multiple of 4 and of num_heads \(2\), got 10"),
        ({"num_heads": 3}, r"width must be a multiple of 4 and of num_heads \(3\), got 16"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_latents": 4}, "num_latents and size_px go together"),
        ({"size_px": 16}, "num_latents and size_px go together"),
        ({"num_latents": 0, "size_px": 16}, "num_latents must be at least 1, got 0"),
        ({"num_latents": 4, "size_px": 18}, r"size_px must be a multiple of patch_px \(4\), got 18"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_bad_inputs() -> None:
    grid, sequence = tiny(), tiny(**SEQUENCE)
    with pytest.raises(ValueError, match="multiples of the patch 4, got 16 x 18"):
        grid.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\], got \[1, 1, 16, 16\]"):
        grid.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="of the size 16 x 16, got 16 x 20"):
        sequence.encode(torch.zeros(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"latent must be \[B, h, w, 6\], got \[1, 5, 6\]"):
        grid.decode(torch.zeros(1, 5, 6))
    with pytest.raises(ValueError, match=r"latent must be \[B, 5, 6\], got \[1, 4, 6\]"):
        sequence.decode(torch.zeros(1, 4, 6))
