from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tessella.data.base import (
    Batch,
    DataError,
    ImageDataset,
    Picture,
    SkipBudget,
    Streamed,
    UnreadableImage,
    to_tensor,
)
from tessella.data.loader import evaluation_batches, training_batches
from tessella.errors import ConfigError
from tessella.tokenization.source import Source


class Numbered(ImageDataset):
    """Picture i has i in its red channel, its column in the green one and its row in the blue one."""

    def __init__(self, length: int, *, broken: tuple[int, ...] = (), size: tuple[int, int] = (8, 6), **options) -> None:
        super().__init__(split="train", **options)
        self.length = length
        self.broken = broken
        self.size = size

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Picture:
        if index in self.broken:
            raise UnreadableImage(str(index), "broken on purpose")
        width, height = self.size
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([np.full_like(x, index), x, y], -1).astype(np.uint8)
        return Picture(Image.fromarray(pixels), index % 3, str(index))


class Failing(Numbered):
    def read(self, index: int) -> Picture:
        if index == 2:
            raise self.error()
        return super().read(index)

    def error(self) -> Exception:
        return DataError("2: the file contradicts itself")


class Crashing(Failing):
    def error(self) -> Exception:
        return ZeroDivisionError("a bug")


class Threads(Numbered):
    def read(self, index: int) -> Picture:
        image, _, key = super().read(index)
        return Picture(image, torch.get_num_threads(), key)


def levels(x: torch.Tensor) -> torch.Tensor:
    return ((x.double() + 1) * 127.5).round().long()


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["x"], b["x"])
        assert torch.equal(a["label"], b["label"])
        assert (a["key"], a["skipped"]) == (b["key"], b["skipped"])


def test_levels_map_to_minus_one_and_one() -> None:
    ramp = np.arange(256, dtype=np.uint8)
    x = to_tensor(Image.fromarray(np.stack([ramp, ramp, ramp], -1)[None]))
    assert x.shape == (3, 1, 256)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    torch.testing.assert_close(x[0, 0], torch.arange(256) / 127.5 - 1, rtol=0, atol=0)
    assert (x.min(), x.max()) == (-1, 1)


@settings(max_examples=30)
@given(
    length=st.integers(1, 9), batch_size=st.integers(1, 12), start=st.integers(0, 10), seed=st.integers(0, 2**32 - 1)
)
def test_any_start_continues_the_uninterrupted_run(length: int, batch_size: int, start: int, seed: int) -> None:
    dataset = Numbered(length, crop_px=3, flip=True, broken=(1,) if length > 1 else ())
    whole = take(training_batches(dataset, batch_size=batch_size, seed=seed), start + 3)
    resumed = training_batches(dataset, batch_size=batch_size, seed=seed, start_batch=start)
    assert_same(take(resumed, 3), whole[start:])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing_and_end(num_workers: int) -> None:
    dataset = Numbered(7, crop_px=3, flip=True, broken=(2,))
    batches = training_batches(dataset, batch_size=4, seed=5, start_batch=3, num_workers=num_workers)
    assert_same(take(batches, 6), take(training_batches(dataset, batch_size=4, seed=5), 9)[3:])
    workers = multiprocessing.active_children()
    del batches
    assert [worker.exitcode for worker in workers] == [0] * num_workers


