"""Generators: next-token, masked, coarse-to-fine, over the digits of codes, and across from a condition."""

from __future__ import annotations

from tessella.generators.ar import AR
from tessella.generators.base import Generator, Guidance, Loss
from tessella.generators.coarse_to_fine import CoarseToFine
from tessella.generators.digits import Digits
from tessella.generators.encoder_decoder import EncoderDecoder
from tessella.generators.masked_bits import MaskedBits
from tessella.generators.maskgit import MaskGIT

__all__ = ["AR", "CoarseToFine", "Digits", "EncoderDecoder", "Generator", "Guidance", "Loss", "MaskGIT", "MaskedBits"]
