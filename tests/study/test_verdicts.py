from __future__ import annotations

import random
from typing import Any

import pytest

from tessella.study.usage import expected_usage, scq_verdicts, table, usage_verdicts
from tessella.study.verdicts import Case, Measured, Verdict, above, both, is_flat, judge

FLAT = [{"step": step, "psnr": 20.0, "usage": 0.5} for step in (80, 90, 100)]
MOVING = [{"step": 80, "psnr": 20.0, "usage": 0.5}, {"step": 100, "psnr": 20.3, "usage": 0.5}]


def rows(method: str, bits: int, seeds: int = 3, **values: float) -> list[dict[str, Any]]:
    """Rows that differ by a thousandth from seed to seed."""
    base: dict[str, Any] = {
        "usage": 1.0, "mse": 1e-2, "psnr": 20.0, "hard_psnr": 20.0, "num_tokens": 10**6, "perplexity": 9.0,
        "quantization_error": 0.1, "latent_variance": 1.0, "bits_per_token": float(bits), "quantizer_ms": 1.0,
        "seconds": 60.0, "curve": FLAT, "codebook_size": 2**bits,
    }  # fmt: skip
    return [
        {"method": method, "bits": bits, "seed": seed, **base}
        | {key: value * (1 + 0.001 * seed) for key, value in values.items()}
        for seed in range(seeds)
    ]  # fmt: skip


def words(verdicts: list[Verdict]) -> dict[str, str]:
    return {verdict.claim: verdict.word for verdict in verdicts}


def test_interval_by_hand() -> None:
    found = Measured.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-6)
    assert found.show() == "2.0 [-0.5, 4.5]"
    assert Measured.of([1.0, 2.0, 3.0], least=0, most=4) == Measured(2, 0, 4)
    assert Measured.of([0.5]) == Measured(0.5, None, None)
    assert Measured.of([0.5]).show(1, 100) == "50.0"
    with pytest.raises(ValueError, match="1 to 10 seeds, got 0"):
        Measured.of([])


def test_above_needs_the_intervals_apart() -> None:
    low, high, wide = Measured(1, 0.9, 1.1), Measured(2, 1.9, 2.1), Measured(2, 1.0, 3.0)
    assert above(high, low) == "yes"
    assert above(low, high) == "no"
    assert above(wide, low) == above(low, wide) == "open"
    assert above(high, low, factor=2) == "open"
    assert above(high, 1.8) == "yes"
    assert above(Measured(9, None, None), low) == above(low, Measured(9, None, None)) == "open"
    assert both("yes", "open") == "open"
    assert both("open", "no") == "no"


def test_nothing_that_overlaps_ever_holds() -> None:
    rng = random.Random(0)
    met = 0
    for _ in range(3000):
        centres, spread = (rng.uniform(0, 9), rng.uniform(0, 9)), rng.uniform(0, 1)
        a, b = ([rng.gauss(centre, spread) for _ in range(rng.randint(1, 4))] for centre in centres)
        mine, theirs = Measured.of(a), Measured.of(b)
        apart = None not in (mine.low, theirs.high) and mine.low > theirs.high  # type: ignore[operator]
        word = judge("A claim", [Case("here", above(mine, theirs), "numbers", rng.choice([None, 10]))], "more").word
        assert (word == "holds") == apart
        met += apart
    assert 100 < met < 2900


def test_words() -> None:
    yes, no, still, open_ = (
        Case("a", "yes", "1"), Case("b", "no", "2 [1, 3]"), Case("c", "no", "3", 500), Case("d", "open", "4")
    )  # fmt: skip
    assert judge("x", [yes], "seeds").word == "holds"
    assert judge("x", [yes, no, open_], "seeds").word == "holds only where: a (undecided: d)"
    assert judge("x", [yes, no], "seeds").word == "holds only where: a"
    assert judge("x", [no, open_], "seeds").word == "does not hold at this size (b: 2 [1, 3])"
    assert judge("x", [still], "seeds").word == "cannot be decided here (not reached in 500 steps; it would take seeds)"
    assert judge("x", [open_], "seeds").word == "cannot be decided here (it would take seeds)"
    assert judge("x", [], "a week").word == "cannot be decided here (it would take a week)"
    assert judge("x", [yes, no], "seeds").line() == "- **holds only where: a**: x. a: 1; b: 2 [1, 3]."


