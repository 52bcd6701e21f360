"""The generators of IBQ (arXiv 2412.02692); their files hold the tokenizer too, with its averages already in place."""

from __future__ import annotations

from tessella.checkpoint import fingerprint
from tessella.interop import ibq
from tessella.interop.base import (
    Account,
    Checkpoint,
    ConversionError,
    Converted,
    Options,
    Table,
    count,
    empty_generator,
    joined,
    take,
)  # fmt: skip
from tessella.registry import Spec
from tessella.tokenizer import TokenSpace

LICENCE = "Apache-2.0"
PAPER = "arXiv 2412.02692"
PROTOCOL = (
    "50,000 samples, 50 of each class, at 256 px; constant guidance, no truncation; B: temperature 1.10, guidance "
    "2.25, L: 1.00, 2.00, XL: 1.15, 2.35, XXL: 1.20, 2.85; FID against the statistics of the ADM evaluation suite"
)
_SIZES = {16: "B", 20: "L", 24: "XL", 30: "XXL"}
_TOKENIZER = "first_stage_model."
_HEAD_DIM = 64
_IGNORED = (r"first_stage_model\.loss\..*", r"cond_stage_model\..*")


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return "transformer.tok_emb.weight" in checkpoint and "transformer.head_nm.rmsnorm.weight" in checkpoint


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    inner = checkpoint.under(_TOKENIZER)
    if not inner.tensors:
        raise ConversionError(f"{checkpoint.file} holds no tokenizer: no tensor is named {_TOKENIZER}...")
    tokenizer = ibq.read(inner, options).tokenizer
    recipe = generator_recipe(checkpoint)
    size, codes = checkpoint.shape("transformer.tok_emb.weight")[0], tokenizer.quantizer.codebook_size
    if size != codes:
        raise ConversionError(f"{checkpoint.file}: the generator has {size} codes, its tokenizer {codes}")
    grid = tokenizer.autoencoder.latent_grid(*[options.size_px or 256] * 2)
    generator = empty_generator(recipe, TokenSpace(grid, 1, codes, fingerprint(tokenizer)))
    account = Account(checkpoint, "an IBQ generator", ignored=(*_IGNORED, r"first_stage_model\..*"))
    account.fit(generator, table(recipe["generator"]["num_layers"]))
    account.close()
    name = _SIZES.get(recipe["generator"]["num_layers"], "of another size")
    return Converted(f"IBQ-AR {name}", tokenizer, generator)


def generator_recipe(checkpoint: Checkpoint) -> Spec:
    """The section that builds the generator."""
    dim = checkpoint.shape("transformer.tok_emb.weight")[1]
    generator = {
        "name": "ar",
        "conditioner": {
            "name": "label",
            "num_classes": checkpoint.shape("transformer.class_emb.embedding_table.weight")[0] - 1,
        },
        "dim": dim,
        "num_layers": count(checkpoint, "transformer.blocks.{index}.attention.wqkv.weight"),
        "num_heads": dim // _HEAD_DIM,
        "hidden": checkpoint.shape("transformer.blocks.0.feed_forward.w1.weight")[0],
        "adaln": True,
        "rotary": "grid_zero_prefix",
    }
    return {"generator": generator}


def table(num_layers: int) -> Table:
    """Where our tensors are."""
    found = {
        "embedding.weight": take("transformer.tok_emb.weight"),
        "conditioner.embedding.weight": take("transformer.class_emb.embedding_table.weight"),
        "transformer.norm.weight": take("transformer.head_nm.rmsnorm.weight"),
        "transformer.modulation.linear.weight": take("transformer.head_nm.ada_lin.1.weight"),
        "transformer.modulation.linear.bias": take("transformer.head_nm.ada_lin.1.bias"),
        "head.weight": take("transformer.head.weight"),
    }
    for layer in range(num_layers):
        ours, theirs = f"transformer.blocks.{layer}", f"transformer.blocks.{layer}"
        found |= block(ours, theirs)
        for tensor in ("weight", "bias"):
            found[f"{ours}.modulation.linear.{tensor}"] = take(f"{theirs}.ada_lin.1.{tensor}")
    return found


def block(ours: str, theirs: str) -> Table:
    """A Llama block as LlamaGen and IBQ name it; the two halves of SwiGLU lie in one matrix of ours."""
    return {
        f"{ours}.attention.qkv.weight": take(f"{theirs}.attention.wqkv.weight"),
        f"{ours}.attention.out.weight": take(f"{theirs}.attention.wo.weight"),
        f"{ours}.feed_forward.up.weight": joined(
            f"{theirs}.feed_forward.w1.weight", f"{theirs}.feed_forward.w3.weight"
        ),
        f"{ours}.feed_forward.down.weight": take(f"{theirs}.feed_forward.w2.weight"),
        f"{ours}.attention_norm.weight": take(f"{theirs}.attention_norm.weight"),
        f"{ours}.feed_forward_norm.weight": take(f"{theirs}.ffn_norm.weight"),
    }
