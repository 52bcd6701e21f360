"""From a published checkpoint to a folder of ours, and from a name to a model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from tessella.checkpoint import WEIGHTS
from tessella.interop.base import Checkpoint, ConversionError, Converted, Family, Options, Source, write
from tessella.interop.reading import read_checkpoint, sha256
from tessella.interop.torchscript import is_torchscript, read_torchscript

FAMILIES = (
    "ibq", "ibq_ar", "open_magvit2", "llamagen", "simvq", "taming", "diffusers", "titok", "maskgit_vqgan", "cosmos",
    "encodec",
)  # fmt: skip
# What a file of weights is called in the folders that people download, the best first.
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".th", ".bin", ".jit")
_WHOLE, _HALVES = "autoencoder.jit", ("encoder.jit", "decoder.jit")


def convert(
    family: str | None,
    path: str | Path,
    out: str | Path,
    *,
    licence: str | None = None,
    tokenizer: str | Path | None = None,
    size_px: int | None = None,
) -> Path:
    """Convert a published checkpoint into a folder that :func:`tessella.load` reads, or ``load_generator``.

    Args:
        family: one of :data:`FAMILIES`; recognised from the keys where None.
        path: the file, or a folder that holds it.
        out: the folder to write; what was there is replaced if it was a model, and refused if not.
        licence: of the weights, where it is another than the authors' usual.
        tokenizer: of a generator that comes without its own: its checkpoint, or a folder of ours.
        size_px: side of the pictures a generator makes, where the file's name does not tell.

    Raises:
        ConversionError: no such family, a file that is damaged or not of that family, or tensors that are missing,
            misshapen or unknown. Nothing is written then.
    """
    path, out = Path(path), Path(out)
    _check_out(out)
    if family is not None and family not in FAMILIES:
        raise ConversionError(f"unknown family {family!r}; choose one of: {', '.join(FAMILIES)}")
    checkpoint, files = read_source(path)
    name = recognise(checkpoint, family)
    module = family_module(name)
    options = Options(size_px, None if tokenizer is None else Path(tokenizer))
    converted = module.read(checkpoint, options)
    write(converted, _source(name, module, converted, files, licence), out)
    return out


def family_module(name: str) -> Family:
    """The converter of a family."""
    return cast(Family, import_module(f"tessella.interop.{name}"))


def recognise(checkpoint: Checkpoint, family: str | None = None) -> str:
    """The family whose keys these are.

    Raises:
        ConversionError: none, or another than ``family``.
    """
    found = next((name for name in FAMILIES if family_module(name).recognises(checkpoint)), None)
    if found is None:
        some = ", ".join(list(checkpoint.tensors)[:6])
        wanted = f"a checkpoint of {family}" if family else f"of a known family ({', '.join(FAMILIES)})"
        raise ConversionError(
            f"{checkpoint.file} is not {wanted}; its {len(checkpoint.tensors)} tensors begin with {some}"
        )
    if family not in (None, found):
        raise ConversionError(f"{checkpoint.file} is not a checkpoint of {family}: its keys are those of {found}")
    return found


def read_source(path: Path) -> tuple[Checkpoint, list[Path]]:
    """The tensors of a file or folder, and the files that they are from.

    Raises:
        ConversionError: nothing to read there, several candidates, or a file that cannot be read.
    """
    if not path.is_dir():
        return _read(path), [path]
    if (path / _WHOLE).is_file():
        return _read(path / _WHOLE), [path / _WHOLE]
    halves = [path / name for name in _HALVES]
    if all(half.is_file() for half in halves):
        parts = [_read(half) for half in halves]
        return Checkpoint(path, {name: x for part in parts for name, x in part.tensors.items()}, "torchscript"), halves
    for suffix in SUFFIXES:
        found = sorted(file for file in path.iterdir() if file.suffix == suffix)
        if len(found) == 1:
            return _read(found[0]), found
        if found:
            names = ", ".join(file.name for file in found)
            raise ConversionError(f"{path} holds several checkpoints; name one of: {names}")
    raise ConversionError(f"{path} holds no file of weights ({', '.join(SUFFIXES)})")


def _read(file: Path) -> Checkpoint:
    return read_torchscript(file) if is_torchscript(file) else read_checkpoint(file)


def _source(name: str, module: Family, converted: Converted, files: list[Path], licence: str | None) -> Source:
    return Source(
        family=name,
        model=converted.name,
        file=", ".join(file.name for file in files),
        sha256=", ".join(sha256(file) for file in files),
        licence=licence or module.LICENCE,
        paper=module.PAPER,
        protocol=module.PROTOCOL,
        weights=converted.weights,
    )


def _check_out(out: Path) -> None:
    if out.is_file():
        raise ConversionError(f"{out} is a file; name a folder to write")
    if out.is_dir() and any(out.iterdir()) and not (out / WEIGHTS).is_file():
        raise ConversionError(f"{out} exists and holds no model; name another folder")