def test_flat_by_the_stated_rule() -> None:
    assert is_flat(FLAT, "psnr")
    assert is_flat(FLAT, "usage")
    assert is_flat(MOVING, "usage")
    assert not is_flat(MOVING, "psnr")
    assert is_flat([{"step": 10, "psnr": 9.0, "usage": 0.1}, *FLAT], "psnr")  # before 80 % of the steps all may move
    assert not is_flat([*FLAT[:-1], {"step": 100, "psnr": 20.0, "usage": 0.53}], "usage")
    assert not is_flat(FLAT[-1:], "psnr")
    assert not is_flat([], "usage")


def test_expected_usage_by_hand() -> None:
    assert expected_usage(1, 2) == pytest.approx(0.75)  # two draws of two codes hit both half the time
    assert expected_usage(16, 65536) == pytest.approx(1 - 1 / 2.718281828, abs=1e-5)


def test_usage_follows_the_numbers() -> None:
    found = words(usage_verdicts([
        *rows("VQ", 6, usage=0.9, mse=2e-2), *rows("VQ", 14, usage=0.01, mse=2e-2), *rows("FSQ", 6),
        *rows("FSQ", 14, usage=0.5, mse=5e-3), *rows("SimVQ", 14, seeds=1), *rows("EMA split", 14, mse=1e-2),
    ]))  # fmt: skip
    assert found["VQ uses less than half the share of a large codebook that it uses of a small one"] == "holds"
    assert found["FSQ uses at least 75 % of what uniform use would show"] == "holds only where: 2^6"
    assert found["SimVQ uses at least 75 % of what uniform use would show"].startswith("cannot be decided here")
    assert found["FSQ keeps ten times as many codes in use as VQ"] == "holds"
    assert found["FSQ reconstructs better with a larger codebook"] == "holds"
    assert found["Moving averages with splitting reconstruct better than VQ"] == "holds"


def test_what_still_moves_is_not_refuted() -> None:
    rising = [{"step": 80, "psnr": 20.0, "usage": 0.4}, {"step": 100, "psnr": 20.0, "usage": 0.5}]
    (word,) = words(usage_verdicts([{**row, "curve": rising} for row in rows("FSQ", 14, usage=0.5)])).values()
    assert word.startswith("cannot be decided here (not reached in 100 steps")
    (word,) = words(usage_verdicts([{**row, "curve": MOVING} for row in rows("FSQ", 14, usage=0.5)])).values()
    assert word.startswith("does not hold at this size")  # what moves is the PSNR, and the claim is on usage


def test_soft_codes_pay_for_their_weights() -> None:
    soft = rows("SCQ refined", 6, mse=9e-4, bits_per_token=140.0, usage=0.9)
    base = [*soft, *rows("VQ", 6, mse=1e-2, usage=0.05), *rows("EMA split", 6, mse=2e-3, usage=0.9)]
    found = words(scq_verdicts(base))
    assert found["SCQ refined has a tenth of the MSE of VQ with as many codes"] == "holds"
    assert found["SCQ refined has a tenth of the MSE of EMA split with as many codes"].startswith("does not hold")
    assert found["SCQ refined uses ten times as many codes as VQ"] == "holds"
    at_rate = "SCQ refined reconstructs better than the best of the others at no higher a rate"
    assert found[at_rate] == "holds"
    finer = rows("EMA split", 14, mse=5e-4)
    assert words(scq_verdicts([*base, *finer]))[at_rate].startswith("does not hold at this size")
    dearer = rows("Gumbel", 14, mse=5e-4, bits_per_token=160.0)
    assert words(scq_verdicts([*base, *dearer]))[at_rate] == "holds"


def test_table_shows_intervals_and_whether_curves_are_flat() -> None:
    text = table([*rows("VQ", 6), *rows("VQ", 14, usage=0.01)], ["VQ", "FSQ"])
    assert "| VQ | 16,384 | 3 |" in text
    assert "1.0 [1.0, 1.0]" in text
    assert "100 % at 2^6, 100 % at 2^14" in text
