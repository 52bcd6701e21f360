"""Configurations of other programs, written as their files have them, against our shipped recipes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tessella.config import resolve_recipe
from tessella.interop import ConversionError
from tessella.interop.configs import convert_config
from tessella.recipe import read_recipe

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

DDCONFIG = {
    "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 4, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip
LOSS = {"disc_conditional": False, "disc_in_channels": 3, "disc_start": 0}
DATA = {"train": {"target": "x", "params": {"config": {"size": 256}}}}
IBQ = {
    "trainer": {"devices": 8, "num_nodes": 8, "precision": "16-mixed", "max_epochs": 330},
    "model": {
        "class_path": "src.IBQ.models.ibqgan.IBQ",
        "init_args": {
            "ddconfig": DDCONFIG,
            "lossconfig": {"target": "y", "params": {**LOSS, "disc_weight": 0.4, "quant_loss_weight": 1.0,
                                                     "entropy_loss_weight": 0.05, "gen_loss_weight": 0.1,
                                                     "lecam_loss_weight": 0.05}},
            "n_embed": 16384, "embed_dim": 256, "learning_rate": "1e-4", "l2_normalize": False,
            "use_entropy_loss": True, "entropy_temperature": 0.01, "beta": 0.25, "use_ema": True,
            "lr_drop_epoch": [250, 300],
        },
    },
    "data": {"class_path": "z", "init_args": {"batch_size": 4, "num_workers": 16, **DATA}},
}  # fmt: skip
TAMING = {
    "model": {
        "base_learning_rate": "4.5e-6", "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": 256, "n_embed": 1024, "ddconfig": {**DDCONFIG, "num_res_blocks": 2},
            "lossconfig": {"target": "y", "params": {**LOSS, "disc_start": 250001, "disc_weight": 0.8,
                                                     "codebook_weight": 1.0}},
        },
    },
    "data": {"target": "z", "params": {"batch_size": 3, "num_workers": 8, **DATA}},
}  # fmt: skip
SIMVQ = {
    "trainer": {"devices": 4, "num_nodes": 1, "max_epochs": 50, "precision": "16-mixed"},
    "model": {
        "class_path": "taming.models.vq.VQModel",
        "init_args": {
            "ddconfig": {"z_channels": 128, "resolution": 128, "in_channels": 3, "out_ch": 3, "ch": 128,
                         "ch_mult": [1, 2, 2, 4], "num_res_blocks": 2},
            "quantconfig": {"target": "taming.modules.vqvae.quantize.SimVQ",
                            "params": {"n_e": 65536, "e_dim": 128, "beta": 0.25, "legacy": False}},
            "lossconfig": {"target": "y", "params": {**LOSS, "gen_loss_weight": 0.1, "commit_weight": 1.0}},
            "learning_rate": "1e-4", "use_ema": True,
        },
    },
    "data": {"init_args": {"batch_size": 64, "train": {"params": {"config": {"size": 128}}}}},
}  # fmt: skip
MAGVIT = {
    **IBQ,
    "model": {
        "class_path": "src.Open_MAGVIT2.models.lfqgan.VQModel",
        "init_args": {
            "ddconfig": {**{key: x for key, x in DDCONFIG.items() if key != "attn_resolutions"}, "z_channels": 18},
            "lossconfig": {"params": {**LOSS, "gen_loss_weight": 0.1, "codebook_weight": 0.1, "commit_weight": 0.25}},
            "n_embed": 262144, "embed_dim": 18, "learning_rate": "1e-4", "use_ema": True,
        },
    },
}  # fmt: skip


def converted(content: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    out = convert_config(folder / "config.yaml", folder / "recipe.toml")
    return resolve_recipe(read_recipe(str(out))), out.read_text()


@pytest.mark.parametrize(
    ("content", "shipped", "sections"),
    [
        (IBQ, "ibq_16384", ("data", "autoencoder", "quantizer", "tokenizer", "loss")),
        (SIMVQ, "simvq_65k", ("data", "autoencoder", "quantizer", "tokenizer", "loss")),
        (TAMING, "vqgan", ("autoencoder", "tokenizer")),
        ({"vq_model": "VQ-16"}, "llamagen_vq16", ("data", "autoencoder", "quantizer", "tokenizer", "loss")),
    ],
)  # fmt: skip
def test_they_become_the_shipped_recipes(
    content: dict[str, Any], shipped: str, sections: tuple[str, ...], tmp_path: Path
) -> None:
    ours, _ = converted(content, tmp_path)
    expected = resolve_recipe(read_recipe(shipped))
    for recipe in (ours, expected):
        recipe["autoencoder"].setdefault("num_decoder_res_blocks", None)
    for section in sections:
        assert ours[section] == expected[section], section


def test_training_is_taken_over(tmp_path: Path) -> None:
    ours, text = converted(IBQ, tmp_path)
    training, expected = ours["training"], resolve_recipe(read_recipe("ibq_16384"))["training"]
    for key in ("batch_size", "accumulate", "lr", "betas", "ema_decay", "optimizer", "decay"):
        assert training[key] == expected[key], key
    epoch = 5005  # batches of 256 in 1,281,167 pictures, the last one not full
    assert (training["steps"], training["milestones"]) == (330 * epoch, [250 * epoch, 300 * epoch])
    assert "# Not taken over: model.init_args.lossconfig.params.quant_loss_weight = 1.0" in text
    assert "# Not taken over: data.init_args.num_workers = 16" in text


def test_learning_rates_that_are_multiplied(tmp_path: Path) -> None:
    ours, _ = converted(TAMING, tmp_path)
    assert ours["training"]["lr"] == pytest.approx(4.5e-6 * 3)
    assert (ours["quantizer"]["commitment_weight"], ours["quantizer"]["codebook_weight"]) == (1.0, 0.25)
    assert ours["loss"]["adversary"]["adaptive"]
    assert ours["loss"]["adversary"]["start_step"] == 250001


def test_open_magvit2(tmp_path: Path) -> None:
    ours, _ = converted(MAGVIT, tmp_path)
    assert ours["autoencoder"]["name"] == "open_magvit2"
    assert ours["quantizer"]["dim"] == 18


def test_refused(tmp_path: Path) -> None:
    broken = copy.deepcopy(IBQ)
    del broken["model"]["init_args"]["n_embed"]  # type: ignore[index]
    for content, reason in (
        (broken, r"config\.yaml has no model\.init_args\.n_embed"),
        ({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion"}}, "is none of: taming's VQModel"),
        ({"lr": 1}, "names no model"),
        ({"vq_model": "VQ-4"}, "vq_model must be VQ-8 or VQ-16, got 'VQ-4'"),
    ):
        with pytest.raises(ConversionError, match=reason):
            converted(content, tmp_path)
    (tmp_path / "config.yaml").write_text("a: !!python/object/apply:os.system ['touch executed']")
    with pytest.raises(ConversionError, match="is no YAML"):
        convert_config(tmp_path / "config.yaml", tmp_path / "recipe.toml")
    with pytest.raises(ConversionError, match=r"ends in \.toml"):
        convert_config(tmp_path / "config.yaml", tmp_path / "recipe")
