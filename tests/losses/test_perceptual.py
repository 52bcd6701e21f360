"""LPIPS against its formula written out, against another implementation, and its properties."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tessella.checkpoint import CheckpointError
from tessella.losses.backbones import VGG16, AlexNet, FeatureNet
from tessella.losses.perceptual import LPIPS, Network

NETWORKS: tuple[Network, ...] = ("vgg16", "alexnet")


def pictures(count: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@functools.cache
def random_lpips(network: Network) -> LPIPS:
    torch.manual_seed(0)
    return LPIPS(network)


@pytest.fixture
def weights(shared_data: Path) -> Path:
    folder = shared_data / "weights"
    if not folder.is_dir():
        pytest.skip(f"no LPIPS weights at {folder}")
    return folder


def save_weights(lpips: LPIPS, folder: Path) -> None:
    save_file(lpips.backbone.half().state_dict(), folder / f"{lpips.network}_features.fp16.safetensors")
    save_file(lpips.lins.state_dict(), folder / f"lpips_lin_{lpips.network}.safetensors")


def test_keys_and_shapes_are_torchvisions() -> None:
    vgg = {key: list(value.shape) for key, value in VGG16().state_dict().items()}
    assert [int(key.split(".")[1]) for key in vgg if key.endswith("bias")] == [
        0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28,
    ]  # fmt: skip
    assert vgg["features.0.weight"] == [64, 3, 3, 3]
    assert vgg["features.28.weight"] == [512, 512, 3, 3]
    alex = {key: list(value.shape) for key, value in AlexNet().state_dict().items() if key.endswith("weight")}
    assert alex == {
        "features.0.weight": [64, 3, 11, 11],
        "features.3.weight": [192, 64, 5, 5],
        "features.6.weight": [384, 192, 3, 3],
        "features.8.weight": [256, 384, 3, 3],
        "features.10.weight": [256, 256, 3, 3],
    }


@pytest.mark.parametrize("backbone", [VGG16(), AlexNet()])
def test_smallest_picture(backbone: FeatureNet) -> None:
    size = backbone.min_px
    activations = backbone(torch.zeros(1, 3, size, size))
    assert [a.shape[1] for a in activations] == list(backbone.channels)
    assert activations[-1].shape[2:] == (1, 1)
    with pytest.raises(RuntimeError):
        backbone(torch.zeros(1, 3, size - 1, size - 1))


def written_out(lpips: LPIPS, x: Tensor, x_hat: Tensor) -> Tensor:
    """The formula, one position at a time in float64, with the backbone called layer by layer."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    inputs = [((p + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1) for p in (x.double(), x_hat.double())]
    backbone = copy.deepcopy(lpips.backbone).double()
    total = torch.zeros((), dtype=torch.float64)
    taps = {"vgg16": [3, 8, 15, 22, 29], "alexnet": [1, 4, 7, 9, 11]}[lpips.network]
    for layer, tap in enumerate(taps):
        stack = backbone.features[: tap + 1]
        a, b = (stack(p[None])[0].permute(1, 2, 0).reshape(-1, lpips.backbone.channels[layer]) for p in inputs)
        w = lpips.lins.state_dict()[f"lin{layer}.model.1.weight"].double().flatten()
        positions = [
            (w * (p / (p.norm() + 1e-10) - q / (q.norm() + 1e-10)) ** 2).sum() for p, q in zip(a, b, strict=True)
        ]
        total += torch.stack(positions).mean()
    return total


@pytest.mark.parametrize("network", NETWORKS)
def test_formula(network: Network) -> None:
    lpips = random_lpips(network)
    x, x_hat = pictures(2), pictures(2, seed=1)
    out = lpips(x, x_hat)
    assert out.shape == (2,)
    assert out.dtype == torch.float32
    expected = torch.stack([written_out(lpips, a, b) for a, b in zip(x, x_hat, strict=True)])
    # The authors' rounded shift and scale are 2 mean - 1 and 2 std to three digits, hence the tolerance.
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_metric_properties(network: Network) -> None:
    lpips = random_lpips(network)
    x, x_hat = pictures(3), pictures(3, seed=1)
    assert lpips(x, x).tolist() == [0, 0, 0]
    torch.testing.assert_close(lpips(x, x_hat), lpips(x_hat, x))
    assert (lpips(x, x_hat) > 0).all()
    torch.testing.assert_close(lpips(x, x_hat)[1:2], lpips(x[1:2], x_hat[1:2]))


@pytest.mark.parametrize("network", NETWORKS)
def test_frozen_but_differentiable(network: Network) -> None:
    lpips = nn.Sequential(random_lpips(network)).train()[0]
    assert isinstance(lpips, LPIPS)
    assert not any(module.training for module in lpips.modules())
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    x_hat = pictures(1, seed=1).requires_grad_()
    lpips(pictures(1), x_hat).sum().backward()
    assert x_hat.grad is not None
    assert x_hat.grad.isfinite().all()
    assert x_hat.grad.abs().max() > 0


