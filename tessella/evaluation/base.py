"""What the metrics of a medium promise, whatever the medium is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from tessella.data.base import Batch


class Number(NamedTuple):
    """One result for people: its key in the record, a label, the value with its unit, and what it means."""

    key: str
    label: str
    value: str
    meaning: str


class Metrics(ABC):
    """Scores of reconstructions, batch by batch, and everything that two of them must share to be compared.

    Attributes:
        signals: what is counted, a plural: ``num_images``, ``images_per_sec``.
        bits_name: what the length of the tokens is called in the record.
        headline: keys worth showing first.
    """

    signals: ClassVar[str] = "signals"
    bits_name: ClassVar[str] = "bits_per_value"
    headline: ClassVar[frozenset[str]] = frozenset()

    @property
    def bits_scale(self) -> float:
        """By what the bits for one position of a signal are multiplied to give :attr:`bits_name`."""
        return 1.0

    @abstractmethod
    def update(self, x: Tensor, x_hat: Tensor, batch: Batch | None = None) -> None:
        """Score reconstructions ``x_hat`` of ``x``, both ``[B, C, *X]``; ``batch`` is where ``x`` is from."""

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """The numbers of all that was seen, by name: JSON values."""

    def rates(self, positions_per_sec: float) -> dict[str, float]:
        """Numbers made of the positions X of a signal that are encoded and decoded in a second."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """What two records must share beside the data, as JSON values."""
        return {}

    def meanings(self) -> dict[str, str]:
        """What each number means, in words, by its key."""
        return {}

    def readable(self, record: Mapping[str, Any]) -> list[Number]:
        """Its own numbers in a record, for people."""
        meaning = record["protocol"]["meaning"]
        return [
            Number(key, key.replace("_", " "), f"{record[key]:.5g}", meaning.get(key, ""))
            for key in self.compute()
            if isinstance(record.get(key), (int, float))
        ]

    def protocol_parts(self, protocol: Mapping[str, Any]) -> list[str]:
        """What the one-line form of a protocol says of these metrics."""
        return []
