"""Tokenizing signals of any length, a chunk at a time, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tessella.autoencoders.base import Memory
from tessella.tokenizer import Tokenizer

_CONTEXT = 75


class Stream:
    """One-dimensional signals through a tokenizer in chunks: :meth:`encode` and :meth:`decode` are generators.

    A causal half (:attr:`Autoencoder.chunks_encoder`, :attr:`~Autoencoder.chunks_decoder`) goes on from what it
    remembers, and gives exactly what it gives of the whole. Any other sees ``context`` latent positions on both sides
    of each chunk, which are then cut off: that is as exact where the model reaches no further
    (:attr:`Autoencoder.reach`); otherwise its result differs near the cuts as far as positions further away matter.

    Args:
        tokenizer: of signals ``[B, C, T]``; used in eval mode, whatever mode it is in, and without gradients.
        chunk: latent positions at a time.
        context: further ones on both sides, where they are needed; as far as the model reaches by default, or 75.

    Raises:
        ValueError: a chunk below the first that the model can begin with, or a negative context.
    """

    def __init__(self, tokenizer: Tokenizer, *, chunk: int = 750, context: int | None = None) -> None:
        reach = tokenizer.autoencoder.reach
        context = (_CONTEXT if reach is None else reach) if context is None else context
        least = tokenizer.autoencoder.first_chunk
        if chunk < least or context < 0:
            raise ValueError(f"chunk must be at least {least} and context at least 0, got {chunk} and {context}")
        self.tokenizer = tokenizer
        self.chunk = chunk
        self.context = context

    def encode(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Indices ``[B, t, K]`` of a signal that comes in pieces ``[B, C, T']`` of any lengths.

        Together they are ``tokenizer.encode(whole, pad=True)``; see the class.
        """
        tokenizer, stride = self.tokenizer, self.tokenizer.autoencoder.stride
        if tokenizer.autoencoder.chunks_encoder:
            memory: Memory = {}
            for x in _regrouped(pieces, self.chunk * stride):
                with self.tokenizer.inference():
                    latent = tokenizer.autoencoder.encode_chunk(tokenizer.pad(x), memory)
                    indices = tokenizer.quantizer(tokenizer.to_code(latent)).indices
                yield indices
            return
        for x, before, kept in _windows(pieces, self.chunk * stride, self.context * stride):
            with self.tokenizer.inference():
                indices = tokenizer.encode(x, pad=True)
            first, count = before // stride, -(-kept // stride)
            yield indices[:, first : first + count]

    def decode(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The signal ``[B, C, T']``, piece by piece, of indices that come in pieces ``[B, t, K]`` of any lengths."""
        autoencoder = self.tokenizer.autoencoder
        turned = (piece.movedim(1, -1) for piece in pieces)
        if autoencoder.chunks_decoder:
            memory: Memory = {}
            for indices in _regrouped(turned, self.chunk):
                with self.tokenizer.inference():
                    x_hat = autoencoder.decode_chunk(self._latents(indices), memory)
                yield x_hat
            return
        for indices, before, kept in _windows(turned, self.chunk, self.context):
            with self.tokenizer.inference():
                x_hat = autoencoder.decode(self._latents(indices))
            yield x_hat[..., before * autoencoder.stride : (before + kept) * autoencoder.stride]

    def _latents(self, indices: Tensor) -> Tensor:
        """Of ``[B, K, t]``."""
        codes = self.tokenizer.quantizer.indices_to_codes(indices.movedim(-1, 1))
        latent: Tensor = self.tokenizer.from_code(codes)
        return latent


def _regrouped(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """What the pieces ``[..., T']`` hold in pieces of ``size``; the last one has up to twice as much.

    A last piece shorter than ``size`` is joined to the one before, so that the first piece is never short unless all of
    the signal is.
    """
    held: list[Tensor] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += piece.shape[-1]
        if length >= 2 * size:
            joined = torch.cat(held, -1)
            while length >= 2 * size:
                yield joined[..., :size]
                joined, length = joined[..., size:], length - size
            held = [joined]
    if length:
        yield torch.cat(held, -1)


def _windows(pieces: Iterable[Tensor], size: int, context: int) -> Iterator[tuple[Tensor, int, int]]:
    """Windows of the signal with up to ``context`` samples around them, how many are before, and how many count."""
    past: Tensor | None = None
    waiting: Tensor | None = None  # what counts next, and does not know yet what follows it

    def window(body: Tensor, after: Tensor | None) -> tuple[Tensor, int, int]:
        before = 0 if past is None else past.shape[-1]
        parts = [part for part in (past, body, None if after is None else after[..., :context]) if part is not None]
        return torch.cat(parts, -1), before, body.shape[-1]

    for body in _regrouped(pieces, max(size, context)):
        if waiting is not None:
            yield window(waiting, body)
            joined = waiting if past is None else torch.cat([past, waiting], -1)
            past = joined[..., max(joined.shape[-1] - context, 0) :] if context else None
        waiting = body
    if waiting is not None:
        yield window(waiting, None)
