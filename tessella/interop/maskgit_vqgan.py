"""MaskGIT's tokenizer (arXiv 2202.04200), as the 1d-tokenizer project released it for PyTorch."""

from __future__ import annotations

from tessella.autoencoders.maskgit_vqgan import MaskGITVQGAN
from tessella.interop._vqgan import Naming, describe, table
from tessella.interop.base import Account, Checkpoint, Converted, Options, Table, empty_tokenizer, take

LICENCE = "Apache-2.0"
PAPER = "arXiv 2202.04200"
PROTOCOL = "FID of reconstructions of the 50,000 ImageNet validation pictures at 256 px, clamped to [0, 1], 8-bit"
NAMING = Naming(
    upsample="decoder.up.{level}.upsample_conv",
    middle=("mid.0", "mid.1"),
)
_SETTINGS = ("in_channels", "channels", "multipliers", "num_res_blocks", "latent_dim")


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return "encoder.down.0.block.0.conv1.weight" in checkpoint and "encoder.mid.0.conv1.weight" in checkpoint


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    account = Account(checkpoint, "the tokenizer of MaskGIT")
    described = describe(checkpoint, NAMING)
    size, dim = checkpoint.shape("quantize.embedding.weight")
    recipe = {
        "autoencoder": {"name": "maskgit_vqgan", **{key: described[key] for key in _SETTINGS}},
        "quantizer": {"name": "vq", "codebook_size": size, "dim": dim},
        "tokenizer": {"projection": False},
    }
    tokenizer = empty_tokenizer(recipe)
    assert isinstance(tokenizer.autoencoder, MaskGITVQGAN)
    names: Table = {
        **table(tokenizer.autoencoder, NAMING),
        "quantizer.embedding": take("quantize.embedding.weight"),
    }
    account.fit(tokenizer, names)
    account.close()
    return Converted(f"MaskGIT-VQGAN {size}", tokenizer)
