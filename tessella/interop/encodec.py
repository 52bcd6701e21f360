"""EnCodec at 24 kHz (arXiv 2210.13438), as Meta released it and as transformers stores it.

Both name the same layers: ``encoder.model.N.conv.conv`` there is ``encoder.layers.N.conv`` here, ``convtr.convtr`` of
the decoder is ``conv``, and ``quantizer.vq.layers.K._codebook`` is ``quantizer.layers.K.codebook``. The codebook is the
one that was used, ``embed``; sums and counts of its moving average are left behind.
"""

from __future__ import annotations

import re

from tessella.autoencoders.seanet import SEANet
from tessella.interop.base import (
    Account,
    Checkpoint,
    ConversionError,
    Converted,
    Options,
    Table,
    count,
    empty_tokenizer,
    take,
)  # fmt: skip

LICENCE = "MIT (of the code; Meta's weights: CC BY-NC 4.0)"
PAPER = "arXiv 2210.13438"
PROTOCOL = "ViSQOL and MUSHRA at 1.5, 3, 6, 12 and 24 kbps, that is with the first 2, 4, 8, 16 and 32 codebooks"
_SAMPLE_RATE = 24_000
_META, _TRANSFORMERS = "quantizer.vq.layers.{index}._codebook.embed", "quantizer.layers.{index}.codebook.embed"
_IGNORED = (r".*codebook\.(inited|cluster_size|embed_avg)",)
# The older form of weight normalisation, and today's.
_OLD = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return any(
        name in checkpoint for name in ("quantizer.vq.layers.0._codebook.embed", "quantizer.layers.0.codebook.embed")
    )


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    original = "encoder.model.0.conv.conv.bias" in checkpoint
    if any(".norm." in name for name in checkpoint.tensors):
        raise ConversionError(f"{checkpoint.file} is an EnCodec with norms between its layers, as at 48 kHz; only "
                              "those with normalised weights, as at 24 kHz, can be converted")  # fmt: skip
    codebook = _META if original else _TRANSFORMERS
    size, dim = checkpoint.shape(codebook.format(index=0))
    recipe = {
        "autoencoder": {"name": "seanet", **_settings(checkpoint, original, dim)},
        "quantizer": {
            "name": "residual", "quantizer": {"name": "vq", "codebook_size": size, "dim": dim},
            "num_codebooks": count(checkpoint, codebook),
        },
        "tokenizer": {"projection": False},
    }  # fmt: skip
    tokenizer = empty_tokenizer(recipe)
    assert isinstance(tokenizer.autoencoder, SEANet)
    stages = range(tokenizer.quantizer.num_codebooks)
    names: Table = {
        **{
            f"autoencoder.{name}": take(_published(name, original, checkpoint))
            for name in tokenizer.autoencoder.state_dict()
        },
        **{f"quantizer.stages.{stage}.embedding": take(codebook.format(index=stage)) for stage in stages},
    }
    account = Account(checkpoint, "an EnCodec at 24 kHz", ignored=_IGNORED)
    account.fit(tokenizer, names)
    account.close()
    medium = {"name": "audio", "sample_rate": _SAMPLE_RATE}
    return Converted(f"EnCodec, {tokenizer.quantizer.num_codebooks} codebooks", tokenizer, medium=medium)


def _settings(checkpoint: Checkpoint, original: bool, dim: int) -> dict[str, object]:
    def shape(layer: int) -> tuple[int, ...]:
        ours = f"encoder.model.{layer}.conv.parametrizations.weight.original1"
        return checkpoint.shape(_published(ours, original, checkpoint))

    channels, in_channels, kernel = shape(0)
    strides = []
    layer = 3  # after the first convolution come, for every stride, a residual layer, ELU, and a convolution
    shortcut = "encoder.model.{layer}.shortcut.conv.bias"
    while _published(shortcut.format(layer=layer - 2), original, checkpoint) in checkpoint:
        strides.append(shape(layer)[2] // 2)
        layer += 3
    lstm = _published(f"encoder.model.{layer - 2}.lstm.weight_ih_l", original, checkpoint) + "{index}"
    return {
        "in_channels": in_channels, "channels": channels, "latent_dim": dim, "strides": strides, "kernel": kernel,
        "num_lstm_layers": count(checkpoint, lstm),
    }  # fmt: skip


def _published(name: str, original: bool, checkpoint: Checkpoint) -> str:
    """The published name of a tensor of :class:`SEANet`."""
    name = name.replace(".block.model.", ".block.")
    for new, old in _OLD.items():
        if name.endswith(new) and not any(key.endswith(new) for key in checkpoint.tensors):
            name = name.replace(new, old)
    if not original:
        return re.sub(r"^(encoder|decoder)\.model\.", r"\1.layers.", name)
    if ".conv." not in name:
        return name
    head, _, tensor = name.rpartition(".conv.")
    twice = "convtr.convtr" if f"{head}.convtr.convtr.bias" in checkpoint else "conv.conv"
    return f"{head}.{twice}.{tensor}"
