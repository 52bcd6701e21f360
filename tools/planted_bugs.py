"""Do the tests of quantizers and generators notice? Break one rule at a time in a copy of the package, run the tests, print who was caught.

    python tools/planted_bugs.py [name ...]

Each bug is a replacement of one piece of text that must occur exactly once. The exit status is 1 if any bug survived.
"""

# The table of bugs is wider than prose.
# ruff: noqa: E501

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUANTIZER_TESTS = ("tests/quantizers", "tests/ops")
GENERATOR_TESTS = ("tests/generators", "tests/conditioners", "tests/test_transformer.py")
RANK_TESTS = ("tests/training", "tests/conftest.py")
# Compilation is slow and breaks on its own terms; slow tests repeat what quick ones check.
SELECTION = "not TestCompile and not slow and not scq"


@dataclass(frozen=True)
class Bug:
    """``old`` becomes ``new`` in ``tessella/<file>``."""

    name: str
    file: str
    old: str
    new: str
    over_ranks: bool = False

    @property
    def tests(self) -> tuple[str, ...]:
        """Where the tests are that should notice."""
        if self.over_ranks:
            return RANK_TESTS
        return QUANTIZER_TESTS if self.file.startswith(("quantizers/", "ops/")) else GENERATOR_TESTS


BUGS = [
    Bug("commitment gradient also moves the codes", "quantizers/_nearest.py", "error = mean_squared(z, codes.detach(), mask)", "error = mean_squared(z, codes, mask)"),
    Bug("codebook gradient also moves the encoder", "quantizers/_nearest.py", "mean_squared(z.detach(), codes, mask)", "mean_squared(z, codes, mask)"),
    Bug("weights swapped", "quantizers/_nearest.py", "loss = self.commitment_weight * error", "loss = self.codebook_weight * error"),
    Bug("loss ignores the mask", "quantizers/_nearest.py", "error = mean_squared(z, codes.detach(), mask)", "error = mean_squared(z, codes.detach(), None)"),
    Bug("codebook loss ignores the mask", "quantizers/_nearest.py", "mean_squared(z.detach(), codes, mask)", "mean_squared(z.detach(), codes, None)"),
    Bug("furthest code instead of nearest", "quantizers/_nearest.py", "indices = nearest(z, codebook)", "indices = nearest(-z, codebook)"),
    Bug("dot product instead of distance", "quantizers/_nearest.py", "indices = nearest(z, codebook)", 'indices = nearest(z, codebook, "dot")'),
    Bug("k-means of one rank's data", "quantizers/_nearest.py", "rows = gather_rows((z if mask is None else z[mask]).reshape(-1, self.dim).float())", "rows = (z if mask is None else z[mask]).reshape(-1, self.dim).float()"),
    Bug("k-means on padding", "quantizers/_nearest.py", "(z if mask is None else z[mask])", "z"),
    Bug("k-means fit not remembered", "quantizers/_nearest.py", "self.fitted.fill_(fitted)", "self.fitted.fill_(False)"),
    Bug("k-means fits in every step", "quantizers/_nearest.py", "            self._seen_fitted = fitted\n", "            self._seen_fitted = False\n            self.fitted.fill_(False)\n"),
    Bug("k-means++ draws uniformly", "ops/kmeans.py", "distance = to_new if k == 0 else torch.minimum(distance, to_new)", "distance = torch.ones_like(distance)"),
    Bug("k-means centres are sums", "ops/kmeans.py", " / counts.clamp(min=1)", ""),
    Bug("each rank's own mean assignment", "ops/_softmax.py", "shards.mean_of_replicas(best.new_zeros", "(best.new_zeros", True),
    Bug("gradients of ranks are not averaged", "training/run.py", "            average_gradients(_parameters(optimizer))\n", "            pass\n", True),
    Bug("ranks read the same signals", "data/loader.py", "yield batch[own]", "yield batch[: len(batch) // self.num_ranks]", True),
    Bug("batch normalisation of each rank alone", "losses/discriminators.py", "if not self.training or world_size() == 1:", "if True:", True),
    Bug("adaptive weight of each rank alone", "losses/adversarial.py", "all_reduce_sum(full_precision(gradient))", "world_size() * full_precision(gradient)", True),
    Bug("entropy penalty with the wrong sign", "quantizers/vq.py", "(sample - batch)", "(batch - sample)"),
    Bug("entropy penalty ignores the mask", "quantizers/vq.py", "self.entropy_temperature, mask=mask, replicas", "self.entropy_temperature, replicas"),
    Bug("entropy temperature squared", "quantizers/vq.py", "self.codebook.to(z.dtype), self.entropy_temperature", "self.codebook.to(z.dtype), self.entropy_temperature**2"),
    Bug("cosine codes not normalised", "quantizers/vq.py", "return self._scaled(self.embedding)", "return self.embedding"),
    Bug("cosine z not normalised", "quantizers/vq.py", "        z = self._scaled(z)\n", ""),
    Bug("rotation without its length", "quantizers/_estimators.py", "q_norm / z_norm.clamp(min=_EPS) * rotated", "rotated"),
    Bug("rotation the wrong way round", "quantizers/_estimators.py", "2 * (z * u).sum(-1, keepdim=True) * v", "2 * (z * v).sum(-1, keepdim=True) * u"),
    Bug("straight-through keeps z's value", "quantizers/base.py", "return (z - z.detach()).add_(z_q.detach())", "return z + (z_q - z).detach()"),
    Bug("straight-through without gradient", "quantizers/base.py", "return (z - z.detach()).add_(z_q.detach())", "return z_q.detach() + 0 * z"),
    Bug("bfloat16 searched in bfloat16", "quantizers/base.py", "flat = full_precision(z.reshape(-1, self.dim))", "flat = z.reshape(-1, self.dim)"),
    Bug("autocast not switched off", "quantizers/base.py", "with torch.autocast(z.device.type, enabled=False):", "with torch.autocast(z.device.type, enabled=torch.is_autocast_enabled(z.device.type)):"),
    Bug("statistics ignore the mask", "quantizers/base.py", "index_statistics(out.indices, self.codebook_size, flat_mask, of", "index_statistics(out.indices, self.codebook_size, of"),
    Bug("infinity let through", "quantizers/base.py", "return low.isfinite() & high.isfinite()", "return ~low.isnan()"),
    Bug("index V accepted", "quantizers/base.py", "(indices < self.codebook_size)", "(indices <= self.codebook_size)"),
    Bug("perplexity in bits", "quantizers/base.py", "counts.count_nonzero() / codebook_size, entropy.exp()", "counts.count_nonzero() / codebook_size, entropy.exp2()"),
    Bug("EMA not summed over ranks", "quantizers/ema.py", "        all_reduce_sum(sums)\n", ""),
    Bug("EMA counts not summed over ranks", "quantizers/ema.py", "        all_reduce_sum(counts)\n", ""),
    Bug("EMA keeps only the last micro-batch", "quantizers/ema.py", "counts, sums = counts + self._pending[0], sums + self._pending[1]", "pass"),
    Bug("EMA statistics never cleared", "quantizers/ema.py", "        self._pending = None\n        all", "        all"),
    Bug("EMA updates in evaluation", "quantizers/ema.py", "        if self.training:\n", "        if True:\n"),
    Bug("EMA collects padding", "quantizers/ema.py", "rows = z if mask is None else torch.where(mask[:, None], z, 0)", "rows = z"),
    Bug("EMA counts padding", "quantizers/ema.py", "z.new_ones(z.shape[0]) if mask is None else mask.to(z.dtype)", "z.new_ones(z.shape[0])"),
    Bug("EMA sums do not decay", "quantizers/ema.py", "self.sums.mul_(decay[:, None]).add_(sums)", "self.sums.add_(sums)"),
    Bug("EMA unused codes vanish", "quantizers/ema.py", "(self.counts > _MIN_COUNT) & (counts.sum() > 0)", "(self.counts > -1) & (counts.sum() > 0)"),
    Bug("EMA decays without data", "quantizers/ema.py", "(self.counts > _MIN_COUNT) & (counts.sum() > 0)", "self.counts > _MIN_COUNT"),
    Bug("EMA moves the codes in forward", "quantizers/ema.py", "            self._collect(z.detach(), out.indices[:, 0], mask)\n", "            self._collect(z.detach(), out.indices[:, 0], mask)\n            self.after_step()\n"),
    Bug("splitting without halving counts", "quantizers/ema.py", "            self.counts[most] /= 2\n", "            self.counts[least] = limit\n"),
    Bug("splitting without halving sums", "quantizers/ema.py", "            self.sums[most] /= 2\n", ""),
    Bug("splitting without noise", "quantizers/ema.py", "self.sums[most] * noise", "self.sums[most]"),
    Bug("splitting noise ten times too large", "quantizers/ema.py", "_SPLIT_NOISE = 1e-3", "_SPLIT_NOISE = 1e-2"),
    Bug("splitting with the global generator", "quantizers/ema.py", "torch.rand(self.dim, generator=rng)", "torch.rand(self.dim)"),
    Bug("revival per rank", "quantizers/ema.py", "pool = gather_rows(self._draw(seen, len(dead)))", "pool = self._draw(seen, len(dead))"),
    Bug("revival with a generator that ranks advance differently", "quantizers/ema.py", "        pool = gather_rows(self._draw(seen, len(dead)))\n        chosen = self._draw(pool, len(dead))\n", "        rng = self._rng()\n        pool = gather_rows(seen[torch.randperm(len(seen), generator=rng)[: len(dead)]])\n        chosen = pool[torch.randperm(len(pool), generator=rng)[: len(dead)]]\n"),
    Bug("revival from padding", "quantizers/ema.py", "seen = (z if mask is None else z[mask])", "seen = z[5:]"),
    Bug("revival without counts", "quantizers/ema.py", "        self.counts[dead] = mean_count\n", ""),
    Bug("unit norm forgotten", "quantizers/ema.py", "functional.normalize(self.sums, dim=-1) if self.unit_norm else self.sums", "self.sums"),
    Bug("FSQ one level too few", "quantizers/fsq.py", "half = (levels - 1) / 2 * (1 - eps)", "half = (levels - 2) / 2 * (1 - eps)"),
    Bug("FSQ shift by tangent in every convention", "quantizers/fsq.py", '(offset / half).tan() if self.convention == "paper" else (offset / half).atanh()', "(offset / half).tan()"),
    Bug("FSQ without shift", "quantizers/fsq.py", '(offset / half).tan() if self.convention == "paper" else (offset / half).atanh()', "0 * half"),
    Bug("FSQ eps of the wrong sign", "quantizers/fsq.py", 'eps = -_EPS if self.convention == "wide" else _EPS', 'eps = _EPS if self.convention == "wide" else -_EPS'),
    Bug("FSQ rounds down", "quantizers/fsq.py", "level.round_().add_(grid.width)", "level.floor_().add_(grid.width)"),
    Bug("FSQ symmetric rounds down", "quantizers/fsq.py", "level.add_(0.5).floor_()", "level.floor_()"),
    Bug("FSQ gradient of the identity", "quantizers/fsq.py", "t * (grid.half / grid.width)", "z.reshape(t.shape)"),
    Bug("FSQ last channel fastest", "quantizers/fsq.py", "math.prod(levels[:i])", "math.prod(levels[i + 1 :])"),
    Bug("FSQ 32-bit indices", "quantizers/fsq.py", "(digits.double() @ self.basis.double()).long()", "(digits.int() * self.basis.int()).sum(-1, dtype=torch.int32).long()"),
    Bug("FSQ indices in float32", "quantizers/fsq.py", "(digits.double() @ self.basis.double()).long()", "(digits.float() @ self.basis.float()).long()"),
    Bug("FSQ indices in float64 beyond 2^53", "quantizers/fsq.py", "_EXACT_IN_FLOAT64 = 2**53", "_EXACT_IN_FLOAT64 = 2**63"),
    Bug("FSQ codes in bfloat16 arithmetic", "quantizers/fsq.py", "self._codes(digits, self._grid(full_precision(self._like).dtype))", "self._codes(digits.to(self._like.dtype), self._grid(self._like.dtype))"),
    Bug("LFQ highest bit first", "quantizers/lfq.py", "return torch.arange(self.dim, device=like.device)", "return torch.arange(self.dim, device=like.device).flip(0)"),
    Bug("LFQ zero counts as positive", "quantizers/lfq.py", "bits = z > 0", "bits = z >= 0"),
    Bug("LFQ logit without its factor", "quantizers/lfq.py", "logits = 4 * self.scale", "logits = 2 * self.scale"),
    Bug("LFQ scale left out of the logit", "quantizers/lfq.py", "logits = 4 * self.scale / self", "logits = 4 / self"),
    Bug("LFQ batch entropy ignores the mask", "quantizers/lfq.py", "_batch_mean(_joint(group), mask)", "_batch_mean(_joint(group), None)"),
    Bug("LFQ bit order inside a group", "quantizers/lfq.py", "joint * (1 - bit[:, None]), joint * bit[:, None]", "joint * (1 - bit[:, None]), joint * (1 - bit[:, None])"),
    Bug("IBQ commitment and codebook swapped", "quantizers/ibq.py", "            commitment_weight=self.commitment_weight,\n            codebook_weight=self.codebook_weight,\n            entropy", "            commitment_weight=self.codebook_weight,\n            codebook_weight=self.commitment_weight,\n            entropy"),
    Bug("IBQ nearest in evaluation", "quantizers/ibq.py", 'nearest(z, codebook, metric="dot")', "nearest(z, codebook)"),
    Bug("IBQ ignores the mask", "quantizers/ibq.py", "            mask=mask,\n", ""),
    Bug("IBQ soft term left out of the evaluation loss", "quantizers/ibq.py", "(1 + self.commitment_weight + self.codebook_weight)", "(self.commitment_weight + self.codebook_weight)"),
    Bug("IBQ codebook too small at the start", "quantizers/ibq.py", "std=self.codebook_std)", "std=0.1 * self.codebook_std)"),
    Bug("SimVQ decodes from the raw basis", "quantizers/base.py", "functional.embedding(indices[..., 0], self._read_codebook())", 'functional.embedding(indices[..., 0], getattr(self, "basis", self.codebook))'),
    Bug("SimVQ's codes are projected once for all", "quantizers/_remembered.py", "last is not None and all(map(_alike, sources, last[0]))", "last is not None"),
    Bug("SimVQ without bias", "quantizers/simvq.py", "full_precision(weight), full_precision(bias))", "full_precision(weight))"),
    Bug("SimVQ basis of unit variance", "quantizers/simvq.py", "std=self.dim**-0.5", "std=1.0"),
    Bug("SimVQ basis trained", "quantizers/simvq.py", 'self.register_buffer("basis", torch.empty(codebook_size, dim))', 'self.register_parameter("basis", nn.Parameter(torch.empty(codebook_size, dim)))'),
    Bug("SimVQ codes under autocast", "quantizers/simvq.py", "with torch.autocast(weight.device.type, enabled=False):", "with torch.autocast(weight.device.type, enabled=torch.is_autocast_enabled(weight.device.type)):"),
    Bug("residual not detached", "quantizers/residual.py", "code = out.z_q.detach()", "code = out.z_q"),
    Bug("residual loss summed", "quantizers/residual.py", "torch.stack(losses).mean()", "torch.stack(losses).sum()"),
    Bug("residual stages see z", "quantizers/residual.py", "residual = residual - code", "residual = residual"),
    Bug("residual decodes the first stage twice", "quantizers/residual.py", "indices[..., k : k + 1]", "indices[..., k - 1 : k]"),
    Bug("residual stages share their codes", "quantizers/base.py", "return self.fresh_copy() if stage else self", "return self"),
    Bug("residual bits not scaled", "quantizers/lfq.py", "other.scale = self.scale * 2.0**-stage", "pass"),
    Bug("fresh copies keep the codes", "quantizers/base.py", "        other.reset_parameters()\n", ""),
    Bug("grouped loss summed", "quantizers/grouped.py", "loss=torch.stack([out.loss for out in outs]).mean()", "loss=torch.stack([out.loss for out in outs]).sum()"),
    Bug("grouped decoding in the wrong order", "quantizers/grouped.py", "return torch.cat([group._lookup(part)", "return torch.cat([group._lookup(part.flip(-1))"),
    Bug("Gumbel noise of the wrong sign", "quantizers/gumbel.py", "noise = -torch.empty_like(logits).exponential_().log()", "noise = torch.empty_like(logits).exponential_().log()"),
    Bug("Gumbel noise in evaluation", "quantizers/gumbel.py", "        if self.training:\n", "        if True:\n"),
    Bug("Gumbel temperature not applied to the noise", "quantizers/gumbel.py", "((logits + noise) / self.temperature.to(z.dtype))", "(logits / self.temperature.to(z.dtype) + noise)"),
    Bug("Gumbel KL ignores the mask", "quantizers/gumbel.py", "masked_mean(kl_to_uniform(logits), mask)", "masked_mean(kl_to_uniform(logits), None)"),
    Bug("Gumbel KL without log V", "quantizers/gumbel.py", "math.log(logits.shape[-1]) + (", "("),
    Bug("Gumbel soft output", "quantizers/gumbel.py", "functional.embedding(indices, codebook) + (relaxed - relaxed.detach())", "relaxed"),
    Bug("SCQ commitment moves the codes", "quantizers/scq.py", "commitment = mean_squared(z, z_q.detach(), mask)", "commitment = mean_squared(z, z_q, mask)"),
    Bug("SCQ loss ignores the mask", "quantizers/scq.py", "codebook = mean_squared(z.detach(), z_q, mask)", "codebook = mean_squared(z.detach(), z_q, None)"),
    Bug("SCQ lambda not scaled by the codes", "quantizers/scq.py", "return self.lambda_rel * codebook.detach().square().sum(-1).mean().clamp(min=floor)", "return codebook.new_tensor(self.lambda_rel)"),
    Bug("SCQ hard mode outputs the soft code", "quantizers/scq.py", "z_q = code.z_q if self.is_soft else straight_through(code.z_q, hard)", "z_q = code.z_q"),
    Bug("SCQ Newton system without lambda", "ops/_convex_solver.py", "codes.mT @ codes + self.lambda_ * _eye(codes)", "codes.mT @ codes + _eye(codes)"),
    Bug("SCQ simplex sums to two", "ops/simplex.py", "(total - 1) / size", "(total - 2) / size"),
    Bug("SCQ projection's gradient not centred", "ops/simplex.py", "torch.where(support, g - g.sum(-1, keepdim=True) / size, 0)", "torch.where(support, g, 0)"),
    Bug("attention sees the future", "attention.py", "is_causal=self.causal and cache is None", "is_causal=False"),
    Bug("rotary pairs turned the wrong way", "attention.py", "table[1, :, ::2].neg_()", "table[1, :, 1::2].neg_()"),
    Bug("rotary on values too", "attention.py", "            v = qkv[:, :, 2].transpose(1, 2)\n", "            v = rotate(qkv[:, :, 2], *rotation).transpose(1, 2)\n"),
    Bug("rotary axes swapped", "attention.py", "for axis in reversed(coordinates)]", "for axis in coordinates]"),
    Bug("cache masks one position too few", "attention.py", "seen.tril(self.filled)", "seen.tril(self.filled + 1)"),
    Bug("static cache sees what is not filled", "attention.py", "self.mask = self.places <= self.rows[:, None]", "self.mask = self.places <= self.rows[:, None] + 1"),
    Bug("cache keeps the null half", "attention.py", "self.values = [None if values is None else values[:batch_size]", "self.values = [None if values is None else values[-batch_size:]"),
    Bug("adaptive gate left out", "transformer.py", "out = x + gate * self.dropout(", "out = x + self.dropout("),
    Bug("adaptive scale not about one", "transformer.py", "f(norm(x) * (1 + scale) + shift)", "f(norm(x) * scale + shift)"),
    Bug("linear of two rows drops the second", "attention.py", "x.reshape(2, -1).t()", "x.reshape(2, -1)[:1].expand(2, -1).t()"),
    Bug("gate and value of SwiGLU exchanged", "transformer.py", "functional.silu(gate) * value", "functional.silu(value) * gate"),
    Bug("guidance of the wrong sign", "generators/sampling.py", "unconditional + scale * (conditional - unconditional)", "conditional + scale * (unconditional - conditional)"),
    Bug("guidance one too strong", "generators/sampling.py", "unconditional + scale * (conditional - unconditional)", "conditional + scale * (conditional - unconditional)"),
    Bug("top-p drops the token that crosses it", "generators/sampling.py", "before >= top_p", "before + probabilities >= top_p"),
    Bug("top-k keeps one more", "generators/sampling.py", "logits.topk(top_k, dim=-1)", "logits.topk(top_k + 1, dim=-1)"),
    Bug("temperature multiplies", "generators/sampling.py", "truncated(logits / temperature", "truncated(logits * temperature"),
    Bug("tokens of probability 0 are drawn", "generators/sampling.py", "threshold, right=True)", "threshold)"),
    Bug("noise of the batch, not of the sample", "generators/sampling.py", "torch.rand(shape, generator=one) for one in rng", "torch.rand(shape, generator=rng[0]) for _ in rng"),
    Bug("sampling in training mode", "generators/sampling.py", "        self.eval()\n", ""),
    Bug("sampling leaves eval mode", "generators/sampling.py", "                part.training = training\n", "                pass\n"),
    Bug("delay of the wrong codebooks", "generators/orders.py", "[:, None] - codebooks\n", "[:, None] - codebooks.flip(0)\n"),
    Bug("empty slots hold a token", "generators/orders.py", ".where(inside, -1)", ".where(inside, 0)"),
    Bug("next token is the token itself", "generators/ar.py", "self._embed(steps[:, :-1], 0)", "self._embed(steps[:, 1:], 0)"),
    Bug("codebooks share rows", "generators/ar.py", "rows = steps + codebooks * self.space.codebook_size", "rows = steps + 0 * codebooks"),
    Bug("head of the wrong codebook", "generators/ar.py", "codebook = step % self.space.num_codebooks", "codebook = (step + 1) % self.space.num_codebooks"),
    Bug("guided half not fed the drawn token", "generators/ar.py", "x = torch.cat([x, x])", "x = torch.cat([x, torch.zeros_like(x)])"),
    Bug("guidance ends a step early", "generators/ar.py", "default=0)\n        x = self.conditioner", "default=1) - 1\n        x = self.conditioner"),
    Bug("digits of the wrong place", "generators/digits.py", "// self.places % self.bases", "% self.bases"),
    Bug("a digit one beyond its base", "generators/base.py", ">= sizes[:, None]", "> sizes[:, None]"),
    Bug("training hides one more", "generators/schedules.py", ".ceil().long().clamp(min=1)", ".ceil().long().add(1)"),
    Bug("decoding schedule not a cosine", "generators/schedules.py", "math.cos(math.pi / 2 * progress), 1e-6", "1 - progress, 1e-6"),
    Bug("shown tokens are hidden again", "generators/maskgit.py", "confidence = confidence.masked_fill(~masked, torch.inf)", "confidence = confidence + 0"),
    Bug("drawn tokens replace shown ones", "generators/maskgit.py", "tokens = torch.where(masked, drawn, tokens)", "tokens = drawn"),
    Bug("hidden tokens are seen", "generators/maskgit.py", "embedded = torch.where(masked[..., None], self._special[-1], self.codes", "embedded = torch.where(masked[..., None] & False, self._special[-1], self.codes"),
    Bug("no label smoothing", "generators/maskgit.py", "- label_smoothing * log_p.mean(-1)", ""),
    Bug("loss counts shown tokens", "generators/maskgit.py", "weight = masked / (masked.sum(-1, keepdim=True) * len(masked))", "weight = torch.ones_like(nll) / nll.numel()"),
    Bug("choice noise does not cool", "generators/maskgit.py", "confidence += choice_temperature * (1 - progress)", "confidence += choice_temperature"),
    Bug("fine pass sees the true codes' clusters shifted", "generators/coarse_to_fine.py", "rows = labels + torch.arange(self.num_codebooks", "rows = labels.roll(1, 1) + torch.arange(self.num_codebooks"),
    Bug("fine pass is causal", "generators/coarse_to_fine.py", "rotary=places, causal=False", "rotary=places, causal=True"),
    Bug("clusters ignore normalize", "generators/coarse_to_fine.py", "        if self.normalize:\n", "        if False:\n"),
    Bug("any code of any cluster", "generators/coarse_to_fine.py", "        if restrict_to_cluster:\n", "        if False:\n"),
    Bug("fine guidance left out", "generators/coarse_to_fine.py", "if scale == 1 or condition is None:", "if True:"),
    Bug("code length without the coarse part", "generators/coarse_to_fine.py", "return self.coarse.bits(labels, condition) + fine", "return fine"),
    Bug("the null is a class", "conditioners/label.py", "self.embedding.weight[-1].expand", "self.embedding.weight[0].expand"),
    Bug("UViM's vectors not standardised", "quantizers/uvim_vq.py", "functional.layer_norm(z, (self.dim,))", "z"),
    Bug("UViM's codes not split", "quantizers/uvim_vq.py", 'dead_codes: DeadCodes = "split"', 'dead_codes: DeadCodes = "keep"'),
    Bug("codes not shifted by the start token", "generators/encoder_decoder.py", "self._within_limits(logits[..., 1:], 0)", "self._within_limits(logits[..., :-1], 0)"),
    Bug("the decoder sees the token it predicts", "generators/encoder_decoder.py", "functional.pad(tokens[:, :-1], (1, 0), value=_START)", "tokens"),
    Bug("a cached step at the first place", "generators/encoder_decoder.py", "self.positions[step]", "self.positions[0]"),
]  # fmt: skip


