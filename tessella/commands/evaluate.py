"""``tessella evaluate``: numbers of a tokenizer's reconstructions, or of a generator's samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tessella.checkpoint import load
from tessella.commands._data import batches, data_of, describe, medium_of, named, open_data
from tessella.commands._device import pick_device
from tessella.commands._distribution import features_of, reference_of
from tessella.commands._paths import AnyPath, to_path
from tessella.commands._predictions import load_predictor, predicts
from tessella.commands._samples import Rates, evaluate_samples
from tessella.commands.build import is_generator
from tessella.data.base import Batch, Split, to_device
from tessella.errors import ConfigError
from tessella.evaluation.distribution import (
    DistributionRecord,
    evaluate_distribution,
    evaluate_reconstruction_distribution,
)
from tessella.evaluation.features import Features
from tessella.evaluation.reconstruction import ReconstructionRecord, evaluate_reconstruction
from tessella.evaluation.reference import ReferenceStatistics
from tessella.generators.drawing import SampleSettings
from tessella.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

EVALUATION = "evaluation.json"
PREDICTIONS = "predictions.json"


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        reconstruction: of a tokenizer.
        distribution: under a protocol, of a tokenizer's reconstructions or a generator's samples.
        rates: of a generator.
        files: where the records are, and what else was written.
    """

    reconstruction: ReconstructionRecord | None
    distribution: DistributionRecord | None
    rates: Rates | None
    files: tuple[Path, ...]

    def print(self, console: Console) -> None:
        """Show the numbers, with their protocols below."""
        for record in (self.reconstruction, self.distribution):
            if record is not None:
                record.print(console)
        if self.rates is not None:
            console.print(str(self.rates), highlight=False)


