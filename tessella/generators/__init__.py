"""Generators: next-token, masked, coarse-to-fine."""
