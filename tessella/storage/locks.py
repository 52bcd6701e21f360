"""A folder has one writer."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tessella.storage.writing import HOST, StorageError, is_alive, is_temporary, write_errors
from tessella.text import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("tessella")

LOCK = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # network file systems without a lock service

# What this process holds. To the system it may lock again what it has locked, and closing the file ends its lock: so it
# never opens one of its own a second time.
_held: dict[Path, dict[str, Any]] = {}


class FolderInUse(StorageError):
    """Another process writes into the folder; the message says which, and since when."""


@contextmanager
def lock_folder(path: Path, *, what: str) -> Iterator[None]:
    """Be the one writer of the folder ``path`` for the length of the block.

    The lock is one of the system's on the hidden file ``.lock``, which says who holds it; it ends with the process that
    took it, however that ends, and no process it has started holds it too. Where a file system knows no such locks, the
    file itself is the lock, and is taken over from a process of this machine that is no more. A folder that did not
    exist and is still empty at the end is removed again.

    Args:
        path: the folder; made where missing.
        what: what the writer does, for whoever finds the folder locked: ``"training"``.

    Raises:
        FolderInUse: another writer has it.
        StorageError: the folder cannot be made or written into.
    """
    file = (path / LOCK).resolve()
    with ExitStack() as stack:
        with write_errors(path):
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            if file in _held:
                raise FolderInUse(_refusal(path, _held[file]))
            descriptor = _acquire(path, file)
        _held[file] = _about(what)
        try:
            with write_errors(path):
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_held[file]).encode())
            yield
        finally:
            del _held[file]
            if fcntl is None:  # Windows removes no open file
                os.close(descriptor)
                file.unlink(missing_ok=True)
            else:  # removed before it is unlocked: who locks it then sees that it is gone
                file.unlink(missing_ok=True)
                os.close(descriptor)


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is missing, or holds nothing but a lock and unfinished work.

    To whoever has locked the folder, all unfinished work is a killed writer's.
    """
    return not folder.exists() or all(path.name == LOCK or is_temporary(path.name) for path in folder.iterdir())


def _acquire(path: Path, file: Path) -> int:
    """The locked file, open."""
    dead: dict[str, Any] = {}
    while True:
        try:
            descriptor, made = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                descriptor, made = os.open(file, os.O_RDWR), False
            except FileNotFoundError:
                continue  # its holder has just removed it
        try:
            before = _read(descriptor)
            locked = _lock(descriptor)
            if locked is None and not made:  # the file itself is the lock
                if not before or before.get("host") != HOST or is_alive(int(before.get("pid", 0))):
                    raise FolderInUse(f"{_refusal(path, before)}; delete {file} if that is no longer so")
                file.unlink(missing_ok=True)
                dead = before
            elif locked is False:
                raise FolderInUse(_refusal(path, before))
            if _is_still(descriptor, file):
                if dead := dead or before:
                    logger.warning("%s was left locked by %s, which is no more; taken over", path, _name(dead))
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was removed in between


def _lock(descriptor: int) -> bool | None:
    """Take the system's lock on a file; false if another process has it, None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        # Not flock: that is inherited by forked workers, which may outlive a killed writer by seconds.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_still(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _about(what: str) -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(" ", "seconds")
    return {"what": what, "host": HOST, "pid": os.getpid(), "since": since, "command": " ".join(sys.argv)}


def _read(descriptor: int) -> dict[str, Any]:
    """What the holder wrote; nothing if it has not come to it, or it cannot be read."""
    try:
        found = json.loads(os.read(descriptor, 100_000))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    return f"{path} is being written by {_name(holder)}"


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    said = {key: printable(str(holder.get(key, "?"))) for key in ("what", "pid", "host", "since", "command")}
    return f"process {said['pid']} on {said['host']} since {said['since']} ({said['what']}: {said['command']})"


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of ``folders``, innermost first, that are empty."""
    for folder in folders:
        with suppress(OSError):  # it is not empty, or gone
            folder.rmdir()
