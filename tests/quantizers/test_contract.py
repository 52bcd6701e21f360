"""What every quantizer must do, whatever its rule."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tessella.quantizers
from tessella import registry
from tessella.quantizers import Quantizer

from .examples import EXAMPLES, cases, label, make, missing_examples

Case = tuple[str, dict[str, Any]]
every = pytest.mark.parametrize("case", cases(), ids=label)


def data(quantizer: Quantizer, *leading: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors at the scale of the codes."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, quantizer.dim, generator=rng, dtype=torch.float64).to(dtype)


_READY: dict[str, Quantizer] = {}


def ready(case: Case, *, training: bool = False) -> Quantizer:
    """A quantizer that has seen a few batches, so that statistics and fitted codes are in place."""
    if label(case) not in _READY:
        torch.manual_seed(0)
        quantizer = make(case)
        for step in range(3):
            quantizer(data(quantizer, 64, seed=100 + step))
            end_of_step(quantizer)
        _READY[label(case)] = quantizer
    return copy.deepcopy(_READY[label(case)]).train(training)


def end_of_step(quantizer: Quantizer) -> None:
    for module in quantizer.modules():
        if hasattr(module, "after_step"):
            module.after_step()


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    return copy.deepcopy(quantizer.state_dict())


def test_every_registered_quantizer_has_an_example() -> None:
    assert not missing_examples(), f"add constructor arguments for {missing_examples()} to tests/quantizers/examples.py"
    assert set(EXAMPLES) == set(registry.names("quantizers"))


def test_the_package_exports_every_registered_quantizer() -> None:
    classes = {cls.__name__ for cls in registry.registered("quantizers").values()}
    assert classes | {"Quantized", "Quantizer"} == set(tessella.quantizers.__all__)


@every
def test_shapes_and_dtypes(case: Case) -> None:
    quantizer = ready(case, training=True)
    z = data(quantizer, 2, 3, 5)
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    assert out.z_q.dtype == z.dtype
    assert out.indices.shape == (2, 3, 5, quantizer.num_codebooks)
    assert out.indices.dtype == torch.int64
    assert out.indices.min() >= 0
    assert out.indices.max() < quantizer.codebook_size
    assert out.loss.shape == ()
    assert out.loss.dtype == torch.float32
    assert {"usage", "perplexity"} <= set(out.metrics)
    for name, value in out.metrics.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert value.isfinite(), name
    assert 0 < out.metrics["usage"] <= 1
    assert 1 <= out.metrics["perplexity"] <= quantizer.codebook_size
    codebook = quantizer.codebook
    composite = quantizer.num_codebooks > 1
    assert codebook.shape[:-1] == ((quantizer.num_codebooks,) if composite else ()) + (quantizer.codebook_size,)


@every
@pytest.mark.parametrize("leading", [(), (7,), (2, 0)])
def test_any_number_of_leading_axes(case: Case, leading: tuple[int, ...]) -> None:
    quantizer = ready(case)
    z = data(quantizer, *leading)
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    assert out.indices.shape == (*leading, quantizer.num_codebooks)


@every
def test_leading_axes_are_only_batch(case: Case) -> None:
    quantizer = ready(case)
    z = data(quantizer, 2, 3, 5)
    whole, flat = quantizer(z), quantizer(z.reshape(30, -1))
    assert torch.equal(whole.indices.flatten(0, 2), flat.indices)
    assert torch.equal(whole.z_q.flatten(0, 2), flat.z_q)
    torch.testing.assert_close(whole.loss, flat.loss)
    permuted = quantizer(z.transpose(0, 2))  # not contiguous
    assert torch.equal(permuted.indices.transpose(0, 2), whole.indices)


@every
def test_tokens_decode_to_what_the_decoder_saw(case: Case) -> None:
    for training in (False, True):
        quantizer = ready(case, training=training)
        if quantizer.is_soft:
            pytest.skip("soft: z_q is not the code of its index")
        out = quantizer(data(quantizer, 50))
        assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)


@every
def test_codes_come_from_the_codebook(case: Case) -> None:
    quantizer = ready(case)
    table = quantizer.codebook
    if quantizer.num_codebooks == 1:
        indices = torch.arange(quantizer.codebook_size)[:, None]
        assert torch.equal(quantizer.indices_to_codes(indices), table)
        assert quantizer.indices_to_codes(indices.int()).dtype == table.dtype
        if case[0] != "ema":  # unused moving averages may still coincide
            assert len(table.unique(dim=0)) == quantizer.codebook_size


@every
def test_evaluation_is_pure(case: Case) -> None:
    quantizer = ready(case)
    before = state(quantizer)
    z = data(quantizer, 40)
    with torch.no_grad():
        first, second = quantizer(z), quantizer(z)
    with torch.enable_grad():
        third = quantizer(z)
    after = quantizer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for other in (second, third):
        assert torch.equal(first.indices, other.indices)
        assert torch.equal(first.z_q, other.z_q)
    assert torch.equal(first.loss, second.loss)
    end_of_step(quantizer)  # nothing was collected, so nothing may change but a count of steps
    assert torch.equal(quantizer.codebook, make_like(quantizer, before).codebook)


def make_like(quantizer: Quantizer, values: dict[str, Tensor]) -> Quantizer:
    other = copy.deepcopy(quantizer)
    other.load_state_dict(values)
    return other


@every
def test_the_decoder_gradient_alone_reaches_z(case: Case) -> None:
    quantizer = ready(case, training=True)
    z = (0.5 * data(quantizer, 40)).requires_grad_()
    out = quantizer(z)
    (out.z_q * data(quantizer, 40, seed=1)).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad != 0).any(-1).float().mean() > 0.5


@every
def test_every_parameter_receives_gradient(case: Case) -> None:
    quantizer = ready(case, training=True)
    z = data(quantizer, 200).requires_grad_()
    out = quantizer(z)
    ((out.z_q * data(quantizer, 200, seed=1)).sum() + out.loss).backward()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


@every
def test_assignment_beats_chance(case: Case) -> None:
    quantizer = ready(case)
    rng = torch.Generator().manual_seed(0)
    chosen, random = torch.randint(quantizer.codebook_size, (2, 200, quantizer.num_codebooks), generator=rng)
    z = quantizer.indices_to_codes(chosen).detach()
    z = z + 0.1 * z.std() * data(quantizer, 200)
    out = quantizer(z)
    if case[0] == "gumbel":  # its logits know nothing of distances before training
        logits = quantizer.get_submodule("projection")(z)
        assert torch.equal(logits.max(-1).values, logits.gather(1, out.indices)[:, 0])
        return
    error, chance = (z - out.z_q).square().mean(), (z - quantizer.indices_to_codes(random)).square().mean()
    assert error < 0.5 * chance


@every
def test_bfloat16_tokens_are_those_of_float32(case: Case) -> None:
    quantizer = ready(case)
    z = data(quantizer, 300).bfloat16()
    low, high = quantizer(z), quantizer(z.float())
    assert low.z_q.dtype == torch.bfloat16
    assert torch.equal(low.indices, high.indices)
    assert torch.equal(low.z_q, high.z_q.bfloat16())
    torch.testing.assert_close(low.loss, high.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(z.float())
        decoded = quantizer.indices_to_codes(high.indices)
    assert torch.equal(cast.indices, high.indices)
    assert torch.equal(cast.z_q, high.z_q)
    assert torch.equal(cast.loss, high.loss), "something was computed in bfloat16"
    assert torch.equal(decoded, quantizer.indices_to_codes(high.indices))


@every
def test_a_half_precision_module_decodes_in_its_own_dtype(case: Case) -> None:
    quantizer = ready(case).bfloat16()
    out = quantizer(data(quantizer, 30, dtype=torch.bfloat16))
    codes = quantizer.indices_to_codes(out.indices)
    assert codes.dtype == out.z_q.dtype == torch.bfloat16
    if not quantizer.is_soft:
        # Sums of stages are rounded once in one direction and at every stage in the other.
        tolerance = {"rtol": 0.02, "atol": 0.02} if quantizer.num_codebooks > 1 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(codes, out.z_q, **tolerance)


@every
def test_float64_is_computed_in_float64(case: Case) -> None:
    quantizer = ready(case).double()
    z = data(quantizer, 60, dtype=torch.float64).requires_grad_()
    out = quantizer(z)
    assert out.z_q.dtype == out.loss.dtype == torch.float64
    if not quantizer.is_soft:
        assert torch.equal(quantizer.indices_to_codes(out.indices), out.z_q)
    # A float32 detour anywhere would round the loss or the gradient to 24 bits.
    shifted = quantizer((z + 1e-10).detach())
    if out.loss.detach().abs() > 1e-6:
        assert shifted.loss != out.loss
        assert (shifted.loss - out.loss).abs() < 1e-6 * (1 + out.loss.abs())


class TestCompile:
    @every
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_one_graph_and_the_same_tokens(self, case: Case, training: bool) -> None:
        self.check(case, "aot_eager", training=training)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # from torch's own code
    @pytest.mark.parametrize(
        "case",
        [("fsq", EXAMPLES["fsq"][0]), ("vq", EXAMPLES["vq"][1]), ("ema", EXAMPLES["ema"][1])],
        ids=label,
    )
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_inductor(self, case: Case, training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Its cache does not notice that the operators inside a graph have changed.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        self.check(case, "inductor", training=training)

    def check(self, case: Case, backend: str, *, training: bool) -> None:
        torch._dynamo.reset()
        eager, other = ready(case, training=training), ready(case, training=training)
        compiled = torch.compile(other, fullgraph=True, dynamic=False, backend=backend)
        z = data(eager, 6, 10)
        mask = torch.arange(60).reshape(6, 10) % 7 != 0
        gradients = []
        for module in (eager, compiled):
            torch.manual_seed(3)
            leaf = z.clone().requires_grad_()
            out = module(leaf, mask)
            ((out.z_q * data(eager, 6, 10, seed=2)).sum() + out.loss).backward()
            end_of_step(other if module is compiled else eager)
            gradients.append((out.indices, out.loss.detach(), leaf.grad))
        assert torch.equal(gradients[0][0], gradients[1][0])
        torch.testing.assert_close(gradients[0][1], gradients[1][1])
        torch.testing.assert_close(gradients[0][2], gradients[1][2], rtol=1e-4, atol=1e-5)
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(other.state_dict()[key], value)

    @every
    def test_decoding(self, case: Case) -> None:
        torch._dynamo.reset()
        quantizer = ready(case)
        indices = torch.randint(quantizer.codebook_size, (5, quantizer.num_codebooks))
        decode = torch.compile(quantizer.indices_to_codes, fullgraph=True, dynamic=False, backend="aot_eager")
        assert torch.equal(decode(indices), quantizer.indices_to_codes(indices))


@every
def test_padding_changes_nothing(case: Case) -> None:
    results = []
    for filler in (0.0, 3.0):
        quantizer = ready(case, training=True)
        z = data(quantizer, 4, 16)
        mask = torch.zeros(4, 16, dtype=torch.bool)
        mask[:, :11] = True
        z = torch.where(mask[..., None], z, filler).requires_grad_()
        torch.manual_seed(1)
        out = quantizer(z, mask)
        out.loss.backward() if out.loss.requires_grad else None
        end_of_step(quantizer)
        gradients = [p.grad for p in quantizer.parameters() if p.grad is not None]
        results.append((out, gradients, state(quantizer)))
        if z.grad is not None:
            assert not z.grad[~mask].any(), "padding moves the encoder"
    (first, first_gradients, first_state), (second, second_gradients, second_state) = results
    torch.testing.assert_close(first.loss, second.loss)
    for name in first.metrics:
        torch.testing.assert_close(first.metrics[name], second.metrics[name], msg=name)
    for a, b in zip(first_gradients, second_gradients, strict=True):
        torch.testing.assert_close(a, b)
    for key in first_state:
        torch.testing.assert_close(first_state[key], second_state[key], msg=key)


@every
def test_a_mask_of_ones_is_no_mask_and_equals_the_shorter_batch(case: Case) -> None:
    if case[0] == "gumbel":
        pytest.skip("training draws noise for every row, so a longer batch has other noise")
    outs, states = [], []
    for variant in ("short", "ones", "padded"):
        quantizer = ready(case, training=True)
        z = data(quantizer, 32)
        mask = None if variant == "short" else torch.ones(32, dtype=torch.bool)
        if variant == "padded":
            z, mask = torch.cat([z, data(quantizer, 9, seed=5)]), torch.arange(41) < 32
        outs.append(quantizer(z, mask))
        end_of_step(quantizer)
        states.append(state(quantizer))
    for out, later in zip(outs[1:], states[1:], strict=True):
        torch.testing.assert_close(out.loss, outs[0].loss)
        for name in out.metrics:
            torch.testing.assert_close(out.metrics[name], outs[0].metrics[name], msg=name)
        for key in later:
            torch.testing.assert_close(later[key], states[0][key], msg=key)


@every
@pytest.mark.parametrize("masked", [False, True])
def test_an_empty_batch_gives_an_empty_result(case: Case, masked: bool) -> None:
    quantizer = ready(case, training=True)
    before = quantizer.codebook.clone()
    z = data(quantizer, 5 if masked else 0).requires_grad_()
    out = quantizer(z, torch.zeros(5, dtype=torch.bool) if masked else None)
    assert out.z_q.shape == z.shape
    assert out.indices.shape == (len(z), quantizer.num_codebooks)
    assert out.loss == 0
    assert all(value.isfinite() for value in out.metrics.values())
    assert out.metrics["usage"] == 0
    assert out.metrics["perplexity"] == 1
    (out.z_q.sum() + out.loss).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    end_of_step(quantizer)
    assert torch.equal(quantizer.codebook, before)


@every
def test_state_dict_round_trip(case: Case) -> None:
    trained = ready(case)
    other = make(case)
    other.load_state_dict(state(trained))
    other.eval()
    z = data(trained, 100)
    assert torch.equal(other(z).indices, trained(z).indices)
    assert torch.equal(other(z).z_q, trained(z).z_q)
    for value in trained.state_dict().values():
        assert isinstance(value, Tensor)


@every
def test_an_averaged_copy_is_whole(case: Case) -> None:
    """Made before the first batch as a training loop does, updated after every step, saved and loaded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, make(case).dim), make(case))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        out = model(torch.randn(64, 5, generator=torch.Generator().manual_seed(step)))
        (out.loss + out.z_q.square().sum()).backward()
        optimizer.step()
        end_of_step(model[1])
        averaged.update_parameters(model)
    z = torch.randn(30, 5, generator=torch.Generator().manual_seed(9))
    expected = averaged.module.eval()(z)
    assert expected.loss.isfinite()
    for path in (averaged, averaged.module):
        torch.manual_seed(1)
        other = nn.Sequential(nn.Linear(5, make(case).dim), make(case))
        wrapped = AveragedModel(other) if path is averaged else other
        wrapped.load_state_dict(path.state_dict())
        other = wrapped.module if path is averaged else wrapped
        found = other.eval()(z)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.z_q, expected.z_q)
        assert torch.equal(found.loss, expected.loss)


