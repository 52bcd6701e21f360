from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import single_threaded, tiny_tokenizer

import tessella
import tessella.storage.locks
import tessella.storage.writing
from tessella.checkpoint import fingerprint, latest_checkpoint, load_state, save_checkpoint
from tessella.storage import (
    CHECKSUMS,
    LOCK,
    FolderInUse,
    StorageError,
    atomic_folder,
    clear_leftovers,
    holds_nothing,
    lock_folder,
    own_leftovers,
    read_sealed,
    recover,
    remove_folder,
    seal,
    unseal,
    verify,
    write_bytes,
    write_checksums,
    write_sealed,
    write_text,
)

HOST = tessella.storage.writing.HOST


def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def folder_with(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=single_threaded(), check=False)


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder."""
    if request.param == "two renames":
        monkeypatch.setattr(tessella.storage.writing, "_exchange", lambda a, b: False)
    return str(request.param)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out" / "model"
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            assert folder != target
            (folder / "file").write_text(text)
            (folder / text).mkdir()
        assert names(target) == sorted(["file", text])
    assert names(tmp_path / "out") == ["model"]


def test_linux_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path / "a", "a")
    folder_with(tmp_path / "b", "b")
    if not tessella.storage.writing._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("no renameat2 here")
    assert (tmp_path / "a" / "file").read_text() == "b"
    assert (tmp_path / "b" / "file").read_text() == "a"

    def refuse(self: Path, target: Path) -> Path:
        raise AssertionError("renamed")

    monkeypatch.setattr(Path, "rename", refuse)
    with atomic_folder(tmp_path / "a"):
        pass
    assert names(tmp_path / "a") == []


def test_a_failure_leaves_what_was_there(tmp_path: Path, way: str) -> None:
    target = folder_with(tmp_path / "model", "old")

    def fail(error: BaseException) -> None:
        with atomic_folder(target) as folder:
            (folder / "file").write_text("half of the n")
            raise error

    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match=r"model: No space left on device; what was there before is untouched$"):
        fail(full)
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_second_rename_that_fails_puts_the_first_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder_with(tmp_path / "model", "old")
    monkeypatch.setattr(tessella.storage.writing, "_exchange", lambda a, b: False)
    rename = Path.rename

    def fails_once_put_aside(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails_once_put_aside)
    with pytest.raises(StorageError, match="Input/output error"), atomic_folder(target):
        pass
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path: Path, way: str) -> None:
    real = folder_with(tmp_path / "disk" / "real", "old")
    (tmp_path / "link").symlink_to(real)
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (real / "file").read_text() == "new"
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["real"]


def test_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file", "é")
    write_bytes(tmp_path / "deep" / "file", b"second")
    assert (tmp_path / "deep" / "file").read_bytes() == b"second"
    assert names(tmp_path / "deep") == ["file"]


def test_a_removed_folder_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "old", "text")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tessella.storage.writing.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    monkeypatch.undo()
    assert not folder.exists()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == []


# --- what the operating system says -----------------------------------------------------------------------------------


def test_errors_name_the_place_and_the_reason(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "folder", "text")
    with pytest.raises(StorageError, match=rf"^could not write {folder}: Is a directory"):
        write_text(folder, "text")
    with pytest.raises(StorageError, match=r"folder/file\): there is a file where a folder should be"):
        write_text(folder / "file" / "below", "text")
    with pytest.raises(StorageError, match="there is a file where a folder should be"):
        write_text(folder / "file" / "below" / "deep", "text")
    with pytest.raises(StorageError, match=r"folder/file: there is a file where"), atomic_folder(folder / "file"):
        pass
    with pytest.raises(StorageError, match="File name too long"):
        write_text(folder / ("x" * 300), "text")
    assert names(folder) == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("where", ["weights", "state", "state in small pieces", "file", "folder", "lock"])
def test_a_full_disk_is_called_so(small_disk: Path, where: str) -> None:
    tokenizer = tiny_tokenizer()
    first = save_checkpoint(small_disk, 1, tokenizer, {"position": 1}, keep=2)
    room = 8_192 if where in ("weights", "file", "folder", "lock") else 200_000
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "ballast").write_bytes(bytes(free - room))
    pieces = [torch.zeros(1_000) + index for index in range(300)]
    state = {"pieces": pieces} if where == "state in small pieces" else {"piece": torch.zeros(300_000)}

    def write() -> None:
        if where == "file":
            write_bytes(small_disk / "new" / "file", bytes(20_000))
        elif where == "folder":
            with atomic_folder(small_disk / "new") as folder:
                (folder / "file").write_bytes(bytes(20_000))
        elif where == "lock":
            (small_disk / "more").write_bytes(bytes(room))
            with lock_folder(small_disk / "new", what="a test"):
                pass
        else:
            save_checkpoint(small_disk, 2, tokenizer, state, keep=2)

    with pytest.raises(StorageError, match=rf"could not write {small_disk}/\S+: No space left on device; what was"):
        write()
    assert latest_checkpoint(small_disk) == first
    assert names(small_disk / "checkpoints") == [first.name]
    assert load_state(first) == {"position": 1}
    assert fingerprint(tessella.load(small_disk)) == fingerprint(tokenizer)


def test_a_read_only_place_is_called_so(small_disk: Path) -> None:
    tiny_tokenizer().save(small_disk / "model")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = pytest.raises(StorageError, match=rf"could not write {small_disk}\S*: Read-only file system")
    with refused:
        write_text(small_disk / "file", "text")
    with refused:
        tiny_tokenizer().save(small_disk / "model")
    with refused, lock_folder(small_disk, what="a test"):
        pass
    with refused:
        remove_folder(small_disk / "model")
    assert verify(small_disk / "model")
    tessella.load(small_disk / "model")


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that nobody may write into, or look into, with a model that may be read; not below pytest's own."""
    if os.getuid() != 0:
        pytest.skip("only root can become nobody")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "closed"
        tiny_tokenizer().save(place / "model")
        place.chmod(0o711)
        Path(name).chmod(0o711)
        yield place


