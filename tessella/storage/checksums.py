"""Checksums: of the files of a folder, and of a record within itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tessella.storage.writing import StorageError, write_text

CHECKSUMS = "checksums.json"
_FORMAT, _VERSION = "tessella-checksums", 1
_SEAL = "checksum"


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json`` with the SHA-256 of every other file of ``folder``; call it last.

    Hidden files are left out, and sub-folders have their own.
    """
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and path.name != CHECKSUMS
    )
    digests = {path.name: _digest(path) for path in files}
    write_sealed(folder / CHECKSUMS, {"format": _FORMAT, "version": _VERSION, "sha256": digests})


def verify(folder: Path, *names: str) -> bool:
    """Compare files of ``folder`` with its ``checksums.json``; all that it lists if none is named.

    A file is read once from the disk: what reads it afterwards finds it in the system's cache, unless it is larger than
    the memory.

    Returns:
        False if there is no ``checksums.json``: nothing was compared.

    Raises:
        StorageError: a file is missing, not listed, or not what was written.
    """
    if not (folder / CHECKSUMS).exists():
        return False
    record = read_sealed(folder / CHECKSUMS)
    if (record.get("format"), record.get("version")) != (_FORMAT, _VERSION):
        raise StorageError(
            f"{folder / CHECKSUMS} is {record.get('format')} of version {record.get('version')}; "
            f"this program reads {_FORMAT} of version {_VERSION}"
        )
    digests: dict[str, str] = record["sha256"]
    for name in names or digests:
        file = folder / name
        if name not in digests:
            raise StorageError(f"{file} is not listed in {CHECKSUMS}: it was not written with the other files there")
        try:
            digest = _digest(file)
        except OSError as error:
            raise StorageError(f"{file} cannot be read: {error.strerror}") from error
        if digest != digests[name]:
            raise StorageError(f"{file} is damaged: its SHA-256 is {digest}, {digests[name]} was written")
    return True


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- records that carry their own -------------------------------------------------------------------------------------


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` and, under ``checksum``, the SHA-256 of their JSON; :func:`unseal` verifies it.

    Args:
        values: anything that JSON can hold.
    """
    rest = {key: value for key, value in values.items() if key != _SEAL}
    return {**rest, _SEAL: _checksum(rest)}


def unseal(values: dict[str, Any], *, where: str | Path) -> dict[str, Any]:
    """What was sealed.

    Args:
        values: of :func:`seal`, through JSON or not.
        where: what the error names.

    Raises:
        StorageError: there is no checksum, or it does not fit.
    """
    rest = {key: value for key, value in values.items() if key != _SEAL}
    if values.get(_SEAL) != _checksum(rest):
        raise StorageError(f"{where} is damaged: it does not fit its own checksum")
    return rest


def write_sealed(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON record that carries its own checksum.

    Raises:
        StorageError: it could not be written.
    """
    write_text(file, _text(seal(values)))


def read_sealed(file: Path) -> dict[str, Any]:
    """What :func:`write_sealed` wrote, if not a byte has changed since.

    Raises:
        StorageError: no such file, or one that was damaged or edited.
    """
    try:
        text = file.read_bytes().decode()
        values = json.loads(text)
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise StorageError(f"{file} is damaged: it is no JSON object")
    rest = unseal(values, where=file)
    if text != _text(values):  # a space turned into a tab changes no value
        raise StorageError(f"{file} is damaged: it is not written as it was")
    return rest


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


def _checksum(values: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(values))  # as a reader sees them: keys are strings, tuples are lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
