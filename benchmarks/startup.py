"""How long a data set takes to its first batch, and how much memory: many files, and a Parquet file with much in a row.

    python benchmarks/startup.py [--files 200000] [--parquet-mb 1024] [--folder somewhere] [--out folder]

Makes a folder of that many pictures (hard links to a few, in a hundred classes) and a Parquet file with one row group
of that size, and opens each in a process of its own. Seconds are wall time; the peak is the process's largest resident
memory, as Linux counts it, beside that of one which only imports the same. Writes startup.json into the output folder,
and prints it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tessella.data.base import Samples
from tessella.data.folder import Folder
from tessella.data.loader import training_batches
from tessella.data.parquet import Parquet

_LINKS = 10_000  # file systems allow a file only so many names
_BATCH = 64


def picture(rng: np.random.Generator, side: int, kind: str) -> bytes:
    """Noise, which no format makes small."""
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def make_folder(folder: Path, count: int) -> None:
    """Files 0.png, 1.png, ... in a hundred classes."""
    rng = np.random.default_rng(0)
    for index in range(count):
        if index % _LINKS == 0:
            source = folder / f"source-{index}"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_bytes(picture(rng, 8, "png"))
        file = folder / f"class_{index % 100}" / f"{index}.png"
        if index < 100:
            file.parent.mkdir()
        os.link(source, file)


def make_parquet(file: Path, megabytes: int) -> None:
    """One row group of pictures of about 0.2 MB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    rows = [picture(rng, 256, "bmp") for _ in range(megabytes * 2**20 // (3 * 256**2))]
    pq.write_table(pa.table({"image": rows, "label": [0] * len(rows)}), file, row_group_size=len(rows))


def measure(make: Callable[[], Samples] | None) -> dict[str, Any]:
    """Seconds to open and to the first batch, and the peak of memory; without a data set, the peak alone."""
    found: dict[str, Any] = {}
    if make is not None:
        start = time.perf_counter()
        samples = make()
        found["open_sec"] = round(time.perf_counter() - start, 2)
        found["samples"] = len(samples)
        next(training_batches(samples, batch_size=_BATCH, seed=0))
        found["first_batch_sec"] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()
        samples.identity()
        found["identity_sec"] = round(time.perf_counter() - start, 2)
    found["peak_mb"] = peak_mb()
    return found


def peak_mb() -> int:
    """Of this process; getrusage would begin at that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> Samples:
        return Folder(self.path, split="train", crop_px=8)


class _Parquet(_Folder):
    def __call__(self) -> Samples:
        return Parquet(self.path, split="train", crop_px=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--parquet-mb", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where the data is made; a temporary folder if missing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        make_folder(root / "files", options.files)
        make_parquet(root / "rows.parquet", options.parquet_mb)
        cases = {
            "imports alone": None,
            f"folder of {options.files} files": _Folder(root / "files"),
            f"row group of {options.parquet_mb} MB": _Parquet(root / "rows.parquet"),
            f"row group of {options.parquet_mb} MB, again": _Parquet(root / "rows.parquet"),
        }
        found = {}
        for case, make in cases.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[case] = pool.apply(measure, (make,))
            print(f"{case}: {found[case]}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "startup.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
