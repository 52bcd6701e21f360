"""Dense prediction end to end: codes that a generator reads off the context, in the place of the label's own."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tessella.checkpoint import load_generator, load_recipe, model_folder
from tessella.conditioners.base import Conditioner
from tessella.errors import ConfigError
from tessella.generators.base import Generator
from tessella.media._dense import DenseMedium
from tessella.media.base import Medium
from tessella.registry import find
from tessella.tokenizer import Tokenizer


class Predictor(Tokenizer):
    """A tokenizer whose codes are generated from the context alone: UViM's ``f(x, LM(x))``.

    Everything that measures or shows reconstructions therefore measures and shows predictions.

    Args:
        tokenizer: whose decoder sees the context.
        generator: writes its codes.
        temperature: 0 takes the likeliest code, as published.
        seed: of the codes, with a temperature.
    """

    def __init__(self, tokenizer: Tokenizer, generator: Generator, *, temperature: float = 0.0, seed: int = 0) -> None:
        super().__init__(tokenizer.autoencoder, tokenizer.quantizer)
        self.to_code, self.from_code = tokenizer.to_code, tokenizer.from_code
        self.recipe = tokenizer.recipe
        self.generator = generator
        self.temperature = temperature
        self.seed = seed

    @torch.no_grad()
    def encode(self, x: Tensor, context: Tensor | None = None, *, pad: bool = False) -> Tensor:
        """Indices ``[B, *S, K]`` for ``context [B, ...]``; ``x`` has no part in them."""
        return self.generator.sample(context, rng=self.seed, temperature=self.temperature)

    def predict(self, context: Tensor) -> Tensor:
        """Outputs ``[B, C, H, W]`` for ``context [B, ...]``."""
        return self.decode(self.encode(context, context), context)


def predicts(model: Path) -> bool:
    """Whether a generator's run or model is one of dense prediction: it reads a context.

    Raises:
        CheckpointError: there is none.
    """
    conditioner = load_recipe(model_folder(model))["generator"].get("conditioner", {})
    if "name" not in conditioner:
        return False
    cls = cast(type[Conditioner], find("conditioners", conditioner["name"]))
    return cls.batch_key == "context"


def load_predictor(
    model: Path, *, temperature: float = 0.0, seed: int = 0, device: torch.device
) -> tuple[Predictor, Tokenizer]:
    """The predictor of a generator's run, and its tokenizer alone: the oracle.

    Raises:
        CheckpointError: no generator's run.
        ConfigError: its tokenizer sees no context.
    """
    generator, tokenizer = load_generator(model, device=device)
    if not tokenizer.autoencoder.takes_context:
        raise ConfigError(f"{model} predicts nothing: its tokenizer takes no context; see tessella sample")
    return Predictor(tokenizer.eval(), generator.eval(), temperature=temperature, seed=seed).eval(), tokenizer


def dense(medium: Medium) -> DenseMedium:
    """``medium``, which must be one of dense labels.

    Raises:
        ConfigError: it is another.
    """
    if not isinstance(medium, DenseMedium):
        raise ConfigError(f"medium {type(medium).__name__} has no dense labels")
    return medium
