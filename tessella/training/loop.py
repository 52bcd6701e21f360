"""The only training loop: any step object, exact resuming, and an end that is always a good checkpoint."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tessella.checkpoint import (
    WEIGHTS,
    Model,
    latest_checkpoint,
    load_state,
    load_weights,
    model_folder,
    save_checkpoint,
)
from tessella.data.base import Batch, Samples, SkipBudget, training_batches
from tessella.quantizers.base import Quantizer
from tessella.training.base import Step, StepOutput
from tessella.training.logs import RunLog, TrainingProgress

logger = logging.getLogger("tessella")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is left."""


class Interrupted(Exception):
    """A signal ended the run early, after a checkpoint was written."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(signal_number, checkpoint)  # both, so that it survives the way between processes
        self.signal_number = signal_number
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        """The signal, and where to continue."""
        return f"interrupted by {signal.Signals(self.signal_number).name}; saved {self.checkpoint}"


class Loop:
    """Settings of a training run; :meth:`run` does it.

    Args:
        steps: optimizer steps.
        batch_size: pictures per optimizer step.
        accumulate: micro-batches a step is split into (gradients are averaged).
        optimizer: ``adam`` or ``adamw``.
        lr: peak learning rate.
        betas: of Adam.
        weight_decay: of AdamW (decoupled); on matrices and convolutions, never on biases, norms or codebooks.
        warmup_steps: linear warm-up from 0.
        hold: share of the steps after the warm-up during which the rate stays at its peak.
        decay: schedule after that: ``constant``, ``cosine`` or ``linear`` down to ``final_lr`` (a fraction of ``lr``).
        final_lr: fraction of ``lr`` at the end.
        milestones: steps after each of which the rate is multiplied by 0.1.
        clip_norm: largest norm of an optimizer's gradient; ``inf`` for no clipping.
        ema_decay: of the averaged weights, which are what is saved and evaluated; None for none.
        precision: ``fp32`` or ``bf16`` (autocast).
        compile: run the step's networks through ``torch.compile``.
        init: run or saved model whose weights the training starts from; None starts from random ones.
        overfit_batch: train on the first batch alone, again and again: a recipe that cannot learn it by heart is wrong.
        log_every, sample_every, checkpoint_every: in steps.
        keep_checkpoints: how many of the newest stay.
        num_workers: processes that decode pictures; 0 decodes in this one.
        max_skip_share: share of unreadable pictures above which the run fails.
        seed: of weights, data order, crops and everything random.
    """

    def __init__(
        self,
        *,
        steps: int = 10_000,
        batch_size: int = 64,
        accumulate: int = 1,
        optimizer: Literal["adam", "adamw"] = "adamw",
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        hold: float = 0.0,
        decay: Literal["constant", "cosine", "linear"] = "cosine",
        final_lr: float = 0.02,
        milestones: Sequence[int] = (),
        clip_norm: float = 1.0,
        ema_decay: float | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        compile: bool = False,
        init: str | None = None,
        overfit_batch: bool = False,
        log_every: int = 20,
        sample_every: int = 500,
        checkpoint_every: int = 500,
        keep_checkpoints: int = 2,
        num_workers: int = 1,
        max_skip_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        positive = {
            "steps": steps,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "lr": lr,
            "clip_norm": clip_norm,
            "log_every": log_every,
            "sample_every": sample_every,
            "checkpoint_every": checkpoint_every,
            "keep_checkpoints": keep_checkpoints,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if batch_size % accumulate:
            raise ValueError(f"batch_size ({batch_size}) must be a multiple of accumulate ({accumulate})")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay must lie in (0, 1), got {ema_decay}")
        if not 0 <= hold <= 1:
            raise ValueError(f"hold must lie in [0, 1], got {hold}")
        self.steps = steps
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.optimizer = optimizer
        self.lr = lr
        self.betas = (betas[0], betas[1])
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.hold = hold
        self.decay = decay
        self.final_lr = final_lr
        self.milestones = tuple(milestones)
        self.clip_norm = clip_norm
        self.ema_decay = ema_decay
        self.precision = precision
        self.compile = compile
        self.init = init
        self.overfit_batch = overfit_batch
        self.log_every = log_every
        self.sample_every = sample_every
        self.checkpoint_every = checkpoint_every
        self.keep_checkpoints = keep_checkpoints
        self.num_workers = num_workers
        self.max_skip_share = max_skip_share
        self.seed = seed

    def learning_rate(self, step: int) -> float:
        """Learning rate of the optimizer step that follows ``step`` finished ones."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        progress = max(progress - self.hold, 0) / max(1 - self.hold, 1e-12)
        remaining = {
            "constant": 1.0,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - progress,
        }[self.decay]
        floor = 1.0 if self.decay == "constant" else self.final_lr
        drops = sum(step >= milestone for milestone in self.milestones)
        return self.lr * (floor + (1 - floor) * remaining) * 0.1**drops

    def run(
        self,
        step: Step,
        dataset: Samples,
        folder: Path,
        *,
        device: torch.device,
        show: Callable[[Tensor, Path], None] | None = None,
        quiet: bool = False,
    ) -> nn.Module:
        """Train ``step`` on ``dataset`` and return the model (EMA weights if they are kept).

        ``folder`` receives checkpoints, logs and pictures; a run that already has checkpoints there goes on from the
        newest, and ends with the weights it would have had without the interruption.

        Args:
            step: what to train.
            dataset: training pictures, or their tokens.
            folder: of the run.
            device: where to train.
            show: writes a grid of pictures to a file.
            quiet: no progress on the terminal.

        Raises:
            CheckpointError: ``init`` holds no model, or one that does not fit.
            TrainingError: a loss that is not finite.
            Interrupted: SIGINT or SIGTERM; a checkpoint was written first.
        """
        if self.init is not None and latest_checkpoint(folder) is None:
            load_weights(step.model, model_folder(Path(self.init)) / WEIGHTS)
        return _Run(self, step.to(device), dataset, folder, device, show, quiet).run()


