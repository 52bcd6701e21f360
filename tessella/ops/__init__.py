"""Exact large-codebook operations in O(N D + V D) memory: nearest code, k-means, index backpropagation, entropy.

Every function visits the N x V scores in tiles and keeps only per-row and per-code statistics; gradients recompute the
tiles. Results agree with the dense formulas to rounding, in values and in gradients.
"""

from __future__ import annotations

from tessella.ops.entropy import softmax_entropy
from tessella.ops.index_backprop import index_backprop
from tessella.ops.kmeans import kmeans
from tessella.ops.nearest import nearest
from tessella.ops.sharded import sharded_index_backprop, sharded_nearest

__all__ = ["index_backprop", "kmeans", "nearest", "sharded_index_backprop", "sharded_nearest", "softmax_entropy"]
