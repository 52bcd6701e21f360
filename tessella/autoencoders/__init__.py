"""Every autoencoder, one family a file."""

from __future__ import annotations

from tessella.autoencoders.base import Autoencoder
from tessella.autoencoders.conv import Conv
from tessella.autoencoders.seanet import SEANet
from tessella.autoencoders.vit import ViT
from tessella.autoencoders.vocos import Vocos

__all__ = ["Autoencoder", "Conv", "SEANet", "ViT", "Vocos"]
