"""What the page of claims says beside its own numbers: its rules, what was not tried, and others' figures."""

from __future__ import annotations

from tessella.study.verdicts import judge

RULES = """\
A number is its mean over seeds with the 95 % interval of Student's t in brackets; a single seed has none. A claim
**holds** where the intervals that it compares lie apart in its favour, **does not hold at this size** where they lie
apart against it, and otherwise **cannot be decided here**. A learning curve, of 500 held-out pictures, is called flat
where from 80 % of the steps on the usage moves by less than {flat_usage} of itself, or the PSNR by less than
{flat_db} dB; the learning rate falls to a fiftieth by then, so flat means: at the end of this schedule. What fails
where the curve behind it still moves was *not reached in N steps*, and is not refuted."""

OPEN = (
    judge(
        "FSQ serves MaskGIT as well as VQ does",
        [],
        "MaskGIT trained until it has learned context over both tokenizers, three seeds: hours of a core for each of "
        "six models, or a GPU",
    ),
    judge(
        "MaskGIT at its paper's choice temperature of 4.5 draws the entropy of its data",
        [],
        "the same trained models, and a sweep from 4.5 to 30 before and after the norms are moved",
    ),
    judge(
        "Coarse-to-fine generation keeps its lead over cluster counts from 64 to 1,024, temperatures and guidance",
        [],
        "a generator for each count with three seeds, each tuned on held-out pictures: some 20 hours of a core",
    ),
    judge(
        "A masked-bits head over FSQ or LFQ digits draws better pictures than a head over whole codes",
        [],
        "both heads over one tokenizer with three seeds: some 5 hours of a core",
    ),
    judge(
        "SimVQ and IBQ stay in use at 65,536 to 262,144 codes",
        [],
        "some 10 million tokens of training for each, 20 times what is spent here on 16,384 codes: a GPU",
    ),
)

YARDSTICKS = """## Another's numbers

Not measured here. A public log of 1,300 pictures, 16,384 codes and 1,000 steps:

| quantizer | codes used % | PSNR dB |
|---|---|---|
| SimVQ | 83.5 | 14.97 |
| IBQ | 81.5 | 16.53 |
| VQ with an entropy loss | 56.6 | 14.46 |
| VQ | 0.15 | 14.09 |

SimVQ with 65,536 codes was measured again by others at rFID 2.39, where its own table says 2.24.
"""
