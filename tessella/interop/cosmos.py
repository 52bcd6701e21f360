"""The discrete image tokenizers of Cosmos (arXiv 2501.03575): Cosmos-Tokenizer-DI8x8 and DI16x16.

FSQ with 8, 8, 8, 5, 5, 5 levels, in the convention that its code calls 1 + eps. Published as TorchScript archives,
whose tensors are read without running the programs in them.
"""

from __future__ import annotations

from tessella.autoencoders.cosmos import Cosmos
from tessella.interop._vqgan import TAMING, describe, projections, table
from tessella.interop.base import (
    Account,
    Checkpoint,
    ConversionError,
    Converted,
    Options,
    Table,
    count,
    empty_tokenizer,
)  # fmt: skip

LICENCE = "NVIDIA Open Model License"
PAPER = "arXiv 2501.03575"
PROTOCOL = (
    "PSNR, SSIM and FID of reconstructions at the pictures' own size, computed in bfloat16 by the released models"
)
_LEVELS = [8, 8, 8, 5, 5, 5]
_COLOURS = 3
# Constants that a TorchScript archive holds beside the weights.
_CONSTANTS = (
    r"(encoder\.patcher|decoder\.unpatcher)\.(wavelets|_arange)",
    r"quantizer\.(_levels|_basis|implicit_codebook)",
    r"inv_quant\..*",
)


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return (
        "encoder.down.0.block.0.conv1.weight" in checkpoint
        and "encoder.mid.attn_1.q.weight" in checkpoint
        and "post_quant_conv.weight" in checkpoint
        and "quantize.embedding.weight" not in checkpoint
    )


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    account = Account(checkpoint, "a discrete image tokenizer of Cosmos", ignored=_CONSTANTS)
    described = describe(checkpoint, TAMING)
    dim = checkpoint.shape("quant_conv.weight")[0]
    if dim != len(_LEVELS):
        raise ConversionError(f"{checkpoint.file}: the codes have {dim} channels, the published ones {len(_LEVELS)}; "
                              "how many levels each has is no part of the weights")  # fmt: skip
    patch_px = round((described["in_channels"] / _COLOURS) ** 0.5)
    recipe = {
        "autoencoder": {
            "name": "cosmos",
            "in_channels": _COLOURS,
            "channels": described["channels"],
            "multipliers": described["multipliers"],
            "num_downsamples": count(checkpoint, "encoder.down.{index}.downsample.conv.weight"),
            "num_res_blocks": described["num_res_blocks"],
            "latent_dim": described["latent_dim"],
            "patch_px": patch_px,
        },
        "quantizer": {"name": "fsq", "levels": _LEVELS, "convention": "wide"},
        "tokenizer": {"projection": True},
    }
    tokenizer = empty_tokenizer(recipe)
    assert isinstance(tokenizer.autoencoder, Cosmos)
    names: Table = {**table(tokenizer.autoencoder, TAMING), **projections()}
    account.fit(tokenizer, names)
    account.close()
    side = tokenizer.autoencoder.stride
    return Converted(f"Cosmos-Tokenizer-DI{side}x{side}", tokenizer)
