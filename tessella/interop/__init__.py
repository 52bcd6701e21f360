"""Public checkpoints of other programs, loaded and right; and our models, where people look for them."""

from __future__ import annotations

from tessella.interop.base import ConversionError, Source
from tessella.interop.convert import FAMILIES, convert

__all__ = ["FAMILIES", "ConversionError", "Source", "convert"]
