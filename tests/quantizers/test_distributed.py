"""Two processes: every rank must hold the same codes, whatever data it sees."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tessella import config
from tessella.distributed import all_reduce_sum, broadcast, gather_rows, world_size
from tessella.quantizers import EMAVQ, VQ, Quantizer

WORLD = 2
STEPS = 50
MICRO_BATCHES = 2

# Codes that split or revive outnumber the vectors of a step, so that some die.
SPECS: dict[str, dict[str, Any]] = {
    "ema": {"name": "ema", "codebook_size": 16, "dim": 3},
    "ema split": {"name": "ema", "codebook_size": 128, "dim": 3, "dead_codes": "split", "dead_threshold": 0.2},
    "ema revive": {"name": "ema", "codebook_size": 128, "dim": 3, "dead_codes": "revive", "dead_threshold": 0.2},
    "ema unit": {"name": "ema", "codebook_size": 16, "dim": 3, "unit_norm": True, "codebook_init": "kmeans"},
    "vq kmeans": {"name": "vq", "codebook_size": 16, "dim": 3, "codebook_init": "kmeans"},
    "residual": {
        "name": "residual",
        "num_codebooks": 2,
        "quantizer": {"name": "ema", "codebook_size": 8, "dim": 3, "codebook_init": "kmeans", "dead_codes": "revive"},
    },
}


class Encoder(nn.Module):
    """Something with a parameter, which DistributedDataParallel asks for."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.quantizer = quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.quantizer(self.linear(x))
        loss: torch.Tensor = out.loss + (out.z_q - x).square().mean()
        return loss


def batches(rank: int, step: int) -> torch.Tensor:
    """Of different content and length on every rank."""
    rng = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(MICRO_BATCHES, 20 + 4 * rank, 3, generator=rng) + rank


def train(spec: dict[str, Any], rank: int, *, parallel: bool) -> Quantizer:
    torch.manual_seed(rank if parallel else 0)  # the wrapper sends rank 0's start to all
    model: nn.Module = Encoder(config.build("quantizers", spec))
    quantizer = model.quantizer
    if parallel:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(rank)  # and global generators may differ
    for step in range(STEPS):
        for micro in batches(rank, step):
            model(micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        for module in model.modules():
            if hasattr(module, "after_step"):
                module.after_step()
    assert isinstance(quantizer, Quantizer)
    return quantizer


def run_training(rank: int, folder: str) -> None:
    for name, spec in SPECS.items():
        quantizer = train(spec, rank, parallel=True)
        torch.save(quantizer.state_dict(), f"{folder}/{name}-{rank}.pt")


def run_statistics(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    ema = EMAVQ(8, 3)
    for step in range(5):
        for micro in batches(rank, step):
            ema(micro)
        ema.after_step()
    torch.save(ema.state_dict(), f"{folder}/parallel-{rank}.pt")
    # Without the wrapper, which sends rank 0's buffers to all in every forward pass and so hides what differs.
    for name in ("ema split", "ema revive"):
        torch.manual_seed(0)
        quantizer = config.build("quantizers", SPECS[name])
        torch.manual_seed(rank)
        for step in range(STEPS):
            quantizer(batches(rank, step))
            quantizer.after_step()
        torch.save(quantizer.state_dict(), f"{folder}/bare {name}-{rank}.pt")
    vq = VQ(8, 3, codebook_init="kmeans")
    vq.fit(batches(rank, 0))
    torch.save(vq.state_dict(), f"{folder}/kmeans-{rank}.pt")


def check_primitives(rank: int) -> None:
    assert world_size() == WORLD
    assert all_reduce_sum(torch.tensor([1.0 + rank])).tolist() == [3.0]
    assert broadcast(torch.tensor([5.0 + rank])).tolist() == [5.0]
    rows = gather_rows(torch.full((rank, 2), float(rank)))  # rank 0 has none
    assert rows.tolist() == [[1.0, 1.0]]
    rows = gather_rows(torch.full((2 - rank, 1), float(rank)))
    assert rows.tolist() == [[0.0], [0.0], [1.0]]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    # Ranks that disagree about what to exchange must fail, not wait for each other.
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    check_primitives(rank)
    run_statistics(rank, folder)
    run_training(rank, folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left their state dicts."""
    path = tmp_path_factory.mktemp("ranks")
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(path)), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return path


@pytest.mark.parametrize("name", [*SPECS, "bare ema split", "bare ema revive"])
def test_all_ranks_hold_the_same_codes(name: str, folder: Path) -> None:
    first, second = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
        assert first[key].float().isfinite().all(), key


@pytest.mark.parametrize("name", SPECS)
def test_the_codes_know_the_data_of_every_rank(name: str, folder: Path) -> None:
    parallel = torch.load(folder / f"{name}-0.pt", weights_only=True)
    alone = train(SPECS[name], 0, parallel=False).state_dict()
    moving = [key for key, value in alone.items() if value.ndim == 2]
    assert moving
    assert not any(torch.allclose(parallel[key], alone[key], atol=1e-3) for key in moving)


def test_two_ranks_equal_one_with_all_the_data(folder: Path) -> None:
    torch.manual_seed(0)
    ema = EMAVQ(8, 3)
    for step in range(5):
        for rank in range(WORLD):
            for micro in batches(rank, step):
                ema(micro)
        ema.after_step()
    for rank in range(WORLD):
        parallel = torch.load(folder / f"parallel-{rank}.pt", weights_only=True)
        torch.testing.assert_close(parallel["counts"], ema.counts)
        torch.testing.assert_close(parallel["sums"], ema.sums)


def test_kmeans_sees_the_vectors_of_all_ranks(folder: Path) -> None:
    vq = VQ(8, 3, codebook_init="kmeans")
    vq.fit(torch.cat([batches(rank, 0).flatten(0, 1) for rank in range(WORLD)]))
    for rank in range(WORLD):
        fitted = torch.load(folder / f"kmeans-{rank}.pt", weights_only=True)
        torch.testing.assert_close(fitted["embedding"], vq.codebook.detach())


def test_primitives_in_one_process() -> None:
    rows = torch.randn(3, 2)
    assert world_size() == 1
    assert gather_rows(rows) is rows
    assert all_reduce_sum(rows) is rows
    assert broadcast(rows) is rows
