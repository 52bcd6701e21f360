"""Scores of depth and of panoptic segments."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from tessella.evaluation.dense import depth_metrics, panoptic_quality

Segmentation = tuple[Tensor, Mapping[int, int]]


def test_depth_by_hand() -> None:
    truth = torch.tensor([[[1.0, 2.0]], [[4.0, 0.0]]])
    predicted = torch.tensor([[[1.3, 2.0]], [[8.0, 5.0]]])
    out = depth_metrics(predicted, truth)
    # Picture by picture: errors 0.3 and 0; then 4, the pixel without depth left out.
    assert out["rmse"] == pytest.approx((math.sqrt(0.09 / 2) + 4) / 2)
    assert out["abs_rel"] == pytest.approx((0.15 + 1) / 2)
    assert out["log10"] == pytest.approx((math.log10(1.3) / 2 + math.log10(2)) / 2)
    assert out["delta1"] == pytest.approx((0.5 + 0) / 2)  # 1.3 > 1.25
    assert out["delta2"] == pytest.approx((1 + 0) / 2)
    assert out["delta3"] == pytest.approx((1 + 0) / 2)  # 2 > 1.25^3


def test_depth_mask_and_pictures_without_depth() -> None:
    truth = torch.tensor([[[1.0, 2.0]], [[0.0, torch.inf]], [[torch.nan, 3.0]]])
    predicted = torch.ones(3, 1, 2)
    assert depth_metrics(predicted, truth)["rmse"] == pytest.approx((math.sqrt(0.5) + 2) / 2)
    mask = torch.tensor([[[True, False]], [[False, False]], [[False, True]]])
    assert depth_metrics(predicted, truth, mask)["rmse"] == pytest.approx((0 + 2) / 2)
    perfect = depth_metrics(truth[:1], truth[:1])
    assert perfect == {"rmse": 0, "abs_rel": 0, "log10": 0, "delta1": 1, "delta2": 1, "delta3": 1}


def test_depth_refuses() -> None:
    depth = torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match=r"must both be \[B, H, W\], got \[1, 2, 2\] and \[2, 2\]"):
        depth_metrics(depth, depth[0])
    with pytest.raises(ValueError, match="mask must be"):
        depth_metrics(depth, depth, depth[:, :1])
    with pytest.raises(ValueError, match="no picture has a pixel that counts"):
        depth_metrics(depth, depth * 0)
    with pytest.raises(ValueError, match=r"predicted depth must be finite and above 0 m where it counts, got 0 \.\. 0"):
        depth_metrics(depth * 0, depth)
    with pytest.raises(ValueError, match="truth depth must be finite and above 0 m"):
        depth_metrics(depth, depth * 0, depth > 0)


def test_pq_by_hand() -> None:
    # Truth: a thing of 4 pixels, stuff of 8, void of 4; predicted: 3 of the thing and 1 of void, stuff of 10 pixels.
    truth = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2]])
    predicted = torch.tensor([[5, 5, 7, 7], [5, 7, 7, 7], [5, 7, 7, 7], [9, 0, 7, 7]])
    out = panoptic_quality([(predicted, {5: 0, 7: 1, 9: 0})], [(truth, {1: 0, 2: 1})], things={0})
    thing_iou = 3 / (4 + 4 - 3 - 1)
    stuff_iou = 8 / (10 + 8 - 8 - 1)
    # Segment 9 lies in void: not counted.
    assert out["pq_things"] == pytest.approx(thing_iou)
    assert out["pq_stuff"] == pytest.approx(stuff_iou)
    assert out["pq"] == pytest.approx((thing_iou + stuff_iou) / 2)
    assert out["sq"] == out["pq"]
    assert out["rq"] == 1


def test_pq_counts_over_pictures_before_it_divides() -> None:
    """Two pictures: one match of IoU 1, then one miss and one false positive."""
    ones = torch.ones(2, 2, dtype=torch.int64)
    out = panoptic_quality([(ones, {1: 3}), (ones, {1: 4})], [(ones, {1: 3}), (ones, {1: 3})], things={3})
    assert out["pq_things"] == pytest.approx(1 / 1.5)
    assert out["sq_things"] == 1
    assert out["pq_stuff"] == 0
    assert out["pq"] == pytest.approx(1 / 3)
    assert math.isnan(panoptic_quality([(ones, {1: 3})], [(ones, {1: 3})], things={3})["pq_stuff"])


def test_half_an_overlap_is_no_match() -> None:
    truth = torch.tensor([[1, 1, 0, 0]])
    predicted = torch.tensor([[1, 0, 0, 0]])
    assert panoptic_quality([(predicted, {1: 0})], [(truth, {1: 0})], things={0})["pq"] == 0


def brute_force(
    predicted: list[Segmentation], truth: list[Segmentation], crowds: list[set[int]], things: set[int]
) -> dict[str, float]:
    """The definition with masks, category by category, pair by pair."""
    tables: dict[int, tuple[float, float, float]] = {}
    categories = {c for _, table in [*predicted, *truth] for c in table.values()}
    for category in categories:
        iou_sum, tp, fp, fn = 0.0, 0, 0, 0
        for (p_ids, p_table), (t_ids, t_table), crowd in zip(predicted, truth, crowds, strict=True):
            p_map, t_map = p_ids.numpy(), t_ids.numpy()
            p_own = [i for i, c in p_table.items() if c == category and (p_map == i).any()]
            t_own = [i for i, c in t_table.items() if c == category and i not in crowd and (t_map == i).any()]
            void = t_map == 0
            ignored = void.copy()
            for i, c in t_table.items():
                if i in crowd and c == category:
                    ignored |= t_map == i
            hit = set()
            for t in t_own:
                found = False
                for p in p_own:
                    p_mask, t_mask = (p_map == p), (t_map == t)
                    iou = (p_mask & t_mask).sum() / ((p_mask & ~void) | t_mask).sum()
                    if iou > 0.5:
                        found = True
                        hit.add(p)
                        iou_sum += iou
                tp += found
                fn += not found
            fp += sum(1 for p in p_own if p not in hit and ((p_map == p) & ignored).sum() <= 0.5 * (p_map == p).sum())
        if tp + fp + fn:
            tables[category] = (iou_sum / (tp + fp / 2 + fn / 2), iou_sum / tp if tp else 0, tp / (tp + (fp + fn) / 2))
    out = {}
    for kind, chosen in (("", categories), ("_things", categories & things), ("_stuff", categories - things)):
        rows = [row for category, row in tables.items() if category in chosen]
        for i, name in enumerate(("pq", "sq", "rq")):
            out[name + kind] = float(np.mean([row[i] for row in rows])) if rows else math.nan
    return out


def random_segments(rng: np.random.Generator) -> tuple[np.ndarray, dict[int, int]]:
    ids = np.kron(rng.integers(0, 6, (4, 4)), np.ones((3, 3), np.int64))
    return ids, {i: int(rng.integers(0, 3)) for i in range(1, 6)}


def test_pq_equals_brute_force_on_random_maps_with_void_and_crowds() -> None:
    rng = np.random.default_rng(0)
    predicted: list[Segmentation] = []
    truth: list[Segmentation] = []
    crowds: list[set[int]] = []
    for _ in range(200):
        ids, table = random_segments(rng)
        # Most of the truth's segments moved by a pixel or two and some renamed, so that many match.
        guess = np.roll(ids, rng.integers(-1, 2, 2), (0, 1)) * 7
        guess_table = {7 * i: c if rng.random() < 0.8 else int(rng.integers(0, 3)) for i, c in table.items()}
        noise = rng.random(guess.shape) < 0.1
        guess[noise] = rng.integers(0, 6, noise.sum()) * 7
        predicted.append((torch.from_numpy(guess), guess_table))
        truth.append((torch.from_numpy(ids), table))
        crowds.append({int(i) for i in rng.choice(6, 2) if i and rng.random() < 0.5})
        expected = brute_force(predicted[-1:], truth[-1:], crowds[-1:], {0, 1})
        out = panoptic_quality(predicted[-1:], truth[-1:], things={0, 1}, crowds=crowds[-1:])
        assert out == pytest.approx(expected, nan_ok=True)
    assert sum(map(len, crowds)) > 50
    out = panoptic_quality(predicted, truth, things={0, 1}, crowds=crowds)
    assert out == pytest.approx(brute_force(predicted, truth, crowds, {0, 1}))
    assert 0.1 < out["pq"] < 0.8
    assert out != panoptic_quality(predicted, truth, things={0, 1})  # crowds matter


def test_pq_refuses() -> None:
    ones = torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"predicted: ids \[1\] have no category"):
        panoptic_quality([(ones, {})], [(ones, {1: 0})], things={0})
    with pytest.raises(ValueError, match="differ in size"):
        panoptic_quality([(ones[:1], {1: 0})], [(ones, {1: 0})], things={0})
    with pytest.raises(ValueError, match="truth: ids must be integers"):
        panoptic_quality([(ones, {1: 0})], [(ones.float(), {1: 0})], things={0})
    with pytest.raises(ValueError, match="1 predictions, 0 truths"):
        panoptic_quality([(ones, {1: 0})], [], things={0})
    with pytest.raises(ValueError, match=r"crowds \[4\] are no ids of the truth"):
        panoptic_quality([(ones, {1: 0})], [(ones, {1: 0})], things={0}, crowds=[{4}])
