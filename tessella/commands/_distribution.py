"""What distances between distributions are measured against."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast, get_args

from tessella.commands._data import data_of, named, open_data, total
from tessella.commands._progress import counted
from tessella.data.base import Samples, Split
from tessella.evaluation.features import FeatureNetwork, Features
from tessella.evaluation.protocols import load_adm_reference
from tessella.evaluation.reference import ReferenceStatistics, reference_features, reference_statistics
from tessella.tokenizer import Tokenizer


def reference_of(
    reference: str, tokenizer: Tokenizer, network: FeatureNetwork, *, data: str | None, whole: bool, limit: int | None
) -> ReferenceStatistics:
    """The statistics that ``reference`` names: a part of the data, or a published file."""
    if reference not in get_args(Split):
        return load_adm_reference(reference)
    split = cast(Split, reference)
    section = data_of(tokenizer, data, whole=whole, split=split)
    dataset = open_data(section, split)
    num_samples = total(dataset, limit)
    with counted(f"features of {num_samples} originals", num_samples) as progress:
        return reference_statistics(
            dataset, network, _cache(), name=named(section, split), num_images=limit and num_samples, progress=progress
        )


def features_of(dataset: Samples, network: FeatureNetwork, limit: int | None) -> Features:
    """The features of real signals, kept for the next time in the user's cache folder."""
    num_samples = total(dataset, limit)
    with counted(f"features of {num_samples} originals", num_samples) as progress:
        return reference_features(dataset, network, _cache(), num_images=limit and num_samples, progress=progress)


def _cache() -> Path:
    """The user's folder of features that are computed once."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tessella"
