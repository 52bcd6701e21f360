"""What the build of the documentation adds to the files of ``docs/``: pages, equations, links out of the folder."""

from __future__ import annotations

import html
import inspect
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer
import typer.models
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tessella.cli.app import app
from tessella.recipe import read_recipe, recipe_names, recipe_summary
from tessella.registry import FAMILIES, names, summary

ROOT = Path(__file__).parents[2]
COMMAND_LINE, RECIPES = "reference/command-line.md", "reference/recipes.md"
# What stands outside docs/ and is read on the site too; the page keeps the file's path below project/.
OUTSIDE = ("ARCHITECTURE.md", "CHANGELOG.md", "LOG.md", "benchmarks/results/*.md")

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])\s*</\1>', re.DOTALL)


def outside() -> list[str]:
    """The files of :data:`OUTSIDE`, by their path in the repository."""
    return sorted(file.relative_to(ROOT).as_posix() for pattern in OUTSIDE for file in ROOT.glob(pattern))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file of ``docs/`` holds."""
    pages = {
        COMMAND_LINE: command_line(),
        RECIPES: recipes(),
        **{f"project/{path}": (ROOT / path).read_text(encoding="utf-8") for path in outside()},
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files of the repository lead to their page on the site; a file that has none is named."""
    source = page.file.src_uri
    where = source.removeprefix("project/") if source.startswith("project/") else f"docs/{source}"
    pieces = _CODE.split(markdown)
    pieces[::2] = [_LINK.sub(lambda match: _redirected(match, source, where), piece) for piece in pieces[::2]]
    return "".join(pieces)


def _redirected(match: re.Match[str], source: str, where: str) -> str:
    mark, text, target, anchor = match.groups()
    if ":" in target:
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(where), target))
    if path == "README.md":
        path = "docs/index.md"
    if path.startswith("docs/"):
        page = path.removeprefix("docs/")
    elif path in outside():
        page = f"project/{path}"
    elif (ROOT / path).exists():
        return f"{text} (`{path}`)"
    else:
        return match[0]
    return f"{mark}[{text}]({posixpath.relpath(page, posixpath.dirname(source) or '.')}{anchor or ''})"


def on_page_content(html_text: str, **_: Any) -> str:
    """Equations as MathML, which browsers show without a script."""

    def made(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return _EQUATION.sub(made, html_text)


def command_line() -> str:
    """The page of all commands, from the application itself."""
    lines = ["# Command line", "", app.info.help, "",
             "Status 0 is success, 2 what was refused (one line says what and why), 128 + n what signal n ended. "
             "`TESSELLA_TRACEBACK=1` in the environment shows the traceback too.", ""]  # fmt: skip
    for name, function in sorted(commands(app, "tessella")):
        arguments = _arguments(function)
        needed = [one.usage for one in arguments if one.default == "required"]
        lines += [f"## {name}", "", inspect.getdoc(function) or "", "", "```text",
                  " ".join([name, *needed, "[OPTIONS]"]), "```", "", "| argument | default | what |",
                  "|---|---|---|"]  # fmt: skip
        lines += [f"| `{one.name}` | {one.default} | {one.what} |" for one in arguments]
        lines += [""]
    return "\n".join(lines)


def commands(application: typer.Typer, name: str) -> Iterator[tuple[str, Callable[..., None]]]:
    """Every command by what is typed, and the function that it is."""
    for command in application.registered_commands:
        if command.callback is not None:
            yield f"{name} {command.name or command.callback.__name__.replace('_', '-')}", command.callback
    for group in application.registered_groups:
        if group.typer_instance is not None:
            yield from commands(group.typer_instance, f"{name} {group.name}" if isinstance(group.name, str) else name)


class _Argument(NamedTuple):
    name: str
    usage: str
    default: str
    what: str


def _arguments(function: Callable[..., None]) -> list[_Argument]:
    hints = get_type_hints(function, include_extras=True)
    return [_argument(name, hints[name], one.default) for name, one in inspect.signature(function).parameters.items()]


def _argument(name: str, hint: Any, default: Any) -> _Argument:
    kind, info = get_args(hint)
    kinds = (
        [one for one in get_args(kind) if one is not type(None)] if get_origin(kind) in (Union, UnionType) else [kind]
    )
    choices = get_args(kinds[0]) if get_origin(kinds[0]) is Literal else ()
    value = info.metavar or ("{" + ",".join(choices) + "}" if choices else name.rstrip("_").upper())
    is_list = get_origin(kinds[0]) is list
    if isinstance(info, typer.models.ArgumentInfo):
        shown = usage = f"{value} ..." if is_list else value
    else:
        words = [word for word in info.param_decls or () if word.startswith("-")] or [f"--{name.replace('_', '-')}"]
        value = "" if kinds[0] is bool else f" {value}"
        shown, usage = f"{', '.join(words)}{value}", f"{words[0]}{value}"
    needed = default is inspect.Parameter.empty
    first = "required" if needed else "" if default in (None, False, "") else f"`{default}`"
    return _Argument(shown, usage, first, (info.help or "").replace("|", "\\|"))


def recipes() -> str:
    """The page of the recipes, from the comments at the head of their files, and of what a recipe can name."""
    lines = ["# Recipes", "", "One file for each thing one can train, in `tessella/recipes`; `tessella list recipes` "
             "prints their names. The command `tessella train NAME` takes one, and `--set section.key=value` changes "
             "it.", ""]  # fmt: skip
    for kind in ("Tokenizers", "Generators"):
        lines += [f"## {kind}", ""]
        for name in recipe_names():
            if ("generator" in read_recipe(name)) == (kind == "Generators"):
                lines += [f"### {name}", "", recipe_summary(name), "", *_about(name), ""]
    lines += ["## What a recipe can name", ""]
    for family in FAMILIES:
        lines += [f"### {family}", "", "| name | what |", "|---|---|"]
        lines += [
            f"| `{name}` | {summary(family, name).replace('``', '`').replace('|', '&#124;')} |"
            for name in names(family)
        ]
        lines += [""]
    return "\n".join(lines)


def _about(name: str) -> list[str]:
    """The further comments at a recipe's head."""
    text = (ROOT / "tessella/recipes" / f"{name}.toml").read_text(encoding="utf-8").split("\n")[1:]
    about = []
    for line in text:
        if not line.startswith("#"):
            break
        word, colon, rest = line.removeprefix("#").strip().partition(": ")
        if colon and word in ("Command", "Sample"):
            about += ["", "```sh", *rest.split("; then "), "```"]
        else:
            about.append(f"{word}{colon}{rest}  ")
    return about
