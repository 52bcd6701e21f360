"""Pictures to features: a classifier together with how exactly pictures are brought before it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.evaluation.backbones import (
    Activations,
    Classifier,
    EfficientNetLite0,
    FIDInceptionV3,
    InceptionV3,
    load_classifier_weights,
)
from tessella.evaluation.image import Pixels, to_uint8

if TYPE_CHECKING:
    from tessella.data.base import Batch

Resize = Literal["bilinear", "bilinear_antialias", "tf1_bilinear", "bicubic_pil"]
Network = Literal["efficientnet_lite0", "inception_v3_fid", "inception_v3_torchvision"]

NETWORKS: dict[Network, type[Classifier]] = {
    "efficientnet_lite0": EfficientNetLite0,
    "inception_v3_fid": FIDInceptionV3,
    "inception_v3_torchvision": InceptionV3,
}


_CPU_BATCH = 8  # the activations of more leave the cache: 64 at a time take twice as long for each picture


# --- bringing pictures to the network's size --------------------------------------------------------------------------


def resize(levels: Tensor, size: int, rule: Resize) -> Tensor:
    """Pictures ``[B, C, size, size]`` of ``levels [B, C, H, W]`` in [0, 255]; the aspect ratio is not kept.

    Which one is used moves every distance that is taken of the features (Parmar et al., arXiv 2104.11222):

    * ``bilinear``: pixel centres at half-integers, two neighbours per axis, no antialiasing (pytorch-fid).
    * ``bilinear_antialias``: the same, with a wider kernel where pictures shrink (Pillow's bilinear).
    * ``tf1_bilinear``: as TensorFlow 1: output i reads position i H / size, (H / size - 1) / 2 px away from where it
      should; no antialiasing (the graph of the original FID, and ADM's evaluator).
    * ``bicubic_pil``: Pillow's antialiased bicubic (a = -1/2) on floats, clipped to [0, 255] (clean-fid).

    Raises:
        ValueError: unknown rule.
    """
    if rule not in _RESIZES:
        raise ValueError(f"unknown resize rule {rule!r}; choose one of: {', '.join(_RESIZES)}")
    return _RESIZES[rule](levels, size)


def _bilinear(levels: Tensor, size: int) -> Tensor:
    return functional.interpolate(levels, size=(size, size), mode="bilinear", align_corners=False)


def _bilinear_antialias(levels: Tensor, size: int) -> Tensor:
    return functional.interpolate(levels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def _bicubic_pil(levels: Tensor, size: int) -> Tensor:
    y = functional.interpolate(levels, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return y.clamp(0, 255)  # the kernel overshoots at edges


def _tf1_bilinear(levels: Tensor, size: int) -> Tensor:
    rows = _tf1_lerp(levels, size, dim=3)
    return _tf1_lerp(rows, size, dim=2)


def _tf1_lerp(levels: Tensor, size: int, *, dim: int) -> Tensor:
    """Along one axis, at p = i H / size: ``x[floor(p)] + (p - floor(p)) (x[floor(p) + 1] - x[floor(p)])``."""
    length = levels.shape[dim]
    position = torch.arange(size, dtype=torch.float32, device=levels.device) * (length / size)
    below = position.long()
    above = (below + 1).clamp(max=length - 1)
    fraction = (position - below).view([-1 if axis == dim else 1 for axis in range(levels.ndim)])
    low, high = levels.index_select(dim, below), levels.index_select(dim, above)
    return low + (high - low) * fraction


_RESIZES: dict[Resize, Callable[[Tensor, int], Tensor]] = {
    "bilinear": _bilinear,
    "bilinear_antialias": _bilinear_antialias,
    "tf1_bilinear": _tf1_bilinear,
    "bicubic_pil": _bicubic_pil,
}


# --- protocols and networks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureProtocol:
    """Everything between a picture and its features; numbers of two protocols do not compare.

    Attributes:
        name: what the variant is called.
        network: the classifier.
        pixels: ``"uint8"`` rounds pictures to 8 bits first, as saving them would; ``"float"`` only clamps them.
        resize: see :func:`resize`.
        offset, scale: the network sees (v - offset) / scale of levels v in [0, 255].
        label: what the metrics are called after; empty for the network of the published FIDs alone.
    """

    name: str
    network: Network
    pixels: Pixels
    resize: Resize
    offset: float
    scale: float
    label: str


def metric_name(metric: str, label: str) -> str:
    """``FID``, ``KID``, ``IS``, ``precision``, ...; with a label ``FD-EffLite0`` and so on, which do not compare."""
    if not label:
        return {"frechet": "FID", "kernel": "KID", "score": "IS"}.get(metric, metric)
    return {"frechet": "FD", "kernel": "KD", "score": "IS"}.get(metric, metric) + f"-{label}"


@dataclass(frozen=True)
class PictureSet:
    """Which pictures were measured.

    Attributes:
        num_images: N.
        sizes: how many of each size, ``{"64x64": 1000}`` (height x width in px).
        fingerprint: 16 hexadecimal digits of the pictures' values, sizes and order; how they were batched has no part.
    """

    num_images: int
    sizes: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class Features:
    """What a network says of N pictures.

    Attributes:
        pool: ``[N, D]`` float32 on the CPU.
        logits: ``[N, V]`` float32 on the CPU.
        pictures: which pictures these are.
        network: :meth:`FeatureNetwork.describe` of the network.
    """

    pool: Tensor
    logits: Tensor
    pictures: PictureSet
    network: dict[str, Any]

    def __len__(self) -> int:
        return len(self.pool)


class FeatureNetwork:
    """A classifier under a protocol: pictures in, features out.

    Features do not depend on how pictures are batched, up to rounding: float32 throughout, no autocast and no TF32.

    Args:
        protocol: how pictures are brought before it.
        classifier: its network; with the weights in it, whatever they are.

    Attributes:
        weights_hash: 16 hexadecimal digits of the names and values of the weights, whatever file they came from.

    Raises:
        TypeError: a classifier of another class than the protocol's.
    """

    def __init__(self, protocol: FeatureProtocol, classifier: Classifier) -> None:
        if type(classifier) is not NETWORKS[protocol.network]:
            raise TypeError(
                f"protocol {protocol.name!r} needs a {NETWORKS[protocol.network].__name__} as its classifier, got "
                f"{type(classifier).__name__}"
            )
        self.protocol = protocol
        # Channels last in memory: twice as fast on a CPU.
        self.classifier: Classifier = classifier.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights_hash = _hash_of(classifier)

    @classmethod
    def from_file(cls, protocol: FeatureProtocol, file: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """The protocol's network with the weights in ``file``.

        Raises:
            CheckpointError: see :func:`~tessella.evaluation.backbones.load_classifier_weights`.
        """
        classifier = NETWORKS[protocol.network]()
        load_classifier_weights(classifier, file)
        return cls(protocol, classifier.to(device))

    @property
    def dim(self) -> int:
        """D, the length of a feature vector."""
        return self.classifier.dim

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.classifier.parameters()).device

    def describe(self) -> dict[str, Any]:
        """All that two feature sets must have in common to be compared, as JSON values."""
        settings = asdict(self.protocol)
        return {
            **settings,
            "dim": self.dim,
            "input_px": self.classifier.input_px,
            "weights_hash": self.weights_hash,
        }

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Activations:
        """Features ``[B, D]`` and logits ``[B, V]`` of ``x [B, 3, H, W]`` in [-1, 1], float32.

        Raises:
            TypeError: x holds integers.
            ValueError: another shape, or NaN.
        """
        check_pictures(x)
        at_a_time = _CPU_BATCH if self.device.type == "cpu" else max(1, len(x))
        with (
            torch.autocast(self.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            parts = [self._activations(part) for part in x.split(at_a_time)]
        pools, logits = zip(*parts, strict=True)
        return Activations(torch.cat(pools), torch.cat(logits))

    def _activations(self, x: Tensor) -> Activations:
        levels = as_levels(x.to(self.device), self.protocol.pixels)
        inputs = resize(levels, self.classifier.input_px, self.protocol.resize)
        inputs = (inputs - self.protocol.offset) / self.protocol.scale
        activations: Activations = self.classifier(inputs.contiguous(memory_format=torch.channels_last))
        return activations

    def extract(
        self,
        batches: Iterable[Tensor | Batch],
        *,
        num_images: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Features:
        """Features of all pictures in ``batches``.

        Args:
            batches: ``x [B, 3, H, W]`` in [-1, 1], or batches of a data set; sizes may differ between batches.
            num_images: take exactly so many, the first ones.
            progress: called with the number of pictures done, after each batch.

        Raises:
            TypeError, ValueError: see :meth:`__call__`; also fewer pictures than ``num_images``, or none.
        """
        collector = FeatureCollector(self)
        for x in pictures_of(batches, num_images):
            collector.update(x)
            if progress is not None:
                progress(collector.num_images)
        return collector.features()


class FeatureCollector:
    """Gathers the features of pictures that come batch by batch."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self._counter = PictureCounter()
        self._parts: list[Activations] = []

    @property
    def num_images(self) -> int:
        """Pictures so far."""
        return self._counter.num_images

    def update(self, x: Tensor) -> None:
        """Add the pictures ``x [B, 3, H, W]`` in [-1, 1]; errors as of :meth:`FeatureNetwork.__call__`."""
        pool, logits = self.network(x)
        self._counter.update(x)
        self._parts.append(Activations(pool.cpu(), logits.cpu()))

    def features(self) -> Features:
        """All of them, in order.

        Raises:
            ValueError: there are none.
        """
        if not self.num_images:
            raise ValueError("batches held no picture to take features of")
        pools, logits = zip(*self._parts, strict=True)
        return Features(torch.cat(pools), torch.cat(logits), self._counter.picture_set(), self.network.describe())


class PictureCounter:
    """Builds a :class:`PictureSet` batch by batch."""

    def __init__(self) -> None:
        self._sizes: Counter[str] = Counter()
        self._digest = hashlib.sha256()

    @property
    def num_images(self) -> int:
        """Pictures so far."""
        return self._sizes.total()

    def update(self, x: Tensor) -> None:
        """Count ``x [B, 3, H, W]``."""
        size = f"{x.shape[2]}x{x.shape[3]}"
        for picture in x.detach().float().cpu().contiguous().numpy():
            self._digest.update(size.encode())
            self._digest.update(picture)
        self._sizes[size] += len(x)

    def picture_set(self) -> PictureSet:
        """What was counted."""
        return PictureSet(self.num_images, dict(self._sizes), self._digest.hexdigest()[:16])


def pictures_of(batches: Iterable[Tensor | Batch], num_images: int | None = None) -> Iterable[Tensor]:
    """The pictures ``[B, 3, H, W]`` of each batch that has any; exactly ``num_images`` of them if given.

    Raises:
        TypeError: a batch that is neither a tensor nor holds one under ``x``.
        ValueError: fewer pictures than ``num_images``, or ``num_images`` below 1.
    """
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    count = 0
    for batch in batches:
        x = batch["x"] if isinstance(batch, Mapping) else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"a batch must be pictures [B, 3, H, W] of one size, or hold them under 'x', got {type(x)}")
        if num_images is not None:
            x = x[: num_images - count]
        if len(x):
            yield x
            count += len(x)
        if count == num_images:
            return
    if num_images is not None:
        raise ValueError(f"num_images={num_images} pictures were asked for, and batches held {count}")


def check_pictures(x: Tensor) -> None:
    """Raise unless ``x`` is ``[B, 3, H, W]`` of finite floats."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"pictures must be floats in [-1, 1], got {x.dtype}")
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"pictures must be of shape [B, 3, H, W], got {list(x.shape)}")
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"picture {int((~finite).nonzero()[0])} of a batch holds NaN or infinity")


def as_levels(x: Tensor, pixels: Pixels) -> Tensor:
    """Levels in [0, 255], float32, of pictures in [-1, 1]: whole ones for ``pixels="uint8"``."""
    x = x.float()
    return to_uint8(x).float() if pixels == "uint8" else (x.clamp(-1, 1) + 1) * 127.5


def _hash_of(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):  # some files have it; nothing depends on it
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
