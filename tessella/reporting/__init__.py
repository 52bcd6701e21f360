"""Pictures, plots and the self-contained HTML page, as the media put them together."""

from __future__ import annotations

from tessella.reporting.generation import samples_section, write_generator_report
from tessella.reporting.page import Card, Gallery, Picture, Plot, Section, Table, Tile, write_page
from tessella.reporting.pictures import save_image_grid
from tessella.reporting.report import write_report

__all__ = [
    "Card",
    "Gallery",
    "Picture",
    "Plot",
    "Section",
    "Table",
    "Tile",
    "samples_section",
    "save_image_grid",
    "write_generator_report",
    "write_page",
    "write_report",
]
