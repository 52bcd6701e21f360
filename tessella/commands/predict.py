"""``tessella predict``: depth, colours or segments, from what a generator reads them off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tessella.commands._data import medium_of
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath, to_path
from tessella.commands._predictions import dense, load_predictor
from tessella.errors import ConfigError


@dataclass(frozen=True)
class Prediction:
    """What was made of one file.

    Attributes:
        file: what was read.
        shown: the prediction for people, with a scale or a legend.
        values: the prediction itself, as its medium writes it.
    """

    file: Path
    shown: Path
    values: Path


def predict(
    model: AnyPath, files: Sequence[AnyPath], *, out: AnyPath | None = None, temperature: float = 0.0, seed: int = 0,
    device: str | None = None,
) -> list[Prediction]:  # fmt: skip
    """Predict the dense label of each file and write it into ``out``, at the file's own size.

    What is read is resized to the square that the model was trained on, and its label back. Where colours are
    predicted, a file that has some is taken as the grey one it would be without.

    Args:
        model: a generator's run (stage II of UViM), a checkpoint of it, or a saved one.
        files: what to read, or folders of such files.
        out: folder of what is written; ``predicted`` in the model's by default.
        temperature: of the codes; 0 takes the likeliest.
        seed: of the codes, with a temperature.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.

    Raises:
        CheckpointError, ConfigError: a model that cannot be used, a negative temperature, no file, or two of the same
            name.
        DataError: a file that cannot be read. All are read before any is written.
    """
    model, out = Path(model), to_path(out)
    if temperature < 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}")
    if not files:
        raise ConfigError("name at least one file")
    predictor, _ = load_predictor(model, temperature=temperature, seed=seed, device=pick_device(device))
    medium = dense(medium_of(predictor))
    found = medium.find([Path(file) for file in files])
    stems = [file.stem for file in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ConfigError(f"two files are called {twice[0]!r}, and predictions are named after them; predict them into "
                          "different folders (--out)")  # fmt: skip
    looked = [medium.look(file, predictor.autoencoder.stride) for file in found]
    folder = out or (model if model.is_dir() else model.parent) / "predicted"
    results = []
    for file, seen in zip(found, looked, strict=True):
        outputs = predictor.predict(seen.context[None].to(predictor.device))[0].cpu()
        label = medium.resized(outputs, seen.height, seen.width)
        result = Prediction(file, folder / f"{file.stem}{medium.suffix}", folder / f"{file.stem}.values{medium.suffix}")
        medium.write(label, result.values)
        medium.write_shown(label, result.shown)
        results.append(result)
    return results
