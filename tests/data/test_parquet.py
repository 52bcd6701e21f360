from __future__ import annotations

import io
import json
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tessella.config import build
from tessella.data.base import DataError, UnreadableImage
from tessella.data.loader import evaluation_batches
from tessella.data.parquet import Parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def level(x: torch.Tensor) -> int:
    return round((x[0, 0, 0].item() + 1) * 127.5)


def write(
    file: Path, images: list[bytes | None], labels: list[int | None] | None, metadata: dict | None = None
) -> None:
    columns = {"image": [None if image is None else {"bytes": image, "path": None} for image in images]}
    kinds = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    if labels is not None:
        columns["label"] = labels
        kinds.append(pa.field("label", pa.int64()))
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns, schema=pa.schema(kinds, metadata=metadata)), file, row_group_size=2)


def write_levels(file: Path, levels: range, metadata: dict | None = None) -> None:
    write(file, [png(i) for i in levels], [i % 2 for i in levels], metadata)


def test_files_of_a_split_in_order(tmp_path: Path) -> None:
    names = {"class_names": "even\nodd"}
    write_levels(tmp_path / "train-00001-of-00002.parquet", range(5, 8), names)
    write_levels(tmp_path / "train-00000-of-00002.parquet", range(5), names)
    write_levels(tmp_path / "validation-00000.parquet", range(8, 10), names)
    train, test = (Parquet(tmp_path, split=split) for split in ("train", "test"))
    assert train.class_names == ("even", "odd")
    samples = [train[i] for i in range(len(train))]
    assert [level(sample["x"]) for sample in samples] == list(range(8))
    assert [sample["label"] for sample in samples] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert samples[6]["key"] == "train-00001-of-00002.parquet:1"
    assert [level(test[i]["x"]) for i in range(len(test))] == [8, 9]
    assert samples[0]["x"].shape == (3, 3, 4)


def test_the_hubs_folder_and_class_names(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    write_levels(tmp_path / "data/train-00000-of-00001.parquet", range(3), metadata)
    write_levels(tmp_path / "data/test-00000-of-00001.parquet", range(3), metadata)
    dataset = Parquet(tmp_path, split="test")
    assert dataset.class_names == ("cat", "dog")
    assert dataset[2]["key"] == "data/test-00000-of-00001.parquet:2"


@pytest.mark.parametrize("name", ["train-00000.parquet", "pictures.parquet"])
@pytest.mark.parametrize("single_file", [True, False])
def test_a_share_is_held_out(tmp_path: Path, name: str, single_file: bool) -> None:
    write_levels(tmp_path / name, range(100))
    path = tmp_path / name if single_file else tmp_path
    parts = [Parquet(path, split=split, held_out=0.2) for split in ("train", "test")]
    train, test = ({level(part[i]["x"]) for i in range(len(part))} for part in parts)
    assert train | test == set(range(100))
    assert not train & test
    assert 8 <= len(test) <= 35
    assert parts[0].class_names == ()
    assert all(parts[1][i]["key"] == f"{name}:{level(parts[1][i]['x'])}" for i in range(len(parts[1])))


def test_other_column_names_and_plain_bytes(tmp_path: Path) -> None:
    table = pa.table({"img": [png(7), png(8)], "fine_label": pa.array([3, 4], pa.int32())})
    pq.write_table(table, tmp_path / "test.parquet")
    dataset = Parquet(tmp_path, split="test", image_column="img", label_column="fine_label")
    assert (level(dataset[1]["x"]), dataset[1]["label"]) == (8, 4)
    assert Parquet(tmp_path, split="test", image_column="img")[1]["label"] == -1


def test_missing_values(tmp_path: Path) -> None:
    struct_without_bytes = [png(1), None]
    write(tmp_path / "test-0.parquet", struct_without_bytes, [None, 0])
    dataset = Parquet(tmp_path, split="test")
    assert dataset[0]["label"] == -1
    with pytest.raises(UnreadableImage, match=r"^test-0\.parquet:1: the row holds no bytes$"):
        dataset.read(1)
    write(tmp_path / "test-0.parquet", [png(1)], None)
    assert Parquet(tmp_path, split="test")[0]["label"] == -1


def test_a_label_outside_the_classes_is_named(tmp_path: Path) -> None:
    write(tmp_path / "test-0.parquet", [png(1)], [2], {"class_names": "a\nb"})
    with pytest.raises(DataError, match=r"^test-0\.parquet:0: label 2 is none of the 2 classes, nor -1 for unknown$"):
        Parquet(tmp_path, split="test").read(0)


def test_a_worker_reads_the_file_itself(tmp_path: Path) -> None:
    noise = torch.randint(256, (200_000,), dtype=torch.uint8).numpy().tobytes()
    write(tmp_path / "test-0.parquet", [png(1) + noise, png(2)], [0, 1])
    dataset = Parquet(tmp_path, split="test")
    dataset.read(0)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2000
    assert level(pickle.loads(pickled)[1]["x"]) == 2
    (batch,) = evaluation_batches(dataset, batch_size=2, num_workers=1)
    assert batch["label"].tolist() == [0, 1]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path '.*/nowhere' does not exist; give a Parquet file, or a folder"):
        Parquet(tmp_path / "nowhere", split="train")
    with pytest.raises(ValueError, match=r"holds no file ending in \.parquet"):
        Parquet(tmp_path, split="train")
    write_levels(tmp_path / "test-0.parquet", range(9))
    with pytest.raises(ValueError, match=r"holds test-\*\.parquet and no train-\*\.parquet"):
        Parquet(tmp_path, split="train")
    with pytest.raises(ValueError, match=r"test-0\.parquet has no image_column 'img'; its columns: image, label"):
        Parquet(tmp_path, split="test", image_column="img")
    with pytest.raises(ValueError, match=r"test-0\.parquet has no label_column 'fine'; its columns: image, label"):
        Parquet(tmp_path, split="test", label_column="fine")
    with pytest.raises(DataError, match=r"test-0\.parquet: column 'label' must hold bytes, or a struct .*, not int64"):
        Parquet(tmp_path, split="test", image_column="label")
    with pytest.raises(DataError, match=r"test-0\.parquet: column 'image' must hold integers, not struct"):
        Parquet(tmp_path, split="test", label_column="image")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "test-0.parquet"
    write_levels(file, range(9))
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"test-0\.parquet is not a Parquet file, or not a whole one"):
        Parquet(tmp_path, split="test")
    file.write_bytes(whole[:4] + bytes(100) + whole[104:])
    with pytest.raises(DataError, match=r"test-0\.parquet cannot be read"):
        Parquet(tmp_path, split="test").read(0)
    write_levels(file, range(0))
    with pytest.raises(DataError, match=r"no row in .*test-0\.parquet"):
        Parquet(tmp_path, split="test")


