"""What is to be done, and the folder where it is done piece by piece until it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessella.data._errors import DataError
from tessella.data._token_manifest import (
    MANIFEST,
    Manifest,
    Shard,
    foreign_shards,
    parse_manifest,
    shard_name,
)
from tessella.registry import Spec
from tessella.storage import StorageError, read_sealed, write_sealed
from tessella.tokenization.source import Source
from tessella.tokenizer import TokenSpace

_WORK = ".unfinished"
_PLAN = "plan.json"

# Rows of a shard: so many that the files of a large set stay few, so few that many workers have something to do and
# that an interruption costs little.
_LEAST_ROWS, _MOST_ROWS, _SHARDS = 1024, 8192, 64


@dataclass(frozen=True)
class Plan:
    """Which inputs become which shard, by which tokenizer. The same plan gives the same folder, byte for byte.

    Attributes:
        space: of the tokenizer's tokens.
        class_names: what the labels are called.
        medium: what the signals are.
        split: which part of the data.
        source: what was read, see :meth:`tessella.tokenization.source.Source.describe`.
        num_inputs: how many of it, from the first on.
        rows_per_input: variants.
        whole: signals at their own size.
        shard_inputs: inputs of each shard but the last.
    """

    space: TokenSpace
    class_names: tuple[str, ...]
    medium: Spec
    split: str
    source: Spec
    num_inputs: int
    rows_per_input: int
    whole: bool
    shard_inputs: int

    @classmethod
    def of(cls, source: Source, space: TokenSpace, medium: Spec, *, limit: int | None, shard_rows: int | None) -> Plan:
        """The plan for the first ``limit`` inputs of ``source``; shards of about ``shard_rows`` rows."""
        num_inputs = len(source) if limit is None else min(limit, len(source))
        rows = source.rows_per_input
        if shard_rows is None:
            shard_rows = min(_MOST_ROWS, max(_LEAST_ROWS, -(-num_inputs * rows // _SHARDS)))
        space = TokenSpace((), space.num_codebooks, space.codebook_size, space.fingerprint)
        return cls(
            space, source.class_names, medium, source.split, source.describe(), num_inputs, rows, source.whole,
            max(1, shard_rows // rows),
        )  # fmt: skip

    def __len__(self) -> int:
        """The number of shards."""
        return max(1, -(-self.num_inputs // self.shard_inputs))

    def inputs(self, number: int) -> range:
        """The inputs of a shard."""
        return range(number * self.shard_inputs, min((number + 1) * self.shard_inputs, self.num_inputs))

    def manifest(self, records: list[Record]) -> Manifest:
        """That of the finished folder."""
        settings = {"inputs": self.num_inputs, "rows_per_input": self.rows_per_input, "whole": self.whole,
                    "shard_inputs": self.shard_inputs}  # fmt: skip
        return Manifest(
            self.space,
            tuple(record.shard for record in records),
            self.class_names,
            self.medium,
            self.split,
            self.source,
            settings,
            tuple(pair for record in records for pair in record.skipped),
        )

    def to_json(self) -> Spec:
        """As the plan's file keeps it: the manifest without its shards."""
        content: Spec = json.loads(json.dumps(self.manifest([]).to_json()))
        return {key: value for key, value in content.items() if key not in ("rows", "shards", "skipped")}


@dataclass(frozen=True)
class Record:
    """A finished shard: what the manifest will say of it, and what its inputs were refused for.

    Attributes:
        number: of the shard.
        shard: see :class:`Shard`.
        skipped: key and reason.
        seconds: spent in reading, decoding, the model, and writing; not kept.
    """

    number: int
    shard: Shard
    skipped: tuple[tuple[str, str], ...]
    seconds: dict[str, float] = field(default_factory=dict, compare=False)


