"""The scores of vectors against codes, a tile at a time, and the short list of codes that come near each row's best."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.ops._tiles import Shards, corner, spans

RESCORE_PAIRS = 1024  # gathered rows that stay in the cache
TIES_PER_ROW = 4  # near-ties held to the end, on average, where a list serves to decide the index alone
SEGMENT = 64  # codes whose maximum is taken first, so that few scores need to be looked at one by one
NO_CODE = torch.iinfo(torch.int64).max


class Scores:
    """Scores z.c of ``z`` ``[N, D]`` and ``codebook`` ``[V, D]``, or z.c - |c|^2/2 for the euclidean metric.

    |z - c|^2 = |z|^2 - 2 (z.c - |c|^2/2), and |z|^2 changes neither the argmin nor a softmax over codes.

    ``margin`` ``[N]`` bounds how far apart two scores may be and still be in the wrong order: a score errs by at most
    (D + 2) u (|z||c| + |c|^2), u the unit roundoff (D rounded products and their sum, and as often for |c|^2/2).
    """

    def __init__(self, z: Tensor, codebook: Tensor, metric: str) -> None:
        self.z, self.codebook = z, codebook
        self.wide = torch.float32 if z.device.type == "mps" else torch.float64
        code_norms = torch.linalg.vector_norm(codebook, dim=1, dtype=z.dtype)
        largest = code_norms.amax()
        size = torch.linalg.vector_norm(z, dim=1) * largest
        self.half_norms = None
        if metric == "euclidean":
            self.half_norms = code_norms.square().mul_(0.5)
            size += largest.square()
        self.margin = size.mul_((z.shape[1] + 2) * torch.finfo(z.dtype).eps)

    def tile(self, i: slice, k: slice, scratch: Tensor) -> Tensor:
        """The scores of rows ``i`` and codes ``k``, written into ``scratch``."""
        codes, out = self.codebook[k].to(self.z.dtype).T, corner(scratch, i, k)
        if self.half_norms is None:
            return torch.mm(self.z[i], codes, out=out)
        return torch.addmm(self.half_norms[k], self.z[i], codes, beta=-1, out=out)

    def exact(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Scores of the pairs ``(rows[j], codes[j])`` in float64 (float32 on MPS, which has no float64): ``[c]``."""
        exact = torch.empty(len(rows), dtype=self.wide, device=rows.device)
        for j in spans(len(rows), RESCORE_PAIRS):
            point, code = self.z[rows[j]].to(self.wide), self.codebook[codes[j]].to(self.wide)
            if self.half_norms is not None:
                point.sub_(code, alpha=0.5)  # c.(z - c/2) = z.c - |c|^2/2
            torch.sum(point.mul_(code), 1, out=exact[j])
        return exact

    def exact_tile(self, i: slice, k: slice) -> tuple[Tensor, Tensor]:
        """The scores of rows ``i`` and codes ``k`` in float64, ``[n, v]``, and their margin ``[n]``."""
        code = self.codebook[k].to(self.wide)
        exact = self.z[i].to(self.wide) @ code.T
        if self.half_norms is not None:
            exact.sub_(code.square().sum(1).mul_(0.5))
        unit = torch.finfo(self.wide).eps / torch.finfo(self.z.dtype).eps
        return exact, self.margin[i].to(self.wide) * unit


class TooManyNearError(Exception):
    """A list that had to be exhaustive would exceed its capacity."""


