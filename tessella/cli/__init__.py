"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import logging

from tessella.cli.answers import answers
from tessella.cli.app import app
from tessella.processes import keep_freed_memory


def main() -> None:
    """Entry point of ``tessella``."""
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with answers():
        app()
