"""What every converter does: fit published tensors to a model of ours, account for each of them, write the folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tessella.checkpoint import save_generator, save_model
from tessella.config import build_section
from tessella.generators.base import Generator
from tessella.interop.reading import EMA, Checkpoint, ConversionError, Problems, averaged
from tessella.registry import Spec
from tessella.tokenizer import Tokenizer, TokenSpace

# Of the trainer, not of the model, in checkpoints of Lightning modules.
TRAINING = (r"loss\..*", r"model_ema\.loss.*", r"model_ema\.(decay|num_updates)")


@dataclass(frozen=True)
class Source:
    """Where converted weights come from; the section ``[source]`` of their recipe.

    Attributes:
        family: of the converter.
        model: the published name, as far as the weights tell it.
        file: the name of the file that was converted; of several, all.
        sha256: of that file; of several, one for each, in the same order.
        licence: of the weights, as their authors state it.
        paper: that describes them.
        protocol: how their authors evaluate them, so that numbers are compared like with like.
        weights: ``"ema"``, the moving averages, or ``"plain"``.
    """

    family: str
    model: str
    file: str
    sha256: str
    licence: str
    paper: str
    protocol: str
    weights: str = "plain"


@dataclass(frozen=True)
class Options:
    """What the weights alone do not say.

    Attributes:
        size_px: side of the pictures whose tokens a generator makes.
        tokenizer: checkpoint or folder of the tokenizer of a generator that comes without one.
    """

    size_px: int | None = None
    tokenizer: Path | None = None


@dataclass
class Converted:
    """The models in a checkpoint: a tokenizer, and with it a generator where there is one."""

    name: str
    tokenizer: Tokenizer
    generator: Generator | None = None
    weights: str = "plain"
    medium: Spec | None = None  # of the signals, where they are no pictures


class Family(Protocol):
    """What a module of this package offers: the facts of a family of checkpoints, and two functions."""

    LICENCE: str
    PAPER: str
    PROTOCOL: str

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether the keys are those of this family."""

    def read(self, checkpoint: Checkpoint, options: Options) -> Converted:
        """The models of a checkpoint.

        Raises:
            ConversionError: a tensor is missing, misshapen or unknown; all of them are named.
        """


class Take(NamedTuple):
    """How one tensor of ours comes from published ones."""

    names: tuple[str, ...]
    combine: Callable[..., Tensor] | None = None


Table = Mapping[str, Take]


def take(name: str) -> Take:
    """One published tensor as it is, but for axes of size 1 (a 1 x 1 convolution is a linear layer)."""
    return Take((name,))


def joined(*names: str) -> Take:
    """Several published tensors, one below the other."""
    return Take(names, lambda *parts: torch.cat(parts))


@dataclass
class Account:
    """Which tensors of a checkpoint went where; whatever is left in the end is a problem.

    Args:
        checkpoint: the tensors.
        what: the model's name, for messages.
        ignored: patterns of names that belong to no model of ours.
        plain: names that have no moving average, as they are not trained.
    """

    checkpoint: Checkpoint
    what: str
    ignored: Sequence[str] = ()
    plain: frozenset[str] = frozenset()
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    @property
    def weights(self) -> str:
        """Of which kind the weights are: see :class:`Source`."""
        return "ema" if self.checkpoint.has_average else "plain"

    def fit(self, model: nn.Module, table: Table) -> None:
        """Give every parameter and buffer of ``model``, which may be on the meta device, its tensor, in float32."""
        state: dict[str, Tensor] = {}
        expected = model.state_dict()
        for name, target in expected.items():
            found = [self._find(source) for source in table[name].names] if name in table else [None]
            parts = [part for part in found if part is not None]
            if len(parts) < len(found):
                if name not in table:
                    self.missing.append(f"(no rule for our {name})")
                continue
            combine = table[name].combine
            value = parts[0] if combine is None else combine(*parts)
            if not _same_numbers(value.shape, target.shape):
                names = " + ".join(table[name].names)
                self.misshapen.append(f"{names} {list(value.shape)} instead of {list(target.shape)}")
                continue
            state[name] = value.reshape(target.shape).to(target.dtype)
        if len(state) == len(expected):
            model.load_state_dict(state, assign=True)

    def close(self) -> None:
        """Nothing more will be taken.

        Raises:
            ConversionError: something is missing, misshapen or left over.
        """
        ignored = re.compile("|".join(self.ignored) or r"(?!)")
        left = [name for name in self.checkpoint.tensors if name not in self.used and not ignored.fullmatch(name)]
        problems = Problems()
        problems.keys("tensors missing", sorted(set(self.missing)))
        problems.keys("tensors of the wrong shape", self.misshapen)
        problems.keys("tensors unknown", sorted(left))
        problems.refuse(self.checkpoint.file, f"a checkpoint of {self.what}")

    def _find(self, name: str) -> Tensor | None:
        tensors, average = self.checkpoint.tensors, averaged(name)
        self.used |= {name, average}
        if not self.checkpoint.has_average or name in self.plain:
            return self._noted(name, tensors.get(name))
        if name in tensors and average in tensors and tensors[name].shape != tensors[average].shape:
            shapes = f"{list(tensors[average].shape)} instead of {list(tensors[name].shape)} as {name}"
            self.misshapen.append(f"{average} {shapes}")
            return None
        return self._noted(average, tensors.get(average))

    def _noted(self, name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            self.missing.append(name)
        return value


def _same_numbers(given: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether the shapes differ by axes of size 1 alone, and so hold the same numbers in the same order."""
    return [size for size in given if size != 1] == [size for size in wanted if size != 1]


def empty_tokenizer(recipe: Spec) -> Tokenizer:
    """The tokenizer of the sections ``autoencoder``, ``quantizer``, ``tokenizer``, without weights (meta device)."""
    with torch.device("meta"):
        autoencoder, quantizer = (build_section(recipe, section) for section in ("autoencoder", "quantizer"))
        tokenizer: Tokenizer = build_section(recipe, "tokenizer", autoencoder=autoencoder, quantizer=quantizer)
    return tokenizer


def empty_generator(recipe: Spec, space: TokenSpace) -> Generator:
    """The generator of the section ``generator``, without weights (meta device)."""
    with torch.device("meta"):
        generator: Generator = build_section(recipe, "generator", space=space)
    return generator


def write(converted: Converted, source: Source, out: Path) -> None:
    """Write the models into the folder ``out``, whole or not at all; their recipes hold ``[source]``."""
    about: dict[str, Any] = {"source": asdict(source)}
    if converted.medium is not None:
        about["medium"] = converted.medium
    converted.tokenizer.recipe = about
    if converted.generator is None:
        save_model(converted.tokenizer, out)
    else:
        converted.generator.recipe = about
        save_generator(converted.generator, converted.tokenizer, out)


def count(checkpoint: Checkpoint, pattern: str, **fixed: int) -> int:
    """How many numbers from 0 on ``pattern`` with its ``index`` names a tensor for."""
    index = 0
    while pattern.format(index=index, **fixed) in checkpoint:
        index += 1
    return index


__all__ = [
    "EMA", "TRAINING", "Account", "Checkpoint", "ConversionError", "Converted", "Family", "Options", "Source", "Table",
    "Take", "count", "empty_generator", "empty_tokenizer", "joined", "take", "write",
]  # fmt: skip
