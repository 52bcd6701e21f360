"""``tessella compare``: tokenizers side by side on the same signals, and image codecs beside them as yardsticks."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessella.checkpoint import write_text
from tessella.commands._data import batches, data_for, describe, medium_of, open_data
from tessella.commands._device import pick_device
from tessella.data.base import Samples, Split
from tessella.errors import ConfigError
from tessella.evaluation.codecs import CODECS, check_codec, coded
from tessella.evaluation.image import picture_scores
from tessella.evaluation.reconstruction import evaluate_reconstruction
from tessella.interop.hub import SCHEME, from_pretrained
from tessella.media.base import Medium
from tessella.media.image import Image
from tessella.registry import Spec
from tessella.reporting import Card, Gallery, Section, Table, Tile, write_page
from tessella.reporting.pictures import to_pictures
from tessella.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

COMPARISON = "comparison.json"
_WINDOW_PX = 288
_MIB = 2**20
_SAME = 0.02  # bits that differ by less are one budget
# What the table has, where it is known: key of a row, heading, format.
_COLUMNS = (
    ("psnr", "PSNR, dB", ".2f"), ("ssim", "SSIM", ".4f"), ("lpips alexnet", "LPIPS alex", ".4f"),
    ("lpips vgg16", "LPIPS vgg", ".4f"), ("usage", "usage", ".2%"), ("perplexity", "perplexity", ",.0f"),
    ("bits_per_pixel", "bits per pixel", ".4f"), ("bits", "bits each", ",.0f"), ("rate", "each second", ".2f"),
    ("parameters", "numbers", ",.0f"), ("memory_mib", "memory, MiB", ",.0f"),
)  # fmt: skip
_TEXT = (
    "Every tokenizer sees the same signals. Usage and perplexity are of the whole set; bits are those of fixed-length "
    "codes, and of a codec those of the whole file, header included; memory is the most that tensors take between two "
    "operations while one signal is encoded and decoded, beside the weights. Codecs get the best file of at most as "
    "many bits as the tokenizer named, or their smallest where none is as small."
)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found: a row of numbers a tokenizer or codec, by name, and where it stands."""

    rows: dict[str, dict[str, float]]
    protocol: dict[str, Any]
    page: Path
    record: Path

    def print(self, console: Console) -> None:
        """Show the rows."""
        from rich.table import Table as Rows

        header, body = _cells(self.rows)
        table = Rows(*header)
        for row in body:
            table.add_row(*row)
        console.print(table)


