"""Tessella: discrete tokenizers and generation on their tokens.

``tessella.load(path)`` returns a trained :class:`~tessella.tokenizer.Tokenizer`, ``tessella.load_generator(path)`` a
generator with its tokenizer, ``tessella.build(recipe)`` an untrained one, ``tessella.from_pretrained(name)`` one from
the hub or of a published checkpoint; every command is a function:
``tessella.train(...)``, ``tessella.tokenize(...)``, ``tessella.sample(...)``. ``tessella.quantizers`` holds every
quantizer by its citation name; ``tessella.ops`` the exact large-codebook operations they are built on.

Importing the package imports none of this: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from tessella import autoencoders, conditioners, generators, ops, quantizers
    from tessella.checkpoint import load, load_generator
    from tessella.commands.build import build
    from tessella.commands.compare import compare
    from tessella.commands.detokenize import detokenize
    from tessella.commands.evaluate import evaluate
    from tessella.commands.explore import explore
    from tessella.commands.predict import predict
    from tessella.commands.push import push
    from tessella.commands.quickstart import quickstart
    from tessella.commands.report import report
    from tessella.commands.sample import sample
    from tessella.commands.tokenize import tokenize
    from tessella.commands.train import train
    from tessella.errors import TessellaError
    from tessella.generators.drawing import SampleSettings
    from tessella.interop.convert import convert
    from tessella.interop.hub import from_pretrained, generator_from_pretrained
    from tessella.registry import register
    from tessella.tokenizer import Reconstruction, Tokenizer, TokenSpace

_MODULES = ("autoencoders", "conditioners", "generators", "ops", "quantizers")
_COMMANDS = (
    "build", "compare", "detokenize", "evaluate", "explore", "predict", "push", "quickstart", "report", "sample",
    "tokenize", "train",
)  # fmt: skip
# Public name -> the module that defines it.
_HOMES = {
    **{name: f"tessella.commands.{name}" for name in _COMMANDS},
    "Reconstruction": "tessella.tokenizer",
    "SampleSettings": "tessella.generators.drawing",
    "TessellaError": "tessella.errors",
    "TokenSpace": "tessella.tokenizer",
    "Tokenizer": "tessella.tokenizer",
    "convert": "tessella.interop.convert",
    "from_pretrained": "tessella.interop.hub",
    "generator_from_pretrained": "tessella.interop.hub",
    "load": "tessella.checkpoint",
    "load_generator": "tessella.checkpoint",
    "register": "tessella.registry",
}

__all__ = [
    "Reconstruction", "SampleSettings", "TessellaError", "TokenSpace", "Tokenizer", "__version__", "autoencoders",
    "build", "compare", "conditioners", "convert", "detokenize", "evaluate", "explore", "from_pretrained",
    "generator_from_pretrained", "generators", "load", "load_generator", "ops", "predict", "push", "quantizers",
    "quickstart", "register", "report", "sample", "tokenize", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _MODULES:
        return importlib.import_module(f"tessella.{name}")
    if name in _HOMES:
        # Kept, since importing tessella.recipe, say, must not replace a function of the package by a module.
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module 'tessella' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes a while to import

    try:
        return version("tessella")
    except PackageNotFoundError:  # a source tree that is on the path without being installed
        return "0+source"


def __dir__() -> list[str]:
    return __all__
