"""From a recipe to objects: the folder is the registry, the constructor's signature is the schema."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import tomllib
import types
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

Spec = dict[str, Any]


class ConfigError(ValueError):
    """A recipe that cannot be built: the message names the key, what was wrong and what is accepted."""


# Folder -> the protocol in its base.py that its classes implement.
FAMILIES = {
    "quantizers": "Quantizer",
    "autoencoders": "Autoencoder",
    "conditioners": "Conditioner",
    "generators": "Generator",
    "data": "Samples",
}

# Sections of a recipe that name their class -> its family and the arguments the program supplies.
NAMED_SECTIONS: dict[str, tuple[str, frozenset[str]]] = {
    "data": ("data", frozenset({"split"})),
    "autoencoder": ("autoencoders", frozenset()),
    "quantizer": ("quantizers", frozenset()),
    "generator": ("generators", frozenset({"space"})),
}
# Sections with one class each -> where it is and the arguments the program supplies.
FIXED_SECTIONS: dict[str, tuple[str, frozenset[str]]] = {
    "tokenizer": ("tessella.tokenizer:Tokenizer", frozenset({"autoencoder", "quantizer"})),
    "loss": ("tessella.training.tokenizer:TokenizerStep", frozenset({"tokenizer"})),
    "space": ("tessella.tokenizer:TokenSpace", frozenset()),
    "training": ("tessella.training.loop:Loop", frozenset()),
    "source": ("tessella.interop.base:Source", frozenset()),
}
# Where weights that were trained elsewhere come from: in recipes of converted models, and of what continues from them.
OPTIONAL_SECTIONS = ("source",)
# What a recipe trains -> its sections. A recipe with a [generator] trains that, any other a tokenizer. The program
# writes [space], the tokens a generator is for, when it has seen the tokenizer.
TOKENIZER_SECTIONS = ("data", "autoencoder", "quantizer", "tokenizer", "loss", "training")
GENERATOR_SECTIONS = ("data", "generator", "space", "training")


class Configurable:
    """Remembers the arguments it was constructed with, so that :func:`spec_of` can describe it."""

    arguments: Spec

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        self = super().__new__(cls)
        # bind_partial: copying and unpickling construct without arguments and restore this dictionary afterwards.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        bound.apply_defaults()
        self.__dict__["arguments"] = dict(list(bound.arguments.items())[1:])
        return self


def spec_of(item: Configurable, *, leave_out: frozenset[str] = frozenset()) -> Spec:
    """The section that builds ``item`` again: constructor arguments, and its file's name if it is of a family."""
    spec: Spec = {}
    module = type(item).__module__.split(".")
    if len(module) == 3 and module[1] in FAMILIES:
        spec["name"] = module[2]
    for key, value in item.arguments.items():
        if key not in leave_out and value is not None:
            spec[key] = spec_of(value) if isinstance(value, Configurable) else _plain(value)
    return spec


def names(family: str) -> list[str]:
    """The names one can write in a recipe: the files of ``tessella/<family>`` that hold an implementation."""
    package = importlib.import_module(f"tessella.{family}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_") and _implementation(family, name) is not None)


def registered(family: str) -> dict[str, type]:
    """Every implementation of a family by its file name."""
    return {name: find(family, name) for name in names(family)}


def find(family: str, name: str) -> type:
    """The class in ``tessella/<family>/<name>.py``.

    Raises:
        ConfigError: there is none; the message lists the choices.
    """
    cls = _implementation(family, name) if name.isidentifier() and not name.startswith("_") else None
    if cls is None:
        raise ConfigError(f"unknown {_singular(family)} {name!r}; choose one of: {', '.join(names(family))}")
    return cls


@cache
def _implementation(family: str, name: str) -> type | None:
    module_name = f"tessella.{family}.{name}"
    if importlib.util.find_spec(module_name) is None:
        return None
    module = importlib.import_module(module_name)
    protocol = getattr(importlib.import_module(f"tessella.{family}.base"), FAMILIES[family])
    for value in vars(module).values():
        own = inspect.isclass(value) and value.__module__ == module_name
        if own and issubclass(value, protocol) and not inspect.isabstract(value):
            return value  # type: ignore[no-any-return]
    return None


def _singular(family: str) -> str:
    return {"data": "data set"}.get(family, family.removesuffix("s"))


def resolve(target: type, values: Spec, *, where: str, given: frozenset[str] = frozenset()) -> Spec:
    """Check ``values`` against the constructor of ``target`` and fill in its defaults.

    Args:
        target: a class; its parameters' annotations are the types.
        values: keyword arguments from a recipe. A dictionary for a parameter that is itself of a family (a residual
            quantizer's inner one) or a `Configurable` (a loss's adversary) is resolved the same way.
        where: the recipe's section, for messages.
        given: parameters that the program supplies, not the recipe.

    Raises:
        ConfigError: unknown key, missing key or wrong type.
    """
    signature = inspect.signature(target)
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    accepted = [name for name, p in signature.parameters.items() if name not in given and p.kind is not p.VAR_KEYWORD]
    for key in values:
        if key not in accepted:
            raise ConfigError(f"unknown key '{where}.{key}'; accepted: {', '.join(accepted) or 'none'}")
    resolved: Spec = {}
    for key in accepted:
        if key in values:
            resolved[key] = _check(values[key], hints[key], f"{where}.{key}")
        elif signature.parameters[key].default is not inspect.Parameter.empty:
            resolved[key] = _plain(signature.parameters[key].default)
        else:
            raise ConfigError(f"missing key '{where}.{key}' ({_describe(hints[key])})")
    return resolved


