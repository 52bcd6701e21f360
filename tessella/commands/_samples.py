"""Judging a generator by its samples."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tessella.checkpoint import load_generator
from tessella.commands._data import batches, data_of, medium_of, named, open_data
from tessella.commands._distribution import features_of, reference_of
from tessella.commands._progress import drawing
from tessella.data.base import Samples, Split
from tessella.errors import ConfigError
from tessella.evaluation.compression import compression_cost
from tessella.evaluation.distribution import (
    DistributionRecord,
    DistributionSettings,
    Metric,
    evaluate_distribution,
)
from tessella.evaluation.features import FeatureNetwork, Features
from tessella.evaluation.manifold import nearest_neighbours
from tessella.evaluation.reference import ReferenceStatistics
from tessella.generators.base import Generator
from tessella.generators.drawing import SampleSettings, check_options, chunks, draw_batches, labels_of
from tessella.storage import write_text
from tessella.tokenizer import Tokenizer
from tessella.training.generator import GeneratorStep

_BATCH = 64
_JUDGED = 8  # samples whose nearest training signals are shown
_NEIGHBOURS = 4


@dataclass(frozen=True)
class Rates:
    """What a generator's tokens cost.

    Attributes:
        bits_per_token: of real signals; see :func:`tessella.evaluation.compression.compression_cost`.
        log2_codebook_size: the same for a generator that knows nothing.
        samples_per_second, tokens_per_second: of sampling, decoding to signals included.
    """

    bits_per_token: float
    log2_codebook_size: float
    samples_per_second: float
    tokens_per_second: float

    def __str__(self) -> str:
        """In one line."""
        return (
            f"{self.bits_per_token:.3f} of {self.log2_codebook_size:.3f} bits per token of real data; sampling "
            f"{self.samples_per_second:.1f} samples/s, {self.tokens_per_second:.0f} tokens/s"
        )


def evaluate_samples(
    model: Path, *, protocol: str, features: Path | None, data: str | None, split: Split, limit: int | None,
    reference: str | None, count: int, settings: SampleSettings, out: Path, device: torch.device,
) -> tuple[DistributionRecord, Rates, tuple[Path, ...]]:  # fmt: skip
    """Judge ``count`` samples, balanced over the classes; see :func:`tessella.commands.evaluate.evaluate`."""
    generator, tokenizer = load_generator(model, device=device)
    check_options(generator, settings.options)
    section = data_of(tokenizer, data, split=split)
    medium, dataset = medium_of(tokenizer, section), open_data(section, split)
    network = medium.feature_network(protocol, features, device)
    labels = labels_of(generator, (), count)
    try:
        bits = compression_cost(generator, _token_batches(generator, tokenizer, dataset, limit))
    except ValueError as error:
        raise ConfigError(f"the signals of {named(section, split)} do not fit this generator: {error}") from error
    against: Features | ReferenceStatistics
    metrics: tuple[Metric, ...] = ("frechet", "score")
    if reference is None:
        against, metrics = (
            features_of(dataset, network, limit),
            (*metrics, "precision_recall", "kernel", "density_coverage"),
        )
    else:
        against = reference_of(reference, tokenizer, network, data=data, whole=False, limit=limit)
    drawn = _Drawn(generator, tokenizer, labels, count, settings)
    sampled = network.extract(iter(drawn))
    record = evaluate_distribution(
        sampled, against, network, settings=DistributionSettings(metrics=metrics), reference_name=named(section, split)
    )
    file = out / f"samples-{protocol}.json"
    space = generator.space
    rates = Rates(
        bits, math.log2(space.codebook_size), count / drawn.seconds, count * space.sequence_length / drawn.seconds
    )
    contents = {**record.to_dict(), "rates": asdict(rates), "sampling": asdict(settings)}
    write_text(file, json.dumps(contents, indent=2, allow_nan=False) + "\n")
    training = open_data(data_of(tokenizer, data, split="train"), "train")
    rows = _neighbours(drawn.first, sampled.pool[:_JUDGED], training, network, limit)
    return record, rates, (file, medium.preview(rows, file.with_suffix("")))


class _Drawn:
    """Samples as they are drawn; only the first few are kept, and the seconds that drawing took."""

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, labels: list[int] | None, count: int, settings: SampleSettings
    ) -> None:
        parts = drawing(chunks(range(count), _BATCH), "samples")
        self._batches = draw_batches(generator, tokenizer, labels=labels, chunks=parts, settings=settings)
        self._first: list[Tensor] = []
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            started = time.monotonic()
            x = next(self._batches, None)
            self.seconds += time.monotonic() - started
            if x is None:
                return
            if sum(map(len, self._first)) < _JUDGED:
                self._first.append(x[:_JUDGED].clone())
            yield x

    @property
    def first(self) -> Tensor:
        return torch.cat(self._first)[:_JUDGED]


def _token_batches(
    generator: Generator, tokenizer: Tokenizer, dataset: Samples, limit: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Tokens and conditions of the first ``limit`` signals."""
    step = GeneratorStep(generator, tokenizer).eval()
    for batch in batches(dataset, limit=limit, title="bits per token"):
        yield step.tokens_and_condition(batch)


def _neighbours(
    samples: Tensor, pool: Tensor, training: Samples, network: FeatureNetwork, limit: int | None
) -> list[Tensor]:
    """A row for each sample: it, and the training signals whose features are nearest."""
    known = features_of(training, network, limit)
    nearest = nearest_neighbours(pool, known.pool, k=_NEIGHBOURS).indices.tolist()
    wanted = set(itertools.chain(*nearest))
    # The features are those of these batches, which leave out what cannot be read.
    every = enumerate(x for batch in batches(training, limit=limit, title="nearest in training") for x in batch["x"])
    signals = {number: x for number, x in every if number in wanted}
    return [
        torch.stack([sample, *(signals[number] for number in numbers)])
        for sample, numbers in zip(samples, nearest, strict=True)
    ]
