"""Which of several failures is the cause."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from swanlab_ray.actors.wire.events import State

TERMINATED = "SIGTERM"
"""How the error of a rank begins that was told to end."""


class HowItEnded(Protocol):
    """A life of a rank."""

    @property
    def state(self) -> str: ...
    @property
    def error(self) -> str | None: ...
    @property
    def ended_ns(self) -> int: ...


AnyLife = TypeVar("AnyLife", bound=HowItEnded)


def failures(lives: Iterable[AnyLife]) -> list[AnyLife]:
    """Those that have not ended well, the cause first: the first to fail, but for ranks that were told to end."""
    bad = [life for life in lives if life.state != "success"]
    return sorted(bad, key=lambda life: ((life.error or "").startswith(TERMINATED), life.ended_ns))


def state_of(cause: HowItEnded) -> State:
    """How a run ended that this is the cause of."""
    return "aborted" if cause.state == "aborted" else "crashed"