def resolve_named(family: str, spec: Spec, *, where: str, given: frozenset[str] = frozenset()) -> Spec:
    """:func:`resolve` for a section that names its class: ``{name = "fsq", levels = [8, 5, 5, 5]}``."""
    if "name" not in spec:
        raise ConfigError(f"missing key '{where}.name'; choose one of: {', '.join(names(family))}")
    cls = find(family, spec["name"])
    rest = {key: value for key, value in spec.items() if key != "name"}
    return {"name": spec["name"], **resolve(cls, rest, where=where, given=given)}


def build(family: str, spec: Spec, **given: Any) -> Any:
    """The object that a section describes; ``given`` are arguments that the program supplies."""
    spec = resolve_named(family, spec, where=_singular(family), given=frozenset(given))
    cls = find(family, spec["name"])
    try:
        return cls(**_constructed(cls, {key: value for key, value in spec.items() if key != "name"}), **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{_singular(family)} {spec['name']!r}: {error}") from error


def _family_of(hint: Any) -> str | None:
    """The family whose protocol ``hint`` is (or optionally is), if any."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        module = getattr(option, "__module__", "")
        for family, protocol in FAMILIES.items():
            if module == f"tessella.{family}.base" and option.__name__ == protocol:
                return family
    return None


def _class_of(hint: Any) -> type[Configurable] | None:
    """The `Configurable` class, of no family, that ``hint`` is (or optionally is), if any."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = (option for option in options if inspect.isclass(option) and issubclass(option, Configurable))
    return next(found, None)


def _construct(value: Any, hint: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if family := _family_of(hint):
        return build(family, value)
    cls = _class_of(hint)
    return value if cls is None else cls(**_constructed(cls, value))


def _constructed(cls: type, values: Spec) -> Spec:
    """The arguments of ``cls`` with the objects in them built."""
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    return {key: _construct(value, hints[key]) for key, value in values.items()}


def _check(value: Any, hint: Any, where: str) -> Any:
    family = _family_of(hint)
    if family is not None:
        if isinstance(value, dict):
            return resolve_named(family, value, where=where)
        raise ConfigError(f"'{where}' must be a table with a name, got {value!r}")
    cls = _class_of(hint)
    if cls is not None:
        if isinstance(value, dict):
            return resolve(cls, value, where=where)
        if value is None and type(None) in get_args(hint):
            return None
        raise ConfigError(f"'{where}' must be a table, got {value!r}")
    from pydantic import TypeAdapter, ValidationError  # imported here: not needed to import the package

    try:
        # Lists from TOML or JSON stand for any sequence; numbers and strings are not converted into each other.
        checked = TypeAdapter(hint).validate_python(value, strict=not isinstance(value, list))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise ConfigError(f"'{where}' must be {reason}, got {value!r}") from None
    return _plain(checked)


def _plain(value: Any) -> Any:
    """As TOML would give it: sequences are lists."""
    return list(value) if isinstance(value, tuple) else value


def _describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)).replace("collections.abc.", "")


def resolve_recipe(recipe: Spec) -> Spec:
    """``recipe`` checked, and every default filled in.

    Raises:
        ConfigError: an unknown section or key, a missing one, or a wrong type.
    """
    known = (*(GENERATOR_SECTIONS if "generator" in recipe else TOKENIZER_SECTIONS), *OPTIONAL_SECTIONS)
    for key, value in recipe.items():
        if key not in known:
            raise ConfigError(f"unknown section '{key}'; accepted: {', '.join(known)}")
        if not isinstance(value, dict):
            raise ConfigError(f"'{key}' must be a table, got {value!r}")
    resolved: Spec = {}
    for section in known:
        if section in OPTIONAL_SECTIONS and section not in recipe:
            continue
        if section in FIXED_SECTIONS:
            target, given = FIXED_SECTIONS[section]
            resolved[section] = resolve(_target(target), recipe.get(section, {}), where=section, given=given)
        elif section in recipe:
            family, given = NAMED_SECTIONS[section]
            resolved[section] = resolve_named(family, recipe[section], where=section, given=given)
        else:
            raise ConfigError(f"missing section '{section}'")
    return resolved


def build_section(recipe: Spec, section: str, **given: Any) -> Any:
    """The object that ``recipe[section]`` describes; ``given`` are the arguments that the program supplies."""
    if section in NAMED_SECTIONS:
        return build(NAMED_SECTIONS[section][0], recipe[section], **given)
    cls = _target(FIXED_SECTIONS[section][0])
    values = resolve(cls, recipe.get(section, {}), where=section, given=frozenset(given))
    try:
        return cls(**_constructed(cls, values), **given)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"[{section}] {error}") from error


def _target(location: str) -> type:
    module, name = location.split(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


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


def read_recipe(name_or_path: str) -> Spec:
    """A recipe as written: a name from :func:`recipe_names`, or a path to a TOML file.

    ``extends = "other"`` at its top takes every key it does not give from another recipe, section by section. A section
    that names another class takes over nothing.

    Raises:
        ConfigError: no such recipe, or not valid TOML.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"no recipe file {path}")
        text = path.read_text(encoding="utf-8")
    elif name_or_path in recipe_names():
        text = (resources.files("tessella") / "recipes" / f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        raise ConfigError(f"unknown recipe {name_or_path!r}; choose one of: {', '.join(recipe_names())}; "
                          "or give the path of a .toml file")  # fmt: skip
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name_or_path}: {error}") from None
    parent = recipe.pop("extends", None)
    return recipe if parent is None else _extended(read_recipe(parent), recipe)


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
        if not equals:
            raise ConfigError(f"'{assignment}' is no assignment; write --set section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, key = path.strip().split(".")
        table = result
        for parent in parents:
            table[parent] = dict(table.get(parent, {}))
            table = table[parent]
        table[key] = value
    return result
