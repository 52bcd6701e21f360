"""Kills at random moments of training, sampling and saving. Prints a table; ends with status 1 if anything was lost.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --kills 60 [--only train ranks sample save]

Training: a run of 60 steps, with everything on that has a state and two workers, is killed by SIGKILL, SIGTERM or
SIGINT, the process alone or its whole group, at a random moment, and started again until it is through; its final
weights and training state must be those of an undisturbed run, bit for bit.

Ranks: the same of two ranks under torchrun; its process, its group or one of the ranks is killed.

Sampling: the same of 200 samples, whose files must be those of an undisturbed call.

Saving: a process that saves one model over another again and again is killed; what is under the name must load as one
of the two.

No process may be left, and no temporary file after the next write. Tokenization and flipped bytes have scripts of
their own: faults_tokenize.py, flips.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tessella
from tessella.autoencoders import Conv
from tessella.checkpoint import load_state
from tessella.quantizers import FSQ
from tessella.tokenizer import Tokenizer

RECIPE = """
[data]
name = "folder"
path = "pictures"
crop_px = 16
flip = true
[autoencoder]
name = "conv"
channels = 8
multipliers = [1]
num_res_blocks = 1
num_decoder_res_blocks = 1
mid_attention = false
latent_dim = 8
patch_px = 4
[quantizer]
name = "gumbel"
codebook_size = 32
dim = 4
[training]
steps = 60
batch_size = 4
accumulate = 2
warmup_steps = 5
ema_decay = 0.9
log_every = 1
sample_every = 20
checkpoint_every = 5
num_workers = 2
"""
GENERATOR = """
[generator]
name = "ar"
conditioner = {name = "label"}
dim = 16
num_layers = 1
num_heads = 2
[training]
steps = 2
batch_size = 4
num_workers = 0
"""
SAVE = """
import sys
import tessella
a, b = (tessella.load(name) for name in ("model_a", "model_b"))
print("ready", flush=True)
while True:
    a.save("saved")
    b.save("saved")
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def tokenizer(seed: int) -> Tokenizer:
    torch.manual_seed(seed)
    autoencoder = Conv(channels=8, multipliers=(1,), num_res_blocks=1, num_decoder_res_blocks=1, mid_attention=False,
                       latent_dim=8, patch_px=4)  # fmt: skip
    return Tokenizer(autoencoder, FSQ([5, 5, 5])).eval()


def prepare() -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        file = Path(f"pictures/class_{number % 2}/{number:02d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file)
    Path("tiny.toml").write_text(RECIPE)
    Path("next.toml").write_text(GENERATOR)


def tree(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("0*.png"))}


def left_in_group(group: int) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def killed_until_through(command: list[str], kills: int, longest_s: float, chance: random.Random) -> tuple[int, int]:
    """Start, kill and start again; the number of kills that met work, and of process groups that stayed."""
    done = stayed = 0
    while True:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        if done == kills:
            process.wait()
            return done, stayed
        try:
            process.wait(timeout=chance.uniform(0.3, longest_s))
            return done, stayed
        except subprocess.TimeoutExpired:
            number, group = chance.choice(SIGNALS), chance.random() < 0.5
            (os.killpg if group else os.kill)(process.pid, number)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:  # SIGINT or SIGTERM while Python starts
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            done += 1
            stayed += left_in_group(process.pid)


def train(kills: int, chance: random.Random) -> Counter[str]:
    found: Counter[str] = Counter()
    base = [sys.executable, "-m", "tessella", "train", "tiny.toml", "--device", "cpu", "--out"]
    subprocess.run([*base, "whole"], check=True, capture_output=True)
    expected = final("whole")
    run = 0
    while found["kills"] < kills:
        run += 1
        done, stayed = killed_until_through([*base, f"killed{run}"], kills - found["kills"], 9.0, chance)
        found["kills"] += done
        found["processes left"] += stayed
        subprocess.run([*base, f"killed{run}"], check=True, capture_output=True)
        found["lost or altered"] += final(f"killed{run}") != expected
        found["temporary files left"] += len(list(Path(f"killed{run}").rglob(".*.tmp")))
    return found


