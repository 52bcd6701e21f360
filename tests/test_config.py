from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tessella import config
from tessella.autoencoders import Conv
from tessella.errors import ConfigError
from tessella.quantizers import FSQ, VQ
from tessella.recipe import differences, override, read_recipe, recipe_names, recipe_summary, to_toml
from tessella.registry import Spec


def test_every_recipe_in_the_package_resolves() -> None:
    for name in recipe_names():
        recipe = read_recipe(name)
        if "generator" in recipe:  # the program adds these when it has seen the tokenizer
            recipe["space"] = {"grid": [4, 4], "num_codebooks": 1, "codebook_size": 8, "fingerprint": "0"}
            recipe.setdefault("data", {"name": "photos"})
        resolved = config.resolve_recipe(recipe)
        # what is stored must read back as the same recipe
        assert differences(tomllib.loads(to_toml(resolved)), resolved) == []
        assert recipe_summary(name)


def test_builds_from_file_name_and_constructor() -> None:
    quantizer = config.build("quantizers", {"name": "fsq", "levels": [8, 5]})
    assert isinstance(quantizer, FSQ)
    assert quantizer.codebook_size == 40


def test_spec_of_builds_the_same_again() -> None:
    quantizer = VQ(16, 4, commitment_weight=0.5)
    spec = config.spec_of(quantizer)
    assert spec["name"] == "vq"
    assert spec["commitment_weight"] == 0.5
    assert config.spec_of(config.build("quantizers", spec)) == spec


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "child.toml").write_text(
        'extends = "photos_fsq"\n[quantizer]\nname = "vq"\ncodebook_size = 8\ndim = 2\n[training]\nsteps = 7\n'
    )
    parent, child = read_recipe("photos_fsq"), read_recipe(str(tmp_path / "child.toml"))
    assert child["quantizer"] == {"name": "vq", "codebook_size": 8, "dim": 2}  # another class takes over nothing
    assert child["training"] == {**parent["training"], "steps": 7}
    assert child["data"] == parent["data"]
    (tmp_path / "lost.toml").write_text('extends = "nobody"\n')
    with pytest.raises(ConfigError, match="unknown recipe 'nobody'"):
        read_recipe(str(tmp_path / "lost.toml"))


def test_a_nested_section_is_checked_and_completed() -> None:
    recipe = override(read_recipe("photos_fsq"), ["loss.adversary.weight=0.2"])
    resolved = config.resolve_recipe(recipe)
    assert resolved["loss"]["adversary"]["weight"] == 0.2
    assert resolved["loss"]["adversary"]["discriminator"] == "patchgan"
    with pytest.raises(ConfigError, match=r"unknown key 'loss.adversary.wieght'; accepted: discriminator"):
        config.resolve_recipe(override(recipe, ["loss.adversary.wieght=1"]))
    with pytest.raises(ConfigError, match=r"'loss.adversary' must be a table, got 3"):
        config.resolve_recipe(override(recipe, ["loss.adversary=3"]))


def test_nested_quantizer_is_built() -> None:
    inner = {"name": "vq", "codebook_size": 8, "dim": 2}
    residual = config.build("quantizers", {"name": "residual", "num_codebooks": 3, "quantizer": inner})
    assert residual.num_codebooks == 3
    assert config.spec_of(config.build("quantizers", config.spec_of(residual))) == config.spec_of(residual)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "fsk"}, "unknown quantizer 'fsk'; choose one of: .*fsq.*vq"),
        ({"name": "os.path"}, "unknown quantizer 'os.path'"),
        ({"name": "base"}, "unknown quantizer 'base'"),
        ({}, "missing key 'quantizer.name'"),
        ({"name": "fsq"}, "missing key 'quantizer.levels'"),
        ({"name": "fsq", "levels": [8, 5], "level": 3}, "unknown key 'quantizer.level'; accepted: levels, convention"),
        ({"name": "fsq", "levels": 8}, "'quantizer.levels' must be .*got 8"),
        ({"name": "fsq", "levels": ["a"]}, "'quantizer.levels' must be .*integer"),
        ({"name": "fsq", "levels": [8], "convention": "papre"}, "'corrected', 'paper', 'wide' or 'symmetric'"),
        ({"name": "fsq", "levels": [2, 5]}, "levels must hold numbers from 3"),
        ({"name": "vq", "codebook_size": "8", "dim": 2}, "'quantizer.codebook_size' must be a valid integer"),
        ({"name": "vq", "codebook_size": 8.5, "dim": 2}, "'quantizer.codebook_size' must be a valid integer"),
        ({"name": "residual", "num_codebooks": 2, "quantizer": "vq"}, "must be a table with a name"),
        (
            {"name": "residual", "num_codebooks": 2, "quantizer": {"name": "vq", "size": 3, "dim": 2}},
            "unknown key 'quantizer.quantizer.size'",
        ),
    ],
)
def test_bad_sections_name_the_key_and_the_choices(spec: Spec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build("quantizers", spec)


def test_override_reads_toml_and_falls_back_to_strings() -> None:
    recipe = {"training": {"steps": 3}, "data": {"name": "photos"}}
    changed = override(recipe, ["training.steps=5", "data.name=folder", "quantizer.levels=[8, 5]"])
    assert changed["training"]["steps"] == 5
    assert changed["data"]["name"] == "folder"
    assert changed["quantizer"]["levels"] == [8, 5]
    assert recipe["training"]["steps"] == 3
    with pytest.raises(ConfigError, match="no assignment"):
        override(recipe, ["training.steps"])


def test_unknown_section_and_recipe() -> None:
    with pytest.raises(ConfigError, match="unknown section 'quantiser'; accepted: data, medium, autoencoder"):
        config.resolve_recipe({"quantiser": {}})
    with pytest.raises(ConfigError, match=r"unknown recipe 'photos_fsk'; choose one of: .*photos_fsq"):
        read_recipe("photos_fsk")
    with pytest.raises(ConfigError, match=r"no recipe file nowhere\.toml"):
        read_recipe("nowhere.toml")


def test_arguments_survive_copying() -> None:
    import copy
    import pickle

    model = Conv(channels=8, multipliers=(1, 2), num_res_blocks=1, latent_dim=4)
    assert config.spec_of(copy.deepcopy(model)) == config.spec_of(model)
    assert config.spec_of(pickle.loads(pickle.dumps(model))) == config.spec_of(model)
