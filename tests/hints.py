"""What an editor knows of the public names, loaded when they are used; ``make check`` holds it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

from torch import Tensor

import tessella
from tessella.generators import Generator
from tessella.quantizers import FSQ


def reader(x: Tensor) -> None:
    """What people write."""
    tokenizer = assert_type(tessella.load("path"), tessella.Tokenizer)
    assert_type(tokenizer(x).x_hat, Tensor)
    assert_type(tokenizer.reconstruct(x), Tensor)
    assert_type(FSQ([8, 5])(x).indices, Tensor)
    assert_type(tessella.train("photos_fsq", out="runs/first"), Path)
    assert_type(tessella.build("photos_fsq"), tessella.Tokenizer)
    generator = assert_type(tessella.build("photos_generator", tokenizer=tokenizer), Generator)
    assert_type(generator(x, None).loss, Tensor)
    assert_type(tessella.load_generator("path"), tuple[Generator, tessella.Tokenizer])
