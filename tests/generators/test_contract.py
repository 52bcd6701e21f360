"""What every generator must do, whatever its way of generating."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tessella import config
from tessella.generators.base import Generator
from tessella.generators.masked_bits import MaskedBits
from tessella.generators.maskgit import MaskGIT
from tessella.generators.sampling import generators, sample_seed

from .examples import EXAMPLES, NUM_CLASSES, Example, missing_examples

every = pytest.mark.parametrize("example", EXAMPLES, ids=str)
conditional = pytest.mark.parametrize("example", [e for e in EXAMPLES if e.conditional], ids=str)


def indices(example: Example, batch_size: int = 3, seed: int = 0) -> Tensor:
    space = example.space
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(space.codebook_size, (batch_size, *space.grid, space.num_codebooks), generator=rng)


def labels(example: Example, batch_size: int = 3) -> Tensor | None:
    return example.condition(batch_size)


def lively(example: Example) -> Generator:
    """Random weights everywhere, zeros too, so that its distribution is far from uniform."""
    generator = example.make()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return generator.eval()


def test_every_registered_generator_has_an_example() -> None:
    assert not missing_examples(), f"add {missing_examples()} to tests/generators/examples.py"


@every
def test_loss(example: Example) -> None:
    generator = example.make()
    out = generator(indices(example), labels(example))
    assert out.loss.shape == ()
    assert out.loss.dtype == torch.float32
    assert out.loss.requires_grad
    for name, value in out.metrics.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert value.isfinite(), name


@every
def test_first_loss_is_that_of_a_uniform_guess(example: Example) -> None:
    loss = example.make().eval()(indices(example), labels(example)).loss
    assert loss.item() == pytest.approx(example.first_loss, abs=example.tolerance)


@every
def test_every_parameter_gets_a_gradient(example: Example) -> None:
    generator = lively(example).train()
    for seed in range(4):  # dropped conditions and masked tokens differ
        generator(indices(example, 16, seed), labels(example, 16)).loss.backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@every
def test_sample_is_tokens_of_the_space(example: Example) -> None:
    space, generator = example.space, lively(example)
    sampled = generator.sample(labels(example), rng=generators(range(3)))
    assert sampled.shape == (3, *space.grid, space.num_codebooks)
    assert sampled.dtype == torch.int64
    generator.check_indices(sampled)
    assert len(sampled.unique()) > 3


@every
def test_a_sample_depends_on_its_own_rng_and_condition_alone(example: Example) -> None:
    generator, condition = lively(example), labels(example)
    together = generator.sample(condition, rng=generators([5, 6, 7]), guidance=1.5)
    for row, seed in enumerate((5, 6, 7)):
        own = None if condition is None else condition[row : row + 1]
        alone = generator.sample(own, rng=generators([seed]), guidance=1.5)
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together, generator.sample(condition, rng=generators([8, 9, 10]), guidance=1.5))


@every
def test_known_tokens_stay(example: Example) -> None:
    generator, condition, space = lively(example), labels(example), example.space
    drawn = generator.sample(condition, rng=generators(range(3)))
    nothing, other = torch.full_like(drawn, -1), indices(example)
    assert torch.equal(generator.sample(condition, rng=generators(range(3)), known=nothing), drawn)
    assert torch.equal(generator.sample(condition, rng=generators(range(3)), known=other), other)
    hidden = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    filled = generator.sample(condition, rng=generators(range(3)), known=other.masked_fill(hidden, -1), guidance=1.5)
    assert torch.equal(filled[~hidden], other[~hidden])
    assert not torch.equal(filled, other)
    generator.check_indices(filled)
    for wrong, message in (
        (nothing - 1, "at least -1"),
        (nothing[:2], "2"),
        (nothing + 1 + space.codebook_size, "lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.sample(condition, rng=generators(range(3)), known=wrong)


@every
def test_sampling_is_evaluation_whatever_the_mode(example: Example) -> None:
    generator, condition = lively(example), labels(example)
    expected = generator.sample(condition, rng=generators(range(3)))
    generator.train()
    frozen = next(part for part in generator.modules() if isinstance(part, nn.Linear)).eval()
    for _ in range(2):
        sampled = generator.sample(condition, rng=generators(range(3)))
        assert torch.equal(sampled, expected)
    assert not frozen.training
    assert all(part.training for part in generator.modules() if part is not frozen)


@every
def test_randomness_in_every_form(example: Example) -> None:
    generator, condition = lively(example), labels(example)
    own = [sample_seed(7, row) for row in range(3)]
    expected = generator.sample(condition, rng=generators(own))
    count = 1 if condition is None else 3  # a seed does not say how many
    assert torch.equal(generator.sample(condition, rng=7), expected[:count])
    assert torch.equal(generator.sample(condition, rng=tuple(generators(own))), expected)
    one = torch.Generator().manual_seed(3)
    first, second = generator.sample(condition, rng=one), generator.sample(condition, rng=one)
    assert not torch.equal(first, second), "a generator moves on"
    assert torch.equal(generator.sample(condition, rng=torch.Generator().manual_seed(3)), first)
    torch.manual_seed(5)
    third, fourth = generator.sample(condition), generator.sample(condition)
    assert len(third) == count
    assert not torch.equal(third, fourth)
    torch.manual_seed(5)
    assert torch.equal(generator.sample(condition), third)
    with pytest.raises(ValueError, match="a seed must be at least 0, got -1"):
        generator.sample(condition, rng=-1)


@every
def test_every_linear_layer_is_called_as_a_module(example: Example) -> None:
    """Else a hook, an adapter or sharding of parameters would pass it by."""
    generator = lively(example)
    called: set[str] = set()
    layers = {name: layer for name, layer in generator.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    for run in (
        lambda: generator(indices(example), labels(example)),
        lambda: generator.sample(labels(example), rng=generators(range(3))),
        lambda: generator.bits(indices(example), labels(example)),
    ):
        called.clear()
        run()
        assert called == set(layers)


@conditional
def test_training_without_its_condition_is_refused(example: Example) -> None:
    generator = lively(example)
    generator(indices(example), None)  # evaluation may
    with pytest.raises(ValueError, match=r'Label got no condition to train with.*as batch\["label"\]'):
        generator.train()(indices(example), None)


@every
def test_guidance_1_is_none(example: Example) -> None:
    generator, condition = lively(example), labels(example)
    plain = generator.sample(condition, rng=generators(range(3)))
    assert torch.equal(plain, generator.sample(condition, rng=generators(range(3)), guidance=1.0))
    assert torch.equal(plain, generator.sample(condition, rng=generators(range(3)), guidance=lambda progress: 1.0))


@conditional
def test_guidance_and_condition_matter(example: Example) -> None:
    generator, condition = lively(example), torch.full((8,), 1)
    plain = generator.sample(condition, rng=generators(range(8)))
    assert not torch.equal(plain, generator.sample(condition, rng=generators(range(8)), guidance=4.0))
    assert not torch.equal(plain, generator.sample(condition + 1, rng=generators(range(8))))
    unguided = generator.sample(None, rng=generators(range(8)))
    assert not torch.equal(plain, unguided)
    # l_null + 0 (l_cond - l_null) is no condition at all.
    assert torch.equal(unguided, generator.sample(condition, rng=generators(range(8)), guidance=0.0))


@every
def test_temperature_0_needs_no_luck(example: Example) -> None:
    generator, condition = lively(example), labels(example)
    for part in generator.modules():
        if isinstance(part, MaskGIT | MaskedBits):
            part.choice_temperature = 0.0
    first = generator.sample(condition, rng=generators([1, 2, 3]), temperature=0)
    assert torch.equal(first, generator.sample(condition, rng=generators([4, 5, 6]), temperature=0))


@every
def test_code_length(example: Example) -> None:
    generator, x = lively(example), indices(example)
    bits = generator.bits(x, labels(example))
    assert bits.shape == (3,)
    assert bits.dtype == torch.float64
    assert (bits > 0).all()
    one = generator.bits(x[1:2], None if labels(example) is None else labels(example)[1:2])  # type: ignore[index]
    torch.testing.assert_close(one[0], bits[1], rtol=1e-4, atol=0)


@every
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        ({"top_k": 0}, r"top_k must lie in \[1, \d+\]"),
        ({"top_k": 19}, r"top_k must lie in \[1, \d+\]"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\]"),
        ({"guidance": -0.5}, "guidance must be >= 0"),
        ({"guidance": lambda progress: -progress - 1}, "guidance must be >= 0"),
    ],
)
def test_refuses_settings_out_of_range(example: Example, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        example.make().sample(labels(example), rng=generators(range(3)), **settings)  # type: ignore[arg-type]


@every
def test_refuses_tokens_of_another_space(example: Example) -> None:
    generator, x, size = example.make(), indices(example), example.space.codebook_size
    for wrong, message in (
        (torch.cat([x, x[:, :1]], 1), r"indices must be \[B, "),
        (x.float(), "indices must be integers"),
        (x + size, rf"indices must lie in \[0, {size}\), got [1-3]\d .. [2-3]\d"),
        (x - size, rf"indices must lie in \[0, {size}\)"),
    ):
        with pytest.raises(ValueError, match=message):
            generator(wrong, labels(example))


@conditional
def test_refuses_conditions_out_of_range(example: Example) -> None:
    generator, x = example.make(), indices(example)
    for wrong, message in (
        (torch.tensor([0, 1, NUM_CLASSES]), r"labels must lie in \[0, 5\), got 0 .. 5"),
        (torch.tensor([0, -1, 1]), r"labels must lie in \[0, 5\), got -1 .. 1"),
        (torch.tensor([0, 1]), "3 samples but 2 conditions"),
        (torch.zeros(3), r"labels must be integers \[B\]"),
    ):
        with pytest.raises(ValueError, match=message):
            generator(x, wrong)
        with pytest.raises(ValueError, match=message):
            generator.sample(wrong, rng=generators(range(3)))


@every
def test_state_dict_holds_everything(example: Example) -> None:
    generator, condition = lively(example), labels(example)
    other: Generator = config.build("generators", config.spec_of(generator, leave_out=frozenset({"space"})),
                                    space=example.space)  # fmt: skip
    other.load_state_dict(generator.state_dict())
    expected = generator.sample(condition, rng=generators(range(3)), guidance=2.0)
    assert torch.equal(other.sample(condition, rng=generators(range(3)), guidance=2.0), expected)


@every
def test_weights_can_be_averaged(example: Example) -> None:
    generator = example.make()
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(generator)
    averaged.update_parameters(generator)
    torch.testing.assert_close(averaged.module.state_dict(), generator.state_dict())


@every
def test_spec_builds_the_same_again(example: Example) -> None:
    spec = config.spec_of(example.make(), leave_out=frozenset({"space"}))
    assert spec["name"] == example.name
    again = config.build("generators", spec, space=example.space)
    assert config.spec_of(again, leave_out=frozenset({"space"})) == spec


@every
def test_bfloat16_autocast(example: Example) -> None:
    generator = lively(example)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        loss = generator(indices(example), labels(example)).loss
        sampled = generator.sample(labels(example), rng=generators(range(3)), guidance=1.5)
    torch.manual_seed(0)
    reference = generator(indices(example), labels(example)).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=0.05)
    generator.check_indices(sampled)


@every
def test_forward_and_backward_are_one_graph(example: Example) -> None:
    torch._dynamo.reset()
    generator, x, condition = lively(example), indices(example), labels(example)
    compiled = torch.compile(generator, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = [run(x, condition).loss for run in (compiled, generator, generator)]
    losses[0].backward()
    assert losses[0].isfinite()
    if torch.equal(losses[1], losses[2]):  # else its loss is random, of random masks
        torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # from torch's own code
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    example = EXAMPLES[0]
    generator, x, condition = lively(example), indices(example), labels(example)
    compiled = torch.compile(generator, fullgraph=True)
    torch.testing.assert_close(compiled(x, condition).loss, generator(x, condition).loss)
