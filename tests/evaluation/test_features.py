"""Feature networks by their counts, keys and padding; resize rules by hand and against Pillow; what features are of."""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tessella.checkpoint import CheckpointError
from tessella.data.base import Batch
from tessella.data.loader import evaluation_batches
from tessella.data.parquet import Parquet
from tessella.evaluation.backbones import (
    Classifier,
    EfficientNetLite0,
    FIDInceptionV3,
    InceptionV3,
    load_classifier_weights,
)
from tessella.evaluation.features import (
    FeatureNetwork,
    PictureCounter,
    Resize,
    as_levels,
    metric_name,
    pictures_of,
    resize,
)
from tessella.evaluation.image import to_uint8
from tessella.evaluation.protocols import EFFLITE0, PYTORCH_FID


def pictures(count: int, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng) / 127.5 - 1


@functools.cache
def random_network() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(EFFLITE0, EfficientNetLite0())


@functools.cache
def random_inception(kind: type[InceptionV3]) -> InceptionV3:
    torch.manual_seed(0)
    return kind()


def num_weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- classifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "weights", "tensors"),
    [
        (EfficientNetLite0, 4_652_008, 247),
        # torchvision's 27,161,264 without the 3,326,696 of the auxiliary classifier; 2048 + 1 more for each class.
        (InceptionV3, 27_161_264 - 3_326_696, 94 * 5 + 2),
        (FIDInceptionV3, 27_161_264 - 3_326_696 + 8 * 2049, 94 * 5 + 2),
    ],
)
def test_size_and_shapes(kind: type[Classifier], weights: int, tensors: int) -> None:
    network = kind()
    assert num_weights(network) == weights
    assert len([key for key in network.state_dict() if not key.endswith("num_batches_tracked")]) == tensors
    pool, logits = network(torch.zeros(1, 3, kind.input_px, kind.input_px))
    assert pool.shape == (1, kind.dim)
    assert logits.shape == (1, kind.num_classes)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in nn.Sequential(network).train()[0].modules())


def test_keys_of_inception_are_torchvisions() -> None:
    shapes = {key: list(value.shape) for key, value in random_inception(FIDInceptionV3).state_dict().items()}
    assert shapes["Conv2d_1a_3x3.conv.weight"] == [32, 3, 3, 3]
    assert shapes["Conv2d_1a_3x3.bn.running_var"] == [32]
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == [64, 48, 5, 5]
    assert shapes["Mixed_6a.branch3x3.conv.weight"] == [384, 288, 3, 3]
    assert shapes["Mixed_6e.branch7x7dbl_5.conv.weight"] == [192, 192, 1, 7]
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == [192, 192, 3, 3]
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == [384, 384, 3, 1]
    assert shapes["fc.weight"] == [1008, 2048]
    tops = {key.split(".")[0] for key in shapes}
    assert tops == {
        *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "fc"),
        *(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")),
    }


def test_pooling_is_what_tells_the_inceptions_apart() -> None:
    """Averages of ones: the border's are 1 where the padding is left out; the last block takes the maximum."""
    fid, torchvision = random_inception(FIDInceptionV3), random_inception(InceptionV3)
    ones = torch.ones(1, 1, 4, 4)
    corner = {
        block: (fid.get_submodule(block).pool(ones)[0, 0, 0, 0].item(),  # type: ignore[operator]
                torchvision.get_submodule(block).pool(ones)[0, 0, 0, 0].item())  # type: ignore[operator]
        for block in ("Mixed_5b", "Mixed_6e", "Mixed_7b")
    }  # fmt: skip
    assert corner == {block: (1.0, pytest.approx(4 / 9)) for block in corner}
    spike = torch.zeros(1, 1, 3, 3)
    spike[0, 0, 1, 1] = 9
    assert fid.Mixed_7c.pool(spike).unique().tolist() == [9]
    assert torchvision.Mixed_7c.pool(spike)[0, 0, 1, 1].item() == 1


def test_only_the_fid_network_leaves_the_bias_of_its_logits_out() -> None:
    pool = torch.rand(1, 2048)
    for kind, counts in ((FIDInceptionV3, False), (InceptionV3, True)):
        network = random_inception(kind)
        expected = pool @ network.fc.weight.T + (network.fc.bias if counts else 0)
        torch.testing.assert_close(network._classify(pool), expected)


