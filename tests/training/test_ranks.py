"""Training over two ranks: the gradients and weights of one process, checkpoints for any number, and ranks that die."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY_RECIPE, picture_step, tiny_tokenizer, write_pictures
from PIL import Image
from torch import Tensor

from tessella import config
from tessella.checkpoint import latest_checkpoint, load_state
from tessella.data.base import ImageDataset, Picture
from tessella.data.loader import training_batches
from tessella.distributed import Ranks, average_gradients, differentiable_mean, full, mean_over_ranks, rank
from tessella.errors import ConfigError, EndedElsewhere
from tessella.generators.ar import AR
from tessella.losses.adversarial import Adversary
from tessella.losses.audio_adversary import Balancer
from tessella.training.base import Step
from tessella.training.generator import GeneratorStep
from tessella.training.logs import read_log
from tessella.training.loop import Loop

CPU = torch.device("cpu")
WORLD = 2

QUANTIZERS: dict[str, dict[str, Any]] = {
    "vq": {"name": "vq", "codebook_size": 32, "dim": 4, "entropy_weight": 0.1, "entropy_temperature": 1.0},
    "ema": {"name": "ema", "codebook_size": 32, "dim": 4, "dead_codes": "split", "codebook_init": "kmeans"},
    "ibq": {"name": "ibq", "codebook_size": 32, "dim": 4},
    "ibq warm": {"name": "ibq", "codebook_size": 32, "dim": 4, "entropy_temperature": 1.0},
    "simvq": {"name": "simvq", "codebook_size": 32, "dim": 4},
    "fsq": {"name": "fsq", "levels": [5, 5, 5]},
    "lfq": {"name": "lfq", "dim": 5},
    "residual": {"name": "residual", "num_codebooks": 2, "quantizer": {"name": "ema", "codebook_size": 8, "dim": 4}},
}


class Noise(ImageDataset):
    def __init__(self, size: int = 8) -> None:
        super().__init__(split="train", crop_px=size)
        self.size = size

    def __len__(self) -> int:
        return 12

    def read(self, index: int) -> Picture:
        pixels = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Picture(Image.fromarray(pixels), index % 3, f"noise-{index}")


def loop(**settings: Any) -> Loop:
    defaults = {"batch_size": 8, "num_workers": 0, "log_every": 1, "warmup_steps": 0, "lr": 1e-2, "clip_norm": math.inf}
    return Loop(**{"steps": 3, **defaults, **settings})


def tokenizer_step(spec: dict[str, Any]) -> Step:
    torch.manual_seed(2)
    return picture_step(tiny_tokenizer(config.build("quantizers", spec), seed=3))


def adversarial_step(start_step: int) -> Step:
    tokenizer = tiny_tokenizer(seed=3)
    torch.manual_seed(4)
    adversary = Adversary(
        discriminator_channels=4, generator_loss="non_saturating_mean_logit", weight=0.5, adaptive=True,
        lecam_weight=0.05, start_step=start_step,
    )  # fmt: skip
    return picture_step(tokenizer, adversary=adversary)


def generator_step() -> Step:
    tokenizer = tiny_tokenizer(seed=3)
    torch.manual_seed(5)
    conditioner = {"name": "label", "num_classes": 3, "dropout": 0.0}
    generator = AR(
        tokenizer.token_space(8, 8),
        dim=16,
        num_layers=2,
        num_heads=2,
        dropout=0.0,
        token_dropout=0.0,
        conditioner=conditioner,
    )
    return GeneratorStep(generator, tokenizer)


CASES: dict[str, tuple[Callable[[], Step], int, dict[str, Any]]] = {
    **{name: (lambda spec=spec: tokenizer_step(spec), 8, {}) for name, spec in QUANTIZERS.items()},
    "accumulated": (lambda: tokenizer_step(QUANTIZERS["fsq"]), 8, {"accumulate": 2}),
    "averaged": (lambda: tokenizer_step(QUANTIZERS["ema"]), 8, {"ema_decay": 0.9}),
    "adversarial": (lambda: adversarial_step(0), 32, {"batch_size": 4}),
    "adversarial later": (lambda: adversarial_step(1), 32, {"batch_size": 4}),
    "generator": (generator_step, 8, {"ema_decay": 0.9}),
    "generator accumulated": (generator_step, 8, {"accumulate": 2}),
    "muon": (lambda: tokenizer_step(QUANTIZERS["simvq"]), 8, {"optimizer": "muon"}),
    "generator by muon": (generator_step, 8, {"optimizer": "muon"}),
}


RESUMED = ("averaged", "generator", "generator by muon")


def run(name: str, folder: Path, ranks: Ranks | None = None, **settings: Any) -> dict[str, dict[str, Tensor]]:
    """Train a case; the last gradients and weights, whole."""
    make, size, own = CASES[name]
    step = make()
    loop(**own, **settings).run(step, Noise(size), folder, device=CPU, quiet=True, ranks=ranks)
    return {
        "gradients": {key: full(p.grad).clone() for key, p in step.named_parameters() if p.grad is not None},
        "weights": {key: full(p.detach()).clone() for key, p in step.named_parameters()},
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    # Ranks that disagree about what to exchange must fail, not wait for each other.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    path = Path(folder)
    with Ranks() as ranks:
        primitives(ranks)
        for name in CASES:
            for steps in (1, 3):
                result = run(name, path / f"{name} {steps}", ranks, steps=steps)
                torch.save(result, path / f"{name} {steps}-{rank}.pt")
        for name in RESUMED:
            run(name, path / f"{name} two", ranks, steps=1, decay="constant")
            run(name, path / f"{name} two then one", ranks, steps=1, decay="constant")
            for how in ("two", "one then two", "straight"):
                torch.save(run(name, path / f"{name} {how}", ranks, decay="constant"), path / f"{name} {how}-{rank}.pt")
    dist.destroy_process_group()


def primitives(ranks: Ranks) -> None:
    number = rank()
    assert ranks.gather(number) == [0, 1]
    assert ranks.any(number) == 1
    assert ranks.any(0) == 0
    assert ranks.by_first(lambda: "said") == "said"

    def refuse() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError if ranks.first else EndedElsewhere, match="no"):
        ranks.by_first(refuse)
    # f(q) = q^2 at the mean 1.5 of q = 1 and 2: the mean of the ranks' gradients is 2 * 1.5.
    q = torch.tensor(1.0 + number, requires_grad=True)
    mean_over_ranks(q).square().backward()
    assert q.grad is not None
    assert q.grad.item() == 3.0
    # The mean over ranks of (q / mean)^2 has the derivative of one process that holds both.
    q = torch.tensor(1.0 + number, requires_grad=True)
    (q / differentiable_mean(q)).square().backward()
    both = torch.tensor([1.0, 2.0], requires_grad=True)
    (both / both.mean()).square().mean().backward()
    assert both.grad is not None
    assert q.grad is not None
    torch.testing.assert_close(q.grad / WORLD, both.grad[number])
    # A parameter that only one rank has a gradient for, and one that none has.
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 1.0 + number)
    if number:
        parameters[1].grad = torch.full((2,), 3.0)
    average_gradients(parameters)
    assert [None if p.grad is None else p.grad.tolist() for p in parameters] == [[1.5, 1.5], [1.5, 1.5], None]
    check_balancer(number)


def check_balancer(number: int) -> None:
    """Its gradients over two ranks are those of one process with all signals."""
    signals = torch.tensor([[[1.0, -2.0]], [[0.5, 4.0]]])

    def pull(x: Tensor) -> Tensor:
        x_hat = x.clone().requires_grad_()
        losses = {"square": x_hat.square().mean(), "size": x_hat.abs().mean()}
        Balancer({"square": 1.0, "size": 2.0})(losses, x_hat).backward()
        assert x_hat.grad is not None
        return x_hat.grad

    own = pull(signals[number : number + 1]) / WORLD
    # One process: the norms of both signals average 1/4 of (sqrt 5 + sqrt 16.25) * 2 and 1/4 of sqrt 2 * 2, halved.
    square = signals / 2 / (signals / 2).flatten(1).norm(dim=1).mean()
    size = signals.sign() / 4 / (signals.sign() / 4).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(own, ((square + 2 * size) / 3)[number : number + 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they trained."""
    path = tmp_path_factory.mktemp("ranks")
    for name in RESUMED:
        run(name, path / f"{name} one then two", steps=1, decay="constant")
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=(number, str(path)), daemon=True) for number in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    return path


