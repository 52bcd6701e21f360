"""The only reader and writer of model files: strict, atomic, versioned, and nothing read can execute code.

A model is a folder with ``model.safetensors`` (weights) and ``recipe.toml`` (how to build what they fit). A training
checkpoint is such a folder with ``state.pt`` beside them: all that continuing needs. A generator's folder, or that of
its run, also holds the tokenizer whose tokens it makes, in ``tokenizer/``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tessella.config import build_section, spec_of
from tessella.errors import ConfigError, TessellaError
from tessella.generators.base import Generator
from tessella.recipe import to_toml
from tessella.registry import Spec
from tessella.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
RECIPE = "recipe.toml"
STATE = "state.pt"
TOKENIZER = "tokenizer"
FORMAT_VERSION = 1

Model = Tokenizer | Generator


class CheckpointError(TessellaError, RuntimeError):
    """A model folder that cannot be read or written; the message names the file."""


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
    _check_version(folder / WEIGHTS)
    load_weights(model, folder / WEIGHTS)
    model.recipe = recipe


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of the generator in ``folder`` is: there, or in the run whose checkpoint it is.

    Raises:
        CheckpointError: in neither.
    """
    for place in (folder / TOKENIZER, folder.parent.parent / TOKENIZER):
        if (place / WEIGHTS).is_file():
            return place
    raise CheckpointError(f"no tokenizer beside the generator: expected {folder / TOKENIZER}")


def model_folder(path: Path) -> Path:
    """The folder that holds the model of ``path``: itself, or the newest checkpoint of a run."""
    if (path / WEIGHTS).is_file():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise CheckpointError(f"no model in {path}: expected {WEIGHTS} and {RECIPE}, or a run with checkpoints/")
    return newest


def save_model(model: Model, path: Path) -> None:
    """Write ``model`` into the folder ``path``, which appears complete or not at all."""
    with atomic_folder(path) as folder:
        write_model(model, folder)


def save_generator(generator: Generator, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a generator and its tokenizer into the folder ``path``; :func:`load_generator` reads them back.

    Raises:
        ValueError: the generator is for the tokens of another tokenizer.
    """
    if generator.space.fingerprint != fingerprint(tokenizer):
        raise ValueError(
            f"the generator is for tokens of tokenizer {generator.space.fingerprint}, not of {fingerprint(tokenizer)}"
        )
    with atomic_folder(Path(path)) as folder:
        write_model(generator, folder)
        (folder / TOKENIZER).mkdir()
        write_model(tokenizer, folder / TOKENIZER)


def write_model(model: Model, folder: Path) -> None:
    """Weights and recipe into an existing folder."""
    recipe = {**(model.recipe or {}), **model_spec(model)}
    # A tensor under two names would be refused by safetensors; clone what is shared.
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One metadata key: with several, their order, and so the file's bytes, would differ from save to save.
    about = {"version": FORMAT_VERSION, "fingerprint": fingerprint(model)}
    save_file(state, folder / WEIGHTS, {"tessella": json.dumps(about)})
    (folder / RECIPE).write_text(to_toml(recipe), encoding="utf-8")


def model_spec(model: Model) -> Spec:
    """The recipe sections that build ``model``."""
    if isinstance(model, Generator):
        return {"generator": spec_of(model, leave_out=frozenset({"space"})), "space": asdict(model.space)}
    return {
        "autoencoder": spec_of(model.autoencoder),
        "quantizer": spec_of(model.quantizer),
        "tokenizer": spec_of(model, leave_out=frozenset({"autoencoder", "quantizer"})),
    }


def fingerprint(model: Model) -> str:
    """Sixteen hexadecimal digits that change whenever a weight or a setting of the model does."""
    digest = hashlib.sha256(json.dumps(model_spec(model), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a safetensors file into ``module``; every key and shape must fit.

    Raises:
        CheckpointError: missing or damaged file, wrong keys, wrong shapes; the message names them.
    """
    with _opened(file) as reader:
        weights = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit: {error}") from error


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, its errors naming it."""
    if not file.is_file():
        raise CheckpointError(f"no weights file {file}")
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def _check_version(file: Path) -> None:
    with _opened(file) as reader:
        about = json.loads((reader.metadata() or {}).get("tessella", "{}"))
    if about.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} is of format version {about.get('version')}; this program reads version {FORMAT_VERSION}"
        )


def load_recipe(folder: Path) -> Spec:
    """The resolved recipe in ``folder``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = folder / RECIPE
    if not file.is_file():
        raise CheckpointError(f"no recipe beside the weights: {file}")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


# --- training checkpoints -------------------------------------------------------------------------------------------


def save_checkpoint(run: Path, step: int, model: Model, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``run/checkpoints/step-########`` (model and training state) and delete all but the newest ``keep``.

    Raises:
        CheckpointError: it could not be written (a full disk); the previous checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step-{step:08d}"
    with atomic_folder(target) as folder:
        write_model(model, folder)
        torch.save(state, folder / STATE)
    for old in _checkpoints(run)[:-keep]:
        shutil.rmtree(old)
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
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} is missing or damaged ({error}); delete {checkpoint} to continue from the checkpoint before it"
        ) from error
    return state


def _checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / WEIGHTS).is_file())


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: writing failed (disk full, no permission).
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        if target.exists():
            replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(replaced)
            temporary.rename(target)
            shutil.rmtree(replaced)
        else:
            temporary.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"could not write {target}: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """:func:`write_bytes` for text."""
    write_bytes(file, text.encode())