def test_every_epoch_shows_each_picture_once_and_in_another_order() -> None:
    batches = take(training_batches(Numbered(6), batch_size=4, seed=0), 6)  # four epochs
    keys = [key for batch in batches for key in batch["key"]]
    epochs = [keys[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list("012345") for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert all(batch["x"].shape == (4, 3, 6, 8) for batch in batches)
    other_seed = take(training_batches(Numbered(6), batch_size=4, seed=1), 6)
    assert keys != [key for batch in other_seed for key in batch["key"]]


def test_crops_lie_anywhere_and_change_between_epochs() -> None:
    dataset = Numbered(1, crop_px=3)
    corners = set()
    for batch in take(training_batches(dataset, batch_size=1, seed=0), 300):
        picture = levels(batch["x"])[0]
        left, top = picture[1, 0, 0].item(), picture[2, 0, 0].item()
        assert torch.equal(picture[1], torch.arange(left, left + 3).expand(3, 3))
        assert torch.equal(picture[2], torch.arange(top, top + 3)[:, None].expand(3, 3))
        corners.add((left, top))
    assert corners == set(itertools.product(range(6), range(4)))


def test_flip_mirrors_half() -> None:
    batches = take(training_batches(Numbered(1, flip=True), batch_size=400, seed=0), 1)
    columns = levels(batches[0]["x"])[:, 1, 0]
    mirrored = (columns == torch.arange(7, -1, -1)).all(-1)
    assert (mirrored | (columns == torch.arange(8)).all(-1)).all()
    assert 150 < mirrored.sum() < 250


def test_evaluation_crops_the_centre_and_never_flips() -> None:
    sample = Numbered(1, crop_px=4, flip=True)[0]
    picture = levels(sample["x"])
    assert picture[1, 0].tolist() == [2, 3, 4, 5]  # of 8 columns
    assert picture[2, :, 0].tolist() == [1, 2, 3, 4]  # of 6 rows
    assert (sample["label"], sample["key"]) == (0, "0")


def test_a_data_set_is_a_sequence() -> None:
    dataset = Numbered(3)
    assert [dataset[i]["key"] for i in range(len(dataset))] == [sample["key"] for sample in dataset] == ["0", "1", "2"]
    for index in (3, -1):
        with pytest.raises(IndexError, match=rf"index {index} is outside \[0, 3\)"):
            dataset[index]


def test_the_shorter_side_is_resized() -> None:
    assert Numbered(1, resize_px=3)[0]["x"].shape == (3, 3, 4)  # of 6 x 8
    assert Numbered(1, resize_px=12, crop_px=12)[0]["x"].shape == (3, 12, 12)
    assert Numbered(1, size=(6, 8), resize_px=3)[0]["x"].shape == (3, 4, 3)


def test_a_picture_smaller_than_the_crop_says_the_sizes() -> None:
    with pytest.raises(UnreadableImage, match=r"^0: 8x6 px is smaller than crop_px=7; resize_px=7 would enlarge it$"):
        Numbered(1, crop_px=7)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_shows_every_readable_picture_once(num_workers: int) -> None:
    dataset = Numbered(11, crop_px=4, broken=(0, 1, 5, 9, 10))
    batches = list(evaluation_batches(dataset, batch_size=2, num_workers=num_workers))
    assert [batch["key"] for batch in batches] == [["2", "3"], ["4"], ["6", "7"], ["8"]]
    assert [[key for key, _ in batch["skipped"]] for batch in batches] == [["0", "1"], ["5"], [], ["9", "10"]]
    assert [batch["label"].tolist() for batch in batches] == [[2, 0], [1], [0, 1], [2]]
    assert all(batch["x"].shape == (len(batch["key"]), 3, 4, 4) for batch in batches)
    assert multiprocessing.active_children() == []


def test_evaluation_limit() -> None:
    batches = list(evaluation_batches(Numbered(11), batch_size=4, limit=6))
    assert [batch["key"] for batch in batches] == [["0", "1", "2", "3"], ["4", "5"]]
    assert [batch["key"] for batch in evaluation_batches(Numbered(3), batch_size=4, limit=6)] == [["0", "1", "2"]]


def test_an_unreadable_picture_is_replaced_by_the_next() -> None:
    dataset = Numbered(5, broken=(3, 4))
    (batch,) = take(training_batches(dataset, batch_size=5, seed=0), 1)
    assert sorted(batch["key"]) == ["0", "0", "0", "1", "2"]  # 3 -> 4 -> 0, and 4 -> 0
    assert sorted(batch["skipped"]) == [
        ("3", "broken on purpose"), ("4", "broken on purpose"), ("4", "broken on purpose")
    ]  # fmt: skip


def test_no_readable_picture_is_an_error_that_names_some() -> None:
    dataset = Numbered(7, broken=tuple(range(7)))
    with pytest.raises(DataError, match=r"7 pictures in a row cannot be used: .*; and 2 more$"):
        next(training_batches(dataset, batch_size=1, seed=0))
    with pytest.raises(DataError, match=r"none of the pictures can be used: 0: broken on purpose; 1: .*; and 2 more$"):
        list(evaluation_batches(dataset, batch_size=2))


def test_whole_pictures_of_one_size_make_batches_and_others_do_not() -> None:
    class Growing(Numbered):
        def read(self, index: int) -> Picture:
            return Picture(Image.new("RGB", (8 + index, 6)), 0, f"picture {index}")

    (batch,) = evaluation_batches(Numbered(3), batch_size=3)
    assert batch["x"].shape == (3, 3, 6, 8)
    expected = "picture 0 is 8x6, picture 1 9x6; set crop_px, or batch_size=1"
    with pytest.raises(DataError, match=expected):
        next(evaluation_batches(Growing(3), batch_size=3))
    assert [batch["x"].shape[3] for batch in evaluation_batches(Growing(3), batch_size=1)] == [8, 9, 10]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_the_data_reads_the_same_from_a_worker(num_workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(evaluation_batches(Failing(4), batch_size=1, num_workers=num_workers))
    assert str(caught.value) == "2: the file contradicts itself"
    del caught
    assert multiprocessing.active_children() == []


def test_a_bug_in_a_worker_surfaces_with_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match=r"(?s)worker process 0.*in read.*a bug"):
        list(evaluation_batches(Crashing(4), batch_size=1, num_workers=1))


def test_a_worker_has_one_torch_thread() -> None:
    (batch,) = evaluation_batches(Threads(1), batch_size=1, num_workers=1)
    assert batch["label"].item() == 1


def test_an_interrupt_leaves_workers_at_work() -> None:
    others = multiprocessing.active_children()
    batches = training_batches(Numbered(3), batch_size=2, seed=0, num_workers=1)
    take(batches, 1)
    (worker,) = set(multiprocessing.active_children()) - set(others)
    os.kill(worker.pid, signal.SIGINT)
    assert len(take(batches, 10)) == 10
    assert worker.is_alive()
    del batches
    assert worker.exitcode == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_programs_own_randomness_is_untouched(num_workers: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(training_batches(Numbered(3), batch_size=2, seed=0, num_workers=num_workers))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"start_batch": -1}, "start_batch must be at least 0, got -1"),
        ({"num_workers": -2}, "num_workers must be at least 0, got -2"),
    ],
)
def test_counts_are_checked_at_once(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_batches(Numbered(3), **{"batch_size": 1, "seed": 0, **options})


def test_evaluation_counts_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        evaluation_batches(Numbered(3), batch_size=1, limit=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_px": 0}, "crop_px must be at least 1, got 0"),
        ({"resize_px": -1}, "resize_px must be at least 1, got -1"),
        ({"crop_px": 8, "resize_px": 7}, r"resize_px \(7\) must be at least crop_px \(8\)"),
    ],
)
def test_sizes_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Numbered(3, **options)


