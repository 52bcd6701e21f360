"""The commands as functions: from a recipe to a trained run, and from a run to tokens, pictures, numbers and a page."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from tessella.checkpoint import (
    RECIPE,
    TOKENIZER,
    fingerprint,
    latest_checkpoint,
    load,
    load_generator,
    load_recipe,
    model_folder,
    write_text,
)
from tessella.config import (
    ConfigError,
    Spec,
    build_section,
    differences,
    find,
    override,
    read_recipe,
    resolve_recipe,
    to_toml,
)
from tessella.data._variants import Variants
from tessella.data.base import Batch, DataError, ImageDataset, Samples, SkipBudget, Split, evaluation_batches
from tessella.data.token_shards import TokenShards
from tessella.data.tokens import MANIFEST, TokenRow, TokenWriter, read_tokens
from tessella.evaluation.compression import compression_cost
from tessella.evaluation.distribution import (
    DistributionRecord,
    DistributionSettings,
    Metric,
    ReferenceStatistics,
    evaluate_distribution,
    evaluate_reconstruction_distribution,
    nearest_neighbours,
    reference_features,
    reference_statistics,
)
from tessella.evaluation.features import FeatureNetwork, Features
from tessella.evaluation.protocols import EFFLITE0, find_protocol, load_adm_reference
from tessella.evaluation.reconstruction import Pixels, ReconstructionRecord, evaluate_reconstruction
from tessella.generate import SampleSettings, balanced, draw_batches, write_samples
from tessella.generators.base import Generator
from tessella.losses.perceptual import LPIPS, Network
from tessella.report import Section, samples_section, save_image_grid, write_generator_report, write_report
from tessella.tokenizer import Tokenizer, TokenSpace
from tessella.training.base import Step
from tessella.training.generator import GeneratorStep
from tessella.training.logs import LOG, read_log
from tessella.training.loop import Loop
from tessella.training.tokenizer import TokenizerStep

logger = logging.getLogger("tessella")

EVALUATION = "evaluation.json"
EFFLITE0_WEIGHTS = "efficientnet_lite0.fp16.safetensors"
_EVALUATION_BATCH = 64
_PICTURES_SHOWN = 12
_QUICKSTART_GUIDANCE = "1.5"


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; without a name the accelerator there is, or the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {error}") from error
    return device


def train(
    recipe: str, *, data: str | None = None, tokenizer: Path | None = None, weights: Path | None = None,
    init: Path | None = None, out: Path | None = None, overrides: Sequence[str] = (), overfit_batch: bool = False,
    device: str | None = None, quiet: bool = False,
) -> Path:  # fmt: skip
    """Train what ``recipe`` (a name or a .toml file) describes; continue where an interrupted run stopped.

    Args:
        recipe: see :func:`tessella.config.read_recipe`.
        data: replaces the recipe's data set; see :func:`data_section`.
        tokenizer: whose tokens a generator learns; see :func:`tessella.load`.
        weights: folder with the weights of perceptual metrics, for recipes with such a loss.
        init: a model whose weights the training starts from; ``training.init`` of the recipe.
        out: folder of the run; ``runs/<recipe>`` if None.
        overrides: ``"section.key=value"``.
        overfit_batch: learn one batch by heart, a first check of any recipe, in ``runs/<recipe>-overfit``.
        device: see :func:`pick_device`.
        quiet: no progress on the terminal and no sample pictures.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: a recipe that cannot be built, or a folder that holds a run of another recipe.
        TrainingError, Interrupted: see :meth:`tessella.training.loop.Loop.run`.
    """
    raw = override(read_recipe(recipe), overrides)
    if data is not None:
        raw["data"] = data_section(raw.get("data", {}), data)
    if init is not None:
        raw["training"] = {**raw.get("training", {}), "init": str(init)}
    if overfit_batch:
        raw["training"] = {**raw.get("training", {}), "overfit_batch": True}
    folder = out or Path("runs") / (Path(recipe).stem + ("-overfit" if overfit_batch else ""))
    kind = _prepare_generator if "generator" in raw else _prepare_tokenizer
    resolved, make_step = kind(raw, folder, tokenizer=tokenizer, weights=weights, device=pick_device(device))
    _claim(folder, resolved)
    loop: Loop = build_section(resolved, "training")
    torch.manual_seed(loop.seed)
    step = make_step(resolved)
    dataset: Samples = build_section(resolved, "data", split="train")
    loop.run(step, dataset, folder, device=pick_device(device), show=None if quiet else save_image_grid, quiet=quiet)
    return folder


def _prepare_tokenizer(
    raw: Spec, folder: Path, *, tokenizer: Path | None, weights: Path | None, device: torch.device
) -> tuple[Spec, Callable[[Spec], Step]]:
    """The resolved recipe of a tokenizer, and what makes its training step."""
    if tokenizer is not None:
        raise ConfigError("--tokenizer is for recipes of generators; this one trains a tokenizer")
    if weights is not None:
        raw["loss"] = {**raw.get("loss", {}), "weights": str(weights)}
    resolved = resolve_recipe(raw)
    steps, adversary = resolved["training"]["steps"], resolved["loss"]["adversary"]
    if adversary is not None and adversary["start_step"] >= steps:
        raise ConfigError(
            f"loss.adversary.start_step ({adversary['start_step']}) is not before the end of the training "
            f"(training.steps = {steps}): the discriminator would never start"
        )

    def make(recipe: Spec) -> Step:
        step: TokenizerStep = build_section(recipe, "loss", tokenizer=_tokenizer(recipe))
        return step

    return resolved, make


def _prepare_generator(
    raw: Spec, folder: Path, *, tokenizer: Path | None, weights: Path | None, device: torch.device
) -> tuple[Spec, Callable[[Spec], Step]]:
    """The same of a generator, with its tokenizer copied into the run's folder."""
    if weights is not None:
        raise ConfigError("--weights is for recipes of tokenizers with a perceptual loss; this one trains a generator")
    copy = folder / TOKENIZER
    if tokenizer is None and not copy.is_dir():
        raise ConfigError("a generator needs a tokenizer: give its run or folder with --tokenizer")
    source = load(tokenizer or copy, device=device)
    raw.setdefault("data", (source.recipe or {}).get("data", {}))
    dataset: Samples = build_section(raw, "data", split="train")
    raw["space"] = asdict(_token_space(source, dataset))
    raw["generator"] = _with_classes(raw["generator"], dataset)
    resolved = resolve_recipe(raw)

    def make(recipe: Spec) -> Step:
        if not copy.is_dir():
            source.save(copy)
        generator: Generator = build_section(recipe, "generator", space=build_section(recipe, "space"))
        generator.recipe = recipe
        # A codebook may be too large to be built, and a checkpoint holds what was made of it.
        if type(generator).fit_codebook is not Generator.fit_codebook and latest_checkpoint(folder) is None:
            generator.fit_codebook(source.quantizer.codebook, seed=recipe["training"]["seed"])
        return GeneratorStep(generator, source)

    return resolved, make


