"""The audio tokenizers of SimVQ (arXiv 2411.02038): SEANet's encoder, codes as of pictures, the decoder of Vocos.

Weights are normalised in an older form: ``weight_g`` and ``weight_v`` are the norm and the direction of today's
parametrisation. A decoder of SEANet lies beside the one that is used; it was never trained.
"""

from __future__ import annotations

from tessella.autoencoders.vocos import Vocos
from tessella.interop.base import (
    TRAINING,
    Account,
    Checkpoint,
    ConversionError,
    Converted,
    count,
    empty_tokenizer,
    take,
)
from tessella.registry import Spec

_BASIS = "quantize.embedding.weight"
_SAMPLE_RATE = 24_000
# The decoder that is never called, its moving averages, and a window that we compute.
_IGNORED = (*TRAINING, r"decoder\.model\..*", r"model_ema\.decodermodel.*", r"head\.istft\.window")
_NORMALISED = {"bias": "bias", "parametrizations.weight.original0": "weight_g",
               "parametrizations.weight.original1": "weight_v"}  # fmt: skip


def is_audio(checkpoint: Checkpoint) -> bool:
    """Whether the encoder is one of waveforms."""
    return "encoder.model.0.conv.conv.bias" in checkpoint


def read_audio(checkpoint: Checkpoint) -> Converted:
    """The tokenizer of a checkpoint; see :class:`tessella.interop.base.Family`."""
    account = Account(checkpoint, "an audio tokenizer of SimVQ", ignored=_IGNORED, plain=frozenset({_BASIS}))
    if _BASIS not in checkpoint.tensors:
        raise ConversionError(f"{checkpoint.file} has no tensor {_BASIS!r}: there are no codes without it")
    size, dim = checkpoint.shape(_BASIS)
    recipe = {
        "autoencoder": {"name": "vocos", **_settings(checkpoint)},
        "quantizer": {"name": "simvq", "codebook_size": size, "dim": dim},
        "tokenizer": {"projection": False},
    }
    tokenizer = empty_tokenizer(recipe)
    assert isinstance(tokenizer.autoencoder, Vocos)
    names = {
        **{f"autoencoder.{name}": take(_published(name)) for name in tokenizer.autoencoder.state_dict()},
        "quantizer.basis": take(_BASIS),
        "quantizer.projection.weight": take("quantize.embedding_proj.weight"),
        "quantizer.projection.bias": take("quantize.embedding_proj.bias"),
    }
    account.fit(tokenizer, names)
    account.close()
    medium = {"name": "audio", "sample_rate": _SAMPLE_RATE}
    return Converted(f"SimVQ audio {size}", tokenizer, weights=account.weights, medium=medium)


def _settings(checkpoint: Checkpoint) -> Spec:
    """The arguments of ``Vocos`` that shapes tell."""

    def convolution(layer: int) -> tuple[int, ...]:
        return checkpoint.shape(f"encoder.model.{layer}.conv.conv.weight_v")

    channels, _, kernel = convolution(0)
    strides = []
    layer = 3  # after the first convolution come, for every stride, a residual layer, ELU, and a convolution
    while f"encoder.model.{layer - 2}.shortcut.conv.conv.weight_v" in checkpoint:
        strides.append(convolution(layer)[2] // 2)
        layer += 3
    lstm = f"encoder.model.{layer - 2}.lstm.weight_ih_l" + "{index}"
    hidden, dim = checkpoint.shape("backbone.convnext.0.pwconv1.weight")
    return {
        "channels": channels,
        "latent_dim": checkpoint.shape("backbone.embed.weight")[1],
        "strides": strides,
        "kernel": kernel,
        "res_kernel": checkpoint.shape("encoder.model.1.block.1.conv.conv.weight_v")[2],
        "num_lstm_layers": count(checkpoint, lstm),
        "dim": dim,
        "hidden": hidden,
        "num_blocks": count(checkpoint, "backbone.convnext.{index}.gamma"),
        "n_fft": checkpoint.shape("head.out.bias")[0] - 2,
    }


def _published(name: str) -> str:
    """The published name of a tensor of :class:`Vocos`."""
    if name.startswith("head."):
        return name.replace("head.", "head.out.", 1)
    if name.startswith("backbone.") or ".lstm." in name:
        return name
    module, _, tensor = name.partition(".conv.")
    return f"{module.replace('.block.model.', '.block.')}.conv.conv.{_NORMALISED[tensor]}"
