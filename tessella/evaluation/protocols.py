"""The variants of the Frechet distance that papers report, by name; one picture set has a different value in each."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from tessella.checkpoint import CheckpointError
from tessella.evaluation.features import FeatureProtocol
from tessella.evaluation.reference import ReferenceStatistics

ADM = FeatureProtocol(
    name="adm",
    network="inception_v3_fid",
    pixels="uint8",
    resize="tf1_bilinear",
    offset=128.0,
    scale=128.0,
    label="",
)
"""The evaluator of ADM (Dhariwal and Nichol, arXiv 2105.05233), hence LlamaGen's: 8-bit pictures against its own
reference statistics (:func:`load_adm_reference`). Its graph is the original TensorFlow one, resizing included."""

PYTORCH_FID = FeatureProtocol(
    name="pytorch-fid",
    network="inception_v3_fid",
    pixels="uint8",
    resize="bilinear",
    offset=127.5,
    scale=127.5,
    label="",
)
"""The package pytorch-fid on PNG files: 8-bit pictures, resized with half-pixel centres and without antialiasing."""

IBQ = FeatureProtocol(
    name="ibq",
    network="inception_v3_fid",
    pixels="float",
    resize="bilinear",
    offset=127.5,
    scale=127.5,
    label="",
)
"""The rFID of IBQ (arXiv 2412.02692) and SimVQ (arXiv 2411.02038): pytorch-fid's network on float pictures in [0, 1],
which never were rounded to 8 bits. Their PSNR and SSIM are of truncated 8-bit pictures."""

TORCHVISION = FeatureProtocol(
    name="torchvision",
    network="inception_v3_torchvision",
    pixels="uint8",
    resize="bilinear_antialias",
    offset=127.5,
    scale=127.5,
    label="TVInceptionV3",
)
"""torchvision's Inception-v3, where only its weights can be had. No FID: another architecture, other weights."""

EFFLITE0 = FeatureProtocol(
    name="efflite0",
    network="efficientnet_lite0",
    pixels="uint8",
    resize="bicubic_pil",
    offset=127.0,
    scale=128.0,
    label="EffLite0",
)
"""EfficientNet-Lite0, an ImageNet classifier of 9 MB, where no Inception weights can be had. No FID."""

PROTOCOLS = {protocol.name: protocol for protocol in (ADM, PYTORCH_FID, IBQ, TORCHVISION, EFFLITE0)}


def find_protocol(name: str) -> FeatureProtocol:
    """The protocol called ``name``.

    Raises:
        ValueError: there is none; the message lists the choices.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; choose one of: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def load_adm_reference(file: str | Path) -> ReferenceStatistics:
    """``mu [D]`` and ``sigma [D, D]`` of a reference ``.npz`` of ADM's evaluator.

    Only these two are read; objects in the file are refused. The file does not say of how many pictures they are.

    Raises:
        CheckpointError: missing or damaged file, no ``mu`` or ``sigma``, wrong shapes, values that are not finite, or a
            ``sigma`` that is not symmetric; the message names file and key.
    """
    path = Path(file)
    if not path.is_file():
        raise CheckpointError(f"no reference file {path}")
    try:
        with path.open("rb") as stream:
            fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
            stream.seek(0)
            mean, covariance = _read_reference(path, stream)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged or no .npz of numbers: {error}") from error
    _check_reference(path, mean, covariance)
    return ReferenceStatistics(
        name=path.name,
        mean=torch.from_numpy(mean.astype(np.float64)),
        covariance=torch.from_numpy(covariance.astype(np.float64)),
        num_images=None,
        fingerprint=fingerprint,
        network=None,
    )


def _read_reference(path: Path, stream: BinaryIO) -> list[np.ndarray]:
    archive = np.load(stream, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise CheckpointError(f"{path} is one array; a reference .npz holds mu and sigma")
    with archive:
        missing = [key for key in ("mu", "sigma") if key not in archive]
        if missing:
            raise CheckpointError(f"{path} has no {' and no '.join(missing)}; its keys: {', '.join(archive)}")
        return [np.asarray(archive[key]) for key in ("mu", "sigma")]


def _check_reference(path: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    for key, value, ndim in (("mu", mean, 1), ("sigma", covariance, 2)):
        if value.dtype.kind != "f":
            raise CheckpointError(f"{path}: {key} must hold floats, not {value.dtype}")
        if value.ndim != ndim or set(value.shape) != {len(mean)}:
            raise CheckpointError(f"{path}: mu must be [D] and sigma [D, D]; {key} is {list(value.shape)}")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{path}: {key} holds NaN or infinity")
    if not np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-7):
        raise CheckpointError(f"{path}: sigma is not symmetric")
