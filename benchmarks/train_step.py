"""Training steps of the convolutional autoencoder beside plain PyTorch written layer by layer, in one run.

    python benchmarks/train_step.py [--channels 64 --size-px 64 --batch 4] [--repeats 7] [--out folder]
    python benchmarks/train_step.py --channels 128 --size-px 256 --batch 8 --device cuda --precision bf16

One step is forward, L1, backward and Adam of the IBQ architecture: multipliers 1, 1, 2, 2, 4, four residual blocks a
level, attention at stride 16. The plain side is written as the VQGAN code is: swish as ``x * sigmoid(x)``, attention as
two ``bmm`` around a softmax, dropout of probability 0. Both sides have the same weights and must give the same pictures
and, in float64, the same gradients before anything is timed. Steps alternate; a ratio is the median over the rounds of
ours by the plain one of the same round, so that a machine busy with other work slows both alike. Writes train_step.json
and train_step.md into the folder, and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessella.autoencoders import Conv

MULTIPLIERS = (1, 1, 2, 2, 4)
NUM_RES_BLOCKS = 4
ATTENTION_STRIDE = 16
LATENT_DIM = 256
ROWS = ("ours", "ours, channels last", "ours, compiled")


class Ours(nn.Module):
    """Pictures to pictures through the autoencoder of the package."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.autoencoder = Conv(
            channels=channels, multipliers=MULTIPLIERS, num_res_blocks=NUM_RES_BLOCKS,
            attention_strides=(ATTENTION_STRIDE,), latent_dim=LATENT_DIM,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(self.autoencoder.encode(x))


# --- the same layers, plainly. Modules are made in the same order, so that weights can be copied one by one -----------


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class PlainSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return swish(x)


def normalize(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6, affine=True)


class PlainResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm1 = normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=1, padding=1)
        self.norm2 = normalize(out_channels)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=1, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=1, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.nin_shortcut(x)
        return x + h


class PlainAttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalize(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1, stride=1, padding=0)
        self.k = nn.Conv2d(channels, channels, kernel_size=1, stride=1, padding=0)
        self.v = nn.Conv2d(channels, channels, kernel_size=1, stride=1, padding=0)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1, stride=1, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        batch, channels, height, width = q.shape
        q = q.reshape(batch, channels, height * width).permute(0, 2, 1)
        k = k.reshape(batch, channels, height * width)
        weights = F.softmax(torch.bmm(q, k) * channels**-0.5, dim=2)
        v = v.reshape(batch, channels, height * width)
        h = torch.bmm(v, weights.permute(0, 2, 1)).reshape(batch, channels, height, width)
        return x + self.proj_out(h)


class PlainDownsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1), mode="constant", value=0))


class PlainUpsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def plain_levels(
    width: int, widths: Sequence[int], num_blocks: int, attend: Sequence[bool], resample: Callable[[int], nn.Module]
) -> nn.ModuleList:
    blocks = nn.ModuleList()
    for level, out in enumerate(widths):
        for _ in range(num_blocks):
            blocks.append(PlainResnetBlock(width, out))
            width = out
            if attend[level]:
                blocks.append(PlainAttnBlock(width))
        if level < len(widths) - 1:
            blocks.append(resample(width))
    return blocks


def plain_middle(channels: int) -> list[nn.Module]:
    return [PlainResnetBlock(channels, channels), PlainAttnBlock(channels), PlainResnetBlock(channels, channels)]


class Plain(nn.Module):
    """Encoder and decoder in one list of layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in MULTIPLIERS]
        attend = [2**level == ATTENTION_STRIDE for level in range(len(widths))]
        self.layers = nn.ModuleList([
            nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1),
            *plain_levels(channels, widths, NUM_RES_BLOCKS, attend, PlainDownsample),
            *plain_middle(widths[-1]),
            normalize(widths[-1]),
            PlainSwish(),
            nn.Conv2d(widths[-1], LATENT_DIM, kernel_size=3, stride=1, padding=1),
            nn.Conv2d(LATENT_DIM, widths[-1], kernel_size=3, stride=1, padding=1),
            *plain_middle(widths[-1]),
            *plain_levels(widths[-1], widths[::-1], NUM_RES_BLOCKS + 1, attend[::-1], PlainUpsample),
            normalize(channels),
            PlainSwish(),
            nn.Conv2d(channels, 3, kernel_size=3, stride=1, padding=1),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# --- measuring --------------------------------------------------------------------------------------------------------


class TrainStep:
    """Forward, L1, backward, Adam."""

    def __init__(self, model: nn.Module, x: Tensor, precision: str) -> None:
        self.model, self.x = model, x
        self.autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.5, 0.9))

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = (self.model(self.x) - self.x).abs().mean()
        loss.backward()
        self.optimizer.step()


def seconds(step: TrainStep) -> float:
    synchronize(step.x.device)
    start = time.perf_counter()
    step()
    synchronize(step.x.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_models(channels: int, x: Tensor) -> tuple[Plain, dict[str, nn.Module]]:
    """The plain model and ours, all of the same weights, checked to compute the same."""
    torch.manual_seed(0)
    plain = Plain(channels).to(x.device)
    ours: dict[str, nn.Module] = {name: Ours(channels).to(x.device) for name in ROWS}
    for model in ours.values():
        model.load_state_dict(dict(zip(model.state_dict(), plain.state_dict().values(), strict=True)))
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    check_same(copy.deepcopy(ours[ROWS[0]]).double(), copy.deepcopy(plain).double(), x[:1, :, :32, :32].double())
    ours["ours, channels last"].to(memory_format=torch.channels_last)
    ours["ours, compiled"].compile()
    return plain, ours


def check_same(ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Same pictures and same gradients: of a smooth loss, L1's being another where rounding changes a sign."""
    expected, got = plain(x), ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    for out in (expected, got):
        (out - x).square().mean().backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    x = torch.rand(arguments.batch, 3, arguments.size_px, arguments.size_px, device=device) * 2 - 1
    plain, ours = make_models(arguments.channels, x)
    last = x.contiguous(memory_format=torch.channels_last)
    steps = {
        name: TrainStep(model, last if name == "ours, channels last" else x, arguments.precision)
        for name, model in {"plain": plain, **ours}.items()
    }
    warm_up: dict[str, float] = {}
    for name, step in steps.items():
        warm_up[name] = seconds(step) + seconds(step)
        print(f"{name}: two steps to warm up in {warm_up[name]:.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    rows: list[dict[str, object]] = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["plain"], strict=True)]
        rows.append(
            {"model": name, "ms": 1e3 * statistics.median(values), "ratio": statistics.median(ratios),
             "lowest": min(ratios), "highest": max(ratios), "warm_up_s": warm_up[name]}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64, help="width of the first level; 128 as published")
    parser.add_argument("--size-px", type=int, default=64, help="side of the pictures; 256 as published")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments)
    device = torch.device(arguments.device)
    settings = {
        "channels": arguments.channels,
        "size_px": arguments.size_px,
        "batch": arguments.batch,
        "precision": arguments.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "torch": torch.__version__,
    }
    lines = ["| model | ms a step | times the plain one | lowest | highest |", "|---|---|---|---|---|"]
    lines += ["| {model} | {ms:.0f} | {ratio:.3f} | {lowest:.3f} | {highest:.3f} |".format(**row) for row in rows]
    lines += ["", "; ".join(f"{name} {value}" for name, value in settings.items()) + "."]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "train_step.json").write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n")
    (arguments.out / "train_step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
