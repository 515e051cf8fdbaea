"""Subspaces: where a gradient lives."""
