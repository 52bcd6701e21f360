"""The folder is the registry: what a recipe can name is a file of a family's folder, found without importing it."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from tessella.errors import ConfigError

Spec = dict[str, Any]

# Folder -> the protocol in its base.py that its classes implement.
FAMILIES = {
    "data": "Samples",
    "media": "Medium",
    "autoencoders": "Autoencoder",
    "quantizers": "Quantizer",
    "objectives": "Objective",
    "conditioners": "Conditioner",
    "generators": "Generator",
}

_CLASS = re.compile(r"^class (\w+)(?:\(([^)]*)\))?:", re.MULTILINE)
_PACKAGE = Path(__file__).parent
_registered: dict[tuple[str, str], type] = {}


def register(family: str, name: str, cls: type) -> None:
    """Let recipes name a class that is not part of the package, for as long as this process lives.

    An installed package does the same for good by an entry point of the group ``tessella.<family>``. A recipe that is
    read from a folder can only name what one of the two, or the package itself, provides: reading imports nothing else.

    Args:
        family: a key of :data:`FAMILIES`.
        name: what recipes call it.
        cls: an implementation of the family's protocol.

    Raises:
        ValueError: unknown family, a name that the package itself uses, or a class of another kind.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose one of: {', '.join(FAMILIES)}")
    if name in _files(family):
        raise ValueError(f"{name!r} is the package's own {singular(family)}")
    if not issubclass(cls, _protocol(family)) or inspect.isabstract(cls):
        raise ValueError(f"{cls.__name__} does not implement {FAMILIES[family]}")
    _registered[family, name] = cls


def names(family: str) -> list[str]:
    """What recipes can name: the files of ``tessella/<family>`` with an implementation, and what is registered."""
    more = [name for other, name in _registered if other == family]
    return sorted({*_files(family), *more, *_entry_points(family)})


def registered(family: str) -> dict[str, type]:
    """Every implementation of a family by its name."""
    return {name: find(family, name) for name in names(family)}


def find(family: str, name: str) -> type:
    """The class that recipes call ``name``.

    Raises:
        ConfigError: there is none; the message lists the choices.
    """
    if not isinstance(name, str) or name not in names(family):
        raise ConfigError(f"unknown {singular(family)} {name!r}; choose one of: {', '.join(names(family))}")
    if (family, name) not in _registered:
        _registered[family, name] = _load(family, name)
    return _registered[family, name]


def name_of(cls: type) -> str | None:
    """What recipes call a class; None if it is of no family."""
    module = cls.__module__.split(".")
    if len(module) == 3 and module[0] == "tessella" and module[1] in FAMILIES:
        return module[2]
    return next((name for (_, name), known in _registered.items() if known is cls), None)


def summary(family: str, name: str) -> str:
    """The first line of the class's docstring, read from its file where it has one."""
    if name not in _files(family):
        return (inspect.getdoc(find(family, name)) or "").split("\n")[0]
    text = (_PACKAGE / family / f"{name}.py").read_text(encoding="utf-8")
    found = re.search(rf'^class {_files(family)[name]}\b[^:]*:\n\s+r?"""(.*?)(?:"""|\n)', text, re.MULTILINE)
    return "" if found is None else found[1]


def singular(family: str) -> str:
    """What one member of a family is called in messages."""
    return {"data": "data set", "media": "medium"}.get(family, family.removesuffix("s"))


def _protocol(family: str) -> type:
    return getattr(importlib.import_module(f"tessella.{family}.base"), FAMILIES[family])  # type: ignore[no-any-return]


def _load(family: str, name: str) -> type:
    if name in _files(family):
        module = importlib.import_module(f"tessella.{family}.{name}")
        return getattr(module, _files(family)[name])  # type: ignore[no-any-return]
    point = _entry_points(family)[name]
    cls = point.load()
    if not (inspect.isclass(cls) and issubclass(cls, _protocol(family))):
        raise ConfigError(f"entry point {point.value} does not implement {FAMILIES[family]}")
    return cls


@cache
def _entry_points(family: str) -> dict[str, Any]:
    """What installed packages provide, by name."""
    from importlib.metadata import entry_points  # takes a while to import

    return {point.name: point for point in entry_points(group=f"tessella.{family}")}


@cache
def _files(family: str) -> dict[str, str]:
    """File name -> class, for files with an implementation: the first public class that descends from the protocol.

    Read as text, so that listing what there is imports neither torch nor anything else.
    """
    folder = _PACKAGE / family
    classes: dict[str, list[tuple[str, list[str]]]] = {}
    for file in sorted(folder.glob("*.py")):
        found = _CLASS.findall(file.read_text(encoding="utf-8"))
        classes[file.stem] = [
            (name, [base.split("[")[0].strip().split(".")[-1] for base in bases.split(",")]) for name, bases in found
        ]
    parents = {name: bases for found in classes.values() for name, bases in found}

    def descends(name: str) -> bool:
        return name == FAMILIES[family] or any(descends(base) for base in parents.get(name, ()) if base != name)

    implementations = {
        stem: next((name for name, bases in found if name[0] != "_" and "ABC" not in bases and descends(name)), None)
        for stem, found in classes.items()
        if not stem.startswith("_") and stem != "base"
    }  # fmt: skip
    return {stem: name for stem, name in implementations.items() if name is not None}
