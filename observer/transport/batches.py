"""Events between the queue and the window: in memory, the oldest of them on disk where that does not do; in order.

The order of a rank's events is: acknowledged, window, spool, unsent, queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from swanlab_ray.actors.journal.records import Entry
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.messages import BATCH_BYTES, EVENTS_PER_BATCH, NumberedBatch
from swanlab_ray.observer.encoding.numbers import Deferred
from swanlab_ray.observer.script.notices import warn_once
from swanlab_ray.observer.transport.queue import EventQueue
from swanlab_ray.observer.transport.spool import Spool
from swanlab_ray.observer.transport.tally import NO_ROOM, UNREAD, UNREADABLE, Tally

UNSENT_BYTES = 64 << 20
"""Bytes of events kept in memory while the writer cannot be reached; the oldest go to the spool."""
COLLECTED_AT_END = 16
"""Looks at the queue at the end: what is taken from it may put more there."""


@dataclass(slots=True)
class UnderWay:
    """A batch that the writer may not have on disk yet."""

    batch: NumberedBatch
    spooled: bool = False
    """It is in the spool as well."""
    taken: bool = False
    """The writer has it, on disk or on the way there."""
    asked: bool = False
    """It was sent, and not answered yet."""


class Batches:
    """Makes numbered batches of what is in the queue.

    Args:
        queue: where the events come from.
        tally: of this rank.
        make_spool: makes the place on disk.
        away: around what may take long, see :class:`swanlab_ray.observer.transport.last_words.Ownership`.
    """

    def __init__(
        self,
        queue: EventQueue,
        tally: Tally,
        make_spool: Callable[[], Spool],
        away: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._queue = queue
        self._tally = tally
        self._make_spool = make_spool
        self._away = away
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._next_seq = 0
        self._reading = False  # a value, perhaps from a GPU that hangs
        self.spool: Spool | None = None
        """Once something was put there."""

    @property
    def more(self) -> bool:
        """Whether there is something for the window."""
        return bool(self._unsent) or (self.spool is not None and self.spool.unread > 0)

    @property
    def empty(self) -> bool:
        """Whether nothing is left, in the queue neither."""
        return not (self.more or self._queue)

    @property
    def first(self) -> int:
        """Number of the oldest batch here, or of the next."""
        spooled = self.spool.first if self.spool is not None else None
        return self._next_seq if spooled is None else spooled

    def collect(self, under_way: Iterable[UnderWay]) -> None:
        """Empty the queue. What does not fit in memory goes to the spool, and before it what is under way."""
        left = len(self._queue) + 1  # somebody may log as fast as this takes
        while left > 0 and (taken := self._take_encoded() or self._take_deferred()):
            left -= taken
        while self._unsent_bytes > UNSENT_BYTES:
            self._spill(under_way)
        loss = self._tally.first_loss()
        if loss is not None:
            warn_once("dropped", f"Events of this rank are dropped: {loss}.")

    def _take_encoded(self) -> int:
        with self._tally.moving:
            events = self._queue.take()
            self._tally.taken(len(events))
        self._unsent.extend(events)
        self._unsent_bytes += sum(map(len, events))
        return len(events)

    def _take_deferred(self) -> int:
        """Take an event that is encoded here. 0: there is none, or what it needs has not arrived, and the rest waits
        for it."""
        deferred = self._queue.first_deferred()
        if deferred is None:
            return 0
        ready, event = self._read(deferred)
        if not ready:
            return 0
        with self._tally.moving:
            if not self._queue.remove_first(deferred):
                return 1
            self._tally.taken(1)
            if event is None:
                self._tally.drop(UNREAD, 1)
        if event is not None:
            self._add(event)
        return 1

    def _read(self, deferred: Deferred) -> tuple[bool, bytes | None]:
        """Whether what it needs has arrived, and the event; None where that cannot be read."""
        if self._reading:
            return True, None  # the flusher stands still at it, and this is not the flusher
        self._reading = True
        try:
            with self._away():
                try:
                    ready = deferred.ready()
                    return ready, deferred.encode() if ready else None
                finally:
                    self._reading = False
        except Exception as error:  # perhaps the GPU has failed; the rank's own error is still to be sent
            warn_once("unread", f"A value could not be read: {error}")
            return True, None

    def report(self, event: bytes) -> None:
        """Add an event of the flusher's own: not through the queue, where a value may wait for a GPU that hangs."""
        with self._tally.moving:
            self._tally.taken(1)
        self._add(event)

    def _add(self, event: bytes) -> None:
        self._unsent.append(event)
        self._unsent_bytes += len(event)

    def next(self) -> UnderWay | None:
        """The oldest batch, for the window."""
        if self.spool is not None and self.spool.unread:
            return UnderWay(self._read_back(self.spool), spooled=True)
        return UnderWay(self._cut()) if self._unsent else None

    def _cut(self) -> NumberedBatch:
        """The oldest unsent events as a batch."""
        events: list[bytes] = []
        size = 0
        while self._unsent and len(events) < EVENTS_PER_BATCH and size < BATCH_BYTES:
            events.append(self._unsent.popleft())
            size += len(events[-1])
        self._unsent_bytes -= size
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        return NumberedBatch(seq, len(events), encode_batch(events))

    def _read_back(self, spool: Spool) -> NumberedBatch:
        try:
            return spool.read()
        except OSError as error:
            seq, lost = spool.give_up_first()
            self._tally.drop(UNREADABLE, lost, spooled=True)
            warn_once("spool", f"What this rank had put on its disk cannot be read back: {error}")
            return NumberedBatch(seq, 0, encode_batch([]))  # its number is still waited for

    def acknowledged(self, sent: UnderWay) -> None:
        """The writer has it on disk, and all before it."""
        self._tally.acknowledge(sent.batch.events, sent.spooled)
        if sent.spooled and self.spool is not None:
            self.spool.acknowledged(sent.batch.seq + 1)

    def _spill(self, under_way: Iterable[UnderWay]) -> None:
        """Put the oldest unsent events on disk; drop them if there is no room."""
        batch = self._cut()
        try:
            self._put_first(under_way)
            self._put(batch, held=False)
        except OSError as error:
            self._next_seq -= 1
            self._tally.drop(NO_ROOM, batch.events)
            warn_once("spool", f"What this rank cannot send cannot be put on its disk either: {error}")

    def put_aside(self, under_way: Iterable[UnderWay], last: Callable[[], list[Entry]]) -> None:
        """Put everything on disk for good, and after it the ``last`` records.

        Raises:
            Exception: that failed; what is not in the spool then is not kept.
        """
        for _ in range(COLLECTED_AT_END):
            self.collect(under_way)
        self._put_first(under_way)
        while self._unsent:
            self._put(self._cut(), held=True)
        if self.spool is not None:
            self.spool.close(*last())

    def forget(self) -> None:
        """Keep nothing in memory."""
        self._unsent.clear()
        self._unsent_bytes = 0

    def _put_first(self, under_way: Iterable[UnderWay]) -> None:
        """What is under way comes first in the spool, since that is in order."""
        for sent in under_way:
            if not sent.spooled:
                self._put(sent.batch, held=True)
                sent.spooled = True

    def _put(self, batch: NumberedBatch, held: bool) -> None:
        """``held``: it is not to be read back."""
        if self.spool is None:
            self.spool = self._make_spool()
        self.spool.put(batch, held)
        self._tally.spool(batch.events)
