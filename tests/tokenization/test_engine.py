from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessella.data.base import DataError, Sample, Samples, UnreadableImage, random_for
from tessella.data.folder import Folder
from tessella.data.tokens import read_manifest, read_tokens
from tessella.errors import ConfigError
from tessella.registry import register
from tessella.storage import FolderInUse, lock_folder
from tessella.tokenization import executors
from tessella.tokenization import plan as plan_module
from tessella.tokenization.engine import TokenizeResult, tokenize_dataset
from tessella.tokenization.executors import WorkerError
from tessella.tokenization.plan import Output
from tessella.tokenization.unit import Worker
from tests.conftest import single_threaded, tiny_tokenizer, write_pictures

pytest.importorskip("pyarrow")

COUNT, SHARD_ROWS = 40, 8


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A tokenizer and 40 pictures."""
    tiny_tokenizer().save(tmp_path / "tokenizer")
    write_pictures(tmp_path / "pictures", COUNT)
    return tmp_path


def section(work: Path, **more: Any) -> dict[str, Any]:
    return {"name": "folder", "path": str(work / "pictures"), "crop_px": 16, "flip": True, **more}


def run(work: Path, out: str = "out", **more: Any) -> TokenizeResult:
    settings = {"shard_rows": SHARD_ROWS, "batch_size": 3, "device": "cpu", **more}
    data = settings.pop("data", section(work))
    return tokenize_dataset(work / "tokenizer", data, work / out, **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_every_input_once_each_as_if_it_were_alone(work: Path) -> None:
    result = run(work)
    assert (result.num_rows, result.num_inputs, result.num_available, result.num_skipped) == (40, 40, 40, 0)
    assert (result.num_shards, result.num_made) == (5, 5)
    parts = [Folder(work / "pictures", split=split, crop_px=16) for split in ("train", "test")]
    samples = [part[index] for part in parts for index in range(len(part))]
    rows = list(read_tokens(work / "out"))
    assert [(row.key, row.label) for row in rows] == [(sample["key"], sample["label"]) for sample in samples]
    tokenizer = tiny_tokenizer()
    for row, sample in zip(rows, samples, strict=True):
        assert torch.equal(row.indices, tokenizer.encode(sample["x"][None])[0])
        assert row.extent == (16, 16)
    manifest = read_manifest(work / "out")
    assert [shard.inputs for shard in manifest.shards] == [(i, i + 8) for i in range(0, 40, 8)]
    assert (manifest.split, manifest.medium["name"], manifest.class_names) == ("all", "image", ("class_0", "class_1"))
    assert manifest.source["data"] == section(work)


def test_batch_size_and_workers_have_no_part_in_the_result(work: Path) -> None:
    run(work)
    run(work, "other", batch_size=7)
    run(work, "processes", workers=2)
    assert content(work / "out") == content(work / "other") == content(work / "processes")


def test_split_and_limit(work: Path) -> None:
    run(work, "test", split="test")
    run(work, "train", split="train")
    run(work, "all")
    keys = {name: [row.key for row in read_tokens(work / name)] for name in ("train", "test", "all")}
    assert keys["all"] == keys["train"] + keys["test"]
    result = run(work, "first", limit=11)
    assert (result.num_rows, result.num_available) == (11, 40)
    assert [row.key for row in read_tokens(work / "first")] == keys["all"][:11]


def test_all_of_a_single_picture(work: Path) -> None:
    write_pictures(work / "one", 1)
    assert run(work, data=section(work, path=work / "one")).num_rows == 1
    with pytest.raises(ConfigError, match="no picture is left for split 'train'"):
        run(work, "train", data=section(work, path=str(work / "one")), split="train")


def test_variants_are_views_of_training_epochs(work: Path) -> None:
    run(work, variants=3, shard_rows=9)
    rows = list(read_tokens(work / "out"))
    assert len(rows) == 120
    assert len(read_manifest(work / "out").shards) == 14
    dataset = Folder(work / "pictures", split="train", crop_px=16, flip=True)
    tokenizer = tiny_tokenizer()
    for number in (0, 1, 2, 50):
        sample = dataset.sample(number // 3, random_for(0, number % 3, number // 3))
        assert rows[number].key == sample["key"]
        assert torch.equal(rows[number].indices, tokenizer.encode(sample["x"][None])[0])
    with pytest.raises(ConfigError, match=r"they need data\.crop_px or data\.resize_px"):
        run(work, "whole", variants=2, whole=True)


def test_whole_signals_keep_their_own_size(work: Path) -> None:
    write_pictures(work / "pictures/more", 3, size=9, classes=1)
    run(work, whole=True)
    rows = {row.key: row for row in read_tokens(work / "out")}
    assert (rows["class_0/000.png"].extent, tuple(rows["class_0/000.png"].indices.shape)) == ((20, 20), (5, 5, 1))
    small = rows["more/class_0/001.png"]
    assert (small.extent, tuple(small.indices.shape)) == ((9, 9), (3, 3, 1))


class Lengths(Samples):
    """Signals of different lengths that may share a batch, one of them unreadable, some with odd names."""

    pads = True
    window = frozenset({"width"})

    def __init__(self, *, split: str, width: int | None = None) -> None:
        self.split = split

    def __len__(self) -> int:
        return 7

    def sample(self, index: int, rng: np.random.Generator | None = None) -> Sample:
        key = ["a", "b", "..", "x" * 300, "caf\udce9", "f", "g"][index]
        if index == 5:
            raise UnreadableImage("f", "no picture")
        x = torch.linspace(-1, 1, 3 * 8 * (4 + index)).reshape(3, 8, 4 + index)
        return Sample(x=x, label=-1, key=key)


register("data", "lengths", Lengths)


def test_lengths_do_not_touch_each_other_and_bad_inputs_are_named(work: Path) -> None:
    result = run(work, data={"name": "lengths"}, split="test", whole=True, max_skip_share=0.5, batch_size=7)
    assert (result.num_rows, result.num_skipped) == (4, 3)
    rows = list(read_tokens(work / "out"))
    assert [row.key for row in rows] == ["a", "b", "caf\\udce9", "g"]
    assert [row.extent for row in rows] == [(8, 4), (8, 5), (8, 8), (8, 10)]
    tokenizer = tiny_tokenizer()
    alone = Lengths(split="test")
    for row, index in zip(rows, (0, 1, 4, 6), strict=True):
        assert torch.equal(row.indices, tokenizer.encode(alone[index]["x"][None], pad=True)[0])
    skipped = read_manifest(work / "out").skipped
    assert [reason for _, reason in skipped] == [
        "its key is no name of a signal", "its key has 300 characters; at most 240 bytes a name make a file",
        "no picture",
    ]  # fmt: skip


def test_too_many_bad_inputs_end_it_and_finished_shards_stay(work: Path) -> None:
    for number in range(4):
        (work / f"pictures/class_1/0{2 * number + 1:02d}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"4 of 40 inputs cannot be used, more than max_skip_share=0\.05 allows: class"):
        run(work)
    assert len(list((work / "out").glob("tokens-*.parquet"))) == 5
    result = run(work, max_skip_share=0.1)
    assert (result.num_made, result.num_rows, result.num_skipped) == (0, 36, 4)
    assert [key for key, _ in read_manifest(work / "out").skipped] == [
        f"class_1/0{2 * number + 1:02d}.png" for number in range(4)
    ]


# --- going on ---------------------------------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    save, count = Output.save, iter(range(1000))

    def failing(self: Output, *args: Any) -> Any:
        if next(count) == after:
            raise error
        return save(self, *args)

    monkeypatch.setattr(Output, "save", failing)


def test_a_second_run_does_only_what_is_missing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(work, "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(work)
    with pytest.raises(DataError, match=r"has no tokens\.json"):
        read_tokens(work / "out")
    assert run(work).num_made == 3
    assert content(work / "out") == content(work / "whole")
    assert run(work).num_made == 0
    assert content(work / "out") == content(work / "whole")


@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
def test_shards_that_are_not_whole_are_made_again(work: Path, damage: str) -> None:
    run(work)
    before = content(work / "out")
    shard = work / "out/tokens-00003.parquet"
    data = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(data[:-1] if damage == "short" else data[:50] + bytes([data[50] ^ 1]) + data[51:])
    assert run(work).num_made == 1
    assert content(work / "out") == before


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"limit": 39}, "settings"), ({"split": "train"}, "split"), ({"shard_rows": 9}, "settings"),
        ({"variants": 2}, "settings"),
    ],
)  # fmt: skip
def test_another_plan_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], key: str
) -> None:
    run(work)
    before = content(work / "out")
    with pytest.raises(DataError, match=rf"holds tokens of another plan: tokens\.json there has {key} = "):
        run(work, **changed)
    assert content(work / "out") == before
    with monkeypatch.context() as patch:
        interrupt(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(work, "half")
    with pytest.raises(DataError, match=rf"another plan: \.unfinished/plan\.json there has {key} = "):
        run(work, "half", **changed)


def test_another_tokenizer_is_another_plan(work: Path) -> None:
    run(work)
    tiny_tokenizer(seed=1).save(work / "tokenizer")
    with pytest.raises(DataError, match=r"tokens\.json there has tokenizer = "):
        run(work)


def test_files_of_others_are_left_alone(work: Path) -> None:
    (work / "out").mkdir()
    foreign = work / "out/tokens-00000.parquet"
    foreign.write_bytes(b"somebody's")
    with pytest.raises(DataError, match=r"holds tokens-00000\.parquet, which no tokens\.json or plan there names"):
        run(work)
    assert content(work / "out") == {"tokens-00000.parquet": b"somebody's"}
    (work / "file").write_text("")
    with pytest.raises((DataError, RuntimeError), match="file"):
        run(work, "file")


def test_a_folder_has_one_writer(work: Path) -> None:
    with lock_folder(work / "out", what="tokenization"), pytest.raises(FolderInUse, match="is being written by"):
        run(work)
    assert run(work).num_made == 5


def test_a_full_disk_is_named_and_costs_nothing_that_was_done(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, count = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(count) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(plan_module.os, "fsync", full)
        with pytest.raises(DataError, match=r"cannot write into .*out: no space left on device; finished shards stay"):
            run(work)
    assert not list((work / "out").rglob("*.tmp"))
    assert run(work).num_made == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"limit": 0}, "limit must be at least 1"), ({"workers": -1}, "workers must be at least 0"),
        ({"max_skip_share": 2}, r"max_skip_share must be in \[0, 1\]"), ({"engine": "spark"}, "'local' or 'ray'"),
        ({"split": "val"}, "one of train, test, all"),
        ({"device": "abacus"}, "'abacus' cannot be used here"), ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_leave_nothing(work: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(work, **wrong)
    assert not (work / "out").exists()


def test_profile_counts_seconds_of_all_workers(work: Path) -> None:
    result = run(work, profile=True)
    assert list(result.profile) == ["read", "decode", "model", "write"]
    assert all(0 < seconds < result.seconds for seconds in result.profile.values())
    assert run(work, "quiet").profile == {}


def test_errors_of_the_reading_thread_arrive(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Folder, index: int) -> Any:
        raise DataError("the disk is on fire")

    monkeypatch.setattr(Folder, "read", broken)
    with pytest.raises(DataError, match="on fire"):
        run(work)


# --- killed -----------------------------------------------------------------------------------------------------------


def _tokenize_slowly(work: Path, workers: int) -> None:
    torch.set_num_threads(1)
    run_, Worker.run = Worker.run, _slowly  # type: ignore[method-assign]
    _slowly.run = run_  # type: ignore[attr-defined]
    run(work, workers=workers)


def _slowly(self: Worker, numbers: Any, advance: Any) -> Any:
    def advance_slowly(done: int) -> None:
        time.sleep(0.01)
        advance(done)

    return _slowly.run(self, numbers, advance_slowly)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("workers", "kills", "longest"), [(0, 6, 0.3), (2, 1, 6.0)])
def test_killed_at_any_moment_and_continued(work: Path, workers: int, kills: int, longest: float) -> None:
    run(work, "whole")
    rng = np.random.default_rng(workers)
    for kill in range(kills):
        child = multiprocessing.get_context("fork").Process(target=_tokenize_slowly, args=(work, workers))
        child.start()
        child.join(float(rng.uniform(0, longest)))
        if child.is_alive():
            os.kill(child.pid or 0, (signal.SIGKILL, signal.SIGTERM)[kill % 2])
        child.join()
    result = run(work)
    assert content(work / "out") == content(work / "whole")
    keys = [row.key for row in read_tokens(work / "out")]
    assert len(keys) == len(set(keys)) == result.num_rows == 40


def test_a_killed_worker_is_reported_and_the_rest_kept(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = executors._start

    def start_and_kill(job: Any) -> Any:
        process = start(job)
        os.kill(process.process.pid or 0, signal.SIGKILL)
        return process

    with monkeypatch.context() as patch:
        patch.setattr(executors, "_start", start_and_kill)
        with pytest.raises(WorkerError, match=r"a worker ended with exit status -9 .* finished shards stay"):
            run(work, workers=1)
    assert run(work).num_rows == 40


SCRIPT = """
import os, sys
from pathlib import Path
from tessella.tokenization.engine import tokenize_dataset
if __name__ == "__main__":
    work, engine = Path(sys.argv[1]), sys.argv[2]
    data = {"name": "folder", "path": str(work / "pictures"), "crop_px": 16, "flip": True}
    result = tokenize_dataset(work / "tokenizer", data, work / "out", shard_rows=8, batch_size=3, device="cpu",
                              engine=engine)
    # A file of its own: what ranks print to one pipe runs into each other.
    (work / f"said-{os.environ.get('RANK', '0')}").write_text(f"{result.num_rows} {result.num_made}")
"""


def test_ranks_share_the_work(work: Path) -> None:
    run(work, "whole")
    (work / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(work / "script.py"), str(work), "local"]  # fmt: skip
    done = subprocess.run(command, env=single_threaded(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [(work / f"said-{rank}").read_text() for rank in (0, 1)] == ["40 5"] * 2
    assert content(work / "out") == content(work / "whole")


@pytest.mark.slow
def test_ray_gives_the_same_folder(work: Path) -> None:
    pytest.importorskip("ray")
    run(work, "whole")
    (work / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(work / "script.py"), str(work), "ray"]
    done = subprocess.run(command, env=single_threaded(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (work / "said-0").read_text() == "40 5"
    assert content(work / "out") == content(work / "whole")


def test_the_plan_is_written_before_the_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(work)
    plan = json.loads((work / "out/.unfinished/plan.json").read_text())
    assert plan["settings"] == {"inputs": 40, "rows_per_input": 1, "whole": False, "shard_inputs": 8}
    assert [part["count"] for part in plan["source"]["parts"]] == [39, 1]