def _token_space(tokenizer: Tokenizer, dataset: Samples) -> TokenSpace:
    """The tokens that ``tokenizer`` makes of the samples of ``dataset``, or that they are."""
    if isinstance(dataset, TokenShards):
        if dataset.space.fingerprint != fingerprint(tokenizer):
            raise ConfigError(
                f"the shards hold tokens of tokenizer {dataset.space.fingerprint}, not of {fingerprint(tokenizer)}"
            )
        return dataset.space
    size = getattr(dataset, "crop_px", None)
    if size is None:
        raise ConfigError("a generator needs pictures of one size: set data.crop_px")
    return tokenizer.token_space(size, size)


def _with_classes(generator: Spec, dataset: Samples) -> Spec:
    """A [generator] whose label conditioner knows the classes of ``dataset``, where the recipe names none."""
    conditioner = generator.get("conditioner", {})
    if conditioner.get("name") != "label" or "num_classes" in conditioner:
        return generator
    if not dataset.class_names:
        raise ConfigError(
            "the data set names no classes: give generator.conditioner.num_classes, or conditioner = {name = 'none'}"
        )
    names = list(dataset.class_names)
    return {**generator, "conditioner": {**conditioner, "num_classes": len(names), "class_names": names}}


def _claim(folder: Path, recipe: Spec) -> None:
    """Write the recipe into the run's folder, or see that it is the one already there."""
    file = folder / RECIPE
    text = to_toml(recipe)
    if file.is_file():
        changed = differences(load_recipe(folder), recipe)
        if changed:
            raise ConfigError(
                f"{folder} holds a run of another recipe ({'; '.join(changed)}); choose another --out, or delete it"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; choose another --out")
    else:
        write_text(file, text)


def _tokenizer(recipe: Spec) -> Tokenizer:
    autoencoder = build_section(recipe, "autoencoder")
    quantizer = build_section(recipe, "quantizer")
    tokenizer: Tokenizer = build_section(recipe, "tokenizer", autoencoder=autoencoder, quantizer=quantizer)
    tokenizer.recipe = recipe
    return tokenizer


def data_section(section: Spec, where: str) -> Spec:
    """The data section that reads ``where`` and keeps the recipe's crop, size and flip.

    Args:
        section: the recipe's.
        where: ``photos``, a folder of pictures, or a folder of Parquet files in the Hugging Face layout.

    Raises:
        ConfigError: no such folder.
    """
    if where == "photos":
        return section if section.get("name") == "photos" else {"name": "photos", **_geometry(section)}
    path = Path(where)
    if (path / MANIFEST).is_file() or (path / "train" / MANIFEST).is_file():
        return {"name": "token_shards", "path": str(path)}
    if section.get("name") == "lsun" or (path.is_dir() and any(path.glob("*_lmdb"))):
        chosen = {key: section[key] for key in ("categories",) if key in section}
        return {"name": "lsun", "path": str(path), **chosen, **_geometry(section)}
    if not path.exists():
        raise ConfigError(f"no data at {path}: expected a folder of pictures or of Parquet files, or 'photos'")
    parquet = path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))
    return {"name": "parquet" if parquet else "folder", "path": str(path), **_geometry(section)}