@pytest.mark.parametrize(
    "metadata",
    [
        {b"huggingface": b"[1]"},
        {b"huggingface": b"{"},
        {b"huggingface": b'{"info": {"features": {"label": {"names": 7}}}}'},
        {b"huggingface": b'{"info": {"features": {"label": {"names": [7]}}}}'},
        {b"huggingface": b'{"info": null}'},
        {b"huggingface": b"\xff\xfe"},
        {b"class_names": b"\xff\xfe"},
    ],
)
def test_odd_metadata_name_the_file(tmp_path: Path, metadata: dict) -> None:
    write_levels(tmp_path / "test-0.parquet", range(2), metadata)
    with pytest.raises(DataError, match=r"test-0\.parquet: the class names in its metadata cannot be read: "):
        Parquet(tmp_path, split="test")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    image, label = pa.array([png(1)]), pa.array([0])
    for names in (["image", "image", "label"], ["image", "label", "label"]):
        columns = [image if name == "image" else label for name in names]
        pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "test.parquet")
        with pytest.raises(DataError, match=rf"test\.parquet has 2 columns '{names[1]}'"):
            Parquet(tmp_path, split="test")


def test_a_label_that_is_too_large_is_refused(tmp_path: Path) -> None:
    table = pa.table({"image": [png(1)], "label": pa.array([2**63], pa.uint64())})
    pq.write_table(table, tmp_path / "test.parquet")
    assert Parquet(tmp_path, split="test").read(0).label == 2**63
    assert len(Parquet(tmp_path, split="test").identity()["hash"]) == 32


def test_a_damaged_file_raises_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "test-0.parquet"
    write_levels(file, range(9), {"class_names": "a\nb"})
    whole = file.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged if rng.random() < 0.7 else whole[: rng.randrange(len(whole))])
        try:
            dataset = Parquet(tmp_path, split="test")
            for index in range(len(dataset)):
                dataset.read(index)
        except DataError:
            refused += 1
    assert refused > 60


def test_files_that_differ_are_named(tmp_path: Path) -> None:
    write_levels(tmp_path / "test-0.parquet", range(2), {"class_names": "a\nb"})
    write_levels(tmp_path / "test-1.parquet", range(2), {"class_names": "b\na"})
    with pytest.raises(DataError, match=r"test-1\.parquet and .*test-0\.parquet differ in their columns"):
        Parquet(tmp_path, split="test")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_levels(tmp_path / "test-0.parquet", range(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow is needed .* not installed: pip install 'tessella\[data\]'"):
        Parquet(tmp_path, split="test")


@pytest.mark.parametrize(
    ("name", "split", "length", "side", "num_classes"),
    [("cifar10", "train", 30_000, 32, 10), ("imagenette128", "test", 1500, 128, 10), ("gtsrb32", "test", 3000, 32, 0)],
)
def test_real_pictures(name: str, split: str, length: int, side: int, num_classes: int) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no data at {SHARED / name}")
    dataset = build("data", {"name": "parquet", "path": str(SHARED / name), "crop_px": side}, split=split)
    assert len(dataset) == length
    assert len(dataset.class_names) == num_classes
    batch = next(evaluation_batches(dataset, batch_size=64))
    assert batch["x"].shape == (64, 3, side, side)
    assert batch["skipped"] == []
    assert 0.2 < batch["x"].std() < 1
    assert (batch["label"] >= 0).all()
