"""The page that people see of a model on the hub: what it is, how to use it, what it was trained on, how good it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tessella.checkpoint import WEIGHTS, load_recipe
from tessella.interop.reading import ConversionError
from tessella.registry import Spec

# What the hub calls the licences it knows; any other is "other", with its name.
_KNOWN = {"mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "openrail"}
_TOKENIZER_TAGS = {"image": "image-feature-extraction", "audio": "feature-extraction"}
_GENERATOR_TAG = "unconditional-image-generation"


def model_card(
    folder: Path, repo: str, evaluation: Mapping[str, Any], *, licence: str | None = None, data: str | None = None
) -> str:
    """The card of the model in ``folder``, in the hub's Markdown with its header; ``grid.png`` lies beside it.

    Args:
        folder: of ours.
        repo: the name it will have.
        evaluation: the record of its evaluation, as its JSON holds it.
        licence: of the weights; by default that of the recipe's ``[source]``.
        data: what it was trained on; by default the recipe's ``[data]``, or what the source says.

    Raises:
        ConversionError: a fact that the card needs is nowhere to be found; the message says how to give it.
    """
    recipe = load_recipe(folder)
    source: Spec = recipe.get("source", {})
    licence = licence or source.get("licence")
    trained_on = data or _data(recipe) or (f"see {source['paper']}, whose weights these are" if source else None)
    missing = []
    if not licence:
        missing.append("the licence of the weights (licence=...)")
    if not trained_on:
        missing.append("what it was trained on (data=...)")
    if "protocol" not in evaluation:
        missing.append("an evaluation with its protocol (run `tessella evaluate` first)")
    if missing:
        raise ConversionError(f"{folder}: the model card needs {'; '.join(missing)}")
    assert licence is not None
    lines = [
        *_header(recipe, licence),
        f"# {repo.partition('/')[2]}",
        "",
        _summary(recipe, folder),
        "",
        "![Originals, and below them what the tokens give back](grid.png)"
        if "generator" not in recipe
        else "![Samples](grid.png)",
        "",
        "## Use",
        "",
        *_use(recipe, repo),
        "",
        "## Numbers",
        "",
        *_numbers(evaluation),
        "",
        "## Training data",
        "",
        f"{trained_on}.",
        "",
        *_origin(source),
        "## Licence",
        "",
        f"Weights: {licence}.",
        "",
    ]
    return "\n".join(lines)


def _header(recipe: Spec, licence: str) -> list[str]:
    known = licence.lower() in _KNOWN
    medium = recipe.get("medium", {}).get("name", "image")
    tag = _GENERATOR_TAG if "generator" in recipe else _TOKENIZER_TAGS.get(medium, "feature-extraction")
    fields: dict[str, Any] = {
        "library_name": "tessella",
        "pipeline_tag": tag,
        "license": licence.lower() if known else "other",
        **({} if known else {"license_name": licence}),
        "tags": ["tokenizer", "discrete", recipe["generator" if "generator" in recipe else "quantizer"]["name"]],
    }
    # JSON values are YAML values.
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---", ""]


def _summary(recipe: Spec, folder: Path) -> str:
    with safe_open(folder / WEIGHTS, framework="pt") as reader:
        count = sum(math.prod(reader.get_slice(name).get_shape()) for name in reader.keys())  # noqa: SIM118
    if "generator" in recipe:
        grid, codebooks = recipe["space"]["grid"], recipe["space"]["num_codebooks"]
        size = recipe["space"]["codebook_size"]
        return (
            f"A generator of discrete tokens (`{recipe['generator']['name']}`): {' x '.join(map(str, grid))} "
            f"positions, {codebooks} of {size:,} codes each; {count:,} numbers. Its tokenizer lies in `tokenizer/`."
        )
    return (
        f"A discrete tokenizer: `{recipe['autoencoder']['name']}` autoencoder, `{recipe['quantizer']['name']}` codes; "
        f"{count:,} numbers. `recipe.toml` beside the weights says how to build it."
    )


def _use(recipe: Spec, repo: str) -> Iterator[str]:
    yield "```python"
    yield "import tessella"
    yield ""
    if "generator" in recipe:
        yield f'generator, tokenizer = tessella.generator_from_pretrained("hf://{repo}")'
    else:
        yield f'tokenizer = tessella.from_pretrained("hf://{repo}")'
        yield "indices = tokenizer.encode(x)      # x [B, C, ...] in [-1, 1]; indices [B, ..., K]"
        yield "x_hat = tokenizer.decode(indices)"
    yield "```"


def _numbers(evaluation: Mapping[str, Any]) -> Iterator[str]:
    protocol: Mapping[str, Any] = evaluation["protocol"]
    meaning = protocol.get("meaning", {})
    yield "| number | value | what it is |"
    yield "|---|---|---|"
    for key, value in evaluation.items():
        if key != "protocol":
            for name, shown in _scalars({key: value}):
                yield f"| {name} | {shown} | {meaning.get(key, '')} |"
    yield ""
    yield "Measured so:"
    yield ""
    for name, value in _scalars({key: value for key, value in protocol.items() if key != "meaning"}):
        yield f"- {name}: {value}"


def _scalars(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested tables, their paths in words."""
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{name}, ")
        elif value not in (None, "", []):
            yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _data(recipe: Spec) -> str | None:
    section = recipe.get("data")
    if not section:
        return None
    return ", ".join(f"{key} {value}" for key, value in section.items() if value not in (None, "", []))


def _origin(source: Spec) -> Iterator[str]:
    if source:
        yield "## Origin"
        yield ""
        yield f"{source['model']}, {source['paper']}, converted from `{source['file']}` (SHA-256 {source['sha256']}), "
        yield f"{'moving averages' if source['weights'] == 'ema' else 'weights as they are'}. "
        yield f"Its authors evaluate so: {source['protocol']}."
        yield ""
