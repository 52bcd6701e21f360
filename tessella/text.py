"""Names from anywhere, made fit for a terminal, a log and a file of text."""

from __future__ import annotations

import re

_ESCAPED = re.compile(r"\\x(5c|[89a-f][0-9a-f])")


def printable(text: str) -> str:
    """``text`` with line breaks, escape codes and bytes that are no text written out as Python would."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def name_to_text(name: str) -> str:
    r"""A file's name as text that can be written as UTF-8.

    Names that are no UTF-8 reach Python with lone surrogates in the place of what is none. Each such byte becomes
    ``\xNN``; so that :func:`text_to_name` can tell, a backslash that begins such a sequence in the name itself becomes
    ``\x5c``. Every other name stays as it is.
    """
    if name.isascii() and "\\" not in name:
        return name
    marked = _ESCAPED.sub(r"\\x5cx\1", name)
    return marked.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_to_name(text: str) -> str:
    """The name that :func:`name_to_text` made ``text`` of."""
    return _ESCAPED.sub(lambda match: chr(_byte(match) if match[1] == "5c" else 0xDC00 + _byte(match)), text)


def _byte(match: re.Match[str]) -> int:
    return int(match[1], 16)
