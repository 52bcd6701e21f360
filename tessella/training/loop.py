"""The only training loop: any step object, exact resuming, and an end that is always a good checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from tessella.checkpoint import WEIGHTS, latest_checkpoint, load_weights, model_folder
from tessella.data.base import Samples
from tessella.distributed import Ranks
from tessella.training.base import Step
from tessella.training.precision import Precision
from tessella.training.run import Preview, Run

logger = logging.getLogger("tessella")

# A share of the first weights in the averaged ones from which on a run is told of it.
_REMEMBERED = 0.05


class Loop:
    """Settings of a training run; :meth:`run` does it.

    Args:
        steps: optimizer steps.
        batch_size: samples per optimizer step, on all ranks together.
        accumulate: micro-batches a step is split into (gradients are averaged).
        optimizer: ``adam``, ``adamw``, or ``muon``: Muon for the weights of linear and convolutional layers, AdamW for
            what else there is (:class:`tessella.training.optimizers.Muon`).
        lr: peak learning rate.
        betas: of Adam.
        weight_decay: of AdamW and Muon (decoupled); on matrices and convolutions, never on biases, norms or codebooks.
        warmup_steps: linear warm-up from 0.
        hold: share of the steps after the warm-up during which the rate stays at its peak.
        decay: schedule after that: ``constant``, ``cosine`` or ``linear`` down to ``final_lr`` (a fraction of ``lr``).
        final_lr: fraction of ``lr`` at the end.
        milestones: steps after each of which the rate is multiplied by 0.1.
        clip_norm: largest norm of an optimizer's gradient; ``inf`` for no clipping.
        ema_decay: of the averaged weights, which are what is saved and evaluated; None for none.
        precision: ``fp32``; ``bf16`` (autocast); or ``auto``: bf16 where the device computes it natively, else fp32. A
            run keeps what its first start chose.
        compile: run the step's networks through ``torch.compile``.
        init: run or saved model whose weights the training starts from; None starts from random ones.
        overfit_batch: train on the first batch alone, again and again: a recipe that cannot learn it by heart is wrong.
        log_every, sample_every, checkpoint_every: in steps.
        keep_checkpoints: how many of the newest stay.
        num_workers: processes that read samples; 0 reads in this one.
        max_skip_share: share of unreadable samples above which the run fails.
        seed: of weights, data order, crops and everything random.
    """

    def __init__(
        self,
        *,
        steps: int = 10_000,
        batch_size: int = 64,
        accumulate: int = 1,
        optimizer: Literal["adam", "adamw", "muon"] = "adamw",
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
        precision: Precision = "fp32",
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
            if not value > 0 or (math.isinf(value) and name != "clip_norm"):
                raise ValueError(f"{name} must be positive, got {value}")
        least_0 = {
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "final_lr": final_lr,
            "num_workers": num_workers,
            "seed": seed,
        }
        for name, value in least_0.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not 0 <= max_skip_share <= 1:
            raise ValueError(f"max_skip_share must lie in [0, 1], got {max_skip_share}")
        if any(milestone < 1 for milestone in milestones):
            raise ValueError(f"milestones must be steps of at least 1, got {list(milestones)}")
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
        show: Preview | None = None,
        quiet: bool = False,
        claim: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
    ) -> nn.Module:
        """Train ``step`` on ``dataset`` and return the model (EMA weights if they are kept).

        ``folder`` receives checkpoints, logs and samples; a run that already has checkpoints there goes on from the
        newest, and ends with the weights it would have had without the interruption.

        Args:
            step: what to train.
            dataset: training signals, or their tokens.
            folder: of the run.
            device: where to train.
            show: writes what :meth:`Step.preview` gives to a file.
            quiet: no progress on the terminal.
            claim: called once the first step has gone well, before anything is written into ``folder``.
            ranks: the processes that train together, each calling this; the batch is divided between them, and the
                first alone writes. None for this process alone.

        Raises:
            ConfigError: a batch that cannot be divided between the ranks.
            CheckpointError: ``init`` holds no model, or one that does not fit.
            TrainingError: a loss that is not finite.
            EndedElsewhere: another rank failed.
            Interrupted: SIGINT or SIGTERM; a checkpoint was written first.
        """
        if self.init is not None and latest_checkpoint(folder) is None:
            load_weights(step.model, model_folder(Path(self.init)) / WEIGHTS)
        remembered = 0.0 if self.ema_decay is None or self.init is not None else self.ema_decay ** (self.steps - 1)
        if remembered > _REMEMBERED and not quiet and (ranks is None or ranks.rank == 0):
            logger.warning(
                "after %d steps %.0f %% of the averaged weights, which are saved, will be the first ones; a smaller "
                "training.ema_decay or more steps forget them", self.steps, 100 * remembered,
            )  # fmt: skip
        return Run(self, step.to(device), dataset, folder, device, show, quiet, ranks or Ranks()).run(claim)
