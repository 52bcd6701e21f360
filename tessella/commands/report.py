"""``tessella report``: one page that shows what a model does."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tessella.checkpoint import load, load_generator, load_recipe, model_folder
from tessella.commands._codebook import counted
from tessella.commands._data import data_of, medium_of, open_data
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath, to_path
from tessella.commands._predictions import dense, load_predictor, predicts
from tessella.commands._progress import drawing
from tessella.commands.build import is_generator
from tessella.commands.evaluate import evaluate
from tessella.data.base import Samples
from tessella.explorer.codebook import codebook_section
from tessella.generators.drawing import SampleSettings, chunks, classes_of, draw_batches
from tessella.registry import find
from tessella.reporting import Section, Table, write_generator_report, write_report
from tessella.training.logs import LOG, read_log

_SHOWN = 12
_BATCH = 64


def report(
    model: AnyPath, *, data: str | None = None, weights: AnyPath | None = None, out: AnyPath | None = None,
    device: str | None = None, command: str | None = None, sections: Sequence[Section] = (),
) -> Path:  # fmt: skip
    """Write a page that shows what a tokenizer, measured for it, or a generator does; returns the page.

    Args:
        model: a run, a checkpoint, or a saved model.
        data, weights, device: as for :func:`tessella.evaluate`.
        out: folder of the page; the model's by default.
        command: shown on the page; the command line of this process by default.
        sections: further ones, of a tokenizer's page.

    Raises:
        CheckpointError, ConfigError, DataError: a model, a data set or weights that cannot be used.
    """
    model, weights, out = Path(model), to_path(weights), to_path(out)
    folder = out or model
    command = command or shlex.join(["tessella", *sys.argv[1:]])
    if is_generator(model):
        return _report_generator(model, data=data, out=folder, device=device, command=command)
    evaluation = evaluate(model, data=data, weights=weights, out=folder, device=device)
    assert evaluation.reconstruction is not None  # no generator
    tokenizer = load(model, device=pick_device(device))
    section = data_of(tokenizer, data)
    x, context, keys = _spread(open_data(section, "test"), _SHOWN, tokenizer.device)
    indices = tokenizer.encode(x, context, pad=True)
    x_hat = tokenizer.decode(indices, context, extent=x.shape[2:])
    try:
        codebook: Tensor | None = tokenizer.quantizer.codebook
    except ValueError:  # too large to build; the page then colours tokens by their number
        codebook = None
    use = codebook_section(counted(model, tokenizer, section, open_data(section, "test"))) if context is None else None
    medium, originals, rebuilt, tokens = medium_of(tokenizer, section), x.cpu(), x_hat.cpu(), indices.cpu()
    name = Path(str(section.get("path") or section["name"])).name
    return write_report(
        folder,
        title=f"{type(tokenizer.quantizer).__name__} tokenizer on {name}",
        command=command,
        evaluation=evaluation.reconstruction,
        log_rows=read_log(model / LOG),
        shown=medium.show(originals, rebuilt, tokens, codebook, keys)
        if context is None
        else medium.show_with_context(originals, rebuilt, context.cpu(), tokens, codebook, keys),
        sections=[*sections, *([use] if use else [])],
    )


def _report_generator(model: Path, *, data: str | None, out: Path, device: str | None, command: str) -> Path:
    started = time.monotonic()
    if predicts(model):
        section = _show_predictions(model, data=data, out=out, device=device)
    else:
        section, _ = show_samples(model, data=data, device=device)
    records = sorted(model.glob("samples-*.json"))
    recipe = load_recipe(model_folder(model))
    return write_generator_report(
        out,
        title=f"{find('generators', recipe['generator']['name']).__name__} generator",
        command=command,
        samples=section,
        log_rows=read_log(model / LOG),
        distribution=json.loads(records[0].read_text(encoding="utf-8")) if records else None,
        seconds=time.monotonic() - started,
    )


def _show_predictions(model: Path, *, data: str | None, out: Path, device: str | None) -> Section:
    """Contexts, labels, oracle and predictions, and the numbers of all predictions."""
    record = evaluate(model, data=data, out=out, device=device).reconstruction
    assert record is not None
    predictor, oracle = load_predictor(model, device=pick_device(device))
    section = data_of(oracle, data)
    x, context, keys = _spread(open_data(section, "test"), _SHOWN, oracle.device)
    assert context is not None
    best, predicted = (one.decode(one.encode(x, context), context).cpu() for one in (oracle, predictor))
    page = dense(medium_of(oracle, section)).show_predictions(
        context.cpu(), x.cpu(), best, predicted, keys, "the likeliest at each place."
    )
    rows = [(number.label, number.value, number.meaning) for number in record.numbers]
    return Section(page.title, page.text, [*page.blocks, Table(("metric", "value", "how it is measured"), rows)])


def show_samples(
    model: Path, *, data: str | None = None, per_class: int = 8, max_classes: int = 10,
    settings: SampleSettings | None = None, device: str | None = None,
) -> tuple[Section, float]:  # fmt: skip
    """A report's section with held-out signals and samples of each class, and the samples drawn per second.

    Args:
        model, settings, device: as for :func:`tessella.sample`.
        data: the real signals; by default what the tokenizer was trained on.
        per_class: signals of each kind.
        max_classes: the first so many are shown.
    """
    generator, tokenizer = load_generator(model, device=pick_device(device))
    settings = settings or SampleSettings()
    num_classes, names = classes_of(generator)
    section = data_of(tokenizer, data)
    shown = 1 if num_classes is None else min(num_classes, max_classes)
    labels = None if num_classes is None else [label for label in range(shown) for _ in range(per_class)]
    parts = drawing(chunks(range(shown * per_class), _BATCH), "samples")
    started = time.monotonic()
    drawn = list(draw_batches(generator, tokenizer, labels=labels, chunks=parts, settings=settings))
    seconds = time.monotonic() - started
    titles = [names[label] if names else f"class {label}" for label in range(shown)] if labels else ["all"]
    real = _of_classes(open_data(section, "test"), None if labels is None else shown, per_class)
    told = {name: value for name, value in asdict(settings).items() if value not in (None, {})}
    page = medium_of(tokenizer, section).show_samples(
        {title: torch.stack(signals) for title, signals in zip(titles, real, strict=True) if signals},
        dict(zip(titles, torch.cat(drawn).split(per_class), strict=True)),
        ", ".join(f"{name} {value}" for name, value in told.items()) + ".",
    )
    return page, shown * per_class / seconds


def _of_classes(dataset: Samples, num_classes: int | None, count: int) -> list[list[Tensor]]:
    """``count`` signals of each of the first classes, or of all together; fewer where the data set has fewer."""
    found: list[list[Tensor]] = [[] for _ in range(num_classes or 1)]
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        if all(len(signals) == count for signals in found):
            break
        sample = dataset[index]
        place = sample["label"] if num_classes is not None else 0
        if 0 <= place < len(found) and len(found[place]) < count:
            found[place].append(sample["x"])
    return found


def _spread(dataset: Samples, count: int, device: torch.device) -> tuple[Tensor, Tensor | None, list[str]]:
    """``count`` signals from all over a data set, the same ones every time; its first ones may all be alike."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    samples = [dataset[index] for index in sorted(chosen)]
    x = torch.stack([sample["x"] for sample in samples]).to(device)
    contexts = [sample["context"] for sample in samples if "context" in sample]
    return x, torch.stack(contexts).to(device) if contexts else None, [sample["key"] for sample in samples]