def _geometry(section: Spec) -> Spec:
    return {key: section[key] for key in ("crop_px", "resize_px", "flip") if section.get(key) is not None}


def _data_of(tokenizer: Tokenizer, data: str | None, *, split: Split, whole: bool) -> tuple[ImageDataset, Spec]:
    """The data set to apply a tokenizer to, and its section; by default the one it was trained on."""
    trained: Spec = (tokenizer.recipe or {}).get("data", {})
    section = trained
    if data is not None:
        section = data_section(trained, data)
        if section["name"] in ("folder", "parquet") and section["path"] != trained.get("path") and split == "test":
            section["held_out"] = 1.0  # where nothing was trained on, nothing need be held back
    if not section:
        raise ConfigError("the tokenizer was saved without a data set; name one with --data")
    if whole:
        section = {key: value for key, value in section.items() if key not in ("crop_px", "resize_px")}
    dataset: ImageDataset = build_section({"data": section}, "data", split=split)
    return dataset, {**section, "split": split}


def _total(dataset: Samples, limit: int | None) -> int:
    return len(dataset) if limit is None else min(limit, len(dataset))


def _batches(dataset: Samples, *, whole: bool, limit: int | None, title: str, num_workers: int = 0) -> Iterator[Batch]:
    """Evaluation batches behind a progress bar; skipped pictures are named, and too many of them end it."""
    from rich.console import Console
    from rich.progress import Progress

    budget = SkipBudget()
    total = _total(dataset, limit)
    batch_size = 1 if whole else _EVALUATION_BATCH
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        for batch in evaluation_batches(dataset, batch_size=batch_size, num_workers=num_workers, limit=limit):
            for key, reason in batch["skipped"]:
                logger.warning("skipped %s: %s", key, reason)
            budget.count(batch)
            yield batch
            progress.advance(task, len(batch["key"]) + len(batch["skipped"]))
        budget.check()


def tokenize(
    model: Path, out: Path, *, data: str | None = None, split: Split = "test", limit: int | None = None,
    whole: bool = False, variants: int = 0, device: str | None = None,
) -> int:  # fmt: skip
    """Write the tokens of a data set as Parquet shards into ``out``; returns the number of rows.

    Args:
        model: see :func:`tessella.load`.
        out: folder of the shards.
        data: see :func:`data_section`; the data set of the training by default.
        split: which part of it.
        limit: only the first so many pictures.
        whole: whole pictures at their own size, padded to the stride, instead of crops.
        variants: rows of each picture, its views in so many epochs of training; 0 for one row, its centre.
        device: see :func:`pick_device`.

    Raises:
        CheckpointError, ConfigError, DataError: a model, a data set or a picture that cannot be used; variants without
            crops.
    """
    tokenizer = load(model, device=pick_device(device))
    pictures, _ = _data_of(tokenizer, data, split=split, whole=whole)
    dataset: Samples = pictures
    if variants:
        if pictures.crop_px is None:
            raise ConfigError("variants are random crops: they need data.crop_px, and no whole pictures")
        dataset = Variants(pictures, variants, seed=0)
        limit = None if limit is None else limit * variants
    count = 0
    with TokenWriter(out, tokenizer.token_space(), class_names=dataset.class_names) as writer:
        for batch in _batches(dataset, whole=whole, limit=limit, title="tokenize"):
            indices = tokenizer.encode(batch["x"].to(tokenizer.device), pad=True).cpu()
            for key, label, tokens in zip(batch["key"], batch["label"].tolist(), indices, strict=True):
                writer.write(key=key, label=label, indices=tokens, extent=batch["x"].shape[2:])
                count += 1
    return count


