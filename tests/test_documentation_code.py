"""Every Python block of README and docs runs, on models that were trained for two steps, and so does the notebook."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tessella

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    file for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if BLOCK.search(file.read_text())
]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))

SHORT = ["training.steps=2", "training.batch_size=2"]
CLASSES = ("church", "french_horn", "parachute", "tench")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: their pictures and sounds, and what the pages before have left in ``runs``."""
    sounds = pytest.importorskip("sounds")
    root = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)
    for index in range(40):
        file = root / "my_pictures" / CLASSES[index % 4] / f"{index:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        _picture(rng, 72, 80).save(file)
    _picture(rng, 101, 57).save(root / "cat.jpg")
    sounds.write_speech(root / "speech", 4, rate=24000, seconds=1.7)
    sounds.write(root / "hello.wav", sounds.tone(0.5, 16000))
    sounds.write(root / "three_hours.flac", sounds.tone(0.8, 16000))
    runs = root / "runs"
    data = str(root / "my_pictures")
    tessella.train("photos_fsq", data=data, out=runs / "mine", overrides=SHORT, device="cpu", quiet=True)
    tessella.train(
        "photos_generator", tokenizer=runs / "mine", out=runs / "draw", overrides=SHORT, device="cpu", quiet=True
    )
    tessella.tokenize(runs / "mine", root / "tokens", device="cpu")
    shutil.copytree(runs / "draw", root / "quickstart" / "generator")
    speech = f"audio_folder:{root / 'speech'}"
    codec = tessella.train(
        "fsq_audio_small", data=speech, out=runs / "fsq_audio_small", overrides=[*SHORT, "data.clip_sec=0.4"],
        device="cpu", quiet=True,
    )  # fmt: skip
    shutil.copytree(codec, runs / "codec")
    tessella.train(
        "speech_ar_small", tokenizer=codec, data=speech, out=runs / "speech_ar_small",
        overrides=[*SHORT, "data.clip_sec=1.6"], device="cpu", quiet=True,
    )  # fmt: skip
    return root


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))


def run(code: str, where: str) -> None:
    """Execute the code of a page in small: two steps in the place of hundreds."""
    small = re.sub(r"training\.steps=\d+", "training.steps=2", code)
    exec(compile(small, where, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run("\n".join(BLOCK.findall(file.read_text(encoding="utf-8"))), file.name)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_the_cells_of_a_notebook_run(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    run("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), file.name)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_was_run_from_top_to_bottom(file: Path) -> None:
    assert file.stat().st_size < 300_000
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
