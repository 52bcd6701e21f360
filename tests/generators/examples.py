"""Small constructor arguments of every generator, by file name; the contract test runs all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessella import config, registry
from tessella.generators.base import Generator
from tessella.tokenizer import TokenSpace

NUM_CLASSES = 5
LABEL = {"name": "label", "num_classes": NUM_CLASSES}
NONE = {"name": "none"}
PICTURE = {"name": "image", "size_px": [8, 12], "patch_px": 4, "num_layers": 1, "num_heads": 2}

SQUARE = TokenSpace((3, 4), 1, 11, "f" * 16)
STACK = TokenSpace((2, 3), 3, 11, "f" * 16)
LINE = TokenSpace((7,), 2, 11, "f" * 16)

SMALL = {"dim": 32, "num_layers": 2, "num_heads": 2}


@dataclass(frozen=True)
class Example:
    """A generator of a few thousand weights.

    Args:
        name: of its file.
        arguments: what a recipe would hold.
        space: the tokens.
        first_loss: in nats, before any training; within ``tolerance``.
    """

    name: str
    arguments: dict[str, Any]
    space: TokenSpace = SQUARE
    first_loss: float = math.log(11)
    tolerance: float = 1e-5

    @property
    def conditional(self) -> bool:
        return bool(self.arguments["conditioner"] == LABEL)

    def condition(self, batch_size: int) -> Tensor | None:
        """Labels in turn, or random pictures; None without a condition."""
        if self.arguments["conditioner"] == PICTURE:
            return torch.rand(batch_size, 3, 8, 12, generator=torch.Generator().manual_seed(7)) * 2 - 1
        return torch.arange(batch_size) % NUM_CLASSES if self.conditional else None

    def make(self) -> Generator:
        """As a program makes it: built from a section, then shown the tokenizer's codes."""
        torch.manual_seed(0)
        generator: Generator = config.build("generators", {"name": self.name, **self.arguments}, space=self.space)
        tables = torch.randn(self.space.num_codebooks, self.space.codebook_size, 4)
        generator.fit_codebook(tables if len(tables) > 1 else tables[0], seed=0)
        return generator

    def __str__(self) -> str:
        told = [f"{key}={value}" for key, value in self.arguments.items() if isinstance(value, str | bool | float)]
        grid = "x".join(map(str, (*self.space.grid, self.space.num_codebooks)))
        return "-".join([self.name, self.arguments["conditioner"]["name"], grid, *told])


_CTF = {"num_clusters": 4, "coarse": {"name": "ar", **SMALL}, "fine": SMALL}
_CTF_FIRST_LOSS = math.log(4) + math.log(11)
_MASKGIT = {**SMALL, "hidden": 48, "num_steps": 3}

_MASKED_BITS = {**SMALL, "num_rounds": 2, "head": {"dim": 16, "num_layers": 1, "num_heads": 2}}

EXAMPLES = [
    Example("ar", {"conditioner": LABEL, **SMALL}),
    Example("ar", {"conditioner": NONE, **SMALL, "rotary": "sequence"}),
    Example("ar", {"conditioner": LABEL, **SMALL, "rotary": "grid_zero_prefix", "adaln": True}),
    Example("ar", {"conditioner": LABEL, **SMALL, "order": "flattened"}, STACK),
    Example("ar", {"conditioner": LABEL, **SMALL, "order": "delay"}, STACK),
    Example("ar", {"conditioner": NONE, **SMALL, "order": "delay"}, LINE),
    Example("ar", {"conditioner": LABEL, **SMALL, "order": "parallel"}, STACK),
    Example("masked_bits", {"conditioner": LABEL, **_MASKED_BITS}, STACK),
    Example("masked_bits", {"conditioner": NONE, **_MASKED_BITS, "num_rounds": 5, "choice_temperature": 1.0}, LINE),
    Example("coarse_to_fine", {"conditioner": LABEL, **_CTF}, first_loss=_CTF_FIRST_LOSS),
    Example("coarse_to_fine", {"conditioner": LABEL, **_CTF}, STACK, first_loss=_CTF_FIRST_LOSS),
    Example(
        "coarse_to_fine",
        {"conditioner": NONE, **_CTF, "coarse": {"name": "maskgit", **_MASKGIT, "choice_temperature": 0.0}},
        LINE,
        first_loss=math.log(2 * 4 + 1) + math.log(11),
        tolerance=0.2,
    ),
    # The start of the sequence is a token too.
    Example("encoder_decoder", {"conditioner": PICTURE, **SMALL}, first_loss=math.log(11 + 1)),
    Example("encoder_decoder", {"conditioner": PICTURE, **SMALL}, TokenSpace((5,), 1, 18, "f" * 16), math.log(18 + 1)),
    # Input and output share one table, which also holds the labels and MASK: near ln(number of rows), not exactly.
    Example("maskgit", {"conditioner": LABEL, **_MASKGIT}, first_loss=math.log(11 + NUM_CLASSES + 1), tolerance=0.2),
    Example("maskgit", {"conditioner": NONE, **_MASKGIT}, LINE, first_loss=math.log(2 * 11 + 1), tolerance=0.2),
    Example(
        "maskgit",
        {"conditioner": LABEL, **_MASKGIT, "norm": "pre", "order": "even", "min_mask_ratio": 0.0},
        first_loss=math.log(11 + NUM_CLASSES + 1),
        tolerance=0.2,
    ),
    # The loss is the mean over digits; that of the whole code, ln 12, is their sum.
    Example(
        "digits",
        {"conditioner": LABEL, "bases": [4, 3], "generator": {"name": "ar", **SMALL}},
        TokenSpace((3, 4), 1, 12, "f" * 16),
        first_loss=math.log(12) / 2,
    ),
    Example(
        "digits",
        {"conditioner": NONE, "bases": [2, 3, 3], "generator": {"name": "ar", **SMALL, "order": "delay"}},
        TokenSpace((5,), 2, 18, "f" * 16),
        first_loss=math.log(18) / 3,
    ),
    Example(
        "digits",
        {"conditioner": LABEL, "bases": [4, 3], "generator": {"name": "masked_bits", **_MASKED_BITS}},
        TokenSpace((3, 4), 1, 12, "f" * 16),
        first_loss=math.log(12) / 2,
        # Either digit is as likely to be the hidden one, but not in a small batch.
        tolerance=0.05,
    ),
    Example(
        "digits",
        {"conditioner": LABEL, "bases": [4, 3], "generator": {"name": "maskgit", **_MASKGIT}},
        TokenSpace((3, 4), 1, 12, "f" * 16),
        first_loss=math.log(2 * 4 + NUM_CLASSES + 1),
        tolerance=0.2,
    ),
]


def missing_examples() -> list[str]:
    """Registered generators without an example."""
    return sorted(set(registry.names("generators")) - {example.name for example in EXAMPLES})
