"""What every refusal is, so that one place can turn refusals into answers without importing what raised them."""

from __future__ import annotations

import signal
from pathlib import Path


class TessellaError(Exception):
    """Something that a user's input, files or machine made impossible; the message is for people and complete."""


class NotFiniteError(TessellaError, ValueError):
    """NaN or infinity where a finite number is needed."""


class ConfigError(TessellaError, ValueError):
    """A recipe or a setting that cannot be used: the message names the key, what was wrong and what is accepted."""


class TrainingError(TessellaError, RuntimeError):
    """Training cannot go on; the message says at which step and what is left."""


class EndedElsewhere(TessellaError):
    """Another process of the same run failed, and says why; this one ends with it."""


class Interrupted(Exception):
    """A signal ended the run early, after a checkpoint was written if there was anything to save."""

    def __init__(self, signal_number: int, checkpoint: Path | None) -> None:
        super().__init__(signal_number, checkpoint)  # both, so that it survives the way between processes
        self.signal_number = signal_number
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        """The signal, and where to continue."""
        return f"interrupted by {signal.Signals(self.signal_number).name}; saved {self.checkpoint or 'nothing yet'}"
