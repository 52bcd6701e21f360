"""SimVQ's audio tokenizer, stated once more: names, shapes, and what its program computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.interop.originals import Shapes, State, swish


class SimVQAudio:
    """SEANet's encoder (causal, one residual layer a stride, two LSTM layers) and the decoder of Vocos."""

    def __init__(
        self, *, channels: int = 32, features: int = 512, dim: int = 768, hidden: int = 2304, blocks: int = 12,
        codes: int = 65536, strides: Sequence[int] = (2, 4, 5, 8), n_fft: int = 1280,
    ) -> None:  # fmt: skip
        self.channels, self.features, self.dim, self.hidden, self.blocks = channels, features, dim, hidden, blocks
        self.codes, self.strides, self.n_fft = codes, strides, n_fft
        self.hop = int(torch.tensor(strides).prod())

    def encoder_shapes(self) -> Shapes:
        s = Shapes()
        width = self.channels
        self._normed(s, "encoder.model.0", 1, width, 7)
        layer = 1
        for stride in self.strides:
            self._normed(s, f"encoder.model.{layer}.block.1", width, width // 2, 3)
            self._normed(s, f"encoder.model.{layer}.block.3", width // 2, width, 1)
            self._normed(s, f"encoder.model.{layer}.shortcut", width, width, 1)
            self._normed(s, f"encoder.model.{layer + 2}", width, 2 * width, 2 * stride)
            width, layer = 2 * width, layer + 3
        for number in range(2):
            for kind in ("ih", "hh"):
                s[f"encoder.model.{layer}.lstm.weight_{kind}_l{number}"] = (4 * width, width)
                s[f"encoder.model.{layer}.lstm.bias_{kind}_l{number}"] = (4 * width,)
        self._normed(s, f"encoder.model.{layer + 2}", width, self.features, 7)
        return s

    def shapes(self) -> Shapes:
        s = self.encoder_shapes()
        dim = self.dim
        self._conv(s, "backbone.embed", self.features, dim, 7)
        for place in (0, 1, 3, 4):
            for half in ("1", "2"):
                s.norm(f"backbone.pos_net.{place}.norm{half}", dim)
                self._conv(s, f"backbone.pos_net.{place}.conv{half}", dim, dim, 3)
        s.norm("backbone.pos_net.2.norm", dim)
        for part in ("q", "k", "v", "proj_out"):
            self._conv(s, f"backbone.pos_net.2.{part}", dim, dim, 1)
        s.norm("backbone.pos_net.5", dim)
        s.norm("backbone.norm", dim)
        for block in range(self.blocks):
            at = f"backbone.convnext.{block}"
            s[f"{at}.gamma"] = (dim,)
            s[f"{at}.dwconv.weight"], s[f"{at}.dwconv.bias"] = (dim, 1, 7), (dim,)
            s.norm(f"{at}.norm", dim)
            s.linear(f"{at}.pwconv1", dim, self.hidden)
            s.linear(f"{at}.pwconv2", self.hidden, dim)
        s.norm("backbone.final_layer_norm", dim)
        s.linear("head.out", dim, self.n_fft + 2)
        s["quantize.embedding.weight"] = (self.codes, self.features)
        s.linear("quantize.embedding_proj", self.features, self.features)
        return s

    def unused(self) -> State:
        """Of the decoder that is never called, and a window."""
        s = Shapes({"head.istft.window": (self.n_fft,)})
        self._normed(s, "decoder.model.0", self.features, 16 * self.channels, 7)
        self._normed(s, "decoder.model.15", self.channels, 1, 7)
        return s.random(0)

    def codebook(self, s: State) -> Tensor:
        return (
            s["quantize.embedding.weight"] @ s["quantize.embedding_proj.weight"].T + s["quantize.embedding_proj.bias"]
        )

    def latent(self, s: State, x: Tensor) -> Tensor:
        """``[B, t, E]`` of waves ``[B, 1, T]``, T a multiple of the hop."""
        h = self._causal(s, "encoder.model.0", x)
        layer = 1
        for stride in self.strides:
            inner = self._causal(s, f"encoder.model.{layer}.block.1", F.elu(h))
            inner = self._causal(s, f"encoder.model.{layer}.block.3", F.elu(inner))
            h = self._causal(s, f"encoder.model.{layer}.shortcut", h) + inner
            h = self._causal(s, f"encoder.model.{layer + 2}", F.elu(h), stride=stride)
            layer += 3
        h = h + self._lstm(s, f"encoder.model.{layer}.lstm", h.mT).mT
        return self._causal(s, f"encoder.model.{layer + 2}", F.elu(h)).mT

    def wave(self, s: State, z_q: Tensor) -> Tensor:
        """``[B, 1, t hop]``."""
        h = self._plain(s, "backbone.embed", z_q.mT)
        for place in range(5):
            h = self._attention(s, h) if place == 2 else self._residual(s, f"backbone.pos_net.{place}", h)
        h = self._layer_norm(s, "backbone.norm", self._group_norm(s, "backbone.pos_net.5", h).mT).mT
        for block in range(self.blocks):
            at = f"backbone.convnext.{block}"
            y = F.conv1d(h, s[f"{at}.dwconv.weight"], s[f"{at}.dwconv.bias"], padding=3, groups=self.dim).mT
            y = F.gelu(
                F.linear(self._layer_norm(s, f"{at}.norm", y), s[f"{at}.pwconv1.weight"], s[f"{at}.pwconv1.bias"])
            )
            y = F.linear(y, s[f"{at}.pwconv2.weight"], s[f"{at}.pwconv2.bias"])
            h = h + (s[f"{at}.gamma"] * y).mT
        h = F.linear(self._layer_norm(s, "backbone.final_layer_norm", h.mT), s["head.out.weight"], s["head.out.bias"])
        magnitude, phase = h.chunk(2, -1)
        return self._overlap(torch.polar(magnitude.exp().clamp(max=100), phase))

    def _overlap(self, spectra: Tensor) -> Tensor:
        """Frame after frame, windowed and summed; then over the sum of squared windows; 480 samples off each end."""
        window = torch.hann_window(self.n_fft)
        frames = torch.fft.irfft(spectra, self.n_fft, dim=-1) * window
        batch, count, _ = frames.shape
        total = torch.zeros(batch, (count - 1) * self.hop + self.n_fft)
        weight = torch.zeros(total.shape[1])
        for place in range(count):
            part = slice(place * self.hop, place * self.hop + self.n_fft)
            total[:, part] += frames[:, place]
            weight[part] += window.square()
        cut = (self.n_fft - self.hop) // 2
        return (total[:, cut:-cut] / weight[cut:-cut])[:, None]

    def _normed(self, s: Shapes, name: str, cin: int, cout: int, kernel: int) -> None:
        s[f"{name}.conv.conv.bias"], s[f"{name}.conv.conv.weight_g"] = (cout,), (cout, 1, 1)
        s[f"{name}.conv.conv.weight_v"] = (cout, cin, kernel)

    def _conv(self, s: Shapes, name: str, cin: int, cout: int, kernel: int) -> None:
        s[f"{name}.weight"], s[f"{name}.bias"] = (cout, cin, kernel), (cout,)

    def _causal(self, s: State, name: str, x: Tensor, *, stride: int = 1) -> Tensor:
        at = f"{name}.conv.conv"
        direction = s[f"{at}.weight_v"]
        weight = s[f"{at}.weight_g"] * direction / direction.flatten(1).norm(dim=1)[:, None, None]
        past = direction.shape[2] - stride
        return F.conv1d(F.pad(x, (past, 0), mode="reflect") if past else x, weight, s[f"{at}.bias"], stride=stride)

    def _plain(self, s: State, name: str, x: Tensor) -> Tensor:
        weight = s[f"{name}.weight"]
        return F.conv1d(x, weight, s[f"{name}.bias"], padding=weight.shape[2] // 2)

    def _group_norm(self, s: State, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-6)

    def _layer_norm(self, s: State, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-6)

    def _residual(self, s: State, name: str, x: Tensor) -> Tensor:
        h = self._plain(s, f"{name}.conv1", swish(self._group_norm(s, f"{name}.norm1", x)))
        return x + self._plain(s, f"{name}.conv2", swish(self._group_norm(s, f"{name}.norm2", h)))

    def _attention(self, s: State, x: Tensor) -> Tensor:
        at = "backbone.pos_net.2"
        q, k, v = (self._plain(s, f"{at}.{part}", self._group_norm(s, f"{at}.norm", x)) for part in ("q", "k", "v"))
        weights = torch.softmax(q.mT @ k * self.dim**-0.5, -1)
        return x + self._plain(s, f"{at}.proj_out", v @ weights.mT)

    def _lstm(self, s: State, name: str, x: Tensor) -> Tensor:
        for number in range(2):
            hidden = cell = torch.zeros(len(x), x.shape[2])
            outputs = []
            for frame in x.unbind(1):
                gates = frame @ s[f"{name}.weight_ih_l{number}"].T + s[f"{name}.bias_ih_l{number}"]
                gates = gates + hidden @ s[f"{name}.weight_hh_l{number}"].T + s[f"{name}.bias_hh_l{number}"]
                entry, forget, candidate, leave = gates.chunk(4, -1)
                cell = forget.sigmoid() * cell + entry.sigmoid() * candidate.tanh()
                hidden = leave.sigmoid() * cell.tanh()
                outputs.append(hidden)
            x = torch.stack(outputs, 1)
        return x


class EnCodec(SimVQAudio):
    """EnCodec at 24 kHz under Meta's names: SEANet's encoder and decoder, and codebooks one after another."""

    def __init__(self, *, channels: int = 32, features: int = 128, codes: int = 1024, codebooks: int = 32) -> None:
        super().__init__(channels=channels, features=features, codes=codes)
        self.codebooks = codebooks

    def shapes(self) -> Shapes:
        s = self.encoder_shapes()
        width = 16 * self.channels
        self._normed(s, "decoder.model.0", self.features, width, 7)
        for number in range(2):
            for kind in ("ih", "hh"):
                s[f"decoder.model.1.lstm.weight_{kind}_l{number}"] = (4 * width, width)
                s[f"decoder.model.1.lstm.bias_{kind}_l{number}"] = (4 * width,)
        layer = 3
        for stride in reversed(self.strides):
            at = f"decoder.model.{layer}.convtr.convtr"
            s[f"{at}.bias"], s[f"{at}.weight_g"] = (width // 2,), (width, 1, 1)
            s[f"{at}.weight_v"] = (width, width // 2, 2 * stride)
            width //= 2
            self._normed(s, f"decoder.model.{layer + 1}.block.1", width, width // 2, 3)
            self._normed(s, f"decoder.model.{layer + 1}.block.3", width // 2, width, 1)
            self._normed(s, f"decoder.model.{layer + 1}.shortcut", width, width, 1)
            layer += 3
        self._normed(s, "decoder.model.15", width, 1, 7)
        for stage in range(self.codebooks):
            s[f"quantizer.vq.layers.{stage}._codebook.embed"] = (self.codes, self.features)
        return s

    def statistics(self, s: State) -> State:
        """What the moving averages leave beside the codes."""
        found = {}
        for stage in range(self.codebooks):
            at = f"quantizer.vq.layers.{stage}._codebook"
            found |= {f"{at}.inited": torch.ones(1), f"{at}.cluster_size": torch.ones(self.codes)}
            found[f"{at}.embed_avg"] = torch.zeros(self.codes, self.features)
        return found

    def quantized(self, s: State, z: Tensor) -> tuple[Tensor, Tensor]:
        """Indices ``[B, t, K]`` and the sum of their codes."""
        rest, indices = z, []
        for stage in range(self.codebooks):
            codes = s[f"quantizer.vq.layers.{stage}._codebook.embed"]
            chosen = torch.cdist(rest.double(), codes.double().expand(len(z), -1, -1)).argmin(-1)
            rest = rest - codes[chosen]
            indices.append(chosen)
        return torch.stack(indices, -1), z - rest

    def wave(self, s: State, z_q: Tensor) -> Tensor:
        h = self._causal(s, "decoder.model.0", z_q.mT)
        h = h + self._lstm(s, "decoder.model.1.lstm", h.mT).mT
        layer = 3
        for stride in reversed(self.strides):
            at = f"decoder.model.{layer}.convtr.convtr"
            direction = s[f"{at}.weight_v"]
            weight = s[f"{at}.weight_g"] * direction / direction.flatten(1).norm(dim=1)[:, None, None]
            h = F.conv_transpose1d(F.elu(h), weight, s[f"{at}.bias"], stride=stride)[..., :-stride]
            inner = self._causal(s, f"decoder.model.{layer + 1}.block.1", F.elu(h))
            inner = self._causal(s, f"decoder.model.{layer + 1}.block.3", F.elu(inner))
            h = self._causal(s, f"decoder.model.{layer + 1}.shortcut", h) + inner
            layer += 3
        return self._causal(s, "decoder.model.15", F.elu(h))


def as_transformers(s: State) -> State:
    """The same under the names of transformers, with today's weight normalisation."""
    renamed = {}
    for name, x in s.items():
        name = name.replace("encoder.model.", "encoder.layers.").replace("decoder.model.", "decoder.layers.")
        name = name.replace("convtr.convtr", "conv").replace("conv.conv", "conv")
        name = name.replace("quantizer.vq.layers", "quantizer.layers").replace("_codebook", "codebook")
        name = name.replace("weight_g", "parametrizations.weight.original0")
        renamed[name.replace("weight_v", "parametrizations.weight.original1")] = x
    return renamed
