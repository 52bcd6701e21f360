"""The report of a tokenizer: what it does to pictures, how good that is, and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tessella.checkpoint import write_bytes
from tessella.evaluation.codebook import CodeCounter
from tessella.evaluation.reconstruction import picture_scores, protocol_line, readable
from tessella.report.page import Block, Card, Gallery, Section, Table, Tile, write_page
from tessella.report.pictures import Array, error_maps, grid, png, to_pictures, token_maps
from tessella.report.plots import curves, usage_histogram

ERROR_GAIN = 5.0
_MAX_HISTOGRAMS = 4
_HEADLINE = {"psnr", "ssim", "lpips", "usage", "perplexity", "bits_per_pixel"}
_NUMBERS_TEXT = "Over the whole evaluation set. Compare them only with numbers that were measured in the same way."


def write_report(
    folder: str | Path,
    *,
    title: str,
    command: str,
    evaluation: Mapping[str, Any],
    log_rows: Sequence[Mapping[str, Any]],
    originals: Tensor,
    reconstructions: Tensor,
    indices: Tensor,
    codebook: Tensor | None,
    codes: CodeCounter,
    keys: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> Path:
    """Write ``report.html`` with its PNG files into ``folder``; returns the page's path.

    Args:
        folder: created where it does not exist.
        title: the page's heading.
        command: what made the report.
        evaluation: ``ReconstructionRecord.to_dict()``.
        log_rows: the training log's rows: ``step``, and any of ``loss``, ``psnr``, ``usage``, ``perplexity``; may be
            empty.
        originals: the pictures shown, ``[B, 3, H, W]`` in [-1, 1].
        reconstructions: of the same shape.
        indices: their tokens, ``[B, h, w, K]``.
        codebook: ``[V, D]`` or ``[K, V, D]``, from which tokens get their colours; ``None`` where it is too large
            to be built.
        codes: counts over the whole evaluation set (``ReconstructionRecord.codes``).
        keys: the pictures' names.
        sections: further ones, shown after these.

    Raises:
        ValueError: tensors of different shapes or lengths.
        ModuleNotFoundError: matplotlib or torchmetrics is missing.
    """
    _check(originals, reconstructions, indices, keys)
    folder = Path(folder)
    pictures = {
        "original": to_pictures(originals),
        "reconstruction": to_pictures(reconstructions),
        f"error x {ERROR_GAIN:g}": error_maps(originals, reconstructions, gain=ERROR_GAIN),
        "tokens": token_maps(indices, codebook),
    }
    for name, kind in zip(("originals", "reconstructions", "errors", "tokens"), pictures.values(), strict=True):
        write_bytes(folder / f"{name}.png", png(grid(kind, columns=4)))
    return write_page(
        folder,
        title=title,
        summary=protocol_line(evaluation),
        numbers=_headline(evaluation),
        sections=[
            Section("Pictures", _pictures_text(indices), [Gallery(_cards(pictures, originals, reconstructions, keys))]),
            Section("Codebook", "Which codes the evaluation set uses, and how often.", _histograms(codes)),
            *_training(log_rows),
            Section("Numbers", _NUMBERS_TEXT, _numbers(evaluation)),
            *sections,
        ],
        command=command,
        seconds=evaluation["seconds"],
    )


def _check(originals: Tensor, reconstructions: Tensor, indices: Tensor, keys: Sequence[str]) -> None:
    if originals.shape != reconstructions.shape:
        raise ValueError(f"originals and reconstructions must have one shape, "
                         f"got {list(originals.shape)} and {list(reconstructions.shape)}")  # fmt: skip
    if len(indices) != len(originals):
        raise ValueError(f"indices must hold {len(originals)} pictures as originals do, got {len(indices)}")
    if keys and len(keys) != len(originals):
        raise ValueError(f"keys must name {len(originals)} pictures or none, got {len(keys)}")


def _cards(
    pictures: Mapping[str, list[Array]], originals: Tensor, reconstructions: Tensor, keys: Sequence[str]
) -> list[Card]:
    scores = picture_scores(originals, reconstructions, lpips={})
    cards = []
    for position, row in enumerate(zip(*pictures.values(), strict=True)):
        tiles = [
            Tile(label, picture, behind=row[0] if label == "reconstruction" else None)
            for label, picture in zip(pictures, row, strict=True)
        ]
        note = f"{scores['psnr'][position]:.1f} dB · SSIM {scores['ssim'][position]:.3f}"
        cards.append(Card(tiles, title=keys[position] if keys else f"picture {position + 1}", note=note))
    return cards


def _pictures_text(indices: Tensor) -> str:
    _, height, width, num_codebooks = indices.shape
    layers = f", {num_codebooks} tiles for {num_codebooks} codebooks" if num_codebooks > 1 else ""
    return (
        f"Each picture, what is left of it after {height * width * num_codebooks:,} tokens, the difference, and the "
        f"tokens. Point at a reconstruction, or tap it, to see the original in its place. The difference is "
        f"|original - reconstruction|, {ERROR_GAIN:g} times amplified: black is exact. The last picture shows the "
        f"{height} x {width} tokens{layers}: a code has one colour on the whole page, and where the codebook is known, "
        f"similar codes have similar colours."
    )


def _histograms(codes: CodeCounter) -> list[Block]:
    plots: list[Block] = []
    for position in range(min(codes.num_codebooks, _MAX_HISTOGRAMS)):
        name = "usage" if codes.num_codebooks == 1 else f"usage_{position + 1}"
        plots.append(usage_histogram(codes.histogram(position)[1], codes.codebook_size, name=name))
    return plots


def _training(log_rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    plots = curves(log_rows)
    return [Section("Training", "From the training log.", plots)] if plots else []


def _headline(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(number.label, number.value) for number in readable(evaluation) if number.key in _HEADLINE]


def _numbers(evaluation: Mapping[str, Any]) -> list[Block]:
    protocol = evaluation["protocol"]
    rows = [(number.label, number.value, number.meaning) for number in readable(evaluation)]
    settings = [
        ("pixels", protocol["pixels"], protocol["meaning"]["pixels"]),
        ("path", "hard tokens", protocol["meaning"]["path"]),
        ("sizes in px", ", ".join(f"{size}: {count:,}" for size, count in protocol["sizes"].items()), "height x width"),
        *((file, f"sha256 {digest}", "weights of LPIPS") for file, digest in protocol["lpips_files"].items()),
        *((f"data: {key}", str(value), "") for key, value in protocol["data"].items()),
    ]
    return [Table(("metric", "value", "how it is measured"), rows), Table(("protocol", "value", ""), settings)]
