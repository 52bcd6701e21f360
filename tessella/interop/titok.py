"""TiTok's tokenizers (arXiv 2406.07550) with discrete codes: the first ones, which paint through MaskGIT's decoder, and
the later ones, which make pixels themselves."""

from __future__ import annotations

from tessella.autoencoders.maskgit_vqgan import MaskGITVQGAN
from tessella.autoencoders.titok import TiTok
from tessella.autoencoders.titok_proxy import TiTokProxy
from tessella.interop._vqgan import table
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
from tessella.interop.maskgit_vqgan import NAMING
from tessella.registry import Spec

LICENCE = "Apache-2.0"
PAPER = "arXiv 2406.07550"
PROTOCOL = "FID of reconstructions of the 50,000 ImageNet validation pictures at 256 px, clamped to [0, 1], 8-bit"
_SIZES = {512: "S", 768: "B", 1024: "L"}
_HEAD_DIM = 64


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the keys are those of this family."""
    return "latent_tokens" in checkpoint and "encoder.positional_embedding" in checkpoint


def read(checkpoint: Checkpoint, options: Options) -> Converted:
    """See :class:`tessella.interop.base.Family`."""
    if "quantize.embedding.weight" not in checkpoint:
        raise ConversionError(f"{checkpoint.file} is a TiTok without a codebook: its latents are continuous")
    proxy = "pixel_quantize.embedding.weight" in checkpoint
    account = Account(checkpoint, "a TiTok with discrete codes")
    settings = _settings(checkpoint)
    size, dim = checkpoint.shape("quantize.embedding.weight")
    if proxy:
        settings["num_proxies"], settings["proxy_dim"] = checkpoint.shape("pixel_quantize.embedding.weight")
        settings["proxy_channels"] = checkpoint.shape("pixel_decoder.conv_out.weight")[1]
    recipe = {
        "autoencoder": {"name": "titok_proxy" if proxy else "titok", **settings},
        # The first models compare directions, the later ones points.
        "quantizer": {"name": "vq", "codebook_size": size, "dim": dim, "metric": "cosine" if proxy else "euclidean"},
        "tokenizer": {"projection": False},
    }
    tokenizer = empty_tokenizer(recipe)
    autoencoder = tokenizer.autoencoder
    assert isinstance(autoencoder, TiTok)
    account.fit(tokenizer, _table(autoencoder))
    account.close()
    widths = (settings["encoder_width"], settings["decoder_width"])
    letters = "".join(dict.fromkeys(_SIZES.get(width, "?") for width in widths))
    return Converted(f"TiTok-{letters}-{settings['num_latents']}", tokenizer)


def _settings(checkpoint: Checkpoint) -> Spec:
    num_latents, encoder_width = checkpoint.shape("latent_tokens")
    patch_px = checkpoint.shape("encoder.patch_embed.weight")[-1]
    side = round((checkpoint.shape("encoder.positional_embedding")[0] - 1) ** 0.5)
    decoder_width, latent_dim = checkpoint.shape("decoder.decoder_embed.weight")
    block = ".transformer.{index}.attn.in_proj_weight"
    return {
        "size_px": side * patch_px,
        "patch_px": patch_px,
        "num_latents": num_latents,
        "latent_dim": latent_dim,
        "encoder_width": encoder_width,
        "encoder_depth": count(checkpoint, "encoder" + block),
        "encoder_heads": max(1, encoder_width // _HEAD_DIM),
        "decoder_width": decoder_width,
        "decoder_depth": count(checkpoint, "decoder" + block),
        "decoder_heads": max(1, decoder_width // _HEAD_DIM),
    }


def _table(autoencoder: TiTok) -> Table:
    found = {
        "quantizer.embedding": take("quantize.embedding.weight"),
        "autoencoder.queries": take("latent_tokens"),
        **_pair("autoencoder.patch_in", "encoder.patch_embed"),
        **_pair("autoencoder.to_latent", "encoder.conv_out"),
        **_pair("autoencoder.from_latent", "decoder.decoder_embed"),
        "autoencoder.mask_token": take("decoder.mask_token"),
    }
    for side, half in (("encoder", autoencoder.encoder), ("decoder", autoencoder.decoder)):
        ours = f"autoencoder.{side}"
        found |= {
            f"{ours}.class_token": take(f"{side}.class_embedding"),
            f"{ours}.positions": take(f"{side}.positional_embedding"),
            f"{ours}.latent_positions": take(f"{side}.latent_token_positional_embedding"),
            **_pair(f"{ours}.norm_in", f"{side}.ln_pre"),
            **_pair(f"{ours}.transformer.norm", f"{side}.ln_post"),
        }
        for layer in range(len(half.transformer.blocks)):
            found |= _block(f"{ours}.transformer.blocks.{layer}", f"{side}.transformer.{layer}")
    if isinstance(autoencoder, TiTokProxy):
        return {**found, **_proxy_head(autoencoder)}
    return {
        **found,
        **_pair("autoencoder.patch_out", "decoder.ffn.0"),
        **_pair("autoencoder.conv_out", "decoder.conv_out"),
    }


def _proxy_head(autoencoder: TiTokProxy) -> Table:
    vqgan = MaskGITVQGAN(channels=autoencoder.proxy_channels, latent_dim=autoencoder.proxy_dim)
    names = table(vqgan, NAMING, prefix="")
    painter = {
        f"autoencoder.painter.{name.removeprefix('decoder.')}": take(f"pixel_{found.names[0]}")
        for name, found in names.items()
        if name.startswith("decoder.")
    }
    return {
        **_pair("autoencoder.logits.0", "decoder.ffn.0"),
        **_pair("autoencoder.logits.2", "decoder.ffn.2"),
        "autoencoder.proxies": take("pixel_quantize.embedding.weight"),
        **painter,
    }


def _block(ours: str, theirs: str) -> Table:
    return {
        f"{ours}.attention.qkv.weight": take(f"{theirs}.attn.in_proj_weight"),
        f"{ours}.attention.qkv.bias": take(f"{theirs}.attn.in_proj_bias"),
        **_pair(f"{ours}.attention.out", f"{theirs}.attn.out_proj"),
        **_pair(f"{ours}.attention_norm", f"{theirs}.ln_1"),
        **_pair(f"{ours}.feed_forward_norm", f"{theirs}.ln_2"),
        **_pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.c_fc"),
        **_pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.c_proj"),
    }


def _pair(ours: str, theirs: str) -> Table:
    """Weight and bias."""
    return {f"{ours}.{tensor}": take(f"{theirs}.{tensor}") for tensor in ("weight", "bias")}
