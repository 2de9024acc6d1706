"""Between the threads that log and the flusher: a deque with a bound. Those who put something in never wait."""

from __future__ import annotations

import threading
from collections import deque

from swanlab_ray.observer.encoding.numbers import Deferred
from swanlab_ray.observer.script.notices import warn_once

QUEUE_BYTES = 256 << 20
"""How far those who log may be ahead of the flusher; the oldest events go first, and are counted."""
SLOT_BYTES = 4096
"""What an event counts as at least, so that for most of them it is enough to look how many there are."""
TAKEN_AT_ONCE = 512
"""Events for which those who log may have to wait, should there be no room just then."""


class EventQueue(deque["bytes | Deferred"]):
    """Events, encoded or still to be. Append one below :data:`SLOT_BYTES` while there are less than :attr:`room`, else
    :meth:`put` it."""

    __slots__ = ("_excess", "counting", "late", "overflowed", "refused", "room")

    def __init__(self) -> None:
        super().__init__()
        self._excess = 0
        self.room = QUEUE_BYTES // SLOT_BYTES
        """Events that may be in it now."""
        self.overflowed = 0
        """Events that were dropped for want of room."""
        self.late = 0
        """Events that came after the end."""
        self.refused = 0
        """Values and calls that are wrong, and no events."""
        self.counting = threading.RLock()
        """Held for a moment by who changes these numbers or takes something out, and by who moves events on: one lock,
        since a signal handler may interrupt whoever holds it, and ask for the counts."""

    def put(self, event: bytes | Deferred) -> None:
        """Append an event, or drop the oldest ones to make room. Never blocks."""
        self._occupy(_excess([event]))
        while self and len(self) >= self.room:
            self._drop_oldest()
        self.append(event)

    def _drop_oldest(self) -> None:
        with self.counting:
            if not self:
                return  # the flusher has just taken it
            oldest = self.popleft()
            self.overflowed += 1
            self._occupy(-_excess([oldest]))
        if isinstance(oldest, Deferred):
            oldest.lost()

    def _occupy(self, excess: int) -> None:
        if excess:
            with self.counting:
                self._excess += excess
                self.room = (QUEUE_BYTES - self._excess) // SLOT_BYTES

    def refuse(self) -> None:
        """Count a value or a call that is not logged, since it is wrong."""
        with self.counting:
            self.refused += 1

    def put_late(self, event: object) -> None:
        """Count an event that comes after the end, and say so once."""
        with self.counting:
            self.late += 1
        _warn_late()

    # What only the flusher does, or who is in its place.

    def take(self) -> list[bytes]:
        """Take out the oldest events, :data:`TAKEN_AT_ONCE` of them at the most, up to one that is still to be
        encoded."""
        taken: list[bytes] = []
        with self.counting:
            for _ in range(min(len(self), TAKEN_AT_ONCE)):
                event = self.popleft()
                if isinstance(event, Deferred):
                    self.appendleft(event)
                    break
                taken.append(event)
            self._occupy(-_excess(taken))
        return taken

    def first_deferred(self) -> Deferred | None:
        """The oldest event, if it is still to be encoded."""
        with self.counting:
            return self[0] if self and isinstance(self[0], Deferred) else None

    def remove_first(self, deferred: Deferred) -> bool:
        """Take out the oldest event, if it is this one. False: it was dropped meanwhile."""
        with self.counting:
            there = bool(self) and self[0] is deferred
            if there:
                self.popleft()
            return there

    def take_all(self) -> int:
        """Take out, and forget, what there is now; returns how many events that were."""
        with self.counting:
            taken = [self.popleft() for _ in range(len(self))]
            self._occupy(-_excess(taken))
            return len(taken)

    def refuse_rest(self) -> None:
        """What is still in it has come too late."""
        with self.counting:
            events = self.take_all()
            self.late += events
        if events:
            _warn_late()


def _excess(events: list[bytes] | list[bytes | Deferred]) -> int:
    """Bytes that large events take beyond a slot each."""
    return sum(len(e) - SLOT_BYTES for e in events if not isinstance(e, Deferred) and len(e) > SLOT_BYTES)


def _warn_late() -> None:
    """Without the lock: who knows what the script's logging handlers do."""
    warn_once("late", "Something was logged after finish(): it is not recorded. Log it before, or connect() once more.")
