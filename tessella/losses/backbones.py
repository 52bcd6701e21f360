"""The feature networks of perceptual metrics: VGG16 and AlexNet, with torchvision's state-dict keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn


class FeatureNet(nn.Module):
    """A stack of layers that reports the activations after some of them.

    Attributes:
        taps: positions in ``features`` whose output is reported.
        channels: C_l, the channels of the reported activations.
        min_px: the smallest height and width that leaves the last activation at least one position.
    """

    taps: ClassVar[tuple[int, ...]]
    channels: ClassVar[tuple[int, ...]]
    min_px: ClassVar[int]

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Activations ``[B, C_l, H_l, W_l]`` of ``x [B, 3, H, W]``, first layer first."""
        activations = []
        for position, layer in enumerate(self.features):
            x = layer(x)
            if position in self.taps:
                activations.append(x)
        return activations


class VGG16(FeatureNet):
    """The convolutions of VGG16 (Simonyan and Zisserman, arXiv 1409.1556), tapped before each pooling."""

    taps = (3, 8, 15, 22, 29)
    channels = (64, 128, 256, 512, 512)
    min_px = 16

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        in_channels = 3
        for stage, (out_channels, depth) in enumerate(zip(self.channels, (2, 2, 3, 3, 3), strict=True)):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU()]
                in_channels = out_channels
        super().__init__(layers)


class AlexNet(FeatureNet):
    """The convolutions of AlexNet (Krizhevsky, arXiv 1404.5997), tapped after each."""

    taps = (1, 4, 7, 9, 11)
    channels = (64, 192, 384, 256, 256)
    min_px = 31

    def __init__(self) -> None:
        super().__init__(
            [
                *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
                *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
                *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
                *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
                *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
            ]
        )
