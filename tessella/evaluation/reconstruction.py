"""Reconstruction quality over a data set, together with the protocol that makes the numbers comparable."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessella.data.base import Batch, of_one_size, to_device
from tessella.evaluation.base import Metrics, Number
from tessella.evaluation.codebook import CodeCounter
from tessella.storage import write_text

if TYPE_CHECKING:
    from rich.console import Console

    from tessella.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReconstructionRecord:
    """The result of :func:`evaluate_reconstruction`.

    Attributes:
        values: all numbers by name: those of the metrics; ``usage`` and ``perplexity`` of the whole set; the length of
            the tokens as fixed-length codes (``bits_per_pixel`` of pictures); signals a second of encoding and
            decoding; ``seconds`` of the whole evaluation; ``num_skipped``, signals that could not be read.
        protocol: how they were measured; two records compare only if this agrees.
        numbers: the values for people.
        line: the protocol in one line, to stand beside the numbers wherever they are quoted.
        codes: the counts behind usage and perplexity; not part of the JSON.
    """

    values: dict[str, Any]
    protocol: dict[str, Any]
    numbers: list[Number] = field(repr=False)
    headline: frozenset[str] = field(repr=False)
    line: str
    codes: CodeCounter = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        """A number by its name."""
        return self.values[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dictionaries: what the JSON holds."""
        return {**self.values, "protocol": self.protocol}

    def to_json(self) -> str:
        """Strict JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def write(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file that appears complete or not at all."""
        write_text(Path(path), self.to_json() + "\n")

    def print(self, console: Console) -> None:
        """Show the numbers as a table, with the protocol below."""
        from rich.table import Table

        table = Table("metric", "value")
        for number in self.numbers:
            table.add_row(number.label, number.value)
        console.print(table)
        console.print(self.line, style="dim", markup=False, highlight=False)


