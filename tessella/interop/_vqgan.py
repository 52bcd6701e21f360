"""The names that published descendants of VQGAN give the parts of :class:`tessella.autoencoders.conv.Conv`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from tessella.autoencoders.conv import Attention, Conv, ResBlock
from tessella.interop.base import Checkpoint, ConversionError, Take, count, take
from tessella.registry import Spec

_ATTENTION = ("norm", "q", "k", "v", "proj_out")


@dataclass(frozen=True)
class Naming:
    """Patterns with ``level`` and ``index`` for the parts of a level; the rest are names within encoder and decoder.

    Attributes:
        down_block, down_attention, downsample: of the encoder.
        up_block, up_attention, upsample: of the decoder.
        middle: its blocks in order, attention included.
        level_zero_is_full: whether the decoder's level 0 is the one of full resolution, which runs last.
        shortcut: the convolution beside a residual block.
        attention: what the parts of an attention block are called, where otherwise than ours.
        ends: what ``conv_in``, ``norm_out``, ``conv_out`` are called, where otherwise.
    """

    down_block: str = "encoder.down.{level}.block.{index}"
    down_attention: str = "encoder.down.{level}.attn.{index}"
    downsample: str = "encoder.down.{level}.downsample.conv"
    up_block: str = "decoder.up.{level}.block.{index}"
    up_attention: str = "decoder.up.{level}.attn.{index}"
    upsample: str = "decoder.up.{level}.upsample.conv"
    middle: tuple[str, ...] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    level_zero_is_full: bool = True
    shortcut: str = "nin_shortcut"
    attention: Mapping[str, str] = field(default_factory=dict)
    ends: Mapping[str, str] = field(default_factory=dict)

    def end(self, side: str, name: str) -> str:
        """Where ``conv_in``, ``norm_out`` or ``conv_out`` of ``encoder`` or ``decoder`` is."""
        return f"{side}.{self.ends.get(name, name)}"


TAMING = Naming()


def describe(checkpoint: Checkpoint, naming: Naming) -> Spec:
    """The arguments of ``Conv`` that the shapes tell.

    Raises:
        ConversionError: a tensor that would tell is missing, or the widths are no multiples of the first.
    """
    first = naming.down_block.format(level="{index}", index=0) + ".conv1.weight"
    num_levels = count(checkpoint, first)
    channels, in_channels = checkpoint.shape(f"{naming.end('encoder', 'conv_in')}.weight")[:2]
    widths = [checkpoint.shape(first.format(index=level))[0] for level in range(num_levels)]
    if not widths or any(width % channels for width in widths):
        raise ConversionError(
            f"{checkpoint.file}: the levels' widths {widths} are no multiples of the first {channels}"
        )
    attention = naming.down_attention + f".{naming.attention.get('q', 'q')}.weight"
    strides = [2**level for level in range(num_levels) if attention.format(level=level, index=0) in checkpoint]
    return {
        "in_channels": in_channels,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "num_res_blocks": count(checkpoint, naming.down_block + ".conv1.weight", level=0),
        "num_decoder_res_blocks": count(checkpoint, naming.up_block + ".conv1.weight", level=0),
        "attention_strides": strides,
        "latent_dim": checkpoint.shape(f"{naming.end('encoder', 'conv_out')}.weight")[0],
    }


def table(autoencoder: nn.Module, naming: Naming, *, prefix: str = "autoencoder.") -> dict[str, Take]:
    """Where every tensor of ``autoencoder`` is; ``prefix`` is the autoencoder's own place in the model."""
    assert isinstance(autoencoder, Conv)
    published = dict(_modules(autoencoder, naming))
    found = {}
    for name in autoencoder.state_dict():
        module, _, tensor = name.rpartition(".")
        if module in published:
            found[prefix + name] = take(f"{published[module]}.{tensor}")
    return found


def projections(before: str = "quant_conv", after: str = "post_quant_conv") -> dict[str, Take]:
    """Where the linear layers around the quantizer are."""
    return {
        f"{ours}.{tensor}": take(f"{theirs}.{tensor}")
        for ours, theirs in (("to_code", before), ("from_code", after))
        for tensor in ("weight", "bias")
    }


def _modules(autoencoder: Conv, naming: Naming) -> Iterator[tuple[str, str]]:
    """Our modules that hold tensors, and their published names."""
    for side, half, levels in (
        ("encoder", autoencoder.encoder, autoencoder.encoder.down),
        ("decoder", autoencoder.decoder, autoencoder.decoder.up),
    ):
        for name in ("conv_in", "norm_out", "conv_out"):
            yield f"{side}.{name}", naming.end(side, name)
        middle = [f"{side}.{name}" for name in naming.middle]
        for index, block in enumerate(half.mid.children()):
            yield from _parts(block, f"{side}.mid.{index}", middle[index], naming)
        for place, level in enumerate(levels):
            number = place
            if side == "decoder" and naming.level_zero_is_full:
                number = len(levels) - 1 - place
            ours = f"{side}.{'down' if side == 'encoder' else 'up'}.{place}"
            yield from _level(level, ours, side, number, naming)


def _level(level: nn.Module, ours: str, side: str, number: int, naming: Naming) -> Iterator[tuple[str, str]]:
    down = side == "encoder"
    counts: Counter[str] = Counter()
    for index, part in enumerate(level.children()):
        if isinstance(part, ResBlock):
            pattern = naming.down_block if down else naming.up_block
        elif isinstance(part, Attention):
            pattern = naming.down_attention if down else naming.up_attention
        else:
            pattern = naming.downsample if down else naming.upsample
        theirs = pattern.format(level=number, index=counts[pattern])
        counts[pattern] += 1
        yield from _parts(part, f"{ours}.{index}", theirs, naming)


def _parts(part: nn.Module, ours: str, theirs: str, naming: Naming) -> Iterator[tuple[str, str]]:
    if isinstance(part, ResBlock):
        for name in ("norm1", "conv1", "norm2", "conv2"):
            yield f"{ours}.{name}", f"{theirs}.{name}"
        yield f"{ours}.shortcut", f"{theirs}.{naming.shortcut}"
    elif isinstance(part, Attention):
        for name in _ATTENTION:
            yield f"{ours}.{name}", f"{theirs}.{naming.attention.get(name, name)}"
    else:  # the layer between two levels: one convolution, or none
        for name, module in part.named_modules():
            if isinstance(module, nn.Conv2d):
                yield f"{ours}.{name}".rstrip("."), theirs
