"""Orders of several codebooks: by hand, and both directions for every size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella.generators.orders import Order, delay, flattened, parallel

every = pytest.mark.parametrize("order", [flattened, delay, parallel])
small = settings(max_examples=40, deadline=None)
sizes = given(positions=st.integers(1, 9), codebooks=st.integers(1, 5))


def numbered(positions: int, codebooks: int) -> torch.Tensor:
    return torch.arange(2 * positions * codebooks).view(2, positions, codebooks)


def test_flattened_by_hand() -> None:
    assert flattened(2, 3).to_steps(numbered(2, 3))[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_parallel_by_hand() -> None:
    assert parallel(2, 3).to_steps(numbered(2, 3))[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_delay_by_hand() -> None:
    """MusicGen's figure: codebook k starts k steps late, and ends as much later."""
    assert delay(3, 2).to_steps(numbered(3, 2), empty=-7)[0].tolist() == [[0, -7], [2, 1], [4, 3], [-7, 5]]
    assert delay(2, 3).to_steps(numbered(2, 3))[0].tolist() == [[0, -1, -1], [3, 1, -1], [-1, 4, 2], [-1, -1, 5]]


@every
@small
@sizes
def test_there_and_back(order: Callable[[int, int], Order], positions: int, codebooks: int) -> None:
    made, indices = order(positions, codebooks), numbered(positions, codebooks)
    steps = made.to_steps(indices)
    assert steps.shape == (2, made.num_steps, made.width)
    assert torch.equal(made.from_steps(steps), indices)
    vectors = made.from_steps(torch.stack([steps, steps + 1], -1))
    assert torch.equal(vectors, torch.stack([indices, indices + 1], -1))


@every
@small
@sizes
def test_every_slot_is_of_its_codebook(order: Callable[[int, int], Order], positions: int, codebooks: int) -> None:
    made = order(positions, codebooks)
    steps = made.to_steps(torch.arange(codebooks).expand(1, positions, -1))[0]
    assert torch.equal(steps[steps >= 0], made.codebooks[steps >= 0])
    assert made.has_empty == bool((steps < 0).any())


@every
@small
@sizes
def test_codebooks_of_a_position_come_in_turn(
    order: Callable[[int, int], Order], positions: int, codebooks: int
) -> None:
    """A finer code sees the coarser ones of its position, unless parallel, and every code the positions before it."""
    made = order(positions, codebooks)
    when = made.from_steps(torch.arange(made.num_steps)[None, :, None].expand(1, -1, made.width))[0]
    assert (when.diff(dim=1) >= (order is not parallel)).all()
    assert (when.diff(dim=0) > 0).all()


@small
@sizes
def test_delay_is_short(positions: int, codebooks: int) -> None:
    assert delay(positions, codebooks).num_steps == positions + codebooks - 1
    assert flattened(positions, codebooks).num_steps == positions * codebooks


def test_one_codebook_has_one_order() -> None:
    assert torch.equal(delay(5, 1).slots, flattened(5, 1).slots)


@pytest.mark.parametrize("slots", [[[0], [0], [1]], [[0], [2], [3], [-1]], [[0], [1], [2]]])
def test_refuses_what_is_no_order(slots: list[list[int]]) -> None:
    codebooks = torch.zeros(len(slots), 1, dtype=torch.int64)
    codebooks[1] = 1
    with pytest.raises(ValueError, match="an order must hold every token exactly once"):
        Order(torch.tensor(slots), codebooks)
