"""Models by name: ``hf://owner/name`` from the Hugging Face hub, ours or published ones; and ours to it.

What the hub sends is kept in its own cache, and works from there without a network. A published checkpoint is converted
once, into a cache of ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessella.checkpoint import (
    RECIPE,
    TOKENIZER,
    WEIGHTS,
    load,
    load_generator,
    load_recipe,
    model_folder,
    tokenizer_folder,
)
from tessella.config import medium_of
from tessella.extras import require
from tessella.generators.base import Generator
from tessella.interop.convert import SUFFIXES, convert
from tessella.interop.reading import ConversionError
from tessella.media.base import Medium
from tessella.storage import write_checksums
from tessella.tokenizer import Tokenizer

SCHEME = "hf://"
_SMALL = ["*.json", "*.toml", "README.md"]
_CARD, _GRID, _EVALUATION = "README.md", "grid", "evaluation.json"  # the grid gets the ending of a picture
_SHOWN = 6


class Name(NamedTuple):
    """``hf://owner/name@revision/file``, of which revision and file may be absent."""

    repo: str
    revision: str | None
    file: str | None


def parse(name: str) -> Name:
    """The parts of a name.

    Raises:
        ConversionError: it has another form.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", name)
    if match is None:
        raise ConversionError(f"{name} is no name on the hub; write hf://OWNER/NAME, with @REVISION and /FILE behind "
                              "where wanted")  # fmt: skip
    return Name(match[1], match[2], match[3])


def from_pretrained(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    cache: Path | None = None,
    licence: str | None = None,
    endpoint: str | None = None,
) -> Tokenizer:
    """The tokenizer of a name on the hub or of a path: a folder of ours, or a published checkpoint, converted first.

    Args:
        name: ``hf://owner/name``, with ``@revision`` and ``/file`` where wanted; or a file or folder.
        device: where to put it.
        cache: folder for what is downloaded and converted; by default the hub's own and the user's.
        licence: see :func:`tessella.interop.convert.convert`.
        endpoint: another hub than the default one.

    Raises:
        ConversionError: nothing of that name, or nothing that can be converted.
        CheckpointError: a folder of ours that cannot be read.
    """
    folder = local_folder(name, cache=cache, licence=licence, endpoint=endpoint)
    recipe = load_recipe(model_folder(folder))
    return load(folder / TOKENIZER if "generator" in recipe else folder, device=device)


def generator_from_pretrained(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
    size_px: int | None = None,
    cache: Path | None = None,
    licence: str | None = None,
    endpoint: str | None = None,
) -> tuple[Generator, Tokenizer]:
    """The generator of a name, and the tokenizer of its tokens; see :func:`from_pretrained`.

    Args:
        name, device, cache, licence, endpoint: see there.
        tokenizer, size_px: see :func:`tessella.interop.convert.convert`.
    """
    if isinstance(tokenizer, str) and tokenizer.startswith(SCHEME):
        tokenizer = local_folder(tokenizer, cache=cache, endpoint=endpoint)
    folder = local_folder(
        name, cache=cache, licence=licence, endpoint=endpoint, tokenizer=tokenizer, size_px=size_px
    )  # fmt: skip
    return load_generator(folder, device=device)


def local_folder(
    name: str | Path, *, cache: Path | None = None, licence: str | None = None, endpoint: str | None = None,
    tokenizer: str | Path | None = None, size_px: int | None = None,
) -> Path:  # fmt: skip
    """A folder of ours with the model of ``name``: see :func:`from_pretrained`."""
    path, stated = Path(name), licence
    if str(name).startswith(SCHEME):
        path, on_card = pull(str(name), cache=cache, endpoint=endpoint)
        stated = licence or on_card
    if path.is_dir() and ((path / RECIPE).is_file() or (path / "checkpoints").is_dir()):
        return path
    if not path.exists():
        raise ConversionError(f"no model {name}: neither a file nor a folder, nor a name that begins with {SCHEME}")
    out = _cache(cache) / "converted" / _key(path, stated, tokenizer, size_px)
    if not (out / WEIGHTS).is_file():
        convert(None, path, out, licence=stated, tokenizer=tokenizer, size_px=size_px)
    return out


def pull(name: str, *, cache: Path | None = None, endpoint: str | None = None) -> tuple[Path, str | None]:
    """What is needed of a repository: the path of our folder or of the one file of weights, and the licence it states.

    Raises:
        ConversionError: no such repository, no weights in it, or several.
    """
    repo, revision, file = parse(name)
    hub = require("huggingface_hub", extra="hub")
    options: dict[str, Any] = {"repo_id": repo, "revision": revision, "endpoint": endpoint}
    options["cache_dir"] = None if cache is None else cache / "hub"
    try:
        folder = Path(hub.snapshot_download(allow_patterns=_SMALL, **options))
        stated = _licence(folder)
        if file is None and (folder / RECIPE).is_file():
            return Path(hub.snapshot_download(allow_patterns=[*_SMALL, "*.safetensors"], **options)), stated
        file = file or _only_weights(hub, folder, name, repo, revision, endpoint)
        folder = Path(hub.snapshot_download(allow_patterns=[file], **options))
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ConversionError(f"{name} cannot be had: {error}") from error
    if not (folder / file).is_file():
        raise ConversionError(f"{name}: no file {file} in {repo}")
    return folder / file, stated


def push(
    model: Path,
    repo: str,
    *,
    evaluation: Mapping[str, Any],
    signals: Tensor,
    licence: str | None = None,
    data: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Upload a model of ours with a card that says what it is and how good; returns the repository's address.

    Args:
        model: folder or run.
        repo: ``owner/name``; made if it does not exist.
        evaluation: the record of ``tessella evaluate``, as its JSON holds it.
        signals: ``[B, C, *X]`` in [-1, 1]: originals, which a tokenizer is shown to rebuild; or a generator's samples.
        licence: of the weights; needed unless the recipe's ``[source]`` has it.
        data: what it was trained on, in words; needed unless the recipe has a ``[data]``.
        private: whether only its owner sees it.
        endpoint: another hub than the default one.

    Raises:
        ConversionError: the card would lack something; the message names it. Or the hub refused.
    """
    hub = require("huggingface_hub", extra="hub")
    folder = model_folder(model)
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch)
        _stage(folder, stage, repo, evaluation, signals, licence, data)
        try:
            api = hub.HfApi(endpoint=endpoint, library_name="tessella")
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=stage, commit_message="Weights, recipe and card")
        except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
            raise ConversionError(f"{repo} could not be uploaded: {error}") from error
    return str(address)


