"""``tessella compare``: tokenizers side by side on the same signals, and codecs beside them as yardsticks."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessella.commands._compare import Row, cells, chosen_codecs, codec_row, distinct_budgets, on_device, tokenizer_row
from tessella.commands._data import batches, data_for, describe, medium_of, open_data
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath, to_path
from tessella.data.base import Sample, Samples, Split
from tessella.errors import ConfigError
from tessella.evaluation.reconstruction import evaluate_reconstruction
from tessella.interop.hub import SCHEME, from_pretrained
from tessella.registry import Spec
from tessella.reporting import Section, Table, write_page
from tessella.storage import write_text
from tessella.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

COMPARISON = "comparison.json"
_TEXT = (
    "Every tokenizer sees the same signals. Usage and perplexity are of the whole set. Bits are those of fixed-length "
    "codes, and of a codec those of the whole file, header included; a codec gets the best file of at most as many "
    "bits as the tokenizer named, or its smallest where none is as small. Memory is what encoding and decoding one "
    "signal takes beside the weights."
)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found: numbers by tokenizer or codec, how they were measured, and where they stand."""

    rows: dict[str, Row]
    protocol: dict[str, Any]
    page: Path
    record: Path

    def print(self, console: Console) -> None:
        """Show the rows."""
        from rich.table import Table as Rows

        header, body = cells(self.rows)
        table = Rows(*header)
        for row in body:
            table.add_row(*row)
        console.print(table)


def compare(
    models: Sequence[AnyPath], *, data: str | None = None, out: AnyPath, split: Split = "test",
    limit: int | None = None, whole: bool = True, crop_px: int | None = None, weights: AnyPath | None = None,
    codecs: Sequence[str] | None = None, num_shown: int = 6, device: str | None = None, command: str | None = None,
) -> Comparison:  # fmt: skip
    """Measure tokenizers on the same signals and write one page to look at, ``report.html``, and ``comparison.json``.

    Args:
        models: runs, saved models, published checkpoints, or names on the hub (``hf://owner/name``).
        data: a folder or file, ``NAME:PATH``, or ``photos``; what the first was trained on by default.
        out: folder of the page and the record.
        split: the part of the data.
        limit: only its first so many signals.
        whole: signals at their own size, padded to the stride, instead of windows of them.
        crop_px: windows of this side instead, as tokenizers of one size need.
        weights: folder with the weights of perceptual metrics; these are left out without it.
        codecs: which of the medium's; all by default.
        num_shown: signals on the page.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.
        command: shown on the page; the command line of this process by default.

    Raises:
        CheckpointError, ConfigError, DataError: a model, data or weights that cannot be used.
    """
    out, weights = Path(out), to_path(weights)
    started = time.monotonic()
    if not models:
        raise ConfigError("compare needs at least one model")
    place = pick_device(device)
    tokenizers = dict(zip(_labels(models), (from_pretrained(model, device=place) for model in models), strict=True))
    first = next(iter(tokenizers.values()))
    whole = whole and crop_px is None
    trained: Spec = (first.recipe or {}).get("data", {}) if data is None else {}
    section = data_for(trained, data, whole=whole, split=split)
    section = section if crop_px is None else {**section, "crop_px": crop_px, "resize_px": crop_px}
    medium, dataset = medium_of(first, section), open_data(section, split)
    yardsticks = chosen_codecs(medium, codecs)
    rows = {label: Row([], {}) for label in tokenizers}
    protocol: dict[str, Any] = {}
    for label, tokenizer in tokenizers.items():
        record = evaluate_reconstruction(
            tokenizer, batches(dataset, whole=whole, limit=limit, title=label), medium.metrics(weights=weights),
            data=describe(section, split),
        )  # fmt: skip
        rows[label] = tokenizer_row(record, tokenizer, dataset[0])
        protocol = record.protocol
    budgets = distinct_budgets({label: row.values[medium.metrics().bits_name] for label, row in rows.items()})
    for name, codec in yardsticks.items():
        for label, budget in budgets.items():
            title = f"{name} as {label}" if len(budgets) > 1 else name
            parts = batches(dataset, whole=True, limit=limit, title=title)
            rows[title] = codec_row(codec, parts, medium.metrics(weights=weights), budget)
    shown = [dataset[index] for index in _spread(dataset, num_shown, limit)]
    versions = {label: [_rebuilt(tokenizer, sample) for sample in shown] for label, tokenizer in tokenizers.items()}
    most = max(budgets.values()) / medium.metrics().bits_scale
    for name, codec in yardsticks.items():
        versions[name] = [codec(sample["x"], most * math.prod(sample["x"].shape[1:])).x_hat for sample in shown]
    sides = medium.show_versions([sample["x"] for sample in shown], versions, [sample["key"] for sample in shown])
    header, body = cells(rows)
    page = write_page(
        out, title=f"{len(tokenizers)} tokenizers on {section.get('path', section['name'])}",
        summary=", ".join(tokenizers), numbers=[], sections=[Section("Numbers", _TEXT, [Table(header, body)]), sides],
        command=command or shlex.join(["tessella", *sys.argv[1:]]), seconds=time.monotonic() - started,
    )  # fmt: skip
    values = {label: row.values for label, row in rows.items()}
    text = json.dumps({"rows": values, "protocol": protocol}, indent=2, allow_nan=False) + "\n"
    write_text(out / COMPARISON, text)
    return Comparison(rows, protocol, page, out / COMPARISON)


def _labels(models: Sequence[str | Path]) -> list[str]:
    """Short names, all different."""
    full = [str(model).removeprefix(SCHEME) for model in models]
    short = [Path(name).stem if Path(name).suffix else Path(name).name for name in full]
    names = short if len(set(short)) == len(short) else full
    if len(set(names)) < len(names):
        raise ConfigError(f"compare: one model is named twice among {', '.join(full)}")
    return names


def _spread(dataset: Samples, count: int, limit: int | None) -> list[int]:
    """Samples from all over the data, the same every time."""
    size = len(dataset) if limit is None else min(limit, len(dataset))
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count].tolist())


def _rebuilt(tokenizer: Tokenizer, sample: Sample) -> Tensor:
    x, context = on_device(sample, tokenizer)
    indices = tokenizer.encode(x, context, pad=True)
    return tokenizer.decode(indices, context, extent=x.shape[2:])[0].cpu()
