"""Every autoencoder, one family a file."""

from __future__ import annotations

from tessella.autoencoders.base import Autoencoder
from tessella.autoencoders.conv import Conv
from tessella.autoencoders.uvim import UViM
from tessella.autoencoders.uvim_no_code import UViMNoCode
from tessella.autoencoders.vit import ViT

__all__ = ["Autoencoder", "Conv", "UViM", "UViMNoCode", "ViT"]
