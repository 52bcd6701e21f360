"""The tokenizers of IBQ (arXiv 2412.02692): VQGAN's names, four residual blocks a level, moving averages beside them.

Codes are assigned by the largest dot product, which is not the nearest code. The moving averages are what the paper
evaluates, so they are what is converted.
"""

from __future__ import annotations

from tessella.interop.base import TRAINING, Account, Checkpoint, Converted, Options
from tessella.interop.taming import is_ibq, is_vqgan, read_vqgan

LICENCE = "Apache-2.0"
PAPER = "arXiv 2412.02692"
PROTOCOL = (
    "ImageNet validation, 50,000 pictures at 256 px: FID of Inception-v3 features of float pictures in [0, 1], LPIPS, "
    "PSNR and SSIM of 8-bit pictures cut off, not rounded; usage over the whole set; moving averages of the weights"
)


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return is_vqgan(checkpoint) and is_ibq(checkpoint)


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    account = Account(checkpoint, "an IBQ tokenizer", ignored=TRAINING)
    size, dim = checkpoint.shape("quantize.embedding.weight")
    converted = read_vqgan(account, {"name": "ibq", "codebook_size": size, "dim": dim}, f"IBQ-{size}")
    account.close()
    return converted
