"""``tessella train``: from a recipe to a trained run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from tessella.checkpoint import RECIPE, TOKENIZER, latest_checkpoint, load, load_recipe, write_recipe
from tessella.commands._data import data_section, medium_of, open_data
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath, to_path
from tessella.commands.build import generator_of, generator_recipe, tokenizer_of
from tessella.config import build_section, resolve_recipe
from tessella.data.base import Samples
from tessella.distributed import Ranks
from tessella.errors import ConfigError
from tessella.generators.base import Generator
from tessella.media.base import Medium
from tessella.objectives.base import Objective
from tessella.recipe import differences, override, read_recipe
from tessella.registry import Spec
from tessella.storage import holds_nothing, lock_folder, read_sealed, write_sealed
from tessella.tokenizer import Tokenizer
from tessella.training.base import Step
from tessella.training.generator import GeneratorStep
from tessella.training.loop import Loop
from tessella.training.tokenizer import TokenizerStep

logger = logging.getLogger("tessella")

DATA = "data.json"


def train(
    recipe: str, *, data: str | None = None, tokenizer: AnyPath | None = None, weights: AnyPath | None = None,
    init: AnyPath | None = None, out: AnyPath | None = None, overrides: Sequence[str] = (), overfit_batch: bool = False,
    allow_changed_data: bool = False, device: str | None = None, quiet: bool = False,
) -> Path:  # fmt: skip
    """Train what ``recipe`` (a name or a .toml file) describes; continue where an interrupted run stopped.

    Under torchrun all its processes train together and share the batch; a run may go on with another number of them.

    Args:
        recipe: see :func:`tessella.recipe.read_recipe`.
        data: replaces the recipe's data set; a folder or file, ``NAME:PATH``, or ``photos``.
        tokenizer: whose tokens a generator learns; see :func:`tessella.load`.
        weights: folder with the weights of perceptual metrics, for recipes with such a loss.
        init: a model whose weights the training starts from; ``training.init`` of the recipe.
        out: folder of the run; ``runs/<recipe>`` if None.
        overrides: ``"section.key=value"``.
        overfit_batch: learn one batch by heart, a first check of any recipe, in ``runs/<recipe>-overfit``.
        allow_changed_data: continue a run although the data is not what it began with.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.
        quiet: no progress on the terminal and no sample files.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: a recipe that cannot be built, a folder that holds a run of another recipe, or data that is no
            longer what the run began with. What is refused before the first step leaves nothing behind.
        TrainingError, Interrupted: see :meth:`tessella.training.loop.Loop.run`.
    """
    raw = override(read_recipe(recipe), overrides)
    if data is not None:
        raw["data"] = data_section(raw.get("data", {}), data)
    if init is not None:
        raw["training"] = {**raw.get("training", {}), "init": str(init)}
    if overfit_batch:
        raw["training"] = {**raw.get("training", {}), "overfit_batch": True}
    place = pick_device(device)
    folder = Path(out or Path("runs") / (Path(recipe).stem + ("-overfit" if overfit_batch else "")))
    prepare = _Generator if "generator" in raw else _Tokenizer
    run = prepare(raw, folder, tokenizer=to_path(tokenizer), weights=to_path(weights), device=place)
    _check_claim(folder, run.recipe)
    identity = run.dataset.identity()
    _check_data(folder, identity, allow_changed_data)
    loop: Loop = build_section(run.recipe, "training")
    torch.manual_seed(loop.seed)
    step = run.step(loop.steps)
    show = None if quiet else run.medium.preview

    def claim() -> None:
        run.claim()
        write_sealed(folder / DATA, identity)

    with Ranks() as ranks, ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(lock_folder(folder, what="training"))

        ranks.by_first(lock)
        loop.run(step, run.dataset, folder, device=place, show=show, quiet=quiet, claim=claim, ranks=ranks)
    return folder


class _Tokenizer:
    """A tokenizer's training: the resolved recipe, its data, and what makes its step."""

    def __init__(
        self, raw: Spec, folder: Path, *, tokenizer: Path | None, weights: Path | None, device: torch.device
    ) -> None:
        if tokenizer is not None:
            raise ConfigError("--tokenizer is for recipes of generators; this one trains a tokenizer")
        if weights is not None and not weights.is_dir():
            raise ConfigError(f"--weights {weights} is no folder")
        if weights is not None:
            raw["loss"] = {**raw.get("loss", {}), "weights": str(weights)}
        self.folder = folder
        self.recipe = resolve_recipe(raw)
        self.dataset: Samples = open_data(self.recipe["data"], "train")
        self.medium: Medium = build_section(self.recipe, "medium")

    def step(self, steps: int) -> Step:
        tokenizer = tokenizer_of(self.recipe)
        objective: Objective = build_section(self.recipe, "loss")
        objective.check_steps(steps)
        return TokenizerStep(tokenizer, objective, self.medium)

    def claim(self) -> None:
        _write_recipe(self.folder, self.recipe)


