"""The only reader and writer of model files: strict, atomic, versioned, verified, and nothing read can execute code.

A model is a folder with ``model.safetensors`` (weights), ``recipe.toml`` (how to build what they fit) and
``checksums.json``. A training checkpoint is such a folder with ``state.pt`` beside them: all that continuing needs. A
generator's folder, or that of its run, also holds the tokenizer whose tokens it makes, in ``tokenizer/``.

Format 2 brought the checksums, a version in every file, and recipes that name medium and loss; format 1 is still read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tessella.config import build_section, spec_of
from tessella.errors import ConfigError
from tessella.generators.base import Generator
from tessella.recipe import to_toml
from tessella.registry import Spec
from tessella.storage import (
    CHECKSUMS,
    StorageError,
    atomic_folder,
    recover,
    remove_folder,
    verify,
    write_checksums,
    write_text,
)
from tessella.storage.tensors import write_state, write_tensors
from tessella.tokenizer import Tokenizer

logger = logging.getLogger("tessella")

WEIGHTS = "model.safetensors"
RECIPE = "recipe.toml"
STATE = "state.pt"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
FORMAT_VERSION = 2

_STEP = re.compile(r"step-[0-9]{8}")
_HEADER = re.compile(r"# Tessella recipe, format ([0-9]+), SHA-256 of what follows: ([0-9a-f]{64})")

Model = Tokenizer | Generator


class CheckpointError(StorageError):
    """A model folder that cannot be read; the message names the file, and what to do about it."""


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Tokenizer:
    """The tokenizer in ``path``, in eval mode.

    Args:
        path: a folder written by :meth:`Tokenizer.save`, a training checkpoint, or a training run (its newest
            complete checkpoint is taken).
        device: where to put it.

    Raises:
        CheckpointError: no model there, a damaged file, or weights that do not fit the recipe.
    """
    folder = model_folder(Path(path))
    recipe = load_recipe(folder)
    if "generator" in recipe:
        raise CheckpointError(f"{folder} holds a generator; its tokenizer is {tokenizer_folder(folder)}")
    try:
        autoencoder = build_section(recipe, "autoencoder")
        quantizer = build_section(recipe, "quantizer")
        tokenizer: Tokenizer = build_section(recipe, "tokenizer", autoencoder=autoencoder, quantizer=quantizer)
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{folder / RECIPE}: {error}") from error
    _load_into(tokenizer, folder, recipe)
    return tokenizer.to(device).eval()


def load_generator(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[Generator, Tokenizer]:
    """The generator in ``path`` and the tokenizer of its tokens, in eval mode.

    Args:
        path: a folder written by :func:`save_generator`, a training checkpoint, or a training run (its newest
            complete checkpoint is taken).
        device: where to put both.

    Raises:
        CheckpointError: no generator there, a damaged file, weights that do not fit the recipe, or a tokenizer beside
            it that did not make its tokens.
    """
    folder = model_folder(Path(path))
    recipe = load_recipe(folder)
    if "generator" not in recipe:
        raise CheckpointError(f"{folder} holds a tokenizer, not a generator")
    tokenizer = load(tokenizer_folder(folder), device=device)
    try:
        generator: Generator = build_section(recipe, "generator", space=build_section(recipe, "space"))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{folder / RECIPE}: {error}") from error
    if generator.space.fingerprint != fingerprint(tokenizer):
        raise CheckpointError(
            f"{folder} generates tokens of tokenizer {generator.space.fingerprint}, but "
            f"{tokenizer_folder(folder)} is {fingerprint(tokenizer)}"
        )
    _load_into(generator, folder, recipe)
    return generator.to(device).eval(), tokenizer


def _load_into(model: Model, folder: Path, recipe: Spec) -> None:
    if not (folder / CHECKSUMS).exists():
        _warn_unverified(folder)
    with _advice(folder):
        load_weights(model, folder / WEIGHTS, own=True)
    model.recipe = recipe


@cache
def _warn_unverified(folder: Path) -> None:
    """Once a folder."""
    logger.warning("%s has no %s: what is read from it cannot be verified", folder, CHECKSUMS)


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of the generator in ``folder`` is: there, or in the run whose checkpoint it is.

    Raises:
        CheckpointError: in neither.
    """
    for place in (folder / TOKENIZER, folder.parent.parent / TOKENIZER):
        recover(place.parent)
        if (place / WEIGHTS).is_file():
            return place
    raise CheckpointError(f"no tokenizer beside the generator: expected {folder / TOKENIZER}")


