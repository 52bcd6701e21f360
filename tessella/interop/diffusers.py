"""``VQModel`` of diffusers, in both directions: it is VQGAN under other names, with a ``config.json`` beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tessella.autoencoders.conv import Conv
from tessella.checkpoint import load
from tessella.interop._vqgan import Naming, describe, projections, table
from tessella.interop.base import (
    Account,
    Checkpoint,
    ConversionError,
    Converted,
    Options,
    Table,
    empty_tokenizer,
    take,
)  # fmt: skip
from tessella.quantizers.vq import VQ
from tessella.registry import Spec
from tessella.storage import atomic_folder
from tessella.storage.tensors import write_tensors

LICENCE = "as stated where the model was published"
PAPER = "arXiv 2012.09841"
PROTOCOL = "not stated with the model"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_NUM_GROUPS = 32
_NAMING = Naming(
    down_block="encoder.down_blocks.{level}.resnets.{index}",
    down_attention="encoder.down_blocks.{level}.attentions.{index}",
    downsample="encoder.down_blocks.{level}.downsamplers.0.conv",
    up_block="decoder.up_blocks.{level}.resnets.{index}",
    up_attention="decoder.up_blocks.{level}.attentions.{index}",
    upsample="decoder.up_blocks.{level}.upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    level_zero_is_full=False,
    shortcut="conv_shortcut",
    attention={"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    ends={"norm_out": "conv_norm_out"},
)
_WITHOUT_ATTENTION = replace(_NAMING, middle=("mid_block.resnets.0", "mid_block.resnets.1"))
# As attention was called before diffusers 0.18.
_OLD = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
_MIDDLE = "encoder.mid_block.attentions.0"
# What our modules do, and so what a configuration must say where it says anything.
_REQUIRED: Spec = {"act_fn": "silu", "norm_num_groups": _NUM_GROUPS, "norm_type": "group"}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return (
        "encoder.down_blocks.0.resnets.0.conv1.weight" in checkpoint and "quantize.embedding.weight" in checkpoint
    )  # fmt: skip


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    _check_config(checkpoint.file.with_name(CONFIG))
    account = Account(checkpoint, "a VQModel of diffusers")
    naming = _naming(checkpoint)
    size, dim = checkpoint.shape("quantize.embedding.weight")
    recipe = {
        "autoencoder": {
            "name": "conv", **describe(checkpoint, naming), "mid_attention": naming is not _WITHOUT_ATTENTION
        },
        "quantizer": {"name": "vq", "codebook_size": size, "dim": dim},
        "tokenizer": {"projection": True},
    }  # fmt: skip
    tokenizer = empty_tokenizer(recipe)
    account.fit(tokenizer, _table(tokenizer.autoencoder, naming))
    account.close()
    return Converted(f"VQModel {size}", tokenizer)


def export(model: Path, out: Path) -> Path:
    """Write the tokenizer in ``model`` as a folder that ``diffusers.VQModel.from_pretrained`` reads.

    Raises:
        ConversionError: diffusers has no such model; the message says what it lacks.
    """
    tokenizer = load(model)
    autoencoder, quantizer = tokenizer.autoencoder, tokenizer.quantizer
    if type(autoencoder) is not Conv or type(quantizer) is not VQ:
        raise ConversionError(f"{model}: VQModel is a convolutional autoencoder with a learned codebook, not "
                              f"{type(autoencoder).__name__} with {type(quantizer).__name__}")  # fmt: skip
    arguments = autoencoder.arguments
    _check_exportable(model, arguments, quantizer, tokenizer.arguments)
    naming = _NAMING if arguments["mid_attention"] else _WITHOUT_ATTENTION
    state: dict[str, Tensor] = {}
    ours = tokenizer.state_dict()
    linear = tuple(f".{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0"))
    for name, found in _table(autoencoder, naming).items():
        value, published = ours[name], found.names[0]
        if published in ("quant_conv.weight", "post_quant_conv.weight"):
            value = value[:, :, None, None]
        elif published.endswith(linear):
            value = value.flatten(1)
        state[published] = value.contiguous()
    with atomic_folder(out) as folder:
        write_tensors(folder / WEIGHTS, state, {"format": "pt"})
        text = json.dumps(_config(arguments, quantizer), indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    return out


def _naming(checkpoint: Checkpoint) -> Naming:
    if f"{_MIDDLE}.query.weight" in checkpoint:
        return replace(_NAMING, attention=_OLD)
    return _NAMING if f"{_MIDDLE}.to_q.weight" in checkpoint else _WITHOUT_ATTENTION


def _table(autoencoder: object, naming: Naming) -> Table:
    assert isinstance(autoencoder, Conv)
    return {
        **table(autoencoder, naming),
        **projections(),
        "quantizer.embedding": take("quantize.embedding.weight"),
    }


def _check_config(file: Path) -> None:
    if not file.is_file():
        return
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} is damaged: {error}") from error
    for key, wanted in _REQUIRED.items():
        if config.get(key, wanted) != wanted:
            raise ConversionError(f"{file}: {key} is {config[key]!r}; only {wanted!r} can be converted")


def _check_exportable(model: Path, arguments: Spec, quantizer: VQ, settings: Spec) -> None:
    wanted = {"patch_px": 1, "downsample": "asymmetric", "upsample": "nearest", "bias": True, "out_kernel": 3}
    lacking = [f"autoencoder.{key} = {arguments[key]}" for key, value in wanted.items() if arguments[key] != value]
    decoder_blocks = arguments["num_decoder_res_blocks"]
    if decoder_blocks not in (None, arguments["num_res_blocks"] + 1):
        lacking.append(f"autoencoder.num_decoder_res_blocks = {decoder_blocks}")
    if arguments["channels"] % _NUM_GROUPS:
        lacking.append(f"autoencoder.channels = {arguments['channels']}, no multiple of {_NUM_GROUPS}")
    if quantizer.metric != "euclidean":
        lacking.append(f"quantizer.metric = {quantizer.metric}")
    if not settings["projection"]:
        lacking.append("tokenizer.projection = false")
    if lacking:
        raise ConversionError(f"{model}: VQModel of diffusers has no {', no '.join(lacking)}")


def _config(arguments: Spec, quantizer: VQ) -> Spec:
    strides = [2**level for level in range(len(arguments["multipliers"]))]
    attends = [stride in arguments["attention_strides"] for stride in strides]
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": [arguments["channels"] * multiplier for multiplier in arguments["multipliers"]],
        "down_block_types": ["AttnDownEncoderBlock2D" if attend else "DownEncoderBlock2D" for attend in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if attend else "UpDecoderBlock2D" for attend in attends[::-1]],
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["in_channels"],
        "latent_channels": arguments["latent_dim"],
        "layers_per_block": arguments["num_res_blocks"],
        "mid_block_add_attention": arguments["mid_attention"],
        "norm_num_groups": _NUM_GROUPS,
        "norm_type": "group",
        "num_vq_embeddings": quantizer.codebook_size,
        "vq_embed_dim": quantizer.dim,
    }