class Output:
    """The folder of a plan. Everything unfinished lies in a hidden sub-folder of it; only files of ours are removed.

    A shard appears whole or not at all, and after it its record, which makes it count. When all are there the manifest
    appears, and the sub-folder goes.

    Args:
        folder: where to; made by :meth:`claim`.
        plan: what is to be there in the end.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self._work = folder / _WORK

    def claim(self) -> list[Record]:
        """Take the folder for the plan; the shards of it that are already there, each read whole and found right.

        Raises:
            DataError: the folder has another plan's shards, or files that only look like ours; it cannot be written.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{self.folder} is a file; the shards need a folder")
        published = (self.folder / MANIFEST).is_file()
        records = self._published() if published else self._recorded()
        own = {shard_name(number) for number in range(len(self.plan))}
        if foreign := foreign_shards(self.folder, own if published or self._has_plan() else set()):
            raise DataError(
                f"{self.folder} holds {foreign[0]}, which no {MANIFEST} or plan there names: choose another folder, or "
                "move it"
            )
        with self.named():
            self._work.mkdir(parents=True, exist_ok=True)
            for leftover in self._work.glob("*.tmp"):
                leftover.unlink()
            if not self._has_plan():
                write_sealed(self._work / _PLAN, self.plan.to_json())
            if published and len(records) < len(self.plan):
                self._reopen(records)
        return records

    def _has_plan(self) -> bool:
        return (self._work / _PLAN).is_file()

    def _published(self) -> list[Record]:
        """The shards of a finished folder that are as its manifest says."""
        manifest = parse_manifest(self.folder)
        found = {} if manifest.space is None else json.loads(json.dumps(manifest.to_json()))
        self._compare(found, MANIFEST)
        skipped = iter(manifest.skipped)
        records = []
        for number, shard in enumerate(manifest.shards):
            record = Record(number, shard, tuple(next(skipped) for _ in range(shard.num_skipped)))
            if self._is_whole(shard):
                records.append(record)
        return records

    def _recorded(self) -> list[Record]:
        """The shards of an unfinished folder that have a record and are as it says."""
        if not self._has_plan():
            return []
        file = self._work / _PLAN
        self._compare(read_sealed(file), f"{_WORK}/{_PLAN}")
        records = (self._record(number) for number in range(len(self.plan)))
        return [record for record in records if record is not None and self._is_whole(record.shard)]

    def _compare(self, found: Spec, name: str) -> None:
        wanted = self.plan.to_json()
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            key = differing[0]
            raise DataError(
                f"{self.folder} holds tokens of another plan: {name} there has {key} = {_short(found.get(key))}, and "
                f"{_short(wanted[key])} is wanted; choose another folder, or remove this one"
            )

    def _is_whole(self, shard: Shard) -> bool:
        try:
            shard.check_size(self.folder)
            shard.check_bytes(self.folder)
        except DataError:
            return False
        return True

    def _record(self, number: int) -> Record | None:
        """What is known of a finished shard; None where it is not finished, or its record is damaged."""
        file = self._record_file(number)
        if not file.is_file():
            return None
        try:
            content = read_sealed(file)
            skipped = tuple((key, reason) for key, reason in content["skipped"])
            return Record(number, Shard.from_json(content["shard"]), skipped)
        except (StorageError, KeyError, TypeError, ValueError):
            return None

    def save(self, number: int, data: bytes, num_rows: int, skipped: list[tuple[str, str]]) -> Record:
        """Write a shard and then its record.

        Raises:
            DataError: it could not be written; what was there stays.
        """
        inputs = self.plan.inputs(number)
        digest = hashlib.sha256(data).hexdigest()
        shard = Shard(shard_name(number), num_rows, len(data), digest, (inputs.start, inputs.stop), len(skipped))
        record = Record(number, shard, tuple(skipped))
        with self.named():
            self._write(self.folder / shard.name, data)
            self._write_record(record)
        return record

    def finish(self, records: list[Record]) -> Manifest:
        """Write the manifest over all shards, in their order, and clear the sub-folder away."""
        manifest = self.plan.manifest(sorted(records, key=lambda record: record.number))
        with self.named():
            manifest.write(self.folder)
            shutil.rmtree(self._work)
        return manifest

    def _reopen(self, records: list[Record]) -> None:
        """Make a finished folder an unfinished one again, since some of its shards are missing or damaged."""
        for record in records:
            self._write_record(record)
        (self.folder / MANIFEST).unlink()

    def _write_record(self, record: Record) -> None:
        content = {"shard": record.shard.to_json(), "skipped": [list(pair) for pair in record.skipped]}
        write_sealed(self._record_file(record.number), content)

    def _record_file(self, number: int) -> Path:
        return self._work / f"{number:05d}.json"

    def _write(self, file: Path, data: bytes) -> None:
        """A file that appears whole or not at all, and is on the disk when it does."""
        temporary = self._work / f"{file.name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors of the file system as ones that name the folder and what to do."""
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(
                f"cannot write into {self.folder}: {reason}; finished shards stay, and the same command goes on from "
                "them"
            ) from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
