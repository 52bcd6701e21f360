"""How a model's codes are used on a data set: counted once, and kept in the model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from tessella.commands._data import batches, describe, medium_of
from tessella.data.base import Samples
from tessella.explorer.codebook import CodebookUse, codebook_use, kept_use
from tessella.registry import Spec
from tessella.tokenizer import Tokenizer

FOLDER = "explorer"
_SIGNALS = 512


def counted(model: Path, tokenizer: Tokenizer, section: Spec, dataset: Samples) -> CodebookUse:
    """Counts and patches of the first signals of ``dataset``, the held-out part of ``section``."""

    def count() -> CodebookUse:
        return codebook_use(
            tokenizer, medium_of(tokenizer, section), batches(dataset, limit=_SIGNALS, title="counting codes")
        )

    about = json.dumps({**describe(section, "test"), "signals": min(len(dataset), _SIGNALS)}, sort_keys=True)
    return kept_use(model / FOLDER, tokenizer, about, count)
