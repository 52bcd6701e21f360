"""What the training loop costs beside the bare step that it takes.

    OMP_NUM_THREADS=1 python benchmarks/train_loop.py [--recipe photos_fsq] [--steps 40] [--rounds 5] [--set KEY=VALUE]
        [--out folder]

The recipe's own step, optimizer, clipping and averaged weights are driven twice in alternation, in one process: by a
loop of six lines over batches that lie in memory, and by tessella's, which reads its batches, looks at every number,
logs and counts its progress. Each round is timed from the second quarter of its steps on, by the wall and by this
process's CPU time, which other work on the machine touches less; ratios are of neighbours, and what is told is their
median. Writes train_loop.json and prints the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from tessella.commands._data import open_data
from tessella.commands.build import tokenizer_of
from tessella.config import build_section, resolve_recipe
from tessella.data.loader import training_batches
from tessella.distributed import Ranks
from tessella.recipe import override, read_recipe
from tessella.training.loop import Loop
from tessella.training.run import Run
from tessella.training.tokenizer import TokenizerStep

CPU = torch.device("cpu")


def make(recipe: dict) -> tuple[Loop, TokenizerStep]:
    loop: Loop = build_section(recipe, "training")
    torch.manual_seed(0)
    step = TokenizerStep(tokenizer_of(recipe), build_section(recipe, "loss"), build_section(recipe, "medium"))
    return loop, step


class Timed(Run):
    """A run that notes the time after each step."""

    def _record(self, row: dict[str, float]) -> None:
        super()._record(row)
        self.times = [*getattr(self, "times", []), now()]


def now() -> tuple[float, float]:
    """Of the wall, and of this process on the processors."""
    return time.perf_counter(), time.process_time()


def a_step(times: list[tuple[float, float]]) -> dict[str, float]:
    first = len(times) // 4
    wall, cpu = ((end - start) / (len(times) - 1 - first) for start, end in zip(times[first], times[-1], strict=True))
    return {"wall_s": wall, "cpu_s": cpu}


def bare(recipe: dict, batches: list, folder: Path) -> dict[str, float]:
    """A step of the least that trains the same."""
    loop, step = make(recipe)
    run = Run(loop, step, None, folder, CPU, None, True, Ranks())  # for its optimizers and averages
    step.train()
    times = []
    for _, batch in zip(range(loop.steps), itertools.cycle(batches), strict=False):
        for optimizer in run.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        torch.stack(list(step(batch).losses.values())).sum().backward()
        for optimizer in run.optimizers.values():
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], loop.clip_norm)
            optimizer.step()
        if run.ema is not None:
            run.ema.update_parameters(step.model)
        times.append(now())
    return a_step(times)


def whole(recipe: dict, dataset: object, folder: Path) -> dict[str, float]:
    """A step of ``tessella train``."""
    loop, step = make(recipe)
    run = Timed(loop, step, dataset, folder, CPU, None, True, Ranks())
    run.run(lambda: None)
    return a_step(run.times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="photos_fsq")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    every = max(options.steps // 4, 1)
    schedule = [f"training.steps={options.steps}", f"training.log_every={every}", "training.sample_every=1000000",
                "training.checkpoint_every=1000000"]  # fmt: skip
    recipe = resolve_recipe(override(read_recipe(options.recipe), [*schedule, *options.set]))
    dataset = open_data(recipe["data"], "train")
    settings = recipe["training"]
    stream = training_batches(dataset, batch_size=settings["batch_size"], seed=settings["seed"])
    batches = [next(stream) for _ in range(8)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            plain = bare(recipe, batches, Path(name) / f"bare-{number}")
            ours = whole(recipe, dataset, Path(name) / f"loop-{number}")
            rows.append({"bare": plain, "loop": ours, **{f"ratio_{key}": ours[key] / plain[key] for key in ours}})
            print(f"a step: bare {plain['wall_s'] * 1e3:.1f} ms, loop {ours['wall_s'] * 1e3:.1f} ms; "
                  f"ratio {rows[-1]['ratio_wall_s']:.3f}, of CPU time {rows[-1]['ratio_cpu_s']:.3f}")  # fmt: skip
    medians = {key: statistics.median(row[key] for row in rows) for key in ("ratio_wall_s", "ratio_cpu_s")}
    print(f"medians of {len(rows)}: {medians['ratio_wall_s']:.3f}, of CPU time {medians['ratio_cpu_s']:.3f}")
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "recipe": options.recipe, "steps": options.steps, "overrides": options.set, "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "torch": torch.__version__, "rounds": rows, "medians": medians,
    }  # fmt: skip
    (options.out / "train_loop.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
