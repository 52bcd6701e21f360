"""Every quantizer with every option through a run with averaged weights, to a model that encodes and decodes."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from conftest import TINY_RECIPE

import tessella
from tessella import cli

from .examples import cases, label


@pytest.mark.parametrize("case", cases(), ids=label)
def test_trains_with_averaged_weights(
    case: tuple[str, dict[str, Any]], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, arguments = case
    recipe = tomllib.loads(TINY_RECIPE)
    recipe["quantizer"] = {"name": name, **arguments}
    # The first sample pictures come before the first checkpoint.
    recipe["training"] |= {"steps": 3, "sample_every": 1, "checkpoint_every": 2}
    (workspace / "one.toml").write_text(tomli_w.dumps(recipe))
    monkeypatch.setattr(sys, "argv", ["tessella", "train", "one.toml", "--out", "run", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    tokenizer = tessella.load("run")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    indices = tokenizer.encode(x)
    if not tokenizer.quantizer.is_soft:
        assert torch.equal(tokenizer.decode(indices), tokenizer(x).x_hat)
