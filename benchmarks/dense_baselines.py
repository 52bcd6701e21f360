"""What constant predictions score in dense prediction: the yardsticks beside docs/dense.md.

python benchmarks/dense_baselines.py uvim_depth_small
python benchmarks/dense_baselines.py uvim_panoptic_small --data CAMVID
python benchmarks/dense_baselines.py uvim_color_small --data IMAGENETTE --weights WEIGHTS

The constant is fitted to the first 500 training samples and scored on the test split with the medium's own metrics:
a number (the median depth), the picture's own grey, or at each place the class seen most often there, each class one
segment. The map of depth is the median at each place. With weights also the Frechet distance of grey pictures from
their originals, as `tessella evaluate --protocol efflite0` measures it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tessella.commands._data import data_section, open_data
from tessella.commands._distribution import features_of
from tessella.config import build, resolve_recipe
from tessella.data.base import Samples
from tessella.evaluation.distribution import evaluate_distribution
from tessella.media.base import Medium
from tessella.media.color import Color
from tessella.media.depth import Depth
from tessella.media.panoptic import Panoptic
from tessella.recipe import read_recipe

FITTED = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--data")
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    raw = read_recipe(arguments.recipe)
    if arguments.data:
        raw["data"] = data_section(raw["data"], arguments.data)
    recipe = resolve_recipe(raw)
    medium: Medium = build("media", recipe["medium"])
    train, test = (open_data(recipe["data"], split) for split in ("train", "test"))  # type: ignore[arg-type]
    for name, outputs in constants(medium, train).items():
        measured = medium.metrics()
        for index in range(len(test)):
            sample = test[index]
            x_hat = sample["context"] if outputs is None else outputs
            measured.update(sample["x"][None], x_hat[None])
        numbers = {key: value for key, value in measured.compute().items() if isinstance(value, float)}
        print(name, len(test), {key: round(value, 4) for key, value in numbers.items()})
    if arguments.weights and isinstance(medium, Color):
        network = medium.feature_network("efflite0", arguments.weights, torch.device("cpu"))
        grey = (test[index]["context"][None] for index in range(len(test)))
        distance = evaluate_distribution(grey, features_of(test, network, None), network)
        print("grey", len(test), {name: round(found.value, 2) for name, found in distance.values.items()})


def constants(medium: Medium, train: Samples) -> dict[str, Tensor | None]:
    """Outputs ``[C, H, W]`` by name; None stands for the picture itself."""
    if isinstance(medium, Color):
        return {"grey": None}
    x = torch.stack([train[index]["x"] for index in range(min(FITTED, len(train)))])
    if isinstance(medium, Depth):
        classes = medium.bins.classes(x[:, 0])
        number = classes[classes > 0].median().expand(classes.shape[1:])
        return {"number": logits(number, medium.bins.num_bins), "map": logits(classes.median(0).values,
                                                                               medium.bins.num_bins)}  # fmt: skip
    assert isinstance(medium, Panoptic)
    num_classes, num_instances = medium.codec.sizes
    classes = x[:, 0].long().mode(0).values.clamp(min=0)
    # Each class one instance, numbered as they come.
    found = [int(one) for one in classes.unique() if one > 0]
    instances = sum((classes == one) * number for number, one in enumerate(found, 1))
    return {"map": torch.cat([logits(classes, num_classes), logits(torch.as_tensor(instances), num_instances)])}


def logits(classes: Tensor, num_classes: int) -> Tensor:
    return functional.one_hot(classes, num_classes).movedim(-1, 0).float()


if __name__ == "__main__":
    main()
