from __future__ import annotations

import io
import itertools
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.config import build
from tessella.data import lsun
from tessella.data.base import DataError, Picture, UnreadableImage
from tessella.data.loader import evaluation_batches
from tessella.data.lsun import LSUN, export_lmdb

lmdb = pytest.importorskip("lmdb")


def encoded(index: int, ending: str = "webp") -> bytes:
    """A picture that is another for each index."""
    pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"webp": "WebP", "jpg": "JPEG"}[ending])
    return buffer.getvalue()


def name(index: int) -> bytes:
    return b"%02x%038x" % (97 * index % 256, index)  # as LSUN's: 40 hexadecimal digits


def write_lmdb(folder: Path, entries: dict[bytes, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, data in entries.items():
            transaction.put(key, data)
    return folder


def write_category(root: Path, folder: str, indices: range) -> Path:
    return write_lmdb(root / f"{folder}_lmdb", {name(index): encoded(index) for index in indices})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two categories, of one of them the validation pictures too."""
    write_category(tmp_path, "tower_train", range(4))
    write_category(tmp_path, "dining_room_train", range(10, 13))
    write_category(tmp_path, "dining_room_val", range(20, 22))
    return tmp_path


def pictures(dataset: LSUN) -> list[Picture]:
    return [dataset.read(index) for index in range(len(dataset))]


def same(a: list[Picture], b: list[Picture]) -> bool:
    return [(p.key, p.label) for p in a] == [(p.key, p.label) for p in b] and all(
        p.image.tobytes() == q.image.tobytes() for p, q in zip(a, b, strict=True)
    )


def test_entries_are_pictures_in_the_order_of_their_keys(root: Path) -> None:
    dataset = LSUN(split="train", path=root)
    assert dataset.class_names == ("dining_room", "tower")
    expected = [
        ("dining_room_train", 0, sorted(range(10, 13), key=name)),
        ("tower_train", 1, sorted(range(4), key=name)),
    ]
    read = pictures(dataset)
    assert [(p.key, p.label) for p in read] == [
        (f"{folder}/{name(index).decode()}", label) for folder, label, indices in expected for index in indices
    ]
    for picture, index in zip(read, itertools.chain(*(indices for _, _, indices in expected)), strict=True):
        with Image.open(io.BytesIO(encoded(index))) as original:
            assert picture.image.tobytes() == original.convert("RGB").tobytes()


def test_splits_and_categories(root: Path) -> None:
    test = LSUN(split="test", path=str(root))
    assert test.class_names == ("dining_room", "tower")  # labels agree with those of training
    assert [p.key.split("/")[0] for p in pictures(test)] == ["dining_room_val"] * 2
    ordered = LSUN(split="train", path=root, categories=["tower", "dining_room"])
    assert [p.label for p in pictures(ordered)] == [0] * 4 + [1] * 3
    one = LSUN(split="train", path=root, categories=["dining_room"])
    assert (len(one), one.class_names) == (3, ("dining_room",))


def test_a_recipe_names_it(root: Path) -> None:
    spec = {"name": "lsun", "path": str(root), "categories": ["tower"], "crop_px": 4, "resize_px": 5, "flip": True}
    dataset = build("data", spec, split="train")
    assert isinstance(dataset, LSUN)
    assert dataset[0]["x"].shape == (3, 4, 4)


def test_both_layouts_give_the_same_pictures(root: Path, tmp_path: Path) -> None:
    write_lmdb(root / "tower_val_lmdb", {name(30): encoded(30, "jpg"), name(31): encoded(31)})
    out = tmp_path / "exported"
    folders = sorted(root.glob("*_lmdb"))
    assert [export_lmdb(folder, out) for folder in folders] == [3, 2, 4, 2]
    assert sorted(child.name for child in out.iterdir()) == [folder.name.removesuffix("_lmdb") for folder in folders]
    text = name(30).decode()
    assert (out / "tower_val" / Path(*text[:6]) / f"{text}.jpg").read_bytes() == encoded(30, "jpg")
    text = name(31).decode()
    assert (out / "tower_val" / Path(*text[:6]) / f"{text}.webp").read_bytes() == encoded(31)
    for split in ("train", "test"):
        ours, theirs = LSUN(split=split, path=root), LSUN(split=split, path=out)
        assert ours.class_names == theirs.class_names
        assert same(pictures(ours), pictures(theirs))


def test_the_lmdb_goes_before_the_export(root: Path) -> None:
    folder = root / "tower_train"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(folder / "unfinished.webp")
    assert len(LSUN(split="train", path=root, categories=["tower"])) == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_open_it_themselves(root: Path, num_workers: int) -> None:
    dataset = LSUN(split="train", path=root, crop_px=4)
    dataset.read(0)  # opened here, which must not reach the workers
    batches = list(evaluation_batches(dataset, batch_size=3, num_workers=num_workers))
    assert [key for batch in batches for key in batch["key"]] == [p.key for p in pictures(dataset)]
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), torch.stack([sample["x"] for sample in dataset]))


def test_data_sets_of_one_folder_live_beside_each_other(root: Path) -> None:
    one, other = LSUN(split="train", path=root), LSUN(split="train", path=os.path.relpath(root))
    assert same(pictures(one), pictures(other))
    del one
    assert len(pictures(other)) == 7
    del other
    with lmdb.open(str(root / "tower_train_lmdb")):  # a second time in one process, LMDB would refuse
        pass


# --- the keys beside the LMDB ----------------------------------------------------------------------------------------


def kept(root: Path) -> list[Path]:
    return sorted((root / "tower_train_lmdb").glob(".keys-*"))


@pytest.fixture
def no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the keys off the LMDB is an error."""
    monkeypatch.setattr(lsun, "write_bytes", None)


def tower(root: Path) -> list[str]:
    return [picture.key[-2:] for picture in pictures(LSUN(split="train", path=root, categories=["tower"]))]


def test_keys_are_read_off_once(root: Path, request: pytest.FixtureRequest) -> None:
    first = tower(root)
    (file,) = kept(root)
    request.getfixturevalue("no_listing")
    assert tower(root) == first
    assert kept(root) == [file]


def test_keys_follow_the_lmdb(root: Path) -> None:
    assert len(tower(root)) == 4
    (old,) = kept(root)
    write_category(root, "tower_train", range(6))
    assert len(tower(root)) == 6
    (new,) = kept(root)
    assert new != old


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "objects"])
def test_damaged_keys_are_made_anew(root: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    expected = tower(root)
    (file,) = kept(root)
    whole = file.read_bytes()
    if damage == "objects":
        np.save(file, np.array([print], dtype=object))
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        file.write_bytes({"cut": whole[:-1], "flip": flipped, "empty": b"", "text": b"keys"}[damage])
    with caplog.at_level(logging.WARNING):
        assert tower(root) == expected
    assert "is damaged and is made anew" in caplog.text
    assert [file.read_bytes() for file in kept(root)] == [whole]


def test_a_folder_that_cannot_be_written_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: Path, data: bytes) -> None:
        raise PermissionError(f"read-only: {file}")

    monkeypatch.setattr(lsun, "write_bytes", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(tower(root)) == 4
    assert "tower_train_lmdb cannot be kept beside it, and are read off at every start: read-only" in caplog.text
    assert kept(root) == []


# --- export ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_export_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = root / "tower_train_lmdb", tmp_path / "out"
    written: list[Path] = []
    write = lsun.write_bytes

    def stop_at_the_third(file: Path, data: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(file, data)
        written.append(file)

    monkeypatch.setattr(lsun, "write_bytes", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        export_lmdb(source, out)
    assert [child.name for child in out.iterdir()] == [".tower_train.unfinished"]
    with pytest.raises(DataError, match="has neither"):  # no half of a category is taken for the whole
        LSUN(split="train", path=out)
    written[0].write_bytes(b"torn")  # what a power failure may leave
    again: list[Path] = []
    monkeypatch.setattr(lsun, "write_bytes", lambda file, data: (write(file, data), again.append(file)))
    assert export_lmdb(source, out) == 4
    assert written[0] in again
    assert written[1] not in again
    assert len(again) == 3
    assert same(pictures(LSUN(split="train", path=out)), pictures(LSUN(split="train", path=root, categories=["tower"])))


def test_an_export_is_not_overwritten(root: Path, tmp_path: Path) -> None:
    source, out = root / "tower_train_lmdb", tmp_path / "out"
    export_lmdb(source, out)
    with pytest.raises(DataError, match=r"out/tower_train is already there; delete it to export .*tower_train_lmdb"):
        export_lmdb(source, out)


@pytest.mark.parametrize("key", [b"../../../evil", b"/etc/evil", b"a/b", b"\xff\xfe", b"."])
def test_keys_cannot_lead_out_of_the_folder(tmp_path: Path, key: bytes) -> None:
    source = write_lmdb(tmp_path / "evil_train_lmdb", {key: encoded(0)})
    with pytest.raises(DataError, match="cannot name a file; accepted are letters, digits, '-' and '_'"):
        export_lmdb(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"path '.*/nowhere' is no folder; give the one that holds LSUN's, such as"):
        LSUN(split="train", path=tmp_path / "nowhere")


def test_a_missing_category_is_named_beside_what_is_there(root: Path) -> None:
    with pytest.raises(DataError, match=r"has neither kitchen_train_lmdb/, an LMDB, nor kitchen_train/, pictures "
                                        r"exported from one; it holds: dining_room_train_lmdb/, "):  # fmt: skip
        LSUN(split="train", path=root, categories=["dining_room", "kitchen"])
    with pytest.raises(DataError, match="has neither tower_val_lmdb/"):
        LSUN(split="test", path=root, categories=["tower"])


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither <category>_train_lmdb/.*; it holds: nothing$"):
        LSUN(split="train", path=tmp_path)
    for index in range(12):
        (tmp_path / f"{index:02d}.zip").touch()
    with pytest.raises(DataError, match=r"it holds: 00\.zip, .*, 09\.zip, and 2 more$"):
        LSUN(split="train", path=tmp_path)


@pytest.mark.parametrize("categories", ["bedroom", ["tower", "tower"]])
def test_categories_are_a_list_of_names(root: Path, categories: list[str]) -> None:
    with pytest.raises(ValueError, match="categories must be a list of different names, got"):
        LSUN(split="train", path=root, categories=categories)


def test_no_lmdb(root: Path) -> None:
    (root / "tower_val_lmdb").mkdir()
    (root / "tower_val_lmdb/readme.txt").touch()
    with pytest.raises(DataError, match=r"tower_val_lmdb is no LMDB: it has no data\.mdb; it holds: readme\.txt"):
        LSUN(split="test", path=root)
    with pytest.raises(DataError, match=r"nowhere is no LMDB: it has no data\.mdb; it holds: nothing"):
        export_lmdb(root / "nowhere", root)
    (root / "tower_val_lmdb/data.mdb").write_bytes(b"garbage" * 3000)
    with pytest.raises(DataError, match=r"tower_val_lmdb is no LMDB, or a damaged one: .*MDB_INVALID"):
        LSUN(split="test", path=root)


def test_an_lmdb_cut_off_is_refused_before_it_kills_the_process(root: Path) -> None:
    data = root / "tower_train_lmdb/data.mdb"
    size = data.stat().st_size
    os.truncate(data, size - 4096)
    with pytest.raises(DataError, match=rf"data\.mdb is cut off: {size - 4096} bytes of {size}; copy it again"):
        LSUN(split="train", path=root)


def test_empty_categories(root: Path) -> None:
    write_lmdb(root / "empty_train_lmdb", {})
    with pytest.raises(DataError, match="empty_train_lmdb is an LMDB without an entry"):
        LSUN(split="train", path=root)
    (root / "bare_train").mkdir()
    (root / "bare_train/readme.txt").touch()
    with pytest.raises(DataError, match=r"no picture in .*bare_train; LSUN's are files that end in \.webp or \.jpg"):
        LSUN(split="train", path=root, categories=["bare"])


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for file in ("a/1.webp", "b/1.jpg"):
        (tmp_path / "tower_train" / file).parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "tower_train" / file)
    with pytest.raises(DataError, match=r"tower_train has two pictures of one name: .*1\.(webp|jpg) and .*1\."):
        LSUN(split="train", path=tmp_path)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "tower_train_lmdb", {b"good": encoded(0), b"torn": encoded(1)[:40], b"void": b""})
    dataset = LSUN(split="train", path=tmp_path)
    (batch,) = evaluation_batches(dataset, batch_size=3)
    assert batch["key"] == ["tower_train/good"]
    assert [key for key, _ in batch["skipped"]] == ["tower_train/torn", "tower_train/void"]
    with pytest.raises(UnreadableImage, match=r"^tower_train/void: not a picture"):
        dataset.read(2)


def test_identity_is_of_entries_and_sizes(root: Path) -> None:
    first = LSUN(split="train", path=root).identity()
    assert first["count"] == 7
    assert LSUN(split="train", path=root, crop_px=4).identity() == first
    export_lmdb(root / "tower_train_lmdb", root / "exported")
    exported = LSUN(split="train", path=root / "exported")
    identity = exported.identity()
    assert identity["count"] == 4
    file = next((root / "exported").rglob("*.webp"))
    file.write_bytes(file.read_bytes() + b" ")
    assert exported.identity() != identity