def test_no_permission_is_called_so(closed: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import tessella
from tessella.storage import atomic_folder, lock_folder, write_text
place = Path(sys.argv[1])
tessella.load(place / "model")  # nobody may import what that needs
os.setuid(65534)
for attempt in (lambda: write_text(place / "file", ""), lambda: atomic_folder(place / "folder").__enter__(),
                lambda: lock_folder(place, what="a test").__enter__()):
    try:
        attempt()
    except RuntimeError as error:
        print(error)
print(type(tessella.load(place / "model")).__name__)
"""
    done = python(code, closed)
    *lines, loaded = done.stdout.splitlines() or [""]
    said = "Permission denied; what was there before is untouched"
    assert [line.partition(": ")[2] for line in lines] == [said] * 3, done.stderr
    assert loaded == "Tokenizer", done.stderr


# --- killed in between ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import tessella.storage.writing as writing
moment, target = sys.argv[1], Path(sys.argv[2])
def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)
rename, count = Path.rename, [0]
def counted(self, to):
    count[0] += 1
    if moment == f"before rename {count[0]}":
        die()
    result = rename(self, to)
    if moment == f"after rename {count[0]}":
        die()
    return result
Path.rename = counted
exchange = writing._exchange
if moment.endswith("exchange"):
    def swapped(a, b):
        if moment.startswith("after"):
            exchange(a, b)
        die()
    writing._exchange = swapped
else:
    writing._exchange = lambda a, b: False
with writing.atomic_folder(target) as folder:
    (folder / "file").write_text("new")
    if moment == "within":
        die()
"""


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("within", "old"),
        ("before exchange", "old"),
        ("after exchange", "new"),
        ("before rename 1", "old"),
        ("after rename 1", "old"),
        ("before rename 2", "old"),
        ("after rename 2", "new"),
    ],
)
def test_killed_while_replacing(tmp_path: Path, moment: str, expected: str) -> None:
    target = folder_with(tmp_path / "model", "old")
    done = python(KILLED, moment, target)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert own_leftovers(tmp_path)
    recover(tmp_path)  # what every reader does
    assert (target / "file").read_text() == expected
    with atomic_folder(tmp_path / "other") as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path) == ["model", "other"]  # what every writer does
    assert (target / "file").read_text() == expected


