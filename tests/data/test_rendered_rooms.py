"""Rendered rooms: exact depth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tessella.data.rendered_rooms import Box, Camera, RenderedRooms, Scene, Sphere, random_scene, render

AHEAD = Camera(np.zeros(3), yaw=0.0, pitch=0.0, focal=1.0)
TEXTURES = np.full((1, 4, 4, 3), 0.5)


def scene(*surfaces: Box | Sphere, camera: Camera = AHEAD, noise: float = 0.0) -> Scene:
    return Scene(
        list(surfaces), [0] * len(surfaces), np.ones((len(surfaces), 3)), np.array([0.0, -1, 1]), camera, noise
    )


def depth_of(what: Scene, size_px: int = 9) -> np.ndarray:
    return render(what, TEXTURES, size_px, np.random.default_rng(0))[1]


def test_depth_of_a_wall_is_its_distance_everywhere() -> None:
    room = Box(np.array([0.0, 0, 2]), np.array([50.0, 50, 3]), inside=True)
    np.testing.assert_allclose(depth_of(scene(room)), 5.0)


def test_depth_of_a_floor_follows_perspective() -> None:
    """At focal length 1, row v looks down by v per metre: the floor 1.5 m below is met at 1.5 / v."""
    room = Box(np.array([0.0, 0, 0]), np.array([1e4, 1.5, 1e4]), inside=True)
    steps = (np.arange(8) + 0.5) / 8 - 0.5
    np.testing.assert_allclose(depth_of(scene(room), 8), np.repeat(1.5 / np.abs(steps)[:, None], 8, 1))


def test_depth_of_a_sphere_and_of_a_box_in_front_of_it() -> None:
    wall = Box(np.array([0.0, 0, 5]), np.array([50.0, 50, 5]), inside=True)
    ball = Sphere(np.array([0.0, 0, 4]), 1.0)
    depth = depth_of(scene(wall, ball))
    assert depth[4, 4] == pytest.approx(3)
    # The ray through the pixel at (1/9, 0): |t (1/9, 0, 1) - (0, 0, 4)| = 1.
    a, b, c = 1 + 1 / 81, 4.0, 15.0
    assert depth[4, 5] == pytest.approx((b - math.sqrt(b * b - a * c)) / a)
    assert depth[0, 0] == pytest.approx(10)
    crate = Box(np.array([0.0, 0, 2]), np.array([0.1, 0.1, 0.5]))
    assert depth_of(scene(wall, ball, crate))[4, 4] == pytest.approx(1.5)
    # Turned by 45 degrees about the vertical axis, its edge comes nearer: half the diagonal of 1 x 1.
    turned = Box(np.array([0.0, 0, 2]), np.array([0.5, 0.1, 0.5]), yaw=math.pi / 4)
    assert depth_of(scene(wall, turned))[4, 4] == pytest.approx(2 - math.sqrt(0.5))


def test_depth_is_along_the_axis_of_a_turned_camera() -> None:
    """Turned by 0.3, a wall at z = 5 is met on the axis at 5 / cos 0.3."""
    wall = Box(np.array([0.0, 0, 2]), np.array([50.0, 50, 3]), inside=True)
    for camera in (AHEAD._replace(yaw=0.3), AHEAD._replace(pitch=0.3)):
        assert depth_of(scene(wall, camera=camera))[4, 4] == pytest.approx(5 / math.cos(0.3))


def test_light_falls_on_what_faces_the_lamp_and_noise_is_the_cameras() -> None:
    room = Box(np.array([0.0, 0, 2]), np.array([5.0, 1, 3]), inside=True)
    low, high = (
        render(scene(room)._replace(lamp=np.array([0.0, y, 3])), TEXTURES, 16, np.random.default_rng(0))[0][-1]
        for y in (0.9, -0.9)  # y points down
    )
    assert low.mean() < 0.5 * high.mean()  # on the floor, which a lamp near it only grazes
    noisy = render(scene(room, noise=0.05), TEXTURES, 32, np.random.default_rng(1))[0]
    still = render(scene(room), TEXTURES, 32, np.random.default_rng(1))[0]
    assert (noisy - still).std() == pytest.approx(0.05, rel=0.1)


def test_scenes_lie_within_the_bins() -> None:
    for seed in range(50):
        depth = render(random_scene(np.random.default_rng(seed), 1), TEXTURES, 12, np.random.default_rng(0))[1]
        assert np.isfinite(depth).all()
        assert depth.min() > 0.1
        assert depth.max() < 10


def test_splits_share_no_scene_and_every_index_is_its_own() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    train = RenderedRooms(split="train", size_px=16, num_scenes=3)
    test = RenderedRooms(split="test", size_px=16, num_test_scenes=3)
    other = RenderedRooms(split="train", size_px=16, seed=1, num_scenes=3)
    depths = [dataset[i]["x"] for dataset in (train, test, other) for i in range(3)]
    assert all((a - b).abs().mean() > 0.1 for n, a in enumerate(depths) for b in depths[:n])
    again = RenderedRooms(split="train", size_px=16)[1]
    assert torch.equal(again["x"], train[1]["x"])
    assert torch.equal(again["context"], train[1]["context"])
    assert (len(train), len(test)) == (3, 3)
    with pytest.raises(ValueError, match="num_scenes must be at least 1, got 0"):
        RenderedRooms(split="train", num_scenes=0)
