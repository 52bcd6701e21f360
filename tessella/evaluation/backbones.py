"""The classifiers in whose feature space sets of pictures are compared: Inception-v3 and EfficientNet-Lite0."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.checkpoint import CheckpointError, load_weights

_BATCH_NORM_EPS = 1e-3  # TensorFlow's; all networks here were trained there

Pool = Callable[[Tensor], Tensor]


class Activations(NamedTuple):
    """What a classifier says of B pictures: ``pool [B, D]`` after global pooling, ``logits [B, V]``."""

    pool: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """A frozen network, always in eval mode, that gives pooled features and logits.

    Attributes:
        dim: D, the pooled features.
        num_classes: V, the logits.
        input_px: side of the square pictures it was made for.
    """

    dim: ClassVar[int]
    num_classes: ClassVar[int]
    input_px: ClassVar[int]

    def freeze(self) -> Self:
        """Switch gradients and training off; for the end of a constructor."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a parent's ``train()`` must not change the metric."""
        return super().train(False)


def load_classifier_weights(network: Classifier, file: str | Path) -> None:
    """Load safetensors, or a pickled state dict (``.pth``, ``.pt``) of which nothing but tensors is read.

    Raises:
        CheckpointError: missing or damaged file, wrong keys, wrong shapes; the message names them.
    """
    path = Path(file)
    if path.suffix not in (".pth", ".pt"):
        load_weights(network, path)
        return
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no weights file {path}") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {error}") from error
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, not {type(weights).__name__}")
    try:
        network.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:  # AttributeError: values that are no tensors
        raise CheckpointError(f"{path} does not fit: {error}") from error


# --- EfficientNet-Lite0 -----------------------------------------------------------------------------------------------


class EfficientNetLite0(Classifier):
    """EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; without squeeze-excitation, with ReLU6), 4,652,008 weights.

    Keys are those of the package efficientnet_lite_pytorch. Input ``[B, 3, 224, 224]``: RGB levels v of 0 to 255 as
    (v - 127) / 128.
    """

    dim = 1280
    num_classes = 1000
    input_px = 224

    # (repeats, kernel, stride of the first, expansion, channels) of each stage
    _STAGES = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, stride=2)
        self._bn0 = _batch_norm(32)
        blocks: list[nn.Module] = []
        in_channels = 32
        for repeats, kernel, stride, expansion, channels in self._STAGES:
            for repeat in range(repeats):
                blocks.append(
                    _InvertedBottleneck(in_channels, channels, kernel, stride if repeat == 0 else 1, expansion)
                )
                in_channels = channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(in_channels, self.dim, 1, bias=False)
        self._bn1 = _batch_norm(self.dim)
        self._fc = nn.Linear(self.dim, self.num_classes)
        self.freeze()

    def forward(self, x: Tensor) -> Activations:
        """Features ``[B, 1280]`` and logits ``[B, 1000]`` in ImageNet's order."""
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        x = self._blocks(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        pool = x.mean((2, 3))
        return Activations(pool, self._fc(pool))


class _InvertedBottleneck(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; around it a skip connection where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands = expansion > 1
        self.skips = stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, width, 1, bias=False)
            self._bn0 = _batch_norm(width)
        self._depthwise_conv = _SameConv(width, width, kernel, stride=stride, groups=width)
        self._bn1 = _batch_norm(width)
        self._project_conv = nn.Conv2d(width, out_channels, 1, bias=False)
        self._bn2 = _batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        out: Tensor = self._bn2(self._project_conv(y))
        return x + out if self.skips else out


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: at stride 2 the odd pixel of it is on the right and below."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        padding = (width // 2, width - width // 2, height // 2, height - height // 2)
        y: Tensor = super().forward(functional.pad(x, padding))
        return y


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS)


# --- Inception-v3 -----------------------------------------------------------------------------------------------------


def _average_of_all(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1)  # the padding's zeros count


def _average_inside(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=1, padding=1)


