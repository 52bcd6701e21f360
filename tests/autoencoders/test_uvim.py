"""UViM's autoencoder: label planes and a picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.autoencoders.uvim import UViM
from tessella.config import build, spec_of


def tiny(planes: tuple[int, ...] = (5, 3), **settings: Any) -> UViM:
    torch.manual_seed(0)
    options = {"size_px": 16, "patch_px": 4, "code_grid": 2, "width": 16, "encoder_depth": 1, "decoder_depth": 1,
               "num_heads": 2, **settings}  # fmt: skip
    return UViM(planes=planes, **options)


def label_and_picture(planes: tuple[int, ...] = (5, 3), batch_size: int = 2) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = [torch.randint(n, (batch_size, 16, 16), generator=rng) if n > 1 else
         torch.rand(batch_size, 16, 16, generator=rng) * 2 - 1 for n in planes]  # fmt: skip
    return torch.stack([plane.float() for plane in x], 1), torch.rand(batch_size, 3, 16, 16, generator=rng) * 2 - 1


def lively(model: UViM) -> UViM:
    """With heads that say something."""
    nn.init.normal_(model.heads.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize("planes", [(5, 3), (8,), (1, 1, 1)])
def test_shapes_and_first_output(planes: tuple[int, ...]) -> None:
    model = tiny(planes)
    x, picture = label_and_picture(planes)
    latent = model.encode(x, picture)
    assert latent.shape == (2, 2, 2, 16)
    assert latent.std() > 0.1
    assert model.latent_grid(16, 16) == (2, 2)
    x_hat = model.decode(latent, picture)
    assert x_hat.shape == (2, sum(planes), 16, 16)
    assert (x_hat == 0).all()  # zero-initialised heads: every class equally likely, or grey


def test_patch_embedding_is_a_linear_layer_of_one_hot_patches() -> None:
    model = tiny().double()
    x, _ = label_and_picture()
    x = x.double()
    x[:, 1, :4, :4] = -1
    x[0, 0, 0, 0] += 0.75  # between two integers: still the lower
    x[1, 0, 0, 0] = 17  # beyond the last class: counts as the last
    one_hot = []
    for plane, size in zip(x.unbind(1), (5, 3), strict=True):
        classes = plane.floor().long().clamp(max=size - 1)
        one_hot.append(functional.one_hot(classes + 1, size + 1)[..., 1:].movedim(-1, 1).double())
    weight = model.plane_in.unflatten(0, (8, 4, 4)).movedim(-1, 0)
    expected = functional.conv2d(torch.cat(one_hot, 1), weight, stride=4).flatten(2).mT
    torch.testing.assert_close(model._embed_planes(x), expected)


def test_values_are_embedded_by_the_same_layer() -> None:
    model = tiny((1, 1, 1)).double()
    x, _ = label_and_picture((1, 1, 1))
    expected = functional.conv2d(x.double(), model.plane_in.unflatten(0, (3, 4, 4)).movedim(-1, 0), stride=4)
    torch.testing.assert_close(model._embed_planes(x.double()), expected.flatten(2).mT)


@pytest.mark.parametrize("settings", [{}, {"encoder_context": False}, {"decoder_context": False}])
def test_context_is_seen_where_it_should_be(settings: dict[str, bool]) -> None:
    model = lively(tiny(**settings))
    x, picture = label_and_picture()
    latent = model.encode(x, picture)
    assert torch.equal(latent, model.encode(x, -picture)) == (settings.get("encoder_context") is False)
    x_hat = model.decode(latent, picture)
    assert torch.equal(x_hat, model.decode(latent, -picture)) == (settings.get("decoder_context") is False)


def test_without_context_needs_none() -> None:
    model = lively(tiny(encoder_context=False, decoder_context=False))
    x, picture = label_and_picture()
    latent = model.encode(x)
    assert torch.equal(latent, model.encode(x, picture))
    assert torch.equal(model.decode(latent), model.decode(latent, picture))


def test_code_dropout_counts_are_uniform_and_subsets_fair() -> None:
    model = tiny(code_grid=3).train()
    dropped = (model.code_dropout(torch.ones(20_000, 3, 3, 2)) == 0).flatten(1, 2)
    assert torch.equal(dropped[..., 0], dropped[..., 1])  # whole vectors
    dropped = dropped[..., 0]
    counts = dropped.sum(1).bincount(minlength=10).double()
    # Chi squared of 9 degrees of freedom exceeds 27.9 once in a thousand.
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9
    assert len(counts) == 10
    # Given k, every place is dropped with probability k / 9.
    for k in (1, 4, 8):
        share = dropped[dropped.sum(1) == k].double().mean(0)
        assert (share - k / 9).abs().max() < 5 * (k / 9 * (1 - k / 9) / counts[k]) ** 0.5


def test_code_dropout_scales_nothing_and_is_for_training() -> None:
    model = tiny(code_grid=3).train()
    z_q = torch.randn(50, 3, 3, 4)
    out = model.code_dropout(z_q)
    kept = (out != 0).all(-1)
    assert torch.equal(out[kept], z_q[kept])
    assert (out[~kept] == 0).all()
    assert torch.equal(model.eval().code_dropout(z_q), z_q)
    assert torch.equal(tiny(drop_codes=False).train().code_dropout(z_q), z_q)


def test_every_weight_learns_and_the_label_passes_through_the_code() -> None:
    model = lively(tiny()).train()
    x, picture = label_and_picture()
    x_hat = model.decode(model.encode(x, picture), picture)
    x_hat.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    other = model.decode(model.encode(x.flip(0), picture), picture)
    assert (other - x_hat).abs().max() > 1e-4


def test_resizing_to_fewer_codes_is_antialiased() -> None:
    """A pattern finer than the code grid averages out instead of being sampled."""
    from tessella.autoencoders.uvim import _resized

    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    small = _resized(checks[None, :, :, None], 2)
    assert small.abs().max() < 0.1
    torch.testing.assert_close(_resized(torch.full((1, 2, 2, 3), 0.7), 4), torch.full((1, 4, 4, 3), 0.7))


def test_stays_in_half_precision_and_runs_under_autocast() -> None:
    model = lively(tiny())
    x, picture = label_and_picture()
    expected = model.decode(model.encode(x, picture), picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.decode(model.encode(x, picture), picture).float() - expected).abs().max() < 0.1
    model = model.bfloat16()
    assert model.decode(model.encode(x, picture.bfloat16()), picture.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
def test_is_one_graph() -> None:
    torch._dynamo.reset()
    model = lively(tiny())
    x, picture = label_and_picture()

    def run() -> Tensor:
        return model.decode(model.encode(x, picture), picture)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), run())


def test_is_found_by_its_name() -> None:
    model = tiny()
    again = build("autoencoders", spec_of(model))
    assert isinstance(again, UViM)
    again.load_state_dict(model.state_dict())


def test_published_size() -> None:
    """Layers of the depth oracle: the two stacks of ViT-B blocks, and two million weights in each context patch."""
    with torch.device("meta"):
        model = UViM(planes=[256])
    block = 12 * 768**2 + 13 * 768
    stacks = 18 * block + 2 * 2 * 768
    planes = 2 * 256 * 256 * 768 + 768 + 256 * 256
    context = 2 * (3 * 256 * 768 + 768)
    assert sum(p.numel() for p in model.parameters()) == stacks + planes + context + 2 * 1024 * 768


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"planes": ()}, "planes must be at least 1, got 0"),
        ({"patch_px": 5}, "size_px must be a multiple of patch_px and width of num_heads, got 16, 5 and 16, 2"),
        ({"code_grid": 0}, "code_grid must be at least 1, got 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_bad_inputs() -> None:
    model = tiny()
    x, picture = label_and_picture()
    with pytest.raises(ValueError, match=r"x must be \[B, 2, 16, 16\], got \[2, 1, 16, 16\]"):
        model.encode(x[:, :1], picture)
    with pytest.raises(ValueError, match=r"of the label's size; got \[2, 3, 12, 16\]"):
        model.encode(x, picture[:, :, :12])
    with pytest.raises(ValueError, match="of the label's size; got None"):
        model.encode(x)
    with pytest.raises(ValueError, match=r"latent must be \[B, 2, 2, 16\], got \[1, 3, 2, 16\]"):
        model.decode(torch.zeros(1, 3, 2, 16), picture)
