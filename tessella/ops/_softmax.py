"""One custom operator behind index backpropagation and the softmax entropies, in O(N D + V D) memory.

For scores ``l_nk`` (``z_n.c_k``, or ``z_n.c_k - |c_k|^2/2``), ``s = softmax_k(l)`` and ``p = softmax_k(l / tau)`` it
gives

* the straight-through codes: value ``c_{k*}``, ``k* = argmax_k l``, gradient that of ``(onehot(k*) - sg(s) + s) C``;
* the sample entropy ``S = sum_n w_n H(p_n)`` and the batch entropy ``A = -sum_k q_k log(q_k + eps)`` of
  ``q = sum_n w_n p_n``; ``w`` averages over unmasked rows, and q is the mean of the replicas, ranks with other rows
  of the batch. A's gradient is that of the own q at that mean, so that the replicas' mean of it is the batch's.

The forward sweep keeps, for each row, ``m = max_k l`` and sums centred on it; ``m / tau`` never joins a logarithm,
because at small ``tau`` its rounding would be the largest error of the gradient. The backward sweep forms every tile
of scores again.

Where scores are far apart nearly all of ``p``, and often of ``s``, rounds to zero. The sweep then lists the few codes
of each row whose score is within reach of the maximum (`Shortlist`), and everything about ``p``, in float64, and ``s``
is a sum over that list. Where the list would be long, ``p`` or both are swept in tiles.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tessella.ops._scores import Scores, Shortlist, TooManyNearError, first_maximum, first_over_shards
from tessella.ops._softmax_parts import (
    GATHER_PAIRS,
    SWEPT,
    Forward,
    Found,
    Near,
    RowSums,
    exponent_floor,
    list_capacity,
    reach,
    row_weights,
    tail,
)
from tessella.ops._tiles import Shards, corner, full_height_tile, full_precision, has_triton_form, spans, tile_shape

EPS = 1e-5  # inside the logarithm of the batch entropy


@torch.library.custom_op("tessella::softmax_codes", mutates_args=())
def softmax_codes(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    temperature: float,
    entropies: bool,
    soft: bool,
    group: str,
    replicas: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes and entropies of ``z`` ``[N, D]`` over this rank's ``codebook`` ``[V, D]``, of one dtype; see `Forward`.

    ``entropies`` asks for S and A, ``soft`` for what the gradient through ``z_q`` needs.
    """
    shards = Shards(group, replicas)
    out = _empty_outputs(z, codebook, entropies, soft)
    with full_precision(z.device):
        scores = Scores(z, codebook, metric)
        first_code = shards.first_code(codebook.shape[0], z.device)
        found = _find(scores, mask, temperature, entropies, soft, shards)
        sums, near = _merge(found.sums, temperature, shards), found.near
        out.row_stats[0], out.row_stats[1] = sums.best, sums.mass
        if found.lists_p or found.lists_s:
            out.listed[0, : len(near.rows)], out.listed[1, : len(near.rows)] = near.rows, near.codes

        score, index = first_maximum(near.scores, near.rows, near.codes, z.shape[0])
        out.indices.copy_(first_over_shards(score, index, first_code, shards))
        local, owned = _owned(out.indices, first_code, codebook)
        out.z_q.copy_(shards.sum(codebook[local].mul_(owned[:, None])))
        out.codes.copy_(out.z_q)
        best = shards.max(score)
        if found.lists_s:
            _listed_softmax(near, best, shards, out)
        elif soft:
            torch.div(sums.code, sums.mass[:, None], out=out.mean_code)
        if found.lists_p:
            _listed_entropies(near, best, row_weights(mask, z), temperature, shards, out)
        elif entropies:
            _swept_entropies(scores, sums, row_weights(mask, z), temperature, shards, out)
    return out


@softmax_codes.register_fake
def _(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    temperature: float,
    entropies: bool,
    soft: bool,
    group: str,
    replicas: str = "",
) -> tuple[Tensor, ...]:
    return tuple(_empty_outputs(z, codebook, entropies, soft))


