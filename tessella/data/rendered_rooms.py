"""Rooms with boxes and spheres, rendered with their exact depth: depth data that needs no download."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tessella.data._dense import DepthSamples, Pair
from tessella.data.base import Split
from tessella.data.photos import Photos

Array = np.ndarray[Any, np.dtype[np.float64]]

_TEXTURE_PX = 96
_NUM_TEXTURES = 120
_METRES_A_TEXTURE = 1.5


class Hit(NamedTuple):
    """Where rays ``[n, 3]`` meet a surface: distance in ray lengths (infinite where they miss), normal, and two
    coordinates in metres along the surface."""

    t: Array  # [n]
    normal: Array  # [n, 3]
    place: Array  # [n, 2]


class Box(NamedTuple):
    """A box turned about the vertical axis; the camera sees its outside, or its walls from within."""

    centre: Array
    half: Array  # half of its sides
    yaw: float = 0.0
    inside: bool = False

    def meet(self, origin: Array, rays: Array) -> Hit:
        """See :class:`Hit`."""
        turn = _turn_y(self.yaw)
        o, d = (origin - self.centre) @ turn, rays @ turn
        d = np.where(np.abs(d) < 1e-12, 1e-12, d)
        near, far = np.sort(np.stack([(-self.half - o) / d, (self.half - o) / d]), 0)
        entry, leave = near.max(1), far.min(1)
        t = leave if self.inside else entry
        hit = (entry < leave) & (t > 0)
        axis = far.argmin(1) if self.inside else near.argmax(1)
        facing = -np.take_along_axis(np.sign(d), axis[:, None], 1)
        normal = np.zeros_like(d)
        np.put_along_axis(normal, axis[:, None], facing, 1)
        local = o + t[:, None] * d
        others = np.array([[1, 2], [0, 2], [0, 1]])[axis]
        place = np.take_along_axis(local, others, 1) + 10.0 * axis[:, None]  # each pair of faces its own texture
        return Hit(np.where(hit, t, np.inf), normal @ turn.T, place)


class Sphere(NamedTuple):
    """A sphere."""

    centre: Array
    radius: float

    def meet(self, origin: Array, rays: Array) -> Hit:
        """See :class:`Hit`."""
        o = origin - self.centre
        a, b, c = (rays**2).sum(1), rays @ o, o @ o - self.radius**2
        root = b**2 - a * c
        t = (-b - np.sqrt(np.maximum(root, 0))) / a
        normal = (o + t[:, None] * rays) / self.radius
        angles = np.stack([np.arctan2(normal[:, 0], normal[:, 2]), np.arcsin(np.clip(normal[:, 1], -1, 1))], 1)
        return Hit(np.where((root > 0) & (t > 0), t, np.inf), normal, angles * self.radius)


class Camera(NamedTuple):
    """A pinhole: x to the right, y down, z ahead; first turned up or down by the pitch, then by the yaw."""

    origin: Array
    yaw: float
    pitch: float
    focal: float  # in units of the picture's side

    def rays(self, size_px: int) -> Array:
        """``[size_px^2, 3]`` through the middle of each pixel, of length 1 along the camera's axis.

        The distance along such a ray, in its own lengths, is therefore the depth.
        """
        steps = ((np.arange(size_px) + 0.5) / size_px - 0.5) / self.focal
        v, u = np.meshgrid(steps, steps, indexing="ij")
        ahead = np.stack([u.ravel(), v.ravel(), np.ones(size_px**2)], 1)
        return ahead @ _turn_x(self.pitch).T @ _turn_y(self.yaw).T


class Scene(NamedTuple):
    """Surfaces, each with the number of its texture and a tint; a lamp and a camera."""

    surfaces: list[Box | Sphere]
    textures: list[int]
    tints: Array  # [n, 3] in [0, 1]
    lamp: Array
    camera: Camera
    noise: float  # standard deviation, of 1


def random_scene(rng: np.random.Generator, num_textures: int) -> Scene:
    """A room of 3 to 7 by 4 to 9 m and 2.6 to 3 m high, three to seven things on its floor, a camera held level."""
    width, length, height = rng.uniform((3, 4, 2.6), (7, 9, 3.0))
    floor = rng.uniform(1.4, 1.6)  # below the camera
    room = Box(np.array([0, floor - height / 2, length / 2 - 0.4]), np.array([width, height, length]) / 2, inside=True)
    surfaces: list[Box | Sphere] = [room]
    for _ in range(rng.integers(3, 8)):
        x, z = rng.uniform(-0.45, 0.45) * width, rng.uniform(1.2, length - 1)
        if rng.random() < 0.4:
            radius = rng.uniform(0.2, 0.6)
            surfaces.append(Sphere(np.array([x, floor - radius, z]), radius))
        else:
            half = rng.uniform((0.15, 0.2, 0.15), (0.6, 0.9, 0.6))
            surfaces.append(Box(np.array([x, floor - half[1], z]), half, yaw=rng.uniform(0, np.pi / 2)))
    camera = Camera(np.zeros(3), yaw=rng.normal(0, 0.1), pitch=rng.normal(0.1, 0.03), focal=rng.uniform(0.8, 0.9))
    lamp = np.array([rng.uniform(-0.3, 0.3) * width, floor - height + 0.3, rng.uniform(0.2, 0.8) * length])
    textures = rng.integers(0, num_textures, len(surfaces)).tolist()
    tints = rng.uniform(0.2, 1, (len(surfaces), 3))
    return Scene(surfaces, textures, tints, lamp, camera, noise=rng.uniform(0.005, 0.03))


def render(scene: Scene, textures: Array, size_px: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """The picture ``[size_px, size_px, 3]`` in [0, 1], and the depth ``[size_px, size_px]`` in metres.

    Depth is exact: the nearest of the closed-form intersections, along the camera's axis. Surfaces are dull (Lambert)
    under one lamp and some light from everywhere; the camera adds noise.

    Args:
        scene: what is seen.
        textures: ``[n, s, s, 3]`` in [0, 1], repeated in mirror images.
        size_px: side of the picture.
        rng: of the noise.
    """
    rays = scene.camera.rays(size_px)
    hits = [surface.meet(scene.camera.origin, rays) for surface in scene.surfaces]
    depth = np.stack([hit.t for hit in hits])
    front = depth.argmin(0)
    nearest = depth.min(0)
    colour = np.zeros((len(rays), 3))
    for number, hit in enumerate(hits):
        seen = front == number
        points = scene.camera.origin + nearest[seen, None] * rays[seen]
        to_lamp = scene.lamp - points
        far = np.linalg.norm(to_lamp, axis=1)
        lit = np.maximum((hit.normal[seen] * to_lamp).sum(1) / far, 0) / (1 + 0.05 * far**2)
        paint = 0.35 * _look_up(textures[scene.textures[number]], hit.place[seen]) + 0.65 * scene.tints[number]
        colour[seen] = paint * (0.3 + 0.9 * lit)[:, None]
    colour = np.clip(colour + rng.normal(0, scene.noise, colour.shape), 0, 1)
    return colour.reshape(size_px, size_px, 3), nearest.reshape(size_px, size_px)


class RenderedRooms(DepthSamples):
    """Rooms with boxes and spheres on the floor, as many as asked for, rendered when they are first read.

    Each process keeps what it has rendered, 7 bytes a pixel.

    Textures are crops of the photographs of :class:`tessella.data.photos.Photos`, of its own split. The scene of an
    index is drawn from (seed, split, index): the two splits share no scene and no pixel of a texture.

    Args:
        split: "train" or "test".
        size_px: side of the pictures in pixels; one ray a pixel.
        flip: in training, mirror half of the pictures left to right.
        min_area: see :class:`DenseSamples`.
        num_bins: of depth.
        high_m: where the last bin ends, in metres.
        num_scenes: of the training split.
        num_test_scenes: of the test split.
        seed: not negative.

    Raises:
        ImportError: scikit-image or scikit-learn, which bring the photographs, is not installed.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        *,
        split: Split,
        size_px: int = 64,
        flip: bool = True,
        min_area: float = 1.0,
        num_bins: int = 256,
        high_m: float = 10.0,
        num_scenes: int = 10_000,
        num_test_scenes: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(split=split, size_px=size_px, flip=flip, min_area=min_area, num_bins=num_bins, high_m=high_m)
        for name, value, least in (("num_scenes", num_scenes, 1), ("num_test_scenes", num_test_scenes, 1),
                                   ("seed", seed, 0)):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self._length = num_scenes if split == "train" else num_test_scenes
        self.seed = seed
        self._rendered: dict[int, Pair] = {}

    def __len__(self) -> int:
        """The number of scenes."""
        return self._length

    def read(self, index: int) -> Pair:
        """The rendered scene and its depth in metres."""
        if index not in self._rendered:
            self._rendered[index] = self._render(index)
        return self._rendered[index]

    def _render(self, index: int) -> Pair:
        rng = np.random.default_rng((self.seed, self.split == "test", index))
        textures = _textures(self.split)
        picture, depth = render(random_scene(rng, len(textures)), textures, self.size_px, rng)
        image = Image.fromarray(np.rint(picture * 255).astype(np.uint8))
        return Pair(image, depth.astype(np.float32), f"{self.split}:{self.seed}:{index}")

    def __getstate__(self) -> dict[str, Any]:
        """Without the pictures: a worker process renders its own."""
        return {**self.__dict__, "_rendered": {}}


@lru_cache(maxsize=2)
def _textures(split: Split) -> Array:
    """``[n, s, s, 3]`` in [0, 1], cut once a process."""
    photos = Photos(split=split, crop_px=_TEXTURE_PX)
    crops = [photos.sample(index)["x"].numpy() for index in range(min(_NUM_TEXTURES, len(photos)))]
    return (np.stack(crops).transpose(0, 2, 3, 1) + 1) / 2


def _look_up(texture: Array, place: Array) -> Array:
    """``[n, 3]`` of a texture at ``place [n, 2]`` in metres, nearest pixel, every other repetition mirrored."""
    size = len(texture)
    pixels = np.floor(np.abs(place) / _METRES_A_TEXTURE * size).astype(np.int64) % (2 * size)
    row, column = np.minimum(pixels, 2 * size - 1 - pixels).T
    colours: Array = texture[row, column]
    return colours


def _turn_y(angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _turn_x(angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
