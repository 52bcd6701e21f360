"""The published models, stated once more: the names and shapes of their tensors, and what their programs compute.

Everything is a function of a dictionary of tensors under the published names, so that nothing here depends on the
converters or on our modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


class Shapes(dict[str, tuple[int, ...]]):
    """Names to shapes."""

    def conv(self, name: str, cin: int, cout: int, kernel: int, *, bias: bool = True) -> None:
        self[f"{name}.weight"] = (cout, cin, kernel, kernel)
        if bias:
            self[f"{name}.bias"] = (cout,)

    def linear(self, name: str, cin: int, cout: int, *, bias: bool = True) -> None:
        self[f"{name}.weight"] = (cout, cin)
        if bias:
            self[f"{name}.bias"] = (cout,)

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = (width,)
        self[f"{name}.bias"] = (width,)

    def count(self) -> int:
        return sum(math.prod(shape) for shape in self.values())

    def random(self, seed: int) -> State:
        """Values that keep activations of order one; norms near the identity."""
        rng = torch.Generator().manual_seed(seed)
        state = {}
        for name, shape in self.items():
            noise = torch.randn(shape, generator=rng)
            if len(shape) == 1 and name.endswith("weight"):
                state[name] = 1 + 0.2 * noise
            elif len(shape) == 1:
                state[name] = 0.2 * noise
            else:
                state[name] = noise * max(1, math.prod(shape[1:])) ** -0.5
        return state

    def meta(self) -> State:
        return {name: torch.empty(shape, device="meta") for name, shape in self.items()}


@dataclass(frozen=True)
class Size:
    """Of a convolutional model; the defaults are VQGAN's as published."""

    channels: int = 128
    mult: Sequence[int] = (1, 1, 2, 2, 4)
    blocks: int = 2
    features: int = 256
    attention: Sequence[int] = (4,)


# --- parts ------------------------------------------------------------------------------------------------------------


def conv(s: State, name: str, x: Tensor, *, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = s[f"{name}.weight"]
    padding = weight.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, weight, s.get(f"{name}.bias"), stride=stride, padding=padding)


