"""How much memory a tokenizer needs beside its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessella.tokenizer import Tokenizer


def peak_bytes(tokenizer: Tokenizer, x: Tensor, context: Tensor | None = None) -> int:
    """The most that tensors take while ``x [B, C, *X]`` is encoded and decoded, beside what was there before.

    On an accelerator as its allocator counts it; on the CPU summed after every operation, so without what an operation
    uses inside.
    """
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        tokenizer.decode(tokenizer.encode(x, context, pad=True), context)
        return int(torch.cuda.max_memory_allocated(x.device) - before)
    known = {tensor.untyped_storage()._cdata for tensor in (*tokenizer.state_dict().values(), x)}
    with _Watch(known) as watch:
        tokenizer.decode(tokenizer.encode(x, context, pad=True), context)
    return int(watch.most)


class _Watch(TorchDispatchMode):
    """Keeps the largest sum of the bytes of all tensors that were alive after an operation, ``known`` ones aside."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.most: int = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out
