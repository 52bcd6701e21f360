"""The training step of a generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.data.base import Batch
from tessella.errors import ConfigError
from tessella.generators.base import Generator
from tessella.generators.sampling import generators
from tessella.objectives.base import StepOutput
from tessella.registry import find
from tessella.tokenizer import Tokenizer
from tessella.training.base import Step
from tessella.transformer import Transformer


class GeneratorStep(Step):
    """The generator's own loss, on tokens from shards or made of signals as they come by a frozen tokenizer.

    Args:
        generator: what is trained.
        tokenizer: makes the tokens and turns samples into signals; it is frozen, and no part of the checkpoints.
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

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of its transformers."""
        return [block for module in model.modules() if isinstance(module, Transformer) for block in module.blocks]

    def forward(self, batch: Batch) -> StepOutput:
        """See the class."""
        out = self.model(*self.tokens_and_condition(batch))
        return StepOutput({"generator": out.loss}, out.metrics)

    def tokens_and_condition(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """``indices [B, *S, K]`` and the condition of a batch of signals or tokens.

        Raises:
            ConfigError: the batch lacks what the conditioner takes.
        """
        x = batch["x"]
        if self._batch_key is not None and self._batch_key not in batch:
            raise ConfigError(
                f"generator.conditioner takes '{self._batch_key}', which the data does not give; it gives "
                f"{', '.join(sorted(set(batch) - {'skipped'}))}"
            )
        condition = None if self._batch_key is None else batch[self._batch_key]  # type: ignore[literal-required]
        return self.tokenizer.encode(x, batch.get("context")) if x.is_floating_point() else x, condition

    @torch.no_grad()
    def preview(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """The batch's signals, and samples under the same conditions."""
        assert isinstance(model, Generator)
        real, condition = self.tokens_and_condition(batch)
        sampled = model.sample(condition, rng=generators(range(len(batch["x"]))))
        return [self.tokenizer.decode(indices, batch.get("context")).float() for indices in (real, sampled)]