def test_gradient_is_finite_where_all_activations_are_zero() -> None:
    lpips = LPIPS("alexnet")
    for parameter in lpips.backbone.parameters():
        parameter.data.fill_(-1)  # the ReLU cuts everything off
    x_hat = torch.ones(1, 3, 32, 32, requires_grad=True)
    out = lpips(torch.ones(1, 3, 32, 32), x_hat)
    out.sum().backward()
    assert out.item() == 0
    assert x_hat.grad is not None
    assert x_hat.grad.abs().max() == 0


def test_same_under_autocast() -> None:
    lpips = random_lpips("alexnet")
    x, x_hat = pictures(2), pictures(2, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = lpips(x, x_hat)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, lpips(x, x_hat), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("x", "x_hat", "message"),
    [
        ((1, 3, 32, 32), (1, 3, 32, 31), "one shape"),
        ((1, 1, 32, 32), (1, 1, 32, 32), r"\[B, 3, H, W\]"),
        ((1, 3, 30, 64), (1, 3, 30, 64), "at least 31 px, got 30x64"),
    ],
)
def test_bad_pictures(x: tuple[int, ...], x_hat: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_lpips("alexnet")(torch.zeros(x), torch.zeros(x_hat))


def test_unknown_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown LPIPS network 'vgg'; choose one of: vgg16, alexnet"):
        LPIPS.from_folder("vgg", tmp_path)  # type: ignore[arg-type]


def test_reads_a_folder(tmp_path: Path) -> None:
    lpips = LPIPS("alexnet")
    save_weights(lpips, tmp_path)
    read = LPIPS.from_folder("alexnet", tmp_path)
    assert {parameter.dtype for parameter in read.parameters()} == {torch.float32}
    assert list(read.files) == ["alexnet_features.fp16.safetensors", "lpips_lin_alexnet.safetensors"]
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in read.files.values())
    torch.testing.assert_close(read.lins.state_dict(), lpips.lins.state_dict())
    with pytest.raises(CheckpointError, match=r"vgg16_features\.fp16\.safetensors"):
        LPIPS.from_folder("vgg16", tmp_path)


def test_refuses_wrong_weights(tmp_path: Path) -> None:
    lpips = LPIPS("alexnet")
    save_weights(lpips, tmp_path)
    file = tmp_path / "lpips_lin_alexnet.safetensors"
    good = load_file(file)
    for change, message in (
        ({"lin0.model.1.weight": torch.zeros(1, 63, 1, 1)}, "63"),
        ({"lin9.model.1.weight": torch.zeros(1)}, "lin9"),
    ):
        save_file({**good, **change}, file)
        with pytest.raises(CheckpointError, match=rf"(?s)lpips_lin_alexnet\.safetensors.*{message}"):
            LPIPS.from_folder("alexnet", tmp_path)
    del good["lin4.model.1.weight"]
    save_file(good, file)
    with pytest.raises(CheckpointError, match=r"(?s)lpips_lin_alexnet\.safetensors.*lin4\.model\.1\.weight"):
        LPIPS.from_folder("alexnet", tmp_path)
    file.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"lpips_lin_alexnet\.safetensors is damaged"):
        LPIPS.from_folder("alexnet", tmp_path)


@pytest.mark.parametrize(("network", "name"), [("vgg16", "vgg"), ("alexnet", "alex")])
def test_published_weights_agree_with_torchmetrics(
    network: Network, name: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own linear weights and formula, on our feature network (it has none without torchvision)."""
    from torchmetrics.functional.image import lpips as other

    ours = LPIPS.from_folder(network, weights)
    monkeypatch.setattr(other, "_get_tv_model_features", lambda *_: ours.backbone.features)
    theirs = other._LPIPS(net=name)
    for layer in range(5):
        key = f"lin{layer}.model.1.weight"
        assert torch.equal(theirs.state_dict()[key], ours.lins.state_dict()[key])
    x, x_hat = pictures(2, 64), pictures(2, 64, seed=1)
    torch.testing.assert_close(ours(x, x_hat), theirs(x, x_hat).flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_published_weights_rank_distortions(network: Network, weights: Path) -> None:
    """A blurred photograph is farther from it than a slightly brighter one, though its squared error is smaller."""
    skimage = pytest.importorskip("skimage.data")
    photo = torch.from_numpy(skimage.astronaut()[:192, 128:320].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    brighter = (photo + 0.2).clamp(-1, 1)
    blurred = nn.functional.avg_pool2d(photo, 5, stride=1, padding=2, count_include_pad=False)
    assert (brighter - photo).square().mean() > (blurred - photo).square().mean()
    lpips = LPIPS.from_folder(network, weights)
    assert lpips(photo, brighter).item() < 0.5 * lpips(photo, blurred).item()
