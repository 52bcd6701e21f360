"""Masked bits: the loss as a mean over orders, rounds that follow the schedule, digits that depend on each other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessella.generators import masked_bits
from tessella.generators.digits import Digits
from tessella.generators.masked_bits import MaskedBits
from tessella.generators.maskgit import least_confident
from tessella.generators.sampling import generators
from tessella.quantizers import BSQ
from tessella.tokenizer import TokenSpace

from .examples import NONE, SMALL

HEAD = {"dim": 16, "num_layers": 1, "num_heads": 2}


def make(space: TokenSpace, **options: Any) -> MaskedBits:
    torch.manual_seed(0)
    model = MaskedBits(space, **{"conditioner": NONE, "head": HEAD, **SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


THREE = TokenSpace((1,), 3, 2, "f" * 16)


def test_the_loss_is_the_mean_code_length_over_all_orders() -> None:
    model = make(THREE, num_rounds=3)
    digits = torch.tensor([1, 0, 1])
    h = model.hidden_states(digits.view(1, 1, 3), None)[:, 0]
    lengths = []
    for order in itertools.permutations(range(3)):
        masked, length = torch.ones(1, 3, dtype=torch.bool), 0.0
        for place in order:
            log_p = model.head(h, digits[None], masked)[0, place].log_softmax(-1)
            length -= log_p[digits[place]].item()
            masked[0, place] = False
        lengths.append(length)
    losses = torch.stack([model(digits.expand(2000, 1, 3), None).loss for _ in range(4)])
    expected = sum(lengths) / len(lengths) / 3
    assert max(lengths) > min(lengths) + 0.05, "the orders differ"
    assert losses.mean().item() == pytest.approx(expected, abs=0.01)
    metrics = model(digits.expand(2000, 1, 3), None).metrics
    assert metrics["bits_per_token"].item() == pytest.approx(expected / math.log(2), abs=0.02)


def test_probabilities_of_all_codes_sum_to_one() -> None:
    model = make(TokenSpace((2,), 3, 2, "f" * 16))
    every = torch.tensor(list(itertools.product(range(2), repeat=6))).view(64, 2, 3)
    assert (2 ** -model.bits(every, None)).sum().item() == pytest.approx(1, abs=1e-5)


def test_hidden_digits_are_not_seen_and_shown_ones_are() -> None:
    model = make(THREE)
    h, masked = torch.randn(1, 32), torch.tensor([[False, True, True]])
    logits = {bits: model.head(h, torch.tensor([bits]), masked) for bits in itertools.product(range(2), repeat=3)}
    assert torch.equal(logits[0, 0, 0], logits[0, 1, 1])
    assert (logits[0, 0, 0] != logits[1, 0, 0]).all()
    assert (model.head(h + 1, torch.tensor([[0, 0, 0]]), masked) != logits[0, 0, 0]).all()


def test_rounds_follow_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    def noted(confidence: Tensor, masked: Tensor, progress: float) -> Tensor:
        hidden = least_confident(confidence, masked, progress)
        # What stays hidden is less sure than what is shown now.
        now = masked & ~hidden
        assert confidence[hidden].max() <= confidence[now].min()
        shown.append(int((~hidden[0]).sum()))
        return hidden

    monkeypatch.setattr(masked_bits, "least_confident", noted)
    model = make(TokenSpace((2,), 16, 2, "f" * 16), num_rounds=4)
    model.sample(None, rng=0)
    assert shown == [2, 5, 10] * 2  # 16 cos(pi/8) = 14.8, 16 cos(pi/4) = 11.3, 16 cos(3 pi/8) = 6.1 stay hidden
    shown.clear()
    model.sample(None, rng=0, num_rounds=100)
    assert len(shown) == 2 * 15, "no more rounds than digits"


def test_choice_noise_changes_the_order_alone() -> None:
    model = make(TokenSpace((4,), 8, 2, "f" * 16), num_rounds=4)
    sure = model.sample(None, rng=0)
    assert not torch.equal(sure, model.sample(None, rng=0, choice_temperature=50.0))
    one_round = model.sample(None, rng=0, num_rounds=1)
    assert torch.equal(one_round, model.sample(None, rng=0, num_rounds=1, choice_temperature=50.0))


def test_rounds_are_what_lets_digits_depend_on_each_other() -> None:
    # Two bits, each even chance, always equal: no product of two marginals.
    model = MaskedBits(TokenSpace((2,), 2, 2, "f" * 16), conditioner=NONE, head=HEAD, **{**SMALL, "dropout": 0.0})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        bit = torch.randint(2, (64, 2, 1))
        optimizer.zero_grad()
        model(bit.expand(-1, -1, 2), None).loss.backward()
        optimizer.step()
    equal = {
        rounds: (sampled[..., 0] == sampled[..., 1]).float().mean().item()
        for rounds in (1, 2)
        for sampled in [model.sample(None, rng=generators(range(300)), num_rounds=rounds)]
    }
    assert equal[2] > 0.98
    assert 0.4 < equal[1] < 0.6
    assert model.bits(torch.tensor([[[1, 1], [0, 0]]]), None).item() == pytest.approx(2, abs=0.2)


def test_over_the_bits_of_a_binary_quantizer() -> None:
    space = TokenSpace((3,), 1, 64, "f" * 16)
    inner = {"name": "masked_bits", **SMALL, "head": HEAD}
    model = Digits(space, bases=[2] * 6, generator=inner, conditioner=NONE).eval()
    bsq, indices = BSQ(dim=6), torch.arange(60).view(20, 3, 1)
    assert torch.equal(model.to_digits(indices), bsq.indices_to_digits(indices[..., 0]))
    assert bsq.indices_to_codes(model.sample(None, rng=generators(range(5)))).shape == (5, 3, 6)


def test_no_layer_has_the_size_of_the_codebook() -> None:
    with torch.device("meta"):
        model = Digits(
            TokenSpace((16, 16), 1, 2**32, "f" * 16), bases=[2] * 32, conditioner=NONE,
            generator={"name": "masked_bits", **SMALL, "head": HEAD},
        )  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"choice_temperature": -1.0}, "choice_temperature must be >= 0, got -1.0"),
        ({"space": TokenSpace((4,), 1, 8, "f" * 16)}, "needs several codebooks a position, got one; put it inside"),
        ({"head": {**HEAD, "width": 3}}, r"unknown key 'head.width'; accepted: dim, num_layers, num_heads, hidden"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"space": THREE, **options})
    if "num_rounds" in options or "choice_temperature" in options:
        with pytest.raises(ValueError, match=message):
            make(THREE).sample(None, **options)