def test_padding_is_tensorflows() -> None:
    """Stride 2 on an even side: the windows start at 0, and the one row of padding lies behind the last."""
    stem = EfficientNetLite0()._conv_stem
    stem.weight.data.zero_()
    stem.weight.data[:, :, 0, 0] = 1  # picks the first pixel of each window, all channels summed
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert (stem(x)[0, 0] / 3).tolist() == [[0, 2], [8, 10]]
    odd = torch.arange(9.0).view(1, 1, 3, 3).expand(1, 3, 3, 3)  # one row of padding on either side
    assert (stem(odd)[0, 0] / 3).tolist() == [[0, 0], [0, 4]]


@pytest.mark.parametrize("kind", [EfficientNetLite0, FIDInceptionV3, InceptionV3])
def test_epsilon_of_the_normalisation_is_tensorflows(kind: type[Classifier]) -> None:
    """1 / sqrt(0.001 + 0.001), where torch's own epsilon of 1e-5 would give 31.5."""
    norms = [module for module in kind().modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == (49 if kind is EfficientNetLite0 else 94)
    for norm in norms:
        norm.running_var = torch.full((norm.num_features,), 1e-3)
        out = norm(torch.ones(1, norm.num_features, 1, 1)).flatten()
        torch.testing.assert_close(out, torch.full_like(out, 500**0.5))


def as_published(network: Classifier) -> dict[str, Tensor]:
    return {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}


def test_reads_both_containers_and_both_files_of_inception(tmp_path: Path) -> None:
    fid, torchvision = random_inception(FIDInceptionV3), random_inception(InceptionV3)
    torch.save(as_published(fid), tmp_path / "pytorch_fid.pth")
    auxiliary = {"AuxLogits.fc.weight": torch.zeros(1000, 768), "AuxLogits.conv0.bn.running_var": torch.ones(128)}
    torch.save({**torchvision.state_dict(), **auxiliary}, tmp_path / "torchvision.pth")
    save_file({**as_published(torchvision), **auxiliary}, tmp_path / "torchvision.safetensors")
    for kind, name, source in (
        (FIDInceptionV3, "pytorch_fid.pth", fid),
        (InceptionV3, "torchvision.pth", torchvision),
        (InceptionV3, "torchvision.safetensors", torchvision),
    ):
        read = kind()
        load_classifier_weights(read, tmp_path / name)
        torch.testing.assert_close(as_published(read), as_published(source), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"(?s)torchvision\.pth does not fit.*fc\.weight.*1000.*1008"):
        load_classifier_weights(FIDInceptionV3(), tmp_path / "torchvision.pth")


def test_refuses_wrong_files(tmp_path: Path) -> None:
    network = EfficientNetLite0()
    good = as_published(network)
    for change, message in (
        ({"_fc.weight": torch.zeros(1000, 1281)}, r"_fc\.weight.*1281"),
        ({"_blocks.16._bn0.bias": torch.zeros(1)}, r"_blocks\.16\._bn0\.bias"),
        ({"_fc.bias": [1.0]}, r"_fc\.bias"),
    ):
        torch.save({**good, **change}, tmp_path / "wrong.pth")
        with pytest.raises(CheckpointError, match=rf"(?s)wrong\.pth does not fit.*{message}"):
            load_classifier_weights(network, tmp_path / "wrong.pth")
    torch.save({key: value for key, value in good.items() if key != "_conv_head.weight"}, tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match=r"(?s)missing\.pt does not fit.*_conv_head\.weight"):
        load_classifier_weights(network, tmp_path / "missing.pt")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth must hold a state dict, not list"):
        load_classifier_weights(network, tmp_path / "list.pth")
    torch.save(network, tmp_path / "code.pth")  # a whole module: reading it would run code
    (tmp_path / "noise.pth").write_bytes(b"no weights")
    for name in ("code.pth", "noise.pth"):
        with pytest.raises(CheckpointError, match=rf"{name} is damaged or holds more than tensors"):
            load_classifier_weights(network, tmp_path / name)
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(CheckpointError, match=rf"no weights file .*{name}"):
            load_classifier_weights(network, tmp_path / name)


# --- resize rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "source", "expected"),
    [
        ("tf1_bilinear", [0, 100], [0, 50, 100, 100]),  # positions 0, 1/2, 1, 3/2
        ("bilinear", [0, 100], [0, 25, 75, 100]),  # positions -1/4, 1/4, 3/4, 5/4
        ("tf1_bilinear", [0, 10, 50, 90], [0, 50]),  # positions 0, 2
        ("bilinear", [0, 10, 50, 90], [5, 70]),  # positions 1/2, 5/2
        ("bilinear_antialias", [0, 10, 50, 90], [(0 * 3 + 10 * 3 + 50) / 7, (10 + 50 * 3 + 90 * 3) / 7]),
    ],
)
def test_resize_by_hand(rule: Resize, source: list[float], expected: list[float]) -> None:
    size = len(expected)
    row = torch.tensor(source, dtype=torch.float32)
    square = row.expand(1, 1, len(source), -1)
    torch.testing.assert_close(resize(square, size, rule)[0, 0, 0], torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(resize(square.mT, size, rule)[0, 0, :, 0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("rule", "filter_"),
    [("bicubic_pil", Image.Resampling.BICUBIC), ("bilinear_antialias", Image.Resampling.BILINEAR)],
)
@pytest.mark.parametrize("shape", [(40, 24), (16, 16), (100, 131)])
def test_resize_is_pillows(rule: Resize, filter_: Image.Resampling, shape: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    expected = np.asarray(Image.fromarray(levels).resize((32, 32), filter_)).clip(0, 255)
    ours = resize(torch.from_numpy(levels)[None, None], 32, rule)[0, 0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-3)


def test_unknown_resize() -> None:
    with pytest.raises(
        ValueError, match="unknown resize rule 'area'; choose one of: bilinear, bilinear_antialias, tf1"
    ):
        resize(torch.zeros(1, 1, 2, 2), 4, "area")  # type: ignore[arg-type]


def test_levels() -> None:
    x = torch.tensor([-7.0, -1.0, 0.4 / 127.5, 1.0, 3.0])
    assert as_levels(x, "uint8").tolist() == [0, 0, 128, 255, 255]  # 127.9 is nearest to 128
    torch.testing.assert_close(as_levels(x, "float"), torch.tensor([0.0, 0.0, 127.9, 255.0, 255.0]))


# --- feature networks -------------------------------------------------------------------------------------------------


def test_what_the_network_sees() -> None:
    """(v - 127) / 128 of 8-bit levels v, at 224 px."""
    network = random_network()
    seen: list[Tensor] = []
    handle = network.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = pictures(1, 224, 224) + 0.3 / 127.5  # rounds back
    network(x)
    handle.remove()
    torch.testing.assert_close(seen[0], (to_uint8(pictures(1, 224, 224)).float() - 127) / 128, rtol=0, atol=1e-4)


def test_features_do_not_depend_on_batching() -> None:
    network = random_network()
    x = pictures(10)
    whole, parts = network.extract([x]), network.extract([x[:3], x[3:9], x[9:]])
    torch.testing.assert_close(whole.pool, parts.pool)
    torch.testing.assert_close(whole.logits, parts.logits)
    assert whole.pictures == parts.pictures
    assert whole.pool.shape == (10, 1280)
    assert whole.logits.shape == (10, 1000)
    assert {whole.pool.dtype, whole.logits.dtype} == {torch.float32}


def test_features_are_the_same_under_autocast() -> None:
    network = random_network()
    with torch.autocast("cpu", torch.bfloat16):
        inside = network(pictures(1)).pool
    torch.testing.assert_close(inside, network(pictures(1)).pool, rtol=0, atol=0)


def test_sizes_may_differ_and_are_recorded() -> None:
    batch = Batch(x=pictures(2, 20, 12), label=torch.zeros(2), key=["a", "b"], skipped=[])
    done: list[int] = []
    features = random_network().extract([pictures(1), batch], progress=done.append)
    assert features.pictures.sizes == {"16x16": 1, "20x12": 2}
    assert features.pictures.num_images == len(features) == 3
    assert done == [1, 3]


def test_exactly_as_many_as_asked_for() -> None:
    network = random_network()
    assert len(network.extract([pictures(3), pictures(3)], num_images=4)) == 4
    # Exactly at the end of a batch: no further batch is drawn from a source without end.
    endless = iter(lambda: pictures(2), None)
    assert [len(x) for x in pictures_of(endless, 4)] == [2, 2]
    with pytest.raises(ValueError, match="num_images=7 pictures were asked for, and batches held 6"):
        network.extract([pictures(3), pictures(3)], num_images=7)
    with pytest.raises(ValueError, match="held no picture"):
        network.extract([pictures(0)])
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        network.extract([pictures(1)], num_images=0)


def test_refuses_what_are_no_pictures() -> None:
    network = random_network()
    with pytest.raises(TypeError, match=r"floats in \[-1, 1\], got torch.uint8"):
        network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[1, 1, 8, 8\]"):
        network(torch.zeros(1, 1, 8, 8))
    broken = pictures(3)
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="picture 1 of a batch holds NaN"):
        network(broken)
    with pytest.raises(TypeError, match=r"of one size, .* got <class 'list'>"):
        network.extract([[pictures(1)[0], pictures(1, 8, 8)[0]]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="'efflite0' needs a EfficientNetLite0 as its classifier, got InceptionV3"):
        FeatureNetwork(EFFLITE0, random_inception(InceptionV3))
    with pytest.raises(TypeError, match="'pytorch-fid' needs a FIDInceptionV3 as its classifier, got InceptionV3"):
        FeatureNetwork(PYTORCH_FID, random_inception(InceptionV3))


def test_weights_hash_is_of_the_weights_and_not_of_the_file(tmp_path: Path) -> None:
    network = random_network()
    weights = as_published(network.classifier)
    torch.save(weights, tmp_path / "weights.pth")
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        assert FeatureNetwork.from_file(EFFLITE0, tmp_path / name).weights_hash == network.weights_hash
    other = EfficientNetLite0()
    other.load_state_dict(weights)
    other._fc.bias.data[0] += 1
    assert FeatureNetwork(EFFLITE0, other).weights_hash != network.weights_hash


def test_description_is_complete() -> None:
    description = random_network().describe()
    assert {key for key in description if key not in ("dim", "input_px", "weights_hash")} == {
        field.name for field in dataclasses.fields(EFFLITE0)
    }
    assert description["dim"] == 1280
    assert description["input_px"] == 224


def fingerprint(*batches: Tensor) -> str:
    counter = PictureCounter()
    for x in batches:
        counter.update(x)
    return counter.picture_set().fingerprint


def test_fingerprint() -> None:
    x = pictures(4, 8, 6)
    assert fingerprint(x) == fingerprint(x[:1], x[1:])
    changed = x.clone()
    changed[3, 2, 7, 5] += 1e-6
    others = [fingerprint(y) for y in (x.flip(0), x[:3], x.view(4, 3, 6, 8), changed)]
    assert len({fingerprint(x), *others}) == 5


@pytest.mark.parametrize(
    ("metric", "label", "name"),
    [
        ("frechet", "", "FID"),
        ("score", "", "IS"),
        ("recall", "", "recall"),
        ("frechet", "EffLite0", "FD-EffLite0"),
        ("score", "EffLite0", "IS-EffLite0"),
        ("precision", "EffLite0", "precision-EffLite0"),
    ],
)
def test_metric_names(metric: str, label: str, name: str) -> None:
    assert metric_name(metric, label) == name


# --- the published weights --------------------------------------------------------------------------------------------

# tench, springer, cassette player, chain saw, church, French horn, garbage truck, gas pump, golf ball, parachute
IMAGENETTE = torch.tensor([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])


@pytest.fixture(scope="module")
def efficientnet(shared_data: Path) -> FeatureNetwork:
    file = shared_data / "weights" / "efficientnet_lite0.fp16.safetensors"
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    return FeatureNetwork.from_file(EFFLITE0, file)


@pytest.mark.slow
def test_efficientnet_recognises_photographs(efficientnet: FeatureNetwork, shared_data: Path) -> None:
    """They are 128 px, enlarged to 224."""
    pytest.importorskip("pyarrow")
    dataset = Parquet(shared_data / "imagenette128", split="test")
    batches = list(evaluation_batches(dataset, batch_size=50))
    label = IMAGENETTE[torch.cat([batch["label"] for batch in batches])]
    logits = efficientnet.extract(batches).logits
    among_all = (logits.argmax(1) == label).double().mean().item()
    among_ten = (IMAGENETTE[logits[:, IMAGENETTE].argmax(1)] == label).double().mean().item()
    assert among_all == pytest.approx(0.653, abs=0.003)
    assert among_ten == pytest.approx(0.973, abs=0.003)


def test_efficientnet_tells_8_bit_from_float_pixels(efficientnet: FeatureNetwork) -> None:
    x = pictures(1) * 0.5 + 0.3 / 127.5
    as_float = FeatureNetwork(dataclasses.replace(EFFLITE0, pixels="float"), efficientnet.classifier)
    assert not torch.equal(efficientnet(x).pool, as_float(x).pool)
    stored = io.BytesIO()
    Image.fromarray(to_uint8(x)[0].permute(1, 2, 0).numpy()).save(stored, format="png")
    read = torch.from_numpy(np.array(Image.open(stored))).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(efficientnet(read).pool, efficientnet(x).pool, rtol=0, atol=0)
