"""LPIPS, the learned perceptual image patch similarity (Zhang et al., arXiv 1801.03924), version 0.1."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from tessella.checkpoint import load_weights
from tessella.losses.backbones import VGG16, AlexNet, FeatureNet

Network = Literal["vgg16", "alexnet"]

_BACKBONES: dict[Network, Callable[[], FeatureNet]] = {"vgg16": VGG16, "alexnet": AlexNet}
_EPS = 1e-10


class LPIPS(nn.Module):
    r"""Distance between pictures in the feature space of an ImageNet classifier; smaller is more alike.

    .. math:: d(x, \hat x) = \sum_l \frac{1}{H_l W_l} \sum_{h,w} w_l^\top (\hat y^l_{hw} - \hat y'^l_{hw})^2

    with :math:`\hat y^l` the activations of layer l, scaled to length 1 at each position, and :math:`w_l \ge 0` fitted
    to human judgements. ``vgg16`` is the training loss of the VQGAN family; papers report ``alexnet`` or ``vgg16``, so
    always say which. The network is frozen and stays in eval mode; gradients flow to the pictures.

    The constructor draws random weights; :meth:`from_folder` reads the published ones.

    Args:
        network: ``"vgg16"`` or ``"alexnet"``.

    Attributes:
        files: name of each weights file read, with the first 16 hexadecimal digits of its SHA-256.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        if network not in _BACKBONES:
            raise ValueError(f"unknown LPIPS network {network!r}; choose one of: {', '.join(_BACKBONES)}")
        self.network = network
        self.files: dict[str, str] = {}
        self.backbone = _BACKBONES[network]()
        self.lins = _LayerWeights(self.backbone.channels)
        # ImageNet's mean and standard deviation, carried over from [0, 1] to pictures in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_folder(cls, network: Network, folder: str | Path) -> Self:
        """LPIPS with the weights in ``folder``, as float32.

        Args:
            network: ``"vgg16"`` or ``"alexnet"``.
            folder: holds ``<network>_features.fp16.safetensors`` (torchvision's keys ``features.N.{weight,bias}``) and
                ``lpips_lin_<network>.safetensors`` (the authors' keys ``linN.model.1.weight``).

        Raises:
            ValueError: unknown network.
            CheckpointError: a missing or damaged file, wrong keys or wrong shapes; the message names them.
        """
        lpips = cls(network)
        features = Path(folder) / f"{network}_features.fp16.safetensors"
        lins = Path(folder) / f"lpips_lin_{network}.safetensors"
        load_weights(lpips.backbone, features)
        load_weights(lpips.lins, lins)
        lpips.files = {file.name: _sha256_prefix(file) for file in (features, lins)}
        return lpips

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a parent's ``train()`` must not change the metric."""
        return super().train(False)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Distances ``[B]`` (float32; float64 for float64) of pictures ``x, x_hat [B, 3, H, W]`` in [-1, 1].

        Raises:
            ValueError: different shapes, not three channels, or smaller than the network can take.
        """
        self._check(x, x_hat)
        total = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        for layer, (y, y_hat) in enumerate(zip(self._activations(x), self._activations(x_hat), strict=True)):
            total = total + self.lins(layer, (y - y_hat).square())
        return total

    def _activations(self, x: Tensor) -> list[Tensor]:
        return [_unit_length(y) for y in self.backbone((x - self.shift) / self.scale)]

    def _check(self, x: Tensor, x_hat: Tensor) -> None:
        if x.shape != x_hat.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"x and x_hat must be of one shape [B, 3, H, W], got {list(x.shape)} and {list(x_hat.shape)}"
            )
        if min(x.shape[2:]) < self.backbone.min_px:
            raise ValueError(f"LPIPS with {self.network} needs pictures of at least {self.backbone.min_px} px, "
                             f"got {x.shape[2]}x{x.shape[3]}")  # fmt: skip


class _LayerWeights(nn.Module):
    """``w_l`` for each layer, under the keys of the published file (where a dropout comes first, for fitting)."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        for layer, size in enumerate(channels):
            lin = nn.Conv2d(size, 1, 1, bias=False)
            nn.init.uniform_(lin.weight)
            self.add_module(f"lin{layer}", nn.ModuleDict({"model": nn.Sequential(nn.Dropout(), lin)}))

    def forward(self, layer: int, squared: Tensor) -> Tensor:
        """``mean_hw w_l . squared``: ``[B]`` of ``squared [B, C_l, H_l, W_l]``."""
        w = self.get_parameter(f"lin{layer}.model.1.weight").flatten()
        # Outside a convolution, and so outside autocast: the distances are small and are summed in full precision.
        return (squared.mean((2, 3)) * w).sum(1)


def _unit_length(y: Tensor) -> Tensor:
    """``y / (|y| + eps)`` over the channels of ``[B, C, H, W]``, in at least float32: eps vanishes in half precision.

    The norm's gradient at y = 0, where whole positions are often cut off by the ReLU, is 0 and not NaN.
    """
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    length: Tensor = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    return y / (length + _EPS)


def _sha256_prefix(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
