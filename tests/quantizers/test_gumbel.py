from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tessella.quantizers import GumbelVQ
from tessella.quantizers.gumbel import kl_to_uniform


def fixed(temperature: float = 1.0, kl_weight: float = 0.0) -> GumbelVQ:
    """Logits (z, 0), codes -1 and 2."""
    gumbel = GumbelVQ(2, 1, temperature=temperature, kl_weight=kl_weight)
    with torch.no_grad():
        gumbel.projection.weight.copy_(torch.tensor([[1.0], [0.0]]))
        gumbel.projection.bias.zero_()
        gumbel.embedding.copy_(torch.tensor([[-1.0], [2.0]]))
    return gumbel


def test_evaluation_takes_the_largest_logit() -> None:
    gumbel = fixed(temperature=0.5, kl_weight=0.1).eval()
    z = torch.tensor([[0.6], [-0.2]], requires_grad=True)
    out = gumbel(z)
    assert out.indices[:, 0].tolist() == [0, 1]
    assert out.z_q[:, 0].tolist() == [-1, 2]
    p = [1 / (1 + math.exp(-x)) for x in (0.6, -0.2)]
    kl = sum(math.log(2) + x * math.log(x) + (1 - x) * math.log(1 - x) for x in p) / 2
    assert out.loss.item() == pytest.approx(0.1 * kl)
    out.z_q.sum().backward()
    # d/dz of y e_0 + (1 - y) e_1 with y = sigmoid(z / 0.5)
    y = [1 / (1 + math.exp(-x / 0.5)) for x in (0.6, -0.2)]
    assert z.grad is not None
    assert z.grad[:, 0].tolist() == pytest.approx([v * (1 - v) / 0.5 * (-1 - 2) for v in y])
    assert gumbel.embedding.grad is not None
    assert gumbel.embedding.grad[:, 0].tolist() == [1, 1]  # a hard code passes its gradient on whole


def test_training_samples_the_softmax_of_the_logits() -> None:
    # Three codes: with two, noise of the wrong sign would do as well.
    torch.manual_seed(0)
    gumbel = GumbelVQ(3, 1, temperature=0.3)
    logits = torch.tensor([1.0, 0.0, 2.0])
    with torch.no_grad():
        gumbel.projection.weight.copy_(logits[:, None])
        gumbel.projection.bias.zero_()
    indices = gumbel(torch.ones(50_000, 1)).indices[:, 0]
    frequencies = torch.bincount(indices, minlength=3) / len(indices)
    torch.testing.assert_close(frequencies, logits.softmax(0), rtol=0, atol=0.01)


def test_training_draws_from_the_global_generator() -> None:
    gumbel, z = GumbelVQ(16, 4), torch.randn(50, 4)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(gumbel(z).indices)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_kl_to_uniform_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf]]).clamp(min=-1e9)
    assert kl_to_uniform(logits).tolist() == pytest.approx([0, math.log(3)], abs=1e-6)


def test_the_temperature_anneals_and_is_saved() -> None:
    gumbel = GumbelVQ(4, 2, temperature=1.0)
    gumbel.set_temperature(0.25)
    other = GumbelVQ(4, 2)
    other.load_state_dict(gumbel.state_dict())
    assert other.temperature == 0.25
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            gumbel.set_temperature(bad)


def test_annealing_does_not_compile_anew() -> None:
    gumbel = GumbelVQ(8, 2)
    count = CompileCounter()
    compiled = torch.compile(gumbel, fullgraph=True, backend=count)
    for temperature in (1.0, 0.7, 0.5, 0.3):
        gumbel.set_temperature(temperature)
        compiled(torch.randn(5, 2))
    assert count.frame_count == 1