def plant(bug: Bug, folder: Path) -> None:
    """Copy what the tests need into ``folder`` and break it there."""
    for name in ("tessella", *bug.tests):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "tessella" / bug.file
    text = path.read_text()
    if text.count(bug.old) != 1:
        raise SystemExit(f"{bug.name!r}: the text to replace occurs {text.count(bug.old)} times in {bug.file}")
    path.write_text(text.replace(bug.old, bug.new))


def first_failure(bug: Bug) -> str | None:
    """The first test that notices, or None; tests of the broken file run first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(bug, folder)
        soft = bug.name.startswith("SCQ")
        own = "test_ranks.py" if bug.over_ranks else f"test_{'scq' if soft else Path(bug.file).stem.lstrip('_')}.py"
        tests = sorted(
            # Of the operations' tests, which take long, only the one that SCQ's bugs need.
            (path for path in folder.rglob("test_*.py") if path.parent.name != "ops" or path.name == "test_simplex.py"),
            key=lambda path: (path.name != own, "distr" in path.name, path),
        )
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not TestCompile and not slow" if soft else SELECTION,
            *map(str, tests),
        ]
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S*?(test_\S+::.*?)(?: - |$)", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(
            f"{bug.name!r}: pytest ended without naming a test\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
        )
    return found[1]


def main() -> int:
    """Run all bugs, or those named on the command line."""
    wanted = set(sys.argv[1:])
    unknown = wanted - {bug.name for bug in BUGS}
    if unknown:
        raise SystemExit(f"unknown bugs: {', '.join(sorted(unknown))}")
    survivors = 0
    print("| bug | file | caught by |\n|---|---|---|", flush=True)
    for bug in BUGS:
        if wanted and bug.name not in wanted:
            continue
        caught = first_failure(bug)
        survivors += caught is None
        print(f"| {bug.name} | {bug.file} | {caught or '**survived**'} |", flush=True)
    print(f"\n{survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
