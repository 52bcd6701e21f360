"""The autoregressive decoder that attends to a picture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessella.config import build
from tessella.errors import ConfigError
from tessella.generators.encoder_decoder import EncoderDecoder
from tessella.generators.sampling import generators
from tessella.tokenizer import TokenSpace

SPACE = TokenSpace((2, 3), 1, 7, "f" * 16)
PICTURE = {"name": "image", "size_px": [8, 8], "patch_px": 4, "num_layers": 1, "num_heads": 2}


def lively(space: TokenSpace = SPACE, **settings: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    options = {"conditioner": PICTURE, "dim": 16, "num_layers": 2, "num_heads": 2, **settings}
    generator: EncoderDecoder = build("generators", {"name": "encoder_decoder", **options}, space=space)
    for parameter in generator.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return generator.eval()


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(7, (count, 2, 3, 1), generator=torch.Generator().manual_seed(seed))


def test_a_token_depends_on_the_picture_and_on_those_before_it_alone() -> None:
    generator, x, picture = lively(), tokens(1), pictures(1)
    logits = generator.logits(x, picture)
    assert logits.shape == (1, 6, 7)
    for n in range(6):
        changed = x.clone().view(1, 6)
        changed[0, n] = (changed[0, n] + 1) % 7
        difference = (generator.logits(changed.view_as(x), picture) - logits).abs().amax(-1)[0]
        assert (difference[: n + 1] == 0).all()
        assert (difference[n + 1 :] > 1e-4).all()
    assert ((generator.logits(x, -picture) - logits).abs().amax(-1) > 1e-4).all()  # the first token too


def test_cached_decoding_equals_recomputing_everything() -> None:
    generator, picture = lively().double(), pictures(3).double()
    greedy = generator.sample(picture, rng=generators(range(3)), temperature=0)
    x = torch.zeros(3, 6, dtype=torch.int64)
    for n in range(6):
        x[:, n] = generator.logits(x.view(3, 2, 3, 1), picture)[:, n].argmax(-1)
    assert torch.equal(greedy.view(3, 6), x)
    assert len(greedy.unique()) > 2
    # and so are the probabilities on the way, with which ``sample`` draws
    uniform = torch.stack([torch.rand(6, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5, 6)])
    drawn = generator.sample(picture, rng=generators([4, 5, 6]))
    cumulative = generator.logits(drawn, picture).softmax(-1).double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform.double()[..., None], right=True)[..., 0]
    assert torch.equal(drawn.view(3, 6), expected)


def test_the_start_token_is_never_drawn() -> None:
    generator, picture = lively(), pictures(2)
    x = tokens(2)
    with torch.no_grad():
        generator.head.weight.zero_()
        generator.head.bias.zero_()
        generator.head.bias[0] = 50.0  # the likeliest token by far
    for temperature in (0.0, 1.0):
        drawn = generator.sample(picture, rng=generators(range(2)), temperature=temperature)
        generator.check_indices(drawn)
        # Without it all codes are alike: the first of equals, or any.
        assert (len(drawn.unique()) == 1) == (temperature == 0)
    # What training pays and what a decoder would need to be told.
    assert generator(x, picture).loss.item() == pytest.approx(50, abs=1e-3)
    assert generator.bits(x, picture).tolist() == pytest.approx([6 * math.log2(7)] * 2)


def test_loss_by_hand() -> None:
    """One token: it sees the start alone, and the loss is its cross-entropy among V + 1."""
    generator = lively(TokenSpace((1,), 1, 3, "f" * 16))
    picture = pictures(1)
    with torch.no_grad():
        generator.head.weight.zero_()
        generator.head.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    total = sum(math.exp(i) for i in range(4))
    for code in range(3):
        loss = generator(torch.tensor([[[code]]]), picture).loss.item()
        assert loss == pytest.approx(-math.log(math.exp(code + 1) / total), abs=1e-5)


def test_guidance_moves_away_from_no_picture() -> None:
    generator, picture = lively(), pictures(8)
    plain = generator.sample(picture, rng=generators(range(8)))
    null = generator.sample(None, rng=generators(range(8)))
    assert not torch.equal(plain, null)
    assert torch.equal(null, generator.sample(picture, rng=generators(range(8)), guidance=0.0))
    assert not torch.equal(plain, generator.sample(picture, rng=generators(range(8)), guidance=4.0))


def test_a_limit_on_codes_holds() -> None:
    generator = lively()
    generator.limit_codes(torch.tensor([2]))
    assert generator.sample(pictures(8), rng=generators(range(8))).max() == 1


def test_learns_to_read_a_picture() -> None:
    """The code says whether the picture is bright: known from the picture, not from other codes."""
    torch.manual_seed(0)
    generator: EncoderDecoder = build(
        "generators", {"name": "encoder_decoder", "conditioner": {**PICTURE, "dropout": 0.0}, "dim": 16,
                       "num_layers": 1, "num_heads": 2}, space=TokenSpace((2, 1), 1, 4, "f" * 16),
    )  # fmt: skip
    bright = torch.arange(16) % 2
    picture = (bright * 2.0 - 1)[:, None, None, None] * pictures(16).abs()
    x = torch.stack([bright, 2 + bright], 1)[..., None, None]
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        generator(x, picture).loss.backward()
        optimizer.step()
    assert torch.equal(generator.sample(picture, rng=generators(range(16)), temperature=0), x)


def test_published_size() -> None:
    space = TokenSpace((16, 16), 1, 4375, "f" * 16)
    picture = {"name": "image", "size_px": [512, 512], "patch_px": 16, "num_layers": 24, "num_heads": 16}
    with torch.device("meta"):
        generator = build(
            "generators", {"name": "encoder_decoder", "conditioner": picture, "dim": 1024, "num_layers": 24,
                           "num_heads": 16}, space=space,
        )  # fmt: skip
    count = sum(p.numel() for p in generator.parameters()) / 1e6
    # 716.3 published; the public decoder has no bias in its attention (7 * 1024 a block), the null vector is ours.
    assert count == pytest.approx(716.3 + 24 * 7 * 1024 / 1e6, abs=0.3)


def test_refuses_several_codebooks_and_pictures_of_another_size() -> None:
    with pytest.raises(ConfigError, match="tokens of one codebook, these are of 2"):
        lively(TokenSpace((2, 3), 2, 7, "f" * 16))
    with pytest.raises(ValueError, match=r"pictures must be \[B, 3, 8, 8\], got \[1, 3, 8, 4\]"):
        lively().sample(pictures(1)[..., :4], rng=generators([0]))
