"""The processes of one run: who they are, sums and gathered rows over them, and parameters spread over them.

Nothing here does anything on one process. Collective operations must be called by every rank alike; those in quantizers
and losses are reached in training mode only, for evaluation and tokenization give each rank work of its own.
"""

from __future__ import annotations

import datetime
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from tessella.errors import EndedElsewhere, TessellaError
from tessella.processes import end_with_parent

T = TypeVar("T")

# Ranks wait for the slowest one: for as long as a shard's worth of uneven work takes, not for a network's time-out.
_PATIENCE = datetime.timedelta(days=7)

_BUCKET_BYTES = 32 << 20  # of gradients that travel together


class Ranks:
    """The ranks of the environment that torchrun sets, as a context; one rank where there is none.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self._group: Any = None
        self._own = False

    def __enter__(self) -> Ranks:
        """Meet the others."""
        if self.size > 1:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                # torchrun gives each rank a session of its own: killed, it would leave them at work.
                end_with_parent(os.getppid(), signal.SIGTERM)
            self._own = not dist.is_initialized()
            if self._own:
                on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
                # Of this attempt's own: torchrun keeps its store over restarts, and in it the addresses of the dead.
                store, _, _ = next(dist.rendezvous("env://", self.rank, self.size))  # type: ignore[attr-defined]
                store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
                backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
                dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
            # What ranks tell each other of the work itself goes over the hosts, and waits for the slowest.
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Part from them; where this one fails the others learn it from its end, which a farewell would put off."""
        if self._own and kind is None:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this rank plans, writes and shows the progress."""
        return self.rank == 0

    def share(self, numbers: Sequence[int]) -> list[int]:
        """This rank's part."""
        return list(numbers[self.rank :: self.size])

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self._group)
        return values

    def any(self, number: int) -> int:
        """The largest of the ranks' numbers: not 0 where it is not 0 on any of them."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def by_first(self, action: Callable[[], T]) -> T:
        """What the first rank's ``action`` gives, on every rank; the others wait for it and do nothing.

        Raises:
            TessellaError: of the action, on the first rank.
            EndedElsewhere: the same on the others.
        """
        if self.size == 1:
            return action()
        answer: tuple[T | None, str | None] = (None, None)
        failure: TessellaError | None = None
        if self.first:
            try:
                answer = (action(), None)
            except TessellaError as error:
                failure, answer = error, (None, str(error))
        value, said = self.broadcast(answer)
        if failure is not None:
            raise failure
        if said is not None:
            raise EndedElsewhere(said)
        return cast(T, value)


def device_of(device: str, number: int) -> str:
    """The device of the worker ``number`` where ``device`` is one of several of a kind: they take turns."""
    return f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device


def rank() -> int:
    """Of this process; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_lost(error: RuntimeError) -> bool:
    """Whether an exchange failed because another rank is no more."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def replicas(training: bool) -> dist.ProcessGroup | None:
    """The ranks whose parts make one batch, for the ``replicas`` of :mod:`tessella.ops`; None outside training."""
    return dist.group.WORLD if training and world_size() > 1 else None


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks in place and return it; the result is the same to the last bit on each."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The ranks' mean of ``tensor``, whose gradient is the identity.

    So the mean over ranks of the gradients of f(mean_over_ranks(q)) is the gradient of f at the mean of q.
    """
    if world_size() == 1:
        return tensor
    mean = all_reduce_sum(tensor.detach().clone()) / world_size()
    return tensor + (mean - tensor.detach())


def differentiable_mean(tensor: Tensor) -> Tensor:
    """The ranks' mean of ``tensor``, with the gradient of the sum of all ranks' losses.

    As the mean over ranks of gradients asks for it: each rank's part then counts for every rank's loss.
    """
    mean: Tensor = _Sum.apply(tensor) / world_size()  # type: ignore[no-untyped-call]
    return mean


class _Sum(torch.autograd.Function):
    """Over ranks; its own derivative, any number of times."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(gradient.contiguous())  # type: ignore[no-untyped-call]
        return total


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite ``tensor`` with that of rank ``source`` and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """``[sum_r N_r, D]``: the rows ``[N_r, D]`` of every rank in the order of ranks; N may differ between them."""
    if world_size() == 1:
        return rows
    size = torch.tensor([rows.shape[0]], device=rows.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(s) for s in sizes]
    padded = functional.pad(rows, (0, 0, 0, max(lengths) - rows.shape[0])).contiguous()
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each parameter's gradient its mean over all ranks; one that no rank has a gradient for keeps none.

    One exchange for all that a step accumulated, in a few large messages. Parameters that are spread over the ranks
    (:func:`spread`) average theirs in the backward pass itself, and are left alone.
    """
    if world_size() == 1:
        return
    own = [p for p in parameters if not is_spread(p)]
    if not own:
        return
    # Over the hosts, so that none of them waits for its device.
    there = all_reduce_sum(torch.tensor([p.grad is not None for p in own], dtype=torch.int32))
    for parameter, count in zip(own, there.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    waiting = [_Exchange(bucket) for bucket in _buckets([p.grad for p in own if p.grad is not None])]
    for exchange in waiting:
        exchange.finish()


class _Exchange:
    """A bucket of gradients on its way."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self._gradients = gradients
        self._flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._work: Any = dist.all_reduce(self._flat, async_op=True)

    def finish(self) -> None:
        self._work.wait()
        self._flat /= world_size()
        parts = self._flat.split([gradient.numel() for gradient in self._gradients])
        for gradient, part in zip(self._gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, some megabytes together."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size > _BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if bucket:
        yield bucket


@torch.no_grad()
def agree(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of the first: kinds of processors may have drawn or fitted others."""
    for tensor in (*module.parameters(), *module.buffers()):
        broadcast(tensor.data)


def spread(module: nn.Module, parts: Sequence[nn.Module], methods: Sequence[str] = ()) -> None:
    """Divide the parameters of ``module`` over the ranks (FSDP2); each of ``parts`` is gathered while it is at work.

    Every rank must hold the same parameters before; from then on all ranks call the module alike.

    Args:
        module: on its device.
        parts: of it, inner ones first.
        methods: besides ``forward``, those that need its parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(module.parameters()).device.type, (world_size(),))
    for part in (*parts, module):
        fully_shard(part, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(module, method)


def exchange_gradients(module: nn.Module, now: bool) -> None:
    """Whether a module that is spread averages its gradients in the backward passes that follow, or waits."""
    if world_size() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is divided over the ranks."""
    return world_size() > 1 and isinstance(tensor, _dtensor())


def whole(tree: Any) -> Any:
    """The same nested dicts and lists with every divided tensor whole on the CPU of the first rank; None on the others.

    All ranks must ask together.
    """
    if world_size() == 1:
        return tree
    return tree_map_only(_dtensor(), _whole, tree)


def _whole(tensor: Any) -> Tensor | None:
    full: Tensor = tensor.full_tensor()
    return full.cpu() if rank() == 0 else None


def like(value: Any, model: Tensor) -> Any:
    """A whole tensor, the same on every rank, divided as ``model`` is; other values as they are."""
    if not is_spread(model) or not isinstance(value, Tensor) or value.shape != model.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    divided = cast(DTensor, model)
    return distribute_tensor(value.to(divided.device), divided.device_mesh, divided.placements)


def full(tensor: Tensor) -> Tensor:
    """``tensor``, whole on every rank."""
    return cast(Tensor, tensor.full_tensor()) if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor
