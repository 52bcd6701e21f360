"""From a data set to a folder of token shards: planned, done piece by piece by whom one likes, continued, sealed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch

from tessella.checkpoint import load
from tessella.config import build
from tessella.data.base import DataError, Samples, list_skipped
from tessella.data.tokens import MANIFEST
from tessella.distributed import Ranks, device_of
from tessella.errors import ConfigError, TessellaError
from tessella.registry import Spec, find
from tessella.storage import lock_folder
from tessella.text import printable
from tessella.tokenization.executors import Executor, InProcess, LocalProcesses
from tessella.tokenization.on_ray import OnRay
from tessella.tokenization.plan import Output, Plan, Record
from tessella.tokenization.progress import shown
from tessella.tokenization.source import AnySplit, open_source
from tessella.tokenization.unit import Job
from tessella.tokenizer import Tokenizer

logger = logging.getLogger("tessella")

Engine = Literal["local", "ray"]

# Until so many inputs were tried, the share of unreadable ones says nothing about the data set.
_LEAST_TO_JUDGE = 200


@dataclass(frozen=True)
class TokenizeResult:
    """What :func:`tokenize_dataset` did.

    Attributes:
        num_rows: in the folder.
        num_inputs: that were tried: read, or skipped.
        num_available: that the split holds.
        num_skipped: that could not be read; the manifest has their keys and reasons.
        num_shards: in the folder.
        num_made: of them by this call; the others were there.
        split: what was taken.
        seconds: of this call.
        profile: seconds in "read", "decode", "model" and "write", summed over all workers; empty unless asked for.
    """

    num_rows: int
    num_inputs: int
    num_available: int
    num_skipped: int
    num_shards: int
    num_made: int
    split: str
    seconds: float
    profile: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """How many of how many, of which split; and where the time went, if that was asked for."""
        part = {"all": "both parts", "train": "the training part", "test": "the held-out part"}[self.split]
        skipped = f"; {self.num_skipped:,} could not be read, {MANIFEST} says why" if self.num_skipped else ""
        there = self.num_shards - self.num_made
        earlier = f"; {there:,} of {self.num_shards:,} shards were there" if there else ""
        seconds = "".join(f"; {name} {spent:.1f} s" for name, spent in self.profile.items())
        return (
            f"{self.num_rows:,} rows of {self.num_inputs:,} of {self.num_available:,} signals ({part})"
            f"{skipped}{earlier}{seconds}"
        )


def tokenize_dataset(
    tokenizer_path: Path, data: Spec, out: Path, *, split: AnySplit = "all", limit: int | None = None,
    whole: bool = False, variants: int = 0, shard_rows: int | None = None, batch_size: int = 64, workers: int = 0,
    engine: Engine = "local", device: str | None = None, max_skip_share: float = 0.05, profile: bool = False,
) -> TokenizeResult:  # fmt: skip
    """Write the tokens of a data set as Parquet shards into ``out``.

    Interrupted at any moment and called again with the same arguments it makes what is missing, and the folder ends up
    the same, byte for byte, however often, by whatever engine and by how many workers it was made. A folder that holds
    the tokens of other arguments is refused. Under torchrun every rank calls it and takes a part of the shards.

    Args:
        tokenizer_path: see :func:`tessella.load`.
        data: a recipe's ``[data]``.
        out: folder of the shards; see :mod:`tessella.data.tokens`.
        split: "train", "test" (what is held out), or "all": the training part and then the other.
        limit: only the first so many inputs.
        whole: signals at their own size, padded to the stride, instead of windows of them.
        variants: rows of each input, its views in so many epochs of training; 0 for one row, its centre.
        shard_rows: rows of a shard; by default 1,024 to 8,192, as the data is large.
        batch_size: signals that are encoded at once; no part in the result.
        workers: processes beside this one, each with one torch thread; 0 for none, or with Ray for all its CPUs.
        engine: "local", or "ray": a Ray of this machine, or the cluster that ``RAY_ADDRESS`` names.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.
        max_skip_share: the share of inputs that may be unreadable.
        profile: measure what the time goes into.

    Raises:
        CheckpointError, ConfigError, DataError: a tokenizer, data or an argument that cannot be used; a folder that is
            in use, that holds other tokens, or that cannot be written; too many inputs that cannot be read.
        WorkerError: a worker was killed.
    """
    started = time.monotonic()
    for name, value, least in (("limit", limit, 1), ("shard_rows", shard_rows, 1), ("batch_size", batch_size, 1),
                               ("workers", workers, 0)):  # fmt: skip
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    if not 0 <= max_skip_share <= 1:
        raise ConfigError(f"max_skip_share must be in [0, 1], got {max_skip_share}")
    elsewhere = bool(workers) or engine == "ray"
    chosen = _device(device, check=engine == "local")
    tokenizer = load(tokenizer_path, device="cpu" if elsewhere else chosen)
    source = open_source(data, split, variants=variants, whole=whole)
    medium = _medium(tokenizer, data)
    plan = Plan.of(source, tokenizer.token_space(), medium, limit=limit, shard_rows=shard_rows)
    job = Job(
        Path(tokenizer_path), chosen, source, plan, Path(out), batch_size, 1 if workers or engine == "ray" else None
    )
    executor = _executor(engine, workers, tokenizer)
    with Ranks() as ranks:
        made, records = _make(job, executor, ranks, max_skip_share, build("media", medium).unit)
    for key, reason in (pair for record in made for pair in record.skipped):
        logger.warning("skipped %s: %s", printable(key), printable(reason))
    return TokenizeResult(
        num_rows=sum(record.shard.num_rows or 0 for record in records),
        num_inputs=plan.num_inputs,
        num_available=len(source),
        num_skipped=sum(len(record.skipped) for record in records),
        num_shards=len(records),
        num_made=len(made),
        split=split,
        seconds=time.monotonic() - started,
        profile=_summed(made) if profile else {},
    )


def _make(
    job: Job, executor: Executor, ranks: Ranks, max_skip_share: float, unit: str
) -> tuple[list[Record], list[Record]]:
    """What was made just now, and all there is; the folder is whole afterwards."""
    output = Output(job.folder, job.plan)
    with _claimed(output, ranks) as there:
        known = {record.number for record in there}
        missing = [number for number in range(len(job.plan)) if number not in known]
        done = sum(len(job.plan.inputs(number)) for number in known)
        mine: list[Record] = []
        bar = shown(done, job.plan.num_inputs, unit) if ranks.first else nullcontext(_ignore)
        with bar as advance:
            # The other ranks do not report; they are taken to be as fast.
            for record in executor.run(job, ranks.share(missing), lambda more: advance(more * ranks.size)):
                mine.append(record)
                _judge([*there, *mine], job.plan, max_skip_share, least=_LEAST_TO_JUDGE)
        made = [record for part in ranks.gather(mine) for record in part]
        records = [*there, *made]
        _judge(records, job.plan, max_skip_share, least=0)
        if ranks.first:
            output.finish(records)
        ranks.gather(None)  # nobody leaves before the folder is whole
    return made, records


@contextmanager
def _claimed(output: Output, ranks: Ranks) -> Iterator[list[Record]]:
    """The folder for ourselves while the block runs, and what of the plan is there; the first rank does it for all."""
    with ExitStack() as stack:
        answer: list[Record] | TessellaError = []
        if ranks.first:
            try:
                stack.enter_context(lock_folder(output.folder, what="tokenization"))
                answer = output.claim()
            except TessellaError as error:
                answer = error
        answer = ranks.broadcast(answer)
        if isinstance(answer, TessellaError):
            raise answer
        yield answer


def _judge(records: list[Record], plan: Plan, max_skip_share: float, *, least: int) -> None:
    """Raise DataError where more than the share of what was tried could not be read."""
    tried = sum(len(plan.inputs(record.number)) for record in records)
    skipped = [pair for record in records for pair in record.skipped]
    if tried >= least and len(skipped) > max_skip_share * tried:
        raise DataError(
            f"{len(skipped)} of {tried} inputs cannot be used, more than max_skip_share={max_skip_share:g} allows: "
            f"{list_skipped(skipped)}"
        )


def _summed(records: list[Record]) -> dict[str, float]:
    parts = ("read", "decode", "model", "write")
    return {part: sum(record.seconds.get(part, 0.0) for record in records) for part in parts}


def _executor(engine: Engine, workers: int, tokenizer: Tokenizer) -> Executor:
    if engine == "ray":
        return OnRay(workers)
    if engine != "local":
        raise ConfigError(f"engine must be 'local' or 'ray', got {engine!r}")
    return LocalProcesses(workers) if workers else InProcess(tokenizer)


def _medium(tokenizer: Tokenizer, data: Spec) -> Spec:
    """What the signals are: as the tokenizer's recipe says, or its data."""
    recipe = tokenizer.recipe or {}
    medium: Spec = recipe.get("medium") or cast(type[Samples], find("data", data["name"])).medium_spec(data)
    return medium


def _device(name: str | None, *, check: bool) -> str:
    """The device called ``name``, or the accelerator there is; of several of a kind each rank takes its own."""
    if name is None:
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if check:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return device_of(name, int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else name


def _ignore(done: int) -> None:
    """Only the first rank shows how far it is."""