@torch.no_grad()
def evaluate_reconstruction(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    metrics: Metrics,
    *,
    data: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReconstructionRecord:
    """Encode and decode every signal and compare.

    Args:
        tokenizer: evaluated in eval mode on the device it is on, and left in the mode it was in.
        batches: signals ``x [B, C, *X]`` in [-1, 1]; sizes may differ between batches, and within one that says where
            its signals end (``extent``): these are taken one by one.
        metrics: what reconstructions are scored by.
        data: says which signals these are (JSON values); stored in the protocol.
        progress: called with the number of signals done, after each batch.

    Raises:
        ValueError: no signal at all, NaN in a reconstruction (its key is named), or signals that a metric refuses.
        ModuleNotFoundError: a package that a metric needs is missing.
    """
    device = _device_of(tokenizer)
    codes = CodeCounter(tokenizer.quantizer.codebook_size, tokenizer.quantizer.num_codebooks)
    sizes: Counter[str] = Counter()
    timings: list[tuple[int, int, float]] = []  # signals, positions, seconds
    num_skipped = num_positions = 0
    start = time.perf_counter()
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        for batch in batches:
            num_skipped += len(batch["skipped"])
            for part in of_one_size(batch):
                x = to_device(part, device)["x"]
                indices, x_hat, seconds = _reconstruct(tokenizer, to_device(part, device))
                _check_finite(x_hat, part["key"])
                codes.update(indices)
                metrics.update(x, x_hat, part)
                timings.append((len(x), len(x) * math.prod(x.shape[2:]), seconds))
                sizes["x".join(map(str, x.shape[2:]))] += len(x)
                num_positions += len(x) * math.prod(x.shape[2:])
            if progress is not None:
                progress(sizes.total())
    finally:
        tokenizer.train(was_training)
    if not sizes:
        raise ValueError(f"batches held nothing to evaluate ({num_skipped} were skipped as unreadable)")
    bits = codes.num_positions * codes.num_codebooks * math.log2(codes.codebook_size) / num_positions
    values = {
        **metrics.compute(),
        "usage": codes.usage,
        "perplexity": codes.perplexity,
        metrics.bits_name: bits * metrics.bits_scale,
        f"{metrics.signals}_per_sec": _rates(timings)[0],
        **metrics.rates(_rates(timings)[1]),
        "seconds": time.perf_counter() - start,
        "num_skipped": num_skipped,
    }
    protocol = {
        **metrics.protocol(),
        f"num_{metrics.signals}": sizes.total(),
        "sizes": dict(sizes),
        "data": dict(data or {}),
        "meaning": {**_meanings(metrics), **metrics.meanings()},
    }
    record = {**values, "protocol": protocol}
    headline = metrics.headline | {"usage", "perplexity", metrics.bits_name}
    return ReconstructionRecord(
        values, protocol, _readable(record, metrics), headline, _line(protocol, metrics), codes
    )  # fmt: skip


def _meanings(metrics: Metrics) -> dict[str, str]:
    """What each number means that any signal has, in words, by its name."""
    return {
        "path": "encode to indices, decode from indices, in eval mode; sides padded to the stride, then cropped",
        f"num_{metrics.signals}": f"{metrics.signals} measured",
        "num_skipped": f"{metrics.signals} that could not be read",
        "usage": "share of the codes that occur anywhere in the set; mean over codebooks",
        "perplexity": "exp of the entropy of the code frequencies of the whole set; mean over codebooks",
        metrics.bits_name: "K log2(V) bits at each latent position, without entropy coding",
        f"{metrics.signals}_per_sec": "encode and decode only; the first batch (warm-up) is left out if there are more",
    }


def _readable(record: Mapping[str, Any], metrics: Metrics) -> list[Number]:
    meaning = record["protocol"]["meaning"]
    rate, count = f"{metrics.signals}_per_sec", f"num_{metrics.signals}"
    rows = [
        ("usage", "codebook usage", f"{100 * record['usage']:.2f} %"),
        ("perplexity", "perplexity", f"{record['perplexity']:,.1f}"),
        (metrics.bits_name, metrics.bits_name.replace("_", " "), f"{record[metrics.bits_name]:.4f}"),
        (rate, f"{metrics.signals} per second", f"{record[rate]:,.1f}"),
        (count, metrics.signals, f"{record['protocol'][count]:,}"),
        ("num_skipped", "skipped", f"{record['num_skipped']:,}"),
    ]
    return metrics.readable(record) + [Number(*row, meaning[row[0]]) for row in rows]


def _line(protocol: Mapping[str, Any], metrics: Metrics) -> str:
    sizes = sorted(protocol["sizes"].items(), key=lambda item: -item[1])
    shown = ", ".join(size for size, _ in sizes[:3]) + (f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else "")
    parts = [
        f"{protocol[f'num_{metrics.signals}']:,} {metrics.signals} of {shown}",
        *metrics.protocol_parts(protocol),
        *(f"{key} {value}" for key, value in protocol["data"].items() if value is not None),
    ]
    return "; ".join(parts)


def _reconstruct(tokenizer: Tokenizer, batch: Batch) -> tuple[Tensor, Tensor, float]:
    """Indices, reconstruction and the seconds that both took."""
    x, context = batch["x"], batch.get("context")
    beside = () if context is None else (context,)
    _synchronize(x.device)
    start = time.perf_counter()
    indices = tokenizer.encode(x, *beside, pad=True)
    x_hat = tokenizer.decode(indices, *beside, extent=x.shape[2:])
    _synchronize(x.device)
    return indices, x_hat, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _check_finite(x_hat: Tensor, keys: list[str]) -> None:
    finite = x_hat.isfinite().flatten(1).all(1).tolist()
    broken = [key for key, good in zip(keys, finite, strict=True) if not good]
    if broken:
        raise ValueError(f"the reconstruction holds NaN or infinity for: {', '.join(broken[:5])}")


def _rates(timings: list[tuple[int, int, float]]) -> tuple[float, float]:
    """Signals and positions a second."""
    counts, positions, seconds = zip(*(timings[1:] or timings), strict=True)
    return sum(counts) / sum(seconds), sum(positions) / sum(seconds)


def _device_of(tokenizer: Tokenizer) -> torch.device:
    first = next(itertools.chain(tokenizer.parameters(), tokenizer.buffers()), None)
    return torch.device("cpu") if first is None else first.device
