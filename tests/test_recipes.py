"""The shipped recipes do what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_pictures

import tessella
from tessella import config
from tessella.recipe import read_recipe, recipe_names
from tessella.tokenizer import TokenSpace
from tessella.training.logs import read_log

SMALL = [name for name in recipe_names() if name.endswith("_small") or name.startswith("scq_")]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_siblings_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures", 8, size=72)
    overrides = ["training.steps=2", "training.batch_size=2", "training.log_every=1", "loss.perceptual_weight=0.0"]
    if "adversary" in read_recipe(name).get("loss", {}):
        overrides += ["loss.adversary.start_step=1", "loss.adversary.warmup_steps=1"]
    folder = tessella.train(name, data="pictures", overrides=overrides, out=Path("run"), device="cpu", quiet=True)
    last = read_log(folder / "log.jsonl")[-1]
    assert last["step"] == 2
    assert ("grad_norm/discriminator" in last) == (len(overrides) == 6)


@pytest.mark.parametrize(
    ("name", "codebook_size", "parameters"),
    [
        ("llamagen_b", 16384, 110.89), ("llamagen_l", 16384, 342.91), ("llamagen_xl", 16384, 774.70),
        ("ibq_ar_b", 16384, 342.995), ("ibq_ar_l", 16384, 649.641), ("ibq_ar_xl", 16384, 1076.103),
        ("ibq_ar_xxl", 16384, 2063.332), ("maskgit", 1000, 172.438737),
        ("ctf_b", 16384, 86.51 + 326.66), ("ctf_l", 16384, 310.41 + 326.66), ("ctf_xl", 16384, 734.07 + 326.66),
    ],
)  # fmt: skip
def test_generators_have_the_published_sizes(name: str, codebook_size: int, parameters: float) -> None:
    recipe = read_recipe(name)
    recipe["generator"]["conditioner"]["num_classes"] = 1000
    space = TokenSpace((16, 16), 1, codebook_size, "0")
    with torch.device("meta"):
        generator = config.build_section(recipe, "generator", space=space)
    count = sum(parameter.numel() for parameter in generator.parameters()) / 1e6
    assert count == pytest.approx(parameters, abs=0.012)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ibq_1024", 107.050), ("ibq_8192", 108.885), ("ibq_16384", 110.982), ("ibq_262144", 173.897),
        ("llamagen_vq16", 71.883403), ("maskgit_fsq", 52.962951 - 0.081920), ("maskgit_vq", 54.515587 - 0.081920),
    ],
)  # fmt: skip
def test_tokenizers_have_the_published_sizes(name: str, parameters: float) -> None:
    recipe = read_recipe(name)
    with torch.device("meta"):
        autoencoder, quantizer = (config.build_section(recipe, section) for section in ("autoencoder", "quantizer"))
        tokenizer = config.build_section(recipe, "tokenizer", autoencoder=autoencoder, quantizer=quantizer)
    count = sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6
    assert count == pytest.approx(parameters, abs=0.0006)
