"""The report of a generator: its samples beside real pictures, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tessella.reporting.page import Card, Gallery, Picture, Section, Table, Tile, write_page
from tessella.reporting.pictures import grid, to_pictures
from tessella.reporting.plots import curves

_COLUMNS = 4


def samples_section(real: Mapping[str, Tensor], generated: Mapping[str, Tensor], *, settings: str) -> Section:
    """A section that shows real and generated pictures of each class side by side.

    Args:
        real: class -> pictures ``[n, 3, H, W]`` in [-1, 1] that no model has seen; a class may have none.
        generated: class -> samples ``[m, 3, H, W]`` in [-1, 1].
        settings: how they were drawn.
    """
    kinds = {"real, held out": real, "generated": generated}
    cards = [
        Card(
            [
                Tile(kind, grid(to_pictures(pictures[name]), columns=_COLUMNS))
                for kind, pictures in kinds.items()
                if name in pictures
            ],
            title=name,
        )
        for name in generated
    ]
    everything = [picture for pictures in generated.values() for picture in to_pictures(pictures)]
    per_class = max(len(pictures) for pictures in generated.values())
    overview = Picture("samples", grid(everything, columns=per_class), "All samples, a class a row.")
    text = (
        "The generator was given nothing but the class. Every picture was drawn token by token or step by step and "
        f"then decoded. {settings}"
    )
    return Section("Generated pictures", text, [Gallery(cards), overview])


def write_generator_report(
    folder: str | Path,
    *,
    title: str,
    command: str,
    samples: Section,
    log_rows: Sequence[Mapping[str, Any]],
    distribution: Mapping[str, Any] | None,
    seconds: float,
) -> Path:
    """Write ``report.html`` of a generator into ``folder``; returns the page's path.

    Args:
        folder: created where it does not exist.
        title: the page's heading.
        command: what made the report.
        samples: see :func:`samples_section`.
        log_rows: the training log's rows.
        distribution: a record of the samples' evaluation, if there is one.
        seconds: what the samples took.
    """
    values = {} if distribution is None else distribution["values"]
    numbers = [(name, f"{estimate['value']:.3g}") for name, estimate in values.items()]
    sections = [samples]
    if plots := curves(log_rows):
        sections.append(Section("Training", "From the training log.", plots))
    if distribution is not None:
        meaning = distribution["meaning"]
        rows = [(name, f"{estimate['value']:.4g}", meaning.get(name, "")) for name, estimate in values.items()]
        text = f"Compare them only with numbers measured in the same way: {distribution['protocol_line']}."
        sections.append(Section("Numbers", text, [Table(("metric", "value", "what it is"), rows)]))
    summary = "" if distribution is None else distribution["protocol_line"]
    return write_page(
        folder, title=title, summary=summary, numbers=numbers, sections=sections, command=command, seconds=seconds
    )
