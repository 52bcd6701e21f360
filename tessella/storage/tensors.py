"""Tensors as files, written so that the operating system's reason survives when it fails."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tessella.storage.writing import Output


def write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file, readable for whoever may read other new files there.

    Raises:
        OSError: it could not be written.
    """
    file.touch()  # with the rights of any file; safetensors makes one that its owner alone may read
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, dict(about))
    except SafetensorError as error:
        raise _of_the_system(error, file) from error
    file.chmod(mode & 0o777)


def _of_the_system(error: SafetensorError, file: Path) -> Exception:
    """The operating system's error out of the words of safetensors: ``I/O error: ... (os error 28)``."""
    found = re.search(r"os error (\d+)", str(error))
    return error if found is None else OSError(int(found[1]), os.strerror(int(found[1])), str(file))


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """``torch.save``.

    Raises:
        OSError: it could not be written.
    """
    with file.open("wb") as stream:
        output = Output(stream)
        try:
            torch.save(dict(state), cast(IO[bytes], output))
        except RuntimeError as error:
            raise output.error or error from error
