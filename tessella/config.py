"""From a section of a recipe to an object: the constructor's signature is the schema."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from tessella.errors import ConfigError
from tessella.registry import FAMILIES, Spec, find, name_of, names, singular

# Sections of a recipe that name their class -> its family and the arguments the program supplies.
NAMED_SECTIONS: dict[str, tuple[str, frozenset[str]]] = {
    "data": ("data", frozenset({"split"})),
    "medium": ("media", frozenset()),
    "autoencoder": ("autoencoders", frozenset()),
    "quantizer": ("quantizers", frozenset()),
    "generator": ("generators", frozenset({"space"})),
    "loss": ("objectives", frozenset()),
}
# Sections with one class each -> where it is and the arguments the program supplies.
FIXED_SECTIONS: dict[str, tuple[str, frozenset[str]]] = {
    "tokenizer": ("tessella.tokenizer:Tokenizer", frozenset({"autoencoder", "quantizer"})),
    "space": ("tessella.tokenizer:TokenSpace", frozenset()),
    "training": ("tessella.training.loop:Loop", frozenset()),
    "source": ("tessella.interop.base:Source", frozenset()),
}
# Where weights that were trained elsewhere come from: in recipes of converted models, and of what continues from them.
OPTIONAL_SECTIONS = ("source",)
# What a recipe trains -> its sections. A recipe with a [generator] trains that, any other a tokenizer. The program
# writes [medium], which the data source names, and [space], the tokens a generator is for, when it has seen the
# tokenizer.
TOKENIZER_SECTIONS = ("data", "medium", "autoencoder", "quantizer", "tokenizer", "loss", "training")
GENERATOR_SECTIONS = ("data", "generator", "space", "training")


_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # no names that a recipe could give


class Configurable:
    """Remembers the arguments it was constructed with, so that :func:`spec_of` can describe it."""

    arguments: Spec

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        self = super().__new__(cls)
        # bind_partial: copying and unpickling construct without arguments and restore this dictionary afterwards.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        bound.apply_defaults()
        named = {name for name, p in bound.signature.parameters.items() if p.kind not in _OPEN}
        self.__dict__["arguments"] = {name: value for name, value in list(bound.arguments.items())[1:] if name in named}
        return self


def spec_of(item: Configurable, *, leave_out: frozenset[str] = frozenset(), known: Spec | None = None) -> Spec:
    """The section that builds ``item`` again: constructor arguments, and its file's name if it is of a family.

    Args:
        item: what to describe.
        leave_out: arguments that the program supplies.
        known: a section that described it before. An argument that this does not know, since its version had none, is
            left out as long as it has its default, so that what did not change is described as it was.
    """
    name = name_of(type(item))
    spec: Spec = {} if name is None else {"name": name}
    known = known if known and known.get("name") == name else None
    parameters = inspect.signature(type(item).__init__).parameters
    for key, value in item.arguments.items():
        if key in leave_out or value is None:
            continue
        if isinstance(value, Configurable):
            spec[key] = spec_of(value, known=(known or {}).get(key))
        elif known is None or key in known or _plain(value) != _plain(parameters[key].default):
            spec[key] = _plain(value)
    return spec


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
    accepted = [name for name, p in signature.parameters.items() if name not in given and p.kind not in _OPEN]
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
    if not isinstance(spec.get("name"), str):
        wrong = "missing key" if "name" not in spec else f"{spec['name']!r} is no text for"
        raise ConfigError(f"{wrong} '{where}.name'; choose one of: {', '.join(names(family))}")
    cls = find(family, spec["name"])
    rest = {key: value for key, value in spec.items() if key != "name"}
    return {"name": spec["name"], **resolve(cls, rest, where=where, given=given)}


def build(family: str, spec: Spec, **given: Any) -> Any:
    """The object that a section describes; ``given`` are arguments that the program supplies."""
    spec = resolve_named(family, spec, where=singular(family), given=frozenset(given))
    cls = find(family, spec["name"])
    try:
        return cls(**_constructed(cls, {key: value for key, value in spec.items() if key != "name"}), **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{singular(family)} {spec['name']!r}: {error}") from error


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
    sections = GENERATOR_SECTIONS if "generator" in recipe else TOKENIZER_SECTIONS
    known = (*sections, *OPTIONAL_SECTIONS)
    recipe = with_defaults(recipe)
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


def with_defaults(recipe: Spec) -> Spec:
    """``recipe`` with what older ones leave out: the medium is its data source's, and a loss is one of pictures."""
    if "generator" in recipe:
        return recipe
    filled = {**recipe, "loss": {"name": "image", **_table(recipe, "loss")}}
    data = _table(recipe, "data")
    if "medium" not in recipe and "name" in data:
        filled["medium"] = find("data", data["name"]).medium_spec(data)  # type: ignore[attr-defined]
    return filled


def medium_of(recipe: Spec | None) -> Any:
    """The medium of a tokenizer with this recipe; pictures where it names none."""
    return build("media", (recipe or {}).get("medium", {"name": "image"}))


def _table(recipe: Spec, section: str) -> Spec:
    table = recipe.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"'{section}' must be a table, got {table!r}")
    return table


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
