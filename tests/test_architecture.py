"""Imports only point down, and the project speaks of itself alone."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import tessella
from tessella import registry

PACKAGE = Path(tessella.__file__).parent

# Every module or folder may import those of lower rank, and its own folder.
RANKS = {
    "described": 0, "errors": 0, "processes": 0, "text": 0,
    "storage": 1, "registry": 1, "extras": 1, "distributed": 1,
    "config": 2, "recipe": 2,
    "attention": 3, "labels": 3, "ops": 3,
    "transformer": 4,
    "quantizers": 5, "autoencoders": 5, "conditioners": 5,
    "tokenizer": 6,
    "generators": 7, "streaming": 7,
    "checkpoint": 8,
    "data": 9, "losses": 9,
    "evaluation": 10,
    "reporting": 11, "objectives": 11,
    "media": 12, "tokenization": 12,
    "training": 13, "interop": 13, "explorer": 13,
    "commands": 14,
    "study": 15,
    "cli": 16,
    "__main__": 17, "__init__": 17,
}  # fmt: skip

# Why a module may look up, once each.
EXCEPTIONS = {
    ("tokenizer", "checkpoint"),  # Tokenizer.save; imported when called
    ("tokenizer", "streaming"),  # Tokenizer.stream; imported when called
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


MAX_LINES, MAX_COMMAND_LINES = 450, 200


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_is_two_things(file: Path) -> None:
    allowed = MAX_COMMAND_LINES if file.parent.name == "commands" else MAX_LINES
    assert len(file.read_text(encoding="utf-8").splitlines()) <= allowed


# What is above the media and the objectives knows no medium; these lines speak of one for a reason.
ALLOWED = {
    "_data.py": ('medium != "image"',),  # what saved models without a recipe are
    "_distribution.py": ("num_images=",),  # a cache's key, kept so that caches stay valid
    "detokenize.py": ("name.png", "UViM's picture", "a.jpg and a.png"),  # examples in words
    "sample.py": ("a picture of the first ones",),  # whatever the medium, its overview is one
    "tokenizer.py": ("UViM's picture",),
    "base.py": ("it never sees a picture",),
}
WORDS = re.compile("picture|image|png|psnr|lpips", re.IGNORECASE)


def test_nothing_above_the_media_knows_a_medium() -> None:
    places = [
        PACKAGE / "training/loop.py", PACKAGE / "training/run.py", PACKAGE / "training/tokenizer.py",
        PACKAGE / "tokenizer.py", *(PACKAGE / "commands").glob("*.py"), *(PACKAGE / "generators").glob("*.py"),
    ]  # fmt: skip
    for file in places:
        for line in file.read_text(encoding="utf-8").splitlines():
            if WORDS.search(line):
                assert any(words in line for words in ALLOWED.get(file.name, ())), f"{file}: {line.strip()}"


def test_every_planted_bug_finds_its_line() -> None:
    tools = Path(__file__).parents[1] / "tools"
    spec = importlib.util.spec_from_file_location("planted_bugs", tools / "planted_bugs.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["planted_bugs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for bug in module.BUGS:
        assert (PACKAGE / bug.file).read_text(encoding="utf-8").count(bug.old) == 1, bug.name
