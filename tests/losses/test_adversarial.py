"""Adversarial losses: every formula by hand, and who receives which gradient."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tessella.config import resolve, spec_of
from tessella.losses.adversarial import (
    Adversary,
    LeCAM,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def pictures(count: int = 2, size: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny(**settings: Any) -> Adversary:
    torch.manual_seed(0)
    return Adversary(discriminator_channels=2, **settings)


class Linear(nn.Module):
    """D(x) = w . x, whose logits and gradients are known."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (x.flatten(1) @ self.w)[:, None]
        return logits


def linear(*weights: float, **settings: Any) -> Adversary:
    adversary = tiny(**settings)
    adversary.discriminator = Linear(*weights)
    return adversary


W = nn.Parameter(torch.ones(1))  # a last layer where none matters
ZERO = torch.zeros(())


# --- the equations --------------------------------------------------------------------------------------------------


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + 1.5 / 2))
    assert hinge_generator_loss(fake).item() == pytest.approx(0.75)


def test_non_saturating_by_hand() -> None:
    # s(ln 3) = 3/4: -log s = ln(4/3) for a real picture, -log(1 - s) = ln 4 for a reconstruction.
    logit = torch.tensor([LN3])
    assert non_saturating_discriminator_loss(logit, logit).item() == pytest.approx(0.5 * (LN4 - LN3 + LN4))
    assert non_saturating_generator_loss(logit[None]).item() == pytest.approx(LN4 - LN3)
    patches = torch.tensor([[[[LN3, -LN3]]]])
    assert non_saturating_generator_loss(patches).item() == pytest.approx((LN4 - LN3 + LN4) / 2)
    assert non_saturating_generator_loss(patches, "mean_logit").item() == pytest.approx(LN2)
    with pytest.raises(ValueError, match="unknown reduction 'mean'; choose one of: mean_loss, mean_logit"):
        non_saturating_generator_loss(patches, "mean")  # type: ignore[arg-type]


@given(st.lists(st.floats(-80, 80), min_size=2, max_size=8))
def test_non_saturating_is_cross_entropy_with_the_right_targets(values: list[float]) -> None:
    real = torch.tensor(values, dtype=torch.float64)[:, None]
    fake = -real.flip(0) / 3 + 1
    bce = functional.binary_cross_entropy_with_logits
    expected = 0.5 * (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake)))
    torch.testing.assert_close(non_saturating_discriminator_loss(real, fake), expected)
    torch.testing.assert_close(non_saturating_generator_loss(fake), bce(fake, torch.ones_like(fake)))
    # With one logit a picture the two reductions are one.
    torch.testing.assert_close(non_saturating_generator_loss(fake, "mean_logit"), non_saturating_generator_loss(fake))


def test_r1_by_hand() -> None:
    x = torch.tensor([[1.0, -1.0], [0.5, 2.0]], requires_grad=True)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    assert r1_penalty((x @ w)[:, None], x).item() == pytest.approx(25)
    # D(x) = |x|^2: gradient 2 x, squared norms 4 |x|^2 = 8 and 17.
    assert r1_penalty(x.square().sum(1, keepdim=True), x).item() == pytest.approx(12.5)
    # Two patches w.x and 3 w.x average to 2 w.x.
    patches = torch.stack([x @ w, 3 * (x @ w)], 1)[:, None, None]
    penalty = r1_penalty(patches, x)
    assert penalty.item() == pytest.approx(100)
    penalty.backward()
    assert w.grad is not None
    assert w.grad.tolist() == pytest.approx([4 * 2 * 3, 4 * 2 * 4])  # of 4 |w|^2


