"""The script for machines with a GPU runs whole on one without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import single_threaded

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_everything_that_a_gpu_is_asked_runs_on_a_cpu(tmp_path: Path) -> None:
    parts = ("kernels", "sampling", "coarse to fine", "training step", "262,144 codes")  # the tests are running already
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--smoke", "--out", str(tmp_path),
               "--only", *parts]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=single_threaded(), timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(found) == list(parts)
    assert found["kernels"]["tokens_unlike_float64_of_256"] == 0
    assert found["262,144 codes"]["step"] == 2
    assert "coarse to fine" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_fails_loses_its_own_row_alone(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--smoke", "--out", str(tmp_path),
               "--only", "kernels", "sampling", "--minutes", "0"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=single_threaded(), timeout=600, cwd=ROOT)
    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [row["failed"] for row in found.values()] == ["TimeoutError: no time left of 0.0 minutes"] * 2


def test_the_loop_is_timed_beside_the_bare_step(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/train_loop.py"), "--steps", "4", "--rounds", "1", "--out",
               str(tmp_path), "--set", "data.crop_px=16", "--set", "training.batch_size=2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=single_threaded(), timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "train_loop.json").read_text())["medians"]["ratio_cpu_s"] > 0
