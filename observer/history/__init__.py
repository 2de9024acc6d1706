"""Runs as their journals tell them: no cluster, no rank."""
