"""Pictures with dense labels: crops of both together, and readers of every layout on files written here."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.data._dense import random_box, resized_label, square_label
from tessella.data.base import Samples, UnreadableImage, random_for
from tessella.data.camvid import CamVid
from tessella.data.cityscapes import Cityscapes
from tessella.data.coco_panoptic import CocoPanoptic
from tessella.data.color import Color
from tessella.data.depth_folder import DepthFolder
from tessella.data.loader import evaluation_batches, training_batches
from tessella.data.motorcycle import Motorcycle
from tessella.data.nyu_depth import NYUDepth
from tessella.errors import ConfigError
from tessella.labels.panoptic import PanopticPlanes


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def picture(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids_of(dataset: Samples, index: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Classes and instances of a sample."""
    classes, instances = dataset[index]["x"].long().tolist()
    return classes, instances


# --- crops ------------------------------------------------------------------------------------------------------------


def test_labels_are_resized_to_the_nearest_pixel() -> None:
    label = np.arange(12).reshape(3, 4)
    assert resized_label(label, 3, 4).tolist() == label.tolist()
    assert resized_label(label, 1, 2).tolist() == [[5, 7]]  # centres: row 1.5; columns 1 and 3
    assert resized_label(label, 6, 4)[:, 0].tolist() == [0, 0, 4, 4, 8, 8]
    assert square_label(label, 2, (1, 0, 3, 2)).tolist() == [[1, 2], [5, 6]]


def test_random_boxes_have_the_stated_areas_and_sides() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(2000):
        left, top, right, bottom = random_box(200, 160, 0.05, rng)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 160
        w, h = right - left, bottom - top
        shares.append(w * h / (200 * 160))
        assert 0.7 < w / h < 1.4 or (w, h) == (200, 160)
    inner = [share for share in shares if share < 0.7]  # near 1 some shapes do not fit and others are drawn
    assert min(shares) < 0.06
    assert np.mean(inner) == pytest.approx((0.05 + 0.7) / 2, abs=0.02)
    assert random_box(200, 160, 1.0, rng) == (0, 0, 200, 160)


