"""Paths as people write them in Python: strings too."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

AnyPath: TypeAlias = str | Path


def to_path(path: AnyPath | None) -> Path | None:
    """None stays."""
    return None if path is None else Path(path)
