"""The training step of a generator."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tessella.config import find
from tessella.data.base import Batch
from tessella.generators.base import Generator
from tessella.generators.sampling import generators
from tessella.tokenizer import Tokenizer
from tessella.training.base import Step, StepOutput


class GeneratorStep(Step):
    """The generator's own loss, on tokens from shards or made of pictures as they come by a frozen tokenizer.

    Args:
        generator: what is trained.
        tokenizer: makes the tokens and turns samples into pictures; it is frozen, and no part of the checkpoints.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = generator
        self.tokenizer = tokenizer.requires_grad_(False)
        conditioner = find("conditioners", generator.arguments["conditioner"]["name"])
        self._batch_key: str | None = conditioner.batch_key  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> GeneratorStep:
        """The tokenizer stays in eval mode: codebooks do not move and codes are not dropped."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """One optimizer trains all."""
        return {"generator": [p for p in self.model.parameters() if p.requires_grad]}

    def forward(self, batch: Batch) -> StepOutput:
        """See the class."""
        out = self.model(*self.tokens_and_condition(batch))
        return StepOutput({"generator": out.loss}, out.metrics)

    def tokens_and_condition(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """``indices [B, *S, K]`` and the condition of a batch of pictures or tokens."""
        x = batch["x"]
        # A batch without it is refused by the conditioner, which knows whether it needs one.
        condition = None if self._batch_key is None else cast(Tensor | None, batch.get(self._batch_key))
        return self.tokenizer.encode(x) if x.is_floating_point() else x, condition

    @torch.no_grad()
    def pictures(self, model: nn.Module, batch: Batch) -> Tensor:
        """Pictures of the batch and, below them, samples under the same conditions."""
        assert isinstance(model, Generator)
        real, condition = self.tokens_and_condition(batch)
        sampled = model.sample(condition, rng=generators(range(len(batch["x"]))))
        shown = [self.tokenizer.decode(indices) for indices in (real, sampled)]
        return torch.cat(shown).float().clamp(-1, 1)
