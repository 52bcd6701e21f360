"""Numbers that are long in the making, kept in files that say what they are of."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tessella.storage import write_bytes

logger = logging.getLogger("tessella")

_VERSION = 1


def cached_tensors(
    folder: Path, kind: str, about: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What ``compute`` returns, from a file in ``folder`` where an earlier call with the same arguments left one.

    The file appears complete or not at all. One that is damaged is reported in the log and replaced.

    Args:
        folder: made if it does not exist; safe to delete.
        kind: the start of the file's name.
        about: JSON values that determine the numbers.
        compute: tensors on the CPU by name.
    """
    text = json.dumps({"version": _VERSION, **about}, sort_keys=True)
    file = folder / f"{kind}-{_digest(text.encode())}.safetensors"
    tensors = _read(file, text)
    if tensors is None:
        tensors = {name: value.contiguous() for name, value in compute().items()}
        header = json.dumps({"about": text, "digest": _checksum(text, tensors)})
        write_bytes(file, save(tensors, {"tessella": header}))
    return tensors


def _read(file: Path, text: str) -> dict[str, Tensor] | None:
    """The tensors in a file; None where there is none, or none that can be trusted."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as reader:
            header = json.loads((reader.metadata() or {})["tessella"])
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        if header["about"] != text:
            raise ValueError("it is of other pictures or another network")
        if header["digest"] != _checksum(text, tensors):
            raise ValueError("its numbers do not have the checksum they were written with")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("the reference statistics in %s are damaged (%s) and are computed again", file, error)
        return None
    return tensors


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    return _digest(text.encode(), *(tensors[name].numpy() for name in sorted(tensors)))


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
