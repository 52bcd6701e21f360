"""Other programs' training configurations as recipes: taming-transformers, SEED-Voken (IBQ, Open-MAGVIT2), SimVQ, and
LlamaGen's command line written as YAML.

What a configuration says and a recipe cannot is not dropped in silence: the recipe's first lines list it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessella.config import resolve_recipe
from tessella.errors import ConfigError
from tessella.extras import require
from tessella.interop.reading import ConversionError
from tessella.recipe import to_toml
from tessella.registry import Spec
from tessella.storage import write_text

# Pictures in the training set of ImageNet, which all of these configurations count epochs of.
_IMAGENET = 1_281_167
_ADAM = {"optimizer": "adam", "lr": 1e-4, "betas": [0.5, 0.9], "warmup_steps": 0, "decay": "constant"}
_BFLOAT = {"16-mixed": "bf16", "bf16": "bf16", "bf16-mixed": "bf16", 16: "bf16"}
_MISSING = object()


class Settings:
    """The leaves of nested tables, each of which is asked for or named in the end."""

    def __init__(self, content: Any, file: Path) -> None:
        if not isinstance(content, dict):
            raise ConversionError(f"{file} holds no table of settings")
        self.file = file
        self.leaves = dict(_leaves(content, ""))
        self.asked: set[str] = set()

    def get(self, path: str, default: Any = _MISSING) -> Any:
        """The value at a dotted path.

        Raises:
            ConversionError: there is none, and no ``default``.
        """
        self.asked.add(path)
        if path in self.leaves:
            return self.leaves[path]
        if default is _MISSING:
            raise ConversionError(f"{self.file} has no {path}")
        return default

    def left(self) -> list[str]:
        """What was not asked for."""
        return [f"{path} = {value!r}" for path, value in self.leaves.items() if path not in self.asked]


def convert_config(path: str | Path, out: str | Path) -> Path:
    """Write the recipe that trains what the YAML file ``path`` describes; ``out`` ends in ``.toml``.

    Raises:
        ConversionError: no YAML, no model that we have, or a setting without which nothing can be built.
    """
    path, out = Path(path), Path(out)
    if out.suffix != ".toml":
        raise ConversionError(f"a recipe's name ends in .toml, got {out}")
    settings = Settings(_read(path), path)
    model = settings.get("model.target", None) or settings.get("model.class_path", None)
    if settings.get("vq_model", None) is not None:
        recipe = _llamagen(settings)
    elif model is None:
        raise ConversionError(f"{path} names no model: neither model.target, model.class_path nor vq_model")
    else:
        recipe = _vqgan(settings, str(model))
    try:
        resolve_recipe(recipe)
    except ConfigError as error:
        raise ConversionError(f"{path}: {error}") from error
    lines = [f"# Converted from {path.name}", *(f"# Not taken over: {line}" for line in settings.left())]
    write_text(out, "\n".join(lines) + "\n\n" + to_toml(recipe))
    return out


def _read(path: Path) -> Any:
    yaml = require("yaml", extra="config")
    if not path.is_file():
        raise ConversionError(f"no configuration file {path}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is no YAML: {error}") from error


def _leaves(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _number(value: Any) -> float:
    """YAML 1.1 reads 1e-4, which lacks a point, as text."""
    return float(value)


def _vqgan(settings: Settings, model: str) -> Spec:
    """The family whose files have ``ddconfig`` and ``lossconfig``."""
    at = "model.params." if "model.target" in settings.leaves else "model.init_args."
    kind = _kind(settings, model)
    side = int(settings.get(f"{at}ddconfig.resolution", 256))
    size = int(settings.get("data.init_args.train.params.config.size", None)
               or settings.get("data.params.train.params.config.size", side))  # fmt: skip
    quantizer = {"ibq": _ibq, "open_magvit2": _lfq, "simvq": _simvq, "taming": _vq}[kind](settings, at)
    recipe = {
        "data": {"name": "folder", "path": "imagenet", "resize_px": size, "crop_px": size},
        "autoencoder": _autoencoder(settings, f"{at}ddconfig.", kind, side),
        "quantizer": quantizer,
        "tokenizer": {"projection": kind in ("ibq", "taming")},
        "loss": _loss(settings, f"{at}lossconfig.params.", kind),
        "training": _training(settings, at, kind),
    }
    return recipe


def _kind(settings: Settings, model: str) -> str:
    for part, kind in (("IBQ", "ibq"), ("Open_MAGVIT2", "open_magvit2"), ("taming.models.vqgan.VQModel", "taming"),
                       ("ldm.models.autoencoder.VQModel", "taming")):  # fmt: skip
        if part in model:
            return kind
    quantizer = str(settings.leaves.get("model.init_args.quantconfig.target", ""))
    if quantizer.endswith(".SimVQ"):
        return "simvq"
    raise ConversionError(f"{settings.file} describes {model}, which is none of: taming's VQModel, IBQ, Open-MAGVIT2, "
                          "SimVQ, LlamaGen")  # fmt: skip


def _autoencoder(settings: Settings, at: str, kind: str, side: int) -> Spec:
    multipliers = list(settings.get(f"{at}ch_mult"))
    common = {
        "in_channels": int(settings.get(f"{at}in_channels", 3)),
        "channels": int(settings.get(f"{at}ch")),
        "multipliers": multipliers,
        "num_res_blocks": int(settings.get(f"{at}num_res_blocks")),
        "latent_dim": int(settings.get(f"{at}z_channels")),
    }
    settings.get(f"{at}out_ch", None)
    if settings.get(f"{at}double_z", False):
        raise ConversionError(f"{settings.file}: {at}double_z is for autoencoders without codes")
    if settings.get(f"{at}dropout", 0.0) == 0.0:
        settings.asked.add(f"{at}dropout")
    if kind == "open_magvit2":
        return {"name": "open_magvit2", **common}
    if kind == "simvq":
        return {
            "name": "conv", **common, "num_decoder_res_blocks": common["num_res_blocks"], "mid_attention": False,
            "downsample": "strided", "upsample": "depth_to_space", "bias": False, "out_kernel": 1,
        }  # fmt: skip
    # They name resolutions, we strides, so that a model does not depend on the size of its pictures.
    resolutions = settings.get(f"{at}attn_resolutions", [])
    strides = [side // resolution for resolution in resolutions if resolution * 2 ** (len(multipliers) - 1) >= side]
    return {"name": "conv", **common, "attention_strides": strides}


def _vq(settings: Settings, at: str) -> Spec:
    return {
        "name": "vq",
        "codebook_size": int(settings.get(f"{at}n_embed")),
        "dim": int(settings.get(f"{at}embed_dim")),
        # Theirs puts beta = 0.25 on the codes' term, not on the encoder's; its own "legacy" flag admits it.
        "commitment_weight": 1.0,
        "codebook_weight": 0.25,
    }


def _ibq(settings: Settings, at: str) -> Spec:
    for flag in ("l2_normalize", "cosine_similarity"):
        settings.get(f"{at}{flag}", False)  # read by their program, and used nowhere
    entropy = settings.get(f"{at}lossconfig.params.entropy_loss_weight", 0.05)
    return {
        "name": "ibq",
        "codebook_size": int(settings.get(f"{at}n_embed")),
        "dim": int(settings.get(f"{at}embed_dim")),
        "codebook_weight": _number(settings.get(f"{at}beta", 0.25)),
        "entropy_weight": _number(entropy) if settings.get(f"{at}use_entropy_loss", True) else 0.0,
        "entropy_temperature": _number(settings.get(f"{at}entropy_temperature", 0.01)),
    }


def _lfq(settings: Settings, at: str) -> Spec:
    return {
        "name": "lfq",
        "codebook_size": int(settings.get(f"{at}n_embed")),
        "dim": int(settings.get(f"{at}embed_dim")),
        "commitment_weight": _number(settings.get(f"{at}lossconfig.params.commit_weight", 0.25)),
        "entropy_weight": _number(settings.get(f"{at}lossconfig.params.codebook_weight", 0.1)),
    }


def _simvq(settings: Settings, at: str) -> Spec:
    params = f"{at}quantconfig.params."
    settings.get(f"{at}quantconfig.target", None)
    scale = _number(settings.get(f"{at}lossconfig.params.commit_weight", 1.0))
    beta = scale * _number(settings.get(f"{params}beta", 0.25))
    swapped = settings.get(f"{params}legacy", True)  # its default puts beta on the codes' term
    return {
        "name": "simvq",
        "codebook_size": int(settings.get(f"{params}n_e")),
        "dim": int(settings.get(f"{params}e_dim")),
        "commitment_weight": scale if swapped else beta,
        "codebook_weight": beta if swapped else scale,
    }


def _loss(settings: Settings, at: str, kind: str) -> Spec:
    weight, adaptive = settings.get(f"{at}gen_loss_weight", None), False
    if weight is None:  # then the weight is that of the gradients' ratio
        weight, adaptive = settings.get(f"{at}disc_weight", 0.8), True
    else:
        settings.get(f"{at}disc_weight", None)  # has no effect beside gen_loss_weight
    loss = "non_saturating_mean_logit" if kind != "taming" else "hinge"
    return {
        "name": "image",
        "l1_weight": _number(settings.get(f"{at}pixelloss_weight", 1.0)) if kind == "taming" else 1.0,
        "l2_weight": 0.0,
        "perceptual_weight": _number(settings.get(f"{at}perceptual_weight", 1.0)),
        "adversary": {
            "generator_loss": loss,
            "weight": _number(weight),
            "adaptive": adaptive,
            "start_step": int(settings.get(f"{at}disc_start", 0)),
            "lecam_weight": _number(settings.get(f"{at}lecam_loss_weight", 0.0)),
        },
    }


def _training(settings: Settings, at: str, kind: str) -> Spec:
    devices = int(settings.get("trainer.devices", 1)) * int(settings.get("trainer.num_nodes", 1))
    each = int(settings.get("data.init_args.batch_size", None) or settings.get("data.params.batch_size", 1))
    batch = each * devices
    training: Spec = {**_ADAM, "batch_size": batch, "accumulate": devices, "clip_norm": float("inf")}
    rate = settings.get(f"{at}learning_rate", None)
    if rate is None:  # taming multiplies by devices and pictures, of which its command line knows the devices
        rate = _number(settings.get("model.base_learning_rate", 1e-4 / batch)) * batch
    training["lr"] = _number(rate)
    if settings.get(f"{at}use_ema", kind != "taming"):
        training["ema_decay"] = 0.999
    training["precision"] = _BFLOAT.get(settings.get("trainer.precision", "16-mixed"), "fp32")
    epoch = -(-_IMAGENET // batch)
    epochs = settings.get("trainer.max_epochs", None)
    training["steps"] = int(settings.get("trainer.max_steps", 0)) or int(epochs or 100) * epoch
    drops = settings.get(f"{at}lr_drop_epoch", None)
    if drops:
        training["milestones"] = [int(drop) * epoch for drop in drops]
    return training


def _llamagen(settings: Settings) -> Spec:
    """The arguments of its ``vq_train.py``, with underscores or hyphens."""
    stride = {"VQ-8": 8, "VQ-16": 16}.get(settings.get("vq_model"))
    if stride is None:
        raise ConversionError(f"{settings.file}: vq_model must be VQ-8 or VQ-16, got {settings.get('vq_model')!r}")
    batch = int(settings.get("global_batch_size", 128))
    side = int(settings.get("image_size", 256))
    epoch = -(-_IMAGENET // batch)
    ema = bool(settings.get("ema", False))
    return {
        "data": {"name": "folder", "path": str(settings.get("data_path", "imagenet")), "resize_px": round(1.1 * side),
                 "crop_px": side, "flip": True},
        "autoencoder": {
            "name": "conv", "multipliers": [1, 1, 2, 2, 4] if stride == 16 else [1, 2, 2, 4],
            "attention_strides": [stride],
        },
        "quantizer": {
            "name": "vq", "codebook_size": int(settings.get("codebook_size", 16384)),
            "dim": int(settings.get("codebook_embed_dim", 8)),
            "metric": "cosine" if settings.get("codebook_l2_norm", True) else "euclidean",
            "commitment_weight": _number(settings.get("commit_loss_beta", 0.25)),
            "codebook_weight": _number(settings.get("codebook_weight", 1.0)),
            "entropy_weight": _number(settings.get("entropy_loss_ratio", 0.0)),
        },
        "loss": {
            "name": "image", "l1_weight": 0.0, "l2_weight": _number(settings.get("reconstruction_weight", 1.0)),
            "perceptual_weight": _number(settings.get("perceptual_weight", 1.0)),
            "adversary": {"generator_loss": "hinge", "weight": _number(settings.get("disc_weight", 0.5)),
                          "start_step": int(settings.get("disc_start", 20000))},
        },
        "training": {
            "optimizer": "adam", "lr": _number(settings.get("lr", 1e-4)),
            "betas": [_number(settings.get("beta1", 0.9)), _number(settings.get("beta2", 0.95))],
            "weight_decay": _number(settings.get("weight_decay", 0.05)), "warmup_steps": 0, "decay": "constant",
            "batch_size": batch, "steps": int(settings.get("epochs", 40)) * epoch,
            "clip_norm": _number(settings.get("max_grad_norm", 1.0)),
            "precision": {"bf16": "bf16", "fp16": "bf16"}.get(settings.get("mixed_precision", "bf16"), "fp32"),
            **({"ema_decay": 0.9999} if ema else {}),
        },
    }  # fmt: skip
