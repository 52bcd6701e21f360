"""``tessella sample``: signals from a generator, as numbered files, each with its own seed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tessella.checkpoint import fingerprint, load_generator
from tessella.commands._data import medium_of
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath, to_path
from tessella.commands._progress import drawing
from tessella.errors import ConfigError
from tessella.generators.drawing import SampleSettings, check_options, chunks, classes_of, draw_batches, labels_of
from tessella.recipe import differences
from tessella.storage import holds_nothing, lock_folder, write_text

SETTINGS = "samples.json"
OVERVIEW = "grid"
_SHOWN = 64


@dataclass(frozen=True)
class Drawn:
    """What :func:`sample` did.

    Attributes:
        count: samples drawn now.
        total: samples there are.
        seconds: what drawing took.
        overview: a picture of the first ones.
    """

    count: int
    total: int
    seconds: float
    overview: Path


def sample(
    model: AnyPath, out: AnyPath | None = None, *, classes: Sequence[str] = (), count: int = 16,
    settings: SampleSettings | None = None, batch_size: int = 64, device: str | None = None,
) -> Drawn:  # fmt: skip
    """Draw from a generator into numbered files and an overview of the first ones; go on where a call was interrupted.

    ``samples.json`` names the settings; a file that is there is not drawn again.

    Args:
        model: see :func:`tessella.load_generator`.
        out: folder of the files; ``generated`` in the model's by default.
        classes: names or numbers; all of them in turn by default.
        count: samples of each class named, or in all.
        settings: how to draw.
        batch_size: samples at a time; no part in the result.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.

    Raises:
        CheckpointError, ConfigError: a model that cannot be used; an unknown class, a setting out of range, or a folder
            with other samples.
    """
    model, out = Path(model), to_path(out)
    settings = settings or SampleSettings()
    generator, tokenizer = load_generator(model, device=pick_device(device))
    if tokenizer.autoencoder.takes_context:
        raise ConfigError(f"{model} draws nothing of its own: it reads files, see tessella predict")
    medium = medium_of(tokenizer)
    labels = labels_of(generator, classes, count)
    check_options(generator, settings.options)
    out = out or (model if model.is_dir() else model.parent) / "generated"
    names = classes_of(generator)[1]
    numbers = range(count if labels is None else len(labels))
    files = [out / _file_name(number, labels, names, medium.suffix) for number in numbers]
    claimed = {"generator": fingerprint(generator), **asdict(settings)}
    _check_claim(out, claimed)
    with lock_folder(out, what="sampling"):
        missing = chunks([number for number in numbers if not files[number].is_file()], batch_size)
        started = time.monotonic()
        parts = drawing(missing, "samples")
        batches = draw_batches(generator, tokenizer, labels=labels, chunks=parts, settings=settings)
        for chunk, signals in zip(missing, batches, strict=True):
            if not (out / SETTINGS).is_file():
                write_text(out / SETTINGS, json.dumps(claimed, indent=2) + "\n")
            for number, signal in zip(chunk, signals, strict=True):
                medium.write(signal, files[number])
        seconds = time.monotonic() - started
        shown = torch.stack([medium.read(file) for file in files[:_SHOWN]])
        return Drawn(sum(map(len, missing)), len(files), seconds, medium.preview([shown], out / OVERVIEW))


def _file_name(number: int, labels: Sequence[int] | None, names: Sequence[str], suffix: str) -> str:
    if labels is None:
        return f"{number:06d}{suffix}"
    label = labels[number]
    return f"{number:06d}-{names[label] if names else label}{suffix}".replace("/", "_")


def _check_claim(out: Path, settings: dict[str, Any]) -> None:
    """See that a folder is free, or holds samples drawn in this way.

    Raises:
        ConfigError: it holds something else.
    """
    file = out / SETTINGS
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = differences(found, settings)
        if changed:
            raise ConfigError(f"{out} holds other samples ({'; '.join(changed)}); choose another --out, or delete it")
    elif out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder; choose another --out")
    elif not holds_nothing(out):
        raise ConfigError(f"{out} is not empty and holds no samples; choose another --out")
