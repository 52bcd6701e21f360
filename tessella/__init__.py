"""Tessella: discrete tokenizers and generation on their tokens.

``tessella.load(path)`` returns a trained :class:`~tessella.tokenizer.Tokenizer`, ``tessella.load_generator(path)`` a
generator with its tokenizer; ``tessella.from_pretrained(name)`` one from the hub or from a published checkpoint;
``tessella.quantizers`` holds every quantizer by its citation name; ``tessella.ops`` the
exact large-codebook operations they are built on.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from tessella import ops, quantizers
from tessella.checkpoint import load, load_generator
from tessella.interop import convert, from_pretrained, generator_from_pretrained
from tessella.tokenizer import Reconstruction, Tokenizer, TokenSpace

try:
    __version__ = version("tessella")
except PackageNotFoundError:  # a source tree that is on the path without being installed
    __version__ = "0+source"

__all__ = [
    "Reconstruction", "TokenSpace", "Tokenizer", "__version__", "convert", "from_pretrained",
    "generator_from_pretrained", "load", "load_generator", "ops", "quantizers",
]  # fmt: skip