@every
def test_a_fresh_copy_has_codes_of_its_own(case: Case) -> None:
    quantizer = ready(case)
    learned = [key for key, value in quantizer.state_dict().items() if value.ndim > 1]
    copied = quantizer.fresh_copy()
    for key in learned:
        assert not torch.equal(copied.state_dict()[key], quantizer.state_dict()[key]), key
    pointers = {tensor.data_ptr() for tensor in quantizer.state_dict().values()}
    assert all(tensor.data_ptr() not in pointers for tensor in copied.state_dict().values())


@every
def test_deepcopy_in_the_middle_of_a_step(case: Case) -> None:
    quantizer = ready(case, training=True)
    quantizer(data(quantizer, 20).requires_grad_())
    twin = copy.deepcopy(quantizer)
    end_of_step(quantizer)
    end_of_step(twin)
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])


@every
def test_bad_input(case: Case) -> None:
    quantizer = ready(case)
    z = data(quantizer, 5)
    with pytest.raises(TypeError, match=r"z must be floating point, got torch\.int64"):
        quantizer(z.long())
    with pytest.raises(ValueError, match=f"last axis of z must be dim = {quantizer.dim}"):
        quantizer(torch.zeros(5, quantizer.dim + 1))
    with pytest.raises(ValueError, match=r"latents are channels-last, \[B, \*S, D\]"):
        quantizer(torch.zeros(2, quantizer.dim, 16, quantizer.dim + 2))
    with pytest.raises(ValueError, match="last axis of z must be dim"):
        quantizer(torch.tensor(1.0))
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = z.clone()
        broken[3, 0] = bad
        with pytest.raises(ValueError, match="z must be finite"):
            quantizer(broken)
    with pytest.raises(TypeError, match="mask must be bool"):
        quantizer(z, torch.ones(5))
    with pytest.raises(ValueError, match="mask must have the shape of z without its last axis"):
        quantizer(z, torch.ones(4, dtype=torch.bool))


