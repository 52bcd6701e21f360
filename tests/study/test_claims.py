from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tessella.cli.app import app
from tessella.errors import ConfigError
from tessella.registry import Spec
from tessella.study import generation, premise
from tessella.study.cells import run_cells
from tessella.study.claims import EXPERIMENTS, Setting, Size, claims

WEIGHTS = Path("/work/shared/data/weights")
TINY = Size(
    steps=2, pictures=20, usage=(("VQ", 4, 2), ("FSQ", 4, 1)), scq=(("VQ", 4, 2), ("SCQ refined", 4, 1)),
    premise=(("FSQ", 4, 1),), generated_over=("FSQ", 4), generator_steps=2, generator_seeds=1, num_clusters=2,
    samples=12,
)  # fmt: skip
WITHOUT_GENERATION = ("usage", "scq", "premise")


def test_runs_resumes_and_writes_the_page(tmp_path: Path) -> None:
    verdicts = claims(tmp_path, data="photos", only=WITHOUT_GENERATION, size=TINY, jobs=1)
    assert list(verdicts) == list(WITHOUT_GENERATION)
    page = (tmp_path / "claims.md").read_text()
    assert page.startswith("# The papers' claims")
    assert "tessella study claims --only usage,scq,premise --out OUT --data photos" in page
    for experiment in EXPERIMENTS.values():
        assert page.count(f"## {experiment.title}\n") == (experiment is not EXPERIMENTS["generation"])
    assert "not run | cannot be decided here (it would take six generators" in page
    assert "Another's numbers" in page
    for picture in tmp_path.glob("claims_*.png"):
        assert f"({picture.name})" in page
    assert len(list(tmp_path.glob("claims_*.png"))) == 6
    cells = {path.parent.name for path in tmp_path.glob("cells/*/result.json")}
    assert cells == {"VQ-4-0", "VQ-4-1", "FSQ-4-0", "SCQ-refined-4-0", "premise-FSQ-4-0"}  # shared, and run once
    marked = tmp_path / "cells" / "VQ-4-0" / "result.json"
    marked.write_text(json.dumps({**json.loads(marked.read_text()), "seconds": 36000.0}))
    claims(tmp_path, data="photos", only=["usage"], size=TINY, jobs=1)
    page = (tmp_path / "claims.md").read_text()
    assert "10.0 hours" in page  # read, not run again
    assert f"## {EXPERIMENTS['premise'].title}\n" in page  # what an earlier call ran stays


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown experiment 'collapse'; choose from: usage, scq, premise, gen"):
        claims(tmp_path, data="photos", only=["collapse"])
    with pytest.raises(ConfigError, match="'generation' judges pictures by a network: give its weights with --weights"):
        claims(tmp_path, data="photos")
    result = CliRunner().invoke(app, ["study", "claims", "--help"])
    assert result.exit_code == 0
    assert not list(tmp_path.iterdir())


def test_every_cell_of_the_default_plan_can_be_named() -> None:
    setting = Setting({"name": "photos", "crop_px": 32}, WEIGHTS, Size())
    for experiment in EXPERIMENTS.values():
        cells = experiment.cells(setting)
        assert len({cell.name for cell in cells}) == len(cells)
        assert all(json.loads(json.dumps(cell.settings)) == cell.settings for cell in cells)


def test_another_member_of_a_cluster() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 2])
    place = torch.arange(6).repeat(2000)
    drawn = premise.other_member(place, labels, labels[place], torch.Generator().manual_seed(0))
    assert torch.equal(labels[drawn], labels[place])
    assert torch.equal(drawn == place, place == 5)  # never its own code, save where there is no other
    counts = drawn[place == 0].bincount(minlength=6)
    assert counts[[0, 1, 3, 5]].sum() == 0
    assert counts[2] == pytest.approx(1000, abs=120)
    other = premise.other_member(place, labels, (labels[place] + 1) % 3, torch.Generator().manual_seed(0))
    assert torch.equal(labels[other], (labels[place] + 1) % 3)
    assert set(other[place == 5].tolist()) == {0, 2, 4}


def test_the_premise_follows_the_numbers() -> None:
    def rows(method: str, bits: int, costs: list[float]) -> list[dict[str, object]]:
        return [{"method": method, "bits": bits, "seed": seed, "cost_db": cost} for seed, cost in enumerate(costs)]

    little, grows = premise.verdicts([*rows("VQ", 10, [2.0, 2.1, 2.2]), *rows("VQ", 14, [0.4, 0.45, 0.5])])
    assert little.word == "holds only where: VQ 2^14"
    assert grows.word == "holds"
    little, grows = premise.verdicts([*rows("VQ", 10, [2.0]), *rows("VQ", 14, [0.4])])
    assert little.word.startswith("cannot be decided here")
    assert grows.word.startswith("cannot be decided here")


def test_the_generators_compared() -> None:
    data: Spec = {"name": "photos", "crop_px": 32}
    tokenizer = Setting(data, WEIGHTS, TINY).tokenizers([("FSQ", 4, 1)])[0]
    cells = generation.cells(tokenizer, seeds=2, steps=5, samples=9, weights=WEIGHTS)
    assert len(cells) == 1 + 2 * 3
    half, whole = (generation.methods(512)[f"coarse to fine, {name}"] for name in ("half each", "each as large"))
    base = generation.methods(512)["next token"]["num_layers"]
    assert half["coarse"]["num_layers"] + half["fine"]["num_layers"] == base
    assert whole["coarse"]["num_layers"] == whole["fine"]["num_layers"] == base


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs the weights of EfficientNet-Lite0")
def test_generators_and_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    setting = Setting({"name": "photos", "crop_px": 32}, WEIGHTS, TINY)
    experiment = EXPERIMENTS["generation"]
    run_cells(experiment.tokenizers(setting), tmp_path, jobs=1)
    rows = run_cells(experiment.cells(setting), tmp_path, jobs=1)
    text = experiment.table(rows)
    for name in ("real", "reconstructions", "next token", "coarse to fine, half each"):
        assert f"| {name} |" in text
    for name in ("FD-EffLite0", "KD-EffLite0", "coverage-EffLite0", "coarse bits", "fine bits"):
        assert f" {name} |" in text
    coarse = next(row for row in rows if row.get("method") == "coarse to fine, half each")
    assert coarse["coarse_bits"] == pytest.approx(1, abs=0.2)  # of two clusters, hardly trained
    assert 0 < coarse["fine_bits"] < 3.91  # of 15 codes
    assert all(verdict.word.startswith("cannot be decided here") for verdict in experiment.verdicts(rows))
