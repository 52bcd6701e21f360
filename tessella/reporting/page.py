"""The page: sections of galleries, plots and tables, composed into one self-contained HTML file."""

from __future__ import annotations

import base64
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import TypeAlias

import torch

from tessella.reporting.pictures import Array, png
from tessella.storage import write_bytes, write_text

PAGE = "report.html"

_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"

_TILE_PX = 128  # small pictures are enlarged by the largest whole number that keeps them within this width
_PHOTO_PX = 320  # from this width on a picture may be shrunk to fit the screen


@dataclass(frozen=True)
class Tile:
    """A picture ``[H, W, 3]`` with a word below it.

    ``behind`` is another of its size, shown while pointed at; ``sound`` is a WAV file, played below.
    """

    label: str
    picture: Array
    behind: Array | None = None
    sound: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Card:
    """Pictures that belong together, shown at one size, with a title and a note."""

    tiles: Sequence[Tile]
    title: str = ""
    note: str = ""

    def html(self) -> str:
        """A ``<figure>``."""
        width = self.tiles[0].picture.shape[1]
        shown_px = width * max(1, _TILE_PX // width)
        tiles = "".join(_tile(tile, shown_px) for tile in self.tiles)
        caption = f"<b>{escape(self.title)}</b><span>{escape(self.note)}</span>" if self.title or self.note else ""
        return f'<figure class="card"><figcaption>{caption}</figcaption><div class="tiles">{tiles}</div></figure>'


@dataclass(frozen=True)
class Gallery:
    """Cards side by side, as many as fit; ``grids`` are files written beside the page, by name."""

    cards: Sequence[Card]
    grids: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def html(self) -> str:
        """A ``<div>`` of the cards."""
        return f'<div class="gallery">{"".join(card.html() for card in self.cards)}</div>'

    def files(self) -> dict[str, bytes]:
        """What whoever made the gallery found worth a file."""
        return dict(self.grids)


@dataclass(frozen=True)
class Picture:
    """One large picture with a caption, written beside the page as ``<name>.png``."""

    name: str
    picture: Array
    caption: str

    def html(self) -> str:
        """A ``<figure>``."""
        tile = Tile(self.caption, self.picture)
        return f'<figure class="card">{_tile(tile, self.picture.shape[1])}</figure>'

    def files(self) -> dict[str, bytes]:
        """The picture."""
        return {f"{self.name}.png": png(self.picture)}


@dataclass(frozen=True)
class Plot:
    """A plot as PNG files for light and dark pages, written beside the page as ``<name>.png`` (the light one)."""

    name: str
    caption: str
    light: bytes = field(repr=False)
    dark: bytes = field(repr=False)

    def html(self) -> str:
        """A ``<figure>`` that follows the page's colour scheme."""
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(self.dark)}">'
        picture = f'<picture>{dark}<img src="{_data_uri(self.light)}" alt="{escape(self.caption)}"></picture>'
        return f'<figure class="plot">{picture}<figcaption>{escape(self.caption)}</figcaption></figure>'

    def files(self) -> dict[str, bytes]:
        """The light version."""
        return {f"{self.name}.png": self.light}


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names, the second is a value, the others explain."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """A ``<table>``."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def files(self) -> dict[str, bytes]:
        """None."""
        return {}


Block: TypeAlias = Gallery | Picture | Plot | Table


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph and what it introduces."""

    title: str
    text: str
    blocks: Sequence[Block] = ()

    def html(self) -> str:
        """A ``<section>``; consecutive plots share a row where there is room."""
        body, plots = "", ""
        for block in self.blocks:
            if isinstance(block, Plot):
                plots += block.html()
                continue
            body, plots = body + _row(plots) + block.html(), ""
        return f"<section><h2>{escape(self.title)}</h2><p>{escape(self.text)}</p>{body}{_row(plots)}</section>"


def write_page(
    folder: str | Path,
    *,
    title: str,
    summary: str,
    numbers: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    command: str,
    seconds: float,
) -> Path:
    """Write ``report.html`` and the PNG files of its sections into ``folder``; returns the page's path.

    The page holds everything it shows: no script, no font, nothing is fetched. Files of an earlier report are replaced.

    Args:
        folder: created where it does not exist.
        title: the heading.
        summary: one line below it.
        numbers: (name, value) of the few numbers to see first.
        sections: in their order on the page.
        command: what one types to make this page again.
        seconds: how long the measurements took.
    """
    folder = Path(folder)
    for section in sections:
        for block in section.blocks:
            for name, data in block.files().items():
                write_bytes(folder / name, data)
    stats = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers)
    body = "".join(section.html() for section in sections)
    css = (resources.files("tessella") / "reporting" / "style.css").read_text(encoding="utf-8")
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(summary)}</p><dl>{stats}</dl></header>
<main>{body}</main>
<footer><h2>How this page was made</h2><pre>{escape(command)}</pre><p>{escape(_provenance(seconds))}</p></footer>
</body>
</html>
"""
    write_text(folder / PAGE, page)
    return folder / PAGE


def _provenance(seconds: float) -> str:
    from tessella import __version__

    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = f"Tessella {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    return f"{date} · {versions} · measured in {seconds:,.1f} s"


def _row(plots: str) -> str:
    return f'<div class="plots">{plots}</div>' if plots else ""


def _tile(tile: Tile, shown_px: int) -> str:
    height, width = tile.picture.shape[:2]
    zoom = max(1, shown_px // width)
    images = _image(tile.picture, tile.label)
    if tile.behind is not None:
        images = f'<span class="flip" tabindex="0">{_image(tile.behind, "for comparison")}{images}</span>'
    kind = "tile photo" if zoom * width >= _PHOTO_PX else "tile"
    size = f"width:{zoom * width}px;aspect-ratio:{width}/{height}"
    frame = f'<div class="frame" style="{size}">{images}</div>'
    player = "" if tile.sound is None else f'<audio controls src="{_data_uri(tile.sound, "audio/wav")}"></audio>'
    return f'<div class="{kind}">{frame}<small>{escape(tile.label)}</small>{player}</div>'


def _image(picture: Array, alt: str) -> str:
    return f'<img src="{_data_uri(png(picture))}" alt="{escape(alt)}">'


def _data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode("ascii")
