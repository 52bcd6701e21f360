"""Depth, colour and segments as files and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tessella.data.base import DataError
from tessella.errors import ConfigError
from tessella.labels.panoptic import Segments
from tessella.media.color import Color
from tessella.media.depth import Depth, depth_colours
from tessella.media.panoptic import Panoptic

NAMES = ["sky", "road", "car"]


def panoptic(**settings: float) -> Panoptic:
    return Panoptic(class_names=NAMES, things=["car"], num_instances=10, **settings)  # type: ignore[arg-type]


def street() -> Tensor:
    """Sky, road, two cars, void and a pixel that is not to be learned."""
    ids = torch.tensor([[1, 1, 1, 1, 1, 0], [2, 3, 3, 2, 4, 4], [2, 3, 3, 2, 4, 4], [2, 2, 2, 2, 2, -1]])
    return panoptic().codec.to_planes(Segments(ids, {1: 0, 2: 1, 3: 2, 4: 2}))


def logits_of(planes: Tensor, sizes: list[int]) -> Tensor:
    parts = [nn.functional.one_hot(p.long().clamp(min=0), n).movedim(-1, 0) for p, n in zip(planes, sizes, strict=True)]
    return torch.cat(parts).float() * 5


def test_depth_survives_its_file_to_a_millimetre(tmp_path: Path) -> None:
    medium = Depth(num_bins=64)
    metres = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 9 + 0.1
    metres[0, 0] = 0
    medium.write(medium.bins.to_plane(metres)[None], tmp_path / "d.png")
    with Image.open(tmp_path / "d.png") as image:
        assert image.mode == "I;16"
        assert np.asarray(image)[1, 1] == round(metres[1, 1].item() * 1000)
    again = medium.metres(medium.read(tmp_path / "d.png"))
    assert again[0, 0] == 0
    assert (again - metres).abs().max() <= 0.5e-3 + 1e-6
    # Outputs of a model are written as the middles of their bins.
    outputs = logits_of(medium.bins.classes(medium.bins.to_plane(metres))[None], [64])
    medium.write(outputs, tmp_path / "o.png")
    rounded = medium.metres(medium.read(tmp_path / "o.png"))
    assert (rounded - metres).abs()[metres > 0].max() <= 0.5 * 9.999 / 64 + 1e-3


def test_depth_refuses_what_is_no_depth(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match=r"colour.png is a colour picture"):
        Depth().read(tmp_path / "colour.png")
    with pytest.raises(ValueError, match="depth has 1 channel, or 256 of logits, got 64"):
        Depth().metres(torch.zeros(64, 2, 2))
    with pytest.raises(ConfigError, match="have no options, got pixels"):
        Depth().metrics(pixels="float")


def test_depth_is_shown_from_bright_to_dark() -> None:
    medium = Depth(num_bins=8)
    plane = medium.bins.to_plane(torch.tensor([[0.0, 0.5, 5.0, 9.5]]))[None, None]
    (picture,) = medium.pictures(plane)
    assert picture.shape == (1, 4, 3)
    brightness = picture.astype(int).sum(-1)[0]
    assert brightness[0] == 0  # no depth
    assert brightness[1] > brightness[2] > brightness[3] > 0
    colours = depth_colours(64).astype(int)
    luma = colours @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(luma) < 0).all()
    annotated = medium.annotated(plane[0])
    assert annotated.shape[0] >= 100
    assert annotated.shape[1] > 40


def test_segments_survive_their_file(tmp_path: Path) -> None:
    medium, planes = panoptic(), street()
    medium.write(planes, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as image:
        levels = np.asarray(image)
    assert levels[0].tolist() == [1001] * 5 + [0]  # 1000 (1 + sky) + the first instance
    assert levels[3, 5] == 65535
    assert torch.equal(medium.read(tmp_path / "s.png"), planes)
    # Outputs too; what is not to be learned cannot come back.
    outputs = logits_of(planes, medium.codec.sizes)
    medium.write(outputs, tmp_path / "o.png")
    assert torch.equal(medium.read(tmp_path / "o.png"), planes.clamp(min=0))


def test_segments_refuse(tmp_path: Path) -> None:
    medium = panoptic()
    Image.fromarray(np.array([[9001]], np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x.png: class plane holds 9 .. 9, not -1 .. 3"):
        medium.read(tmp_path / "x.png")
    with pytest.raises(ValueError, match="segments have 2 channels, or 14 of logits, got 3"):
        medium.segments(torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match=r"things \['cat'\] are no class_names; accepted: sky"):
        Panoptic(class_names=NAMES, things=["cat"])
    with pytest.raises(ValueError, match="num_instances must be at most 1000 to fit into files, got 1001"):
        Panoptic(class_names=NAMES, things=[], num_instances=1001)
    many = Panoptic(class_names=[str(i) for i in range(133)], things=[], num_instances=100)  # as COCO has
    planes = torch.tensor([[[133.0, -1]], [[99, -1]]])
    many.write(planes, tmp_path / "many.png")
    assert torch.equal(many.read(tmp_path / "many.png"), planes)


def test_instances_of_a_thing_look_different_and_of_one_class_alike() -> None:
    medium = panoptic()
    (picture,) = medium.pictures(street()[None])
    car, other, road = (picture[row, column].astype(int) for row, column in ((2, 2), (2, 5), (3, 1)))
    assert (car != other).any()
    assert np.abs(car - other).sum() < np.abs(car - road).sum()
    assert picture[0, 5].sum() == 0  # void
    assert medium.annotated(street()).shape[1] > 40


def test_tiny_predicted_segments_are_dropped_by_the_stated_share() -> None:
    planes = street()
    outputs = logits_of(planes, [4, 10])
    assert len(panoptic(min_share=0.0).segments(outputs).categories) == 4
    assert len(panoptic(min_share=4 / 24).segments(outputs).categories) == 2  # both cars have 4 of 24 pixels


def test_colour(tmp_path: Path) -> None:
    medium = Color()
    x = torch.rand(3, 4, 5) * 2 - 1
    medium.write(x, tmp_path / "c.png")
    assert (medium.read(tmp_path / "c.png") - x).abs().max() <= 1 / 255 + 1e-6
    grey = medium.context(x)
    assert torch.equal(grey[0], grey[2])
    assert medium.annotated(x).shape == (4, 5, 3)


@pytest.mark.parametrize("medium", [Depth(num_bins=6), Color(), panoptic()])
def test_outputs_and_labels_go_to_any_size_and_onto_a_page(medium: Depth | Color | Panoptic, tmp_path: Path) -> None:
    planes, num_outputs = {"Depth": (1, 6), "Color": (3, 3), "Panoptic": (2, 14)}[type(medium).__name__]
    outputs = torch.randn(2, num_outputs, 8, 8, generator=torch.Generator().manual_seed(0))
    resized = medium.resized(outputs[0], 12, 20)
    assert resized.shape == (planes, 12, 20)
    medium.write(resized, tmp_path / "r.png")
    assert medium.read(tmp_path / "r.png").shape == (planes, 12, 20)
    x = torch.stack([medium.resized(one, 8, 8) for one in outputs])
    context, indices = torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 2, 1, dtype=torch.int64)
    page = medium.show_predictions(context, x, outputs, outputs, ["a", "b"], "luck")
    assert list(page.blocks[0].files()) == ["picture.png", "truth.png", "oracle.png", "prediction.png"]
    page = medium.show_with_context(x, outputs, context, indices, None, ["a", "b"])
    assert list(page.blocks[0].files()) == ["picture.png", "truth.png", "oracle.png", "code.png"]
    assert "class" not in medium.show(x, outputs, indices, None, ["a", "b"]).title
    assert medium.show_samples({}, {"all": outputs}, "").html()
    assert medium.preview([x, outputs], tmp_path / "step").name == "step.png"
    assert medium.units(outputs) == 2


def test_metrics_of_a_perfect_output_are_perfect() -> None:
    depth, segments = Depth(num_bins=200), panoptic(min_share=0.0)
    plane = depth.bins.to_plane(torch.rand(1, 1, 6, 6) * 8 + 1)
    measured = depth.metrics()
    measured.update(plane, logits_of(depth.bins.classes(plane[0]), [200])[None])
    out = measured.compute()
    assert out["rmse"] < 0.5 * 10 / 200
    assert out["delta1"] == 1
    # A depth at its own size is what counts where there is one: four times the area, and twice as far.
    whole = depth.bins.to_metres(plane[:, 0]).repeat_interleave(2, 1).repeat_interleave(2, 2) * 2
    again = depth.metrics()
    outputs = logits_of(depth.bins.classes(plane[0]), [200])[None]
    again.update(plane, outputs, {"depth_m": whole.clamp(max=9.99)})  # type: ignore[typeddict-item]
    assert 0.4 < again.compute()["abs_rel"] <= 0.51
    planes = street()[None]
    quality = segments.metrics()
    quality.update(planes, logits_of(planes[0], [4, 10])[None])
    out = quality.compute()
    assert out["pq"] == out["pq_things"] == out["pq_stuff"] == 1
    record = {**out, "protocol": {"meaning": quality.meanings()}}
    assert "PQ things" in [number.label for number in quality.readable(record)]
    stuff = segments.metrics()
    stuff.update(planes.clamp(0, 1), logits_of(planes[0].clamp(0, 1), [4, 10])[None])
    assert stuff.compute()["pq_things"] is None  # no thing, no number: JSON knows no NaN
    with pytest.raises(ValueError, match="no picture has a true depth"):
        depth.metrics().compute()