class InceptionV3(Classifier):
    """Inception-v3 (Szegedy et al., arXiv 1512.00567) as torchvision has it, under its keys; 23,834,568 weights.

    The auxiliary classifier of its files (``AuxLogits.*``) is left out: it serves training only. This is **not** the
    network of the published FIDs, which is :class:`FIDInceptionV3`. Input ``[B, 3, 299, 299]`` in [-1, 1].

    Args:
        average: the 3x3 pooling inside the blocks.
        last_pool: the one inside the very last block.
    """

    dim = 2048
    num_classes = 1000
    input_px = 299

    def __init__(self, *, average: Pool = _average_of_all, last_pool: Pool = _average_of_all) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _InceptionA(192, 32, average)
        self.Mixed_5c = _InceptionA(256, 64, average)
        self.Mixed_5d = _InceptionA(288, 64, average)
        self.Mixed_6a = _InceptionB(288)
        self.Mixed_6b = _InceptionC(768, 128, average)
        self.Mixed_6c = _InceptionC(768, 160, average)
        self.Mixed_6d = _InceptionC(768, 160, average)
        self.Mixed_6e = _InceptionC(768, 192, average)
        self.Mixed_7a = _InceptionD(768)
        self.Mixed_7b = _InceptionE(1280, average)
        self.Mixed_7c = _InceptionE(2048, last_pool)
        self.fc = nn.Linear(self.dim, self.num_classes)
        self.register_load_state_dict_pre_hook(_drop_auxiliary_classifier)  # type: ignore[no-untyped-call]
        self.freeze()

    def forward(self, x: Tensor) -> Activations:
        """Features ``[B, 2048]`` and logits ``[B, V]``."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = x.mean((2, 3))
        return Activations(pool, self._classify(pool))

    def _classify(self, pool: Tensor) -> Tensor:
        logits: Tensor = self.fc(pool)
        return logits


class FIDInceptionV3(InceptionV3):
    """The Inception-v3 of the published FIDs and Inception Scores: TensorFlow's of 2015-12-05; 23,850,960 weights.

    Under the keys of pytorch-fid's file, which are torchvision's. It differs from :class:`InceptionV3` in 1,008
    classes, in averages that leave the padding out, in the maximum that the last block takes instead of an average, and
    in logits without the bias, as the evaluators compute the Inception Score.
    """

    num_classes = 1008

    def __init__(self) -> None:
        super().__init__(average=_average_inside, last_pool=_maximum)

    def _classify(self, pool: Tensor) -> Tensor:
        return functional.linear(pool, self.fc.weight)


def _drop_auxiliary_classifier(_: nn.Module, state_dict: dict[str, Any], *__: object) -> None:
    for key in [key for key in state_dict if key.startswith("AuxLogits.")]:
        del state_dict[key]


class _Conv(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)
        self.bn = _batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class _InceptionA(nn.Module):
    """35 x 35: 1x1, 5x5, double 3x3 and pooling, side by side."""

    def __init__(self, in_channels: int, pool_channels: int, pool: Pool) -> None:
        super().__init__()
        self.branch1x1 = _Conv(in_channels, 64, 1)
        self.branch5x5_1 = _Conv(in_channels, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(in_channels, pool_channels, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)


class _InceptionB(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branches = [
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            functional.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, 1)


class _InceptionC(nn.Module):
    """17 x 17: 7x7 convolutions factored into 1x7 and 7x1."""

    def __init__(self, in_channels: int, width: int, pool: Pool) -> None:
        super().__init__()
        row: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Conv(in_channels, 192, 1)
        self.branch7x7_1 = _Conv(in_channels, width, 1)
        self.branch7x7_2 = _Conv(width, width, **row)
        self.branch7x7_3 = _Conv(width, 192, **column)
        self.branch7x7dbl_1 = _Conv(in_channels, width, 1)
        self.branch7x7dbl_2 = _Conv(width, width, **column)
        self.branch7x7dbl_3 = _Conv(width, width, **row)
        self.branch7x7dbl_4 = _Conv(width, width, **column)
        self.branch7x7dbl_5 = _Conv(width, 192, **row)
        self.branch_pool = _Conv(in_channels, 192, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)


class _InceptionD(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(in_channels, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(in_channels, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branches = [
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
            functional.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, 1)


class _InceptionE(nn.Module):
    """8 x 8: branches that end in a row and a column side by side."""

    def __init__(self, in_channels: int, pool: Pool) -> None:
        super().__init__()
        row: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
        column: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = _Conv(in_channels, 320, 1)
        self.branch3x3_1 = _Conv(in_channels, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, **row)
        self.branch3x3_2b = _Conv(384, 384, **column)
        self.branch3x3dbl_1 = _Conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, **row)
        self.branch3x3dbl_3b = _Conv(384, 384, **column)
        self.branch_pool = _Conv(in_channels, 192, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)
