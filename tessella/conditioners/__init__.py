"""Conditions of generation."""
