"""Several views of each picture as rows that follow each other."""

# Not in base.py, where a class that can be built would count as a data set that recipes may name.

from __future__ import annotations

import numpy as np

from tessella.data.base import Sample, Samples, random_for
from tessella.registry import Spec


class Variants(Samples):
    """Each sample several times over, as training would draw it: other crops, some of them mirrored.

    The rows of one picture follow each other under its key. Row i is the picture ``i // num_variants`` in epoch
    ``i % num_variants`` of a training with ``seed``.

    Args:
        samples: the pictures.
        num_variants: rows of each, at least 1.
        seed: not negative.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, samples: Samples, num_variants: int, *, seed: int) -> None:
        for name, value, least in (("num_variants", num_variants, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.samples = samples
        self.num_variants = num_variants
        self.seed = seed
        self.class_names = samples.class_names

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.samples) * self.num_variants

    def identity(self) -> Spec:
        """That of the pictures."""
        return {**self.samples.identity(), "count": len(self)}

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """The row's view of its picture; another one by ``rng``.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        picture, variant = divmod(index, self.num_variants)
        return self.samples.sample(picture, rng or random_for(self.seed, variant, picture))