@every
def test_bad_indices(case: Case) -> None:
    quantizer = ready(case)
    k, v = quantizer.num_codebooks, quantizer.codebook_size
    for wrong in (v, -1):
        indices = torch.zeros(3, k, dtype=torch.long)
        indices[1, -1] = wrong
        with pytest.raises(ValueError, match=rf"indices must lie in \[0, {v}\)"):
            quantizer.indices_to_codes(indices)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="indices must be integers"):
            quantizer.indices_to_codes(torch.zeros(3, k, dtype=dtype))
    with pytest.raises(ValueError, match=f"last axis of indices must be num_codebooks = {k}"):
        quantizer.indices_to_codes(torch.zeros(3, k + 1, dtype=torch.long))
    assert quantizer.indices_to_codes(torch.zeros(2, 0, k, dtype=torch.long)).shape == (2, 0, quantizer.dim)


SIZED = [name for name, variants in EXAMPLES.items() if "codebook_size" in variants[0]]


@pytest.mark.parametrize("name", SIZED)
def test_bad_sizes(name: str) -> None:
    cls = registry.find("quantizers", name)
    with pytest.raises(ValueError, match="codebook_size must be at least 2, got 1"):
        cls(codebook_size=1, dim=4)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        cls(codebook_size=8, dim=0)


def bad_options() -> list[tuple[str, str, Any]]:
    """Every weight and temperature of every constructor, with values it must refuse."""
    found = []
    for name, cls in registry.registered("quantizers").items():
        for option in inspect.signature(cls).parameters:
            if option.endswith("_weight"):
                found += [(name, option, -0.1), (name, option, float("nan"))]
            if option.endswith("temperature") or option in ("scale", "init_scale", "init_count"):
                found += [(name, option, 0.0), (name, option, -1.0), (name, option, float("inf"))]
            if option in ("metric", "estimator", "codebook_init", "dead_codes", "convention"):
                found.append((name, option, "nonesuch"))
    return found


@pytest.mark.parametrize(("name", "option", "value"), bad_options())
def test_bad_options_are_named(name: str, option: str, value: Any) -> None:
    cls = registry.find("quantizers", name)
    arguments = {key: v for key, v in EXAMPLES[name][0].items() if key != option}
    with pytest.raises(ValueError, match=option):
        cls(**arguments, **{option: value})
