"""SimVQ's codes are projected anew whenever anything that they depend on has changed, however that was done."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessella.quantizers import SimVQ, _remembered
from tessella.quantizers._remembered import Remembered


class Counted:
    """A product that counts how often it is asked for."""

    def __init__(self, *sources: Tensor) -> None:
        self.sources = sources
        self.count = 0
        self.remembered = Remembered()

    def product(self) -> Tensor:
        self.count += 1
        a, b = self.sources
        return a @ b.to(a.dtype)

    def __call__(self) -> Tensor:
        return self.remembered(self.product, self.sources)


def counted() -> Counted:
    return Counted(torch.randn(4, 3), torch.randn(3, 2))


@torch.no_grad()
def test_what_has_not_changed_is_not_computed_again() -> None:
    made = counted()
    assert made() is made()
    assert made.count == 1


def test_nothing_is_remembered_under_gradients() -> None:
    made = Counted(torch.randn(4, 3, requires_grad=True), torch.randn(3, 2))
    made().sum().backward()
    made().sum().backward()
    assert made.count == 2
    assert made.sources[0].grad is not None


@torch.no_grad()
def test_copies_and_pickles_remember_nothing() -> None:
    made = counted()
    made()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.remembered._last is None
        assert torch.equal(other(), made())


@torch.no_grad()
def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_remembered, "_MOST_BYTES", 4 * 17)
    made = counted()  # of 18 numbers
    made(), made()
    assert made.count == 2
    assert made.remembered._last is None


def test_what_an_inference_mode_computed_can_be_met_by_gradients() -> None:
    made = counted()
    with torch.inference_mode():
        made()
    with torch.no_grad():
        codes = made()
    assert made.count == 1
    weight = torch.ones(2, requires_grad=True)
    (codes * weight).sum().backward()
    assert torch.equal(weight.grad, codes.sum(0))


def through_data(model: SimVQ) -> None:
    model.projection.weight.data.mul_(-1)


def through_other_data(model: SimVQ) -> None:
    model.projection.weight.data = -model.projection.weight.data


def through_numpy(model: SimVQ) -> None:
    model.basis.numpy()[:] *= -1


def through_the_parameter(model: SimVQ) -> None:
    with torch.no_grad():
        model.projection.bias.add_(1)


def through_another_parameter(model: SimVQ) -> None:
    model.projection.weight = torch.nn.Parameter(-model.projection.weight.detach())


def through_an_inference_mode(model: SimVQ) -> None:
    with torch.inference_mode():
        model.projection.weight.mul_(-1)


def through_a_state_dict(model: SimVQ) -> None:
    model.load_state_dict(SimVQ(8, 4).state_dict())


def through_an_assigned_state_dict(model: SimVQ) -> None:
    model.load_state_dict(SimVQ(8, 4).state_dict(), assign=True)


def through_fresh_codes(model: SimVQ) -> None:
    model.reset_parameters()


def through_a_training_step(model: SimVQ) -> None:
    model.train()
    model(torch.randn(9, 4)).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.3).step()
    model.eval()


CHANGES = [
    through_data, through_other_data, through_numpy, through_the_parameter, through_another_parameter,
    through_an_inference_mode, through_a_state_dict, through_an_assigned_state_dict, through_fresh_codes,
    through_a_training_step,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_weights_is_seen(change: Callable[[SimVQ], None]) -> None:
    torch.manual_seed(0)
    model, z = SimVQ(8, 4).eval(), torch.randn(50, 4)
    every = torch.arange(8)[:, None]
    with torch.no_grad():
        before = model.indices_to_codes(every)
        assert torch.equal(before, model.codebook)
    change(model)
    with torch.no_grad():
        after = model.indices_to_codes(every)
        assert torch.equal(after, model.codebook)
        assert not torch.equal(after, before)
        out = model(z)
    assert torch.equal(out.indices[:, 0], torch.cdist(z, model.codebook).argmin(1))


@torch.no_grad()
def test_dtypes_and_copies() -> None:
    torch.manual_seed(0)
    model, every = SimVQ(8, 4).eval(), torch.arange(8)[:, None]
    model.indices_to_codes(every)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert model.indices_to_codes(every).dtype == dtype
        assert torch.equal(model.indices_to_codes(every), model.codebook)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False), model.fresh_copy()):
        assert torch.equal(other.indices_to_codes(every), other.codebook)
        other.projection.weight.data.mul_(-1)
        assert torch.equal(other.indices_to_codes(every), other.codebook)
        assert torch.equal(model.indices_to_codes(every), model.codebook)


@torch.no_grad()
def test_codes_that_were_handed_out_may_be_written_to() -> None:
    model = SimVQ(8, 4).eval()
    every = torch.arange(8)[:, None]
    codes = model.indices_to_codes(every)
    kept = codes.clone()
    codes.zero_()
    model.codebook.zero_()
    model(torch.randn(9, 4)).z_q.zero_()
    assert torch.equal(model.indices_to_codes(every), kept)
