"""Everything that a machine with a GPU is asked, most important first, in a few minutes.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--only NAME ...] [--smoke] [--out benchmarks/results]

Runs the tests marked ``gpu``; times the kernels of the large codebook against the bare matrix product, with their
memory and the tokens that differ from float64; samples at LlamaGen's sizes beside the memory's bandwidth, and beside
transformers where it is installed; coarse-to-fine beside next-token generation at batch 64; a training step beside the
same layers in plain PyTorch; and trains IBQ with 262,144 codes for as long as is left. Each part has a try of its own:
a fault loses one row. Writes ``gpu.json`` after every part and ``gpu.md`` at the end. ``--smoke`` makes everything
small, to see on any machine that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.generators.ar import AR
from tessella.generators.base import Generator
from tessella.generators.coarse_to_fine import CoarseToFine
from tessella.ops import index_backprop, nearest
from tessella.tokenizer import TokenSpace

HERE = Path(__file__).parent
SHAPES = {"b": (768, 12, 12), "l": (1024, 24, 16), "smoke": (32, 1, 2)}
CONDITIONER = {"name": "label", "num_classes": 10}
GIB = 2**30


@dataclass
class Settings:
    device: torch.device
    smoke: bool
    ends: float

    @property
    def left_sec(self) -> float:
        return self.ends - time.monotonic()

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def seconds(self, run: Callable[[], Any], repeats: int = 5) -> float:
        """The median of a few runs after one that warms up and tunes."""
        run()
        times = []
        for _ in range(1 if self.smoke else repeats):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def gpu_tests(settings: Settings) -> dict[str, Any]:
    """The tests marked ``gpu``; on a machine without one they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        command, cwd=HERE.parent, capture_output=True, text=True, timeout=max(settings.left_sec, 1)
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    if done.returncode not in (0, 5):  # 5: nothing was selected
        raise RuntimeError(done.stdout[-2000:])
    return {"result": last}


def kernels(settings: Settings) -> dict[str, Any]:
    """``nearest`` and ``index_backprop`` at (16384, 262144, 256)."""
    n, v, d = (64, 512, 16) if settings.smoke else (16384, 262144, 256)
    rng = torch.Generator(settings.device).manual_seed(0)
    z = torch.randn(n, d, generator=rng, device=settings.device, requires_grad=True)
    codebook = torch.randn(v, d, generator=rng, device=settings.device, requires_grad=True)
    rows = max(1, GIB // (4 * v))

    def product() -> None:
        for part in z.detach().split(rows):
            part @ codebook.detach().T

    def step() -> None:
        z_q, _, loss, _ = index_backprop(z, codebook)
        (z_q.square().mean() + loss).backward()
        z.grad = codebook.grad = None

    found: dict[str, Any] = {"N, V, D": (n, v, d), "product_sec": settings.seconds(product)}
    for name, run, products in (("nearest", lambda: nearest(z.detach(), codebook.detach()), 1),
                                ("index_backprop", step, 7)):  # fmt: skip
        if settings.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        took = settings.seconds(run)
        found[f"{name}_sec"] = took
        found[f"{name}_share_of_matrix_rate"] = products * found["product_sec"] / took
        if settings.device.type == "cuda":
            found[f"{name}_extra_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
    some = z.detach()[:256]
    exact = (some.double() @ codebook.detach().double().T - codebook.detach().double().square().sum(1) / 2).argmax(1)
    found["tokens_unlike_float64_of_256"] = int((nearest(some, codebook.detach()) != exact).sum())
    return found


def space(settings: Settings) -> TokenSpace:
    return TokenSpace((4, 4) if settings.smoke else (16, 16), 1, 64 if settings.smoke else 16384, "benchmark")


def model(settings: Settings, size: str) -> AR:
    dim, num_layers, num_heads = SHAPES[size]
    made = AR(space(settings), conditioner=CONDITIONER, dim=dim, num_layers=num_layers, num_heads=num_heads)
    return made.to(settings.device).eval()


def draw(generator: Generator, batch: int, device: torch.device) -> Callable[[], Tensor]:
    condition = torch.arange(batch, device=device) % CONDITIONER["num_classes"]  # type: ignore[operator]
    return lambda: generator.sample(condition, rng=0)


def sampling(settings: Settings) -> dict[str, Any]:
    """Tokens a second, and how near a step comes to reading the weights once."""
    found: dict[str, Any] = {}
    block = torch.empty((1 if settings.smoke else 256) * 2**20, device=settings.device)
    bandwidth = 2 * block.nbytes / settings.seconds(lambda: block.clone())
    found["bandwidth_gb_per_sec"] = bandwidth / 1e9
    for size in ("smoke",) if settings.smoke else ("b", "l"):
        generator = model(settings, size)
        weights = sum(parameter.nbytes for parameter in generator.parameters())
        for batch in (1, 2) if settings.smoke else (1, 64):
            took = settings.seconds(draw(generator, batch, settings.device), repeats=3)
            tokens = generator.space.sequence_length
            found[f"{size}, batch {batch}"] = {
                "tokens_per_sec": batch * tokens / took,
                "share_of_bandwidth": weights * tokens / took / bandwidth,
                "transformers_tokens_per_sec": peer(settings, size, batch),
            }
    return found


def peer(settings: Settings, size: str, batch: int) -> float | None:
    """The same shape in transformers and its own ``generate``; None where it is not installed."""
    try:
        from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    dim, num_layers, num_heads = SHAPES[size]
    tokens = space(settings).sequence_length
    config = LlamaConfig(vocab_size=space(settings).codebook_size, hidden_size=dim, num_hidden_layers=num_layers,
                         num_attention_heads=num_heads, intermediate_size=4 * dim, pad_token_id=0, bos_token_id=None,
                         eos_token_id=None)  # fmt: skip
    llama = LlamaForCausalLM(config).to(settings.device).eval()
    start = torch.zeros(batch, 1, dtype=torch.int64, device=settings.device)
    how = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=0)
    mask = torch.ones_like(start)
    took = settings.seconds(lambda: llama.generate(start, attention_mask=mask, generation_config=how), repeats=3)
    return batch * tokens / took


def coarse_to_fine(settings: Settings) -> dict[str, Any]:
    """Samples a second beside next-token generation of the first stage's shape, at batch 64."""
    batch, size = (2, "smoke") if settings.smoke else (64, "l")
    dim, num_layers, num_heads = SHAPES[size]
    shape = {"dim": dim, "num_layers": num_layers, "num_heads": num_heads}
    clusters = 8 if settings.smoke else 512
    both = CoarseToFine(
        space(settings), num_clusters=clusters, conditioner=CONDITIONER, coarse={"name": "ar", **shape}, fine=shape
    )  # fmt: skip
    both.labels.copy_(torch.arange(space(settings).codebook_size) % clusters)
    both.fitted.fill_(True)
    generators: dict[str, Generator] = {"ar": model(settings, size), "ctf": both.to(settings.device).eval()}
    rates = {
        name: batch / settings.seconds(draw(one, batch, settings.device), repeats=3) for name, one in generators.items()
    }
    return {f"{name}_per_sec": rate for name, rate in rates.items()} | {"ctf_over_ar": rates["ctf"] / rates["ar"]}


def training_step(settings: Settings) -> dict[str, Any]:
    """``benchmarks/train_step.py`` in bf16, at IBQ's width and size."""
    sizes = ("32", "32", "2", "1") if settings.smoke else ("128", "256", "4", "3")
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(HERE / "train_step.py"), "--device", settings.device.type, "--out", out]
        for name, value in zip(("channels", "size-px", "batch", "repeats"), sizes, strict=True):
            command += [f"--{name}", value]
        if settings.device.type == "cuda":
            command += ["--precision", "bf16"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(settings.left_sec, 1))
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        rows: dict[str, Any] = json.loads(Path(out, "train_step.json").read_text())
    return {"rows": rows}


