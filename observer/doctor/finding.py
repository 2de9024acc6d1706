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
