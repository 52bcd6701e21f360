"""A tensor that is computed of others only when these have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of the copies that are kept for the comparison; beyond it nothing is remembered.
_MOST_BYTES = 2**28


class Remembered:
    """The last result of a function of tensors, and copies of these.

    They are compared by value. Version counters miss what is written through ``.data`` or through memory shared with
    numpy, and the tensors of an inference mode have none; reading a tensor once costs a small part of a product with
    it. On an accelerator the comparison would wait for the device and the product is cheap: there, under gradients,
    and in a graph that is being recorded, everything is computed anew. A copy or a pickle remembers nothing.
    """

    def __init__(self) -> None:
        self._last: tuple[list[Tensor], Tensor] | None = None  # replaced as one, so that threads may share it

    def __call__(self, compute: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
        """``compute()``, a function of ``sources`` alone. Not to be written to."""
        if not _worth_it(sources):
            self._last = None
            return compute()
        last = self._last
        if last is not None and all(map(_alike, sources, last[0])):
            return last[1]
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be met by gradients later
            self._last = [source.clone() for source in sources], compute()
            return self._last[1]

    def __deepcopy__(self, memo: object) -> Remembered:
        """One that remembers nothing."""
        return Remembered()

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        """See :meth:`__deepcopy__`."""
        return Remembered, ()


def _worth_it(sources: Sequence[Tensor]) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    # Of subclasses (fake, sharded, quantized tensors) nobody knows what a comparison costs.
    plain = all(type(source) in (Tensor, torch.nn.Parameter) and source.device.type == "cpu" for source in sources)
    return plain and sum(source.nbytes for source in sources) <= _MOST_BYTES


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
