"""Beside somebody's script: what it is told, what guards it, how it ends."""