def reconstructions(tokenizer: Tokenizer, shards: Path) -> Iterator[tuple[TokenRow, Tensor]]:
    """Each row of token shards with its picture ``[3, H, W]`` in [-1, 1].

    Raises:
        DataError: shards of another tokenizer, or damaged ones.
    """
    for row in read_tokens(shards, fingerprint(tokenizer)):
        indices = row.indices[None].to(tokenizer.device)
        yield row, tokenizer.decode(indices, extent=row.extent)[0].cpu()


def detokenize(model: Path, shards: Path, out: Path, *, limit: int | None = None, device: str | None = None) -> int:
    """Write the pictures that token shards stand for as PNGs into ``out``; returns their number.

    A picture's file is named after its key, sub-folders included; ``.png`` is added where the key does not end in it.
    Where keys are alike, as those of variants are, the files are ``name.png``, ``name.2.png``, ...
    """
    tokenizer = load(model, device=pick_device(device))
    written: set[Path] = set()
    for row, picture in itertools.islice(reconstructions(tokenizer, shards), limit):
        file = _unused(_file_for(out, row.key), written)
        save_image_grid(picture[None], file)
        written.add(file)
    return len(written)


def _file_for(out: Path, key: str) -> Path:
    """A file below ``out`` for a key of any form: keys come from shards, which may be anybody's."""
    relative = Path(key.replace(":", "_"))
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"key {key!r} leads out of the folder {out}")
    # The ending stays, a.jpg and a.png being two pictures.
    return out / (relative if relative.suffix == ".png" else relative.with_name(f"{relative.name}.png"))


