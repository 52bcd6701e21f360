"""How good a tokenizer or a generator is, with the protocol stored beside the numbers."""

from __future__ import annotations

from tessella.evaluation.codebook import CodeCounter
from tessella.evaluation.compression import compression_cost
from tessella.evaluation.distribution import DistributionRecord, DistributionSettings, evaluate_distribution
from tessella.evaluation.features import FeatureNetwork
from tessella.evaluation.protocols import PROTOCOLS
from tessella.evaluation.reconstruction import ReconstructionRecord, evaluate_reconstruction

__all__ = [
    "PROTOCOLS",
    "CodeCounter",
    "DistributionRecord",
    "DistributionSettings",
    "FeatureNetwork",
    "ReconstructionRecord",
    "compression_cost",
    "evaluate_distribution",
    "evaluate_reconstruction",
]
