from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tessella.config import build
from tessella.data.base import DataError
from tessella.data.hub import Hub
from tessella.data.loader import evaluation_batches


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is needed for .* not installed: pip install 'tessella\[hub\]'"):
        Hub("owner/name", split="train")


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local repository in the hub's layout, and a cache of its own."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    folder = tmp_path_factory.mktemp("hub") / "repo"
    for split, count in (("train", 5), ("validation", 3)):
        images = []
        for level in range(count):
            buffer = io.BytesIO()
            Image.new("RGBA", (6, 4), (level, level, level, 255)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        rows = {"image": images, "label": [level % 2 for level in range(count)]}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(tmp_path_factory.mktemp("cache")))
        yield str(folder)


def test_rows_labels_and_names(repo: str) -> None:
    dataset = build("data", {"name": "hub", "repo": repo, "crop_px": 4}, split="train")
    assert len(dataset) == 5
    assert dataset.class_names == ("cat", "dog")
    sample = dataset[3]
    assert sample["x"].shape == (3, 4, 4)
    assert sample["x"][0, 0, 0].item() == pytest.approx(3 / 127.5 - 1)
    assert (sample["label"], sample["key"]) == (1, f"{repo}/train:3")


def test_validation_stands_in_for_test_and_workers_read_it(repo: str) -> None:
    (batch,) = evaluation_batches(Hub(repo, split="test"), batch_size=4, num_workers=1)
    assert batch["label"].tolist() == [0, 1, 0]
    assert batch["skipped"] == []


def test_a_missing_column_is_named(repo: str) -> None:
    with pytest.raises(DataError, match="has no image_column 'img'; its columns: image, label"):
        Hub(repo, split="train", image_column="img")
    with pytest.raises(DataError, match="has no label_column 'fine'; its columns: image, label"):
        Hub(repo, split="train", label_column="fine")
