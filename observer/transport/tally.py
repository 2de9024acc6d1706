"""How many events of a rank are where."""

from __future__ import annotations

from dataclasses import dataclass

from swanlab_ray.actors.wire.messages import Counts
from swanlab_ray.observer.transport.queue import EventQueue

# Why an event was dropped.
OVERFLOW = "logged faster than it could be sent"
NO_ROOM = "no room in memory or on disk while the writer was away"
UNREAD = "a value could not be read"
UNREADABLE = "the spool could not be read back"
UNSENT = "not sent when the process ended"
LATE = "logged after finish()"


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Tally of one rank's channel, in events unless said otherwise."""

    logged: int
    """Put in by this rank, counted where they come in."""
    acknowledged: int
    """In the writer's journal, synced to disk."""
    spooled: int
    """On this machine's disk, not acknowledged yet."""
    dropped: dict[str, int]
    """Given up, by reason."""
    waiting: int
    """In memory, not acknowledged yet. ``logged = acknowledged + spooled + waiting + sum(dropped)``."""
    reconnections: int
    """Times the connection was opened again."""


class Tally:
    """An event is in the queue; or it was taken out, and is acknowledged, spooled, dropped, or else waits in memory.

    Who moves events counts them in one step, so that the counts add up whenever somebody asks. Any thread may ask, and
    a signal handler.
    """

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self._taken = 0
        self._dropped: dict[str, int] = {}  # of those that were taken
        self.acknowledged = 0
        self.spooled = 0
        self.moving = queue.counting
        """Held for a moment by who moves events."""

    def taken(self, events: int) -> None:
        """They have left the queue, in the same hold of :attr:`moving`."""
        self._taken += events

    def spool(self, events: int) -> None:
        """They are on this machine's disk."""
        with self.moving:
            self.spooled += events

    def acknowledge(self, events: int, spooled: bool) -> None:
        """They are in the writer's journal. ``spooled``: they were on the disk."""
        with self.moving:
            self.acknowledged += events
            self.spooled -= events if spooled else 0

    def drop(self, reason: str, events: int, spooled: bool = False) -> None:
        """They are given up. ``spooled``: they were on the disk."""
        with self.moving:
            self._dropped[reason] = self._dropped.get(reason, 0) + events
            self.spooled -= events if spooled else 0

    def drop_waiting(self, reason: str) -> int:
        """All that is in memory is given up, in the queue as well; returns how many events that are."""
        with self.moving:
            self.taken(self._queue.take_all())
            waiting = self._waiting()
            if waiting:
                self.drop(reason, waiting)
        return waiting

    def _waiting(self) -> int:
        """Of those that were taken."""
        return self._taken - self.acknowledged - self.spooled - sum(self._dropped.values())

    def first_loss(self) -> str | None:
        """Why events were dropped, if some were."""
        return OVERFLOW if self._queue.overflowed else next(iter(self._dropped), None)

    def statistics(self, reconnections: int = 0) -> ChannelStatistics:
        """The counts now."""
        queue = self._queue
        with self.moving:
            queued = len(queue)
            dropped = dict(self._dropped)
            for reason, events in ((OVERFLOW, queue.overflowed), (LATE, queue.late)):
                if events:
                    dropped[reason] = events
            return ChannelStatistics(
                logged=self._taken + queued + queue.overflowed + queue.late,
                acknowledged=self.acknowledged,
                spooled=self.spooled,
                dropped=dropped,
                waiting=self._waiting() + queued,
                reconnections=reconnections,
            )

    def counts(self) -> Counts:
        """The same, as the writer is told."""
        now = self.statistics()
        return Counts(logged=now.logged, spooled=now.spooled, dropped=now.dropped, refused=self._queue.refused)
