"""Recipes as files: reading, extending, overriding, comparing, writing. Knows no class and imports none."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tessella.errors import ConfigError
from tessella.registry import Spec


def differences(a: Spec, b: Spec) -> list[str]:
    """``["section.key: 1 -> 2", ...]`` where two recipes disagree; a missing key equals None."""
    found = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) or isinstance(right, dict):
            found += [f"{key}.{line}" for line in differences(left or {}, right or {})]
        elif left != right:
            found.append(f"{key}: {left!r} -> {right!r}")
    return found


def to_toml(recipe: Spec) -> str:
    """The recipe as TOML; keys whose value is None are left out (their default is None)."""
    import tomli_w

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return tomli_w.dumps(plain(recipe))


def recipe_names() -> list[str]:
    """The recipes inside the package."""
    folder = resources.files("tessella") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(name_or_path: str | Path) -> Spec:
    """A recipe as written: a name from :func:`recipe_names`, or a path to a TOML file.

    ``extends = "other"`` at its top takes every key it does not give from another recipe, section by section. A section
    that names another class takes over nothing.

    Raises:
        ConfigError: no such recipe, or not valid TOML.
    """
    if not isinstance(name_or_path, str | Path):
        raise ConfigError(f"a recipe is a name or a .toml file, got {type(name_or_path).__name__}")
    return _read(str(name_or_path), ())


def check_recipe_name(name_or_path: str) -> None:
    """Refuse what :func:`read_recipe` would, as far as that needs no look inside.

    Raises:
        ConfigError: no such recipe.
    """
    _text_of(name_or_path)


def _read(name_or_path: str, children: tuple[str, ...]) -> Spec:
    """The same; ``children`` are those that extend it, on the way to it."""
    if not isinstance(name_or_path, str):
        raise ConfigError(f"recipe {children[-1]}: 'extends' must be a recipe's name or file, got {name_or_path!r}")
    if name_or_path in children:
        raise ConfigError(f"recipe {name_or_path} extends itself: {' -> '.join((*children, name_or_path))}")
    try:
        recipe = tomllib.loads(_text_of(name_or_path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name_or_path}: {error}") from None
    parent = recipe.pop("extends", None)
    return recipe if parent is None else _extended(_read(parent, (*children, name_or_path)), recipe)


def _text_of(name_or_path: str) -> str:
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"no recipe file {path}")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"recipe {path} is no UTF-8 text: {error}") from error
    elif name_or_path in recipe_names():
        return (resources.files("tessella") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        alike = difflib.get_close_matches(name_or_path, recipe_names(), n=5)
        raise ConfigError(
            f"unknown recipe {name_or_path!r}; choose one of: {', '.join(alike or recipe_names())}; or give the path "
            f"of a .toml file{'; all recipes: tessella list recipes' if alike else ''}"
        )


def _extended(base: Spec, changes: Spec) -> Spec:
    """``base`` with the keys of ``changes``, tables within tables too."""
    if changes.get("name", base.get("name")) != base.get("name"):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = _extended(base[key], value) if isinstance(value, dict) and key in base else value
    return merged


def recipe_summary(name: str) -> str:
    """The first line of a recipe's header comment."""
    text = (resources.files("tessella") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return text.split("\n")[0].removeprefix("#").strip()


def override(recipe: Spec, assignments: Sequence[str]) -> Spec:
    """A copy of ``recipe`` with ``["a.b=c", ...]`` applied; c is read as TOML, and as a string where it is none."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items()}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not all(part.strip() for part in path.split(".")):
            raise ConfigError(f"'{assignment}' is no assignment; write --set section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, key = path.strip().split(".")
        table = result
        for depth, parent in enumerate(parents, 1):
            inner = table.get(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"'{'.'.join(parents[:depth])}' is no table, so '{path.strip()}' cannot be set")
            table[parent] = dict(inner)
            table = table[parent]
        table[key] = value
    return result
