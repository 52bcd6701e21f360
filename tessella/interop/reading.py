"""Checkpoints of other programs, whatever container they come in; nothing read can execute code.

A container is a file of safetensors, or one of ``torch.save``: the tensors themselves, or a dictionary that holds them
under ``ema``, ``state_dict`` (Lightning), ``model``, ``module`` or ``model_state_dict``. Pickles are read by torch's
own restricted unpickler. Objects of trainers that lie beside the weights (callbacks, hyperparameters) are replaced by
empty stand-ins, so that their packages are neither needed nor run; any other object refuses the file by name.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessella.checkpoint import CheckpointError

EMA = "model_ema."
_CONTAINERS = ("ema", "state_dict", "model", "module", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")
# Packages whose objects trainers store beside the weights. They are never imported: a stand-in takes their place.
_TRAINERS = (
    "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "omegaconf", "argparse", "pathlib",
    "typing", "collections", "ml_collections", "numpy",
)  # fmt: skip
_SHOWN = 12
_UNREADABLE = (
    RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError,
    pickle.UnpicklingError, BadZipFile,
)  # fmt: skip
_CHUNK = 1 << 22


class ConversionError(CheckpointError):
    """A checkpoint that cannot be converted; the message names the file, the keys, and what is accepted."""


class Problems(list[str]):
    """What is wrong with a checkpoint, gathered before anything is refused."""

    def keys(self, what: str, names: list[str]) -> None:
        """Note ``names``, the first dozen of them, under a heading."""
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            self.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")

    def refuse(self, file: Path, as_what: str) -> None:
        """Raise, if anything was noted.

        Raises:
            ConversionError: with every problem.
        """
        if self:
            raise ConversionError(f"{file} is not {as_what}:\n  " + "\n  ".join(self))


@dataclass
class Checkpoint:
    """The tensors of a file by name, on disk until they are used.

    Attributes:
        file: where they come from.
        tensors: by their published names.
        container: what held them: ``safetensors``, ``bare``, or the key of a dictionary.
    """

    file: Path
    tensors: dict[str, Tensor]
    container: str = "bare"

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or averaged(name) in self.tensors

    @property
    def has_average(self) -> bool:
        """Whether moving averages of the weights lie beside them, under names without dots."""
        return any(name.startswith(EMA) for name in self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            ConversionError: there is none of this name.
        """
        for candidate in (name, averaged(name)):
            if candidate in self.tensors:
                return tuple(self.tensors[candidate].shape)
        raise ConversionError(f"{self.file} has no tensor {name!r}")

    def under(self, prefix: str) -> Checkpoint:
        """The tensors whose names begin with ``prefix``, without it."""
        inner = {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}
        return Checkpoint(self.file, inner, self.container)

    def digest(self) -> str:
        """SHA-256 of the file, 64 hexadecimal digits."""
        return sha256(self.file)


def averaged(name: str) -> str:
    """Where a moving average of ``name`` lies: Lightning modules cannot register names with dots."""
    return EMA + name.replace(".", "")


def sha256(file: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_checkpoint(file: Path) -> Checkpoint:
    """The tensors of ``file``, mapped from disk rather than read.

    Raises:
        ConversionError: no such file, a damaged or truncated one, a pickle that names code, or no weights in it.
    """
    if not file.is_file():
        raise ConversionError(f"no checkpoint file {file}")
    if file.stat().st_size == 0:
        raise ConversionError(f"{file} is empty")
    if file.suffix == ".safetensors" or _looks_like_safetensors(file):
        tensors, container = _read_safetensors(file), "safetensors"
    else:
        container, found = _weights_of(_read_pickle(file), file)
        tensors = dict(_tensors(found, file))
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): x for name, x in tensors.items()}
    if not tensors:
        raise ConversionError(f"{file} holds no tensors")
    return Checkpoint(file, tensors, container)


def _looks_like_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(9)[8:9] == b"{"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{file} is damaged or no safetensors file: {error}") from error


def _read_pickle(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
        stand_ins = _stand_ins(file) if zipped else []
        with torch.serialization.safe_globals(stand_ins):
            # Only the zip format can be mapped; the one before it is read whole.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except ConversionError:
        raise
    except _UNREADABLE as error:
        reason = str(error).split("\n", 1)[0]
        raise ConversionError(f"{file} is damaged or cannot be read safely: {reason}") from error


def _stand_ins(file: Path) -> list[Any]:
    """Empty classes by the names of the trainers' objects in a pickle.

    Raises:
        ConversionError: it names anything else, which only running code could bring to life.
    """
    found = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    strange = sorted(name for name in found if name.partition(".")[0] not in _TRAINERS)
    if strange:
        raise ConversionError(f"{file} is refused: its pickle asks for {', '.join(strange[:_SHOWN])}, which is no part "
                              "of a checkpoint's weights and could run code")  # fmt: skip
    return [(type("StandIn", (_StandIn,), {}), name) for name in found]


class _StandIn:
    """Takes the place of a trainer's object; holds nothing and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _weights_of(content: Any, file: Path) -> tuple[str, Mapping[Any, Any]]:
    """The dictionary of tensors in ``content``, and the key it lay under."""
    if not isinstance(content, Mapping):
        raise ConversionError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    for key in _CONTAINERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return key, inner
    if any(isinstance(value, Tensor) for value in content.values()):
        return "bare", content
    raise ConversionError(f"{file} holds no tensors at its top nor under {', '.join(_CONTAINERS)}; its keys are "
                          f"{', '.join(map(str, list(content)[:_SHOWN]))}")  # fmt: skip


def _tensors(content: Mapping[Any, Any], file: Path) -> Iterator[tuple[str, Tensor]]:
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        problems = Problems()
        problems.keys("entries that are no tensors", strange)
        problems.refuse(file, "a dictionary of tensors")
    for name, value in content.items():
        yield str(name), value.detach()
