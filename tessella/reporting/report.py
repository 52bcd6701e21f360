"""The report of a tokenizer: what it does to signals, how good that is, and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tessella.evaluation.codebook import CodeCounter
from tessella.evaluation.reconstruction import ReconstructionRecord
from tessella.reporting.page import Block, Section, Table, write_page
from tessella.reporting.plots import curves, usage_histogram

_MAX_HISTOGRAMS = 4
_NUMBERS_TEXT = "Over the whole evaluation set. Compare them only with numbers that were measured in the same way."


def write_report(
    folder: str | Path,
    *,
    title: str,
    command: str,
    evaluation: ReconstructionRecord,
    log_rows: Sequence[Mapping[str, Any]],
    shown: Section,
    sections: Sequence[Section] = (),
) -> Path:
    """Write ``report.html`` with its files into ``folder``; returns the page's path.

    Args:
        folder: created where it does not exist.
        title: the page's heading.
        command: what made the report.
        evaluation: over the whole evaluation set.
        log_rows: the training log's rows; may be empty.
        shown: signals with their reconstructions and tokens, as their medium shows them.
        sections: further ones, shown after these.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    return write_page(
        folder,
        title=title,
        summary=evaluation.line,
        numbers=[(number.label, number.value) for number in evaluation.numbers if number.key in evaluation.headline],
        sections=[
            shown,
            Section("Codebook", "Which codes the evaluation set uses, and how often.", _histograms(evaluation.codes)),
            *_training(log_rows),
            Section("Numbers", _NUMBERS_TEXT, _numbers(evaluation)),
            *sections,
        ],
        command=command,
        seconds=evaluation["seconds"],
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


def _numbers(evaluation: ReconstructionRecord) -> list[Block]:
    rows = [(number.label, number.value, number.meaning) for number in evaluation.numbers]
    meaning = evaluation.protocol["meaning"]
    settings = [("path", "hard tokens", meaning["path"])]
    for key, value in evaluation.protocol.items():
        if key == "sizes":
            settings.append((key, ", ".join(f"{size}: {count:,}" for size, count in value.items()), ""))
        elif isinstance(value, dict) and key != "meaning":
            settings += [(f"{key.replace('_', ' ')}: {name}", str(item), "") for name, item in value.items()]
        elif key != "meaning":
            settings.append((key.replace("_", " "), str(value), meaning.get(key, "")))
    return [Table(("metric", "value", "how it is measured"), rows), Table(("protocol", "value", ""), settings)]
