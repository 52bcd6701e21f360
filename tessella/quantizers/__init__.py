"""Every quantizer, one method a file."""

from __future__ import annotations

from tessella.quantizers.base import Quantized, Quantizer
from tessella.quantizers.bsq import BSQ
from tessella.quantizers.ema import EMAVQ
from tessella.quantizers.fsq import FSQ
from tessella.quantizers.grouped import Grouped
from tessella.quantizers.gumbel import GumbelVQ
from tessella.quantizers.ibq import IBQ
from tessella.quantizers.lfq import LFQ
from tessella.quantizers.residual import Residual
from tessella.quantizers.residual_dropout import ResidualDropout
from tessella.quantizers.scq import SCQ
from tessella.quantizers.simvq import SimVQ
from tessella.quantizers.uvim_vq import UViMVQ
from tessella.quantizers.vq import VQ

__all__ = [
    "BSQ",
    "EMAVQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "SCQ",
    "VQ",
    "Grouped",
    "GumbelVQ",
    "Quantized",
    "Quantizer",
    "Residual",
    "ResidualDropout",
    "SimVQ",
    "UViMVQ",
]
