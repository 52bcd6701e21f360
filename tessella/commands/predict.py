"""``tessella predict``: depth, colours or segments of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from tessella.checkpoint import write_bytes
from tessella.commands._data import medium_of
from tessella.commands._device import pick_device
from tessella.commands._predictions import Predictor, dense, load_predictor
from tessella.data._dense import square_picture
from tessella.data.base import DataError, to_tensor
from tessella.data.decode import decode_rgb, picture_extensions
from tessella.errors import ConfigError
from tessella.media._dense import DenseMedium
from tessella.reporting.pictures import png

# The longest side of a picture for people: what is larger is shrunk, what is much smaller enlarged.
_SHOWN_PX = 512


@dataclass(frozen=True)
class Prediction:
    """What was made of one file.

    Attributes:
        file: the picture.
        shown: the prediction as a picture for people, with a scale or a legend.
        values: the prediction itself, as its medium writes it: 16-bit PNG of depth or segments, a picture of colours.
    """

    file: Path
    shown: Path
    values: Path


def predict(
    model: Path, files: Sequence[Path], *, out: Path | None = None, temperature: float = 0.0, seed: int = 0,
    device: str | None = None,
) -> list[Prediction]:  # fmt: skip
    """Predict the dense label of each picture and write it into ``out``, at the picture's own size.

    A picture is resized to the square that the model was trained on, and its label back. Where colours are predicted,
    a picture that has some is taken as the grey one it would be without.

    Args:
        model: a generator's run (stage II of UViM), a checkpoint of it, or a saved one.
        files: pictures, or folders of them.
        out: folder of the files; ``predicted`` in the model's by default.
        temperature: of the codes; 0 takes the likeliest.
        seed: of the codes, with a temperature.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.

    Raises:
        CheckpointError, ConfigError: a model that cannot be used, a negative temperature, no picture, or two of
            the same name.
        DataError: a file that is no picture. All are read before any is written.
    """
    if temperature < 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}")
    found = _pictures(files)
    # Every file is looked at before a model is loaded: a mistyped name should not cost a minute.
    pictures = [decode_rgb(file, str(file)) for file in found]
    predictor, _ = load_predictor(model, temperature=temperature, seed=seed, device=pick_device(device))
    medium = dense(medium_of(predictor))
    folder = out or (model if model.is_dir() else model.parent) / "predicted"
    results = []
    for file, picture in zip(found, pictures, strict=True):
        values = _label(predictor, medium, picture)
        result = Prediction(file, folder / f"{file.stem}.png", folder / f"{file.stem}.values{medium.suffix}")
        medium.write(values, result.values)
        width, height = _shown_size(picture.width, picture.height)
        write_bytes(result.shown, png(medium.annotated(medium.resized(values, height, width))))
        results.append(result)
    return results


def _label(predictor: Predictor, medium: DenseMedium, picture: Image.Image) -> Tensor:
    """The label ``[P, height, width]`` of a picture."""
    side = predictor.autoencoder.stride
    context = medium.context(to_tensor(square_picture(picture, side)))
    outputs = predictor.predict(context[None].to(predictor.device))[0].cpu()
    return medium.resized(outputs, picture.height, picture.width)


def _pictures(files: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for file in files:
        if file.is_dir():
            inside = sorted(one for one in file.iterdir() if one.suffix.lower() in picture_extensions())
            if not inside:
                raise DataError(f"no picture in {file}")
            found += inside
        elif file.is_file():
            found.append(file)
        else:
            raise DataError(f"no file {file}")
    if not found:
        raise ConfigError("name at least one picture")
    stems = [file.stem for file in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ConfigError(f"two pictures are called {twice[0]!r}, and predictions are named after them; predict them "
                          "into different folders (--out)")  # fmt: skip
    return found


def _shown_size(width: int, height: int) -> tuple[int, int]:
    longest = max(width, height)
    factor = _SHOWN_PX / longest if longest > _SHOWN_PX else max(1, round(_SHOWN_PX / longest / 2))
    return max(1, round(width * factor)), max(1, round(height * factor))
