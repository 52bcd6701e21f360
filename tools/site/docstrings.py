"""The package's docstrings, which are reStructuredText in their details, as the Markdown that mkdocstrings reads."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|data|mod|attr|exc):`(~?)([^`<>]+)`")
_MATH_ROLE = re.compile(r":math:`([^`]+)`")
# "a, b: what both are" among arguments: names, over as many lines as they take, and all that is said of them.
_NAMES = re.compile(r"^( {4,})(\w+(?:,\s+\w+)+):(.*(?:\n\1 +\S.*)*)", re.MULTILINE)
_MATH = re.compile(r"^( *)\.\. math::[ ]*(.*)$")
_RULE = re.compile(r"^( *)=+(?: +=+)+ *$")


def to_markdown(text: str, owner: str) -> str:
    """``text`` with its roles, equations, tables and literal blocks as Markdown.

    Args:
        text: a docstring whose lines begin at the margin.
        owner: path of the object it is of, where names without a package are looked for.
    """
    text = _NAMES.sub(_one_by_one, text)
    text = _ROLE.sub(lambda match: _reference(match[2], owner, short=bool(match[1])), text)
    text = _MATH_ROLE.sub(r"$\1$", text)
    lines = text.split("\n")
    made: list[str] = []
    while lines:
        line = lines.pop(0)
        if found := _MATH.match(line):
            indent, rest = found.groups()
            body = [rest, *_indented(lines, len(indent))]
            made += ["", f"{indent}$$ {' '.join(' '.join(body).split())} $$", ""]
        elif _RULE.match(line):
            rows = [line]
            while lines and lines[0].strip():
                rows.append(lines.pop(0))
            indent = line[: len(line) - len(line.lstrip())]
            made += ["", f"{indent}```text", *rows, f"{indent}```", ""]
        elif line.rstrip().endswith("::"):
            made.append(line.rstrip().removesuffix("::") + ("" if line.strip() == "::" else ":"))
            indent = len(line) - len(line.lstrip())
            body = _indented(lines, indent)
            while body and not body[0].strip():
                body.pop(0)
            space = " " * indent
            made += ["", f"{space}```text", *(f"{space}{row.strip()}" for row in body), f"{space}```", ""]
        else:
            made.append(line)
    return "\n".join(made)


def _one_by_one(match: re.Match[str]) -> str:
    """The arguments that share a description, each with it."""
    indent, names, what = match.groups()
    return "\n".join(f"{indent}{name}: {' '.join(what.split())}" for name in re.split(r",\s+", names))


def _indented(lines: list[str], indent: int) -> list[str]:
    """Take the lines that belong to a block: those further to the right, and blank ones between them."""
    body: list[str] = []
    while lines and (not lines[0].strip() or len(lines[0]) - len(lines[0].lstrip()) > indent):
        body.append(lines.pop(0))
    while body and not body[-1].strip():
        lines.insert(0, body.pop())
    return body


def _reference(target: str, owner: str, *, short: bool) -> str:
    """A link where the site has a place for ``target``, else its name."""
    name = target.rsplit(".", 1)[-1] if short else target
    path = target if target.startswith("tessella.") else f"{owner}.{target.lstrip('.')}"
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'


class Docstrings(griffe.Extension):
    """Rewrites every docstring once its object is known."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            # A method speaks of its class, a class of its module.
            owner = obj.parent.path if obj.is_function and obj.parent is not None else obj.path
            if obj.is_class and obj.parent is not None:
                owner = obj.path
            obj.docstring.value = to_markdown(obj.docstring.value, owner)
