"""LlamaGen (arXiv 2406.06525): its tokenizers, VQ-16 and VQ-8, and its class-conditional generators, B to 3B.

The decoder's levels count from the lowest, unlike VQGAN's. The tokenizer compares directions, in decoding too. The
generator multiplies queries and keys of the class token by zero.
"""

from __future__ import annotations

import re

from tessella.checkpoint import CheckpointError, fingerprint, load
from tessella.interop._vqgan import Naming, describe, projections, table
from tessella.interop.base import (
    Account,
    Checkpoint,
    ConversionError,
    Converted,
    Options,
    Table,
    count,
    empty_generator,
    empty_tokenizer,
    take,
)  # fmt: skip
from tessella.interop.ibq_ar import block
from tessella.interop.reading import read_checkpoint
from tessella.registry import Spec
from tessella.tokenizer import Tokenizer, TokenSpace

LICENCE = "MIT"
PAPER = "arXiv 2406.06525"
PROTOCOL = (
    "tokenizer: FID of 8-bit PNGs by the ADM evaluation suite, 50,000 ImageNet validation pictures at 256 px; "
    "generator: 50,000 samples of random classes, guidance 2.0 for B and L, 1.75 for XL and XXL, 1.65 for 3B; models "
    "of 24 x 24 tokens paint 384 px, resized to 256 by a bicubic filter"
)
_NAMING = Naming(
    down_block="encoder.conv_blocks.{level}.res.{index}",
    down_attention="encoder.conv_blocks.{level}.attn.{index}",
    downsample="encoder.conv_blocks.{level}.downsample.conv",
    up_block="decoder.conv_blocks.{level}.res.{index}",
    up_attention="decoder.conv_blocks.{level}.attn.{index}",
    upsample="decoder.conv_blocks.{level}.upsample.conv",
    middle=("mid.0", "mid.1", "mid.2"),
    level_zero_is_full=False,
)
_SIZES = {(12, 768): "B", (24, 1024): "L", (36, 1280): "XL", (48, 1536): "XXL", (24, 3200): "3B"}
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32}
_HEAD_DIM = 64
_TOKENIZERS = ("vq_ds16_c2i.pt", "vq_ds8_c2i.pt")


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return "encoder.conv_blocks.0.res.0.conv1.weight" in checkpoint or is_generator(checkpoint)


def is_generator(checkpoint: Checkpoint) -> bool:
    """Whether this is a generator, not a tokenizer."""
    return "tok_embeddings.weight" in checkpoint and "layers.0.attention.wqkv.weight" in checkpoint


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    if is_generator(checkpoint):
        return read_generator(checkpoint, options)
    account = Account(checkpoint, "a LlamaGen tokenizer", ignored=(r"quantize\.codebook_used",))
    size, dim = checkpoint.shape("quantize.embedding.weight")
    recipe = {
        "autoencoder": {"name": "conv", **describe(checkpoint, _NAMING)},
        "quantizer": {"name": "vq", "codebook_size": size, "dim": dim, "metric": "cosine"},
        "tokenizer": {"projection": True},
    }
    tokenizer = empty_tokenizer(recipe)
    names = {
        **table(tokenizer.autoencoder, _NAMING),
        **projections(),
        "quantizer.embedding": take("quantize.embedding.weight"),
    }
    account.fit(tokenizer, names)
    account.close()
    return Converted(f"LlamaGen VQ-{tokenizer.autoencoder.stride}", tokenizer)


def read_generator(checkpoint: Checkpoint, options: Options) -> Converted:
    """A generator, with the tokenizer that it was trained on: given, or beside it under its published name."""
    recipe = generator_recipe(checkpoint)
    layers, dim = recipe["generator"]["num_layers"], recipe["generator"]["dim"]
    size, head = checkpoint.shape("tok_embeddings.weight")[0], checkpoint.shape("output.weight")[0]
    if size != head:
        raise ConversionError(f"{checkpoint.file}: tok_embeddings.weight has {size} codes, output.weight {head}")
    tokenizer = _tokenizer(checkpoint, options)
    if size != tokenizer.quantizer.codebook_size:
        raise ConversionError(f"{checkpoint.file}: the generator has {size} codes, the tokenizer "
                              f"{tokenizer.quantizer.codebook_size}")  # fmt: skip
    side = _size_px(checkpoint, options) // tokenizer.autoencoder.stride
    generator = empty_generator(recipe, TokenSpace((side, side), 1, size, fingerprint(tokenizer)))
    account = Account(checkpoint, "a LlamaGen generator", ignored=(r"freqs_cis",))
    account.fit(generator, generator_table(layers))
    account.close()
    return Converted(f"LlamaGen {_SIZES.get((layers, dim), 'of another size')}", tokenizer, generator)


def generator_recipe(checkpoint: Checkpoint) -> Spec:
    """The section that builds the generator."""
    if "cls_embedding.embedding_table.weight" not in checkpoint:
        raise ConversionError(f"{checkpoint.file}: only class-conditional generators can be converted, and this has no "
                              "cls_embedding.embedding_table.weight")  # fmt: skip
    dim = checkpoint.shape("tok_embeddings.weight")[1]
    generator = {
        "name": "ar",
        "conditioner": {
            "name": "label",
            "num_classes": checkpoint.shape("cls_embedding.embedding_table.weight")[0] - 1,
        },
        "dim": dim,
        "num_layers": count(checkpoint, "layers.{index}.attention.wqkv.weight"),
        "num_heads": _HEADS.get(dim, dim // _HEAD_DIM),
        "hidden": checkpoint.shape("layers.0.feed_forward.w1.weight")[0],
        "rotary": "grid_zero_prefix",
    }
    return {"generator": generator}


def generator_table(num_layers: int) -> Table:
    """Where the generator's tensors are."""
    found = {
        "embedding.weight": take("tok_embeddings.weight"),
        "conditioner.embedding.weight": take("cls_embedding.embedding_table.weight"),
        "transformer.norm.weight": take("norm.weight"),
        "head.weight": take("output.weight"),
    }
    for layer in range(num_layers):
        found |= block(f"transformer.blocks.{layer}", f"layers.{layer}")
    return found


def _tokenizer(checkpoint: Checkpoint, options: Options) -> Tokenizer:
    beside = [checkpoint.file.with_name(name) for name in _TOKENIZERS]
    path = options.tokenizer or next((file for file in beside if file.is_file()), None)
    if path is None:
        raise ConversionError(f"{checkpoint.file} is a generator without its tokenizer: name that one's checkpoint "
                              f"or folder (tokenizer=...), or put {' or '.join(_TOKENIZERS)} beside it")  # fmt: skip
    if path.is_dir():
        return load(path)
    inner = read_checkpoint(path)
    if not recognises(inner) or is_generator(inner):
        raise CheckpointError(f"{path} is no tokenizer of LlamaGen")
    return read(inner, Options()).tokenizer


def _size_px(checkpoint: Checkpoint, options: Options) -> int:
    """The published files say it in their names alone: c2i_B_384.pt."""
    named = re.search(r"(?<!\d)(256|384|512)(?!\d)", checkpoint.file.name)
    return options.size_px or (int(named[1]) if named else 256)
