"""Samples as signals: how they are drawn, and each a function of its own number alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tessella.errors import ConfigError
from tessella.generators.base import Generator
from tessella.generators.guidance import parse_guidance
from tessella.generators.sampling import generators, sample_seed
from tessella.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleSettings:
    """How samples are drawn; see :meth:`tessella.generators.base.Generator.sample`.

    Sample i is a function of the model, these settings, its class and (seed, i) alone: neither the batch size nor an
    interruption changes it.

    Attributes:
        seed: of the run.
        temperature, top_k, top_p: as there.
        guidance: as :func:`tessella.generators.guidance.parse_guidance` reads it.
        options: further arguments of this generator's ``sample``.

    Raises:
        ConfigError: a number out of its range.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: str = "1"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn with, before anything is loaded."""
        for name, good, range_ in (
            ("seed", self.seed >= 0, "at least 0"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a finite number of at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not good:
                raise ConfigError(f"{name} must be {range_}, got {getattr(self, name)}")
        try:
            parse_guidance(self.guidance)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def draw(
    generator: Generator, tokenizer: Tokenizer, *, labels: Sequence[int] | None, numbers: Sequence[int],
    settings: SampleSettings,
) -> Tensor:  # fmt: skip
    """Signals ``[B, C, *X]`` in [-1, 1] of the samples called ``numbers``, of classes ``labels``.

    Raises:
        ConfigError: a setting or a class out of range.
    """
    condition = None if labels is None else torch.tensor(labels, device=tokenizer.device)
    check_options(generator, settings.options)
    try:
        indices = generator.sample(
            condition,
            rng=generators(sample_seed(settings.seed, number) for number in numbers),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance=parse_guidance(settings.guidance),
            **settings.options,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return tokenizer.decode(indices).float().clamp(-1, 1)


def check_options(generator: Generator, options: Mapping[str, Any]) -> None:
    """Refuse options that this kind of generator does not have.

    Raises:
        ConfigError: names those it has.
    """
    common = inspect.signature(Generator.sample).parameters
    parameters = inspect.signature(type(generator).sample).parameters
    # Tensors are for those who call it from Python.
    own = [name for name, p in parameters.items() if name not in common and "Tensor" not in str(p.annotation)]
    for name in options:
        if name not in own:
            kind = type(generator).__name__
            raise ConfigError(f"unknown option {name!r} of {kind}; accepted: {', '.join(own) or 'none'}")


def draw_batches(
    generator: Generator, tokenizer: Tokenizer, *, labels: Sequence[int] | None, chunks: Iterable[Sequence[int]],
    settings: SampleSettings,
) -> Iterator[Tensor]:  # fmt: skip
    """The signals of each chunk of sample numbers, on the CPU; ``labels`` is by number."""
    for numbers in chunks:
        classes = None if labels is None else [labels[number] for number in numbers]
        yield draw(generator, tokenizer, labels=classes, numbers=numbers, settings=settings).cpu()


def chunks(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    """``numbers`` in runs of ``size``, the last one shorter."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def classes_of(generator: Generator) -> tuple[int | None, tuple[str, ...]]:
    """How many classes a generator knows, None if it has no labels; and their names."""
    conditioner = generator.arguments["conditioner"]
    return conditioner.get("num_classes"), tuple(conditioner.get("class_names", ()))


def labels_of(generator: Generator, classes: Sequence[str], count: int) -> list[int] | None:
    """``count`` labels of each of ``classes`` (numbers or names); ``count`` in all, balanced, where none is named.

    Raises:
        ConfigError: a class that the generator does not know.
    """
    num_classes, names = classes_of(generator)
    if num_classes is None:
        if classes:
            raise ConfigError(f"this generator has no classes, got --class {classes[0]}")
        return None
    if not classes:
        return balanced(num_classes, count)
    found = []
    for name in classes:
        label = names.index(name) if name in names else int(name) if name.isdecimal() else num_classes
        if label >= num_classes:
            known = f"; names: {', '.join(names)}" if names else ""
            raise ConfigError(f"unknown class {name!r}; classes are 0 to {num_classes - 1}{known}")
        found.append(label)
    return [label for label in found for _ in range(count)]


def balanced(num_classes: int, count: int) -> list[int]:
    """``count`` labels, every class as often as the others to within one, in turn."""
    return [number % num_classes for number in range(count)]
