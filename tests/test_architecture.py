"""Imports only point down, and the project speaks of itself alone."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import tessella
from tessella import registry

PACKAGE = Path(tessella.__file__).parent

# Every module or folder may import those of lower rank, and its own folder.
RANKS = {
    "errors": 0, "processes": 0, "text": 0,
    "storage": 1, "registry": 1, "extras": 1, "distributed": 1,
    "config": 2, "recipe": 2,
    "ops": 3, "transformer": 3,
    "quantizers": 4, "autoencoders": 4, "conditioners": 4,
    "tokenizer": 5,
    "generators": 6,
    "checkpoint": 7,
    "data": 8, "losses": 8,
    "evaluation": 9,
    "reporting": 10, "objectives": 10,
    "media": 11, "tokenization": 11,
    "training": 12,
    "commands": 13,
    "study": 14,
    "cli": 15,
    "__main__": 16, "__init__": 16,
}  # fmt: skip

# Why a module may look up, once each.
EXCEPTIONS = {
    ("tokenizer", "checkpoint"),  # Tokenizer.save; imported when called
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tessella":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tessella.")}
    return found


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    unit = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert unit in RANKS, f"give {unit} a rank"
    for other in imported(file) & set(RANKS):
        if other != unit and (unit, other) not in EXCEPTIONS:
            assert RANKS[other] < RANKS[unit], f"{file} imports {other}"


def test_every_module_is_documented() -> None:
    for file in modules():
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{file} has no docstring"


@pytest.mark.parametrize("family", ["autoencoders", "conditioners", "generators", "quantizers"])
def test_a_family_exports_its_classes(family: str) -> None:
    module = importlib.import_module(f"tessella.{family}")
    classes = {cls.__name__ for cls in registry.registered(family).values()}
    assert classes <= set(module.__all__)
    assert {getattr(module, name).__name__ for name in classes} == classes
