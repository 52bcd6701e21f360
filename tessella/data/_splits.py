"""Which pictures are held out: those a source keeps apart, or a share of them picked by their names."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from tessella.data._errors import EmptySplit
from tessella.data.base import Split

TRAIN_NAME = "train"
TEST_NAMES = ("test", "val", "valid", "validation")  # the first one present is taken


def find_test_name(names: Collection[str]) -> str | None:
    """The one of ``names`` that holds the test pictures."""
    return next((name for name in TEST_NAMES if name in names), None)


def held_out_part(keys: Sequence[str], split: Split, share: float) -> list[int]:
    """The positions in ``keys`` that belong to ``split`` where the source itself makes no difference.

    A key is held out where its hash, as a fraction, lies below ``share``: it stays on its side when others join. At
    least one is held out, the lowest.

    Raises:
        EmptySplit: nothing is left for ``split``.
    """
    fractions = [_fraction(key) for key in keys]
    limit = max(share, min(fractions))
    part = [i for i, fraction in enumerate(fractions) if (fraction <= limit) == (split == "test")]
    if not part:
        raise EmptySplit(f"no picture is left for split {split!r} of {len(keys)} with held_out={share:g}")
    return part


def check_share(held_out: float) -> None:
    """Raise ValueError unless it is a share that leaves something to test on."""
    if not 0 < held_out <= 1:
        raise ValueError(f"held_out must be above 0 and at most 1, got {held_out}")


def _fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
