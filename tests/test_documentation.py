"""What README and docs say is so: commands parse, recipes and keys exist, links lead somewhere, names are there."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

import tessella
from tessella import config, registry
from tessella.cli.app import app
from tessella.recipe import override, read_recipe, recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "tessella" / "recipes").glob("*.toml"))
# Pages that the site's build makes of the program itself.
GENERATED = {ROOT / "docs/reference/command-line.md", ROOT / "docs/reference/recipes.md"}

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (tessella .*)$", re.MULTILINE)
_INLINE = re.compile(r"`((?:tessella|make|python|torchrun|pytest) [^`]+)`")
_LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
_PLACEHOLDER = re.compile(r"[A-Z]{2,}")
_FIGURE_MADE_BY = re.compile(r"^(?:\*Made by |\()`(make|tessella|python) [^`]+`", re.MULTILINE)


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def lines(text: str) -> Iterator[tuple[str, bool]]:
    """Command lines, and whether they are whole ones, with all that the command needs."""
    for language, block in _FENCE.findall(text):
        if language in ("", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                yield line.strip().removesuffix(" ..."), not line.endswith(" ...")
    for line in _INDENTED.findall(text):
        yield line, True
    for line in _INLINE.findall(" ".join(_FENCE.sub("", text).split())):
        yield line, False


def recipe_lines(text: str) -> Iterator[tuple[str, bool]]:
    for commands in re.findall(r"^# (?:Command|Sample): (tessella .*)$", text, re.MULTILINE):
        for line in commands.split("; then "):
            yield line, True


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


def check_tessella(words: list[str], *, whole: bool) -> None:
    command, path = root_command(), "tessella"
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"no command {path} {words[0]}"
        path, command, words = f"{path} {words[0]}", command.commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in words:
        if word.startswith("-"):
            assert word in options, f"{path} has no option {word}"
    if whole and not hasattr(command, "commands"):
        command.make_context(path, list(words))  # raises for what is missing or of another type
    if path == "tessella train" and words:
        check_recipe(words)


def check_recipe(words: list[str]) -> None:
    known = recipe_names()
    if words[0] not in known:
        assert words[0].endswith(".toml") or _PLACEHOLDER.search(words[0]), f"no recipe {words[0]}"
        return
    changes = [after for word, after in itertools.pairwise(words) if word == "--set"]
    changes = [change for change in changes if not _PLACEHOLDER.search(change)]
    recipe = override(read_recipe(words[0]), changes)
    space = {"grid": [1], "num_codebooks": 1, "codebook_size": 2, "fingerprint": ""}
    beside = {"data": {"name": "photos"}} | ({"space": space} if "generator" in recipe else {})
    config.resolve_recipe({**beside, **recipe})


def check(line: str, *, whole: bool) -> bool:
    """Whether a line is a command that this knows, and it is in order."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["tessella"]:
        check_tessella(words[1:], whole=whole)
    elif words[:1] == ["torchrun"] and "tessella" in words:
        check_tessella(words[words.index("tessella") + 1 :], whole=whole)
    elif words[:1] == ["make"]:
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"no target {words[1]}"
    elif words[:1] == ["pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"tessella\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= set(extras), f"no extra {extra}"
    elif words[:1] in (["python"], ["pytest"]):
        file = ROOT / words[1].split("::")[0]
        assert file.is_file(), f"no file {words[1]}"
        text = file.read_text()
        for word in words[2:]:
            if word.startswith("--"):
                assert f'"{word}"' in text, f"{words[1]} has no option {word}"
    else:
        return False
    return True


@pytest.mark.parametrize("file", [*PAGES, *RECIPES], ids=name)
def test_every_command_line_parses(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for line, whole in recipe_lines(text) if file in RECIPES else lines(text):
        try:
            check(line, whole=whole)
        except Exception as error:
            raise AssertionError(f"{name(file)}: {line}: {error}") from error


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("tessella trian photos_fsq", "no command"),
        ("tessella train photos_fsk", "no recipe"),
        ("tessella train photos_fsq --epochs 3", "no option"),
        ("tessella train photos_fsq --set training.epochs=3", "unknown key"),
        ("tessella tokenize runs/mine", "out"),
        ("tessella sample runs/draw -n many", "integer"),
        ("make tests", "no target"),
        ("python benchmarks/nothing.py", "no file"),
        ("python benchmarks/faults.py --pets 3", "no option"),
        ("pip install 'tessella[everything]'", "no extra"),
    ],
)
def test_a_wrong_line_would_be_found(line: str, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        check(line, whole=True)


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", [*PAGES, ROOT / "ARCHITECTURE.md"], ids=name)
def test_no_link_is_dead(file: Path) -> None:
    for _, target in _LINK.findall(without_code(file.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        assert ":" not in path, f"{name(file)} links to {target}: the documentation is read without a network"
        leads_to = (file.parent / path).resolve() if path else file
        assert leads_to.exists() or leads_to in GENERATED, f"{name(file)}: {target}"
        if anchor:
            assert anchor in anchors(leads_to), f"{name(file)}: {target}"


@pytest.mark.parametrize("file", PAGES, ids=name)
def test_every_figure_says_what_made_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for paragraph in re.split(r"\n(?=[^!\n])", text):  # a run of figures, and the line before it
        figures = [target for mark, target in _LINK.findall(paragraph) if mark]
        if figures:
            after = text.split(paragraph, 1)[1].lstrip("\n")
            assert _FIGURE_MADE_BY.match(after), f"{name(file)}: what made {figures}?"


def test_every_figure_is_shown() -> None:
    shown = {target for file in PAGES for mark, target in _LINK.findall(file.read_text(encoding="utf-8")) if mark}
    for figure in (ROOT / "docs").glob("*.png"):
        assert any(target.endswith(figure.name) for target in shown), figure.name


def documented() -> set[str]:
    """Paths of objects on the reference pages; a module's stand for all that it holds."""
    found = set()
    for file in (ROOT / "docs" / "reference").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.add(path)
            module, _, member = path.rpartition(".")
            if not hasattr(importlib.import_module(module), member):
                raise AssertionError(f"{file.name}: no {path}")
    return found


def test_the_reference_has_every_public_name() -> None:
    there = documented()
    modules = ["tessella", "tessella.evaluation", *(f"tessella.{name}" for name in tessella._MODULES)]
    objects = [getattr(importlib.import_module(module), member) for module in modules
               for member in importlib.import_module(module).__all__]  # fmt: skip
    objects += [cls for family in registry.FAMILIES for cls in registry.registered(family).values()]
    for item in objects:
        own = getattr(item, "__module__", "").startswith("tessella")  # other tests register classes of theirs
        if own and (inspect.isclass(item) or inspect.isfunction(item)):
            path = f"{item.__module__}.{item.__qualname__}"
            assert path in there or item.__module__ in there, f"{path} is on no reference page"


def test_a_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for file in PAGES[1:]:
        page = file.relative_to(ROOT / "docs").as_posix()
        assert len(re.findall(rf"[ :]{re.escape(page)}$", text, re.MULTILINE)) == 1, page
