"""``tessella.build``: the model that a recipe describes, untrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import overload

from tessella.checkpoint import fingerprint, load, model_folder
from tessella.commands._data import open_data
from tessella.config import build_section, resolve_recipe
from tessella.data.base import Samples
from tessella.data.token_shards import TokenShards
from tessella.errors import ConfigError
from tessella.generators.base import Generator
from tessella.recipe import override, read_recipe
from tessella.registry import Spec
from tessella.tokenizer import Tokenizer, TokenSpace


@overload
def build(recipe: str, overrides: Sequence[str] = ()) -> Tokenizer: ...
@overload
def build(recipe: str, overrides: Sequence[str] = (), *, tokenizer: Tokenizer | str | Path) -> Generator: ...
def build(
    recipe: str, overrides: Sequence[str] = (), *, tokenizer: Tokenizer | str | Path | None = None
) -> Tokenizer | Generator:
    """The tokenizer that ``recipe`` describes, or with ``tokenizer`` the generator of its tokens, with random weights.

    Args:
        recipe: see :func:`tessella.recipe.read_recipe`.
        overrides: ``"section.key=value"``.
        tokenizer: whose tokens a generator is for: an object, or what :func:`tessella.load` takes.

    Raises:
        ConfigError: a recipe that cannot be built, of a generator without ``tokenizer``, or of a tokenizer with one.
    """
    raw = override(read_recipe(recipe), overrides)
    if ("generator" in raw) != (tokenizer is not None):
        raise ConfigError(
            f"recipe {recipe} is a generator's: give the tokenizer whose tokens it is for"
            if "generator" in raw
            else f"recipe {recipe} is a tokenizer's and takes none"
        )
    if tokenizer is None:
        return tokenizer_of(resolve_recipe({"data": {"name": "photos"}, **raw}))
    source = tokenizer if isinstance(tokenizer, Tokenizer) else load(tokenizer)
    raw.setdefault("data", (source.recipe or {}).get("data", {}))
    return generator_of(generator_recipe(raw, source, open_data(raw["data"], "train")))


def tokenizer_of(recipe: Spec) -> Tokenizer:
    """The tokenizer of a resolved recipe."""
    autoencoder = build_section(recipe, "autoencoder")
    quantizer = build_section(recipe, "quantizer")
    tokenizer: Tokenizer = build_section(recipe, "tokenizer", autoencoder=autoencoder, quantizer=quantizer)
    tokenizer.recipe = recipe
    return tokenizer


def generator_of(recipe: Spec) -> Generator:
    """The generator of a resolved recipe."""
    generator: Generator = build_section(recipe, "generator", space=build_section(recipe, "space"))
    generator.recipe = recipe
    return generator


def generator_recipe(raw: Spec, tokenizer: Tokenizer, dataset: Samples) -> Spec:
    """The resolved recipe of a generator of the tokens that ``tokenizer`` makes of ``dataset``, or that they are.

    Raises:
        ConfigError: shards of another tokenizer, samples of many sizes, or classes that nobody names.
    """
    space = asdict(_token_space(tokenizer, dataset))
    return resolve_recipe({**raw, "space": space, "generator": _with_classes(raw["generator"], dataset)})


def _token_space(tokenizer: Tokenizer, dataset: Samples) -> TokenSpace:
    if isinstance(dataset, TokenShards):
        if dataset.space.fingerprint != fingerprint(tokenizer):
            raise ConfigError(
                f"the shards hold tokens of tokenizer {dataset.space.fingerprint}, not of {fingerprint(tokenizer)}"
            )
        return dataset.space
    if dataset.extent is None:
        wanted = " or ".join(f"data.{key}" for key in sorted(dataset.window)) or "another data set"
        raise ConfigError(f"a generator needs signals of one size: set {wanted}")
    return tokenizer.token_space(*dataset.extent)


def _with_classes(generator: Spec, dataset: Samples) -> Spec:
    """A [generator] whose label conditioner knows the classes of ``dataset``, where the recipe names none."""
    conditioner = generator.get("conditioner", {})
    if conditioner.get("name") != "label" or "num_classes" in conditioner:
        return generator
    if not dataset.class_names:
        raise ConfigError(
            "the data set names no classes: give generator.conditioner.num_classes, or conditioner = {name = 'none'}"
        )
    classes = list(dataset.class_names)
    return {**generator, "conditioner": {**conditioner, "num_classes": len(classes), "class_names": classes}}


def is_generator(model: str | Path) -> bool:
    """Whether a run, checkpoint or saved model is a generator's.

    Raises:
        CheckpointError: there is none.
    """
    from tessella.checkpoint import load_recipe

    return "generator" in load_recipe(model_folder(Path(model)))
