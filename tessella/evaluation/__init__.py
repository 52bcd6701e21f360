"""How good a tokenizer is: reconstruction and codebook statistics, with the protocol stored beside the numbers."""

from __future__ import annotations

from tessella.evaluation.codebook import CodeCounter
from tessella.evaluation.reconstruction import ReconstructionRecord, evaluate_reconstruction

__all__ = ["CodeCounter", "ReconstructionRecord", "evaluate_reconstruction"]
