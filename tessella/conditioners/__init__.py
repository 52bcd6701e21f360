"""What generation depends on, one kind a file."""

from __future__ import annotations

from tessella.conditioners.base import Conditioner
from tessella.conditioners.image import Image
from tessella.conditioners.label import Label
from tessella.conditioners.none import Unconditional
from tessella.conditioners.prefix import Prefix

__all__ = ["Conditioner", "Image", "Label", "Prefix", "Unconditional"]
