"""Whole data sets to token shards: one idempotent unit of work, a plan of such units, and ways to have them done."""

from __future__ import annotations
