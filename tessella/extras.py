"""Optional packages: imported when they are needed, so that everything else works without them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """The module, imported.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # it is there, and misses something of its own
            raise
        raise ModuleNotFoundError(
            f"{error.name} is needed for this and not installed: pip install 'tessella[{extra}]'", name=error.name
        ) from None
