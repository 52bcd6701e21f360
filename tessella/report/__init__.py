"""Pictures, plots and the self-contained HTML page."""

from __future__ import annotations

from tessella.report.generation import samples_section, write_generator_report
from tessella.report.page import Card, Gallery, Picture, Plot, Section, Table, Tile, write_page
from tessella.report.pictures import save_image_grid
from tessella.report.report import write_report

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