def test_adaptive_weight_by_hand() -> None:
    last_layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction = (last_layer * torch.tensor([3.0, 4.0])).sum()
    adversarial = (last_layer * torch.tensor([0.6, 0.8])).sum()
    weight = adaptive_weight(reconstruction, adversarial, last_layer)
    assert weight.item() == pytest.approx(5 / (1 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(reconstruction, 0 * adversarial, last_layer).item() == 1e4  # 5 / 1e-4 cut off
    assert adaptive_weight(reconstruction, adversarial, last_layer, max=2).item() == 2
    (reconstruction + weight * adversarial).backward()
    assert last_layer.grad is not None
    assert last_layer.grad.tolist() == pytest.approx([3 + 0.6 * 5, 4 + 0.8 * 5], rel=1e-3)


def test_lecam_by_hand() -> None:
    lecam = LeCAM(decay=0.5)
    # Averages 0 -> (0 + 2) / 2 = 1 and (0 - 2) / 2 = -1 before they are used.
    penalty = lecam(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -3.0]))
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (1, -1)
    assert penalty.item() == pytest.approx((2**2 + 4**2) / 2 + (2**2 + 4**2) / 2)
    # -> 0 and -0.5; a real logit below the average of fake ones costs nothing.
    penalty = lecam(torch.tensor([-1.0]), torch.tensor([0.0]))
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (0, -0.5)
    assert penalty.item() == 0
    lecam.eval()
    assert lecam(torch.tensor([1.0]), torch.tensor([-1.0])).item() == pytest.approx(1.5**2 + 1)
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (0, -0.5)


def test_lecam_gradient_is_that_of_fixed_averages() -> None:
    lecam = LeCAM(decay=0.5)
    real, fake = torch.tensor([2.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    lecam(real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad.item(), fake.grad.item()) == (2 * (2 + 1), -2 * (1 + 2))


def _lecam_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))  # fmt: skip
    lecam = LeCAM(decay=0.5)
    lecam(torch.tensor([4.0 * rank]), torch.tensor([-8.0 * rank]))
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (1, -2)  # half of the means 2 and -4 over the ranks
    dist.destroy_process_group()