class Shortlist:
    """The codes whose score comes within ``window`` ``[n]`` of the best of their row, for the rows ``i``, tile by tile.

    A list that must be exhaustive raises `TooManyNearError` if more than ``exhaustive_per_row`` codes a row come near.
    Any other serves to decide the index: if many tie, as in a collapsed codebook, it settles the matter in float64 and
    keeps the first of the best.
    """

    def __init__(self, scores: Scores, i: slice, window: Tensor, exhaustive_per_row: int | None = None) -> None:
        self._scores, self._rows, self._window = scores, i, window
        self._exhaustive = exhaustive_per_row is not None
        self._capacity = (exhaustive_per_row or TIES_PER_ROW) * len(window)
        nothing = torch.empty(0, dtype=torch.int64, device=window.device)
        self._parts = [(nothing, nothing, window[:0])]
        self.best = torch.full_like(window, -torch.inf)

    def update(self, tile: Tensor, k: slice) -> None:
        """Take in the scores ``[n, v]`` of the codes ``k``."""
        v = tile.shape[1]
        tops = tile.amax(1)
        torch.maximum(self.best, tops, out=self.best)
        threshold = self.best - self._window
        # After the first tiles few rows find a code that comes near: only those are looked at closely.
        rows = (tops >= threshold).nonzero().squeeze(1)
        if len(rows) == 0:
            return
        near = tile if len(rows) == len(tile) else tile[rows]
        segments = near.view(len(rows), -1, SEGMENT if v % SEGMENT == 0 else v)
        limit = threshold[rows, None]
        row, segment = (segments.amax(2) >= limit).nonzero(as_tuple=True)
        if len(row) > self._capacity:
            self._parts.append(self._settle_tile(tile, k))
        else:
            found = segments[row, segment]
            hit, code = (found >= limit[row]).nonzero(as_tuple=True)
            self._parts.append((rows[row[hit]], segment[hit] * segments.shape[2] + code + k.start, found[hit, code]))
        if sum(len(rows) for rows, _, _ in self._parts) > self._capacity:
            self._prune()
            if len(self._parts[0][0]) > self._capacity:
                self._settle_list()

    def pairs(self, exact_window: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of z, codes and float64 scores of the list, ``[c]`` each.

        Scores further below the best than ``exact_window`` ``[n]`` keep their rounding.
        """
        self._prune()
        rows, codes, values = self._parts[0]
        z_rows = rows + self._rows.start
        if exact_window is None:
            return z_rows, codes, self._scores.exact(z_rows, codes)
        scores = values.to(self._scores.wide)
        near = (values >= (self.best - exact_window)[rows]).nonzero().squeeze(1)
        scores[near] = self._scores.exact(z_rows[near], codes[near])
        return z_rows, codes, scores

    def _prune(self) -> None:
        """Drop the codes that a later, better score has left outside the window."""
        rows, codes, values = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        keep = values >= (self.best - self._window)[rows]
        self._parts = [(rows[keep], codes[keep], values[keep])]

    def _settle_tile(self, tile: Tensor, k: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The first of the best codes of each row of one tile; scores that differ by float64's rounding are equal."""
        if self._exhaustive:
            raise TooManyNearError
        exact, margin = self._scores.exact_tile(self._rows, k)
        code = (exact >= (exact.amax(1) - margin)[:, None]).byte().argmax(1)
        row = torch.arange(len(tile), device=tile.device)
        return row, code + k.start, tile[row, code]

    def _settle_list(self) -> None:
        """Keep the first of the best codes of each row of the list."""
        if self._exhaustive:
            raise TooManyNearError
        rows, codes, values = self._parts[0]
        _, index = first_maximum(self._scores.exact(rows + self._rows.start, codes), rows, codes, len(self.best))
        keep = codes == index[rows]
        self._parts = [(rows[keep], codes[keep], values[keep])]


def first_maximum(scores: Tensor, rows: Tensor, codes: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Each row's maximum over its entries and the least code that attains it; -inf and `NO_CODE` without entries."""
    best = scores.new_full((num_rows,), -torch.inf).scatter_reduce_(0, rows, scores, "amax")
    winner = scores == best[rows]
    index = codes.new_full((num_rows,), NO_CODE).scatter_reduce_(0, rows[winner], codes[winner], "amin")
    return best, index


def first_over_shards(best: Tensor, index: Tensor, first_code: int, shards: Shards) -> Tensor:
    """The global index of the best code over all ranks; the first on ties; 0 for a row of NaN, which has no best."""
    index = torch.where(index == NO_CODE, NO_CODE, index + first_code)
    index = shards.min(torch.where(best == shards.max(best.clone()), index, NO_CODE))
    return torch.where(index == NO_CODE, 0, index)
