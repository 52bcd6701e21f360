from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from tessella.config import build
from tessella.data import photos
from tessella.data.base import Batch
from tessella.data.loader import evaluation_batches, training_batches
from tessella.data.photos import Photos

for package in ("skimage", "sklearn"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)


@pytest.fixture
def coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs of the true sizes whose pixels are unique: they say where a crop was taken from."""

    @cache
    def located(name: str) -> np.ndarray:
        height, width, _ = real(name).shape
        place = np.arange(height * width).reshape(height, width)
        return np.stack([place >> 16, place >> 8, place], -1).astype(np.uint8)

    real = photos._photograph
    monkeypatch.setattr(photos, "_photograph", located)


def places(batch: Batch, row: int) -> np.ndarray:
    red, green, blue = np.rint((batch["x"][row].double().numpy() + 1) * 127.5).astype(np.int64)
    return (red << 16) | (green << 8) | blue


@pytest.mark.usefixtures("coordinates")
@pytest.mark.parametrize("crop_px", [16, 64, 135])
def test_train_and_test_share_no_pixel(crop_px: int) -> None:
    train, test = (Photos(split=split, crop_px=crop_px, crops_per_epoch=300) for split in ("train", "test"))
    times_seen = np.zeros((10, 2_000_000), np.int64)  # a pixel's place in its photograph
    times_held_out = np.zeros_like(times_seen)
    batch = next(training_batches(train, batch_size=300, seed=0))
    for row, label in enumerate(batch["label"].tolist()):
        times_seen[label, places(batch, row)] += 1
    (batch,) = evaluation_batches(test, batch_size=len(test))
    for row, label in enumerate(batch["label"].tolist()):
        times_held_out[label, places(batch, row)] += 1
    assert not np.any(times_seen.astype(bool) & times_held_out.astype(bool))
    assert times_held_out.max() == 1  # tiles do not overlap
    assert times_held_out.sum() == len(test) * crop_px**2


@pytest.mark.usefixtures("coordinates")
def test_training_reaches_both_sides_of_the_band_evenly() -> None:
    dataset = Photos(split="train", crop_px=32, crops_per_epoch=2000)
    batch = next(training_batches(dataset, batch_size=2000, seed=0))
    sides = Counter()
    for row in np.flatnonzero(batch["label"].numpy() == 1):  # chelsea, 451 px wide
        left = places(batch, row)[0, 0] % 451
        sides[bool(left < 180)] += 1
        assert left + 32 <= 180 or left >= 316
    assert sum(sides.values()) == 200
    assert sides[True] / 200 == pytest.approx(180 / 315, abs=0.1)


def test_boxes_cover_a_photograph() -> None:
    assert photos.held_out_boxes("chelsea") == [(180, 0, 316, 300)]
    assert photos.training_boxes("chelsea") == [(0, 0, 180, 300), (316, 0, 451, 300)]


def test_both_splits_are_balanced() -> None:
    train, test = (Photos(split=split, crop_px=64, crops_per_epoch=50) for split in ("train", "test"))
    assert len(train) == 50
    assert len(test) == 80  # chelsea's band of 136x300 px holds 2 x 4 tiles
    for dataset in (train, test):
        labels = [dataset[index]["label"] for index in range(len(dataset))]
        assert labels[:10] == list(range(10))
        assert set(Counter(labels).values()) == {len(dataset) // 10}
    assert test.class_names[0] == "astronaut"
    assert len(test.class_names) == len(set(test.class_names)) == 10


def test_keys_are_unique_and_evaluated_training_crops_differ() -> None:
    dataset = Photos(split="train", crop_px=16, crops_per_epoch=40)
    first, second = ([dataset[index] for index in range(40)] for _ in range(2))
    assert len({sample["key"] for sample in first}) == 40
    assert len({sample["x"].numpy().tobytes() for sample in first}) == 40
    assert all((a["x"] == b["x"]).all() for a, b in zip(first, second, strict=True))


def test_crops_change_with_the_epoch() -> None:
    batches = training_batches(Photos(split="train", crop_px=16, crops_per_epoch=10), batch_size=10, seed=0)
    first, second = next(batches), next(batches)
    assert sorted(first["key"]) == sorted(second["key"])
    crops = {x.numpy().tobytes() for batch in (first, second) for x in batch["x"]}
    assert len(crops) == 20


def test_photographs_are_decoded_once_and_not_pickled() -> None:
    dataset = Photos(split="train", crop_px=64)
    dataset.read(0)
    assert photos._photograph("astronaut") is photos._photograph("astronaut")
    assert len(pickle.dumps(dataset)) < 5000


def test_too_large_a_crop_names_the_photograph() -> None:
    assert len(Photos(split="test", crop_px=136)) == 20
    with pytest.raises(ValueError, match="crop_px=137 does not fit into photograph 'chelsea', at most 136 does"):
        Photos(split="test", crop_px=137)
    with pytest.raises(ValueError, match="crops_per_epoch must be at least 1, got 0"):
        Photos(split="train", crops_per_epoch=0)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    photos._photograph.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"skimage is not installed: pip install 'tessella\[data\]'"):
        Photos(split="train")


def test_grey_and_opaque_crops() -> None:
    colours = Photos(split="test", crop_px=8)[0]["x"]
    grey, opaque = (Photos(split="test", crop_px=8, channels=channels)[0]["x"] for channels in (1, 4))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(grey[0], (colours * weights).sum(0), rtol=0, atol=1.01 / 127.5)
    assert torch.equal(opaque[:3], colours)
    assert (opaque[3] == 1).all()
    with pytest.raises(ValueError, match="can be had with 1, 3 or 4 channels, not with 2"):
        Photos(split="test", channels=2)


def test_identity_is_of_the_photographs() -> None:
    train, test = (Photos(split=split, crop_px=64, crops_per_epoch=50).identity() for split in ("train", "test"))
    assert (train["count"], test["count"]) == (50, 80)
    assert train["hash"] == test["hash"]


def test_a_recipe_builds_it() -> None:
    dataset = build("data", {"name": "photos", "crop_px": 32, "flip": True}, split="train")
    assert dataset[0]["x"].shape == (3, 32, 32)


def test_importing_imports_none_of_the_optional_packages() -> None:
    modules = ["base", "decode", "folder", "hub", "parquet", "photos", "tokens"]
    code = "import sys\n" + "".join(f"import tessella.data.{name}\n" for name in modules)
    code += "print([name for name in ('pyarrow', 'skimage', 'sklearn', 'datasets', 'pooch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
