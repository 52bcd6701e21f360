from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from tessella.config import build
from tessella.data.base import DataError, UnreadableImage
from tessella.data.folder import Folder
from tessella.data.loader import evaluation_batches


def save(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(root / name)


def keys(dataset: Folder) -> list[str]:
    return [dataset.read(index).key for index in range(len(dataset))]


def labels(dataset: Folder) -> dict[str, int]:
    pictures = [dataset.read(index) for index in range(len(dataset))]
    return {picture.key: picture.label for picture in pictures}


def test_splits_classes_and_natural_order(tmp_path: Path) -> None:
    save(tmp_path, "train/c10/2.png", "train/c10/10.PNG", "train/c10/deep/1.jpg", "train/c2/1.webp", "train/loose.png")
    save(tmp_path, "val/c2/1.png", "val/c11/1.bmp", "ignored/c2/1.png")
    train, test = (Folder(tmp_path, split=split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("c2", "c10", "c11")
    assert labels(train) == {
        "train/c2/1.webp": 0, "train/c10/2.png": 1, "train/c10/10.PNG": 1, "train/c10/deep/1.jpg": 1,
        "train/loose.png": -1,
    }  # fmt: skip
    assert keys(train)[:3] == ["train/c2/1.webp", "train/c10/2.png", "train/c10/10.PNG"]
    assert labels(test) == {"val/c2/1.png": 0, "val/c11/1.bmp": 2}


def test_test_goes_before_val(tmp_path: Path) -> None:
    save(tmp_path, "train/1.png", "validation/1.png", "valid/1.png", "val/1.png", "test/1.png")
    assert keys(Folder(tmp_path, split="test")) == ["test/1.png"]
    assert keys(Folder(str(tmp_path), split="train")) == ["train/1.png"]


@pytest.mark.parametrize("inside", ["", "train/"])
def test_a_share_is_held_out(tmp_path: Path, inside: str) -> None:
    names = [f"{inside}{'ab'[i % 2]}/{i}.ppm" for i in range(200)]
    save(tmp_path, *names)
    train, test = (Folder(tmp_path, split=split, held_out=0.2) for split in ("train", "test"))
    assert sorted(keys(train) + keys(test)) == sorted(names)
    assert 20 <= len(test) <= 60
    assert train.class_names == test.class_names == ("a", "b")
    assert {key.removeprefix(inside)[0] for key in labels(test)} == {"a", "b"}


def test_a_held_out_picture_stays_held_out_when_others_join(tmp_path: Path) -> None:
    save(tmp_path, *[f"{i}.ppm" for i in range(50)])
    before = set(keys(Folder(tmp_path, split="test", held_out=0.2)))
    save(tmp_path, *[f"{i}.ppm" for i in range(50, 100)])
    after = set(keys(Folder(tmp_path, split="test", held_out=0.2)))
    assert before == {key for key in after if int(key[:-4]) < 50}


def test_of_few_pictures_one_is_held_out(tmp_path: Path) -> None:
    save(tmp_path, "1.png", "2.png", "3.png")
    assert len(Folder(tmp_path, split="test", held_out=0.001)) == 1
    assert len(Folder(tmp_path, split="train", held_out=0.001)) == 2


def test_one_picture_cannot_be_split(tmp_path: Path) -> None:
    save(tmp_path, "1.png")
    with pytest.raises(ValueError, match=r"no picture is left for split 'train' of 1 with held_out=0\.05"):
        Folder(tmp_path, split="train")


def test_hidden_files_and_other_files_are_no_pictures(tmp_path: Path) -> None:
    save(tmp_path, "test/a/1.png", "test/.cache/1.png", "test/a/.thumbnail.png")
    (tmp_path / "test/a/readme.txt").write_text("text")
    (tmp_path / "test/b").mkdir()
    dataset = Folder(tmp_path, split="test")
    assert keys(dataset) == ["test/a/1.png"]
    assert dataset.class_names == ("a",)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    save(tmp_path, "elsewhere/1.png")
    save(tmp_path, "data/test/a/1.png")
    test = tmp_path / "data/test"
    (test / "b").symlink_to(tmp_path / "elsewhere")
    (test / "a/up").symlink_to(test)
    (test / "c.png").symlink_to("c.png")  # a link to itself
    dataset = Folder(tmp_path / "data", split="test")
    assert [dataset._files[i] for i in range(len(dataset))] == ["test/a/1.png", "test/b/1.png", "test/c.png"]
    assert dataset.read(1).label == 1
    (batch,) = evaluation_batches(dataset, batch_size=4)
    assert batch["key"] == ["test/a/1.png", "test/b/1.png"]
    assert batch["skipped"][0][0] == "test/c.png"


def test_a_broken_link_is_unreadable_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match=r"^test/1\.png: .*No such file"):
        Folder(tmp_path, split="test").read(0)


def test_a_pipe_named_as_a_picture_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, "test/1.png")
    os.mkfifo(tmp_path / "test/2.png")
    assert keys(Folder(tmp_path, split="test")) == ["test/1.png"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path '.*/nowhere' is no folder; give one that holds pictures"):
        Folder(tmp_path / "nowhere", split="train")


def test_an_empty_folder_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no picture in .*; accepted are files ending in .*\.jpeg, .*\.png"):
        Folder(tmp_path, split="train")


def test_no_training_folder(tmp_path: Path) -> None:
    save(tmp_path, "val/1.png")
    with pytest.raises(DataError, match=r"has val/ but no train/: nothing for split 'train'"):
        Folder(tmp_path, split="train")


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0])
def test_the_share_is_checked(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="held_out must be above 0 and at most 1"):
        Folder(tmp_path, split="train", held_out=share)


def test_a_share_of_1_holds_out_everything(tmp_path: Path) -> None:
    save(tmp_path, "1.png", "2.png", "3.png")
    assert len(Folder(tmp_path, split="test", held_out=1.0)) == 3
    with pytest.raises(ValueError, match="no picture is left for split 'train'"):
        Folder(tmp_path, split="train", held_out=1.0)


def test_a_recipe_builds_it(tmp_path: Path) -> None:
    save(tmp_path, "train/1.png", "test/1.png")
    dataset = build("data", {"name": "folder", "path": str(tmp_path), "crop_px": 2}, split="test")
    assert dataset[0]["x"].shape == (3, 2, 2)
