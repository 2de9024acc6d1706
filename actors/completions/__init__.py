"""Rows of completions, until they are tables."""