def group_norm(s: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def residual(s: State, name: str, x: Tensor, *, shortcut: str = "nin_shortcut", of_output: bool = False) -> Tensor:
    h = conv(s, f"{name}.conv1", swish(group_norm(s, f"{name}.norm1", x)))
    h = conv(s, f"{name}.conv2", swish(group_norm(s, f"{name}.norm2", h)))
    if f"{name}.{shortcut}.weight" in s:
        x = conv(s, f"{name}.{shortcut}", h if of_output else x)
    return x + h


def attention(s: State, name: str, x: Tensor, parts: Sequence[str] = ("norm", "q", "k", "v", "proj_out")) -> Tensor:
    norm, *names = parts
    batch, width, height, columns = x.shape
    h = group_norm(s, f"{name}.{norm}", x).flatten(2).transpose(1, 2)

    def linear(part: str, y: Tensor) -> Tensor:
        return y @ s[f"{name}.{part}.weight"].reshape(width, width).T + s[f"{name}.{part}.bias"]

    q, k, v = (linear(part, h) for part in names[:3])
    weights = torch.softmax(q @ k.transpose(1, 2) * width**-0.5, -1)
    return x + linear(names[3], weights @ v).transpose(1, 2).reshape(batch, width, height, columns)


def depth_to_space(x: Tensor) -> Tensor:
    """ONNX's DCR mode: out[c, 2h + i, 2w + j] = x[(2i + j) C + c, h, w]."""
    quarter = x.shape[1] // 4
    out = x.new_empty(x.shape[0], quarter, 2 * x.shape[2], 2 * x.shape[3])
    for i in range(2):
        for j in range(2):
            start = (2 * i + j) * quarter
            out[:, :, i::2, j::2] = x[:, start : start + quarter]
    return out


def twice(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def nearest_code(z: Tensor, codes: Tensor) -> Tensor:
    """``[B, h, w]`` of ``z [B, h, w, D]``, by distance."""
    return torch.cdist(z.flatten(0, -2).double(), codes.double()).argmin(-1).view(z.shape[:-1])


# --- VQGAN and its descendants ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """What one family calls the parts."""

    down: str = "encoder.down.{i}.block.{j}"
    down_attention: str = "encoder.down.{i}.attn.{j}"
    downsample: str = "encoder.down.{i}.downsample.conv"
    up: str = "decoder.up.{i}.block.{j}"
    up_attention: str = "decoder.up.{i}.attn.{j}"
    upsample: str = "decoder.up.{i}.upsample.conv"
    middle: Sequence[str] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    from_below: bool = False  # whether the decoder's level 0 is its first
    shortcut: str = "nin_shortcut"
    attention: Sequence[str] = ("norm", "q", "k", "v", "proj_out")
    attention_is_linear: bool = False
    norm_out: str = "norm_out"


TAMING = Names()
LLAMAGEN = Names(
    down="encoder.conv_blocks.{i}.res.{j}", down_attention="encoder.conv_blocks.{i}.attn.{j}",
    downsample="encoder.conv_blocks.{i}.downsample.conv", up="decoder.conv_blocks.{i}.res.{j}",
    up_attention="decoder.conv_blocks.{i}.attn.{j}", upsample="decoder.conv_blocks.{i}.upsample.conv",
    middle=("mid.0", "mid.1", "mid.2"), from_below=True,
)  # fmt: skip
DIFFUSERS = Names(
    down="encoder.down_blocks.{i}.resnets.{j}", down_attention="encoder.down_blocks.{i}.attentions.{j}",
    downsample="encoder.down_blocks.{i}.downsamplers.0.conv", up="decoder.up_blocks.{i}.resnets.{j}",
    up_attention="decoder.up_blocks.{i}.attentions.{j}", upsample="decoder.up_blocks.{i}.upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"), from_below=True,
    shortcut="conv_shortcut", attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"), attention_is_linear=True,
    norm_out="conv_norm_out",
)  # fmt: skip


class VQGAN:
    """Encoder and decoder of taming-transformers under the names of a family.

    Args:
        names: of the parts.
        size: of the model; the decoder has one block more a level.
        dim: of the codes.
        codes: rows of the codebook.
    """

    def __init__(self, names: Names, size: Size, *, dim: int, codes: int) -> None:
        self.names, self.size, self.dim, self.codes = names, size, dim, codes
        self.levels = len(size.mult)

    def shapes(self) -> Shapes:
        n, size, s = self.names, self.size, Shapes()
        widths = [size.channels * m for m in size.mult]
        s.conv("encoder.conv_in", 3, size.channels, 3)
        width = size.channels
        for i, out in enumerate(widths):
            for j in range(size.blocks):
                self._block(s, n.down.format(i=i, j=j), width, out)
                if i in size.attention:
                    self._attention(s, n.down_attention.format(i=i, j=j), out)
                width = out
            if i < self.levels - 1:
                s.conv(n.downsample.format(i=i), width, width, 3)
        for half in ("encoder", "decoder"):
            for part in (n.middle[0], n.middle[-1]):
                self._block(s, f"{half}.{part}", width, width)
            self._attention(s, f"{half}.{n.middle[1]}", width)
        s.norm(f"encoder.{n.norm_out}", width)
        s.conv("encoder.conv_out", width, size.features, 3)
        s.conv("decoder.conv_in", size.features, width, 3)
        for place, level in enumerate(reversed(range(self.levels))):
            i, out = place if n.from_below else level, widths[level]
            for j in range(size.blocks + 1):
                self._block(s, n.up.format(i=i, j=j), width, out)
                if level in size.attention:
                    self._attention(s, n.up_attention.format(i=i, j=j), out)
                width = out
            if level > 0:
                s.conv(n.upsample.format(i=i), width, width, 3)
        s.norm(f"decoder.{n.norm_out}", width)
        s.conv("decoder.conv_out", width, 3, 3)
        s.conv("quant_conv", size.features, self.dim, 1)
        s.conv("post_quant_conv", self.dim, size.features, 1)
        s["quantize.embedding.weight"] = (self.codes, self.dim)
        return s

    def latent(self, s: State, x: Tensor) -> Tensor:
        """z ``[B, h, w, D]``."""
        n = self.names
        h = conv(s, "encoder.conv_in", x)
        for i in range(self.levels):
            for j in range(self.size.blocks):
                h = residual(s, n.down.format(i=i, j=j), h, shortcut=n.shortcut)
                if i in self.size.attention:
                    h = attention(s, n.down_attention.format(i=i, j=j), h, n.attention)
            if i < self.levels - 1:
                h = conv(s, n.downsample.format(i=i), F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = self._middle(s, "encoder", h)
        h = conv(s, "encoder.conv_out", swish(group_norm(s, f"encoder.{n.norm_out}", h)))
        return conv(s, "quant_conv", h).permute(0, 2, 3, 1)

    def picture(self, s: State, z_q: Tensor) -> Tensor:
        """x_hat of codes ``[B, h, w, D]``."""
        n = self.names
        h = conv(s, "decoder.conv_in", conv(s, "post_quant_conv", z_q.permute(0, 3, 1, 2)))
        h = self._middle(s, "decoder", h)
        for place, level in enumerate(reversed(range(self.levels))):
            i = place if n.from_below else level
            for j in range(self.size.blocks + 1):
                h = residual(s, n.up.format(i=i, j=j), h, shortcut=n.shortcut)
                if level in self.size.attention:
                    h = attention(s, n.up_attention.format(i=i, j=j), h, n.attention)
            if level > 0:
                h = conv(s, n.upsample.format(i=i), twice(h))
        return conv(s, "decoder.conv_out", swish(group_norm(s, f"decoder.{n.norm_out}", h)))

    def _middle(self, s: State, half: str, h: Tensor) -> Tensor:
        first, between, last = (f"{half}.{part}" for part in self.names.middle)
        h = attention(s, between, residual(s, first, h), self.names.attention)
        return residual(s, last, h)

    def _block(self, s: Shapes, name: str, cin: int, cout: int) -> None:
        s.norm(f"{name}.norm1", cin)
        s.conv(f"{name}.conv1", cin, cout, 3)
        s.norm(f"{name}.norm2", cout)
        s.conv(f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            s.conv(f"{name}.{self.names.shortcut}", cin, cout, 1)

    def _attention(self, s: Shapes, name: str, width: int) -> None:
        norm, *parts = self.names.attention
        s.norm(f"{name}.{norm}", width)
        for part in parts:
            if self.names.attention_is_linear:
                s.linear(f"{name}.{part}", width, width)
            else:
                s.conv(f"{name}.{part}", width, width, 1)


class Magvit:
    """Encoder and decoder of Open-MAGVIT2; SimVQ's is the same without adaptive norms."""

    def __init__(self, size: Size, *, adaptive: bool) -> None:
        self.size, self.adaptive = size, adaptive
        self.levels = len(size.mult)

    def shapes(self) -> Shapes:
        size, s = self.size, Shapes()
        widths = [size.channels * m for m in size.mult]
        s.conv("encoder.conv_in", 3, size.channels, 3, bias=False)
        width = size.channels
        for i, out in enumerate(widths):
            for j in range(size.blocks):
                self._block(s, f"encoder.down.{i}.block.{j}", width, out)
                width = out
            if i < self.levels - 1:
                s.conv(f"encoder.down.{i}.downsample", width, width, 3)
        for half in ("encoder", "decoder"):
            for j in range(size.blocks):
                self._block(s, f"{half}.mid_block.{j}", width, width)
        s.norm("encoder.norm_out", width)
        s.conv("encoder.conv_out", width, size.features, 1)
        s.conv("decoder.conv_in", size.features, width, 3)
        for i in reversed(range(self.levels)):
            if self.adaptive:
                s.linear(f"decoder.adaptive.{i}.gamma", size.features, width)
                s.linear(f"decoder.adaptive.{i}.beta", size.features, width)
            for j in range(size.blocks):
                self._block(s, f"decoder.up.{i}.block.{j}", width, widths[i])
                width = widths[i]
            if i > 0:
                s.conv(f"decoder.up.{i}.upsample.conv1", width, 4 * width, 3)
        s.norm("decoder.norm_out", width)
        s.conv("decoder.conv_out", width, 3, 3)
        return s

    def latent(self, s: State, x: Tensor) -> Tensor:
        h = conv(s, "encoder.conv_in", x)
        for i in range(self.levels):
            for j in range(self.size.blocks):
                h = residual(s, f"encoder.down.{i}.block.{j}", h)
            if i < self.levels - 1:
                h = conv(s, f"encoder.down.{i}.downsample", h, stride=2, padding=1)
        for j in range(self.size.blocks):
            h = residual(s, f"encoder.mid_block.{j}", h)
        return conv(s, "encoder.conv_out", swish(group_norm(s, "encoder.norm_out", h))).permute(0, 2, 3, 1)

    def picture(self, s: State, z_q: Tensor) -> Tensor:
        style = z_q.permute(0, 3, 1, 2)
        h = conv(s, "decoder.conv_in", style)
        for j in range(self.size.blocks):
            h = residual(s, f"decoder.mid_block.{j}", h)
        for i in reversed(range(self.levels)):
            if self.adaptive:
                h = self._adapted(s, f"decoder.adaptive.{i}", h, style)
            for j in range(self.size.blocks):
                h = residual(s, f"decoder.up.{i}.block.{j}", h)
            if i > 0:
                h = depth_to_space(conv(s, f"decoder.up.{i}.upsample.conv1", h))
        return conv(s, "decoder.conv_out", swish(group_norm(s, "decoder.norm_out", h)))

    def _adapted(self, s: State, name: str, h: Tensor, style: Tensor) -> Tensor:
        flat = style.flatten(2)
        deviation = (flat.var(-1, correction=1) + 1e-6).sqrt()
        gamma = deviation @ s[f"{name}.gamma.weight"].T + s[f"{name}.gamma.bias"]
        beta = flat.mean(-1) @ s[f"{name}.beta.weight"].T + s[f"{name}.beta.bias"]
        return gamma[:, :, None, None] * F.group_norm(h, 32, eps=1e-6) + beta[:, :, None, None]

    def _block(self, s: Shapes, name: str, cin: int, cout: int) -> None:
        s.norm(f"{name}.norm1", cin)
        s.conv(f"{name}.conv1", cin, cout, 3, bias=False)
        s.norm(f"{name}.norm2", cout)
        s.conv(f"{name}.conv2", cout, cout, 3, bias=False)
        if cin != cout:
            s.conv(f"{name}.nin_shortcut", cin, cout, 1, bias=False)


class MaskGIT:
    """Encoder and decoder of MaskGIT's VQGAN; pictures in [0, 1]."""

    def __init__(self, size: Size, *, codes: int) -> None:
        self.size, self.codes = size, codes
        self.levels = len(size.mult)

    def shapes(self, *, halves: Iterable[str] = ("encoder", "decoder")) -> Shapes:
        size, s = self.size, Shapes()
        widths = [size.channels * m for m in size.mult]
        if "encoder" in halves:
            s.conv("encoder.conv_in", 3, size.channels, 3, bias=False)
            width = size.channels
            for i, out in enumerate(widths):
                for j in range(size.blocks):
                    self._block(s, f"encoder.down.{i}.block.{j}", width, out)
                    width = out
            for j in range(size.blocks):
                self._block(s, f"encoder.mid.{j}", width, width)
            s.norm("encoder.norm_out", width)
            s.conv("encoder.conv_out", width, size.features, 1)
        width = widths[-1]
        s.conv("decoder.conv_in", size.features, width, 3)
        for j in range(size.blocks):
            self._block(s, f"decoder.mid.{j}", width, width)
        for i in reversed(range(self.levels)):
            for j in range(size.blocks):
                self._block(s, f"decoder.up.{i}.block.{j}", width, widths[i])
                width = widths[i]
            if i > 0:
                s.conv(f"decoder.up.{i}.upsample_conv", width, width, 3)
        s.norm("decoder.norm_out", width)
        s.conv("decoder.conv_out", width, 3, 3)
        if "encoder" in halves:
            s["quantize.embedding.weight"] = (self.codes, size.features)
        return s

    def latent(self, s: State, x: Tensor) -> Tensor:
        """Of pictures in [0, 1]."""
        h = conv(s, "encoder.conv_in", x)
        for i in range(self.levels):
            for j in range(self.size.blocks):
                h = residual(s, f"encoder.down.{i}.block.{j}", h, of_output=True)
            if i < self.levels - 1:
                h = F.avg_pool2d(h, 2)
        for j in range(self.size.blocks):
            h = residual(s, f"encoder.mid.{j}", h)
        return conv(s, "encoder.conv_out", swish(group_norm(s, "encoder.norm_out", h))).permute(0, 2, 3, 1)

    def picture(self, s: State, z_q: Tensor) -> Tensor:
        """In [0, 1], not clamped."""
        h = conv(s, "decoder.conv_in", z_q.permute(0, 3, 1, 2))
        for j in range(self.size.blocks):
            h = residual(s, f"decoder.mid.{j}", h)
        for i in reversed(range(self.levels)):
            for j in range(self.size.blocks):
                h = residual(s, f"decoder.up.{i}.block.{j}", h, of_output=True)
            if i > 0:
                h = conv(s, f"decoder.up.{i}.upsample_conv", twice(h))
        return conv(s, "decoder.conv_out", swish(group_norm(s, "decoder.norm_out", h)))

    def _block(self, s: Shapes, name: str, cin: int, cout: int) -> None:
        s.norm(f"{name}.norm1", cin)
        s.conv(f"{name}.conv1", cin, cout, 3, bias=False)
        s.norm(f"{name}.norm2", cout)
        s.conv(f"{name}.conv2", cout, cout, 3, bias=False)
        if cin != cout:
            s.conv(f"{name}.nin_shortcut", cout, cout, 1, bias=False)


# --- Cosmos -----------------------------------------------------------------------------------------------------------


class Cosmos:
    """Discrete image tokenizer of Cosmos: two wavelet levels, VQGAN with ``halvings`` samplers, FSQ."""

    LEVELS = (8, 8, 8, 5, 5, 5)

    def __init__(self, size: Size, *, halvings: int) -> None:
        self.size, self.halvings = size, halvings
        self.levels = len(size.mult)

    def shapes(self) -> Shapes:
        size, s = self.size, Shapes()
        widths = [size.channels * m for m in size.mult]
        gan = VQGAN(TAMING, size, dim=6, codes=1)
        s.conv("encoder.conv_in", 48, size.channels, 3)
        width = size.channels
        for i, out in enumerate(widths):
            for j in range(size.blocks):
                gan._block(s, f"encoder.down.{i}.block.{j}", width, out)
                width = out
            if i < self.halvings:
                s.conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
        for half in ("encoder", "decoder"):
            gan._block(s, f"{half}.mid.block_1", width, width)
            gan._attention(s, f"{half}.mid.attn_1", width)
            gan._block(s, f"{half}.mid.block_2", width, width)
        s.norm("encoder.norm_out", width)
        s.conv("encoder.conv_out", width, size.features, 3)
        s.conv("decoder.conv_in", size.features, width, 3)
        for i in reversed(range(self.levels)):
            for j in range(size.blocks + 1):
                gan._block(s, f"decoder.up.{i}.block.{j}", width, widths[i])
                width = widths[i]
            if i >= self.levels - self.halvings:
                s.conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
        s.norm("decoder.norm_out", width)
        s.conv("decoder.conv_out", width, 48, 3)
        s.conv("quant_conv", size.features, 6, 1)
        s.conv("post_quant_conv", 6, size.features, 1)
        return s

    def indices(self, s: State, x: Tensor) -> Tensor:
        h = conv(s, "encoder.conv_in", self._wavelets(self._wavelets(x)))
        for i in range(self.levels):
            for j in range(self.size.blocks):
                h = residual(s, f"encoder.down.{i}.block.{j}", h)
            if i < self.halvings:
                h = conv(s, f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = self._middle(s, "encoder", h)
        h = conv(s, "quant_conv", conv(s, "encoder.conv_out", swish(group_norm(s, "encoder.norm_out", h))))
        levels = torch.tensor(self.LEVELS, dtype=torch.float64)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
        bound = (h.permute(0, 2, 3, 1).double() + (offset / half).atanh()).tanh() * half - offset
        digits = bound.round() + levels // 2
        basis = torch.tensor([math.prod(self.LEVELS[:i]) for i in range(6)], dtype=torch.float64)
        return (digits * basis).sum(-1).long()

    def picture(self, s: State, indices: Tensor) -> Tensor:
        levels = torch.tensor(self.LEVELS)
        basis = torch.tensor([math.prod(self.LEVELS[:i]) for i in range(6)])
        codes = (indices[..., None] // basis % levels - levels // 2) / (levels // 2)
        h = conv(s, "decoder.conv_in", conv(s, "post_quant_conv", codes.float().permute(0, 3, 1, 2)))
        h = self._middle(s, "decoder", h)
        for i in reversed(range(self.levels)):
            for j in range(self.size.blocks + 1):
                h = residual(s, f"decoder.up.{i}.block.{j}", h)
            if i >= self.levels - self.halvings:
                h = conv(s, f"decoder.up.{i}.upsample.conv", twice(h))
        h = conv(s, "decoder.conv_out", swish(group_norm(s, "decoder.norm_out", h)))
        return self._pictures(self._pictures(h))

    def _middle(self, s: State, half: str, h: Tensor) -> Tensor:
        h = residual(s, f"{half}.mid.block_1", h)
        return residual(s, f"{half}.mid.block_2", attention(s, f"{half}.mid.attn_1", h))

    def _filters(self, channels: int) -> tuple[Tensor, Tensor]:
        low = torch.tensor([0.5**0.5, 0.5**0.5]).repeat(channels, 1, 1, 1)
        high = torch.tensor([0.5**0.5, -(0.5**0.5)]).repeat(channels, 1, 1, 1)
        return low, high

    def _wavelets(self, x: Tensor) -> Tensor:
        groups = x.shape[1]
        bands = []
        for across in self._filters(groups):
            part = F.conv2d(x, across, groups=groups, stride=(1, 2))
            bands += [F.conv2d(part, along.mT, groups=groups, stride=(2, 1)) for along in self._filters(groups)]
        return torch.cat(bands, 1) / 2

    def _pictures(self, x: Tensor) -> Tensor:
        groups = x.shape[1] // 4
        low, high = self._filters(groups)
        ll, lh, hl, hh = x.chunk(4, 1)
        options = {"groups": groups, "stride": (2, 1)}
        left = F.conv_transpose2d(ll, low.mT, **options) + F.conv_transpose2d(lh, high.mT, **options)
        right = F.conv_transpose2d(hl, low.mT, **options) + F.conv_transpose2d(hh, high.mT, **options)
        options["stride"] = (1, 2)
        return 2 * (F.conv_transpose2d(left, low, **options) + F.conv_transpose2d(right, high, **options))


# --- TiTok ------------------------------------------------------------------------------------------------------------


class TiTok:
    """TiTok; ``proxy`` for the first models, which paint through MaskGIT's decoder. Pictures in [0, 1]."""

    def __init__(
        self, *, side: int, latents: int, dim: int, codes: int, encoder: tuple[int, int], decoder: tuple[int, int],
        proxy: MaskGIT | None,
    ) -> None:  # fmt: skip
        self.side, self.latents, self.dim, self.codes = side, latents, dim, codes
        self.encoder, self.decoder, self.proxy = encoder, decoder, proxy

    def shapes(self) -> Shapes:
        s = Shapes()
        s["latent_tokens"] = (self.latents, self.encoder[0])
        s.conv("encoder.patch_embed", 3, self.encoder[0], 16)
        for half, (width, depth) in (("encoder", self.encoder), ("decoder", self.decoder)):
            s[f"{half}.class_embedding"] = (1, width)
            s[f"{half}.positional_embedding"] = (self.side**2 + 1, width)
            s[f"{half}.latent_token_positional_embedding"] = (self.latents, width)
            s.norm(f"{half}.ln_pre", width)
            s.norm(f"{half}.ln_post", width)
            for i in range(depth):
                block = f"{half}.transformer.{i}"
                s.norm(f"{block}.ln_1", width)
                s[f"{block}.attn.in_proj_weight"] = (3 * width, width)
                s[f"{block}.attn.in_proj_bias"] = (3 * width,)
                s.linear(f"{block}.attn.out_proj", width, width)
                s.norm(f"{block}.ln_2", width)
                s.linear(f"{block}.mlp.c_fc", width, 4 * width)
                s.linear(f"{block}.mlp.c_proj", 4 * width, width)
        s.conv("encoder.conv_out", self.encoder[0], self.dim, 1)
        width = self.decoder[0]
        s["decoder.mask_token"] = (1, 1, width)
        s.linear("decoder.decoder_embed", self.dim, width)
        s["quantize.embedding.weight"] = (self.codes, self.dim)
        if self.proxy is None:
            s.conv("decoder.ffn.0", width, 768, 1)
            s.conv("decoder.conv_out", 3, 3, 3)
        else:
            s.conv("decoder.ffn.0", width, 2 * width, 1)
            s.conv("decoder.ffn.2", 2 * width, self.proxy.codes, 1)
            s["pixel_quantize.embedding.weight"] = (self.proxy.codes, self.proxy.size.features)
            s.update({f"pixel_{name}": shape for name, shape in self.proxy.shapes(halves=("decoder",)).items()})
        return s

    def latent(self, s: State, x: Tensor) -> Tensor:
        """z ``[B, latents, D]``."""
        batch, width = len(x), self.encoder[0]
        h = conv(s, "encoder.patch_embed", x, stride=16, padding=0).flatten(2).transpose(1, 2)
        h = torch.cat([s["encoder.class_embedding"].expand(batch, 1, width), h], 1) + s["encoder.positional_embedding"]
        latents = s["latent_tokens"] + s["encoder.latent_token_positional_embedding"]
        h = torch.cat([h, latents.expand(batch, -1, -1)], 1)
        h = self._stack(s, "encoder", self.encoder, h)[:, 1 + self.side**2 :]
        if self.proxy is None:
            h = h.reshape(batch, self.latents, width, 1).permute(0, 2, 1, 3)
        else:  # a reshape where a transpose was meant
            h = h.reshape(batch, width, self.latents, 1)
        return conv(s, "encoder.conv_out", h)[..., 0].transpose(1, 2)

    def picture(self, s: State, z_q: Tensor) -> Tensor:
        batch, (width, _) = len(z_q), self.decoder
        x = z_q @ s["decoder.decoder_embed.weight"].T + s["decoder.decoder_embed.bias"]
        x = x + s["decoder.latent_token_positional_embedding"]
        masks = s["decoder.mask_token"].expand(batch, self.side**2, width)
        h = torch.cat([s["decoder.class_embedding"].expand(batch, 1, width), masks], 1)
        h = torch.cat([h + s["decoder.positional_embedding"], x], 1)
        h = self._stack(s, "decoder", self.decoder, h)[:, 1 : 1 + self.side**2]
        h = h.transpose(1, 2).reshape(batch, width, self.side, self.side)
        if self.proxy is not None:
            logits = conv(s, "decoder.ffn.2", torch.tanh(conv(s, "decoder.ffn.0", h)))
            mixed = torch.einsum("nchw,cd->nhwd", logits.softmax(1), s["pixel_quantize.embedding.weight"])
            inner = {name.removeprefix("pixel_"): x for name, x in s.items() if name.startswith("pixel_")}
            return self.proxy.picture(inner, mixed)
        pixels = conv(s, "decoder.ffn.0", h).reshape(batch, 16, 16, 3, self.side, self.side)
        picture = pixels.permute(0, 3, 4, 1, 5, 2).reshape(batch, 3, 16 * self.side, 16 * self.side)
        return conv(s, "decoder.conv_out", picture)

    def _stack(self, s: State, half: str, size: tuple[int, int], h: Tensor) -> Tensor:
        width, depth = size
        heads = width // 64

        def norm(name: str, y: Tensor) -> Tensor:
            return F.layer_norm(y, (width,), s[f"{half}.{name}.weight"], s[f"{half}.{name}.bias"])

        h = norm("ln_pre", h)
        for i in range(depth):
            at = f"{half}.transformer.{i}"
            y = norm(f"transformer.{i}.ln_1", h) @ s[f"{at}.attn.in_proj_weight"].T + s[f"{at}.attn.in_proj_bias"]
            q, k, v = (part.unflatten(-1, (heads, 64)).transpose(1, 2) for part in y.chunk(3, -1))
            y = (torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v).transpose(1, 2).flatten(2)
            h = h + y @ s[f"{at}.attn.out_proj.weight"].T + s[f"{at}.attn.out_proj.bias"]
            y = norm(f"transformer.{i}.ln_2", h) @ s[f"{at}.mlp.c_fc.weight"].T + s[f"{at}.mlp.c_fc.bias"]
            h = h + F.gelu(y) @ s[f"{at}.mlp.c_proj.weight"].T + s[f"{at}.mlp.c_proj.bias"]
        return norm("ln_post", h)


# --- generators -------------------------------------------------------------------------------------------------------


class Llama:
    """The class-conditional generator of LlamaGen; ``adaptive`` for that of IBQ."""

    def __init__(self, *, dim: int, layers: int, heads: int, hidden: int, codes: int, adaptive: bool) -> None:
        self.dim, self.layers, self.heads, self.hidden, self.codes = dim, layers, heads, hidden, codes
        self.adaptive = adaptive
        self.block = "transformer.blocks" if adaptive else "layers"
        if adaptive:
            self.tokens, self.classes = "transformer.tok_emb.weight", "transformer.class_emb.embedding_table.weight"
            self.norm, self.head = "transformer.head_nm.rmsnorm.weight", "transformer.head.weight"
        else:
            self.tokens, self.classes = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
            self.norm, self.head = "norm.weight", "output.weight"

    def shapes(self, *, classes: int = 1000) -> Shapes:
        s = Shapes({self.tokens: (self.codes, self.dim), self.classes: (classes + 1, self.dim)})
        for i in range(self.layers):
            at = f"{self.block}.{i}"
            s.linear(f"{at}.attention.wqkv", self.dim, 3 * self.dim, bias=False)
            s.linear(f"{at}.attention.wo", self.dim, self.dim, bias=False)
            for gate in ("w1", "w3"):
                s.linear(f"{at}.feed_forward.{gate}", self.dim, self.hidden, bias=False)
            s.linear(f"{at}.feed_forward.w2", self.hidden, self.dim, bias=False)
            s[f"{at}.attention_norm.weight"] = s[f"{at}.ffn_norm.weight"] = (self.dim,)
            if self.adaptive:
                s.linear(f"{at}.ada_lin.1", self.dim, 6 * self.dim)
        s[self.norm], s[self.head] = (self.dim,), (self.codes, self.dim)
        if self.adaptive:
            s.linear("transformer.head_nm.ada_lin.1", self.dim, 2 * self.dim)
        return s

    def logits(self, s: State, label: int, tokens: Tensor, side: int) -> Tensor:
        """``[N, V]``: of every token of a picture, given the class and those before it."""
        condition = s[self.classes][label]
        h = torch.cat([condition[None], s[self.tokens][tokens[:-1]]])
        turns = self._turns(side)[: len(h)]
        for i in range(self.layers):
            at = f"{self.block}.{i}"
            g1, g2, s1, s2, b1, b2 = self._modulation(s, f"{at}.ada_lin.1", condition, 6)
            y = self._rms(h, s[f"{at}.attention_norm.weight"]) * (1 + s1) + b1
            h = h + g1 * self._attention(s, at, y, turns)
            y = self._rms(h, s[f"{at}.ffn_norm.weight"]) * (1 + s2) + b2
            gate, value = (y @ s[f"{at}.feed_forward.{w}.weight"].T for w in ("w1", "w3"))
            h = h + g2 * (F.silu(gate) * value @ s[f"{at}.feed_forward.w2.weight"].T)
        h = self._rms(h, s[self.norm])
        if self.adaptive:
            scale, shift = self._modulation(s, "transformer.head_nm.ada_lin.1", condition, 2)
            h = h * (1 + scale) + shift
        return h @ s[self.head].T

    def _modulation(self, s: State, name: str, condition: Tensor, parts: int) -> Sequence[Tensor]:
        if not self.adaptive:
            return [torch.ones(()), torch.ones(()), *[torch.zeros(())] * 4]
        return (F.silu(condition) @ s[f"{name}.weight"].T + s[f"{name}.bias"]).chunk(parts)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def _turns(self, side: int) -> Tensor:
        """Complex turns ``[1 + side^2, head / 2]``: row frequencies, then column; the class has zero, not one."""
        head = self.dim // self.heads
        frequencies = 10000.0 ** (-torch.arange(0, head // 2, 2) / (head // 2))
        table = [torch.zeros(head // 2, dtype=torch.complex64)]
        for row in range(side):
            for column in range(side):
                turns = torch.cat([row * frequencies, column * frequencies])
                table.append(torch.polar(torch.ones(head // 2), turns))
        return torch.stack(table)

    def _attention(self, s: State, at: str, y: Tensor, turns: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)) for part in (y @ s[f"{at}.attention.wqkv.weight"].T).chunk(3, -1)
        )

        def turned(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

        scores = torch.einsum("qhd,khd->hqk", turned(q), turned(k)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(len(y), len(y)).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        return mixed @ s[f"{at}.attention.wo.weight"].T