def large_codebook_training(settings: Settings) -> dict[str, Any]:
    """``cifar10_ibq_262144`` on the built-in photographs for as long as is left: the last row of its log."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "tessella", "train", "cifar10_ibq_262144", "--data", "photos", "--out",
                   f"{out}/run", "--device", settings.device.type, "--set", "data.crop_px=32"]  # fmt: skip
        if settings.smoke:
            command += ["--set", "quantizer.codebook_size=64", "--set", "training.steps=2",
                        "--set", "training.batch_size=2"]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=max(settings.left_sec - 20, 5))
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves and ends
            _, errors = process.communicate()
        log = Path(out, "run", "log.jsonl")
        if not log.is_file():
            raise RuntimeError(errors[-2000:])
        last: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return last


PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "tests": gpu_tests,
    "kernels": kernels,
    "sampling": sampling,
    "coarse to fine": coarse_to_fine,
    "training step": training_step,
    "262,144 codes": large_codebook_training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    settings = Settings(device, arguments.smoke, time.monotonic() + 60 * arguments.minutes)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    record: dict[str, Any] = {"device": name, "torch": torch.__version__, "command": sys.argv, "parts": {}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.only:
        started = time.monotonic()
        try:
            if settings.left_sec < 0:
                raise TimeoutError(f"no time left of {arguments.minutes} minutes")
            row = PARTS[part](settings)
        except Exception as error:  # one fault loses one row, and is in it
            row = {"failed": f"{type(error).__name__}: {error}"}
        record["parts"][part] = {**row, "seconds": round(time.monotonic() - started, 1)}
        (arguments.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        print(part, json.dumps(record["parts"][part])[:400], flush=True)
    lines = [f"# {name}, torch {torch.__version__}", "", "| part | what | value |", "|---|---|---|"]
    for part, row in record["parts"].items():
        lines += [f"| {part} | {key} | {str(value)[:200].replace('|', '/')} |" for key, value in row.items()]
    (arguments.out / "gpu.md").write_text("\n".join(lines) + "\n")
    sys.exit(any("failed" in row for row in record["parts"].values()))


if __name__ == "__main__":
    main()
