"""COCO panoptic: pictures, PNGs of segment ids, and one JSON file a split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessella.data._dense import Pair, PanopticSamples, read_levels, require_folder
from tessella.data._errors import DataError, UnreadableImage
from tessella.data.base import Split
from tessella.data.decode import decode_rgb

# The 133 categories in the order of the official files.
_THINGS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
_STUFF = (
    "banner", "blanket", "bridge", "cardboard", "counter", "curtain", "door-stuff", "floor-wood", "flower", "fruit",
    "gravel", "house", "light", "mirror-stuff", "net", "pillow", "platform", "playingfield", "railroad", "river",
    "road", "roof", "sand", "sea", "shelf", "snow", "stairs", "tent", "towel", "wall-brick", "wall-stone",
    "wall-tile", "wall-wood", "water-other", "window-blind", "window-other", "tree-merged", "fence-merged",
    "ceiling-merged", "sky-other-merged", "cabinet-merged", "table-merged", "floor-other-merged", "pavement-merged",
    "mountain-merged", "grass-merged", "dirt-merged", "paper-merged", "food-other-merged", "building-other-merged",
    "rock-merged", "wall-other-merged", "rug-merged",
)  # fmt: skip


class CocoPanoptic(PanopticSamples):
    """``annotations/panoptic_NAME.json``, ``annotations/panoptic_NAME/*.png`` (or beside it) and ``NAME/*.jpg``.

    A segment's id is R + 256 G + 65536 B. Categories are numbered in the file's order. Crowds are not learned (-1).
    A file with other categories than COCO's needs ``class_names`` and ``things``.

    Args:
        path: the folder that holds annotations/ and the pictures.
        split: "train" or "test".
        size_px: side of the squares in pixels.
        flip: in training, mirror half of the pictures left to right.
        min_area: see :class:`DenseSamples`.
        num_instances: numbers of the instance plane, 0 included.
        train_name: NAME of the training split.
        test_name: NAME of the test split.
        class_names: of the categories in the file's order.
        things: names of those that are things.

    Raises:
        ValueError: no such files, a JSON file of another layout or with other categories, or an argument out of its
            range.
    """

    carries = PanopticSamples.carries | {"train_name", "test_name", "class_names", "things"}

    def __init__(
        self,
        path: str | Path,
        *,
        split: Split,
        size_px: int = 512,
        flip: bool = True,
        min_area: float = 0.05,
        num_instances: int = 100,
        train_name: str = "train2017",
        test_name: str = "val2017",
        class_names: Sequence[str] = (*_THINGS, *_STUFF),
        things: Sequence[str] = _THINGS,
    ) -> None:
        super().__init__(
            split=split, size_px=size_px, flip=flip, min_area=min_area, class_names=class_names, things=things,
            num_instances=num_instances,
        )  # fmt: skip
        name = train_name if split == "train" else test_name
        root = require_folder(Path(path), "annotations/ and pictures")
        file = root / "annotations" / f"panoptic_{name}.json"
        content = _read_json(file)
        found = [str(one["name"]) for one in content["categories"]]
        found_things = {str(one["name"]) for one in content["categories"] if one["isthing"]}
        if found != list(self.class_names) or found_things != set(self.things):
            raise DataError(f"{file} has {len(found)} categories, {', '.join(found[:3])}, ...: not those of "
                            "class_names and things")  # fmt: skip
        self._category = {int(one["id"]): number for number, one in enumerate(content["categories"])}
        self._images = require_folder(root / name, "the pictures of this split")
        self._labels = next((one for one in (file.with_suffix(""), root / f"panoptic_{name}") if one.is_dir()), None)
        if self._labels is None:
            raise DataError(f"no folder {file.with_suffix('')}, which should hold the PNGs of {file.name}")
        names = {int(one["id"]): str(one["file_name"]) for one in content["images"]}
        self._rows: list[tuple[str, str, dict[int, dict[str, Any]]]] = []
        for one in content["annotations"]:
            if int(one["image_id"]) not in names:
                raise DataError(f"{file}: annotation of image {one['image_id']}, which is not among the images")
            segments = {int(segment["id"]): segment for segment in one["segments_info"]}
            self._rows.append((names[int(one["image_id"])], str(one["file_name"]), segments))
        if not self._rows:
            raise DataError(f"{file} holds no annotation")
        self._segments = {Path(label).stem: segments for _, label, segments in self._rows}

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._rows)

    def sources(self) -> Iterable[Path]:
        """Pictures and labels."""
        assert self._labels is not None
        return [self._images / image for image, _, _ in self._rows] + [
            self._labels / label for _, label, _ in self._rows
        ]

    def read(self, index: int) -> Pair:
        """The picture and its segments' ids, -1 for crowds."""
        image, label, segments = self._rows[index]
        key = Path(label).stem
        assert self._labels is not None
        levels = read_levels(self._labels / label, key)
        if levels.ndim != 3:
            raise UnreadableImage(key, f"label {label} must be an RGB picture: ids are R + 256 G + 65536 B")
        ids = levels @ np.array([1, 256, 65536])
        crowds = [i for i, segment in segments.items() if segment.get("iscrowd")]
        return Pair(decode_rgb(self._images / image, key), np.where(np.isin(ids, crowds), -1, ids), key)

    def categories(self, ids: list[int], key: str) -> dict[int, int]:
        """See :class:`PanopticSamples`."""
        segments = self._segments[key]
        if unknown := [i for i in ids if i not in segments]:
            raise UnreadableImage(key, f"the label holds ids {unknown[:5]} that the JSON file does not list")
        found = {i: int(segments[i]["category_id"]) for i in ids}
        if wrong := sorted(set(found.values()) - set(self._category)):
            raise UnreadableImage(key, f"category ids {wrong[:5]} are not in the file's table")
        return {i: self._category[category] for i, category in found.items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    needed = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(one), list) for one in needed):
        raise DataError(f"{file} must hold the lists {', '.join(needed)}")
    return content
