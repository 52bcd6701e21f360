"""How the codes are used: counts over a data set, and what the signal looks like where each code stands."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessella.checkpoint import fingerprint
from tessella.data.base import Batch
from tessella.evaluation.codebook import CodeCounter
from tessella.media.base import Medium
from tessella.media.image import Image, shown
from tessella.reporting.page import Card, Gallery, Section, Tile
from tessella.reporting.pictures import Array, to_pictures
from tessella.storage import CHECKSUMS, StorageError, atomic_folder, verify, write_checksums
from tessella.storage.tensors import write_tensors
from tessella.tokenizer import Tokenizer

logger = logging.getLogger("tessella")

PATCHES_PER_CODE = 8
_MOST_CODES = 4096  # of all codebooks together, whose patches are kept
_CONTEXT = 3  # a patch is so many strides wide: what a token stands for reaches beyond its own cell
_FILE = "codebook.safetensors"


@dataclass(frozen=True)
class CodebookUse:
    """What a data set does with the codes.

    Attributes:
        codes: per codebook the codes that occur ``[U]``, ascending.
        counts: how often, in the same order.
        num_codes: V.
        num_positions: latent positions counted.
        num_signals: signals they are of.
        patches: per codebook, code -> pictures around places where it stands; the most used codes only, and none where
            signals are no pictures.
    """

    codes: list[Tensor]
    counts: list[Tensor]
    num_codes: int
    num_positions: int
    num_signals: int
    patches: list[dict[int, list[Array]]]

    def count(self, codebook: int, code: int) -> int:
        """How often a code occurs."""
        place = int(torch.searchsorted(self.codes[codebook], code))
        there = place < len(self.codes[codebook]) and int(self.codes[codebook][place]) == code
        return int(self.counts[codebook][place]) if there else 0

    def most_used(self, codebook: int, number: int) -> list[int]:
        """The codes that occur most, the lower of equals first."""
        order = self.counts[codebook].argsort(descending=True, stable=True)[:number]
        return self.codes[codebook][order].tolist()


def codebook_use(tokenizer: Tokenizer, medium: Medium, batches: Iterable[Batch]) -> CodebookUse:
    """Count the codes of ``batches`` and keep patches of the most used ones.

    Args:
        tokenizer: in eval mode.
        medium: what the signals are; patches are of pictures.
        batches: of one size of signal each.
    """
    counter = CodeCounter(tokenizer.quantizer.codebook_size, tokenizer.quantizer.num_codebooks)
    pictures: list[Array] = []
    tokens: list[Tensor] = []
    num_signals = 0
    for batch in batches:
        x = batch["x"].to(tokenizer.device)
        indices = tokenizer.encode(x, pad=True).cpu()
        counter.update(indices)
        num_signals += len(x)
        if isinstance(medium, Image) and indices.ndim == 4:
            pictures += to_pictures(shown(tokenizer.pad(x)))
            tokens += list(indices)
    histograms = [counter.histogram(k) for k in range(tokenizer.quantizer.num_codebooks)]
    use = CodebookUse(
        [codes for codes, _ in histograms], [counts for _, counts in histograms], tokenizer.quantizer.codebook_size,
        counter.num_positions, num_signals, [{} for _ in histograms],
    )  # fmt: skip
    stride = tokenizer.autoencoder.stride
    for k, patches in enumerate(use.patches):
        for code in use.most_used(k, _MOST_CODES // len(use.patches)) if tokens else []:
            patches[code] = []
        _cut(patches, pictures, [grid[..., k].numpy() for grid in tokens], stride)
    return use


def _cut(patches: dict[int, list[Array]], pictures: list[Array], tokens: list[Array], stride: int) -> None:
    """Fill ``patches`` with places from all over the data, the same ones every time."""
    margin = stride * (_CONTEXT // 2)
    padded: dict[int, Array] = {}
    flat = np.concatenate([grid.ravel() for grid in tokens]) if tokens else np.empty(0, np.int64)
    ends = np.cumsum([grid.size for grid in tokens])
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    for code, found in patches.items():
        first, last = np.searchsorted(ordered, [code, code + 1])
        if first == last:
            continue
        chosen = np.unique(np.linspace(first, last - 1, PATCHES_PER_CODE).round().astype(int))
        for place in order[chosen]:
            number = int(np.searchsorted(ends, place, side="right"))
            height, width = tokens[number].shape
            row, column = divmod(int(place - (ends[number] - height * width)), width)
            if number not in padded:
                padded[number] = np.pad(pictures[number], ((margin, margin), (margin, margin), (0, 0)), mode="edge")
            top, left, side = row * stride, column * stride, stride + 2 * margin
            found.append(padded[number][top : top + side, left : left + side])


def codebook_section(use: CodebookUse, number: int = 24) -> Section | None:
    """A report's section: the most used codes, each with patches where it stands; None where there are none."""
    cards = []
    for k, patches in enumerate(use.patches):
        for code in use.most_used(k, number // len(use.patches)):
            if found := patches.get(code):
                share = 100 * use.count(k, code) / use.num_positions
                title = f"code {code}" if len(use.patches) == 1 else f"codebook {k}, code {code}"
                cards.append(
                    Card([Tile("", picture) for picture in found], title=title, note=f"{share:.2f} % of tokens")
                )
    if not cards:
        return None
    used = sum(map(len, use.codes)) / (len(use.codes) * use.num_codes)
    text = (
        f"The codes used most, each with {PATCHES_PER_CODE} of the places where it stands: the token's cell and one "
        f"cell around it. Over {use.num_signals:,} signals, {use.num_positions:,} positions, {100 * used:.1f} % of the "
        f"{use.num_codes:,} codes occur."
    )
    return Section("The codes used most", text, [Gallery(cards)])


# --- kept beside the run ----------------------------------------------------------------------------------------------


def kept_use(folder: Path, tokenizer: Tokenizer, about: str, make: Callable[[], CodebookUse]) -> CodebookUse:
    """What ``make`` gives, or what it gave when it was last asked with this tokenizer and these words.

    Args:
        folder: where it is kept; whatever cannot be read there, or is of other weights or data, is made anew.
        tokenizer: whose codes they are.
        about: what was counted.
        make: counts.
    """
    identity = json.dumps({"fingerprint": fingerprint(tokenizer), "about": about, "version": 1})
    try:
        if (folder / CHECKSUMS).is_file():
            verify(folder, _FILE)
            if (use := _read(folder / _FILE, identity)) is not None:
                return use
    except (StorageError, SafetensorError, KeyError) as error:
        logger.warning("%s; counting anew", error)
    use = make()
    try:
        with atomic_folder(folder) as place:
            _write(use, place / _FILE, identity)
            write_checksums(place)
    except StorageError as error:
        logger.warning("%s; the counts are not kept", error)
    return use


def _write(use: CodebookUse, file: Path, identity: str) -> None:
    numbers = torch.tensor([use.num_codes, use.num_positions, use.num_signals])
    tensors = {"numbers": numbers}
    for k, patches in enumerate(use.patches):
        tensors |= {f"codes.{k}": use.codes[k], f"counts.{k}": use.counts[k]}
        if pictures := [picture for found in patches.values() for picture in found]:
            tensors[f"patches.{k}"] = torch.from_numpy(np.stack(pictures))
            owners = [code for code, found in patches.items() for _ in found]
            tensors[f"owners.{k}"] = torch.tensor(owners)
    write_tensors(file, tensors, {"tessella": identity})


def _read(file: Path, identity: str) -> CodebookUse | None:
    with safe_open(file, framework="pt") as reader:
        if (reader.metadata() or {}).get("tessella") != identity:
            return None
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    num_books = sum(name.startswith("codes.") for name in tensors)
    patches: list[dict[int, list[Array]]] = [{} for _ in range(num_books)]
    for k in range(num_books):
        if f"patches.{k}" in tensors:
            for code, picture in zip(tensors[f"owners.{k}"].tolist(), tensors[f"patches.{k}"].numpy(), strict=True):
                patches[k].setdefault(code, []).append(picture)
    num_codes, num_positions, num_signals = tensors["numbers"].tolist()
    codes, counts = ([tensors[f"{name}.{k}"] for k in range(num_books)] for name in ("codes", "counts"))
    return CodebookUse(codes, counts, num_codes, num_positions, num_signals, patches)
