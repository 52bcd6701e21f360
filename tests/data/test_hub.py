from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tessella.config import build
from tessella.data.base import DataError, UnreadableImage
from tessella.data.hub import Hub
from tessella.data.loader import evaluation_batches


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is needed for .* not installed: pip install 'tessella\[hub\]'"):
        Hub("owner/name", split="train")


def write_rows(repo: Path, split: str, images: list[dict]) -> None:
    """A Parquet file as ``datasets`` writes it, of pictures in two classes in turn."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    kinds = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    schema = pa.schema(kinds, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    (repo / "data").mkdir(parents=True, exist_ok=True)
    labels = [row % 2 for row in range(len(images))]
    table = pa.table({"image": images, "label": labels}, schema=schema)
    pq.write_table(table, repo / "data" / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local repository in the hub's layout, and a cache of its own."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub") / "repo"
    for split, count in (("train", 5), ("validation", 3)):
        images = []
        for level in range(count):
            buffer = io.BytesIO()
            Image.new("RGBA", (6, 4), (level, level, level, 255)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        write_rows(folder, split, images)
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


@pytest.mark.usefixtures("repo")
def test_paths_in_the_place_of_bytes_are_not_followed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    write_rows(tmp_path / "repo", "train", [{"bytes": None, "path": str(tmp_path / "secret.png")}])
    with pytest.raises(UnreadableImage, match="the row holds no bytes; paths are not followed"):
        Hub(str(tmp_path / "repo"), split="train").read(0)


def test_identity_is_of_the_rows(repo: str) -> None:
    train, test = (Hub(repo, split=split).identity() for split in ("train", "test"))
    assert (train["count"], test["count"]) == (5, 3)
    assert train["hash"] != test["hash"]
    assert Hub(repo, split="train", crop_px=2).identity() == train


def test_a_missing_column_is_named(repo: str) -> None:
    with pytest.raises(DataError, match="has no image_column 'img'; its columns: image, label"):
        Hub(repo, split="train", image_column="img")
    with pytest.raises(DataError, match="has no label_column 'fine'; its columns: image, label"):
        Hub(repo, split="train", label_column="fine")


def test_a_stream_gives_the_same_rows(repo: str, tmp_path: Path) -> None:
    announced = tmp_path / "announced"
    shutil.copytree(repo, announced)
    counts = {"train": 5, "validation": 4}
    splits = [{"name": name, "num_bytes": 1, "num_examples": count} for name, count in counts.items()]
    (announced / "README.md").write_text(f"---\ndataset_info:\n  splits: {json.dumps(splits)}\n---\n")
    streamed, mapped = Hub(str(announced), split="train", streaming=True), Hub(repo, split="train")
    assert len(streamed) == 5
    assert streamed.class_names == ("cat", "dog")
    for index in (0, 1, 2, 4, 1, 3):
        assert torch.equal(streamed[index]["x"], mapped[index]["x"])
        assert streamed[index]["label"] == mapped[index]["label"]
    (batch,) = evaluation_batches(pickle.loads(pickle.dumps(streamed)), batch_size=5)
    assert batch["label"].tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(DataError, match="the stream ends before row 3, although 4 rows were announced"):
        Hub(str(announced), split="test", streaming=True).read(3)


def test_a_stream_of_unknown_length_is_refused(repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset

    def silent(*names: Any, **options: Any) -> Any:
        rows = load(*names, **options)
        rows.info.splits = None
        return rows

    monkeypatch.setattr(datasets, "load_dataset", silent)
    with pytest.raises(DataError, match="does not say how many rows its split 'train' has; set streaming = false"):
        Hub(repo, split="train", streaming=True)
