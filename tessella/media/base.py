"""The protocol of a medium."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from tessella.config import Configurable
from tessella.errors import ConfigError
from tessella.evaluation.base import Metrics
from tessella.evaluation.features import FeatureNetwork
from tessella.reporting.page import Picture, Section


class Coded(NamedTuple):
    """What a codec makes of a signal: what comes back, and how many bits its file has, header included."""

    x_hat: Tensor
    bits: int


# Of a signal [C, *X] the best file of at most so many bits, or the smallest where none is as small.
Codec = Callable[[Tensor, float], Coded]


class Medium(Configurable, ABC):
    """What x ``[C, *X]`` in [-1, 1] is: everything a command does with a signal beside encoding and decoding it.

    A data source names its medium, and a run's recipe keeps it as ``[medium]``.

    Attributes:
        unit: what a rate counts, a plural: "images", "seconds".
    """

    unit: ClassVar[str]

    @property
    @abstractmethod
    def suffix(self) -> str:
        """Of the files that :meth:`write` makes, with the dot."""

    @abstractmethod
    def units(self, x: Tensor) -> float:
        """How many of :attr:`unit` a batch ``x [B, C, *X]`` holds."""

    @abstractmethod
    def read(self, path: Path) -> Tensor:
        """The signal ``[C, *X]`` in a file.

        Raises:
            DataError: it is none, or a damaged one; the message names the file.
        """

    @abstractmethod
    def write(self, x: Tensor, path: Path) -> None:
        """Write a signal ``[C, *X]`` to a file that ends in :attr:`suffix` and appears complete or not at all."""

    def accept(self, signal: Any) -> Tensor:
        """The signal ``[C, *X]`` in what a caller has: the path of a file, or the tensor itself.

        Raises:
            DataError: see :meth:`read`.
            TypeError: neither of the two.
        """
        if isinstance(signal, Tensor):
            return signal
        if isinstance(signal, (str, os.PathLike)):
            return self.read(Path(signal))
        raise TypeError(f"expected a file's path or a tensor [C, *X], got {type(signal).__name__}")

    def present(self, x: Tensor) -> Any:
        """A signal ``[C, *X]`` in the form in which other programs expect one: the tensor, unless overridden."""
        return x

    def write_pieces(self, pieces: Iterable[Tensor], path: Path) -> None:
        """:meth:`write` of a signal of one axis in pieces ``[C, T']``; a medium of long signals holds one at a time."""
        self.write(torch.cat(list(pieces), -1), path)

    @abstractmethod
    def metrics(self, *, weights: Path | None = None, **options: Any) -> Metrics:
        """What a reconstruction is scored by.

        Args:
            weights: folder with the weights of perceptual metrics; these are left out without it.
            options: further choices of the medium.

        Raises:
            ConfigError: an unknown option, or a value out of range.
        """

    def feature_network(self, protocol: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
        """The network between whose features distances of distributions are taken.

        Args:
            protocol: see :data:`tessella.evaluation.protocols.PROTOCOLS`.
            weights: of the network, or a folder that holds them.
            device: where to put it.

        Raises:
            ConfigError: unknown protocol, no weights given, or a medium that has no such networks.
            CheckpointError: weights that do not fit.
        """
        raise ConfigError(f"no network is known that tells distributions of {self.unit} apart")

    @abstractmethod
    def show(self, x: Tensor, x_hat: Tensor, indices: Tensor, codebook: Tensor | None, keys: Sequence[str]) -> Section:
        """A report's section of signals ``x``, their reconstructions ``x_hat`` (both ``[B, C, *X]``) and tokens.

        Args:
            x: the originals.
            x_hat: what became of them.
            indices: ``[B, *S, K]``.
            codebook: ``[V, D]`` or ``[K, V, D]``, from which tokens get their colours; None where it is too large.
            keys: the signals' names.
        """

    def show_with_context(
        self, x: Tensor, x_hat: Tensor, context: Tensor, indices: Tensor, codebook: Tensor | None, keys: Sequence[str]
    ) -> Section:
        """:meth:`show` where encoder and decoder also saw ``context [B, ...]``; a medium that can shows it too."""
        return self.show(x, x_hat, indices, codebook, keys)

    def codecs(self) -> dict[str, Codec]:
        """Codecs of everyday use that can be had here, by name: yardsticks for tokenizers."""
        return {}

    def show_versions(
        self, x: Sequence[Tensor], versions: Mapping[str, Sequence[Tensor]], keys: Sequence[str]
    ) -> Section:
        """A report's section of signals and what several tokenizers make of each.

        Args:
            x: originals ``[C, *X]``, which may differ in size.
            versions: name -> reconstructions of the same sizes.
            keys: the signals' names.
        """
        extent = [min(signal.shape[axis] for signal in x) for axis in range(1, x[0].ndim)]
        window = (slice(None), *map(slice, extent))
        rows = [torch.stack([signal[window] for signal in signals]) for signals in (x, *versions.values())]
        with tempfile.TemporaryDirectory() as folder:
            picture = np.asarray(PIL.Image.open(self.preview(rows, Path(folder) / "versions")).convert("RGB"))
        text = f"From above: the originals, then {', '.join(versions)}. The signals are {', '.join(keys)}."
        return Section("Side by side", text, [Picture("versions", picture, "Originals, and below them the versions.")])

    @abstractmethod
    def show_samples(self, real: Mapping[str, Tensor], generated: Mapping[str, Tensor], settings: str) -> Section:
        """A report's section of real and generated signals side by side.

        Args:
            real: class -> ``[n, C, *X]`` that no model has seen; a class may have none.
            generated: class -> samples ``[m, C, *X]``.
            settings: how they were drawn.
        """

    @abstractmethod
    def preview(self, rows: Sequence[Tensor], stem: Path) -> Path:
        """Write one picture file that shows rows of signals ``[n, C, *X]``; returns ``stem`` with its ending."""
