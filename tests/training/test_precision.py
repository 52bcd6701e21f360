"""bf16 only where it is computed natively, and a run keeps what it began with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from conftest import picture_step, tiny_tokenizer, write_pictures

from tessella.checkpoint import load_state
from tessella.data.folder import Folder
from tessella.recipe import read_recipe, recipe_names
from tessella.training import precision
from tessella.training.loop import Loop

CPU = torch.device("cpu")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    flags = ("avx2", "avx512_bf16") if request.param else ("avx2", "avx512f")
    monkeypatch.setattr(precision, "_processor_flags", lambda: flags)


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")], indirect=["native"])
@pytest.mark.usefixtures("native")
def test_auto_is_what_the_device_computes(chosen: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tessella"):
        assert precision.resolve_precision("auto", CPU) == chosen
    assert f"precision {chosen}" in caplog.text


@pytest.mark.parametrize("native", [False], indirect=True)
@pytest.mark.usefixtures("native")
def test_imitated_bf16_is_kept_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert precision.resolve_precision("bf16", CPU) == "bf16"
    assert "times as long as in fp32" in caplog.text
    assert precision.resolve_precision("fp32", CPU) == "fp32"


def test_a_run_that_goes_on_elsewhere_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Folder(write_pictures(tmp_path / "pictures", 8), split="train", crop_px=16)
    for steps, flags, expected in ((1, ("avx512_bf16",), "bf16"), (2, (), "bf16")):
        monkeypatch.setattr(precision, "_processor_flags", lambda flags=flags: flags)
        loop = Loop(steps=steps, batch_size=2, num_workers=0, precision="auto", warmup_steps=0)
        loop.run(picture_step(tiny_tokenizer()), data, tmp_path / "run", device=CPU, quiet=True)
        assert load_state(tmp_path / f"run/checkpoints/step-{steps:08d}")["precision"] == expected


def test_no_recipe_asks_for_bf16_where_it_may_be_slow() -> None:
    for name in recipe_names():
        assert read_recipe(name).get("training", {}).get("precision") != "bf16", name
