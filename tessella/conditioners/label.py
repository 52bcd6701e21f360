"""A class label."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tessella.conditioners.base import Conditioner
from tessella.ops.ranges import check_range


class Label(Conditioner):
    """One vector for each class, from one table whose last row is the null (as in LlamaGen, 1000 + 1 rows).

    Args:
        num_classes: labels are in ``[0, num_classes)``.
        class_names: what people call them; none, or one each.
        dim, dropout: see :class:`Conditioner`.
    """

    batch_key = "label"

    def __init__(self, num_classes: int, dim: int, *, class_names: Sequence[str] = (), dropout: float = 0.1) -> None:
        super().__init__(dim, dropout=dropout)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if class_names and len(class_names) != num_classes:
            raise ValueError(f"{num_classes} classes but {len(class_names)} class_names")
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    @property
    def length(self) -> int:
        """See :attr:`Conditioner.length`."""
        return 1

    def null(self, batch_size: int) -> Tensor:
        """See :meth:`Conditioner.null`."""
        return self.embedding.weight[-1].expand(batch_size, 1, -1)

    def embed(self, condition: Tensor) -> Tensor:
        """See :meth:`Conditioner.embed`; ``condition [B]`` integers."""
        if condition.ndim != 1 or condition.is_floating_point():
            raise ValueError(f"labels must be integers [B], got {condition.dtype} {list(condition.shape)}")
        check_range(condition, self.num_classes, "labels")
        embedded: Tensor = self.embedding(condition)[:, None]
        return embedded