def test_lecam_averages_over_ranks(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [context.Process(target=_lecam_rank, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


# --- who receives which gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"discriminator": "stylegan", "size_px": 32}])
def test_generator_term_never_reaches_the_discriminator(settings: dict[str, Any]) -> None:
    adversary = tiny(**settings)
    x_hat = pictures(size=32).requires_grad_()
    term, _ = adversary.generator_term(x_hat, ZERO, W)
    term.backward()
    assert x_hat.grad is not None
    assert x_hat.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in adversary.parameters())
    assert all(parameter.requires_grad for parameter in adversary.parameters())


@pytest.mark.parametrize("settings", [{}, {"discriminator": "stylegan", "size_px": 32, "r1_weight": 10.0}])
def test_discriminator_loss_never_reaches_the_pictures(settings: dict[str, Any]) -> None:
    adversary = tiny(lecam_weight=0.1, **settings)
    x, x_hat = pictures(size=32).requires_grad_(), pictures(size=32, seed=1).requires_grad_()
    loss, metrics = adversary.discriminator_loss(x, x_hat)
    loss.backward()
    assert x.grad is None
    assert x_hat.grad is None
    for name, parameter in adversary.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    "settings", [{"adaptive": True}, {"discriminator": "stylegan", "size_px": 32, "r1_weight": 1.0}]
)
def test_one_forward_pass_serves_two_optimizers(settings: dict[str, Any]) -> None:
    """As the training loop does it, in micro-batches: each loss into its own optimizer's parameters."""
    adversary = tiny(**settings)
    generator = nn.Conv2d(3, 3, 1)
    groups = {"tokenizer": list(generator.parameters()), "discriminator": list(adversary.parameters())}
    for seed in range(2):
        x = pictures(size=32, seed=seed)
        x_hat = generator(x)
        reconstruction = (x_hat - x).abs().mean()
        term, _ = adversary.generator_term(x_hat, reconstruction, generator.weight)
        loss, _ = adversary.discriminator_loss(x, x_hat)
        (0.5 * (reconstruction + term)).backward(inputs=groups["tokenizer"], retain_graph=True)
        (0.5 * loss).backward(inputs=groups["discriminator"])
        if seed == 0:
            expected = torch.autograd.grad((generator(x) - x).abs().mean(), generator.weight)[0] * 0.5
            assert generator.weight.grad is not None
            assert not torch.allclose(generator.weight.grad, expected)  # the adversary has its say
    assert all(parameter.grad is not None for group in groups.values() for parameter in group)


def test_batch_normalisation_sees_every_pass_in_training_mode() -> None:
    adversary = tiny()
    tracked = adversary.get_buffer("discriminator.main.3.num_batches_tracked")
    adversary.generator_term(pictures(), ZERO, W)
    assert tracked.item() == 1
    adversary.discriminator_loss(pictures(), pictures(seed=1))
    assert tracked.item() == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own looking
def test_compiled_equals_eager() -> None:
    settings = {"discriminator": "stylegan", "size_px": 16, "adaptive": True, "start_step": 1, "r1_weight": 1.0,
                "r1_every": 2}  # fmt: skip

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adversary = tiny(**settings)
            self.generator = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x_hat = self.generator(x)
            term, _ = self.adversary.generator_term(x_hat, (x_hat - x).abs().mean(), self.generator.weight)
            return term, self.adversary.discriminator_loss(x, x_hat)[0]

    eager, inner = Step(), Step()
    compiled = torch.compile(inner, backend="aot_eager")
    for seed in range(3):
        x = pictures(size=16, seed=seed)
        results = []
        for module, step in ((eager, eager), (inner, compiled)):
            term, loss = step(x)
            loss.backward(inputs=list(module.adversary.parameters()))
            module.adversary.after_step()
            results.append([term, loss])
        torch.testing.assert_close(results[1], results[0])
        for a, b in zip(eager.adversary.parameters(), inner.adversary.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


# --- Adversary --------------------------------------------------------------------------------------------------------


def test_generator_terms_by_hand() -> None:
    x_hat = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # logits 3 and 8 under w = (3, 4)
    for name, expected in {
        "hinge": -5.5,
        "non_saturating": (math.log1p(math.exp(-3)) + math.log1p(math.exp(-8))) / 2,
    }.items():
        term, metrics = linear(3, 4, generator_loss=name, weight=0.5).generator_term(x_hat, ZERO, W)
        assert term.item() == pytest.approx(0.5 * expected)
        assert metrics["adversarial"].item() == pytest.approx(expected)
        assert metrics["adversarial_weight"].item() == 0.5
    adversary = tiny(generator_loss="non_saturating_mean_logit", weight=1.0)
    adversary.discriminator = nn.Identity()
    patches = torch.tensor([[[[LN3, -LN3]]]])
    assert adversary.generator_term(patches, ZERO, W)[0].item() == pytest.approx(LN2)


def test_adaptive_weight_multiplies() -> None:
    last_layer = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    x_hat = 1.0 * last_layer
    reconstruction = (last_layer * torch.tensor([6.0, 8.0])).sum()  # gradient's norm 10; the adversary's is 5
    term, metrics = linear(3, 4, weight=0.25, adaptive=True).generator_term(x_hat, reconstruction, last_layer)
    assert metrics["adversarial_weight"].item() == pytest.approx(0.25 * 2, rel=1e-4)
    assert term.item() == pytest.approx(0.5 * -3, rel=1e-4)


def test_discriminator_losses_by_hand() -> None:
    x, x_hat = torch.tensor([[0.2, 0.0], [0.0, 0.1]]), torch.tensor([[0.0, -0.1], [0.1, 0.0]])
    # Under w = (3, 4): D(x) = 0.6 and 0.4, D(x_hat) = -0.4 and 0.3.
    hinge = 0.5 * ((0.4 + 0.6) / 2 + (0.6 + 1.3) / 2)
    loss, metrics = linear(3, 4).discriminator_loss(x, x_hat)
    assert loss.item() == pytest.approx(hinge)
    assert {name: round(value.item(), 6) for name, value in metrics.items()} == {
        "logits_real": 0.5, "logits_fake": -0.05, "lecam": 0, "r1": 0,
    }  # fmt: skip
    adversary = linear(3, 4, loss="non_saturating")
    expected = non_saturating_discriminator_loss(torch.tensor([0.6, 0.4]), torch.tensor([-0.4, 0.3]))
    assert adversary.discriminator_loss(x, x_hat)[0].item() == pytest.approx(expected.item())
    # LeCAM: averages 0.001 * 0.5 and 0.001 * -0.05 after one batch.
    lecam = ((0.6 + 5e-5) ** 2 + (0.4 + 5e-5) ** 2) / 2 + (0.4 + 5e-4) ** 2 / 2
    loss, metrics = linear(3, 4, lecam_weight=0.1).discriminator_loss(x, x_hat)
    assert metrics["lecam"].item() == pytest.approx(lecam)
    assert loss.item() == pytest.approx(hinge + 0.1 * lecam)


def test_r1_every_other_step_at_twice_the_weight() -> None:
    x = torch.zeros(2, 2)  # all logits 0: a hinge loss of 1
    adversary = linear(3, 4, r1_weight=0.1, r1_every=2)
    losses, penalties = [], []
    for _ in range(4):
        loss, metrics = adversary.discriminator_loss(x, x)
        losses.append(loss.item())
        penalties.append(metrics["r1"].item())
        adversary.after_step()
    assert losses == pytest.approx([1 + 0.5 * 0.1 * 2 * 25, 1, 1 + 0.5 * 0.1 * 2 * 25, 1])
    assert penalties == pytest.approx([25, 0, 25, 0])
    loss, _ = linear(3, 4, r1_weight=10.0).discriminator_loss(x, x)
    assert loss.item() == pytest.approx(1 + 0.5 * 10 * 25)
    loss.backward()


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [0.8, 0.8, 0.8]),
        ({"start_step": 2}, [0, 0, 0.8, 0.8]),
        ({"start_step": 2, "warmup_steps": 4}, [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8]),
    ],
)
def test_start_and_warmup(settings: dict[str, int], weights: list[float]) -> None:
    adversary = linear(3, 4, weight=0.8, **settings)
    x_hat = torch.tensor([[1.0, 0.0]], requires_grad=True)  # logit 3
    seen, terms = [], []
    for _ in weights:
        seen.append(adversary.weight_now().item())
        terms.append(adversary.generator_term(x_hat, ZERO, W)[0].item())
        adversary.after_step()
    assert seen == pytest.approx(weights)
    assert terms == pytest.approx([-3 * weight for weight in weights])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_before_the_start_the_discriminator_stays_as_it_is(optimizer: type[torch.optim.Optimizer]) -> None:
    adversary = tiny(start_step=1, lecam_weight=0.1)
    parameters = list(adversary.parameters())
    trainer = optimizer(parameters, lr=0.1)  # type: ignore[call-arg]
    before = {name: value.clone() for name, value in adversary.state_dict().items()}
    loss, metrics = adversary.discriminator_loss(pictures(), pictures(seed=1))
    assert loss.item() == 0
    assert [value.item() for value in metrics.values()] == [0, 0, 0, 0]
    (loss / 2).backward(inputs=parameters, retain_graph=True)
    trainer.step()
    torch.testing.assert_close(adversary.state_dict(), before, rtol=0, atol=0)
    adversary.after_step()
    loss, later = adversary.discriminator_loss(pictures(), pictures(seed=1))
    assert loss.item() > 0
    assert later.keys() == metrics.keys()
    loss.backward(inputs=parameters)
    trainer.step()
    assert not torch.equal(parameters[0], before["discriminator.main.0.weight"])


