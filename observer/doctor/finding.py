"""What an examination finds."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at."""

    state: Literal["ok", "note", "wrong"]
    """``note``: it works, but one should know. ``wrong``: a training would lose something, or would not be seen."""
    about: str
    told: str
    """What was found, and what to do about it."""


def phrase(error: Exception) -> str:
    """A sentence without its full stop; one that stands by itself is a character that the sentence names."""
    text = str(error)
    return text.removesuffix(".") if not text.endswith(" .") else text