class _Run:
    """State of one run."""

    def __init__(
        self, settings: Loop, step: Step, dataset: Samples, folder: Path, device: torch.device,
        show: Callable[[Tensor, Path], None] | None,
        quiet: bool,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.step = step
        self.dataset = dataset
        self.folder = folder
        self.device = device
        self.show = show
        self.quiet = quiet
        self.optimizers = {name: self._optimizer(parameters) for name, parameters in step.parameter_groups().items()}
        self.ema = (
            None if settings.ema_decay is None
            else AveragedModel(step.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        )  # fmt: skip
        if settings.compile:
            for child in step.children():
                child.compile()
        self.position = 0
        self.seconds = 0.0
        self.skips = SkipBudget(settings.max_skip_share)

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        s = self.settings
        if s.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=s.lr, betas=s.betas)
        codes = {p for module in self.step.modules() if isinstance(module, Quantizer) for p in module.parameters()}
        shrinking = [p for p in parameters if p.ndim > 1 and p not in codes]
        others = [p for p in parameters if p.ndim <= 1 or p in codes]
        groups = [
            {"params": shrinking, "weight_decay": s.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=s.lr, betas=s.betas)

    def run(self) -> nn.Module:
        s = self.settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        with RunLog(self.folder, self.position) as log, _signals() as received:
            self.log = log
            batches = training_batches(
                self.dataset,
                batch_size=s.batch_size // s.accumulate,
                seed=s.seed,
                start_batch=0 if s.overfit_batch else self.position * s.accumulate,
                num_workers=0 if s.overfit_batch else s.num_workers,
            )
            if s.overfit_batch:
                batches = itertools.cycle([next(batches) for _ in range(s.accumulate)])
            with TrainingProgress(s.steps, self.position, s.batch_size, quiet=self.quiet) as progress:
                started = time.monotonic() - self.seconds
                while self.position < s.steps:
                    row = self._optimize(batches)
                    self.position += 1
                    self.seconds = time.monotonic() - started
                    progress.advance(row)
                    self._record(row)
                    if received:
                        raise Interrupted(received[0], self._checkpoint())
            if latest_checkpoint(self.folder) != self.folder / "checkpoints" / f"step-{s.steps:08d}":
                self._checkpoint()
        return self.averaged

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
        self.keys: list[str] = []
        for _ in range(s.accumulate):
            batch = next(batches)
            self.keys += batch["key"]
            for key, reason in batch["skipped"]:
                logger.warning("skipped %s: %s", key, reason)
            self.skips.count(batch)
            batch["x"] = batch["x"].to(self.device)
            batch["label"] = batch["label"].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
                out = self.step(batch)
            if self._is_logged(self.position + 1):
                out.metrics |= _gradient_norms(out)
            for index, (name, loss) in enumerate(out.losses.items(), 1):
                # Each loss reaches only its own optimizer's parameters, whatever else its graph touches.
                inputs = _parameters(self.optimizers[name])
                (loss / s.accumulate).backward(inputs=inputs, retain_graph=index < len(out.losses))
                out.metrics[f"loss/{name}"] = loss.detach()
            for name, value in out.metrics.items():
                sums[name] = sums.get(name, 0) + value.float() / s.accumulate
        row = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        self._require_finite(row)
        lr = s.learning_rate(self.position)
        for name, optimizer in self.optimizers.items():
            norm = nn.utils.clip_grad_norm_(_parameters(optimizer), s.clip_norm)
            row[f"grad_norm/{name}"] = norm.item()
            self._require_finite(row)
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

    def _require_finite(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if not math.isfinite(value) and name.startswith(("loss/", "grad_norm/")):
                last = latest_checkpoint(self.folder)
                raise TrainingError(
                    f"{name} is {value} at step {self.position + 1}; "
                    f"last good checkpoint: {last or 'none yet'}; pictures of the batch: {', '.join(self.keys)}"
                )

    def _is_logged(self, position: int) -> bool:
        return position % self.settings.log_every == 0 or position in (1, self.settings.steps)

    def _record(self, row: dict[str, float]) -> None:
        s = self.settings
        if self._is_logged(self.position):
            rate = self.position * s.batch_size / self.seconds
            self.log.row({"step": self.position, **row, "images_per_s": rate, "seconds": self.seconds})
        if self.show is not None and (self.position % s.sample_every == 0 or self.position == s.steps):
            self._pictures()
        if self.position % s.checkpoint_every == 0:
            self._checkpoint()

    def _pictures(self) -> None:
        model = self.averaged
        batch = next(training_batches(self.dataset, batch_size=8, seed=self.settings.seed))
        batch["x"] = batch["x"].to(self.device)
        model.eval()
        pictures = self.step.pictures(model, batch)
        model.train()
        assert self.show is not None
        file = self.folder / "samples" / f"step-{self.position:08d}.png"
        self.show(pictures, file)
        self.log.image("samples", file, self.position)

    def _checkpoint(self) -> Path:
        state = {
            "position": self.position,
            "seconds": self.seconds,
            "step": {name: child.state_dict() for name, child in self.step.trained().items()},
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
            "skips": {"num_read": self.skips.num_read, "num_skipped": self.skips.num_skipped},
        }
        model = cast(Model, self.averaged)
        return save_checkpoint(self.folder, self.position, model, state, keep=self.settings.keep_checkpoints)

    def _resume(self) -> None:
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is None:
            return
        state = load_state(checkpoint)
        for name, child in self.step.trained().items():
            child.load_state_dict(state["step"][name])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.skips.num_read = state["skips"]["num_read"]
        self.skips.num_skipped = state["skips"]["num_skipped"]
        self.position = state["position"]
        self.seconds = state["seconds"]
        logger.info("continuing from %s", checkpoint)


def _gradient_norms(out: StepOutput) -> dict[str, Tensor]:
    """The norm of each term's gradient at the point where they meet."""
    if out.meeting_point is None:
        return {}
    return {
        f"grad_norm/{name}": torch.autograd.grad(term, out.meeting_point, retain_graph=True)[0].norm()
        for name, term in out.terms.items()
        if term.requires_grad  # an adversary that has not started says nothing
    }


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
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
