"""Labels to planes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tessella.labels.color import to_grey
from tessella.labels.depth import DepthBins, checked_depth
from tessella.labels.panoptic import PanopticPlanes, Segments
from tessella.labels.planes import plane_classes, plane_cross_entropy, split_planes


def test_bins_by_hand() -> None:
    bins = DepthBins()
    depth = torch.tensor([0.0, 0.001, 0.04, 0.0401, 5.0005, 9.9999, 10.0, 12.0])
    plane = bins.to_plane(depth)
    # 9.999 / 256 = 0.03906 m a bin: 0.04 m is 0.9985 of a bin, 5.0005 m the middle.
    assert bins.classes(plane).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    assert bins.class_metres(torch.tensor([0, 128])).tolist() == pytest.approx([0.020529, 5.020029], abs=1e-6)
    assert bins.valid(depth).tolist() == [False, False, True, True, True, True, False, False]


def test_depth_survives_its_plane_and_the_logits_its_bins() -> None:
    bins = DepthBins(num_bins=64, high_m=8.0)
    depth = torch.rand(1, 40, 50, generator=torch.Generator().manual_seed(0)) * 7.9 + 0.05
    depth[0, 0, :7] = 0
    plane = bins.to_plane(depth)
    torch.testing.assert_close(bins.to_metres(plane), depth, rtol=1e-6, atol=0)
    logits = torch.nn.functional.one_hot(bins.classes(plane)[0], 64).movedim(-1, 0).float()[None]
    again = bins.from_logits(logits)
    assert torch.equal(bins.classes(bins.to_plane(again)), bins.classes(plane))
    assert (again - depth)[depth > 0].abs().max() <= 0.5 * 7.999 / 64 + 1e-6


def test_depth_is_checked() -> None:
    holes = np.array([[0, -1, np.nan], [np.inf, 2.5, -np.inf]])
    assert checked_depth(holes, "a.npy").tolist() == [[0, 0, 0], [0, 2.5, 0]]
    with pytest.raises(ValueError, match=r"a.png: depths up to 2500 m; that looks like millimetres: .*units_per_m"):
        checked_depth(np.full((2, 2), 2500), "a.png")
    with pytest.raises(ValueError, match=r"a.png: depth must be one plane \[H, W\], got \[2, 2, 3\]"):
        checked_depth(np.ones((2, 2, 3)), "a.png")
    for wrong in ({"num_bins": 1}, {"low_m": 3.0, "high_m": 2.0}):
        with pytest.raises(ValueError, match="must be"):
            DepthBins(**wrong)  # type: ignore[arg-type]


def test_grey() -> None:
    picture = torch.rand(2, 3, 4, 5) * 2 - 1
    grey = to_grey(picture)
    assert grey.shape == picture.shape
    assert torch.equal(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(to_grey(grey), grey)
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 1, 1)
    assert to_grey(red)[0, 0, 0].item() == pytest.approx(2 * 0.299 - 1)
    with pytest.raises(ValueError, match=r"\[..., 3, H, W\], got \[1, 4, 4\]"):
        to_grey(torch.zeros(1, 4, 4))


def segments(rows: list[list[int]], categories: dict[int, int]) -> Segments:
    return Segments(torch.tensor(rows), categories)


def test_instances_are_numbered_from_top_to_bottom_then_left_to_right() -> None:
    label = segments([[9, 9, 4, 4], [9, 9, 4, 4], [0, 2, 2, -1]], {9: 0, 4: 1, 2: 0})
    planes = PanopticPlanes(2).to_planes(label)
    assert planes[1].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [0, 3, 3, -1]]
    assert planes[0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [0, 1, 1, -1]]
    # After a mirror the numbers are those of the mirrored picture.
    mirrored = PanopticPlanes(2).to_planes(Segments(label.ids.flip(1), label.categories))
    assert mirrored[1].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [-1, 3, 3, 0]]
    # Lower by a third of a row: below, although left of it.
    sort_key = segments([[1, 2], [1, 2], [0, 2]], {1: 0, 2: 0})
    assert PanopticPlanes(1).to_planes(sort_key)[1].tolist() == [[1, 2], [1, 2], [0, 2]]
    assert PanopticPlanes(1).to_planes(segments([[1, 2], [1, 2], [1, 0]], {1: 0, 2: 0}))[1].tolist() == [
        [2, 1], [2, 1], [2, 0],
    ]  # fmt: skip


def random_label(seed: int) -> Segments:
    rng = np.random.default_rng(seed)
    ids = np.kron(rng.integers(-1, 12, (5, 6)), np.ones((3, 2), np.int64))
    return Segments(torch.from_numpy(ids), {i: int(rng.integers(0, 4)) for i in range(1, 12)})


def same(a: Segments, b: Segments) -> bool:
    """Whether two labels differ in the names of their ids alone."""
    pairs = set(zip(a.ids.flatten().tolist(), b.ids.flatten().tolist(), strict=True))
    one_to_one = len(pairs) == len({p for p, _ in pairs}) == len({q for _, q in pairs})
    special = all((p == q) for p, q in pairs if p < 1 or q < 1)
    return one_to_one and special and all(a.categories[p] == b.categories[q] for p, q in pairs if p > 0)


def test_segments_survive_their_planes() -> None:
    planes = PanopticPlanes(4, 20)
    for seed in range(30):
        label = random_label(seed)
        x = planes.to_planes(label)
        again = planes.from_planes(x)
        assert same(label, again)
        assert torch.equal(planes.to_planes(again), x)


def one_hot(plane: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(plane.long().clamp(min=0), size).movedim(-1, 0).float()


def test_segments_survive_the_logits() -> None:
    planes = PanopticPlanes(4, 20)
    for seed in range(10):
        x = planes.to_planes(random_label(seed))
        again = planes.from_logits(one_hot(x[0], 5), one_hot(x[1], 20))
        x[x < 0] = 0  # what is not to be learned cannot come back
        assert same(planes.from_planes(x), again)


def test_class_of_a_segment_is_that_of_the_summed_logits() -> None:
    """Two of three pixels vote for class 1, but the third is surer of class 2."""
    class_logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.5, 2.0]])[:, None]
    instance_logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])[:, None]
    out = PanopticPlanes(2, 2).from_logits(class_logits, instance_logits)
    assert out.ids.tolist() == [[1, 1, 1]]
    assert out.categories == {1: 1}
    # Where void has the largest sum, there is no segment.
    class_logits[0] = 5.0
    void = PanopticPlanes(2, 2).from_logits(class_logits, instance_logits)
    assert void.ids.tolist() == [[0, 0, 0]]
    assert void.categories == {}


def test_tiny_segments_become_void() -> None:
    instances = torch.ones(10, 10)
    instances[0, 0] = 2
    classes = torch.ones(10, 10)
    logits = one_hot(classes, 2), one_hot(instances, 4)
    assert PanopticPlanes(1, 4).from_logits(*logits).categories == {1: 0, 2: 0}  # one pixel is a segment too
    dropped = PanopticPlanes(1, 4, min_share=0.01).from_logits(*logits)
    assert dropped.categories == {1: 0}
    assert dropped.ids[0, 0] == 0
    assert PanopticPlanes(1, 4, min_share=0.0099).from_logits(*logits).categories == {1: 0, 2: 0}


def test_more_segments_than_numbers() -> None:
    """The largest keep a number; the others are not learned."""
    label = segments([[1, 1, 1, 2, 3, 3]], {1: 0, 2: 1, 3: 1})
    planes = PanopticPlanes(2, 3).to_planes(label)
    assert planes[1].tolist() == [[1, 1, 1, -1, 2, 2]]
    assert planes[0].tolist() == [[1, 1, 1, -1, 2, 2]]


def test_bad_segments() -> None:
    planes = PanopticPlanes(2, 5)
    with pytest.raises(ValueError, match=r"a.png: ids \[7\] have no category; known are \[1\]"):
        planes.to_planes(segments([[1, 7]], {1: 0}), "a.png")
    with pytest.raises(ValueError, match=r"a.png: categories \[2\] lie outside \[0, 2\)"):
        planes.to_planes(segments([[1, 7]], {1: 0, 7: 2}), "a.png")
    with pytest.raises(ValueError, match="ids must be integers"):
        planes.to_planes(Segments(torch.zeros(2, 2), {}))
    with pytest.raises(ValueError, match=r"instance 1 must have one class, got \[1, 2\]"):
        planes.from_planes(torch.tensor([[[1, 2]], [[1, 1]]]))
    with pytest.raises(ValueError, match=r"instance plane holds 0 .. 5, not -1 .. 4"):
        planes.from_planes(torch.tensor([[[0, 2]], [[0, 5]]]))
    for arguments in ((0, 5), (2, 1), (2, 5, 1.0)):
        with pytest.raises(ValueError, match="must"):
            PanopticPlanes(*arguments)


def test_classes_of_a_plane() -> None:
    plane = torch.tensor([-1.0, -0.5, 0.0, 0.99, 1.0, 2.5, 3.0, 9.0, -7.0])
    assert plane_classes(plane, 3).tolist() == [-1, -1, 0, 0, 1, 2, 2, 2, -1]


def test_cross_entropy_leaves_out_but_counts() -> None:
    logits = torch.zeros(1, 4, 1, 3, dtype=torch.float64)
    classes = torch.tensor([[[-1, 0, 3]]])
    each = plane_cross_entropy(logits, classes)
    assert each[0, 0].tolist() == pytest.approx([0, np.log(4), np.log(4)])
    assert plane_cross_entropy(logits, classes, ignored=0)[0, 0].tolist() == pytest.approx([0, 0, np.log(4)])


def test_split_planes() -> None:
    a, b = split_planes(torch.arange(5.0)[None, :, None, None], [2, 3])
    assert a.flatten().tolist() == [0, 1]
    assert b.flatten().tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match=r"planes of \[2, 3\] classes need 5 channels, got 4"):
        split_planes(torch.zeros(1, 4, 2, 2), [2, 3])
