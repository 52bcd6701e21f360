"""Tokenizer = autoencoder + quantizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from tessella.autoencoders.base import Autoencoder
from tessella.config import Configurable, medium_of
from tessella.described import Described, parts, size
from tessella.quantizers.base import Quantized, Quantizer
from tessella.registry import Spec

if TYPE_CHECKING:
    from tessella.streaming import Stream


@dataclass
class Reconstruction:
    """``x_hat [B, C, *X]`` and what the quantizer said on the way."""

    x_hat: Tensor
    quantized: Quantized


@dataclass(frozen=True)
class TokenSpace:
    """All a generator needs to know of a tokenizer: latent grid S, K codebooks of V codes, and who made the tokens."""

    grid: tuple[int, ...]
    num_codebooks: int
    codebook_size: int
    fingerprint: str

    def __post_init__(self) -> None:
        """A grid read from a file is a list."""
        object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def sequence_length(self) -> int:
        """N = prod(S) * K."""
        return math.prod(self.grid) * self.num_codebooks


class Tokenizer(Described, Configurable, nn.Module):
    """Signals to tokens and back.

    Args:
        autoencoder: gives latents ``[B, *S, E]``.
        quantizer: works on ``[B, *S, D]``.
        projection: linear maps E -> D before and D -> E after the quantizer (the 1x1 convolutions around it in the
            VQGAN family); without them E must equal D.
    """

    recipe: Spec | None = None  # the whole recipe of the training run, if there was one; `save` keeps it

    def __init__(self, autoencoder: Autoencoder, quantizer: Quantizer, *, projection: bool = True) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.quantizer = quantizer
        features, dim = autoencoder.latent_dim, quantizer.dim
        if not projection and features != dim:
            raise ValueError(
                f"without projection the autoencoder's latent_dim ({features}) must equal the quantizer's dim ({dim})"
            )
        self.to_code: nn.Module = nn.Linear(features, dim) if projection else nn.Identity()
        self.from_code: nn.Module = nn.Linear(dim, features) if projection else nn.Identity()

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, context: Tensor | None = None) -> Reconstruction:
            """See :meth:`forward`."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Reconstruction:
        """The training path: ``x [B, C, *X]`` in [-1, 1] to its reconstruction, gradients included.

        Args:
            x: the signal.
            context: ``[B, ...]``, what encoder and decoder both see, for autoencoders that take one (UViM's picture).

        Raises:
            ValueError: a context that the autoencoder does not take, or none where it needs one.
        """
        quantized = self.quantizer(self._latents(x, context))
        return Reconstruction(self._signal(quantized.z_q, context), quantized)

    @torch.no_grad()
    def encode(self, x: Tensor, context: Tensor | None = None, *, pad: bool = False) -> Tensor:
        """Indices ``[B, *S, K]`` of ``x [B, C, *X]``.

        Args:
            x: the signal, in [-1, 1].
            context: see :meth:`forward`.
            pad: repeat the last samples until every side is a multiple of the stride, instead of refusing others.
        """
        indices: Tensor = self.quantizer(self._latents(self.pad(x) if pad else x, context)).indices
        return indices

    @torch.no_grad()
    def decode(self, indices: Tensor, context: Tensor | None = None, *, extent: Sequence[int] | None = None) -> Tensor:
        """``x_hat [B, C, *X]`` of indices ``[B, *S, K]``; equals what ``forward`` shows in eval mode.

        Args:
            indices: int64 in ``[0, V)``.
            context: see :meth:`forward`.
            extent: the size to crop to, where the signal was padded.
        """
        x_hat = self._signal(self.quantizer.indices_to_codes(indices), context)
        if extent is None:
            return x_hat
        window: list[slice] = [slice(None), slice(None), *map(slice, extent)]
        return x_hat[tuple(window)]

    @overload
    def reconstruct(self, signal: Tensor, *, out: str | Path | None = None) -> Tensor: ...
    @overload
    def reconstruct(self, signal: Any, *, out: str | Path | None = None) -> Any: ...
    def reconstruct(self, signal: Any, *, out: str | Path | None = None) -> Any:
        """What is left of a signal of any size, encoded and decoded in eval mode and without gradients.

        Args:
            signal: the path of a file; a tensor ``[C, *X]`` in [-1, 1]; or what else the medium of this tokenizer
                accepts, see :meth:`tessella.media.base.Medium.accept`.
            out: also write it to this file.

        Returns:
            ``[C, *X]`` for a tensor, on its device; of anything else what
            :meth:`tessella.media.base.Medium.present` makes of it.

        Raises:
            DataError: the file is none of this medium, or damaged.
            TypeError: something that the medium does not accept.
            ValueError: another number of channels, ``out`` with another ending than the medium's files have, or an
                autoencoder that needs a context beside the signal.
        """
        medium = medium_of(self.recipe)
        if out is not None and Path(out).suffix != medium.suffix:
            raise ValueError(f"out must end in {medium.suffix}, got {out}")
        x: Tensor = medium.accept(signal)
        with self.inference():
            indices = self.encode(x[None].to(self.device), pad=True)
            x_hat = self.decode(indices, extent=x.shape[1:])[0].to(x.device)
        if out is not None:
            medium.write(x_hat, Path(out))
        return x_hat if isinstance(signal, Tensor) else medium.present(x_hat)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Eval mode, whatever mode it is in, and no gradients."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    def pad(self, x: Tensor) -> Tensor:
        """``x`` with its last samples repeated until every side is a multiple of the stride."""
        missing = [-size % self.autoencoder.stride for size in x.shape[2:]]
        widths = [width for size in reversed(missing) for width in (0, size)]
        return nn.functional.pad(x, widths, mode="replicate") if any(missing) else x

    def token_space(self, *extent: int) -> TokenSpace:
        """The tokens of a signal of ``extent`` samples along each axis."""
        from tessella.checkpoint import fingerprint

        grid = self.autoencoder.latent_grid(*extent)
        return TokenSpace(grid, self.quantizer.num_codebooks, self.quantizer.codebook_size, fingerprint(self))

    @property
    def bits_per_sample(self) -> float:
        """Length of the tokens as fixed-length codes: ``K log2(V) prod(S) / prod(X)`` bits for each of the X.

        Where the number of tokens does not grow with the signal, that of a signal of one stride.
        """
        axes, stride = self.autoencoder.num_axes, self.autoencoder.stride
        positions = math.prod(self.autoencoder.latent_grid(*[stride] * axes))
        bits = positions * self.quantizer.num_codebooks * math.log2(self.quantizer.codebook_size)
        return bits / math.prod([stride] * axes)

    def facts(self) -> dict[str, str]:
        """See :class:`Described`."""
        autoencoder, quantizer = self.autoencoder, self.quantizer
        several = f"{quantizer.num_codebooks} codebooks of " if quantizer.num_codebooks > 1 else ""
        facts = {
            "autoencoder": f"{type(autoencoder).__name__}, in_channels {autoencoder.in_channels}, "
                           f"stride {autoencoder.stride}: {parts(autoencoder)}",
            "quantizer": f"{type(quantizer).__name__}, {several}{quantizer.codebook_size:,} codes, {quantizer.dim} "
                         f"dimensions: {size(quantizer)}",
            "in all": size(self),
        }  # fmt: skip
        with suppress(NotImplementedError):
            metrics = medium_of(self.recipe).metrics()
            rate = self.bits_per_sample * metrics.bits_scale
            facts["tokens"] = f"{rate:.4g} {metrics.bits_name.replace('_', ' ')}, as codes of fixed length"
        return facts

    def stream(self, *, chunk: int = 750, context: int | None = None) -> Stream:
        """Encoding and decoding of one-dimensional signals of any length in chunks; see :class:`Stream`."""
        from tessella.streaming import Stream

        return Stream(self, chunk=chunk, context=context)

    def save(self, path: str | Path) -> None:
        """Write weights and resolved recipe into the folder ``path``; :func:`tessella.load` reads it back."""
        from tessella.checkpoint import save_model

        save_model(self, Path(path))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.autoencoder.parameters()).device

    def _latents(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.autoencoder.encode(x, *self._beside(context))
        if h.shape[-1] != self.autoencoder.latent_dim:
            raise ValueError(
                f"{type(self.autoencoder).__name__}.encode gave {list(h.shape)}; latents are channels-last, [B, *S, E] "
                f"with E = latent_dim = {self.autoencoder.latent_dim}"
            )
        z: Tensor = self.to_code(h)
        return z

    def _signal(self, z_q: Tensor, context: Tensor | None) -> Tensor:
        code = self.autoencoder.code_dropout(z_q) if self.training else z_q
        return self.autoencoder.decode(self.from_code(code), *self._beside(context))

    def _beside(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """The context as a further argument of the autoencoder."""
        takes, kind = self.autoencoder.takes_context, type(self.autoencoder).__name__
        if takes != (context is not None):
            raise ValueError(f"{kind} needs a context beside the signal" if takes else f"{kind} takes no context")
        return () if context is None else (context,)