def model_folder(path: Path) -> Path:
    """The folder that holds the model of ``path``: itself, or the newest checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    recover(path.parent)
    if (path / WEIGHTS).is_file():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise CheckpointError(f"no model in {path}: expected {WEIGHTS} and {RECIPE}, or a run with checkpoints/")
    return newest


def save_model(model: Model, path: Path) -> None:
    """Write ``model`` into the folder ``path``, which appears complete or not at all.

    Raises:
        StorageError: it could not be written; what was there before is untouched.
    """
    with atomic_folder(path) as folder:
        write_model(model, folder)


def save_generator(generator: Generator, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a generator and its tokenizer into the folder ``path``; :func:`load_generator` reads them back.

    Raises:
        ValueError: the generator is for the tokens of another tokenizer.
        StorageError: it could not be written; what was there before is untouched.
    """
    if generator.space.fingerprint != fingerprint(tokenizer):
        raise ValueError(
            f"the generator is for tokens of tokenizer {generator.space.fingerprint}, not of {fingerprint(tokenizer)}"
        )
    with atomic_folder(Path(path)) as folder:
        write_model(generator, folder)
        (folder / TOKENIZER).mkdir()
        write_model(tokenizer, folder / TOKENIZER)


def write_model(
    model: Model, folder: Path, state: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
) -> None:
    """Weights, recipe, training state if there is one, and checksums into an existing folder."""
    weights = model.state_dict() if weights is None else weights
    write_recipe(folder, {**(model.recipe or {}), **model_spec(model)})
    # A tensor under two names would be refused by safetensors; clone what is shared.
    own = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    # One metadata key: with several, their order, and so the file's bytes, would differ from save to save.
    about = {"version": FORMAT_VERSION, "fingerprint": fingerprint(model, weights)}
    write_tensors(folder / WEIGHTS, own, {"tessella": json.dumps(about)})
    if state is not None:
        write_state(folder / STATE, {"version": FORMAT_VERSION, "state": state})
    write_checksums(folder)


def write_recipe(folder: Path, recipe: Spec) -> None:
    """Write ``recipe`` into ``folder``; its first line, a comment, holds its format and checksum.

    Raises:
        StorageError: it could not be written.
    """
    text = to_toml(recipe)
    digest = _recipe_digest(FORMAT_VERSION, text)
    write_text(
        folder / RECIPE, f"# Tessella recipe, format {FORMAT_VERSION}, SHA-256 of what follows: {digest}\n{text}"
    )


def _recipe_digest(version: int, text: str) -> str:
    return hashlib.sha256(f"{version}\n{text}".encode()).hexdigest()


def model_spec(model: Model) -> Spec:
    """The recipe sections that build ``model``; as its recipe has them, if that was written before some argument was.

    So a model that did not change keeps its fingerprint when a method gets an argument more.
    """
    known = model.recipe or {}
    if isinstance(model, Generator):
        space = asdict(model.space)
        return {
            "generator": spec_of(model, leave_out=frozenset({"space"}), known=known.get("generator")),
            "space": space,
        }
    parts = frozenset({"autoencoder", "quantizer"})
    return {
        "autoencoder": spec_of(model.autoencoder, known=known.get("autoencoder")),
        "quantizer": spec_of(model.quantizer, known=known.get("quantizer")),
        "tokenizer": spec_of(model, leave_out=parts, known=known.get("tokenizer")),
    }