def trained(folder: Path, name: str, number: int = 0) -> dict[str, dict[str, Tensor]]:
    loaded: dict[str, dict[str, Tensor]] = torch.load(folder / f"{name}-{number}.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_gradients_of_one(name: str, folder: Path, tmp_path: Path) -> None:
    for steps, close in ((1, 1e-5), (3, 2e-2)):  # Adam makes whole steps of gradients that are rounding alone
        one = run(name, tmp_path / str(steps), steps=steps)["gradients"]
        if steps == 3:  # at first the heads of a generator pass nothing back
            assert sum(float(gradient.norm()) > 1e-4 for gradient in one.values()) > len(one) / 2
        for number in range(WORLD):
            two = trained(folder, f"{name} {steps}", number)["gradients"]
            assert two.keys() == one.keys()
            for key, gradient in one.items():
                difference = (two[key] - gradient).norm()
                assert difference < 1e-6 + close * gradient.norm(), key


def test_what_is_logged_is_of_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    run("ema", tmp_path)
    for one, two in zip(read_log(tmp_path / "log.jsonl"), read_log(folder / "ema 3" / "log.jsonl"), strict=True):
        for name in ("usage", "perplexity", "l2", "loss/tokenizer", "grad_norm/tokenizer"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_as_many_ranks_bit_for_bit(name: str, folder: Path) -> None:
    for number in range(WORLD):
        straight, stopped = trained(folder, f"{name} straight", number), trained(folder, f"{name} two", number)
        assert all(torch.equal(straight["weights"][key], value) for key, value in stopped["weights"].items())


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_more_or_fewer_ranks(name: str, folder: Path) -> None:
    straight = trained(folder, f"{name} straight")
    fewer = run(name, folder / f"{name} two then one", decay="constant")
    more = trained(folder, f"{name} one then two")
    for other in (fewer, more):
        assert read_log(folder / f"{name} two then one" / "log.jsonl")[-1]["step"] == 3
        for key, gradient in straight["gradients"].items():
            assert (other["gradients"][key] - gradient).norm() < 1e-6 + 3e-3 * gradient.norm(), key


def test_a_checkpoint_does_not_know_how_many_ranks_wrote_it(folder: Path, tmp_path: Path) -> None:
    run("generator", tmp_path)
    one, two = (load_state(latest_checkpoint(path) or path) for path in (tmp_path, folder / "generator 3"))
    assert len(two.pop("other_ranks")) == WORLD - 1
    assert one.pop("other_ranks") == []
    assert one.keys() == two.keys()
    for name, value in one["optimizers"]["generator"]["state"].items():
        for key, tensor in value.items():
            other = two["optimizers"]["generator"]["state"][name][key]
            assert type(other) is Tensor
            assert (other - tensor).norm() <= 1e-6 + 3e-3 * tensor.norm(), key


def test_every_draw_is_on_one_rank() -> None:
    whole = training_batches(Noise(), batch_size=6, seed=1, start_batch=1)
    parts = [training_batches(Noise(), batch_size=6, seed=1, start_batch=1, rank=r, num_ranks=3) for r in range(3)]
    for _ in range(5):  # across the end of an epoch
        assert [key for part in parts for key in next(part)["key"]] == next(whole)["key"]
    with pytest.raises(ValueError, match=r"batch_size \(4\) must be a multiple of num_ranks \(3\)"):
        training_batches(Noise(), batch_size=4, seed=0, num_ranks=3)


# --- the command line -----------------------------------------------------------------------------------------------


def torchrun(work: Path, *options: str) -> list[str]:
    recipe = work / "tiny.toml"
    write_pictures(work / "pictures", 24)
    recipe.write_text(TINY_RECIPE)
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, "-m",
        "tessella", "train", str(recipe), "--device", "cpu",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def wait_for(found: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := found():
            return answer
        time.sleep(0.05)
    raise AssertionError("it did not come")


def rank_of(number: int, parent: int) -> int | None:
    """The process of a rank that the torchrun ``parent`` started."""
    for entry in Path("/proc").iterdir():
        try:
            is_child = entry.name.isdigit() and f"PPid:\t{parent}\n" in (entry / "status").read_text()
            if is_child and f"\0RANK={number}\0" in "\0" + (entry / "environ").read_text():
                return int(entry.name)
        except OSError:
            continue
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_rank_that_dies(tmp_path: Path) -> None:
    """The last checkpoint is whole, and torchrun's restart ends with the weights of a run that nobody disturbed."""
    command = torchrun(tmp_path, "--max-restarts", "1")
    steps = ["--set", "training.steps=60", "--set", "training.checkpoint_every=10"]
    undisturbed = subprocess.run(
        [*command, *steps, "--out", "whole"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert undisturbed.stdout.count("trained:") == 1
    process = subprocess.Popen(
        [*command, *steps, "--out", "killed"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: latest_checkpoint(tmp_path / "killed"))
    os.kill(wait_for(lambda: rank_of(1, process.pid)), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "continuing from" in said
    ends = [latest_checkpoint(tmp_path / name) for name in ("whole", "killed")]
    assert [end.name for end in ends if end] == ["step-00000060"] * 2
    first, second = (load_state(end)["step"]["model"] for end in ends if end)
    assert all(torch.equal(first[key], value) for key, value in second.items())


def test_a_signal_stops_all_ranks_at_one_step(tmp_path: Path) -> None:
    command = [*torchrun(tmp_path), "--set", "training.steps=5000", "--out", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: read_log(tmp_path / "run" / "log.jsonl"))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("interrupted by SIGTERM; saved") == 1
    end = latest_checkpoint(tmp_path / "run")
    assert end is not None
    assert 0 < load_state(end)["position"] < 5000
    assert not list((tmp_path / "run").glob(".lock*"))


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    command = [*torchrun(tmp_path), "--set", "training.batch_size=6", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(r"error: .*training\.batch_size \(6\) must be a multiple of", done.stderr)
    assert not (tmp_path / "run").exists()