def test_every_reader_puts_back(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()

    def aside(path: Path) -> None:
        path.rename(path.with_name(f".{path.name}.{dead()}@{HOST}.old"))

    tokenizer.save(tmp_path / "model")
    aside(tmp_path / "model")
    assert fingerprint(tessella.load(tmp_path / "model")) == fingerprint(tokenizer)
    newest = save_checkpoint(tmp_path / "run", 3, tokenizer, {"position": 3}, keep=1)
    aside(newest)
    assert latest_checkpoint(tmp_path / "run") == newest
    aside(newest)
    assert load_state(newest) == {"position": 3}


def test_leftovers_of_the_dead_are_told_from_everything_else(tmp_path: Path) -> None:
    pid = dead()
    gone = [
        f".a.{pid}@{HOST}.tmp", f".b.{pid}.tmp", f".c.d.{pid}@{HOST}.old", f".e.{10**30}@{HOST}.tmp",
        f".former.{os.getpid()}@{HOST}.tmp",
    ]  # fmt: skip
    other = [
        f".a.{pid}@elsewhere.tmp", f".a.{os.getppid()}@{HOST}.tmp", ".a.tmp", f"a.{pid}.tmp", f".a.{pid}.bak", "c.d",
        LOCK,
    ]  # fmt: skip
    for name in gone + other:
        (tmp_path / name).write_text("x")
    assert sorted(path.name for path in own_leftovers(tmp_path)) == sorted(gone)
    with atomic_folder(tmp_path / "new"):
        inside = [path.name for path in tmp_path.iterdir() if ".new." in path.name]
        assert len(inside) == 1
        assert own_leftovers(tmp_path) == []  # gone, and what is under way is none
        clear_leftovers(tmp_path)
        assert (tmp_path / inside[0]).is_dir()
    assert names(tmp_path) == sorted([*other, "new"])


def test_a_process_that_ended_unasked_for_is_dead(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()  # until it ends; nobody has waited for it
        leftover = tmp_path / f".a.{process.pid}@{HOST}.tmp"
        leftover.touch()
        deadline = time.monotonic() + 10
        while not own_leftovers(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert own_leftovers(tmp_path) == [leftover]


def test_a_file_s_writer_clears_up_too(tmp_path: Path) -> None:
    (tmp_path / f".recipe.toml.{dead()}@{HOST}.tmp").write_text("half")
    assert holds_nothing(tmp_path)
    assert holds_nothing(tmp_path / "nowhere")
    write_text(tmp_path / "recipe.toml", "whole")
    assert names(tmp_path) == ["recipe.toml"]
    (tmp_path / f".recipe.toml.{os.getppid()}@{HOST}.tmp").write_text("half")  # alive, or its number was given again
    assert not holds_nothing(tmp_path)


# --- one writer -------------------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from pathlib import Path
from tessella.storage import lock_folder
with lock_folder(Path(sys.argv[1]), what="training"):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(20)
"""


@contextmanager
def holder(folder: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """A process that has locked ``folder``, until it is killed; everything it started ends with the block."""
    command = [sys.executable, "-c", HOLD, str(folder), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(params=["fcntl", "no fcntl", "a file system without locks"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the platform offers."""
    if request.param == "no fcntl":
        monkeypatch.setattr(tessella.storage.locks, "fcntl", None)
    elif request.param != "fcntl":

        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(tessella.storage.locks.fcntl, "lockf", refuse)
    return str(request.param)


def test_a_second_writer_is_refused_by_name(tmp_path: Path, system: str) -> None:
    folder = tmp_path / "run"
    with holder(folder) as process:
        about = json.loads((folder / LOCK).read_text())
        assert about["pid"] == process.pid
        assert about["host"] == HOST
        pattern = rf"{folder} is being written by process {process.pid} on {HOST} since {about['since']} \(training: -c"
        for _ in range(2):
            with pytest.raises(FolderInUse, match=pattern.replace("+", r"\+")), lock_folder(folder, what="a test"):
                pass
        process.kill()
        process.wait()
    with lock_folder(folder, what="a test"):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()


def test_a_dead_writer_s_lock_is_taken_over_and_that_is_said(
    tmp_path: Path, system: str, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(tmp_path, "fork") as process:  # a worker of the dead one lives on
        process.kill()
        process.wait()
        with caplog.at_level("WARNING", "tessella"), lock_folder(tmp_path, what="a test"):
            (message,) = (record.message for record in caplog.records)
            assert message.startswith(f"{tmp_path} was left locked by process {process.pid} on {HOST} since ")
            assert message.endswith("which is no more; taken over")
        assert names(tmp_path) == []


def test_the_same_process_is_refused_too(tmp_path: Path, system: str) -> None:
    with lock_folder(tmp_path, what="the first"):
        for _ in range(2):
            with pytest.raises(FolderInUse, match=rf"process {os.getpid()} .*\(the first: "):
                with lock_folder(tmp_path / "." / "", what="the second"):
                    pass
        code = "import sys; from pathlib import Path; from tessella.storage import *\n" + (
            "with lock_folder(Path(sys.argv[1]), what='other'): print('in')"
        )
        if system == "fcntl":  # the refusals above did not end the lock
            assert "FolderInUse" in python(code, tmp_path).stderr
    with lock_folder(tmp_path, what="the second"):
        pass
    assert names(tmp_path) == []


def test_a_lock_leaves_nothing_where_nothing_was(tmp_path: Path, system: str) -> None:
    with lock_folder(tmp_path / "a" / "b", what="a test"):
        assert holds_nothing(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "a" / "b", what="a test"):
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with lock_folder(tmp_path / "a" / "b", what="a test"):
        write_text(tmp_path / "a" / "b" / "file", "text")
    assert names(tmp_path / "a" / "b") == ["file"]


def test_many_writers_at_once_are_one_after_the_other(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from tessella.storage import FolderInUse, lock_folder
folder, done, deadline = Path(sys.argv[1]), 0, time.monotonic() + 60
while done < 20 and time.monotonic() < deadline:
    try:
        with lock_folder(folder, what="counting"):
            count = int((folder / "count").read_text())
            (folder / "count").write_text(str(count + 1))
            done += 1
    except FolderInUse:
        pass
"""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=90)[1] for process in processes] == [""] * 4  # nothing was taken over
    assert (tmp_path / "count").read_text() == "80"


# --- checksums --------------------------------------------------------------------------------------------------------


def test_every_file_is_verified(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    assert not verify(tmp_path)
    write_checksums(tmp_path)
    assert json.loads((tmp_path / CHECKSUMS).read_text())["sha256"]["a"] == (
        "41edece42d63e8d9bf515a9ba6932e1c20cbc9f5a5d134645adb5db1b9737ea3"  # python: hashlib.sha256(b"a" * 1000)
    )
    assert verify(tmp_path)
    (tmp_path / "b").write_bytes(b"b" * 999 + b"c")
    assert verify(tmp_path, "a")
    for asked in ((), ("b",)):
        with pytest.raises(StorageError, match=rf"^{tmp_path / 'b'} is damaged"):
            verify(tmp_path, *asked)
    (tmp_path / "b").unlink()
    with pytest.raises(StorageError, match=rf"^{tmp_path / 'b'} cannot be read: No such file"):
        verify(tmp_path)
    (tmp_path / "c").write_text("new")
    with pytest.raises(StorageError, match=r"c is not listed in checksums\.json"):
        verify(tmp_path, "c")


def test_seals() -> None:
    values = {"rows": [1, 2.5, None, "é"], "nested": {"1": (2, 3)}}
    sealed = json.loads(json.dumps(seal(values)))
    assert unseal(sealed, where="it") == json.loads(json.dumps(values))
    assert unseal(seal(sealed), where="it") == unseal(sealed, where="it")
    assert unseal(json.loads(json.dumps(seal({10: 1, 9: 2}))), where="it") == {"10": 1, "9": 2}
    sealed["rows"][0] = 2
    with pytest.raises(StorageError, match=r"^it is damaged"):
        unseal(sealed, where="it")
    with pytest.raises(StorageError, match=r"^it is damaged"):
        unseal({"rows": []}, where="it")


def test_no_flipped_bit_of_a_sealed_file_goes_unseen(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    values = {"name": "é", "shards": ["tokens-00000.parquet"], "rows": 10, "share": 0.5}
    write_sealed(file, values)
    assert read_sealed(file) == values
    whole = file.read_bytes()
    for offset in range(len(whole)):
        for bit in (offset % 8, (offset + 3) % 8):
            file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) + whole[offset + 1 :])
            with pytest.raises(StorageError, match=rf"^{file} is damaged"):
                read_sealed(file)
    for text in ("", "[]", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(StorageError, match=rf"^{file} is damaged"):
            read_sealed(file)
    file.unlink()
    with pytest.raises(StorageError, match="cannot be read: No such file"):
        read_sealed(file)
