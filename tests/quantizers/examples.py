"""Small constructor arguments of every quantizer, by file name; the contract test runs all of them."""

from __future__ import annotations

from typing import Any

from tessella import config, registry
from tessella.quantizers import Quantizer

VQ_SPEC = {"name": "vq", "codebook_size": 16, "dim": 4}

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "bsq": [{"dim": 6}, {"codebook_size": 64, "dim": 6, "entropy_group_bits": 4, "commitment_weight": 0.25}],
    "ema": [
        {"codebook_size": 16, "dim": 4},
        {"codebook_size": 16, "dim": 4, "unit_norm": True, "dead_codes": "split"},
        {"codebook_size": 16, "dim": 4, "dead_codes": "split", "codebook_init": "kmeans", "init_count": 100.0},
        {"codebook_size": 16, "dim": 4, "dead_codes": "revive", "estimator": "rotation", "codebook_init": "kmeans"},
    ],
    "fsq": [
        {"levels": [8, 5, 5, 5]},
        {"levels": [7, 3], "convention": "paper"},
        {"levels": [4, 6], "convention": "wide"},
        {"levels": [2, 4, 5], "convention": "symmetric"},
    ],
    "grouped": [
        {"quantizer": VQ_SPEC, "num_groups": 2},
        {"quantizer": {"name": "residual", "num_codebooks": 2, "quantizer": VQ_SPEC}, "num_groups": 2},
    ],
    "gumbel": [{"codebook_size": 16, "dim": 4}],
    "ibq": [{"codebook_size": 16, "dim": 4}],
    "lfq": [{"dim": 6}, {"codebook_size": 64, "dim": 6, "entropy_group_bits": 4, "scale": 0.5}],
    "residual": [
        {"quantizer": VQ_SPEC, "num_codebooks": 3},
        {"quantizer": {"name": "lfq", "dim": 4}, "num_codebooks": 3},
        {"quantizer": {"name": "ema", "codebook_size": 16, "dim": 4, "codebook_init": "kmeans"}, "num_codebooks": 2},
    ],
    "residual_dropout": [{"quantizer": VQ_SPEC, "num_codebooks": 3}],
    "scq": [
        {"codebook_size": 16, "dim": 4},
        {"codebook_size": 16, "dim": 4, "hard": True},
        {"codebook_size": 16, "dim": 4, "solver": "exact"},
    ],
    "simvq": [{"codebook_size": 16, "dim": 4}, {"codebook_size": 16, "dim": 4, "estimator": "rotation"}],
    "uvim_vq": [{"codebook_size": 16, "dim": 4}, {"codebook_size": 16, "dim": 4, "dead_codes": "keep"}],
    "vq": [
        {"codebook_size": 16, "dim": 4},
        {"codebook_size": 16, "dim": 4, "entropy_weight": 0.1, "entropy_temperature": 0.5},
        {"codebook_size": 16, "dim": 4, "metric": "cosine", "entropy_weight": 0.1, "estimator": "rotation"},
        {"codebook_size": 16, "dim": 4, "codebook_init": "kmeans"},
        {"codebook_size": 16, "dim": 4, "init_scale": 0.5},
    ],
}


def missing_examples() -> list[str]:
    """Registered quantizers without an example."""
    return sorted(set(registry.names("quantizers")) - set(EXAMPLES))


def cases() -> list[tuple[str, dict[str, Any]]]:
    """All (name, arguments); the arguments are also what a recipe would hold."""
    return [(name, arguments) for name, variants in EXAMPLES.items() for arguments in variants]


def label(case: tuple[str, dict[str, Any]]) -> str:
    """A readable test id."""
    name, arguments = case
    told = [f"{value['name']}" if isinstance(value, dict) else f"{key}={value}" for key, value in arguments.items()
            if key not in ("codebook_size", "dim")]  # fmt: skip
    return "-".join([name, *told]).replace(" ", "")


def make(case: tuple[str, dict[str, Any]]) -> Quantizer:
    """The quantizer of a case, built as from a recipe."""
    name, arguments = case
    quantizer: Quantizer = config.build("quantizers", {"name": name, **arguments})
    return quantizer
