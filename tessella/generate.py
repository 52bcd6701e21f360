"""Pictures from a generator: numbered samples, each with its own seed, written as files or handed on."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tessella.checkpoint import fingerprint, write_text
from tessella.config import ConfigError, differences
from tessella.data.base import to_tensor
from tessella.generators.base import Generator
from tessella.generators.guidance import parse_guidance
from tessella.generators.sampling import generators
from tessella.report import save_image_grid
from tessella.tokenizer import Tokenizer

SETTINGS = "samples.json"
GRID = "grid.png"
_GRID_PICTURES = 64


@dataclass(frozen=True)
class SampleSettings:
    """How samples are drawn; see :meth:`tessella.generators.base.Generator.sample`.

    Sample i is a function of the model, these settings, its class and (seed, i) alone: neither the batch size nor an
    interruption changes it.

    Attributes:
        seed: of the run.
        temperature, top_k, top_p: as there.
        guidance: as :func:`tessella.generators.guidance.parse_guidance` reads it.
        options: further arguments of this generator's ``sample``.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: str = "1"
    options: dict[str, Any] = field(default_factory=dict)


def draw(
    generator: Generator,
    tokenizer: Tokenizer,
    *,
    labels: Sequence[int] | None,
    numbers: Sequence[int],
    settings: SampleSettings,
) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in [-1, 1] of the samples called ``numbers``, of classes ``labels``.

    Raises:
        ConfigError: a setting or a class out of range.
    """
    device = tokenizer.device
    condition = None if labels is None else torch.tensor(labels, device=device)
    check_options(generator, settings.options)
    try:
        indices = generator.sample(
            condition,
            rng=generators(_seed(settings.seed, number) for number in numbers),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance=parse_guidance(settings.guidance),
            **settings.options,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return tokenizer.decode(indices).float().clamp(-1, 1)


def check_options(generator: Generator, options: Mapping[str, Any]) -> None:
    """Refuse options that this kind of generator does not have.

    Raises:
        ConfigError: names those it has.
    """
    common = inspect.signature(Generator.sample).parameters
    own = [name for name in inspect.signature(type(generator).sample).parameters if name not in common]
    for name in options:
        if name not in own:
            kind = type(generator).__name__
            raise ConfigError(f"unknown option {name!r} of {kind}; accepted: {', '.join(own) or 'none'}")


def _seed(seed: int, number: int) -> int:
    """A seed of its own for each sample of each run: neighbours share nothing."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def draw_batches(
    generator: Generator,
    tokenizer: Tokenizer,
    *,
    labels: Sequence[int] | None,
    count: int,
    settings: SampleSettings,
    batch_size: int,
) -> Iterator[Tensor]:
    """The pictures of samples 0 to ``count``, in batches on the CPU, behind a progress bar."""
    for numbers in _progress(_chunks(range(count), batch_size), count):
        classes = None if labels is None else [labels[number] for number in numbers]
        yield draw(generator, tokenizer, labels=classes, numbers=numbers, settings=settings).cpu()


def balanced(num_classes: int, count: int) -> list[int]:
    """``count`` labels, every class as often as the others to within one, in turn."""
    return [number % num_classes for number in range(count)]


def write_samples(
    generator: Generator,
    tokenizer: Tokenizer,
    out: Path,
    *,
    labels: Sequence[int] | None,
    count: int,
    settings: SampleSettings,
    batch_size: int,
    names: Sequence[str] = (),
) -> tuple[int, float]:
    """Write samples as PNGs and a grid of the first ones into ``out``; go on where an earlier call was interrupted.

    ``samples.json`` names the settings; a file that is there is not drawn again.

    Returns:
        The number of pictures drawn now, and the seconds that took.

    Raises:
        ConfigError: ``out`` holds samples of another model or other settings, or a setting is out of range.
    """
    files = [out / _file_name(number, None if labels is None else labels[number], names) for number in range(count)]
    _claim(out, {"generator": fingerprint(generator), **asdict(settings)})
    missing = [number for number in range(count) if not files[number].is_file()]
    started = time.monotonic()
    for chunk in _progress(_chunks(missing, batch_size), len(missing)):
        classes = None if labels is None else [labels[number] for number in chunk]
        pictures = draw(generator, tokenizer, labels=classes, numbers=chunk, settings=settings)
        for number, picture in zip(chunk, pictures, strict=True):
            save_image_grid(picture[None], files[number])
    seconds = time.monotonic() - started
    shown = torch.stack([to_tensor(Image.open(file).convert("RGB")) for file in files[:_GRID_PICTURES]])
    save_image_grid(shown, out / GRID)
    return len(missing), seconds


def _file_name(number: int, label: int | None, names: Sequence[str]) -> str:
    if label is None:
        return f"{number:06d}.png"
    return f"{number:06d}-{names[label] if names else label}.png".replace("/", "_")


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into the folder, or see that they are the ones already there."""
    file = out / SETTINGS
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = differences(found, settings)
        if changed:
            raise ConfigError(f"{out} holds other samples ({'; '.join(changed)}); choose another --out, or delete it")
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no samples; choose another --out")
    else:
        write_text(file, json.dumps(settings, indent=2) + "\n")


def _chunks(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _progress(chunks: Sequence[Sequence[int]], total: int) -> Iterator[Sequence[int]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("sample"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())  # fmt: skip
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("sample", total=total, rate="")
        done = 0
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            progress.update(task, completed=done, rate=f"{done / (time.monotonic() - started):.2f} images/s")
