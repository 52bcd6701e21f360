"""The named protocols: what their networks see, what their numbers are called, and ADM's reference file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tessella.checkpoint import CheckpointError
from tessella.evaluation.features import NETWORKS, FeatureNetwork, FeatureProtocol, metric_name, resize
from tessella.evaluation.protocols import (
    ADM,
    EFFLITE0,
    IBQ,
    PROTOCOLS,
    PYTORCH_FID,
    TORCHVISION,
    find_protocol,
    load_adm_reference,
)


@functools.cache
def network(protocol: FeatureProtocol) -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(protocol, NETWORKS[protocol.network]())


def seen(protocol: FeatureProtocol, x: Tensor) -> Tensor:
    """What the protocol's network is given for ``x``."""
    inputs: list[Tensor] = []
    handle = network(protocol).classifier.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    network(protocol)(x)
    handle.remove()
    return inputs[0]


def test_every_protocol_can_be_found_and_is_frozen() -> None:
    assert list(PROTOCOLS) == ["adm", "pytorch-fid", "ibq", "torchvision", "efflite0"]
    assert all(find_protocol(name).name == name for name in PROTOCOLS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ADM.resize = "bilinear"  # type: ignore[misc]
    with pytest.raises(ValueError, match="unknown protocol 'fid'; choose one of: adm, pytorch-fid, ibq, torchvision,"):
        find_protocol("fid")


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_only_the_network_of_the_published_fids_gives_an_fid(protocol: FeatureProtocol) -> None:
    names = {metric_name(metric, protocol.label) for metric in ("frechet", "score", "precision", "recall")}
    published = {"FID", "IS", "precision", "recall"}
    assert (names == published) == (protocol.network == "inception_v3_fid")
    assert names == published or not names & published


def off_levels(height: int, width: int) -> Tensor:
    """Pictures a third of a level above whole ones, and some outside of [-1, 1]."""
    levels = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0))
    return (levels + 1 / 3) / 127.5 - 1


def test_adm() -> None:
    x = off_levels(24, 32)
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round()
    torch.testing.assert_close(seen(ADM, x), (resize(levels, 299, "tf1_bilinear") - 128) / 128)


@pytest.mark.parametrize(("protocol", "rounds"), [(PYTORCH_FID, True), (IBQ, False)])
def test_pytorch_fid_and_ibq_differ_in_rounding(protocol: FeatureProtocol, rounds: bool) -> None:
    """pytorch-fid: pictures in [0, 1], F.interpolate to 299, then 2 x - 1."""
    x = off_levels(24, 32)
    unit = (x.clamp(-1, 1) + 1) / 2
    if rounds:
        unit = (unit * 255).round() / 255
    expected = 2 * functional.interpolate(unit, size=(299, 299), mode="bilinear", align_corners=False) - 1
    torch.testing.assert_close(seen(protocol, x), expected, rtol=0, atol=1e-5)


def test_the_protocols_give_different_features() -> None:
    x = off_levels(24, 32)
    pools = [network(protocol)(x).pool for protocol in (ADM, PYTORCH_FID, IBQ)]
    assert not torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[1], pools[2])


def test_own_protocols_use_the_sizes_and_offsets_of_their_networks() -> None:
    x = torch.zeros(1, 3, 8, 8)  # level 127.5, which rounds to the even 128
    assert seen(EFFLITE0, x).shape == (1, 3, 224, 224)
    torch.testing.assert_close(seen(EFFLITE0, x).mean(), torch.tensor(1 / 128), rtol=0, atol=1e-6)
    assert seen(TORCHVISION, x).shape == (1, 3, 299, 299)
    torch.testing.assert_close(seen(TORCHVISION, x).mean(), torch.tensor(0.5 / 127.5), rtol=0, atol=1e-6)


def save_reference(file: Path, **change: Any) -> Path:
    covariance = np.cov(np.random.default_rng(0).normal(size=(20, 4)), rowvar=False)
    np.savez(file, **{"mu": np.arange(4.0), "sigma": covariance, "arr_0": np.zeros((2, 8, 8, 3), np.uint8), **change})
    return file


def test_adm_reference(tmp_path: Path) -> None:
    file = save_reference(tmp_path / "reference.npz", mu=np.arange(4, dtype=np.float32))
    reference = load_adm_reference(file)
    assert reference.name == "reference.npz"
    assert reference.mean.dtype == reference.covariance.dtype == torch.float64
    assert reference.mean.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(reference.covariance.numpy(), np.load(file)["sigma"])
    assert reference.num_images is None
    assert reference.network is None
    assert reference.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def test_objects_beside_the_statistics_are_never_read(tmp_path: Path) -> None:
    file = save_reference(tmp_path / "reference.npz", arr_0=np.array([{"a": 1}], dtype=object))
    assert load_adm_reference(file).mean.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.array([{"a": 1}], dtype=object)}, r"is damaged or no \.npz of numbers: Object arrays"),
        ({"mu": np.arange(5.0)}, r"sigma \[D, D\]; sigma is \[4, 4\]"),
        ({"mu": np.zeros((2, 4))}, r"mu must be \[D\] and sigma \[D, D\]; mu is \[2, 4\]"),
        ({"mu": np.float64(1)}, r"mu is \[\]"),
        ({"mu": np.arange(4)}, "mu must hold floats, not int64"),
        ({"sigma": np.full((4, 4), np.nan)}, "sigma holds NaN or infinity"),
        ({"sigma": np.triu(np.ones((4, 4)))}, "sigma is not symmetric"),
    ],
)
def test_refuses_a_wrong_reference(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = save_reference(tmp_path / "reference.npz", **change)
    with pytest.raises(CheckpointError, match=rf"reference\.npz.*{message}"):
        load_adm_reference(file)


def test_refuses_files_that_are_no_reference(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no reference file .*none\.npz"):
        load_adm_reference(tmp_path / "none.npz")
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"pictures\.npz has no mu and no sigma; its keys: arr_0"):
        load_adm_reference(tmp_path / "pictures.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(CheckpointError, match=r"array\.npy is one array"):
        load_adm_reference(tmp_path / "array.npy")
    whole = save_reference(tmp_path / "whole.npz").read_bytes()
    for name, content in (("cut.npz", whole[: len(whole) // 2]), ("noise.npz", b"noise"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
            load_adm_reference(tmp_path / name)
