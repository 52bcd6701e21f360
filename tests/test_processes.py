"""No process outlives the program that started it, and a signal to the group loses nothing."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import single_threaded

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")

# A worker that looks for its parent only once that has gone, and a parent that goes at once.
WORKER = """
import os, sys, time
from tessella.processes import end_with_parent
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.01)
end_with_parent(int(sys.argv[1]))
time.sleep(60)
"""
PARENT = (
    "import os, subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]).pid)"
)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def children(pid: int) -> set[int]:
    """All descendants."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(parent, []).append(int(folder.name))
    found, open_ = set(), [pid]
    while open_:
        new = parents.get(open_.pop(), [])
        found |= set(new)
        open_ += new
    return found


def gone_within(pids: set[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_process_whose_parent_is_gone_before_it_looks_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT, WORKER], stdout=subprocess.PIPE, timeout=60, check=True)
    assert gone_within({int(done.stdout)}, 5)


def start(workspace: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tessella", "train", "tiny.toml", "--out", "run", "--device", "cpu",
               "--set", "training.num_workers=2", "--set", "training.steps=100000",
               "--set", "training.checkpoint_every=1000000", *more]  # fmt: skip
    return subprocess.Popen(
        command, cwd=workspace, env=single_threaded(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_workers(process: subprocess.Popen[str]) -> set[int]:
    while len(found := children(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    return found


def test_workers_of_a_killed_training_end(workspace: Path) -> None:
    process = start(workspace)
    found = wait_for_workers(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert gone_within(found, 10)


def test_sigterm_to_the_whole_group_saves(workspace: Path) -> None:
    process = start(workspace)
    log = workspace / "run" / "log.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    found = children(process.pid)
    assert len(found) >= 2
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "interrupted by SIGTERM; saved" in errors
    assert list((workspace / "run" / "checkpoints").glob("step-*"))
    assert gone_within(found, 10)


# Blocks of 1 MiB (no huge pages) freed and allocated again, and the pages that the system had to hand out for them.
LAYERS = """
import resource, numpy
from tessella.processes import keep_freed_memory
keep_freed_memory()
numpy.ones(2**17)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(64):
    numpy.ones(2**17)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("environment", "pages"), [({}, range(1000)), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, range(64 * 255, 10**6))]
)
def test_freed_memory_is_allocated_again_unless_the_environment_says_otherwise(
    environment: dict[str, str], pages: range
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", LAYERS], env=clean | environment, stdout=subprocess.PIPE, timeout=60, check=True
    )
    assert int(done.stdout) in pages