def depth_folder(root: Path, count: int = 2, units: int = 1000) -> Path:
    """Pictures whose red channel is their depth in decimetres."""
    for i in range(count):
        levels = np.random.default_rng(i).integers(5, 95, (12, 16))
        pixels = np.repeat(levels[..., None], 3, 2).astype(np.uint8)
        save(root / "images" / f"{i}.png", pixels)
        save(root / "depth" / f"{i}.png", (levels * (units // 10)).astype(np.uint16))
    return root


def test_picture_and_label_are_cropped_and_mirrored_together(tmp_path: Path) -> None:
    # With a crop of the label's own pixels (size_px of the whole picture, no resizing of a part) both stay aligned.
    dataset = DepthFolder(depth_folder(tmp_path), split="test", size_px=48, min_area=0.2, held_out=1.0)
    mirrored = 0
    for epoch in range(12):
        sample = dataset.sample(0, random_for(0, epoch, 0))
        depth_dm = dataset.bins.to_metres(sample["x"][0]) * 10
        shown_dm = (sample["context"][0] + 1) * 127.5
        # Pixels are interpolated and labels are not: they agree where they are alike around.
        assert np.corrcoef(depth_dm.flatten(), shown_dm.flatten())[0, 1] > 0.8
        whole = dataset[0]
        mirrored += bool((whole["x"].flip(2) - sample["x"]).abs().mean() < (whole["x"] - sample["x"]).abs().mean())
    assert 0 < mirrored < 12


def test_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    root = depth_folder(tmp_path)
    save(root / "images" / "0.png", picture(6, 8))
    dataset = DepthFolder(root, split="test", size_px=8, held_out=1.0)
    with pytest.raises(UnreadableImage, match=r"0.png: the picture is 8x6 px, its label 16x12"):
        dataset[0]
    # One such picture does not end an evaluation: it is named and left out.
    (batch,) = evaluation_batches(dataset, batch_size=4)
    assert batch["key"] == ["1.png"]
    assert batch["skipped"][0][0] == "0.png"


def test_batches_carry_the_pictures(tmp_path: Path) -> None:
    dataset = DepthFolder(depth_folder(tmp_path, 4), split="test", size_px=8, held_out=1.0)
    batch = next(training_batches(dataset, batch_size=3, seed=0))
    assert batch["x"].shape == (3, 1, 8, 8)
    assert batch["context"].shape == (3, 3, 8, 8)
    assert batch["context"].abs().max() <= 1
    assert dataset.extent == (8, 8)


# --- depth ------------------------------------------------------------------------------------------------------------


def test_depth_folder_by_hand(tmp_path: Path) -> None:
    save(tmp_path / "train/images/a.jpg", picture(2, 2))
    save(tmp_path / "test/images/b.png", picture(2, 2))
    save(tmp_path / "train/depth/a.png", np.array([[1000, 0], [2500, 9000]], np.uint16))
    (tmp_path / "test/depth").mkdir()
    np.save(tmp_path / "test/depth/b.npy", np.array([[1.5, np.nan], [np.inf, -1.0]]))
    train, test = (DepthFolder(tmp_path, split=split, size_px=2) for split in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == (1, 1)
    torch.testing.assert_close(train.bins.to_metres(train[0]["x"][0]), torch.tensor([[1, 0], [2.5, 9]]))
    torch.testing.assert_close(test.bins.to_metres(test[0]["x"][0]), torch.tensor([[1.5, 0], [0, 0]]))
    assert DepthFolder.medium_spec({"num_bins": 32}) == {"name": "depth", "num_bins": 32, "high_m": 10.0}


def test_depth_folder_refuses(tmp_path: Path) -> None:
    root = depth_folder(tmp_path / "mm")
    with pytest.raises(UnreadableImage, match=r"looks like millimetres: .*units_per_m = 1000"):
        DepthFolder(root, split="test", size_px=4, held_out=1.0, units_per_m=1)[0]
    (root / "depth/1.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures of .* have no depth in .*, such as 1.png"):
        DepthFolder(root, split="test", size_px=4)
    with pytest.raises(ValueError, match=r"no folder .*images, which should hold pictures"):
        DepthFolder(tmp_path, split="test", size_px=4)
    with pytest.raises(ValueError, match="units_per_m must be above 0"):
        DepthFolder(root, split="test", size_px=4, units_per_m=0)
    with pytest.raises(ValueError, match="min_area must be above 0"):
        DepthFolder(root, split="test", size_px=4, min_area=0)
    colour = depth_folder(tmp_path / "colour", 1)
    save(colour / "depth/0.png", picture(12, 16))
    with pytest.raises(UnreadableImage, match=r"label 0.png is a colour picture; one channel of numbers is needed"):
        DepthFolder(colour, split="test", size_px=4, held_out=1.0)[0]
    (colour / "depth/0.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImage, match=r"label 0.png cannot be read"):
        DepthFolder(colour, split="test", size_px=4, held_out=1.0)[0]
    (colour / "depth/0.png").unlink()
    np.save(colour / "depth/0.npy", np.array([["text"]], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match=r"depth 0.npy cannot be read"):  # objects would run code
        DepthFolder(colour, split="test", size_px=4, held_out=1.0)[0]


def nyu_file(path: Path, *, shape: tuple[int, int] = (4, 6), count: int = 4) -> tuple[Path, np.ndarray, np.ndarray]:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape, 3), dtype=np.uint8)
    depths = rng.uniform(0.7, 9.5, (count, *shape)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
    return path, images, depths


def test_nyu_reads_columns_first_and_crops_full_frames(tmp_path: Path) -> None:
    path, images, depths = nyu_file(tmp_path / "small.mat")
    dataset = NYUDepth(path, split="test", size_px=4, held_out=1.0)
    assert len(dataset) == 4
    pair = dataset.read(1)
    assert np.array_equal(np.asarray(pair.image), images[1])
    assert np.array_equal(pair.label, depths[1])
    again: NYUDepth = pickle.loads(pickle.dumps(dataset))  # as a worker process gets it, after reading
    assert np.array_equal(again.read(1).label, depths[1])
    assert "depth_m" not in dataset.sample(1, random_for(0, 0, 1))
    (batch,) = evaluation_batches(dataset, batch_size=4)
    np.testing.assert_array_equal(batch["depth_m"].numpy(), depths)  # type: ignore[typeddict-item]
    path, images, depths = nyu_file(tmp_path / "full.mat", shape=(480, 640), count=1)
    pair = NYUDepth(path, split="test", held_out=1.0).read(0)
    assert pair.image.size == (560, 426)
    assert np.array_equal(pair.label, depths[0, 54:480, 41:601])
    assert np.array_equal(np.asarray(pair.image), images[0, 54:480, 41:601])


def test_nyu_official_split(tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    path, _, depths = nyu_file(tmp_path / "a.mat")
    splits = tmp_path / "splits.mat"
    savemat(splits, {"trainNdxs": np.array([[3], [1]]), "testNdxs": np.array([[4]])})
    train, test = (NYUDepth(path, split=s, size_px=4, splits=str(splits)) for s in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == (2, 1)
    assert np.array_equal(train.read(0).label, depths[2])
    assert np.array_equal(test.read(0).label, depths[3])
    savemat(splits, {"trainNdxs": np.array([[5]])})
    with pytest.raises(ValueError, match="trainNdxs must hold numbers from 1 to 4"):
        NYUDepth(path, split="train", size_px=4, splits=str(splits))
    with pytest.raises(ValueError, match="holds no testNdxs"):
        NYUDepth(path, split="test", size_px=4, splits=str(splits))


def test_nyu_refuses(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with pytest.raises(ValueError, match="cannot be read as HDF5"):
        NYUDepth(tmp_path / "absent.mat", split="train")
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["images"] = np.zeros((2, 3, 4, 5), np.uint8)
    with pytest.raises(ValueError, match=r"must hold images \[N, 3, W, H\] and depths \[N, W, H\], got \(2, 3, 4, 5\)"):
        NYUDepth(tmp_path / "other.mat", split="train")
    with h5py.File(tmp_path / "other.mat", "a") as file:
        file["depths"] = np.zeros((2, 5, 4), np.float32)
    with pytest.raises(ValueError, match="are of different numbers or sizes"):
        NYUDepth(tmp_path / "other.mat", split="train")


def test_the_motorcycle_stands_in_a_garage() -> None:
    pytest.importorskip("skimage")
    sample = Motorcycle(split="test", size_px=64)[0]
    dataset = Motorcycle(split="test")
    depth = dataset.bins.to_metres(sample["x"][0])
    seen = depth[depth > 0]
    assert len(seen) > 0.7 * depth.numel()
    assert 1.9 < seen.min() < 2.5
    assert 4 < seen.max() < 5.1
    # The wheel in the middle of the picture is nearer than the shelf behind it.
    assert depth[30:50, 20:45][depth[30:50, 20:45] > 0].median() < depth[:12, 20:45][depth[:12, 20:45] > 0].median()


# --- segments ---------------------------------------------------------------------------------------------------------


def camvid(root: Path, mask: np.ndarray, split: str = "train") -> Path:
    save(root / split / "images/a.jpg", picture(*mask.shape))
    save(root / split / "masks/a.png", mask.astype(np.uint8))
    return root


MASK = np.array([
    [0, 0, 8, 8, 0, 8],
    [0, 0, 8, 0, 0, 8],
    [3, 3, 3, 3, 3, 3],
    [3, 9, 3, 3, 11, 255],
    [3, 3, 3, 3, 3, 3],
    [3, 3, 3, 3, 3, 3],
])  # fmt: skip


def test_camvid_things_are_connected_components_and_stuff_is_one(tmp_path: Path) -> None:
    dataset = CamVid(camvid(tmp_path, MASK), split="train", size_px=6, min_segment_px=1)
    classes, instances = ids_of(dataset)
    assert classes == [
        [1, 1, 9, 9, 1, 9],
        [1, 1, 9, 1, 1, 9],
        [4, 4, 4, 4, 4, 4],
        [4, 10, 4, 4, 0, 0],
        [4, 4, 4, 4, 4, 4],
        [4, 4, 4, 4, 4, 4],
    ]
    # x_c + 6 y_c: 4.33 of the left car, 5.29 of the sky, 8 of the right car, 19 of the pedestrian, more of the road.
    assert instances == [
        [2, 2, 1, 1, 2, 3],
        [2, 2, 1, 2, 2, 3],
        [5, 5, 5, 5, 5, 5],
        [5, 4, 5, 5, 0, 0],
        [5, 5, 5, 5, 5, 5],
        [5, 5, 5, 5, 5, 5],
    ]  # fmt: skip


def test_camvid_small_components_are_not_learned(tmp_path: Path) -> None:
    dataset = CamVid(camvid(tmp_path, MASK), split="train", size_px=6, min_segment_px=3)
    classes, _ = ids_of(dataset)
    assert classes[3][1] == -1  # one pixel of a pedestrian
    assert classes[0][5] == -1  # two pixels of a car
    assert classes[0][2] == 9  # three of another
    spec = CamVid.medium_spec({"num_instances": 24})
    assert spec["num_instances"] == 24
    assert spec["class_names"][8] == "car"
    assert "car" in spec["things"]


def test_camvid_refuses(tmp_path: Path) -> None:
    root = camvid(tmp_path / "a", MASK)
    with pytest.raises(ValueError, match="holds no test/, val/, valid/ or validation/"):
        CamVid(root, split="test", size_px=6)
    camvid(root, MASK + 3, "val")
    with pytest.raises(UnreadableImage, match=r"mask a.png holds class numbers \[12, 14, 258\]|holds class numbers"):
        CamVid(root, split="test", size_px=6)[0]
    (root / "train/masks/a.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures of .* have no mask in .*, such as a.jpg"):
        CamVid(root, split="train", size_px=6)
    with pytest.raises(ValueError, match=r"things \['cat'\] are no class_names; accepted: dog"):
        CamVid(root, split="train", class_names=["dog"], things=["cat"])
    with pytest.raises(ValueError, match="no folder"):
        CamVid(tmp_path / "absent", split="train")


def test_camvid_on_real_pictures(shared_data: Path) -> None:
    root = shared_data / "camvid"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    dataset = CamVid(root, split="train", size_px=64, min_segment_px=50)
    assert len(dataset) == 367
    cars = 0
    for index in range(0, 367, 60):
        x = dataset[index]["x"]
        codec = PanopticPlanes(11, 100)
        segments = codec.from_planes(x)
        assert torch.equal(codec.to_planes(segments), x)
        cars += list(segments.categories.values()).count(8)
    assert cars > 5


def test_cityscapes(tmp_path: Path) -> None:
    label = np.array([[26001, 26001, 26, 7], [26002, 26002, 0, 7], [23, 23, 23, 7]], np.uint16)
    save(tmp_path / "leftImg8bit/train/bonn/bonn_0_leftImg8bit.png", picture(3, 4))
    save(tmp_path / "gtFine/train/bonn/bonn_0_gtFine_instanceIds.png", label)
    dataset = Cityscapes(tmp_path, split="train", size_px=12)
    assert len(dataset) == 1
    classes, instances = ids_of(dataset)
    car, road, sky = (1 + dataset.class_names.index(name) for name in ("car", "road", "sky"))
    assert [row[::3] for row in classes[::4]] == [[car, car, -1, road], [car, car, 0, road], [sky, sky, sky, road]]
    assert [row[::3] for row in instances[::4]] == [[1, 1, -1, 3], [2, 2, 0, 3], [4, 4, 4, 3]]
    spec = Cityscapes.medium_spec({})
    assert (len(spec["class_names"]), len(spec["things"])) == (19, 8)
    save(tmp_path / "gtFine/train/bonn/bonn_0_gtFine_instanceIds.png", label + np.uint16(30000))
    with pytest.raises(UnreadableImage, match="instance map holds class number 56; the largest is 33"):
        dataset[0]
    (tmp_path / "gtFine/train/bonn/bonn_0_gtFine_instanceIds.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures of .* have no label"):
        Cityscapes(tmp_path, split="train")


def coco(root: Path, **changes: Any) -> Path:
    """One picture: a person of id 300 beside grass of id 70000, void, and a crowd of persons."""
    ids = np.array([[300, 300, 70000, 0], [300, 300, 70000, 5]])
    save(root / "train2017/0001.jpg", picture(2, 4))
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    save(root / "annotations/panoptic_train2017/0001.png", rgb)
    content = {
        "images": [{"id": 1, "file_name": "0001.jpg"}],
        "categories": [{"id": 1, "name": "person", "isthing": 1}, {"id": 193, "name": "grass", "isthing": 0}],
        "annotations": [{"image_id": 1, "file_name": "0001.png", "segments_info": [
            {"id": 300, "category_id": 1, "iscrowd": 0}, {"id": 70000, "category_id": 193, "iscrowd": 0},
            {"id": 5, "category_id": 1, "iscrowd": 1},
        ]}],
        **changes,
    }  # fmt: skip
    (root / "annotations/panoptic_train2017.json").write_text(json.dumps(content))
    return root


COCO = {"split": "train", "size_px": 4, "class_names": ["person", "grass"], "things": ["person"]}


def test_coco(tmp_path: Path) -> None:
    dataset = CocoPanoptic(coco(tmp_path), **COCO)  # type: ignore[arg-type]
    classes, instances = ids_of(dataset)
    assert classes[::2] == [[1, 1, 2, 0], [1, 1, 2, -1]]
    assert instances[::2] == [[1, 1, 2, 0], [1, 1, 2, -1]]
    spec = CocoPanoptic.medium_spec({})
    assert (len(spec["class_names"]), len(spec["things"])) == (133, 80)
    assert spec["class_names"][:2] == ["person", "bicycle"]
    assert len(set(spec["class_names"])) == 133


def test_coco_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 2 categories, person, grass, ...: not those of class_names"):
        CocoPanoptic(coco(tmp_path), split="train")
    wrong = [{"image_id": 1, "file_name": "0001.png", "segments_info": [{"id": 300, "category_id": 7}]}]
    dataset = CocoPanoptic(coco(tmp_path, annotations=wrong), **COCO)  # type: ignore[arg-type]
    with pytest.raises(UnreadableImage, match=r"0001: the label holds ids \[5, 70000\] that the JSON"):
        dataset[0]
    wrong[0]["segments_info"] = [{"id": i, "category_id": 7} for i in (300, 70000, 5)]
    with pytest.raises(UnreadableImage, match=r"category ids \[7\] are not in the file's table"):
        CocoPanoptic(coco(tmp_path, annotations=wrong), **COCO)[0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="annotation of image 1, which is not among the images"):
        CocoPanoptic(coco(tmp_path, images=[]), **COCO)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must hold the lists images, annotations, categories"):
        CocoPanoptic(coco(tmp_path, annotations=None), **COCO)  # type: ignore[arg-type]
    (tmp_path / "annotations/panoptic_train2017.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        CocoPanoptic(tmp_path, **COCO)  # type: ignore[arg-type]
    grey = CocoPanoptic(coco(tmp_path), **COCO)  # type: ignore[arg-type]
    save(tmp_path / "annotations/panoptic_train2017/0001.png", np.zeros((2, 4), np.uint8))
    with pytest.raises(UnreadableImage, match="must be an RGB picture"):
        grey[0]


# --- colour -----------------------------------------------------------------------------------------------------------


def test_colour_of_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "train/a.png", picture(8, 8))
    save(tmp_path / "test/b.png", picture(8, 8, seed=1))
    section = {"name": "folder", "path": "elsewhere", "crop_px": 4}
    dataset = Color(split="test", pictures=section, path=str(tmp_path))
    assert (len(dataset), dataset.extent) == (1, (4, 4))
    sample = dataset[0]
    assert sample["key"] == "test/b.png"
    grey = 0.299 * sample["x"][0] + 0.587 * sample["x"][1] + 0.114 * sample["x"][2]
    torch.testing.assert_close(sample["context"], grey.expand(3, -1, -1))
    assert Color.medium_spec({}) == {"name": "color"}
    with pytest.raises(ConfigError, match="must be a source of pictures, 'camvid' is none"):
        Color(split="test", pictures={"name": "camvid"})