def _stage(
    folder: Path, stage: Path, repo: str, evaluation: Mapping[str, Any], signals: Tensor, licence: str | None,
    data: str | None,
) -> None:  # fmt: skip
    """Lay out what will be uploaded."""
    from tessella.interop.card import model_card

    card = model_card(folder, repo, evaluation, licence=licence, data=data)
    recipe = load_recipe(folder)
    rows = [signals[:_SHOWN]]
    if "generator" in recipe:
        beside = tokenizer_folder(folder)
        recipe = load_recipe(beside)
        shutil.copytree(beside, stage / TOKENIZER, ignore=shutil.ignore_patterns("*.pt", "*.log"))
    else:
        tokenizer = load(folder)
        rows.append(tokenizer.decode(tokenizer.encode(rows[0], pad=True), extent=signals.shape[2:]))
    for name in (WEIGHTS, RECIPE):
        shutil.copyfile(folder / name, stage / name)
    write_checksums(stage)
    (stage / _CARD).write_text(card, encoding="utf-8")
    (stage / _EVALUATION).write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    medium: Medium = medium_of(recipe)
    medium.preview(rows, stage / _GRID)


def _only_weights(
    hub: ModuleType, folder: Path, name: str, repo: str, revision: str | None, endpoint: str | None
) -> str:  # fmt: skip
    """The one file of weights in a repository, safetensors before pickles."""
    if require("huggingface_hub.constants", extra="hub").HF_HUB_OFFLINE:
        files = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    else:
        files = hub.HfApi(endpoint=endpoint).list_repo_files(repo, revision=revision)
    for suffix in SUFFIXES:
        found = sorted(file for file in files if file.endswith(suffix))
        if len(found) == 1:
            return found[0]
        if found:
            raise ConversionError(f"{name} holds several checkpoints; write {SCHEME}{repo}/FILE with one of: "
                                  f"{', '.join(found)}")  # fmt: skip
    raise ConversionError(f"{name} holds no file of weights ({', '.join(SUFFIXES)})")


def _licence(folder: Path) -> str | None:
    """The ``license`` in the head of a model card, if there is one."""
    card = folder / _CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    stated = re.search(r"^license: *([^\n]+)$", head[1], re.MULTILINE) if head else None
    return stated[1].strip().strip("\"'") if stated else None


def _cache(cache: Path | None) -> Path:
    if cache is not None:
        return cache
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tessella"


def _key(path: Path, *settings: object) -> str:
    """A folder's name for what is converted from ``path``: another one when the file or a setting changes."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((facts, [str(setting) for setting in settings])).encode()).hexdigest()[:16]
