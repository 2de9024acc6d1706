"""Spans: what a rank does when."""
