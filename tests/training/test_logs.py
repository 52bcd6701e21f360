from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tessella.training.logs import RunLog, held_back, read_log

ROWS = [{"step": step, "loss/tokenizer": 1 / step} for step in range(1, 6)]


def write(file: Path, lines: list[bytes], end: bytes = b"\n") -> None:
    file.write_bytes(b"\n".join(lines) + end)


@pytest.mark.parametrize(
    "damage",
    [b"", b"\0" * 40, b'{"step": 3, "loss/tok', b"\xff\xfe", b"[1, 2]", b"3", b'{"stfp": 3, "loss/tokenizer": 0.3}',
     b'{"step": "3"}', b'{"step": 3, "loss/tokenizer": "0.3"}', b"[" * 100_000],
)  # fmt: skip
def test_damaged_rows_are_dropped_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    file = tmp_path / "log.jsonl"
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[2] = lines[3] = damage
    write(file, lines)
    with caplog.at_level("WARNING", "tessella"):
        assert read_log(file) == [ROWS[0], ROWS[1], ROWS[4]]
    assert [record.getMessage() for record in caplog.records] == [f"{file}: 2 of 5 rows are damaged and dropped"]


def test_half_a_line_at_the_end_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "log.jsonl"
    write(file, [json.dumps(row).encode() for row in ROWS[:2]] + [b'{"step": 3, "lo'], end=b"")
    with caplog.at_level("WARNING", "tessella"):
        assert read_log(file) == ROWS[:2]
    assert [record.getMessage() for record in caplog.records] == [f"{file} ends in half a line, which is dropped"]
    assert read_log(tmp_path / "none.jsonl") == []


def test_a_run_goes_on_with_a_damaged_log_and_names_cannot_forge_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("tessella")
    monkeypatch.setattr(logger, "propagate", False)  # a report of the test could not hold what is no UTF-8
    write(tmp_path / "log.jsonl", [json.dumps(ROWS[0]).encode(), b"\0\0", json.dumps(ROWS[2]).encode()])
    with held_back(logger) as earlier, RunLog(tmp_path, 3, earlier) as log:
        logger.warning("skipped %s", "a\n2026 INFO all is well\x1b[2J\udcff.png")
        log.row(ROWS[3])
    assert read_log(tmp_path / "log.jsonl") == [ROWS[0], ROWS[2], ROWS[3]]
    text = (tmp_path / "train.log").read_text()
    assert text.count("\n") == 2
    assert "skipped a\\n2026 INFO all is well\\x1b[2J\\udcff.png\n" in text
