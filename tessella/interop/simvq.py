"""The tokenizers of SimVQ (arXiv 2411.02038): of pictures here, of sound in :mod:`tessella.interop.simvq_audio`.

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
from tessella.interop.simvq_audio import is_audio, read_audio

LICENCE = "MIT"
PAPER = "arXiv 2411.02038"
PROTOCOL = (
    "pictures: ImageNet validation, 50,000 at 128 px: FID of Inception-v3 features of floats in [0, 1], PSNR of "
    "each batch, SSIM of 8-bit pictures cut off; usage over the whole set; sound: LibriTTS test-clean and "
    "test-other, UTMOS at 16 kHz, wide-band PESQ, STOI, F1 of voicing; moving averages of the weights"
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
    if is_audio(checkpoint):
        return read_audio(checkpoint)
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
