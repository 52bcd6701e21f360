"""What is tokenized: one part of a data set, or both behind each other, as one sequence of inputs."""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate
from typing import Literal, cast, get_args

import numpy as np

from tessella.config import build_section
from tessella.data._errors import EmptySplit
from tessella.data.base import Sample, Samples, Split, Streamed, random_for
from tessella.errors import ConfigError
from tessella.registry import Spec, find

AnySplit = Literal["train", "test", "all"]

_VARIANT_SEED = 0


class Source:
    """Inputs by index, and the rows that each of them gives.

    Args:
        parts: one after the other.
        section: the recipe's ``[data]`` that describes them.
        split: what of it they are.
        variants: rows of each input, its views in so many epochs of training; 0 for one, as evaluation sees it.
        whole: whether the signals are taken at their own size.

    Raises:
        ConfigError: variants of signals that have no windows.
    """

    def __init__(self, parts: list[Samples], *, section: Spec, split: str, variants: int, whole: bool) -> None:
        if variants < 0:
            raise ConfigError(f"variants must be at least 0, got {variants}")
        if variants and parts[0].extent is None:
            wanted = " or ".join(f"data.{key}" for key in sorted(parts[0].window)) or "data of one size"
            raise ConfigError(f"variants are random windows of a signal: they need {wanted}")
        self.parts = parts
        self.section = section
        self.split = split
        self.variants = variants
        self.whole = whole
        self.class_names = parts[0].class_names
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        """The number of inputs."""
        return self._ends[-1]

    @property
    def rows_per_input(self) -> int:
        """One, or the number of variants."""
        return max(self.variants, 1)

    @property
    def alike(self) -> bool:
        """Whether any number of signals may be read at once: they are of one size, or short enough to be padded."""
        return self.parts[0].extent is not None or self.parts[0].pads or not self.whole

    def describe(self) -> Spec:
        """What was read, so that another data set, or a changed one, is told apart."""
        plain: Spec = json.loads(json.dumps(self.section, default=str))  # a path may be a Path
        return {"data": plain, "parts": [part.identity() for part in self.parts]}

    def sample(self, index: int, variant: int) -> Sample | Streamed:
        """One row's view of the input ``index``, in pieces where it is long.

        Raises:
            UnreadableImage: it cannot be read.
        """
        part = bisect_right(self._ends, index)
        within = index - (self._ends[part - 1] if part else 0)
        rng: np.random.Generator | None = random_for(_VARIANT_SEED, variant, within) if self.variants else None
        return self.parts[part].sample_or_stream(within, rng)


def open_source(section: Spec, split: AnySplit, *, variants: int = 0, whole: bool = False) -> Source:
    """The data that ``section`` describes; ``all`` is its training part and then what is held out.

    Args:
        section: a recipe's ``[data]``.
        split: "train", "test" or "all".
        variants: see :class:`Source`.
        whole: signals at their own size instead of windows of them.

    Raises:
        ConfigError: no such data or split, or signals that are windows by nature where whole ones are asked for.
    """
    if split not in get_args(AnySplit):
        raise ConfigError(f"split must be one of {', '.join(get_args(AnySplit))}, got {split!r}")
    if whole:
        windows = cast(type[Samples], find("data", section["name"])).window
        if not windows:
            raise ConfigError(f"data set '{section['name']}' has no whole signals, only windows of a fixed size")
        section = {key: value for key, value in section.items() if key not in windows}
    chosen: tuple[Split, ...] = get_args(Split) if split == "all" else (split,)
    parts: list[Samples] = []
    for part in chosen:
        try:
            parts.append(build_section({"data": section}, "data", split=part))
        except ConfigError as error:
            # Of a single picture nothing is left to train on: all of the data is then what is held out.
            if split != "all" or not isinstance(error.__cause__, EmptySplit) or (part == chosen[-1] and not parts):
                raise
    return Source(parts, section=section, split=split, variants=variants, whole=whole)
