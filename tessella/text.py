"""Names from anywhere, made fit for a terminal and a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with line breaks, escape codes and bytes that are no text written out as Python would."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