def _unused(file: Path, used: Collection[Path]) -> Path:
    """``name.png``, or the first of ``name.2.png``, ``name.3.png``, ... that is not among ``used``."""
    numbered = (file.with_stem(f"{file.stem}.{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([file], numbered) if name not in used)


def evaluate(
    model: Path, *, data: str | None = None, split: Split = "test", limit: int | None = None, whole: bool = False,
    pixels: Pixels = "uint8", weights: Path | None = None, out: Path | None = None, device: str | None = None,
) -> tuple[ReconstructionRecord, Path]:  # fmt: skip
    """Measure a tokenizer's reconstructions and write the record; see :func:`evaluate_reconstruction`.

    Args:
        model, data, split, limit, whole, device: as for :func:`tokenize`.
        pixels: what the metrics see.
        weights: folder with LPIPS weights; LPIPS is left out without it.
        out: folder for ``evaluation.json``; the model's by default.

    Returns:
        The record, and the file it was written to.

    Raises:
        CheckpointError, ConfigError, DataError: a model, a data set, weights or a picture that cannot be used.
    """
    tokenizer = load(model, device=pick_device(device))
    dataset, section = _data_of(tokenizer, data, split=split, whole=whole)
    record = evaluate_reconstruction(
        tokenizer,
        _batches(dataset, whole=whole, limit=limit, title="evaluate"),
        lpips={} if weights is None else {name: LPIPS.from_folder(name, weights) for name in get_args(Network)},
        pixels=pixels,
        data=section,
    )
    file = (out or _folder_of(model)) / EVALUATION
    record.write(file)
    return record, file


def feature_network(protocol: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """The network of ``protocol`` with its weights: a file, or a folder that holds EfficientNet-Lite0's.

    Raises:
        ConfigError: unknown protocol, or no weights given.
        CheckpointError: weights that do not fit.
    """
    try:
        chosen = find_protocol(protocol)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    file = weights / EFFLITE0_WEIGHTS if weights and weights.is_dir() and chosen is EFFLITE0 else weights
    if file is None or file.is_dir():
        raise ConfigError(f"protocol {protocol!r} needs {chosen.network}'s weights: give their file with --features")
    return FeatureNetwork.from_file(chosen, file, device=device)


def evaluate_distribution_of_reconstructions(
    model: Path, *, protocol: str, features: Path | None, data: str | None = None, split: Split = "test",
    limit: int | None = None, whole: bool = False, reference: str | None = None, out: Path | None = None,
    device: str | None = None,
) -> tuple[DistributionRecord, Path]:  # fmt: skip
    """Frechet distance and score of a tokenizer's reconstructions under ``protocol``, and write the record.

    Args:
        model, data, split, limit, whole, device: as for :func:`tokenize`.
        protocol: see :data:`tessella.evaluation.protocols.PROTOCOLS`.
        features: weights of its network, see :func:`feature_network`.
        reference: ``train`` or ``test``, the (first ``limit``) pictures of that part of the data set, or a published
            reference ``.npz``; by default the originals of the reconstructions.
        out: folder for ``distribution-PROTOCOL.json``; the model's by default.
    """
    place = pick_device(device)
    network = feature_network(protocol, features, place)
    tokenizer = load(model, device=place)
    dataset, section = _data_of(tokenizer, data, split=split, whole=whole)
    batches = _batches(dataset, whole=whole, limit=limit, title=f"evaluate {protocol}")
    if reference is None:
        name = f"originals of {_describe(section)}"
        record = evaluate_reconstruction_distribution(tokenizer, batches, network, reference_name=name)
    else:
        rebuilt = (
            tokenizer.decode(tokenizer.encode(x, pad=True), extent=x.shape[2:])
            for x in (batch["x"].to(place) for batch in batches)
        )
        statistics = _reference(reference, tokenizer, network, data=data, whole=whole, limit=limit)
        record = evaluate_distribution(rebuilt, statistics, network)
    file = (out or _folder_of(model)) / f"distribution-{protocol}.json"
    record.write(file)
    return record, file


def _reference(
    reference: str, tokenizer: Tokenizer, network: FeatureNetwork, *, data: str | None, whole: bool, limit: int | None
) -> ReferenceStatistics:
    """The statistics that ``reference`` names: a part of the data set, or a published file."""
    if reference not in get_args(Split):
        return load_adm_reference(reference)
    dataset, section = _data_of(tokenizer, data, split=cast(Split, reference), whole=whole)
    total = _total(dataset, limit)
    with _feature_progress(total) as progress:
        return reference_statistics(
            dataset, network, _cache(), name=_describe(section), num_images=limit and total, progress=progress
        )


def _folder_of(model: Path) -> Path:
    return model if model.is_dir() else model.parent


def _describe(section: Spec) -> str:
    return f"{section.get('path', section['name'])}, {section['split']}"


def is_generator(model: Path) -> bool:
    """Whether a run, checkpoint or saved model is a generator's.

    Raises:
        CheckpointError: there is none.
    """
    return "generator" in load_recipe(model_folder(model))


def _classes(generator: Generator) -> tuple[int | None, tuple[str, ...]]:
    """How many classes a generator knows, None if it has no labels; and their names."""
    conditioner = generator.arguments["conditioner"]
    return conditioner.get("num_classes"), tuple(conditioner.get("class_names", ()))


def _labels(generator: Generator, classes: Sequence[str], count: int) -> list[int] | None:
    """``count`` labels of each of ``classes`` (numbers or names); ``count`` in all, balanced, where none is named."""
    num_classes, names = _classes(generator)
    if num_classes is None:
        if classes:
            raise ConfigError(f"this generator has no classes, got --class {classes[0]}")
        return None
    if not classes:
        return balanced(num_classes, count)
    found = []
    for name in classes:
        label = names.index(name) if name in names else int(name) if name.isdecimal() else num_classes
        if label >= num_classes:
            known = f"; names: {', '.join(names)}" if names else ""
            raise ConfigError(f"unknown class {name!r}; classes are 0 to {num_classes - 1}{known}")
        found.append(label)
    return [label for label in found for _ in range(count)]


def sample(
    model: Path, out: Path, *, classes: Sequence[str] = (), count: int = 16, settings: SampleSettings | None = None,
    batch_size: int = 64, device: str | None = None,
) -> tuple[int, float]:  # fmt: skip
    """Draw pictures from a generator, as PNGs and a grid in ``out``; the same call continues an interrupted one.

    Args:
        model: see :func:`tessella.checkpoint.load_generator`.
        out: folder of the pictures.
        classes: names or numbers; all of them in turn by default.
        count: pictures of each class named, or in all.
        settings: how to draw.
        batch_size: pictures at a time; no part in the result.
        device: see :func:`pick_device`.

    Returns:
        The number of pictures drawn now, and the seconds that took.

    Raises:
        CheckpointError, ConfigError: a model that cannot be used; an unknown class, a setting out of range, or a folder
            with other samples.
    """
    generator, tokenizer = load_generator(model, device=pick_device(device))
    labels = _labels(generator, classes, count)
    return write_samples(
        generator, tokenizer, out, labels=labels, count=count if labels is None else len(labels),
        settings=settings or SampleSettings(), batch_size=batch_size, names=_classes(generator)[1],
    )  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What a generator's tokens cost.

    Attributes:
        bits_per_token: of real pictures; see :func:`tessella.evaluation.compression.compression_cost`.
        log2_codebook_size: the same for a generator that knows nothing.
        images_per_second, tokens_per_second: of sampling, decoding to pictures included.
    """

    bits_per_token: float
    log2_codebook_size: float
    images_per_second: float
    tokens_per_second: float


def evaluate_samples(
    model: Path, *, protocol: str, features: Path | None, data: str | None = None, split: Split = "test",
    limit: int | None = None, reference: str | None = None, count: int = 1000, settings: SampleSettings | None = None,
    batch_size: int = 64, out: Path | None = None, device: str | None = None,
) -> tuple[DistributionRecord, Rates, Path]:  # fmt: skip
    """Judge ``count`` samples of a generator, balanced over its classes, against a data set; and write the record.

    Frechet distance, score, precision and recall go into ``samples-PROTOCOL.json``, with the rate of sampling and the
    bits that the generator needs for a token of real pictures; the training pictures nearest to some samples, a check
    for memorised ones, into a PNG of the same name.

    Args:
        model, settings, batch_size, device: as for :func:`sample`.
        protocol, features: as for :func:`evaluate_distribution_of_reconstructions`.
        data: the real pictures; by default what the tokenizer was trained on.
        split: part of them that the samples are held against.
        limit: only its first so many pictures, and so many training pictures as candidates for the nearest.
        reference: as for :func:`evaluate_distribution_of_reconstructions`, whose statistics give no precision and
            recall; the pictures of ``split`` by default.
        count: samples.
        out: folder for both; the model's by default.

    Returns:
        The record, bits and rates, and the file that holds them.

    Raises:
        CheckpointError, ConfigError, DataError: a model, weights, a data set or a setting that cannot be used, or
            pictures without the classes that the generator knows.
    """
    place = pick_device(device)
    network = feature_network(protocol, features, place)
    generator, tokenizer = load_generator(model, device=place)
    dataset, section = _data_of(tokenizer, data, split=split, whole=False)
    try:
        bits = compression_cost(generator, _token_batches(generator, tokenizer, dataset, limit))
    except ValueError as error:
        raise ConfigError(f"the pictures of {_describe(section)} do not fit this generator: {error}") from error
    against: Features | ReferenceStatistics
    metrics: tuple[Metric, ...] = ("frechet", "score")
    if reference is None:
        against, metrics = _features_of(dataset, network, limit), (*metrics, "precision_recall")
    else:
        against = _reference(reference, tokenizer, network, data=data, whole=False, limit=limit)
    settings = settings or SampleSettings()
    started = time.monotonic()
    drawn = list(
        draw_batches(
            generator, tokenizer, labels=_labels(generator, (), count), count=count, settings=settings,
            batch_size=batch_size,
        )
    )  # fmt: skip
    seconds = time.monotonic() - started
    sampled = network.extract(drawn)
    record = evaluate_distribution(
        sampled, against, network, settings=DistributionSettings(metrics=metrics), reference_name=_describe(section)
    )
    file = (out or _folder_of(model)) / f"samples-{protocol}.json"
    space = generator.space
    rates = Rates(bits, math.log2(space.codebook_size), count / seconds, count * space.sequence_length / seconds)
    contents = {**record.to_dict(), "rates": asdict(rates), "sampling": asdict(settings)}
    write_text(file, json.dumps(contents, indent=2, allow_nan=False) + "\n")
    training, _ = _data_of(tokenizer, data, split="train", whole=False)
    _write_neighbours(file.with_suffix(".png"), torch.cat(drawn[:8])[:8], sampled.pool[:8], training, network, limit)
    return record, rates, file


def _token_batches(
    generator: Generator, tokenizer: Tokenizer, dataset: ImageDataset, limit: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Tokens and conditions of the first ``limit`` pictures."""
    step = GeneratorStep(generator, tokenizer).eval()
    for batch in _batches(dataset, whole=False, limit=limit, title="bits per token"):
        yield step.tokens_and_condition(batch)


def _cache() -> Path:
    """The user's folder of features that are computed once."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tessella"


@contextmanager
def _feature_progress(total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"features of {total} pictures", total=total)
        yield lambda done: progress.update(task, completed=done)


def _features_of(dataset: ImageDataset, network: FeatureNetwork, limit: int | None) -> Features:
    """The features of real pictures, kept for the next time in the user's cache folder."""
    total = _total(dataset, limit)
    with _feature_progress(total) as progress:
        return reference_features(dataset, network, _cache(), num_images=limit and total, progress=progress)


def _write_neighbours(
    file: Path, samples: Tensor, pool: Tensor, training: ImageDataset, network: FeatureNetwork, limit: int | None
) -> None:
    """A row for each sample: it, and the four training pictures whose features are nearest."""
    known = _features_of(training, network, limit)
    nearest = nearest_neighbours(pool, known.pool, k=4).indices.tolist()
    wanted = set(itertools.chain(*nearest))
    # The features are those of these batches, which leave out what cannot be read.
    batches = _batches(training, whole=False, limit=limit, title="nearest training pictures")
    every = enumerate(x for batch in batches for x in batch["x"])
    pictures = {number: x for number, x in every if number in wanted}
    rows = [
        torch.stack([sample, *(pictures[number] for number in numbers)])
        for sample, numbers in zip(samples, nearest, strict=True)
    ]
    save_image_grid(torch.cat(rows), file, columns=5)


def report(
    model: Path, *, data: str | None = None, weights: Path | None = None, out: Path | None = None,
    device: str | None = None, command: str | None = None, sections: Sequence[Section] = (),
) -> Path:  # fmt: skip
    """Write a page that shows what a tokenizer, measured for it, or a generator does; returns the page.

    Args:
        model, data, weights, device: as for :func:`evaluate`.
        out: folder of the page; the model's by default.
        command: shown on the page; the command line of this process by default.
        sections: further ones, of a tokenizer's page.
    """
    folder = out or model
    command = command or shlex.join(["tessella", *sys.argv[1:]])
    if is_generator(model):
        return _report_generator(model, data=data, out=folder, device=device, command=command)
    record, _ = evaluate(model, data=data, weights=weights, out=folder, device=device)
    tokenizer = load(model, device=pick_device(device))
    dataset, _ = _data_of(tokenizer, data, split="test", whole=False)
    chosen = _spread_batch(dataset, _PICTURES_SHOWN)
    x = chosen["x"].to(tokenizer.device)
    indices = tokenizer.encode(x, pad=True)
    try:
        codebook: Tensor | None = tokenizer.quantizer.codebook
    except ValueError:  # too large to build; the page then colours tokens by their number
        codebook = None
    return write_report(
        folder,
        title=f"{type(tokenizer.quantizer).__name__} tokenizer on {(tokenizer.recipe or {})['data']['name']}",
        command=command,
        evaluation=record.to_dict(),
        log_rows=[_for_report(row) for row in read_log(model / LOG)],
        originals=chosen["x"],
        reconstructions=tokenizer.decode(indices, extent=x.shape[2:]).cpu(),
        indices=indices.cpu(),
        codebook=codebook,
        codes=record.codes,
        keys=chosen["key"],
        sections=sections,
    )


def _report_generator(model: Path, *, data: str | None, out: Path, device: str | None, command: str) -> Path:
    started = time.monotonic()
    section, _ = show_samples(model, data=data, device=device)
    records = sorted(model.glob("samples-*.json"))
    recipe = load_recipe(model_folder(model))
    return write_generator_report(
        out,
        title=f"{find('generators', recipe['generator']['name']).__name__} generator",
        command=command,
        samples=section,
        log_rows=[_for_report(row) for row in read_log(model / LOG)],
        distribution=json.loads(records[0].read_text(encoding="utf-8")) if records else None,
        seconds=time.monotonic() - started,
    )


def show_samples(
    model: Path, *, data: str | None = None, per_class: int = 8, max_classes: int = 10,
    settings: SampleSettings | None = None, device: str | None = None,
) -> tuple[Section, float]:  # fmt: skip
    """A report's section with held-out pictures and samples of each class, and the samples drawn per second.

    Args:
        model, settings, device: as for :func:`sample`.
        data: the real pictures; by default what the tokenizer was trained on.
        per_class: pictures of each kind.
        max_classes: the first so many are shown.
    """
    generator, tokenizer = load_generator(model, device=pick_device(device))
    settings = settings or SampleSettings()
    num_classes, names = _classes(generator)
    dataset, _ = _data_of(tokenizer, data, split="test", whole=False)
    shown = 1 if num_classes is None else min(num_classes, max_classes)
    labels = None if num_classes is None else [label for label in range(shown) for _ in range(per_class)]
    started = time.monotonic()
    drawn = list(
        draw_batches(generator, tokenizer, labels=labels, count=shown * per_class, settings=settings, batch_size=64)
    )
    seconds = time.monotonic() - started
    titles = [names[label] if names else f"class {label}" for label in range(shown)] if labels else ["pictures"]
    real = _pictures_of_classes(dataset, None if labels is None else shown, per_class)
    told = {name: value for name, value in asdict(settings).items() if value not in (None, {})}
    section = samples_section(
        {title: torch.stack(pictures) for title, pictures in zip(titles, real, strict=True) if pictures},
        dict(zip(titles, torch.cat(drawn).split(per_class), strict=True)),
        settings=", ".join(f"{name} {value}" for name, value in told.items()) + ".",
    )
    return section, shown * per_class / seconds


def _pictures_of_classes(dataset: ImageDataset, num_classes: int | None, count: int) -> list[list[Tensor]]:
    """``count`` pictures of each of the first classes, or of all together; fewer where the data set has fewer."""
    found: list[list[Tensor]] = [[] for _ in range(num_classes or 1)]
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        if all(len(pictures) == count for pictures in found):
            break
        sample = dataset[index]
        place = sample["label"] if num_classes is not None else 0
        if 0 <= place < len(found) and len(found[place]) < count:
            found[place].append(sample["x"])
    return found


def _spread_batch(dataset: ImageDataset, count: int) -> Batch:
    """``count`` pictures from all over a data set, the same ones every time; its first ones may all be alike."""
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    samples = [dataset[index] for index in sorted(chosen)]
    return Batch(
        x=torch.stack([sample["x"] for sample in samples]),
        label=torch.tensor([sample["label"] for sample in samples]),
        key=[sample["key"] for sample in samples],
        skipped=[],
    )


def _for_report(row: dict[str, float]) -> dict[str, float | None]:
    loss = next(row[name] for name in ("loss/tokenizer", "loss/generator") if name in row)
    return {**row, "loss": loss, "psnr": row.get("psnr_db")}


def quickstart(out: Path, *, device: str | None = None) -> dict[str, float]:
    """The whole main job on the built-in photographs; returns the numbers that ``results.json`` holds.

    ``out`` gets ``run/`` (training), ``tokens/`` (shards), ``reconstructions/`` (PNGs made from the shards alone),
    ``generator/`` (training), ``samples/`` (PNGs by class), ``report.html`` and ``results.json``. Interrupted, it goes
    on where it was.
    """
    started = time.monotonic()
    run = train("photos_fsq", out=out / "run", device=device)
    tokenize(run, out / "tokens", device=device)
    detokenize(run, out / "tokens", out / "reconstructions", device=device)
    before = time.monotonic()
    generator = train("photos_generator", tokenizer=run, out=out / "generator", device=device)
    trained = time.monotonic() - before
    settings = SampleSettings(guidance=_QUICKSTART_GUIDANCE)
    sample(generator, out / "samples", count=80, settings=settings, device=device)
    section, images_per_second = show_samples(generator, settings=settings, device=device)
    page = report(run, out=out, device=device, command="tessella quickstart", sections=[section])
    record = json.loads((out / EVALUATION).read_text(encoding="utf-8"))
    results = {
        "psnr_db": record["psnr"],
        "ssim": record["ssim"],
        "bits_per_pixel": record["bits_per_pixel"],
        "usage": record["usage"],
        "perplexity": record["perplexity"],
        "generator_seconds": trained,
        "images_per_second": images_per_second,
        "seconds": time.monotonic() - started,
    }
    write_text(page.with_name("results.json"), json.dumps(results, indent=2) + "\n")
    return results