def fingerprint(model: Model, weights: dict[str, Tensor] | None = None) -> str:
    """Sixteen hexadecimal digits that change whenever a weight or a setting of the model does.

    ``weights`` are those of the model, where it does not hold them whole itself.
    """
    digest = hashlib.sha256(json.dumps(model_spec(model), sort_keys=True).encode())
    for name, value in sorted((model.state_dict() if weights is None else weights).items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_weights(module: nn.Module, file: Path, *, own: bool = False) -> None:
    """Load a safetensors file into ``module``; every key and shape must fit, and a checksum beside it.

    Args:
        module: receives the weights.
        file: of the weights.
        own: whether the file must be one of a model that this program wrote, in a format it knows.

    Raises:
        CheckpointError: missing or damaged file, wrong keys, wrong shapes; the message names them.
    """
    with _opened(file) as reader:
        about = json.loads((reader.metadata() or {}).get("tessella", "{}"))
        _check_version(file, about.get("version") if own else FORMAT_VERSION)
        weights = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit: {error}") from error


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file that was verified, its errors naming it."""
    if not file.is_file():
        raise CheckpointError(f"no weights file {file}")
    _verify(file)
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def _verify(file: Path) -> None:
    try:
        verify(file.parent, file.name)
    except StorageError as error:
        raise CheckpointError(str(error)) from error


def _check_version(file: Path, version: Any) -> None:
    if version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"{file} is of format version {version}; this program reads versions up to {FORMAT_VERSION}"
        )


def load_recipe(folder: Path) -> Spec:
    """The resolved recipe in ``folder``, in today's format.

    Raises:
        CheckpointError: there is none, or it is damaged or was edited.
    """
    file = folder / RECIPE
    recover(folder.parent)
    if not file.is_file():
        raise CheckpointError(f"no recipe beside the weights: {file}")
    with _advice(folder):
        _verify(file)
        try:
            text = file.read_bytes().decode()
            version = 1
            if text.startswith("#"):
                version, text = _open_recipe(file, text)
            return migrate(tomllib.loads(text), version)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:  # no UTF-8, no TOML
            raise CheckpointError(f"{file} is damaged: {error}") from error


def _open_recipe(file: Path, text: str) -> tuple[int, str]:
    """Version and text of a recipe, without the first line that states and guards them."""
    first, _, text = text.partition("\n")
    header = _HEADER.fullmatch(first)
    if header is None or header[2] != _recipe_digest(int(header[1]), text):
        raise CheckpointError(f"{file} is damaged or was edited: it does not fit the checksum in its first line")
    _check_version(file, int(header[1]))
    return int(header[1]), text


def migrate(recipe: Spec, version: int) -> Spec:
    """A resolved recipe of an earlier format as today's would be. Format 1 knew pictures alone, and one loss."""
    if version >= 2 or "generator" in recipe:
        return recipe
    migrated = {**recipe, "medium": {"name": "image"}}
    if "loss" in recipe:
        migrated["loss"] = {"name": "image", **recipe["loss"]}
    return migrated


@contextmanager
def _advice(folder: Path) -> Iterator[None]:
    """Errors of reading the checkpoint ``folder`` of a run say what to do about it."""
    try:
        yield
    except CheckpointError as error:
        if not (_STEP.fullmatch(folder.name) and folder.parent.name == CHECKPOINTS):
            raise
        before = [other.name for other in _checkpoints(folder.parent.parent) if other.name < folder.name]
        further = f"to go on from {before[-1]}" if before else "to start anew; there is no checkpoint before it"
        raise CheckpointError(f"{error}; delete {folder} {further}") from error


# --- training checkpoints -------------------------------------------------------------------------------------------


def save_checkpoint(
    run: Path, step: int, model: Model, state: dict[str, Any], *, keep: int, weights: dict[str, Tensor] | None = None
) -> Path:
    """Write ``run/checkpoints/step-########`` (model and training state) and delete all but the newest ``keep``.

    Args:
        run: folder of the run.
        step: the number in the name.
        model: what is saved.
        state: what continuing needs besides.
        keep: how many checkpoints stay.
        weights: those of the model, where it does not hold them whole itself.

    Raises:
        StorageError: it could not be written (a full disk); the previous checkpoints are untouched.
    """
    target = run / CHECKPOINTS / f"step-{step:08d}"
    with atomic_folder(target) as folder:
        write_model(model, folder, state, weights)
    for old in _checkpoints(run)[:-keep]:
        remove_folder(old)
    return target


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, if it has any."""
    found = _checkpoints(run)
    return found[-1] if found else None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    file = checkpoint / STATE
    recover(checkpoint.parent)
    with _advice(checkpoint):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        _verify(file)
        try:
            contents = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged pickle raises, its bytes decide
            raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from error
        if not isinstance(contents, dict):
            raise CheckpointError(f"{file} is damaged: it holds no training state")
        version = contents.get("version", 1)
        _check_version(file, version)
        state: dict[str, Any] = contents if version == 1 else contents["state"]
        return state


def _checkpoints(run: Path) -> list[Path]:
    """Oldest first. What is called otherwise, users put there."""
    folder = run / CHECKPOINTS
    recover(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path / WEIGHTS).is_file())
