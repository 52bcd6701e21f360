"""The rows of ``tessella compare``: what a tokenizer, or a codec, is measured by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tessella.data.base import Batch, Sample
from tessella.errors import ConfigError
from tessella.evaluation.base import Metrics, Number
from tessella.evaluation.memory import peak_bytes
from tessella.evaluation.reconstruction import ReconstructionRecord
from tessella.media.base import Codec, Medium
from tessella.tokenizer import Tokenizer

_SAME = 0.02  # budgets that differ by less are one
_MIB = 2**20


class Row(NamedTuple):
    """Numbers for people, and the same as values by their keys."""

    numbers: list[Number]
    values: dict[str, Any]


def on_device(sample: Sample, tokenizer: Tokenizer) -> tuple[Tensor, Tensor | None]:
    """One signal ``[1, C, *X]``, and its context if it has one, where the tokenizer is."""
    x, context = sample["x"][None].to(tokenizer.device), sample.get("context")
    return x, None if context is None else context[None].to(tokenizer.device)


def tokenizer_row(record: ReconstructionRecord, tokenizer: Tokenizer, sample: Sample) -> Row:
    """The headline of its evaluation, its speed, and what one signal costs in bits and memory."""
    x, context = on_device(sample, tokenizer)
    bits = tokenizer.encode(x, context, pad=True).numel() * math.log2(tokenizer.quantizer.codebook_size)
    count = sum(parameter.numel() for parameter in tokenizer.parameters())
    memory = peak_bytes(tokenizer, x, context) / _MIB
    numbers = [number for number in record.numbers if number.key in record.headline or "per_sec" in number.key]
    numbers += [
        Number("bits", "bits each", f"{bits:,.0f}", "of the first signal"),
        Number("parameters", "parameters", f"{count:,}", "numbers that are trained"),
        Number("memory_mib", "memory, MiB", f"{memory:,.1f}", "of tensors, beside the weights"),
    ]
    return Row(numbers, {**record.values, "bits": bits, "parameters": count, "memory_mib": memory})


def codec_row(codec: Codec, batches: Iterable[Batch], metrics: Metrics, budget: float) -> Row:
    """What a codec makes of at most ``budget`` bits, in the unit of the metrics' ``bits_name``."""
    name = metrics.bits_name
    spent = size = 0.0
    for batch in batches:
        for x in batch["x"]:
            positions = math.prod(x.shape[1:]) / metrics.bits_scale
            made = codec(x, budget * positions)
            metrics.update(x[None], made.x_hat[None], batch)
            spent, size = spent + made.bits, size + positions
    values = {**metrics.compute(), name: spent / size}
    numbers = metrics.readable({**values, "protocol": {"meaning": metrics.meanings()}})
    numbers = [number for number in numbers if number.key in metrics.headline]
    numbers.append(Number(name, name.replace("_", " "), f"{spent / size:.4f}", "of whole files"))
    return Row(numbers, values)


def distinct_budgets(bits: Mapping[str, float]) -> dict[str, float]:
    """The first tokenizer of each different length, with it."""
    found: dict[str, float] = {}
    for label, length in bits.items():
        if all(abs(length / other - 1) > _SAME for other in found.values()):
            found[label] = length
    return found


def chosen_codecs(medium: Medium, wanted: Sequence[str] | None) -> dict[str, Codec]:
    """Those of the medium; all of them, or the wanted.

    Raises:
        ConfigError: one that cannot be had.
    """
    there = medium.codecs()
    for name in wanted or ():
        if name.upper() not in there:
            raise ConfigError(f"no codec {name!r} for {medium.unit} here; there are: {', '.join(there) or 'none'}")
    return there if wanted is None else {name.upper(): there[name.upper()] for name in wanted}


def cells(rows: Mapping[str, Row]) -> tuple[list[str], list[list[str]]]:
    """Heading and body of a table, with a column for every label that some row has."""
    labels = list(dict.fromkeys(number.label for row in rows.values() for number in row.numbers))
    found = {name: {number.label: number.value for number in row.numbers} for name, row in rows.items()}
    return ["", *labels], [[name, *(cells.get(label, "") for label in labels)] for name, cells in found.items()]
