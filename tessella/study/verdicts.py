"""When a claim holds: intervals over seeds, curves that are flat at their end, and the words for what comes of both.

A number is its mean over seeds with the 95 % interval of Student's t; a single seed has none. Of two numbers one is the
larger only where the intervals lie apart, so a comparison with a single seed decides nothing, and no word that rests on
it says "holds".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import mean, stdev
from typing import Any, Literal

# Two-sided 95 % quantiles of Student's t by degrees of freedom, one less than the seeds.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

FLAT_DB, FLAT_USAGE = 0.1, 0.05

Outcome = Literal["yes", "no", "open"]


@dataclass(frozen=True)
class Measured:
    """A number over seeds.

    Attributes:
        mean: of the seeds' values.
        low, high: ends of its 95 % interval; None of a single seed.
    """

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float], *, least: float = -inf, most: float = inf) -> Measured:
        """Of one value a seed; the interval ends where the number does.

        Args:
            values: one a seed.
            least, most: what the number cannot be below and above.

        Raises:
            ValueError: none, or more than ten.
        """
        if not 1 <= len(values) <= len(_T) + 1:
            raise ValueError(f"a number needs 1 to {len(_T) + 1} seeds, got {len(values)}")
        centre = mean(values)
        if len(values) == 1:
            return cls(centre, None, None)
        half = _T[len(values) - 2] * stdev(values) / sqrt(len(values))
        return cls(centre, max(least, centre - half), min(most, centre + half))

    def show(self, digits: int = 1, scale: float = 1.0) -> str:
        """``mean [low, high]``, or the mean alone."""
        text = f"{scale * self.mean:.{digits}f}"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


def above(a: Measured, b: Measured | float, factor: float = 1.0) -> Outcome:
    """Whether ``a > factor * b``; "open" where the intervals meet or one is missing.

    Args:
        a: a number.
        b: another, or a fixed limit.
        factor: positive.
    """
    low, high = (b, b) if isinstance(b, (int, float)) else (b.low, b.high)
    if a.low is None or a.high is None or low is None or high is None:
        return "open"
    if a.low > factor * high:
        return "yes"
    return "no" if a.high < factor * low else "open"


def both(*outcomes: Outcome) -> Outcome:
    """Yes where all are, no where one is."""
    if "no" in outcomes:
        return "no"
    return "yes" if all(outcome == "yes" for outcome in outcomes) else "open"


def is_flat(curve: Sequence[Mapping[str, float]], key: Literal["psnr", "usage"]) -> bool:
    """Whether a learning curve has come to its end: the stated rule of every table.

    From 80 % of the steps on, the PSNR moves by less than 0.1 dB, or the usage by less than a twentieth of its last
    value. A curve of fewer than two such points is not flat.

    Args:
        curve: points with ``step``, ``psnr`` in dB and ``usage``, of held-out pictures.
        key: which of the two.
    """
    last = curve[-1] if curve else {"step": 0}
    end = [point[key] for point in curve if point["step"] >= 0.8 * last["step"]]
    most = FLAT_DB if key == "psnr" else FLAT_USAGE * last.get(key, 0)
    return len(end) > 1 and max(end) - min(end) < most


@dataclass(frozen=True)
class Case:
    """One place where a claim was tried.

    Attributes:
        where: its name, "2^14 codes".
        outcome: see :func:`above`.
        numbers: the evidence, intervals included.
        unfinished: the cells' steps where a curve was still moving at its end, else None: what failed there has not
            been refuted.
    """

    where: str
    outcome: Outcome
    numbers: str
    unfinished: int | None = None


@dataclass(frozen=True)
class Verdict:
    """A claim, the word for what came of it, and the numbers behind it."""

    claim: str
    word: str
    evidence: str

    def line(self) -> str:
        """As the page has it."""
        return f"- **{self.word}**: {self.claim}. {self.evidence}".rstrip()


def judge(claim: str, cases: Sequence[Case], needs: str) -> Verdict:
    """The verdict over all places where a claim was tried.

    Args:
        claim: a sentence without its full stop.
        cases: none where nothing was run.
        needs: what deciding it would take.
    """
    evidence = "; ".join(f"{case.where}: {case.numbers}" for case in cases)
    holding = [case.where for case in cases if case.outcome == "yes"]
    failing = [case for case in cases if case.outcome == "no" and case.unfinished is None]
    waiting = sorted({case.unfinished for case in cases if case.outcome == "no" and case.unfinished is not None})
    if cases and len(holding) == len(cases):
        word = "holds"
    elif holding:
        open_ = [case.where for case in cases if case.outcome == "open"]
        word = f"holds only where: {', '.join(holding)}" + (f" (undecided: {', '.join(open_)})" if open_ else "")
    elif failing:
        word = f"does not hold at this size ({'; '.join(f'{case.where}: {case.numbers}' for case in failing)})"
        evidence = "; ".join(f"{case.where}: {case.numbers}" for case in cases if case not in failing)
    else:
        reached = f"not reached in {', '.join(map(str, waiting))} steps; " if waiting else ""
        word = f"cannot be decided here ({reached}it would take {needs})"
    return Verdict(claim, word, evidence + ("." if evidence else ""))


def by_seed(rows: Sequence[Mapping[str, Any]], key: str, **labels: Any) -> list[float]:
    """``key`` of the rows that carry these ``labels``, one a seed."""
    return [row[key] for row in rows if all(row[name] == value for name, value in labels.items()) and key in row]
