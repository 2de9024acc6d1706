"""Runs as their files tell them: what is in them, how they ended, what is missing."""
