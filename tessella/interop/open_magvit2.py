"""The image tokenizers of Open-MAGVIT2 (arXiv 2409.04410): SimVQ's names, adaptive norms, and signs for codes."""

from __future__ import annotations

from dataclasses import replace

from tessella.autoencoders.open_magvit2 import OpenMAGVIT2
from tessella.interop._vqgan import describe, table
from tessella.interop.base import TRAINING, Account, Checkpoint, Converted, Options, empty_tokenizer, take
from tessella.interop.simvq import NAMING

LICENCE = "Apache-2.0"
PAPER = "arXiv 2409.04410"
PROTOCOL = (
    "ImageNet validation, 50,000 pictures at 128 or 256 px: FID of Inception-v3 features of float pictures in [0, 1], "
    "PSNR and SSIM of 8-bit pictures cut off; usage over the whole set; moving averages of the weights"
)


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return "decoder.adaptive.0.gamma.weight" in checkpoint


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    account = Account(checkpoint, "an image tokenizer of Open-MAGVIT2", ignored=TRAINING)
    described = describe(checkpoint, NAMING)
    wanted = ("in_channels", "channels", "multipliers", "num_res_blocks", "latent_dim")
    dim = described["latent_dim"]
    recipe = {
        "autoencoder": {"name": "open_magvit2", **{key: described[key] for key in wanted}},
        "quantizer": {"name": "lfq", "dim": dim},
        "tokenizer": {"projection": False},
    }
    tokenizer = empty_tokenizer(recipe)
    autoencoder = tokenizer.autoencoder
    assert isinstance(autoencoder, OpenMAGVIT2)
    middle = tuple(f"mid_block.{index}" for index in range(described["num_res_blocks"]))
    names = table(autoencoder, replace(NAMING, middle=middle))
    for place in range(len(autoencoder.styles)):
        level = len(autoencoder.styles) - 1 - place
        for part in ("gamma", "beta"):
            for tensor in ("weight", "bias"):
                names[f"autoencoder.styles.{place}.{part}.{tensor}"] = take(f"decoder.adaptive.{level}.{part}.{tensor}")
    account.fit(tokenizer, names)
    account.close()
    return Converted(f"Open-MAGVIT2 {2**dim}", tokenizer, weights=account.weights)
