"""Generators: next-token, masked, coarse-to-fine, and over the digits of codes."""

from __future__ import annotations

from tessella.generators.ar import AR
from tessella.generators.base import Generator, Guidance, Loss
from tessella.generators.coarse_to_fine import CoarseToFine
from tessella.generators.digits import Digits
from tessella.generators.masked_bits import MaskedBits
from tessella.generators.maskgit import MaskGIT

__all__ = ["AR", "CoarseToFine", "Digits", "Generator", "Guidance", "Loss", "MaskGIT", "MaskedBits"]
