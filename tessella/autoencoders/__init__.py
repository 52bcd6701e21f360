"""Every autoencoder, one family a file."""

from __future__ import annotations

from tessella.autoencoders.base import Autoencoder
from tessella.autoencoders.conv import Conv
from tessella.autoencoders.cosmos import Cosmos
from tessella.autoencoders.maskgit_vqgan import MaskGITVQGAN
from tessella.autoencoders.open_magvit2 import OpenMAGVIT2
from tessella.autoencoders.seanet import SEANet
from tessella.autoencoders.spectral import Spectral
from tessella.autoencoders.titok import TiTok
from tessella.autoencoders.titok_proxy import TiTokProxy
from tessella.autoencoders.uvim import UViM
from tessella.autoencoders.uvim_no_code import UViMNoCode
from tessella.autoencoders.vit import ViT
from tessella.autoencoders.vocos import Vocos

__all__ = [
    "Autoencoder", "Conv", "Cosmos", "MaskGITVQGAN", "OpenMAGVIT2", "SEANet", "Spectral", "TiTok", "TiTokProxy",
    "UViM", "UViMNoCode", "ViT", "Vocos",
]  # fmt: skip
