"""``tessella explore``: a page on which tokens, codes and samples can be touched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from tessella.checkpoint import fingerprint, load, load_generator
from tessella.commands._codebook import counted
from tessella.commands._data import data_of, medium_of, open_data
from tessella.commands._device import pick_device
from tessella.commands._paths import AnyPath, to_path
from tessella.commands.build import is_generator
from tessella.data.base import DataError, Samples
from tessella.errors import ConfigError
from tessella.explorer.server import serve
from tessella.explorer.session import Session
from tessella.extras import require

logger = logging.getLogger("tessella")


def explore(
    model: AnyPath, generator: AnyPath | None = None, *, data: str | None = None, host: str = "127.0.0.1",
    port: int = 8765, device: str | None = None, ready: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve a page that shows what a tokenizer's tokens do, until interrupted; it needs the extra ``ui``.

    Signals are opened, tokens looked at and replaced, codes seen where the data uses them, and with a generator samples
    drawn and regions filled. How the codes are used is counted once and kept in the run's folder (``explorer/``).

    Args:
        model: a run, a checkpoint or a saved model; of a generator, which brings its tokenizer.
        generator: of this tokenizer's tokens.
        data: whose signals are shown and counted; by default what the tokenizer was trained on.
        host: address to listen on; the default is this machine alone.
        port: to listen on; 0 takes a free one.
        device: ``cpu``, ``cuda``, ...; the accelerator there is by default.
        ready: told the address once the page is there.

    Raises:
        CheckpointError, ConfigError: a model or data that cannot be used, a generator of other tokens, or a port that
            is taken.
        ModuleNotFoundError: without the extra ``ui``.
    """
    session = open_session(Path(model), to_path(generator), data=data, device=device)
    serve(session, host=host, port=port, ready=ready)


def open_session(
    model: Path, generator: Path | None = None, *, data: str | None = None, device: str | None = None
) -> Session:
    """What :func:`explore` serves."""
    for package in ("starlette", "uvicorn"):  # before anything is loaded
        require(package, extra="ui")
    place = pick_device(device)
    drawing = None
    if is_generator(model):
        if generator is not None:
            raise ConfigError(f"{model} is a generator; name the tokenizer first, or it alone")
        drawing, tokenizer = load_generator(model, device=place)
    else:
        tokenizer = load(model, device=place)
        if generator is not None:
            drawing, _ = load_generator(generator, device=place)
            if drawing.space.fingerprint != (own := fingerprint(tokenizer)):
                raise ConfigError(
                    f"{generator} draws tokens of tokenizer {drawing.space.fingerprint}, but {model} is {own}"
                )
    if tokenizer.autoencoder.takes_context:
        raise ConfigError(f"{model} needs a context beside its signals, which the page lacks; see tessella report")
    examples: Samples | None = None
    use = None
    try:
        section = data_of(tokenizer, data)
        examples = open_data(section, "test")
    except (ConfigError, DataError) as error:
        if data is not None:
            raise
        logger.warning("no data to show or to count codes in: %s", error)
    else:
        use = counted(model, tokenizer, section, examples)
    title = f"{type(tokenizer.quantizer).__name__} tokenizer {model}"
    return Session(title, tokenizer, medium_of(tokenizer, section if examples else None), use, examples, drawing)
