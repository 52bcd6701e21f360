"""Files and folders that appear complete or not at all, and what killed writers leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from tessella.errors import TessellaError

logger = logging.getLogger("tessella")

HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())

# What a writer works on: .NAME.PID@HOST.tmp; what it is about to replace: the same with .old. Format 1 wrote no host.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]+)(?:@(?P<host>[^@]*))?\.(?P<kind>tmp|old)")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # a kernel or a file system without it
_NO_FOLDER = (FileExistsError, NotADirectoryError)  # as making it, and going into it, put it

_at_work: set[Path] = set()  # temporary names that this process is writing


class StorageError(TessellaError, RuntimeError):
    """A file or folder that cannot be written, or is not what was written; the message names it and the reason."""


@contextmanager
def write_errors(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn errors of the operating system into ones that name what could not be written, and why.

    Raises:
        StorageError: no space left, a read-only place, no permission, a folder where a file should be, ...
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, TessellaError):
            raise
        # Which file of several it was, under the name that it would have had.
        name = str(error.filename or target)
        name = name if temporary is None else name.replace(str(temporary), str(target))
        where = name if name.startswith(str(target)) else f"{target} ({name})"
        reason = (
            "there is a file where a folder should be" if isinstance(error, _NO_FOLDER) else error.strerror or error
        )
        raise StorageError(f"could not write {where}: {reason}; what was there before is untouched") from error


class Output:
    """A binary file that remembers the first error of writing it, for writers that hide it behind their own.

    A full disk makes ``torch.save`` say ``unexpected pos 64 vs 0``; :attr:`error` says what happened.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """As of any file."""
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """As of any file."""
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error
            raise


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all.

    Raises:
        StorageError: it could not be written; the message says why.
    """
    temporary = _temporary(file, "tmp")
    with write_errors(file, temporary), _working(temporary):
        file.parent.mkdir(parents=True, exist_ok=True)
        _clear_once(_absolute(file.parent))
        try:
            temporary.write_bytes(data)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """:func:`write_bytes` for text."""
    write_bytes(file, text.encode())


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    A folder that is already there is exchanged for the new one in one step where the system can (Linux); elsewhere it
    is put aside first, and :func:`recover` puts it back should the writer die in between.

    Raises:
        StorageError: it could not be written (a full disk, no permission, ``target`` is a file); the message says why.
    """
    target = target.resolve() if target.is_symlink() else target
    temporary = _temporary(target, "tmp")
    with write_errors(target, temporary), _working(temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target.parent)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                _flush(path)
            _put_in_place(temporary, target)
            _flush(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder: it is gone from its name at once, and a killed process leaves no part of it there."""
    temporary = _temporary(folder, "tmp")
    with write_errors(folder, temporary), _working(temporary):
        folder.rename(temporary)
        shutil.rmtree(temporary)


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        replaced = _temporary(target, "old")
        with _working(replaced):
            target.rename(replaced)
            try:
                temporary.rename(target)
            except OSError:
                replaced.rename(target)
                raise
            shutil.rmtree(replaced)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; false where the system cannot."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if library is None or not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- leftovers --------------------------------------------------------------------------------------------------------


def own_leftovers(folder: Path) -> list[Path]:
    """What writers that are no more left in ``folder`` under temporary names: files, whole folders.

    Writers of other machines are taken to be alive.
    """
    return [path for path, _ in _stale(folder)]


def recover(folder: Path) -> None:
    """Put back what a dead writer had put aside in ``folder`` and not yet replaced.

    Raises:
        StorageError: there is such a thing, and it cannot be put back.
    """
    for path, found in _stale(folder):
        target = folder / found["name"]
        if found["kind"] == "old" and not target.exists():
            with write_errors(target), contextlib.suppress(FileNotFoundError):  # another process was faster
                path.rename(target)
                logger.warning("put %s back, which a killed process was about to replace", target)


def clear_leftovers(folder: Path) -> None:
    """:func:`recover`, and delete what else dead writers left in ``folder``."""
    recover(folder)
    for path, _ in _stale(folder):
        logger.info("removing %s, which a killed process left", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@cache
def _clear_once(folder: Path) -> None:
    """:func:`clear_leftovers`, for writers of many files: only the first of them looks."""
    clear_leftovers(folder)


def _stale(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """Temporary names in ``folder`` whose writer is dead, each with its parts."""
    if not folder.is_dir():
        return
    try:
        there = sorted(os.listdir(folder))
    except PermissionError:  # a folder that one may go through, but not look into
        return
    for name in there:
        found = _TEMPORARY.fullmatch(name)
        if found is None or found["host"] not in (None, HOST):
            continue
        pid, path = int(found["pid"]), folder / name
        # In a container every start may have the same number: what bears ours and is not under way is of a former life.
        if _absolute(path) not in _at_work if pid == os.getpid() else not is_alive(pid):
            yield path, found


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; where that cannot be asked (Windows), it is taken to."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    try:  # one that ended, but that its parent did not ask for yet, is still listed
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2][:1]
    except OSError:
        return True
    return state not in ("Z", "X")


def is_temporary(name: str) -> bool:
    """Whether a file or folder is called as a writer's unfinished work is."""
    return _TEMPORARY.fullmatch(name) is not None


def _temporary(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}@{HOST}.{kind}")


@contextmanager
def _working(temporary: Path) -> Iterator[None]:
    _at_work.add(_absolute(temporary))
    try:
        yield
    finally:
        _at_work.discard(_absolute(temporary))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
