"""Public checkpoints of other programs, loaded and right; and our models, where people look for them."""

from __future__ import annotations

from tessella.interop.base import ConversionError, Source
from tessella.interop.convert import FAMILIES, convert
from tessella.interop.hub import from_pretrained, generator_from_pretrained, push

__all__ = ["FAMILIES", "ConversionError", "Source", "convert", "from_pretrained", "generator_from_pretrained", "push"]