def _empty_outputs(z: Tensor, codebook: Tensor, entropies: bool, soft: bool) -> Forward:
    n, d = z.shape
    v = codebook.shape[0]
    capacity = list_capacity(n, v) if entropies or soft else 0
    return Forward(
        z_q=torch.empty_like(z),
        codes=torch.empty_like(z),
        indices=z.new_empty(n, dtype=torch.int64),
        entropies=z.new_zeros(2),
        row_stats=z.new_zeros(5, n),
        mean_code=z.new_zeros(n if soft else 0, d),
        slope=z.new_zeros(v if entropies else 0),
        listed=z.new_zeros(2, capacity, dtype=torch.int64),
        listed_values=z.new_zeros(3, capacity),
        num_listed=z.new_full((2,), SWEPT, dtype=torch.int64),
    )


def _owned(indices: Tensor, first_code: int, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Row of this shard for each global index, and whether the shard holds it (row 0 stands in where not)."""
    local = indices - first_code
    owned = (local >= 0) & (local < codebook.shape[0])
    return torch.where(owned, local, 0), owned


def _find(
    scores: Scores, mask: Tensor | None, temperature: float, entropies: bool, soft: bool, shards: Shards
) -> Found:
    """Sweep the scores, listing both ``s`` and ``p`` if their codes are few on every rank, else ``p``, else neither."""
    dtype, v = scores.z.dtype, len(scores.codebook)
    if has_triton_form(scores.z):
        from tessella.ops import _triton

        best, index, *totals = _triton.row_sums(scores, soft, temperature if entropies else None)
        near = Near(torch.arange(len(best), device=best.device), index, best.to(scores.wide))
        return Found(RowSums(best, *totals), near, lists_p=False, lists_s=False)
    near_p = scores.margin
    if entropies:
        near_p = near_p.clamp_min(reach(dtype) * temperature)
        near_p = near_p if mask is None else torch.where(mask, near_p, scores.margin)
    if soft and (found := _try_list(scores, near_p.clamp_min(tail(dtype, v)), near_p, False, shards)):
        return Found(*found, lists_p=entropies, lists_s=True)
    if entropies and (found := _try_list(scores, near_p, near_p, soft, shards)):
        return Found(*found, lists_p=True, lists_s=False)
    sums, near = _sweep(scores, scores.margin, scores.margin, soft, temperature if entropies else None)
    return Found(sums, near, lists_p=False, lists_s=False)


def _try_list(
    scores: Scores, window: Tensor, exact_window: Tensor, soft: bool, shards: Shards
) -> tuple[RowSums, Near] | None:
    """Sweep with a list of all codes within ``window``; None where, on any rank, those are too many."""
    found = None
    with suppress(TooManyNearError):
        found = _sweep(scores, window, exact_window, soft, None, exhaustive=True)
    failed = shards.max_of_all(torch.tensor(int(found is None), device=window.device))
    return None if failed.item() else found


def _sweep(
    scores: Scores,
    window: Tensor,
    exact_window: Tensor,
    soft: bool,
    sharp_temperature: float | None,
    exhaustive: bool = False,
) -> tuple[RowSums, Near]:
    """Visit every tile of scores once.

    Forms the sums of each row over ``s`` (if ``soft``) and ``p`` (if ``sharp_temperature``), and the list that decides
    its index.

    Raises:
        TooManyNearError: the list is to be ``exhaustive`` but would exceed its capacity.
    """
    z, codebook = scores.z, scores.codebook
    (n, d), v = z.shape, codebook.shape[0]
    rows, codes = tile_shape(n, v, z.device)
    low = exponent_floor(z.dtype)
    sums = RowSums(z.new_empty(n), z.new_zeros(n), z.new_zeros(n if soft else 0, d), *z.new_zeros(2, n))
    scratch = z.new_empty(1 if sharp_temperature is None else 3, rows * codes)
    nothing = torch.empty(0, dtype=torch.int64, device=z.device)
    near = [Near(nothing, nothing, scores.exact(nothing, nothing))]
    for i in spans(n, rows):
        best, mass, code, sharp_mass, sharp_moment = (total[i] for total in sums)
        shortlist = Shortlist(scores, i, window[i], list_capacity(n, v) // n if exhaustive else None)
        for k in spans(v, codes):
            logits = scores.tile(i, k, scratch[0])
            before = shortlist.best.clone()
            shortlist.update(logits, k)
            if not soft and sharp_temperature is None:
                continue
            drop = (before - shortlist.best).clamp_min_(low)
            logits.sub_(shortlist.best[:, None])
            if sharp_temperature is not None:
                t = torch.mul(logits, 1 / sharp_temperature, out=corner(scratch[1], i, k)).clamp_min_(low)
                p = torch.exp(t, out=corner(scratch[2], i, k))
                sharp_drop = (drop / sharp_temperature).clamp_min_(low)
                # sum exp(t + drop) (t + drop), from the sums of exp(t) t and exp(t)
                sharp_moment.addcmul_(sharp_mass, sharp_drop).mul_(sharp_drop.exp()).add_(t.mul_(p).sum(1))
                sharp_mass.mul_(sharp_drop.exp()).add_(p.sum(1))
            if soft:
                s = logits.clamp_min_(low).exp_()
                mass.mul_(drop.exp()).add_(s.sum(1))
                code.mul_(drop.exp()[:, None]).addmm_(s, codebook[k])
        best.copy_(shortlist.best)
        near.append(Near(*shortlist.pairs(exact_window[i])))
    return sums, Near(*(torch.cat(parts) for parts in zip(*near, strict=True)))


def _merge(sums: RowSums, temperature: float, shards: Shards) -> RowSums:
    """The sums over all shards: every rank's, brought to the common maximum and added."""
    if shards.group is None:
        return sums
    low = exponent_floor(sums.best.dtype)
    best = shards.max(sums.best.clone())
    drop = (sums.best - best).clamp_min_(low)
    sharp_drop = (drop / temperature).clamp_min_(low)
    return RowSums(
        best,
        shards.sum(sums.mass * drop.exp()),
        shards.sum(sums.code * drop.exp()[: len(sums.code), None]),
        shards.sum(sums.sharp_mass * sharp_drop.exp()),
        shards.sum((sums.sharp_moment + sums.sharp_mass * sharp_drop) * sharp_drop.exp()),
    )


def _row_sums(near: Near, value: Tensor, best: Tensor, shards: Shards) -> Tensor:
    """Sum over each row's entries on all shards: [c] -> [N]."""
    return shards.sum(torch.zeros_like(best).index_add_(0, near.rows, value))


def _listed_softmax(near: Near, best: Tensor, shards: Shards, out: Forward) -> None:
    """``s`` of the list; ``best`` [N] are the best scores of all."""
    mass = (near.scores - best[near.rows]).exp()
    out.num_listed[1] = len(mass)
    out.listed_values[2, : len(mass)] = mass / _row_sums(near, mass, best, shards)[near.rows]


def _listed_entropies(
    near: Near, best: Tensor, weights: Tensor, temperature: float, shards: Shards, out: Forward
) -> None:
    """Entropies and their gradients to the scores, as sums over the list; ``best`` [N] are the best scores of all."""
    w = weights.to(best.dtype)
    t = (near.scores - best[near.rows]) / temperature
    log_mass = _row_sums(near, t.exp(), best, shards).log()
    log_p = t - log_mass[near.rows]
    p = log_p.exp()
    sample = -_row_sums(near, p * log_p, best, shards)
    q = shards.mean_of_replicas(best.new_zeros(len(out.slope)).index_add_(0, near.codes, w[near.rows] * p))
    slope = batch_entropy_slope(q)[near.codes]
    out.entropies[0] = w @ sample
    out.entropies[1] = shards.sum(batch_entropy(q))

    scale = p * w[near.rows] / temperature
    mean_slope = _row_sums(near, p * slope, best, shards)
    out.num_listed[0] = len(p)
    out.listed_values[0, : len(p)] = -scale * (log_p + sample[near.rows])
    out.listed_values[1, : len(p)] = scale * (slope - mean_slope[near.rows])


def _swept_entropies(
    scores: Scores, sums: RowSums, weights: Tensor, temperature: float, shards: Shards, out: Forward
) -> None:
    """Entropies, the slope dA/dq and its mean under each ``p_n``: one more sweep, because q sums over all rows."""
    best, _, log_mass, mean_t, mean_slope = out.row_stats
    torch.log(sums.sharp_mass, out=log_mass)
    torch.div(sums.sharp_moment, sums.sharp_mass, out=mean_t)
    out.entropies[0] = weights @ (log_mass - mean_t)
    n, v = len(best), len(out.slope)
    total = shards.sum(torch.tensor(v, device=best.device))
    uniform_slope = batch_entropy_slope(1 / total)
    if has_triton_form(best[:, None]):
        from tessella.ops import _triton

        q = shards.mean_of_replicas(_triton.mean_assignment(scores, best, log_mass, weights, temperature))
        out.entropies[1] = batch_entropy(q)
        torch.sub(batch_entropy_slope(q), uniform_slope, out=out.slope)
        mean_slope.copy_(_triton.mean_slope(scores, best, log_mass, out.slope, temperature))
    else:
        codes = full_height_tile(n, v, best.device)
        scratch = best.new_empty(n * codes)
        i = slice(0, n)
        for k in spans(v, codes):
            t = scores.tile(i, k, scratch).sub_(best[:, None]).div_(temperature).sub_(log_mass[:, None])
            p = t.clamp_min_(exponent_floor(t.dtype)).exp_()
            q = shards.mean_of_replicas(weights @ p)
            out.entropies[1] += batch_entropy(q)
            # Each row's gradient sees the slope less its mean; near a uniform q the two would cancel.
            out.slope[k] = batch_entropy_slope(q) - uniform_slope
            mean_slope.addmv_(p, out.slope[k])
    shards.sum(out.entropies[1])
    shards.sum(mean_slope)


def batch_entropy(q: Tensor) -> Tensor:
    """A = -sum_k q_k log(q_k + eps)."""
    return -(q * (q + EPS).log()).sum()


def batch_entropy_slope(q: Tensor) -> Tensor:
    """dA/dq_k = -log(q_k + eps) - q_k / (q_k + eps)."""
    return -(q + EPS).log() - q / (q + EPS)


@torch.library.custom_op("tessella::softmax_codes_backward", mutates_args=())
def softmax_codes_backward(
    grad_z_q: Tensor | None,
    grad_codes: Tensor | None,
    grad_entropies: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor,
    row_stats: Tensor,
    mean_code: Tensor,
    slope: Tensor,
    listed: Tensor,
    listed_values: Tensor,
    num_listed: Tensor,
    metric: str,
    temperature: float,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `softmax_codes` to ``z`` and to this rank's ``codebook``.

    With ``g`` the gradient of z_q and ``a_nk = g_n.c_k``, the gradient of the scores is

        G_nk = s_nk (a_nk - g_n.zbar_n)                      straight-through codes
             - S' w_n p_nk (log p_nk + H(p_n)) / tau         sample entropy
             + A' w_n p_nk (slope_k - mean_slope_n) / tau    batch entropy

    and dz = G C, dC = G^T z (less sum_n G_nk c_k for the euclidean score), plus the gradients of the gathered codes.
    """
    shards = Shards(group)
    first_code = shards.first_code(codebook.shape[0], z.device)
    dz, dcodebook = torch.zeros_like(z), torch.zeros_like(codebook)
    with full_precision(z.device):
        num_p, num_s = num_listed.tolist()
        swept = (grad_z_q if num_s == SWEPT else None, grad_entropies if num_p == SWEPT else None)
        if any(grad is not None for grad in swept):
            stats = (row_stats, mean_code, slope, row_weights(mask, z) / temperature)
            if has_triton_form(z):
                from tessella.ops._triton import sweep_backward
            else:
                sweep_backward = _sweep_backward
            sweep_backward(Scores(z, codebook, metric), stats, *swept, temperature, dz, dcodebook)
        num = max(num_p, num_s)
        if num != SWEPT:
            pairs, values = listed[:, :num], listed_values[:, :num]
            weights = torch.zeros_like(values[0])
            if grad_entropies is not None and num_p != SWEPT:
                weights += grad_entropies @ values[:2]
            if grad_z_q is not None and num_s != SWEPT:
                weights += _listed_softmax_grad(grad_z_q, codebook, pairs, values[2], shards)
            listed_grads = torch.sparse_coo_tensor(pairs, weights, (len(z), len(codebook)), check_invariants=False)
            dz.addmm_(listed_grads, codebook)
            dcodebook.addmm_(listed_grads.t(), z)
            if metric == "euclidean":
                sums = weights.new_zeros(len(codebook)).index_add_(0, pairs[1], weights)
                dcodebook.addcmul_(codebook, sums[:, None], value=-1)
        shards.sum(dz)
        local, owned = _owned(indices, first_code, codebook)
        for grad in (grad_z_q, grad_codes):
            if grad is not None:
                dcodebook.index_add_(0, local, grad * owned[:, None])
    return dz, dcodebook


@softmax_codes_backward.register_fake
def _(
    grad_z_q: Tensor | None,
    grad_codes: Tensor | None,
    grad_entropies: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    *args: object,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(codebook)


def _sweep_backward(
    scores: Scores,
    stats: tuple[Tensor, Tensor, Tensor, Tensor],
    grad_z_q: Tensor | None,
    grad_entropies: Tensor | None,
    temperature: float,
    dz: Tensor,
    dcodebook: Tensor,
) -> None:
    """Add G C to ``dz`` and G^T z to ``dcodebook``, tile by tile."""
    (row_stats, mean_code, slope, weights), z, codebook = stats, scores.z, scores.codebook
    best, mass, log_mass, mean_t, mean_slope = row_stats
    low = exponent_floor(z.dtype)
    if grad_z_q is not None:
        g = grad_z_q / mass[:, None]  # s_nk (a_nk - g_n.zbar_n) = exp(l_nk - m_n) (g_n/mass_n).(c_k - zbar_n)
        g_mean = (g * mean_code).sum(1)
    rows, codes = tile_shape(len(z), len(codebook), z.device)
    scratch = z.new_empty(3, rows * codes)
    for i in spans(len(z), rows):
        for k in spans(len(codebook), codes):
            logits = scores.tile(i, k, scratch[0]).sub_(best[i, None])
            G = corner(scratch[1], i, k)
            if grad_entropies is not None:
                ds, da = grad_entropies.unbind()
                t = torch.div(logits, temperature, out=G)
                p = torch.sub(t, log_mass[i, None], out=corner(scratch[2], i, k)).clamp_min_(low).exp_()
                # log p + H = t - sum p t; sums of p (log p + H) over a row would not vanish as exactly.
                t.clamp_min_(low).sub_(mean_t[i, None]).mul_(-ds).add_(da * slope[k]).sub_(da * mean_slope[i, None])
                G.mul_(p).mul_(weights[i, None])
            if grad_z_q is not None:
                s = logits.clamp_min_(low).exp_()
                a = torch.mm(g[i], codebook[k].T, out=corner(scratch[2], i, k)).sub_(g_mean[i, None])
                G = a.mul_(s) if grad_entropies is None else G.addcmul_(a, s)
            dz[i].addmm_(G, codebook[k])
            dcodebook[k].addmm_(G.T, z[i])
            if scores.half_norms is not None:
                dcodebook[k].addcmul_(codebook[k], G.sum(0)[:, None], value=-1)


def _listed_softmax_grad(g: Tensor, codebook: Tensor, pairs: Tensor, s: Tensor, shards: Shards) -> Tensor:
    """s_nk (a_nk - sum_k s_nk a_nk) of the listed pairs, with a_nk = g_n.c_k: ``[c]``."""
    rows, codes = pairs
    a = torch.empty_like(s)
    for j in spans(len(s), GATHER_PAIRS):
        torch.sum(g[rows[j]].mul_(codebook[codes[j]]), 1, out=a[j])
    mean = shards.sum(g.new_zeros(len(g)).index_add_(0, rows, s * a))
    return s * (a - mean[rows])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, mask, ctx.metric, ctx.temperature, _, _, ctx.group, _ = inputs
    out = Forward(*output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, codebook, mask, out.indices, *out[4:])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    settings = ctx.metric, ctx.temperature, ctx.group
    dz, dcodebook = softmax_codes_backward(grads[0], grads[1], grads[3], *ctx.saved_tensors, *settings)
    return dz, dcodebook, None, None, None, None, None, None, None


softmax_codes.register_autograd(_backward, setup_context=_setup_context)