def test_state_dict_carries_everything_that_continuing_needs() -> None:
    settings: dict[str, Any] = {"lecam_weight": 1.0, "start_step": 1, "warmup_steps": 5, "r1_every": 2}
    adversary, other = tiny(**settings), Adversary(discriminator_channels=2, **settings)
    for seed in range(3):
        adversary.discriminator_loss(pictures(seed=seed), pictures(seed=seed + 10))
        adversary.after_step()
    state = adversary.state_dict()
    assert {"num_steps", "lecam.ema_real", "lecam.ema_fake"} < state.keys()
    assert state["num_steps"].dtype == torch.int64
    other.load_state_dict(state)
    assert other.weight_now().item() == adversary.weight_now().item() == pytest.approx(0.1 * 3 / 5)
    x, x_hat = pictures(seed=5), pictures(seed=6)
    assert other.discriminator_loss(x, x_hat)[0].item() == adversary.discriminator_loss(x, x_hat)[0].item()
    assert "lecam.ema_real" not in tiny().state_dict()


def test_losses_are_full_precision_under_autocast() -> None:
    adversary = tiny(adaptive=True, lecam_weight=0.1)
    decoder = nn.Conv2d(3, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        x_hat = decoder(pictures())
        term, _ = adversary.generator_term(x_hat, x_hat.float().square().mean(), decoder.weight)
        loss, metrics = adversary.discriminator_loss(pictures(), x_hat)
    assert x_hat.dtype == torch.bfloat16
    assert {value.dtype for value in (term, loss, *metrics.values())} == {torch.float32}


@pytest.mark.parametrize(
    "settings",
    [
        {"discriminator_channels": 8},
        {"discriminator": "stylegan", "size_px": 32, "discriminator_channels": 8, "loss": "non_saturating",
         "r1_weight": 0.1},
    ],
)  # fmt: skip
def test_learns_to_tell_two_distributions_apart(settings: dict[str, Any]) -> None:
    """Two constants, one a channel up and one a channel down, behind the same noise."""
    torch.manual_seed(0)
    adversary = Adversary(**settings)
    optimizer = torch.optim.Adam(adversary.parameters(), lr=2e-3, betas=(0.5, 0.9))
    tint = torch.tensor([0.4, 0.0, -0.4])[:, None, None]
    gaps = []
    for step in range(25):
        loss, metrics = adversary.discriminator_loss(
            0.3 * pictures(8, 32, 2 * step) + tint, 0.3 * pictures(8, 32, 2 * step + 1) - tint
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append((metrics["logits_real"] - metrics["logits_fake"]).item())
    assert abs(gaps[0]) < 0.5
    assert gaps[-1] > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"r1_every": 0}, "r1_every must be at least 1, got 0"),
        ({"weight": -0.1}, "weight must be at least 0 and finite, got -0.1"),
        ({"lecam_weight": math.nan}, "lecam_weight must be at least 0 and finite, got nan"),
        ({"r1_weight": -1.0}, "r1_weight must be at least 0"),
        ({"discriminator": "biggan"}, "unknown discriminator 'biggan'; choose one of: patchgan, stylegan"),
        ({"loss": "wasserstein"}, "unknown loss 'wasserstein'; choose one of: hinge, non_saturating"),
        ({"generator_loss": "vanilla"}, "unknown generator_loss 'vanilla'; choose one of: hinge, non_saturating, "),
        ({"size_px": 32}, "size_px is for discriminator 'stylegan'"),
        ({"discriminator": "stylegan"}, "discriminator 'stylegan' needs size_px"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adversary(**settings)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        LeCAM(1)


def test_settings_are_a_recipe_section() -> None:
    spec = spec_of(tiny(start_step=3))
    assert (spec["start_step"], spec["discriminator_channels"]) == (3, 2)
    resolved = resolve(Adversary, spec, where="adversary")
    assert spec_of(Adversary(**resolved)) == spec
