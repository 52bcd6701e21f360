"""Everything about writing and verifying files: whole or not at all, by one writer at a time, and checked when read."""

from tessella.storage.checksums import CHECKSUMS, read_sealed, seal, unseal, verify, write_checksums, write_sealed
from tessella.storage.locks import LOCK, FolderInUse, holds_nothing, lock_folder
from tessella.storage.writing import (
    Output,
    StorageError,
    atomic_folder,
    clear_leftovers,
    own_leftovers,
    recover,
    remove_folder,
    write_bytes,
    write_errors,
    write_text,
)

__all__ = [
    "CHECKSUMS",
    "LOCK",
    "FolderInUse",
    "Output",
    "StorageError",
    "atomic_folder",
    "clear_leftovers",
    "holds_nothing",
    "lock_folder",
    "own_leftovers",
    "read_sealed",
    "recover",
    "remove_folder",
    "seal",
    "unseal",
    "verify",
    "write_bytes",
    "write_checksums",
    "write_errors",
    "write_sealed",
    "write_text",
]
