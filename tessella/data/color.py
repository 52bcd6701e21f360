"""Any source of pictures for colouring: the picture is the label, its grey the context."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from tessella.config import build
from tessella.data.base import ImageDataset, Sample, Samples, Split
from tessella.errors import ConfigError
from tessella.labels.color import to_grey
from tessella.registry import Spec, find


class Color(Samples):
    """Pictures of another source; ``x [3, H, W]`` is one of them, ``context`` its luma three times over.

    Args:
        split: "train" or "test".
        pictures: the section of that source, such as ``{name = "folder", path = "pictures", crop_px = 64}``.
        path: in the place of that source's own.

    Raises:
        ValueError: that source's own errors, or a source that gives something else than pictures.
    """

    medium: ClassVar[str] = "color"
    carries = frozenset({"pictures"})

    def __init__(self, *, split: Split, pictures: dict[str, Any], path: str | None = None) -> None:
        if not issubclass(find("data", str(pictures.get("name"))), ImageDataset):
            raise ConfigError(f"data.pictures must be a source of pictures, {pictures.get('name')!r} is none")
        place = {} if path is None else {"path": path}
        self.pictures: ImageDataset = build("data", {**pictures, **place}, split=split)
        self.class_names = self.pictures.class_names
        self.extent = self.pictures.extent

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.pictures)

    def identity(self) -> Spec:
        """That of the pictures."""
        return self.pictures.identity()

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        """The picture as its source gives it, with its grey."""
        sample = self.pictures.sample(index, rng)
        return Sample(x=sample["x"], label=sample["label"], key=sample["key"], context=to_grey(sample["x"]))