def test_split_is_checked() -> None:
    class Any(Numbered):
        def __init__(self) -> None:
            ImageDataset.__init__(self, split="val")

    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        Any()


def variants_of(pictures: Numbered, count: int) -> Source:
    return Source([pictures], section={}, split="train", variants=count, whole=False)


def test_variants_are_what_training_draws() -> None:
    pictures = Numbered(3, crop_px=3, flip=True)
    source = variants_of(pictures, 4)
    assert (len(source), source.rows_per_input) == (3, 4)
    for epoch in range(4):
        (drawn,) = take(training_batches(pictures, batch_size=3, seed=0, start_batch=epoch), 1)
        for x, key in zip(drawn["x"], drawn["key"], strict=True):
            row = source.sample(int(key), epoch)
            assert not isinstance(row, Streamed)
            assert torch.equal(row["x"], x)
            assert (row["key"], row["label"]) == (key, int(key) % 3)
    rows = [source.sample(index, variant) for index in range(3) for variant in range(4)]
    assert len({row["x"].numpy().tobytes() for row in rows if not isinstance(row, Streamed)}) > 9  # of 12 with 48 views


def test_every_variant_of_an_unreadable_picture_is_refused() -> None:
    source = variants_of(Numbered(3, broken=(1,), crop_px=3), 2)
    for variant in range(2):
        with pytest.raises(UnreadableImage, match="1: broken on purpose"):
            source.sample(1, variant)
    source.sample(0, 1), source.sample(2, 0)


def test_variants_keep_the_names_of_classes_and_need_windows() -> None:
    pictures = Numbered(3, crop_px=3)
    pictures.class_names = ("a", "b", "c")
    assert variants_of(pictures, 2).class_names == ("a", "b", "c")
    with pytest.raises(ConfigError, match="variants must be at least 0, got -1"):
        variants_of(pictures, -1)
    with pytest.raises(ConfigError, match=r"variants are random windows of a signal: they need data\.crop_px"):
        variants_of(Numbered(3), 2)


def batch_of(read: int, skipped: int) -> Batch:
    missing = [(f"{i}.png", "broken") for i in range(skipped)]
    return Batch(x=torch.zeros(read, 3, 1, 1), label=torch.zeros(read).long(), key=["k"] * read, skipped=missing)


def test_budget_ends_at_the_share() -> None:
    budget = SkipBudget(0.05)
    budget.count(batch_of(91, 8))  # too many, of too few to judge
    budget.count(batch_of(99, 2))  # 10 of 200: just allowed
    with pytest.raises(DataError, match=r"^11 of 201 pictures cannot be used, more than max_skip_share=0.05 allows: "
                                        r"0\.png: broken; .*4\.png: broken; and 3 more$"):  # fmt: skip
        budget.count(batch_of(0, 1))
    assert (budget.num_read, budget.num_skipped) == (190, 11)


def test_budget_judges_a_small_evaluation_at_its_end() -> None:
    budget = SkipBudget(0.5)
    budget.count(batch_of(1, 1))
    budget.check()
    budget.count(batch_of(0, 1))
    with pytest.raises(DataError, match="2 of 3"):
        budget.check()


def test_budget_of_nothing() -> None:
    SkipBudget(0).check()
    with pytest.raises(ValueError, match=r"max_skip_share must be in \[0, 1\], got 2"):
        SkipBudget(2)


def test_an_unreadable_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "torn")))
    assert (error.key, error.reason, str(error)) == ("a.png", "torn", "a.png: torn")


KILLED = """
if __name__ == "__main__":
    import os, signal
    from tessella.data.loader import training_batches
    from tessella.data.folder import Folder
    batches = training_batches(Folder({path!r}, split="train"), batch_size=1, seed=0, num_workers=1)
    next(batches)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "killed.py").write_text(KILLED.format(path=str(tmp_path)))
    # Workers share the program's output: reading it to its end waits for them too.
    done = subprocess.run([sys.executable, str(tmp_path / "killed.py")], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