def ranks(kills: int, chance: random.Random) -> Counter[str]:
    found: Counter[str] = Counter()
    base = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tessella",
            "train", "tiny.toml", "--device", "cpu", "--set", "training.num_workers=0", "--out"]  # fmt: skip
    subprocess.run([*base, "whole2"], check=True, capture_output=True)
    expected = final("whole2")
    run = 0
    while found["kills"] < kills:
        run += 1
        out = f"ranks{run}"
        while found["kills"] < kills:
            process = subprocess.Popen(
                [*base, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            started = time.monotonic()
            moment = chance.uniform(0.5, 16.0)
            while process.poll() is None and time.monotonic() - started < moment:
                time.sleep(0.05)
            if process.poll() is not None:
                break
            workers, number = children(process.pid), chance.choice(SIGNALS)
            victims = [process.pid, *workers]
            os.kill(chance.choice(victims), number)
            try:
                process.wait(timeout=90)
            except subprocess.TimeoutExpired:  # SIGINT or SIGTERM while Python starts
                process.kill()
                process.wait()
            found["kills"] += 1
            found["processes left"] += any(alive(worker) for worker in workers)
        subprocess.run([*base, out], check=True, capture_output=True)
        found["lost or altered"] += final(out) != expected
        found["temporary files left"] += len(list(Path(out).rglob(".*.tmp")))
    return found


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"PPid:\t{parent}\n" in (entry / "status").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def alive(process: int, seconds: float = 30) -> bool:
    """Whether a process is still there after so long."""
    end = time.monotonic() + seconds
    while Path(f"/proc/{process}").exists():
        if time.monotonic() > end:
            return True
        time.sleep(0.1)
    return False


def final(run: str) -> tuple[bytes, str]:
    folder = Path(run, "checkpoints", "step-00000060")
    state = load_state(folder)
    for name in ("seconds", "units"):
        state.pop(name, None)
    digest = hashlib.sha256()
    stack: list[object] = [state]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [item[key] for key in sorted(item, key=str)]
        elif isinstance(item, (list, tuple)):
            stack += list(item)
        elif isinstance(item, torch.Tensor):
            digest.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(item).encode())
    return (folder / "model.safetensors").read_bytes(), digest.hexdigest()


def sample(kills: int, chance: random.Random) -> Counter[str]:
    found: Counter[str] = Counter()
    made = tokenizer(0)
    made.recipe = {"data": {"name": "folder", "path": "pictures", "crop_px": 16}}
    made.save("tokenizer")
    tessella.train("next.toml", tokenizer=Path("tokenizer"), out=Path("generator"), device="cpu", quiet=True)
    base = [sys.executable, "-m", "tessella", "sample", "generator", "-n", "200", "--batch-size", "4"]
    base += ["--device", "cpu", "--out"]
    subprocess.run([*base, "drawn"], check=True, capture_output=True)
    expected = tree(Path("drawn"))
    run = 0
    while found["kills"] < kills:
        run += 1
        done, stayed = killed_until_through([*base, f"drawn{run}"], kills - found["kills"], 7.0, chance)
        found["kills"] += done
        found["processes left"] += stayed
        subprocess.run([*base, f"drawn{run}"], check=True, capture_output=True)
        found["lost or altered"] += tree(Path(f"drawn{run}")) != expected
        found["temporary files left"] += len(list(Path(f"drawn{run}").rglob(".*.tmp")))
    return found


def save(kills: int, chance: random.Random) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, seed in (("model_a", 0), ("model_b", 1)):
        tokenizer(seed).save(name)
    known = [Path(name, "model.safetensors").read_bytes() for name in ("model_a", "model_b")]
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", SAVE], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.wait()
        found["kills"] += 1
        if Path("saved").exists():
            tessella.load("saved")
            found["lost or altered"] += Path("saved/model.safetensors").read_bytes() not in known
    tokenizer(0).save("saved")
    found["temporary files left"] += len([path for path in Path().glob(".saved*") if path.suffix in (".tmp", ".old")])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=["train", "ranks", "sample", "save"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = ("kills", "lost or altered", "processes left", "temporary files left")
    print("| what | " + " | ".join(columns) + " | seconds |\n|---" * 1 + "|---" * (len(columns) + 1) + "|", flush=True)
    bad = 0
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        prepare()
        for name in arguments.only:
            started = time.monotonic()
            found = {"train": train, "ranks": ranks, "sample": sample, "save": save}[name](
                arguments.kills, random.Random(arguments.seed)
            )  # fmt: skip
            bad += sum(found[column] for column in columns[1:])
            row = " | ".join(str(found[column]) for column in columns)
            print(f"| {name} | {row} | {time.monotonic() - started:.0f} |", flush=True)
        os.chdir("/")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
