from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tessella.data.base import DataError
from tessella.data.loader import training_batches
from tessella.data.token_shards import TokenShards
from tessella.data.tokens import TokenWriter
from tessella.storage.writing import HOST
from tessella.tokenizer import TokenSpace

pytest.importorskip("pyarrow")

SPACE = TokenSpace(grid=(), num_codebooks=2, codebook_size=1000, fingerprint="0123456789abcdef")


def indices(picture: int, variant: int) -> torch.Tensor:
    return (torch.arange(12).reshape(3, 2, 2) + 100 * picture + 10 * variant) % 1000


def write(folder: Path, *, pictures: int = 5, variants: int = 3) -> Path:
    with TokenWriter(folder, SPACE, shard_rows=4) as writer:
        for picture in range(pictures):
            for variant in range(variants):
                writer.write(key=f"{picture}.png", label=picture % 2, indices=indices(picture, variant), extent=(6, 4))
    return folder


def test_rows_of_a_picture_are_its_variants(tmp_path: Path) -> None:
    shards = TokenShards(split="train", path=str(write(tmp_path)))
    assert len(shards) == 5
    assert shards.space == TokenSpace((3, 2), 2, 1000, SPACE.fingerprint)
    assert torch.equal(shards[3]["x"], indices(3, 0))
    assert (shards[3]["key"], shards[3]["label"]) == ("3.png", 1)
    seen = {int(shards.sample(3, np.random.default_rng(seed))["x"][0, 0, 0]) for seed in range(30)}
    assert seen == {300, 310, 320}


def test_batches_are_those_of_pictures(tmp_path: Path) -> None:
    shards = TokenShards(split="train", path=str(write(tmp_path)))
    batches = training_batches(shards, batch_size=4, seed=0)
    first, second = next(batches), next(batches)
    assert first["x"].shape == (4, 3, 2, 2)
    assert first["x"].dtype == torch.int64
    assert sorted(first["key"] + second["key"][:1]) == [f"{i}.png" for i in range(5)]
    again = next(training_batches(shards, batch_size=4, seed=0, start_batch=1))
    assert torch.equal(again["x"], second["x"])


def test_arrays_are_memory_mapped_and_follow_the_shards(tmp_path: Path) -> None:
    shards = TokenShards(split="train", path=str(write(tmp_path)))
    assert isinstance(shards._arrays.indices, np.memmap)
    assert shards._arrays.indices.dtype == np.uint16
    assert len(TokenShards(split="train", path=str(write(tmp_path, pictures=7)))) == 7
    assert len(list((tmp_path / ".arrays").iterdir())) == 1


def test_other_tokens_under_the_same_names_are_not_the_cached_ones(tmp_path: Path) -> None:
    assert int(TokenShards(split="train", path=str(write(tmp_path)))[1]["x"][0, 0, 0]) == 100
    other = TokenSpace((), 2, 1000, "another")
    with TokenWriter(tmp_path, other, shard_rows=4) as writer:
        for picture in range(5):
            for variant in range(3):
                writer.write(key=f"{picture}.png", label=0, indices=indices(9 - picture, variant), extent=(6, 4))
    shards = TokenShards(split="train", path=str(tmp_path))
    assert shards.space.fingerprint == "another"
    assert int(shards[1]["x"][0, 0, 0]) == 800


def test_a_worker_maps_the_arrays_itself(tmp_path: Path) -> None:
    shards = TokenShards(split="train", path=str(write(tmp_path, pictures=9)))
    sent = pickle.dumps(shards)
    assert len(sent) < 2000
    assert isinstance(pickle.loads(sent)._arrays.indices, np.memmap)
    assert torch.equal(pickle.loads(sent)[3]["x"], shards[3]["x"])


def test_no_flipped_byte_of_a_cache_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = [sample["x"] for sample in map(TokenShards(split="train", path=str(write(tmp_path))).sample, range(5))]
    rng = np.random.default_rng(0)
    for turn in range(20):
        (arrays,) = (tmp_path / ".arrays").iterdir()
        file = sorted(arrays.iterdir())[turn % 4]
        damaged = bytearray(file.read_bytes())
        damaged[rng.integers(len(damaged))] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        caplog.clear()
        again = TokenShards(split="train", path=str(tmp_path))
        assert "it is made anew from its shards" in caplog.text, file
        assert all(torch.equal(again[index]["x"], whole[index]) for index in range(5))


def _open_at(folder: str, moment: float, answers: multiprocessing.Queue) -> None:
    time.sleep(max(0.0, moment - time.time()))
    try:
        shards = TokenShards(split="train", path=folder)
        answers.put([int(shards[index]["x"][0, 0, 0]) for index in range(len(shards))])
    except Exception as error:
        answers.put(repr(error))


def test_three_readers_at_once_all_succeed(tmp_path: Path) -> None:
    write(tmp_path, pictures=200)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_open_at, args=(str(tmp_path), time.time() + 0.5, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[(100 * picture) % 1000 for picture in range(200)]] * 3
    assert len(list((tmp_path / ".arrays").iterdir())) == 1


def test_what_a_killed_reader_left_goes(tmp_path: Path) -> None:
    write(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    leftover = tmp_path / ".arrays" / f"building-{HOST}-{dead.pid}-0123abcd"
    alive = tmp_path / ".arrays" / f"building-{HOST}-{os.getppid()}-0123abcd"
    leftover.mkdir(parents=True)
    alive.mkdir()
    TokenShards(split="train", path=str(tmp_path))
    assert not leftover.exists()
    assert alive.exists()


def test_splits_are_sub_folders(tmp_path: Path) -> None:
    write(tmp_path / "train")
    write(tmp_path / "test", pictures=2)
    assert len(TokenShards(split="test", path=str(tmp_path))) == 2
    with pytest.raises(DataError, match="no sub-folder 'test'"):
        TokenShards(split="test", path=str(tmp_path / "train"))


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a", SPACE) as writer:
        writer.write(key="square", label=0, indices=indices(0, 0), extent=(6, 4))
        writer.write(key="wide", label=0, indices=indices(0, 0).transpose(0, 1), extent=(4, 6))
    with pytest.raises(DataError, match=r"wide has 1 rows of grid x K = \[2, 3, 2\], square 1 of \[3, 2, 2\]"):
        TokenShards(split="train", path=str(tmp_path / "a"))
    with TokenWriter(tmp_path / "b", SPACE) as writer:
        for key in ("two", "two", "one"):
            writer.write(key=key, label=0, indices=indices(0, 0), extent=(6, 4))
    with pytest.raises(DataError, match=r"one has 1 rows .*, two 2 of"):
        TokenShards(split="train", path=str(tmp_path / "b"))
    assert not list((tmp_path / "b").glob(".arrays/*"))
    with TokenWriter(tmp_path / "c", SPACE):
        pass
    with pytest.raises(DataError, match="holds no rows"):
        TokenShards(split="train", path=str(tmp_path / "c"))
