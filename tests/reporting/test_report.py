"""The page: one file that holds everything, with the files beside it."""

from __future__ import annotations

import dataclasses
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from PIL import Image

from tessella.evaluation.codebook import CodeCounter
from tessella.evaluation.image import ImageMetrics
from tessella.evaluation.reconstruction import ReconstructionRecord, evaluate_reconstruction
from tessella.media.image import Image as ImageMedium
from tessella.reporting import Card, Gallery, Picture, Section, Table, Tile, write_page, write_report
from tessella.reporting.plots import curves, smooth, usage_histogram

_VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe"}
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in {"src", "srcset", "href"}:
                assert value is not None
                self.sources.append(value)
            if tag == "img" and name == "alt":
                assert value

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def evaluation_of(codes: CodeCounter) -> ReconstructionRecord:
    """A record as :func:`evaluate_reconstruction` makes it."""

    class Fixed(ImageMetrics):
        def compute(self) -> dict[str, Any]:
            return {"psnr": 27.314, "ssim": 0.91, "lpips": {"vgg16": 0.2}, "l1": 0.03, "l2": 0.002}

        def protocol(self) -> dict[str, Any]:
            return {**super().protocol(), "lpips_files": {"w.safetensors": "ab12" * 4}}

    tokenizer = tiny_tokenizer()
    batch = {"x": torch.zeros(2, 3, 16, 16), "label": torch.zeros(2), "key": ["a", "b"], "skipped": []}
    record = evaluate_reconstruction(tokenizer, [batch], Fixed(), data={"name": "folder"})  # type: ignore[list-item]
    return dataclasses.replace(record, codes=codes, values={**record.values, "seconds": 6.5})


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What a medium is asked to show."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 16, 16, generator=rng) * 2 - 1
    return {
        "x": x,
        "x_hat": (x + 0.1).clamp(-1, 1),
        "indices": torch.randint(0, 12, (3, 4, 4, 1), generator=rng),
        "codebook": torch.randn(16, 4, generator=rng),
        "keys": ["a/1.png", "<b>", "c"],
    }


def arguments(shown: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What :func:`write_report` is given."""
    codes = CodeCounter(16, shown["indices"].shape[-1])
    codes.update(shown["indices"])
    return {
        "title": "A <tokenizer> & more",
        "command": "tessella report run --data 'my <pictures>'",
        "evaluation": evaluation_of(codes),
        "log_rows": [{"step": step, "loss/tokenizer": 1 / step, "psnr_db": 20 + step, "lr": 0.1} for step in (1, 2, 3)],
        "shown": ImageMedium().show(**shown),
        **changes,
    }


def test_report(tmp_path: Path, shown: dict[str, Any]) -> None:
    extra = Section("Samples", "Beside real pictures.", [Picture("samples", np.zeros((4, 4, 3), np.uint8), "four")])
    path = write_report(tmp_path / "run" / "report", **arguments(shown, sections=[extra]))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path.name == "report.html"
    assert page.headings == ["Pictures", "Codebook", "Training", "Numbers", "Samples", "How this page was made"]
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "A &lt;tokenizer&gt; &amp; more" in text
    assert "my &lt;pictures&gt;" in text
    assert "&lt;b&gt;" in text
    for words in (
        "27.31 dB",
        "0.2000",
        "rounded to 8 bits",
        "w.safetensors</td><td>ab12ab12",
        "5 times amplified",
        "measured in 6.5 s",
    ):
        assert words in text, words
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "curve_loss.png", "curve_psnr.png", "errors.png", "originals.png", "reconstructions.png", "report.html",
        "samples.png", "tokens.png", "usage.png",
    ]  # fmt: skip
    with Image.open(path.parent / "originals.png") as image:
        assert image.size == (4 * 16 + 3 * 2, 16)


def test_report_without_log_names_or_codebook(tmp_path: Path, shown: dict[str, Any]) -> None:
    path = write_report(tmp_path, **arguments({**shown, "keys": (), "codebook": None}, log_rows=[]))
    page = Page(path.read_text(encoding="utf-8"))
    assert "Training" not in page.headings
    assert "picture 3" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_hat": torch.zeros(2, 3, 16, 16)}, "one shape"),
        ({"indices": torch.zeros(2, 4, 4, 1, dtype=torch.int64)}, "indices must hold 3 pictures"),
        ({"keys": ["one"]}, "keys must name 3 pictures or none, got 1"),
    ],
)
def test_mismatches_are_refused(shown: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageMedium().show(**{**shown, **change})


def test_small_pictures_are_enlarged_by_whole_numbers(tmp_path: Path) -> None:
    def tile(width: int) -> Tile:
        return Tile(f"{width} px", np.zeros((8, width, 3), np.uint8))

    card = Card([tile(30), tile(7)], title="a", note="b").html()
    assert "width:120px" in card  # 4 x 30, the most that stays within 128
    assert "width:119px" in card  # 17 x 7, the most that stays within the first
    assert "photo" not in card
    assert "tile photo" in Card([tile(500)]).html()
    table = Table(("x", "y"), [("<", "&")])
    page = write_page(
        tmp_path, title="t", summary="s", numbers=[("n", "1")], command="c", seconds=1,
        sections=[Section("One", "text", [Gallery([Card([tile(30)])]), table])],
    )  # fmt: skip
    Page(page.read_text(encoding="utf-8"))
    assert "<td>&lt;</td><td>&amp;</td>" in page.read_text(encoding="utf-8")


def test_curves_skip_what_the_log_lacks() -> None:
    rows = [{"step": 1, "loss/generator": 2.0}, {"step": 2, "loss/generator": 1.0, "psnr_db": 20.0}, {"step": 3}]
    plots = curves(rows)
    assert [plot.name for plot in plots] == ["curve_loss"]
    assert plots[0].caption == "Loss: 2 at step 1, 1 at step 2."


def test_plots_are_drawn_for_both_colour_schemes() -> None:
    plot = usage_histogram(torch.tensor([1, 5, 2]), 8)
    assert "3 of 8 codes" in plot.caption
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")) for data in (plot.light, plot.dark)]
    assert pixels[0].shape == pixels[1].shape
    ink = [image[image[..., 3] > 250][:, :3].mean() for image in pixels]
    assert ink[0] != ink[1]


def test_usage_of_several_codebooks(tmp_path: Path, shown: dict[str, Any]) -> None:
    indices = torch.randint(0, 16, (3, 4, 4, 2), generator=torch.Generator().manual_seed(0))
    path = write_report(tmp_path, **arguments({**shown, "indices": indices}))
    assert {"usage_1.png", "usage_2.png"} <= {file.name for file in tmp_path.iterdir()}
    assert "2 tiles for 2 codebooks" in path.read_text(encoding="utf-8")


def test_smooth_by_hand() -> None:
    assert smooth([1, 2, 6, 4, 5], 1) == pytest.approx([1, 3, 4, 5, 5])
    assert smooth([3.0] * 7, 3) == pytest.approx([3.0] * 7)
