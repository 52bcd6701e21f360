"""Real-time factors of SimVQ's audio codec at its published size, and memory against the length of a file.

    OMP_NUM_THREADS=2 python benchmarks/audio.py [--seconds 10] [--rounds 5] [--long-minutes 30] [--out folder]

Random weights, float32 on the CPU. Beside it the same layers built from plain PyTorch modules with the same weights,
whose results are compared first, and, where transformers is installed, its EnCodec of the 24 kHz model's shape. All are
measured in one run after one warm-up, each round in another order; times are medians of wall time. Memory is the peak
of a process of its own that streams a file through the small codec. Writes audio.json into the folder, and prints the
table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import tessella
from tessella.autoencoders.seanet import CausalConv, SEANetEncoder
from tessella.autoencoders.vocos import Vocos
from tessella.processes import keep_freed_memory

RATE = 24_000
RECIPE = "simvq_audio_4k"

_STREAM = r"""
import re, sys, torch, tessella
from pathlib import Path
tokenizer = tessella.build("simvq_audio_small").eval()
piece = 0.1 * torch.randn(1, 1, 24_000)
stream = tokenizer.stream()
count = 0
for x_hat in stream.decode(stream.encode(piece for _ in range(int(sys.argv[1])))):
    count += x_hat.shape[-1]
print(count, int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


class PlainConv(nn.Module):
    """A convolution with its weight norm folded in, reflected in front."""

    def __init__(self, source: CausalConv) -> None:
        super().__init__()
        conv = source.conv
        self.conv = nn.Conv1d(conv.in_channels, conv.out_channels, conv.kernel_size[0], stride=conv.stride[0])
        self.conv.weight.data, self.conv.bias.data = conv.weight.detach(), conv.bias.detach()
        self.padding = source.padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (self.padding, 0), mode="reflect") if self.padding else x)


class PlainResidual(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(PlainConv(m) if isinstance(m, CausalConv) else nn.ELU() for m in source.block.model)
        )
        self.shortcut = PlainConv(source.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class PlainLSTM(nn.Module):
    def __init__(self, source: Any) -> None:
        super().__init__()
        self.lstm = source.lstm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lstm(x.mT)[0].mT


def plain_encoder(source: SEANetEncoder) -> nn.Module:
    """The same layers as plain modules."""
    layers: list[nn.Module] = []
    for layer in source.model:
        if isinstance(layer, CausalConv):
            layers.append(PlainConv(layer))
        elif isinstance(layer, nn.ELU):
            layers.append(nn.ELU())
        else:
            layers.append(PlainLSTM(layer) if hasattr(layer, "lstm") else PlainResidual(layer))
    return nn.Sequential(*layers)


def plain_decode(model: Vocos, latent: Tensor) -> Tensor:
    """The same decoder, torch's own inverse transform at its end."""
    features = model.head(model.backbone(latent)).mT
    log_magnitude, phase = features.chunk(2, 1)
    spectra = torch.polar(log_magnitude.exp().clamp(max=1e2), phase)
    frames = torch.fft.irfft(spectra, model.n_fft, dim=1) * model.window[:, None]
    length, trim = (frames.shape[-1] - 1) * model.stride + model.n_fft, (model.n_fft - model.stride) // 2
    out = functional.fold(frames, (1, length), (1, model.n_fft), stride=(1, model.stride))[:, 0, 0]
    squares = model.window.square()[None, :, None].expand(1, -1, frames.shape[-1])
    envelope = functional.fold(squares, (1, length), (1, model.n_fft), stride=(1, model.stride))[:, 0, 0]
    return (out / envelope.clamp(min=1e-11))[:, trim : length - trim][:, None]


def contestants(x: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; the plain build's results are compared first."""
    tokenizer = tessella.build(RECIPE).eval()
    model, quantizer = tokenizer.autoencoder, tokenizer.quantizer
    assert isinstance(model, Vocos)
    plain = plain_encoder(model.encoder).eval()
    codebook = quantizer.codebook
    indices = tokenizer.encode(x)

    def plain_encode() -> Tensor:
        z = plain(x).mT
        return (z @ codebook.T - 0.5 * codebook.square().sum(1)).argmax(-1)

    same = (plain_encode() == indices[..., 0]).float().mean().item()
    if same < 0.999:
        raise SystemExit(f"the plain build gives only {same:.2%} of the tokens")
    codes = quantizer.indices_to_codes(indices)
    torch.testing.assert_close(plain_decode(model, codes), tokenizer.decode(indices), rtol=1e-3, atol=1e-3)
    timed: dict[str, Callable[[], Any]] = {
        "tessella encode": lambda: tokenizer.encode(x),
        "plain encode": plain_encode,
        "tessella decode": lambda: tokenizer.decode(indices),
        "plain decode": lambda: plain_decode(model, functional.embedding(indices[..., 0], codebook)),
    }
    try:
        from transformers import EncodecConfig, EncodecModel
    except ImportError:
        return timed
    peer = EncodecModel(EncodecConfig()).eval()
    own = tessella.build("encodec_24khz").eval()
    for stage in own.quantizer.stages:
        stage.fit(torch.randn(2048, stage.dim))
    bandwidth = 6.0
    codes_of_peer = peer.encode(x, bandwidth=bandwidth).audio_codes
    own_indices = own.encode(x)
    return timed | {
        "tessella encodec encode": lambda: own.encode(x),
        "transformers encodec encode": lambda: peer.encode(x, bandwidth=bandwidth),
        "tessella encodec decode": lambda: own.decode(own_indices),
        "transformers encodec decode": lambda: peer.decode(codes_of_peer, [None]),
    }


@torch.no_grad()
def measure(seconds: float, rounds: int) -> dict[str, float]:
    """Seconds of sound in a second, by contestant."""
    x = 0.1 * torch.randn(1, 1, round(seconds * RATE))
    timed = contestants(x)
    times: dict[str, list[float]] = {name: [] for name in timed}
    names, order = list(timed), random.Random(0)
    for turn in range(rounds + 1):
        order.shuffle(names)  # who comes after its like finds memory and caches warm
        for name in names:
            began = time.perf_counter()
            timed[name]()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: seconds / statistics.median(times[name]) for name in timed}


def peak_mib(seconds: int) -> float:
    """Of a process that streams so many seconds."""
    done = subprocess.run([sys.executable, "-c", _STREAM, str(seconds)], capture_output=True, text=True, check=True)
    samples, peak = done.stdout.split()
    assert int(samples) == seconds * RATE
    return float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-minutes", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does; for all alike
    torch.manual_seed(0)
    record = {
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "torch": torch.__version__,
        "real_time_factor": measure(options.seconds, options.rounds),
        "peak_mib": {"10 s": peak_mib(10), f"{options.long_minutes} min": peak_mib(60 * options.long_minutes)},
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "audio.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, factor in record["real_time_factor"].items():
        print(f"{name:32} {factor:8.2f} x real time")
    for name, peak in record["peak_mib"].items():
        print(f"streaming {name:22} {peak:8.0f} MiB")


if __name__ == "__main__":
    main()
