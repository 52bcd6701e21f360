"""The image tokenizers of SimVQ (arXiv 2411.02038).

The frozen basis of the codes is no trained weight, so it alone has no moving average and comes from the plain key.
"""

from __future__ import annotations

from tessella.interop._vqgan import Naming, describe, table
from tessella.interop.base import (
    TRAINING,
    Account,
    Checkpoint,
    ConversionError,
    Converted,
    Options,
    empty_tokenizer,
    take,
)  # fmt: skip

LICENCE = "MIT"
PAPER = "arXiv 2411.02038"
PROTOCOL = (
    "ImageNet validation, 50,000 pictures at 128 px: FID of Inception-v3 features of float pictures in [0, 1], PSNR of "
    "each batch, SSIM of 8-bit pictures cut off; usage over the whole set; moving averages of the weights"
)
_BASIS = "quantize.embedding.weight"
# The names of Open-MAGVIT2, which is where this autoencoder comes from.
NAMING = Naming(
    downsample="encoder.down.{level}.downsample",
    upsample="decoder.up.{level}.upsample.conv1",
    middle=("mid_block.0", "mid_block.1"),
)


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return "quantize.embedding_proj.weight" in checkpoint


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    if "encoder.model.0.conv.conv.bias" in checkpoint:
        raise ConversionError(f"{checkpoint.file} is an audio tokenizer of SimVQ; only its image tokenizers can be "
                              "converted yet")  # fmt: skip
    account = Account(checkpoint, "an image tokenizer of SimVQ", ignored=TRAINING, plain=frozenset({_BASIS}))
    if _BASIS not in checkpoint.tensors:
        raise ConversionError(
            f"{checkpoint.file} has no tensor {_BASIS!r}: without the frozen basis there are no codes"
        )
    size, dim = checkpoint.shape(_BASIS)
    recipe = {
        "autoencoder": {"name": "conv", **magvit_settings(checkpoint)},
        "quantizer": {"name": "simvq", "codebook_size": size, "dim": dim},
        "tokenizer": {"projection": False},
    }
    tokenizer = empty_tokenizer(recipe)
    names = {
        **table(tokenizer.autoencoder, NAMING),
        "quantizer.basis": take(_BASIS),
        "quantizer.projection.weight": take("quantize.embedding_proj.weight"),
        "quantizer.projection.bias": take("quantize.embedding_proj.bias"),
    }
    account.fit(tokenizer, names)
    account.close()
    return Converted(f"SimVQ-{size}", tokenizer, weights=account.weights)


def magvit_settings(checkpoint: Checkpoint) -> dict[str, object]:
    """The arguments of ``Conv``: those that shapes tell, and those that are the same in all of them."""
    return {
        **describe(checkpoint, NAMING), "mid_attention": False, "downsample": "strided",
        "upsample": "depth_to_space", "bias": False, "out_kernel": 1,
    }  # fmt: skip