class _Generator:
    """The same of a generator, with its tokenizer copied into the run's folder."""

    def __init__(
        self, raw: Spec, folder: Path, *, tokenizer: Path | None, weights: Path | None, device: torch.device
    ) -> None:
        if weights is not None:
            raise ConfigError(
                "--weights is for recipes of tokenizers with a perceptual loss; this one trains a generator"
            )
        self.folder = folder
        self.copy = folder / TOKENIZER
        if tokenizer is None and not self.copy.is_dir():
            raise ConfigError("a generator needs a tokenizer: give its run or folder with --tokenizer")
        self.tokenizer: Tokenizer = load(tokenizer or self.copy, device=device)
        raw.setdefault("data", (self.tokenizer.recipe or {}).get("data", {}))
        self.dataset: Samples = open_data(raw["data"], "train")
        self.medium: Medium = medium_of(self.tokenizer, raw["data"])
        self.recipe = generator_recipe(raw, self.tokenizer, self.dataset)

    def step(self, steps: int) -> Step:
        generator = generator_of(self.recipe)
        # A codebook may be too large to be built, and a checkpoint holds what was made of it.
        if type(generator).fit_codebook is not Generator.fit_codebook and latest_checkpoint(self.folder) is None:
            generator.fit_codebook(self.tokenizer.quantizer.codebook, seed=self.recipe["training"]["seed"])
        return GeneratorStep(generator, self.tokenizer)

    def claim(self) -> None:
        _write_recipe(self.folder, self.recipe)
        if not self.copy.is_dir():
            self.tokenizer.save(self.copy)


def _check_claim(folder: Path, recipe: Spec) -> None:
    """See that a run's folder is free, or holds a run of this recipe.

    Raises:
        ConfigError: it holds something else.
    """
    if (folder / RECIPE).is_file():
        changed = differences(resolve_recipe(load_recipe(folder)), recipe)
        if changed:
            raise ConfigError(
                f"{folder} holds a run of another recipe ({'; '.join(changed)}); choose another --out, or delete it"
            )
    elif folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder; choose another --out")
    elif not holds_nothing(folder):
        raise ConfigError(f"{folder} is not empty and holds no run; choose another --out")


def _check_data(folder: Path, identity: Spec, allow_changed: bool) -> None:
    """See that the data of a run that goes on is what it was.

    Raises:
        ConfigError: it is not, and that is not allowed.
    """
    file = folder / DATA
    if not file.is_file():
        return
    changed = differences(read_sealed(file), identity)
    if not changed:
        return
    said = f"the data is not what {folder} began with ({'; '.join(changed)})"
    if not allow_changed:
        raise ConfigError(f"{said}; --allow-changed-data goes on all the same")
    logger.warning("%s; going on all the same", said)


def _write_recipe(folder: Path, recipe: Spec) -> None:
    if not (folder / RECIPE).is_file():
        write_recipe(folder, recipe)
