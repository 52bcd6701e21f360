"""Coarse-to-fine generation (CTF, 2503.16194): clusters of similar codes token by token, then all codes at once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessella.attention import Rotary
from tessella.conditioners.base import Conditioner
from tessella.config import build, resolve
from tessella.generators.base import Generator, Guidance, Loss
from tessella.generators.heads import CodebookHeads, zero_head
from tessella.generators.sampling import (
    Rng,
    check_guidance,
    check_settings,
    choose,
    guided,
    inference,
    one_each,
    uniforms,
)
from tessella.ops import kmeans, nearest
from tessella.tokenizer import TokenSpace
from tessella.transformer import Transformer

_KMEANS_ITERATIONS = 100
_KMEANS_RESTARTS = 10


class FinePredictor(nn.Module):
    """p(fine | coarse) for all positions at once: a transformer that sees every coarse label and the condition.

    Args:
        space: the fine tokens.
        num_clusters: C.
        conditioner: the section of a conditioner; its vectors stand before the labels.
        dim: width.
        num_layers: blocks.
        num_heads: of attention.
        hidden: width inside a block's MLP; None is the transformer's own.
        rotary: positions on the latent grid after a prefix without positions, or after one whose queries and keys are
            zero (LlamaGen); that of an autoregressive coarse part, to look at places the same way.
        dropout: of the embeddings, and of what a block adds.
    """

    def __init__(
        self,
        space: TokenSpace,
        num_clusters: int,
        *,
        conditioner: dict[str, Any],
        dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        hidden: int | None = None,
        rotary: Literal["grid", "grid_zero_prefix"] = "grid",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.conditioner: Conditioner = build("conditioners", conditioner, dim=dim)
        self.num_codebooks = space.num_codebooks
        self.num_clusters = num_clusters
        # Each codebook has labels and codes of its own.
        self.labels = nn.Embedding(space.num_codebooks * num_clusters, dim)
        self.dropout = nn.Dropout(dropout)
        places = Rotary(
            space.grid,
            prefix=self.conditioner.length,
            prefix_zero=rotary == "grid_zero_prefix",
            repeat=space.num_codebooks,
        )
        self.transformer = Transformer(
            dim, num_layers, num_heads, hidden=hidden, rotary=places, causal=False, dropout=dropout
        )
        self.head: nn.Module = (
            zero_head(dim, space.codebook_size) if space.num_codebooks == 1
            else CodebookHeads(dim, space.num_codebooks, space.codebook_size)
        )  # fmt: skip
        nn.init.normal_(self.labels.weight, std=0.02)

    def forward(self, labels: Tensor, context: Tensor) -> Tensor:
        """Logits ``[B, N, V]`` (float32) of coarse labels ``[B, *S, K]`` after ``context [B, M, dim]``."""
        rows = labels + torch.arange(self.num_codebooks, device=labels.device) * self.num_clusters
        x = self.dropout(torch.cat([context, self.labels(rows.flatten(1))], 1))
        logits: Tensor = self.head(self.transformer(x)[:, context.shape[1] :])
        return (logits.flatten(1, 2) if isinstance(self.head, CodebookHeads) else logits).float()


class CoarseToFine(Generator):
    r"""p(coarse) by any generator over C clusters of codes, then p(fine | coarse) in a single pass.

    Codes are clustered by k-means (:meth:`fit_codebook`); a token's coarse label is its code's cluster. The loss is

    .. math:: L = L_{coarse}(c) - \frac{1}{N} \sum_n ln \, p(k_n | c), \quad c = labels[k]

    with the true coarse labels in both terms. The two parts share no parameters: each gets the gradient that it would
    get alone, and only clipping by the norm of all gradients ties one to the other.

    Args:
        space: the fine tokens.
        num_clusters: C.
        coarse: the section of a generator, without its conditioner; its tokens are the C labels.
        fine: the arguments of :class:`FinePredictor` that are not here.
        conditioner: the section of a conditioner; both parts have one of their own.
        normalize: cluster the directions of the codes, which are what a cosine quantizer's decoder sees.
        coarse_noise: probability with which training shows the fine predictor a random label instead of the true one.
    """

    labels: Tensor
    fitted: Tensor

    def __init__(
        self,
        space: TokenSpace,
        *,
        num_clusters: int = 512,
        coarse: dict[str, Any],
        fine: dict[str, Any],
        conditioner: dict[str, Any],
        normalize: bool = True,
        coarse_noise: float = 0.0,
    ) -> None:
        super().__init__(space)
        if not 2 <= num_clusters <= space.codebook_size:
            raise ValueError(
                f"num_clusters must lie in [2, {space.codebook_size}] (the codebook size), got {num_clusters}"
            )
        if not 0 <= coarse_noise <= 1:
            raise ValueError(f"coarse_noise must lie in [0, 1], got {coarse_noise}")
        self.num_clusters = num_clusters
        self.normalize = normalize
        self.coarse_noise = coarse_noise
        self.coarse: Generator = build(
            "generators", {"conditioner": conditioner, **coarse}, space=replace(space, codebook_size=num_clusters)
        )
        given = frozenset({"space", "num_clusters", "conditioner"})
        settings = resolve(FinePredictor, fine, where="fine", given=given)
        self.fine = FinePredictor(space, num_clusters, conditioner=conditioner, **settings)
        self.register_buffer("labels", torch.zeros(space.num_codebooks, space.codebook_size, dtype=torch.long))
        self.register_buffer("fitted", torch.tensor(False))
        self._seen_fitted = False

    @torch.no_grad()
    def fit_codebook(self, codebook: Tensor, *, seed: int) -> None:
        """Cluster the codes; needed once, before training. The map is part of the state dict.

        Always on the CPU, so that it is the same wherever and on however many ranks it is computed.

        Args:
            codebook: ``[V, D]``, or ``[K, V, D]`` with one table for each of K codebooks.
            seed: of k-means++.

        Raises:
            ValueError: another shape, or fewer distinct codes than clusters.
        """
        tables = codebook.detach().float().cpu()
        tables = tables[None] if tables.ndim == 2 else tables
        if tables.ndim != 3 or tables.shape[:2] != self.labels.shape:
            expected = "[V, D]" if len(self.labels) == 1 else "[K, V, D]"
            raise ValueError(
                f"codebook must be {expected} of K, V = {list(self.labels.shape)}, got {list(codebook.shape)}"
            )
        if self.normalize:
            tables = functional.normalize(tables, dim=-1)
        rng = torch.Generator().manual_seed(seed)
        centres = torch.stack([self._centres(table, rng) for table in tables])
        labels = torch.stack([nearest(table, own) for table, own in zip(tables, centres, strict=True)])
        self.labels.copy_(labels)
        self.fitted.fill_(True)
        self.coarse.fit_codebook(centres, seed=seed)

    def _centres(self, codes: Tensor, rng: torch.Generator) -> Tensor:
        num_distinct = len(codes.unique(dim=0))
        if num_distinct < self.num_clusters:
            what = "distinct directions of codes (normalize)" if self.normalize else "distinct codes"
            raise ValueError(f"num_clusters = {self.num_clusters}, but there are only {num_distinct} {what}")
        return kmeans(
            codes, self.num_clusters, num_iterations=_KMEANS_ITERATIONS, rng=rng, num_restarts=_KMEANS_RESTARTS
        )

    def coarse_indices(self, indices: Tensor) -> Tensor:
        """The cluster of every code: ``[..., K]`` of ``indices [..., K]``.

        Raises:
            RuntimeError: the codes are not clustered yet.
        """
        self._require_fitted()
        return self.labels[torch.arange(len(self.labels), device=indices.device), indices]

    def forward(self, indices: Tensor, condition: Tensor | None) -> Loss:
        """See :meth:`Generator.forward`; ``coarse`` and ``fine`` are the two terms.

        Raises:
            RuntimeError: the codes are not clustered yet.
        """
        self.check_indices(indices)
        labels = self.coarse_indices(indices)
        coarse = self.coarse(labels, condition)
        logits = self.fine(self._with_noise(labels), self.fine.conditioner(condition, len(indices)))
        fine = functional.cross_entropy(logits.flatten(0, 1), indices.flatten())
        parts = {"coarse": coarse.loss.detach(), "fine": fine.detach()}
        return Loss(
            coarse.loss + fine, {**{f"coarse_{name}": value for name, value in coarse.metrics.items()}, **parts}
        )

    @inference
    def sample(
        self,
        condition: Tensor | None,
        *,
        rng: Rng = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: Guidance = 1.0,
        known: Tensor | None = None,
        fine_temperature: float | None = None,
        fine_guidance: float | None = None,
        fine_top_k: int | None = None,
        restrict_to_cluster: bool = False,
    ) -> Tensor:
        """See :meth:`Generator.sample`, whose settings are those of the coarse labels; one fine pass follows.

        Args:
            condition, rng, temperature, top_k, top_p, guidance, known: see there.
            fine_temperature: of the codes; None is ``temperature``.
            fine_guidance: of the codes; None is ``guidance``, a schedule's value at progress 0.
            fine_top_k: of the codes; None keeps all.
            restrict_to_cluster: draw only codes of the cluster that the coarse label names.

        Raises:
            RuntimeError: the codes are not clustered yet.
        """
        self._require_fitted()
        rng = one_each(rng, condition)
        fine_temperature = temperature if fine_temperature is None else fine_temperature
        if fine_guidance is None:
            fine_guidance = guidance(0.0) if callable(guidance) else guidance
        check_settings(self.space.codebook_size, temperature=fine_temperature, top_k=fine_top_k, top_p=None)
        check_guidance(fine_guidance)
        known_labels = None
        if known is not None:
            self.check_known(known, len(rng))
            known_labels = self.coarse_indices(known.clamp(min=0)).masked_fill(known < 0, -1)
        labels = self.coarse.sample(
            condition, rng=rng, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance,
            known=known_labels,
        )  # fmt: skip
        logits = self._guided_fine_logits(labels, condition, fine_guidance)
        if restrict_to_cluster:
            logits = self._within_cluster(logits, labels)
        uniform = uniforms(rng, self.space.sequence_length, device=logits.device)
        codes = choose(logits, uniform, temperature=fine_temperature, top_k=fine_top_k).view_as(labels)
        return codes if known is None else torch.where(known < 0, codes, known)

    @inference
    def bits(self, indices: Tensor, condition: Tensor | None) -> Tensor:
        """See :meth:`Generator.bits`: the coarse labels, then each code among those of its cluster."""
        self.check_indices(indices)
        labels = self.coarse_indices(indices)
        logits = self.fine(labels, self.fine.conditioner(condition, len(indices)))
        log_p = self._within_cluster(logits, labels).log_softmax(-1)
        fine = -log_p.gather(-1, indices.flatten(1)[..., None])[..., 0].double().sum(-1) / math.log(2)
        return self.coarse.bits(labels, condition) + fine

    def _require_fitted(self) -> None:
        # Reading the buffer waits for the device, so only until it was once seen set, which nothing but a state dict
        # undoes. A compiled graph cannot branch on values.
        if self._seen_fitted or torch.compiler.is_compiling():
            return
        self._seen_fitted = bool(self.fitted)
        if not self._seen_fitted:
            raise RuntimeError("the codes are not clustered: call fit_codebook(tokenizer.quantizer.codebook, seed=...) "
                               "before training, or load a state dict")  # fmt: skip

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen_fitted = False

    def _with_noise(self, labels: Tensor) -> Tensor:
        if not self.training or self.coarse_noise == 0:
            return labels
        wrong = torch.rand(labels.shape, device=labels.device) < self.coarse_noise
        return torch.where(wrong, torch.randint_like(labels, self.num_clusters), labels)

    def _guided_fine_logits(self, labels: Tensor, condition: Tensor | None, scale: float) -> Tensor:
        context = self.fine.conditioner(condition, len(labels))
        if scale == 1 or condition is None:
            logits: Tensor = self.fine(labels, context)
            return logits
        both = torch.cat([context, self.fine.conditioner.null(len(labels))])
        conditional, null = self.fine(torch.cat([labels, labels]), both).chunk(2)
        return guided(conditional, null, scale)

    def _within_cluster(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``logits [B, N, V]`` with -inf for codes of other clusters than ``labels [B, *S, K]``."""
        # [B, P, K, V]: does the cluster of code v of codebook k differ from the position's label?
        outside = labels.flatten(1, -2)[..., None] != self.labels
        return logits.masked_fill(outside.flatten(1, 2), -torch.inf)
