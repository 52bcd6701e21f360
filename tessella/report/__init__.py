"""Pictures, plots and the self-contained HTML page."""

from __future__ import annotations

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
    "save_image_grid",
    "write_page",
    "write_report",
]
