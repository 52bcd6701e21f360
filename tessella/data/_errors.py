"""What can be wrong with data that is read."""

from __future__ import annotations

from tessella.errors import TessellaError
from tessella.text import printable


class DataError(TessellaError, ValueError):
    """Data that cannot be used; the message names the file and what is wrong with it."""

    def __str__(self) -> str:
        """The message, with whatever a file's name would do to a terminal written out."""
        return printable(super().__str__())


class EmptySplit(DataError):
    """Data whose samples all belong to the other split."""


class UnreadableImage(DataError):
    """One picture that cannot be used: ``key`` names it, ``reason`` says why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = printable(reason)

    def __str__(self) -> str:
        """The picture's name and the reason."""
        return f"{printable(self.key)}: {self.reason}"
