"""VQGAN as released with taming-transformers (arXiv 2012.09841), and by latent diffusion under the same names."""

from __future__ import annotations

from tessella.interop._vqgan import TAMING, describe, projections, table
from tessella.interop.base import TRAINING, Account, Checkpoint, Converted, Options, empty_tokenizer, take
from tessella.registry import Spec

LICENCE = "MIT (of the code the weights were released with)"
PAPER = "arXiv 2012.09841"
PROTOCOL = (
    "FID of reconstructions of the 50,000 ImageNet validation pictures at 256 px against the originals; the decoder's "
    "output clamped to [-1, 1]"
)
_FIRST = "encoder.down.0.block.0.conv1.weight"
_LAST_OF_IBQ = "encoder.down.0.block.3.conv1.weight"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return is_vqgan(checkpoint) and not is_ibq(checkpoint)


def is_vqgan(checkpoint: Checkpoint) -> bool:
    """Whether these are the names of a VQGAN with a learned codebook."""
    return all(name in checkpoint for name in (_FIRST, "encoder.mid.block_1.conv1.weight", "quantize.embedding.weight"))


def is_ibq(checkpoint: Checkpoint) -> bool:
    """IBQ has the names of VQGAN, but is deeper, and keeps moving averages."""
    return _LAST_OF_IBQ in checkpoint or checkpoint.has_average


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    account = Account(checkpoint, "a VQGAN of taming-transformers", ignored=TRAINING)
    size, dim = checkpoint.shape("quantize.embedding.weight")
    converted = read_vqgan(account, {"name": "vq", "codebook_size": size, "dim": dim}, f"VQGAN-{size}")
    account.close()
    return converted


def read_vqgan(account: Account, quantizer: Spec, name: str) -> Converted:
    """A tokenizer with a codebook, 1 x 1 convolutions around it, and VQGAN's names."""
    recipe = {
        "autoencoder": {"name": "conv", **describe(account.checkpoint, TAMING)},
        "quantizer": quantizer,
        "tokenizer": {"projection": True},
    }
    tokenizer = empty_tokenizer(recipe)
    names = {
        **table(tokenizer.autoencoder, TAMING),
        **projections(),
        "quantizer.embedding": take("quantize.embedding.weight"),
    }
    account.fit(tokenizer, names)
    return Converted(name, tokenizer, weights=account.weights)
