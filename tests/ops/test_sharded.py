from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tessella.ops import index_backprop, nearest, sharded_index_backprop, sharded_nearest
from tessella.ops._tiles import forced_tile

SPLIT = 60  # the first rank's codes; the second holds the other 90
SETTINGS = [(0.01, 1.0), (1.0, 1.0), (0.01, 8.0)]  # temperatures, and scales of z: p listed, all swept, all listed


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, codebook, upstream = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (23, 150, 23))
    codebook[100] = codebook[20]  # a tie across the shards
    z[0] = codebook[20]
    return z, codebook, upstream


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    z, codebook, upstream = problem()
    mask = torch.arange(23) % 4 != 0
    shard = codebook[:SPLIT] if rank == 0 else codebook[SPLIT:]
    out = {metric: sharded_nearest(z, shard, metric) for metric in ("euclidean", "dot")}
    for temperature, scale in SETTINGS:
        a, b = (z * scale).requires_grad_(), shard.clone().requires_grad_()
        with forced_tile(10, 32):
            z_q, indices, loss, metrics = sharded_index_backprop(a, b, 1.0, 0.25, 0.3, temperature, mask)
            (loss + (z_q * upstream).sum()).backward()
        named = {"z_q": z_q, "indices": indices, "loss": loss, "dz": a.grad, "dcodebook": b.grad, **metrics}
        out |= {f"{name} at {temperature}, {scale}": value.detach() for name, value in named.items()}
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    z, codebook, upstream = problem()
    expected = {metric: nearest(z, codebook, metric) for metric in ("euclidean", "dot")}
    assert expected["euclidean"][0].item() == 20
    for temperature, scale in SETTINGS:
        a, b = (z * scale).requires_grad_(), codebook.clone().requires_grad_()
        z_q, indices, loss, metrics = index_backprop(a, b, 1.0, 0.25, 0.3, temperature, torch.arange(23) % 4 != 0)
        (loss + (z_q * upstream).sum()).backward()
        named = {"z_q": z_q, "indices": indices, "loss": loss, "dz": a.grad, "dcodebook": b.grad, **metrics}
        expected |= {f"{name} at {temperature}, {scale}": value.detach() for name, value in named.items()}
    assert set(ranks[0]) == set(ranks[1]) == set(expected)
    for name, value in expected.items():
        if name.startswith("dcodebook"):
            torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), value, rtol=1e-10, atol=1e-10)
        else:
            for rank in ranks:
                torch.testing.assert_close(rank[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="call init_process_group first"):
        sharded_nearest(torch.ones(2, 3), torch.ones(4, 3))


def test_errors_name_the_shard() -> None:
    with pytest.raises(ValueError, match="z has dimension 3 but codebook_shard 2"):
        sharded_nearest(torch.ones(2, 3), torch.ones(4, 2))
    with pytest.raises(TypeError, match="codebook_shard must have a floating dtype"):
        sharded_index_backprop(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int64))
