"""One training run: its state, its steps, and what it leaves behind."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from logging.handlers import MemoryHandler
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tessella.checkpoint import Model, latest_checkpoint, load_state, save_checkpoint
from tessella.data.base import Batch, Samples, SkipBudget, to_device
from tessella.data.loader import training_batches
from tessella.distributed import (
    Ranks,
    agree,
    all_reduce_sum,
    average_gradients,
    exchange_gradients,
    full,
    is_lost,
    like,
    spread,
    whole,
    world_size,
)
from tessella.errors import ConfigError, EndedElsewhere, Interrupted, NotFiniteError, TrainingError
from tessella.objectives.base import StepOutput
from tessella.text import printable
from tessella.training.base import Step
from tessella.training.logs import RunLog, TrainingProgress, held_back
from tessella.training.optimizers import make_optimizer
from tessella.training.precision import resolve_precision

if TYPE_CHECKING:
    from tessella.training.loop import Loop

logger = logging.getLogger("tessella")

_WATCHED = ("loss/", "grad_norm/")  # numbers that must be finite

Preview = Callable[[Sequence[Tensor], Path], Path]  # rows of signals and a path without ending -> the file


class Run:
    """State of one run."""

    def __init__(
        self, settings: Loop, step: Step, dataset: Samples, folder: Path, device: torch.device,
        show: Preview | None, quiet: bool, ranks: Ranks,
    ) -> None:  # fmt: skip
        share = settings.accumulate * ranks.size
        if settings.batch_size % share:
            raise ConfigError(
                f"training.batch_size ({settings.batch_size}) must be a multiple of training.accumulate x ranks "
                f"({settings.accumulate} x {ranks.size} = {share}): it is the batch of all ranks together"
            )
        self.ranks = ranks
        self.settings = settings
        self.step = step
        self.dataset = dataset
        self.folder = folder
        self.device = device
        self.show = show
        self.quiet = quiet or not ranks.first
        for child in step.trained().values():
            agree(child)
        self.ema = (
            None if settings.ema_decay is None
            else AveragedModel(step.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        )  # fmt: skip
        if ranks.size > 1:
            for model in (step.model,) if self.ema is None else (step.model, self.averaged):
                if parts := step.parts(model):
                    spread(model, parts, ["sample"])
        # Of the parameters as they are now: the ranks' parts, where they are spread.
        self.optimizers = {
            name: make_optimizer(settings, parameters, model=step.model, modules=step.modules())
            for name, parameters in step.parameter_groups().items()
        }
        if settings.compile:
            for network in step.networks():
                network.compile()
        self.position = 0
        self.precision: str | None = None  # decided at the first start
        self.first_bad = torch.zeros((), dtype=torch.long, device=device)  # step of the first number not finite
        self.unread: dict[int, list[str]] = {}  # keys by step, of the steps whose numbers were not looked at yet
        self.seconds = self.units = self.shown_units = 0.0
        self.skips = SkipBudget(settings.max_skip_share)
        if not ranks.first:
            self._reseed()

    def _reseed(self) -> None:
        """Randomness of this rank's own: what the first has, the others must not repeat."""
        numbers = np.random.SeedSequence((self.settings.seed, self.ranks.rank, self.position))
        torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0]))

    def run(self, claim: Callable[[], None]) -> nn.Module:
        """See :meth:`Loop.run`."""
        with _signals() as self.received, held_back(logger) as messages:
            try:
                self._run(claim, messages)
            except RuntimeError as error:
                if not is_lost(error):
                    raise
                # A signal to the whole group can reach another rank first.
                if self.received:
                    raise Interrupted(self.received[0], latest_checkpoint(self.folder)) from error
                raise EndedElsewhere(f"another rank has ended: {error}") from error
        return self.averaged

    def _run(self, claim: Callable[[], None], messages: MemoryHandler) -> None:
        s = self.settings
        self._resume()
        self.precision = self.precision or resolve_precision(s.precision, self.device)
        batches = self._batches()
        first = self.position
        progress = TrainingProgress(s.steps, first, unit=self.step.unit, headline=self.step.headline, quiet=self.quiet)
        # The first step is taken before the folder is touched: what cannot be trained at all leaves nothing there.
        started = time.monotonic() - self.seconds
        row = self._advance(batches, started) if first < s.steps else None

        def take() -> None:
            claim()
            self.folder.mkdir(parents=True, exist_ok=True)

        self.ranks.by_first(take)
        with RunLog(self.folder, first, messages) if self.ranks.first else nullcontext() as self.log, progress:
            while row is not None:
                progress.advance(row, self.units - self.shown_units)
                self.shown_units = self.units
                self._record(row)
                # Signals reach the ranks at different steps; they stop at the same one.
                if number := self.ranks.any(self.received[0] if self.received else 0):
                    raise Interrupted(number, self._checkpoint())
                row = self._advance(batches, started) if self.position < s.steps else None
            newest = self.ranks.by_first(lambda: latest_checkpoint(self.folder))
            if newest != self.folder / "checkpoints" / f"step-{s.steps:08d}":
                self._checkpoint()

    def _batches(self) -> Iterator[Batch]:
        s = self.settings
        batches = training_batches(
            self.dataset,
            batch_size=s.batch_size // s.accumulate,
            seed=s.seed,
            start_batch=0 if s.overfit_batch else self.position * s.accumulate,
            num_workers=0 if s.overfit_batch else s.num_workers,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
        )
        return itertools.cycle([next(batches) for _ in range(s.accumulate)]) if s.overfit_batch else batches

    def _advance(self, batches: Iterator[Batch], started: float) -> dict[str, float]:
        """One more step; its row."""
        try:
            row = self._optimize(batches)
        except RuntimeError as error:
            # A signal to the whole group can reach a worker that has not yet learned to leave it to this process.
            if self.received:
                raise Interrupted(self.received[0], latest_checkpoint(self.folder)) from error
            raise
        self.position += 1
        self.seconds = time.monotonic() - started
        return row

    @property
    def averaged(self) -> nn.Module:
        """The model that is saved and shown."""
        return self.step.model if self.ema is None else self.ema.module

    def _optimize(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step: gradients of every loss over all micro-batches, then every update."""
        s = self.settings
        self.step.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        keys = self.unread[self.position + 1] = []
        for micro in range(s.accumulate):
            exchange_gradients(self.step.model, now=micro + 1 == s.accumulate)
            batch = next(batches)
            keys += batch["key"]
            for key, reason in batch["skipped"]:
                logger.warning("skipped %s: %s", printable(key), reason)
            self.skips.count(batch)
            self.units += self.step.units(batch) * self.ranks.size
            batch = to_device(batch, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                out = self._forward(batch)
            if self._is_logged(self.position + 1):
                out.metrics |= _gradient_norms(out)
            # One pass for all: each loss is a function of its own optimizer's parameters alone.
            (torch.stack(list(out.losses.values())).sum() / s.accumulate).backward()
            out.metrics |= {f"loss/{name}": loss.detach() for name, loss in out.losses.items()}
            for name, value in out.metrics.items():
                sums[name] = sums.get(name, 0) + value.float() / s.accumulate
        for optimizer in self.optimizers.values():
            average_gradients(_parameters(optimizer))
        sums = dict(zip(sums, all_reduce_sum(torch.stack(list(sums.values()))) / self.ranks.size, strict=True))
        for name, optimizer in self.optimizers.items():
            sums[f"grad_norm/{name}"] = full(nn.utils.clip_grad_norm_(_parameters(optimizer), s.clip_norm))
        row = self._read(sums)
        lr = s.learning_rate(self.position)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for module in self.step.modules():
            if callable(hook := getattr(module, "after_step", None)):
                hook()
        if self.ema is not None:
            self.ema.update_parameters(self.step.model)
        row["lr"] = lr
        return row

    def _forward(self, batch: Batch) -> StepOutput:
        try:
            out: StepOutput = self.step(batch)
        except NotFiniteError as error:
            raise self._divergence(str(error), self.position + 1) from error
        return out

    def _read(self, numbers: dict[str, Tensor]) -> dict[str, float]:
        """The step's numbers; none where reading them would make the host wait for the device and nobody asks."""
        position = self.position + 1
        watched = torch.stack([value for name, value in numbers.items() if name.startswith(_WATCHED)])
        bad = (self.first_bad == 0) & ~watched.isfinite().all()
        self.first_bad = torch.where(bad, position, self.first_bad)
        if self.device.type != "cpu" and not self._is_logged(position):
            return {}
        row = dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))
        self._require_finite(row)
        return row

    def _require_finite(self, row: Mapping[str, float]) -> None:
        """See that all numbers since the last look were finite; ``row`` are those of the step under way.

        Raises:
            TrainingError: it says which number was not, at which step, and what is left.
        """
        step = int(self.first_bad)
        if step:
            # All ranks come here together, for what they have read is the same.
            self.unread[step] = [key for keys in self.ranks.gather(self.unread.get(step, [])) for key in keys]
            wrong = next((f"{name} is {value}" for name, value in row.items()
                          if name.startswith(_WATCHED) and not math.isfinite(value)), "")  # fmt: skip
            raise self._divergence(wrong if step == self.position + 1 else "a loss or gradient was not finite", step)
        self.unread.clear()

    def _divergence(self, what: str, step: int) -> TrainingError:
        last = latest_checkpoint(self.folder)
        keys = ", ".join(map(printable, self.unread.get(step, [])))
        return TrainingError(
            f"{what} at step {step}; last good checkpoint: {last or 'none yet'}; samples of the batch: {keys}"
        )

    def _is_logged(self, position: int) -> bool:
        return position % self.settings.log_every == 0 or position in (1, self.settings.steps)

    def _record(self, row: dict[str, float]) -> None:
        s = self.settings
        if self._is_logged(self.position) and self.log is not None:
            rate = {f"{self.step.unit}_per_s": self.units / self.seconds}
            self.log.row({"step": self.position, **row, **rate, "seconds": self.seconds})
        if self.show is not None and (self.position % s.sample_every == 0 or self.position == s.steps):
            self._preview()
        if self.position % s.checkpoint_every == 0:
            self._checkpoint()

    def _preview(self) -> None:
        model = self.averaged
        batch = next(training_batches(self.dataset, batch_size=8, seed=self.settings.seed))
        model.eval()
        rows = self.step.preview(model, to_device(batch, self.device))
        model.train()
        if self.log is not None:
            assert self.show is not None
            file = self.show(rows, self.folder / "samples" / f"step-{self.position:08d}")
            self.log.show("samples", file, self.position)

    def _checkpoint(self) -> Path:
        """Model and state, whole whatever the number of ranks, so that any number of them can go on from it."""
        self._require_finite({})
        own, *others = self.ranks.gather(self._own_state())
        state = {
            "position": self.position,
            "seconds": self.seconds,
            "units": self.units,
            "precision": self.precision,
            "step": {name: whole(child.state_dict()) for name, child in self.step.trained().items()},
            "ema": None if self.ema is None else whole(self.ema.state_dict()),
            "optimizers": {name: whole(optimizer.state_dict()) for name, optimizer in self.optimizers.items()},
            **own,
            "other_ranks": others,
        }
        model, weights = cast(Model, self.averaged), whole(self.averaged.state_dict())
        keep = self.settings.keep_checkpoints
        return self.ranks.by_first(
            lambda: save_checkpoint(self.folder, self.position, model, state, keep=keep, weights=weights)
        )

    def _own_state(self) -> dict[str, Any]:
        """What this rank does not share with the others."""
        return {
            "rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
            "skips": {"num_read": self.skips.num_read, "num_skipped": self.skips.num_skipped},
        }

    def _resume(self) -> None:
        checkpoint = self.ranks.by_first(lambda: latest_checkpoint(self.folder))
        if checkpoint is None:
            return
        state = load_state(checkpoint)
        for name, child in self.step.trained().items():
            _load(child, state["step"][name])
        if self.ema is not None:
            _load(self.ema, state["ema"])
        for name, optimizer in self.optimizers.items():
            parameters, saved = _parameters(optimizer), state["optimizers"][name]
            for number, values in saved["state"].items():
                saved["state"][number] = {key: like(value, parameters[number]) for key, value in values.items()}
            optimizer.load_state_dict(saved)
        self.position = state["position"]
        every = [state, *state.get("other_ranks", [])]
        if self.ranks.rank < len(every):
            own = every[self.ranks.rank]
            torch.set_rng_state(own["rng"])
            if own["cuda_rng"] and self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda_rng"][0], self.device)
            self.skips.num_read = own["skips"]["num_read"]
            self.skips.num_skipped = own["skips"]["num_skipped"]
        else:
            self._reseed()
        self.precision = state.get("precision", self.settings.precision)
        self.seconds = state["seconds"]
        self.units = state.get("units", self.position * self.settings.batch_size)  # version 1 counted samples
        self.shown_units = self.units
        logger.info("continuing from %s", checkpoint)


def _gradient_norms(out: StepOutput) -> dict[str, Tensor]:
    """The norm of each term's gradient at the point where they meet."""
    if out.meeting_point is None:
        return {}
    return {
        f"grad_norm/{name}": _norm(torch.autograd.grad(term, out.meeting_point, retain_graph=True)[0])
        for name, term in out.terms.items()
        if term.requires_grad  # an adversary that has not started says nothing
    }


def _norm(gradient: Tensor) -> Tensor:
    """Of the gradient of the mean over ranks, of which each has its signals' part."""
    if world_size() == 1:
        own: Tensor = gradient.norm()
        return own
    norm: Tensor = all_reduce_sum(gradient.square().sum()).sqrt() / world_size()
    return norm


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Whole tensors into a module, which may be spread over the ranks."""
    own = module.state_dict()
    module.load_state_dict({name: like(value, own[name]) if name in own else value for name, value in state.items()})


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the step under way can end; a second SIGINT acts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
