from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import single_threaded

from tessella.checkpoint import latest_checkpoint, load, load_state
from tessella.config import resolve_recipe
from tessella.errors import ConfigError
from tessella.study import collapse as study

PHOTOS = {"name": "photos", "crop_px": 32}


def test_grid_stops_where_a_method_becomes_too_dear() -> None:
    few: dict[str, Any] = {"data": PHOTOS, "steps": 2, "pictures": 2}
    grid = [cell.labels for cell in study.cells(["VQ", "SCQ exact"], [8, 6, 16], seeds=2, **few)]
    assert [cell["bits"] for cell in grid] == sorted(cell["bits"] for cell in grid)
    assert {cell["bits"] for cell in grid if cell["method"] == "SCQ exact"} == {6, 8}
    assert sum(cell["method"] == "VQ" for cell in grid) == 6
    with pytest.raises(ConfigError, match="unknown method 'VQQ'; choose from: VQ,"):
        study.cells(["VQQ"], [8], 1, **few)
    with pytest.raises(ConfigError, match=r"no size 2\^7; choose from"):
        study.cells(["VQ"], [7], 1, **few)


@pytest.mark.parametrize("method", list(study.METHODS))
def test_every_method_at_its_largest_size_is_a_valid_recipe(method: str) -> None:
    largest = max(bits for bits in study.FSQ_LEVELS if bits <= study.METHODS[method][1])
    resolved = resolve_recipe(study.recipe_of(method, largest, 0, data=PHOTOS, steps=10))
    assert resolved["training"]["steps"] == 10


def test_runs_resumes_and_refuses_other_settings(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": "photos", "methods": ["VQ", "SCQ refined"], "bits": [6], "steps": 2,
                                "pictures": 20, "jobs": 1}  # fmt: skip
    rows = study.collapse(tmp_path, **settings)
    assert [r["method"] for r in rows] == ["VQ", "SCQ refined"]
    assert rows[0]["psnr"] == pytest.approx(rows[0]["hard_psnr"])  # hard: the indices are the whole story
    assert rows[1]["psnr"] != rows[1]["hard_psnr"]
    assert rows[0]["num_tokens"] == 20 * 64
    table = (tmp_path / "table.md").read_text()
    assert table.count("| VQ | 64 |") == 1
    assert "## Claims" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"collapse_{name}.png" for name in ("usage", "psnr", "histograms", "curves")
    }
    assert [point["step"] for point in rows[0]["curve"]] == [1, 2]
    tokenizer = load(tmp_path / "cells" / "VQ-6-0" / "model")  # kept for the experiments that read it
    assert tokenizer.quantizer.codebook_size == 64
    marked = tmp_path / "cells" / "VQ-6-0" / "result.json"
    marked.write_text(json.dumps({**json.loads(marked.read_text()), "perplexity": 123.0}))
    again = study.collapse(tmp_path, **settings)
    assert again[0]["perplexity"] == 123.0  # read, not run again
    with pytest.raises(ConfigError, match="holds a study with other settings"):
        study.collapse(tmp_path, **{**settings, "steps": 3})


def test_terminated_it_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tessella", "study", "collapse", "--out", str(tmp_path), "--data", "photos",
        "--bits", "6", "--methods", "VQ,FSQ,LFQ", "--steps", "100000", "--jobs", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, env=single_threaded())
    log = tmp_path / "cells" / "VQ-6-0" / "run" / "log.jsonl"
    while not (log.is_file() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes of the study are still alive")
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["VQ-6-0"]  # none that waited was begun
    checkpoint = latest_checkpoint(log.parent)
    assert checkpoint is not None
    assert load_state(checkpoint)["position"] >= 1
