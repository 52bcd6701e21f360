from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tessella.conditioners.label import Label
from tessella.generators.coarse_to_fine import CoarseToFine
from tessella.ops.ranges import check_range
from tessella.tokenizer import TokenSpace


class Elsewhere(Tensor):
    """A tensor of a device that one waits for: whoever looks at it is told so."""

    device = torch.device("cuda")  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise AssertionError("waited for the device")


@pytest.fixture
def asserted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """What the device was asked to check."""
    found: list[tuple[bool, str]] = []

    def record(condition: Tensor, message: str) -> None:
        found.append((Tensor.item(condition.as_subclass(Tensor)) != 0, message))  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_assert_async", record)
    return found


def test_on_a_cpu_what_is_outside_is_named() -> None:
    check_range(torch.tensor([[0, 4]]), 5, "labels")
    check_range(torch.tensor([], dtype=torch.long), 5, "labels")
    for wrong, found in (([0, 5], "0 .. 5"), ([-1, 4], "-1 .. 4")):
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 5\), got {found}: why"):
            check_range(torch.tensor(wrong), 5, "labels", ": why")


def test_a_training_step_does_not_wait_for_the_device(asserted: list[tuple[bool, str]]) -> None:
    check_range(torch.tensor([0, 4]).as_subclass(Elsewhere), 5, "labels", ": why")
    check_range(torch.tensor([0, 5]).as_subclass(Elsewhere), 5, "labels")
    assert asserted == [(True, "labels must lie in [0, 5): why"), (False, "labels must lie in [0, 5)")]
    Label(5, 8).embed(torch.tensor([0, 4]).as_subclass(Elsewhere))
    assert len(asserted) == 3


def test_without_gradients_the_answer_is_waited_for() -> None:
    with torch.no_grad(), pytest.raises(AssertionError, match="waited for the device"):
        check_range(torch.tensor([0, 4]).as_subclass(Elsewhere), 5, "labels")


def coarse_to_fine() -> CoarseToFine:
    small: dict[str, Any] = {"dim": 16, "num_layers": 1, "num_heads": 2}
    return CoarseToFine(
        TokenSpace((4,), 1, 12, ""), num_clusters=3, coarse={"name": "ar", **small}, fine=small,
        conditioner={"name": "none"},
    )  # fmt: skip


def test_whether_codes_are_clustered_is_read_once() -> None:
    torch.manual_seed(0)
    model, indices = coarse_to_fine(), torch.randint(12, (2, 4, 1))
    with pytest.raises(RuntimeError, match="the codes are not clustered"):
        model(indices, None)
    model.fit_codebook(torch.randn(12, 3), seed=0)
    model(indices, None)
    fitted = model.fitted
    model.fitted = fitted.as_subclass(Elsewhere)
    model(indices, None)
    model.fitted = fitted
    model.load_state_dict(coarse_to_fine().state_dict())
    with pytest.raises(RuntimeError, match="the codes are not clustered"):
        model(indices, None)
