"""How a rank's part ends: who has the last word, by when, and what is done with events that the writer has not got."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from swanlab_ray.actors.journal.records import Arrived, Ended, Entry
from swanlab_ray.actors.wire.messages import Counts, Goodbye
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.actors.wire.text import many
from swanlab_ray.observer.script.notices import logger, warn_once
from swanlab_ray.observer.transport.batches import Batches
from swanlab_ray.observer.transport.connection import Connection
from swanlab_ray.observer.transport.queue import EventQueue
from swanlab_ray.observer.transport.spool import how_to_upload
from swanlab_ray.observer.transport.tally import UNSENT, Tally
from swanlab_ray.observer.transport.window import Window


class Rescued(BaseException):
    """Somebody else has put aside what there was: the flusher ends."""


class Ownership:
    """Who may change what a rank holds: its batches, its window, its connection.

    That is the flusher, always but while it is :meth:`away` in something that may take long: a call, a pause, a value
    on a GPU. It may stand still there, in a lock that a fork left behind or a call that hangs. Then whoever waits for
    the end takes over, for good, and the flusher finds that out when it is back.

    What does not belong to the owner belongs to all threads: the queue and the tally, under one lock
    (:attr:`EventQueue.counting`). That is held for a moment only, and nobody waits for the owner who holds it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lost = False
        """The flusher has been relieved."""
        self._flusher: int | None = None

    @contextmanager
    def of_flusher(self) -> Iterator[None]:
        """The calling thread is the flusher. It leaves quietly where it was relieved."""
        with self.lock, suppress(Rescued):
            self._flusher = threading.get_ident()
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """Around what may take long.

        Raises:
            Rescued: meanwhile somebody else has put everything aside.
        """
        if threading.get_ident() != self._flusher:
            yield
            return
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()
            if self.lost:
                raise Rescued

    @contextmanager
    def instead(self, patience: float) -> Iterator[bool]:
        """Own it instead of the flusher. False: within so many seconds that was not away, so it is the disk that
        hangs."""
        if not self.lock.acquire(timeout=patience):
            yield False
            return
        try:
            yield True
        finally:
            self.lock.release()


class LastWords:
    """How a rank's part ends. What could not be sent by then is put aside on this machine's disk.

    Args:
        queue, batches, window, tally, connection: of this rank.
    """

    def __init__(
        self, queue: EventQueue, batches: Batches, window: Window, tally: Tally, connection: Connection
    ) -> None:
        self._queue = queue
        self._batches = batches
        self._window = window
        self._tally = tally
        self._connection = connection
        self.goodbye: Callable[[Counts], Goodbye] | None = None
        """Makes the last message. Whoever ends this rank's part sets it; until then there is no end."""
        self.deadline = math.inf
        """By when it has to be over, monotonic."""
        self.tries_until = math.inf
        """How long a writer is looked for that is not there, monotonic."""
        self.outcome: WriterStatus | None = None
        """The writer's last status, where this rank was the last one."""
        self._said = False

    @property
    def due(self) -> bool:
        return self.goodbye is not None

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self.deadline

    @property
    def all_said(self) -> bool:
        """Whether at the most the answer to the goodbye is missing."""
        return self._said and not self._tally.statistics().waiting

    def say(self) -> None:
        """Say goodbye.

        Raises:
            LinkBroken: it did not arrive.
        """
        assert self.goodbye is not None
        self._said = True
        farewell = self._connection.goodbye(self.goodbye(self._tally.counts()), self.deadline)
        show(farewell.notices)
        if farewell.last:
            self.outcome = self._connection.wait_closed(self.deadline)
            show(self.outcome.notices[farewell.told :] if self.outcome else [])
        self._queue.refuse_rest()  # a thread that was at log() when the end began may have been overtaken by it

    def put_aside(self, reason: str) -> None:
        """Put it there, count what could not even be put there, and say so. Called by the owner."""
        spool = self._batches.spool
        if not self._tally.statistics().waiting and (spool is None or spool.closed or not self._tally.spooled):
            return
        try:
            self._batches.put_aside(self._window.under_way, self._beginning_and_end)
        except Exception as error:
            reason = f"{reason}; {error}"
        left = self._tally.drop_waiting(UNSENT)
        self._batches.forget()
        self._window.under_way.clear()
        if left:
            logger.warning(
                "Lost, since it did not reach the writer: %s of this rank (%s).", many(left, "event"), reason
            )
        path = self._batches.spool.path if self._batches.spool else None
        if self._tally.spooled and path is not None:
            logger.warning(
                "%s of this rank did not reach the writer (%s). They are kept in %s: %s.",
                many(self._tally.spooled, "event"),
                reason,
                path,
                how_to_upload(path, met_a_writer=self._connection.times > 0),
            )

    def _beginning_and_end(self) -> list[Entry]:
        """For whoever puts spool and journal together: perhaps no writer will ever hear of this rank."""
        greeting = self._connection.greeting()
        entries: list[Entry] = [Arrived.of(greeting)] if greeting else []
        if self.goodbye is not None:
            entries.append(Ended.of(self.goodbye(self._tally.counts())))
        return entries


def show(notices: list[str]) -> None:
    """What the writer has to say to the user of this rank, each sentence once."""
    for notice in notices:
        warn_once(notice, notice)