def evaluate(
    model: AnyPath, *, data: str | None = None, split: Split = "test", limit: int | None = None, whole: bool = False,
    weights: AnyPath | None = None, metrics: Mapping[str, Any] | None = None, protocol: str | None = None,
    features: AnyPath | None = None, reference: str | None = None, samples: int = 1000,
    settings: SampleSettings | None = None, out: AnyPath | None = None, device: str | None = None,
) -> Evaluation:  # fmt: skip
    """Measure a tokenizer's reconstructions, or a generator's samples, and write the records.

    Of a generator that reads contexts (dense prediction), ``predictions.json``: the tokenizer's numbers with the
    likeliest codes in the place of the label's own; settings of sampling have no part in them. With a protocol also
    ``predictions-PROTOCOL.json``, against the originals.
    Of a tokenizer, ``evaluation.json`` and with a protocol ``distribution-PROTOCOL.json``. Of a generator,
    ``samples-PROTOCOL.json``, and the training signals nearest to some samples, a check for memorised ones.

    Args:
        model: a run, a checkpoint, or a saved model.
        data: a folder or file, ``NAME:PATH``, or ``photos``; what the tokenizer was trained on by default.
        split: the part of it that is measured, or that samples are held against.
        limit: only its first so many signals.
        whole: signals at their own size, padded to the stride, instead of windows of them; of a tokenizer alone.
        weights: folder with the weights of perceptual metrics; these are left out without it.
        metrics: choices of the medium's metrics; see :meth:`tessella.media.base.Medium.metrics`.
        protocol: how distances between distributions are measured, see
            :data:`tessella.evaluation.protocols.PROTOCOLS`; none of a tokenizer and ``efflite0`` of a generator by
            default.
        features: the weights of its network: a file, or a folder that holds them; ``weights`` by default.
        reference: ``train`` or ``test``, the (first ``limit``) signals of that part of the data, or a published
            reference ``.npz``; by default the originals of the reconstructions, or ``split`` for samples.
        samples: how many of a generator.
        settings: how they are drawn.
        out: folder for the records; the model's by default.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.

    Raises:
        CheckpointError, ConfigError, DataError: a model, a data set, weights, a signal or a setting that cannot be
            used. All that can be refused before the work begins is.
    """
    model, out = Path(model), to_path(out)
    weights, features = to_path(weights), to_path(features)
    place = pick_device(device)
    folder = out or (model if model.is_dir() else model.parent)
    if is_generator(model):
        if whole:
            raise ConfigError("--whole is for tokenizers: a generator's samples have one size")
        if predicts(model):
            return _predictions(model, data, split=split, limit=limit, weights=weights, metrics=metrics or {},
                                protocol=protocol, features=features, out=folder, device=place)  # fmt: skip
        record, rates, files = evaluate_samples(
            model, protocol=protocol or "efflite0", features=features or weights, data=data, split=split, limit=limit,
            reference=reference, count=samples, settings=settings or SampleSettings(), out=folder, device=place,
        )  # fmt: skip
        return Evaluation(None, record, rates, files)
    tokenizer = load(model, device=place)
    section = data_of(tokenizer, data, whole=whole, split=split)
    medium, dataset = medium_of(tokenizer, section), open_data(section, split)
    network = None if protocol is None else medium.feature_network(protocol, features or weights, place)
    against: Features | ReferenceStatistics | None = None
    if network is not None and reference is not None:
        against = reference_of(reference, tokenizer, network, data=data, whole=whole, limit=limit)
    elif network is not None and tokenizer.autoencoder.takes_context:
        against = features_of(dataset, network, limit)
    measured = medium.metrics(weights=weights, protocol=protocol, **(metrics or {}))
    reconstruction = evaluate_reconstruction(
        tokenizer,
        batches(dataset, whole=whole, limit=limit, title="evaluate"),
        measured,
        data=describe(section, split),
    )
    written = [folder / EVALUATION]
    reconstruction.write(written[0])
    distribution = None
    if network is not None:
        again = batches(dataset, whole=whole, limit=limit, title=f"evaluate {protocol}")
        if against is None:
            name = f"originals of {named(section, split)}"
            distribution = evaluate_reconstruction_distribution(tokenizer, again, network, reference_name=name)
        else:
            distribution = evaluate_distribution(_rebuilt(tokenizer, again), against, network)
        written.append(folder / f"distribution-{protocol}.json")
        distribution.write(written[-1])
    return Evaluation(reconstruction, distribution, None, tuple(written))


def _predictions(
    model: Path, data: str | None, *, split: Split, limit: int | None, weights: Path | None,
    metrics: Mapping[str, Any], protocol: str | None, features: Path | None, out: Path, device: torch.device,
) -> Evaluation:  # fmt: skip
    """Measure what a generator and its tokenizer's decoder predict from contexts alone."""
    predictor, tokenizer = load_predictor(model, device=device)
    section = data_of(tokenizer, data, split=split)
    medium, dataset = medium_of(tokenizer, section), open_data(section, split)
    network = None if protocol is None else medium.feature_network(protocol, features or weights, device)
    record = evaluate_reconstruction(
        predictor,
        batches(dataset, limit=limit, title="predict"),
        medium.metrics(weights=weights, **metrics),
        data=describe(section, split),
    )
    record.write(out / PREDICTIONS)
    if network is None:
        return Evaluation(record, None, None, (out / PREDICTIONS,))
    again = batches(dataset, limit=limit, title=f"predict {protocol}")
    distribution = evaluate_distribution(
        _rebuilt(predictor, again), features_of(dataset, network, limit), network,
        reference_name=f"originals of {named(section, split)}",
    )  # fmt: skip
    file = out / f"predictions-{protocol}.json"
    distribution.write(file)
    return Evaluation(record, distribution, None, (out / PREDICTIONS, file))


def _rebuilt(tokenizer: Tokenizer, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The reconstructions of each batch."""
    for batch in batches:
        moved = to_device(batch, tokenizer.device)
        x, context = moved["x"], moved.get("context")
        yield tokenizer.decode(tokenizer.encode(x, context, pad=True), context, extent=x.shape[2:])
