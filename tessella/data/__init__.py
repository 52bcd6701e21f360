"""Pictures in, batches out: one file per source of pictures, and the Parquet shards that tokens are kept in."""

from __future__ import annotations
