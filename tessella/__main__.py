"""``python -m tessella`` is ``tessella``."""

from __future__ import annotations

from tessella.cli import main

main()
