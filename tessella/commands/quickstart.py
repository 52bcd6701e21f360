"""``tessella quickstart``: the whole main job on the built-in photographs."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tessella.commands._paths import AnyPath
from tessella.commands.detokenize import detokenize
from tessella.commands.evaluate import EVALUATION
from tessella.commands.report import report, show_samples
from tessella.commands.sample import sample
from tessella.commands.tokenize import tokenize
from tessella.commands.train import train
from tessella.generators.drawing import SampleSettings
from tessella.storage import write_text

_GUIDANCE = "1.5"


def quickstart(out: AnyPath, *, device: str | None = None) -> dict[str, float]:
    """Train a tokenizer and a generator, use both, measure, and write a page; returns what ``results.json`` holds.

    ``out`` gets ``run/`` (training), ``tokens/`` (shards), ``reconstructions/`` (files made from the shards alone),
    ``generator/`` (training), ``samples/`` (files by class), ``report.html`` and ``results.json``. Interrupted, it goes
    on where it was.

    Args:
        out: the folder.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.
    """
    out = Path(out)
    started = time.monotonic()
    run = train("photos_fsq", out=out / "run", device=device)
    tokenize(run, out / "tokens", split="test", device=device)
    detokenize(run, out / "tokens", out / "reconstructions", device=device)
    before = time.monotonic()
    generator = train("photos_generator", tokenizer=run, out=out / "generator", device=device)
    trained = time.monotonic() - before
    settings = SampleSettings(guidance=_GUIDANCE)
    sample(generator, out / "samples", count=80, settings=settings, device=device)
    section, samples_per_second = show_samples(generator, settings=settings, device=device)
    page = report(run, out=out, device=device, command="tessella quickstart", sections=[section])
    record = json.loads((out / EVALUATION).read_text(encoding="utf-8"))
    results = {
        **{name: value for name, value in record.items() if isinstance(value, (int, float))},
        "generator_seconds": trained,
        "samples_per_second": samples_per_second,
        "seconds": time.monotonic() - started,
    }
    write_text(page.with_name("results.json"), json.dumps(results, indent=2) + "\n")
    return results