def compare(
    models: Sequence[str | Path], *, data: str | None = None, out: Path, split: Split = "test",
    limit: int | None = None, whole: bool = True, crop_px: int | None = None, weights: Path | None = None,
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
        weights: folder with LPIPS weights; LPIPS is left out without it.
        codecs: for pictures, among ``jpeg``, ``webp``, ``avif``; all by default.
        num_shown: pictures on the page.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.
        command: shown on the page; the command line of this process by default.

    Raises:
        CheckpointError, ConfigError, DataError: a model, data or weights that cannot be used.
    """
    started = time.monotonic()
    if not models:
        raise ConfigError("compare needs at least one model")
    for codec in codecs or ():
        check_codec(codec)
    place = pick_device(device)
    tokenizers = dict(zip(_labels(models), (from_pretrained(model, device=place) for model in models), strict=True))
    first = next(iter(tokenizers.values()))
    section = _section(first, data, split, whole, crop_px)
    medium, dataset = medium_of(first, section), open_data(section, split)
    rows, protocols = {}, []
    for label, tokenizer in tokenizers.items():
        measured = medium.metrics(weights=weights)
        record = evaluate_reconstruction(
            tokenizer, batches(dataset, whole=crop_px is None and whole, limit=limit, title=label), measured,
            data=describe(section, split),
        )  # fmt: skip
        rows[label] = _row(record.to_dict(), measured.signals, measured.bits_name, tokenizer, dataset)
        protocols.append(record.protocol)
    shown = _chosen(dataset, num_shown, limit)
    sections = [Section("Numbers", _TEXT)]
    if isinstance(medium, Image) and medium.channels == 3:
        yardsticks = _codec_rows(medium, dataset, rows, limit, weights, codecs)
        sections.append(Section("Pictures", _explanation(shown, dataset), [_gallery(tokenizers, shown, dataset, rows,
                                                                                    codecs, medium)]))  # fmt: skip
        rows |= yardsticks
    else:
        sections += [_heard(label, tokenizer, shown, dataset, medium) for label, tokenizer in tokenizers.items()]
    header, body = _cells(rows)
    sections[0] = Section("Numbers", _TEXT, [Table(header, body)])
    page = write_page(
        out, title=f"{len(tokenizers)} tokenizers on {section.get('path', section['name'])}",
        summary=", ".join(tokenizers), numbers=[], sections=sections,
        command=command or shlex.join(["tessella", *sys.argv[1:]]), seconds=time.monotonic() - started,
    )  # fmt: skip
    record_file = out / COMPARISON
    write_text(record_file, json.dumps({"rows": rows, "protocol": protocols[0]}, indent=2, allow_nan=False) + "\n")
    return Comparison(rows, protocols[0], page, record_file)


def _labels(models: Sequence[str | Path]) -> list[str]:
    """Short names, all different."""
    full = [str(model).removeprefix(SCHEME) for model in models]
    short = [Path(name).stem if Path(name).suffix else Path(name).name for name in full]
    names = short if len(set(short)) == len(short) else full
    if len(set(names)) < len(names):
        raise ConfigError(f"compare: one model is named twice among {', '.join(full)}")
    return names


def _section(tokenizer: Tokenizer, data: str | None, split: Split, whole: bool, crop_px: int | None) -> Spec:
    trained: Spec = (tokenizer.recipe or {}).get("data", {}) if data is None else {}
    section = data_for(trained, data, whole=whole and crop_px is None, split=split)
    return section if crop_px is None else {**section, "crop_px": crop_px, "resize_px": crop_px}


def _row(
    record: dict[str, Any], signals: str, bits_name: str, tokenizer: Tokenizer, dataset: Samples
) -> dict[str, float]:  # fmt: skip
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    numbers |= {f"lpips {network}": value for network, value in record.get("lpips", {}).items()}
    x = dataset[0]["x"][None].to(tokenizer.device)
    tokens = tokenizer.encode(x, pad=True)
    positions = tokens[0].numel() / tokenizer.quantizer.num_codebooks
    bits = positions * tokenizer.quantizer.num_codebooks * _log2(tokenizer.quantizer.codebook_size)
    return {
        **{key: numbers[key] for key, *_ in _COLUMNS if key in numbers},
        bits_name: numbers[bits_name],
        "bits": bits,
        "rate": numbers[f"{signals}_per_sec"],
        "parameters": float(sum(parameter.numel() for parameter in tokenizer.parameters())),
        "memory_mib": _peak_bytes(tokenizer, x) / _MIB,
    }


def _log2(size: int) -> float:
    return torch.tensor(float(size), dtype=torch.float64).log2().item()


def _peak_bytes(tokenizer: Tokenizer, x: Tensor) -> int:
    """The most that tensors take at any moment while ``x`` is encoded and decoded, beside what was there before."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        tokenizer.decode(tokenizer.encode(x, pad=True))
        return int(torch.cuda.max_memory_allocated(x.device) - before)
    with _Watch({tensor.untyped_storage()._cdata for tensor in tokenizer.state_dict().values()}) as watch:
        tokenizer.decode(tokenizer.encode(x, pad=True))
    return int(watch.most)


class _Watch(TorchDispatchMode):
    """Keeps the largest sum of the bytes of all tensors that were alive after an operation, ``known`` ones aside."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.most = known, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def _codec_rows(
    medium: Image, dataset: Samples, rows: dict[str, dict[str, float]], limit: int | None, weights: Path | None,
    codecs: Sequence[str] | None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """What the codecs make of the bits per pixel of each tokenizer; of those with the same, once."""
    found: dict[str, dict[str, float]] = {}
    budgets: dict[float, str] = {}
    for label, row in rows.items():
        if all(abs(row["bits_per_pixel"] / budget - 1) > _SAME for budget in budgets):
            budgets[row["bits_per_pixel"]] = label
    for codec in _available(codecs):
        for budget, label in budgets.items():
            measured = medium.metrics(weights=weights)
            bits = pixels = count = 0.0
            for batch in batches(dataset, whole=True, limit=limit, title=f"{codec} as {label}"):
                for x in batch["x"]:
                    size = x.shape[1] * x.shape[2]
                    made = coded(x, codec, budget * size)
                    measured.update(x[None], made.x_hat[None], batch)
                    bits, pixels, count = bits + made.bits, pixels + size, count + 1
            numbers = measured.compute()
            numbers |= {f"lpips {network}": value for network, value in numbers.pop("lpips", {}).items()}
            name = f"{codec.upper()} as {label}" if len(budgets) > 1 else codec.upper()
            found[name] = {
                **{key: numbers[key] for key, *_ in _COLUMNS if key in numbers},
                "bits_per_pixel": bits / pixels,
                "bits": bits / count,
            }
    return found


def _available(codecs: Sequence[str] | None) -> list[str]:
    if codecs is not None:
        return list(codecs)
    found = []
    for codec in CODECS:
        try:
            check_codec(codec)
        except ConfigError:
            continue
        found.append(codec)
    return found


def _chosen(dataset: Samples, count: int, limit: int | None) -> list[int]:
    """Samples from all over the data, the same every time."""
    size = len(dataset) if limit is None else min(limit, len(dataset))
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count].tolist())


def _gallery(
    tokenizers: dict[str, Tokenizer], shown: Sequence[int], dataset: Samples, rows: dict[str, dict[str, float]],
    codecs: Sequence[str] | None, medium: Medium,
) -> Gallery:  # fmt: skip
    """A card a picture: the original, every tokenizer, and every codec at the bits of the most generous of them."""
    most = max(rows.values(), key=lambda row: row["bits_per_pixel"])["bits_per_pixel"]
    cards = []
    for index in shown:
        sample = dataset[index]
        x = sample["x"][None]
        rebuilt = {
            label: tokenizer.decode(tokenizer.encode(x.to(tokenizer.device), pad=True), extent=x.shape[2:]).cpu()
            for label, tokenizer in tokenizers.items()
        }
        for codec in _available(codecs):
            rebuilt[codec.upper()] = coded(x[0], codec, most * x.shape[2] * x.shape[3]).x_hat[None]
        (original,) = to_pictures(_window(x))
        tiles = [Tile("original", original)]
        for label, x_hat in rebuilt.items():
            decibel = picture_scores(x, x_hat)["psnr"].item()
            (picture,) = to_pictures(_window(x_hat))
            tiles.append(Tile(f"{label} {decibel:.1f} dB", picture, behind=original))
        cards.append(Card(tiles, title=sample["key"]))
    return Gallery(cards)


def _window(x: Tensor) -> Tensor:
    """The middle of a picture, no larger than is shown pixel for pixel."""
    height, width = (min(size, _WINDOW_PX) for size in x.shape[2:])
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def _explanation(shown: Sequence[int], dataset: Samples) -> str:
    sides = [max(dataset[index]["x"].shape[1:]) for index in shown]
    cut = (
        f" Of larger pictures the middle {_WINDOW_PX} px are shown, pixel for pixel." if max(sides) > _WINDOW_PX else ""
    )
    return (
        "A row is one picture: the original, and what is left of it after every tokenizer. Codecs have at most as many "
        "bits as the tokenizer with the most. Point at a picture, or tap it, to see the original in its place; the "
        f"decibels are of the whole picture.{cut if max(sides) > _WINDOW_PX else ''}"
    )


def _heard(label: str, tokenizer: Tokenizer, shown: Sequence[int], dataset: Samples, medium: Medium) -> Section:
    """Signals of another kind, as their medium shows them: one section a tokenizer."""
    samples = [dataset[index] for index in shown]
    shortest = min(sample["x"].shape[-1] for sample in samples)
    x = torch.stack([sample["x"][..., :shortest] for sample in samples])
    indices = tokenizer.encode(x.to(tokenizer.device), pad=True)
    x_hat = tokenizer.decode(indices, extent=x.shape[2:]).cpu()
    section = medium.show(x, x_hat, indices.cpu(), None, [sample["key"] for sample in samples])
    return Section(label, section.text, section.blocks)


def _cells(rows: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table, without columns that no row has."""
    columns = [column for column in _COLUMNS if any(column[0] in row for row in rows.values())]
    body = [[label, *(format(row[key], form) if key in row else "" for key, _, form in columns)]
            for label, row in rows.items()]  # fmt: skip
    return ["", *(heading for _, heading, _ in columns)], body
