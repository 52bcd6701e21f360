"""The tensors of a TorchScript archive, without running the program in it.

An archive is a zip file with a pickle of the module tree, whose classes are programs in ``code/``, and the storages
beside it. The classes are replaced by empty ones that keep their attributes; the pickle may name nothing else than
those, storages, and what puts tensors together.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.interop.reading import Checkpoint, ConversionError

_DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
}  # fmt: skip
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")


def read_torchscript(file: Path) -> Checkpoint:
    """The parameters and buffers of the module in ``file``, by their names.

    Raises:
        ConversionError: no such archive, or one that asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entry = next(
                (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")), None
            )
            if entry is None:
                raise ConversionError(f"{file} is no TorchScript archive: there is no data.pkl in it")
            with archive.open(entry) as stream:
                module = _Unpickler(stream, archive, entry.removesuffix(".pkl")).load()
    except (OSError, ValueError, KeyError, EOFError, AttributeError, IndexError, TypeError, RuntimeError,
            pickle.UnpicklingError, zipfile.BadZipFile) as error:  # fmt: skip
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{file} is damaged or no TorchScript archive: {error}") from error
    return Checkpoint(file, dict(_named(module, "")), "torchscript")


def is_torchscript(file: Path) -> bool:
    """Whether ``file`` is a zip file with programs in it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


class _Module:
    """A module's attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Nothing is imported: every name that may occur is answered here."""
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch.jit._pickle", build): list for build in _LISTS},
        }
        if (module, name) in allowed:
            return allowed[module, name]
        raise ConversionError(f"refused: the archive asks for {module}.{name}, which is no part of a module's weights")

    def persistent_load(self, pid: Any) -> tuple[torch.UntypedStorage, torch.dtype]:
        """A storage of the archive."""
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else (
                torch.UntypedStorage(0)
            )  # fmt: skip
        return self.storages[key], dtype


def _rebuild(storage: tuple[torch.UntypedStorage, torch.dtype], offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch.empty(0, dtype=storage[1]).set_(storage[0], offset, tuple(size), tuple(stride))


def _named(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _named(value, f"{prefix}{name}.")
