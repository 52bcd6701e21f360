"""``tessella push``: a model to the hub, with what its evaluation found."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tessella.checkpoint import load, load_generator
from tessella.commands._data import data_of, open_data
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath
from tessella.commands.build import is_generator
from tessella.commands.evaluate import EVALUATION
from tessella.errors import ConfigError
from tessella.generators.drawing import SampleSettings, draw, labels_of
from tessella.interop.hub import push as upload

_SHOWN = 8


def push(
    model: AnyPath, repository: str, *, licence: str | None = None, private: bool = False, device: str | None = None
) -> str:
    """Upload a model that was evaluated, with a card of its numbers and a few signals; returns its address.

    Args:
        model: a run, a checkpoint, or a saved model, with the record of ``tessella evaluate`` in its folder.
        repository: ``owner/name`` on the hub.
        licence: of the weights; needed unless the recipe's ``[source]`` has it.
        private: whether only its owner sees it.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.

    Raises:
        ConfigError: no evaluation in the folder.
        ConversionError: the card would lack something, or the hub refused.
    """
    model = Path(model)
    place = pick_device(device)
    folder = model if model.is_dir() else model.parent
    generates = is_generator(model)
    records = sorted(folder.glob("samples-*.json")) if generates else [folder / EVALUATION]
    if not records or not records[0].is_file():
        raise ConfigError(f"no evaluation in {folder}: the card needs its numbers; first: tessella evaluate {model}")
    evaluation = json.loads(records[0].read_text(encoding="utf-8"))
    if generates:
        generator, tokenizer = load_generator(model, device=place)
        labels = labels_of(generator, (), _SHOWN)
        shown = draw(generator, tokenizer, labels=labels, numbers=range(_SHOWN), settings=SampleSettings())
    else:
        dataset = open_data(data_of(load(model), None), "test")
        shown = torch.stack([dataset[index]["x"] for index in range(min(_SHOWN, len(dataset)))])
    return upload(model, repository, evaluation=evaluation, signals=shown.cpu(), licence=licence, private=private)
