"""From the threads of a rank that log to the writer: what is put in arrives there once, or on this machine's disk, or
is counted as dropped.

The parts: the :mod:`queue <swanlab_ray.observer.transport.queue>`, which those who log fill; the
:mod:`batches <swanlab_ray.observer.transport.batches>` and the :mod:`window <swanlab_ray.observer.transport.window>` of
those under way, which the :mod:`flusher <swanlab_ray.observer.transport.flusher>` moves on; and the
:mod:`last words <swanlab_ray.observer.transport.last_words>`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from threading import Event

from swanlab_ray.actors.wire.messages import Counts, Goodbye, Hello, Sign
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.actors.wire.text import many
from swanlab_ray.observer.encoding.numbers import Deferred
from swanlab_ray.observer.job.doing import Pulse
from swanlab_ray.observer.script import threads
from swanlab_ray.observer.script.notices import logger, warn_once
from swanlab_ray.observer.transport.batches import Batches
from swanlab_ray.observer.transport.connection import Connection
from swanlab_ray.observer.transport.flusher import Flusher
from swanlab_ray.observer.transport.last_words import LastWords, Ownership
from swanlab_ray.observer.transport.link import Link
from swanlab_ray.observer.transport.queue import EventQueue
from swanlab_ray.observer.transport.spool import Spool
from swanlab_ray.observer.transport.tally import ChannelStatistics, Tally
from swanlab_ray.observer.transport.window import Window

UNREACHABLE_S = 20.0
"""How long ``finish()`` tries to reach a writer that is not there."""
SLACK_S = 5.0
"""Kept of the time for ``finish()`` for a flusher that stands still: Ray's own calls have deadlines too."""
LEAST_PATIENCE_S = 1.0
"""What a flusher that is at work is given to let go, even by a ``finish()`` without any time: nothing is put on disk
before."""


class Channel:
    """Carries the events of one rank to the writer.

    Args:
        link: to the writer.
        rank: rank of this process.
        life: unique to this process.
        hello: makes this rank's greeting, given the first batch it can still send. It may wait, for a GPU's driver.
        on_welcome: called on the flusher's thread after the first connection.
        make_spool: makes the place on disk, given the run id.
        pulse: knows what this rank is doing.
    """

    def __init__(
        self,
        link: Link,
        rank: int,
        life: str,
        hello: Callable[[int], Hello],
        on_welcome: Callable[[], None],
        make_spool: Callable[[str], Spool],
        pulse: Pulse,
    ) -> None:
        def spool() -> Spool:
            # Where the ranks have not agreed on one yet, under an id of its own.
            return make_spool(link.run_id or f"unnamed-{life}")

        def sign() -> Sign:
            return Sign(rank, life, tally.counts(), pulse.doing(), time.time_ns())

        self.queue = EventQueue()
        self._link = link
        self._ownership = Ownership()
        away = self._ownership.away
        self._tally = tally = Tally(self.queue)
        self._connection = Connection(link, hello, away)
        self._batches = Batches(self.queue, tally, spool, away)
        self._window = Window(link, self._batches, sign, away)
        self._last_words = LastWords(self.queue, self._batches, self._window, tally, self._connection)
        self._flusher = Flusher(
            self._connection, self._batches, self._window, self._last_words, self._ownership, pulse, on_welcome
        )
        self.ready = self._flusher.ready
        self.done = self._flusher.done

    def start(self) -> None:
        """Begin to send. From now on the flusher's thread calls what was passed."""
        try:
            threads.start(self._flusher.thread)
        except RuntimeError as error:  # finish() puts aside what there is then
            self._flusher.last_error = f"this process can have no more threads ({error})"
            warn_once("no thread", f"Nothing can be sent from this rank: {self.last_error}; the training goes on.")

    @property
    def run_id(self) -> str | None:
        """None until the ranks have agreed on it."""
        return self._link.run_id

    @property
    def last_error(self) -> str | None:
        """Why the writer could not be reached the last time."""
        return self._flusher.last_error

    @property
    def outcome(self) -> WriterStatus | None:
        """The writer's last status, where this rank was the last one."""
        return self._last_words.outcome

    def put(self, event: bytes | Deferred) -> None:
        """Queue an event. Never blocks."""
        self.queue.put(event)

    def put_late(self, event: object) -> None:
        """Count an event that comes after :meth:`finish`, and say so once."""
        self.queue.put_late(event)

    def refuse(self) -> None:
        """Count a value or a call that this rank does not log, since it is wrong."""
        self.queue.refuse()

    def statistics(self) -> ChannelStatistics:
        """Counts so far."""
        return self._tally.statistics(reconnections=max(0, self._connection.times - 1))

    def flush(self, timeout: float) -> bool:
        """Wait until everything put in so far is in the writer's journal; False after ``timeout`` seconds."""
        target = self.statistics().logged
        deadline = time.monotonic() + timeout
        with self._flusher.hurried():
            while True:
                over = time.monotonic() >= deadline or self.done.is_set()
                statistics = self.statistics()
                reached = statistics.acknowledged + sum(statistics.dropped.values()) >= target
                if reached or over:
                    return reached
                self._flusher.wake.set()
                time.sleep(0.01)

    def finish(self, goodbye: Callable[[Counts], Goodbye], timeout: float) -> bool:
        """Send what is left, say goodbye, and wait; the last rank waits until the run is closed.

        Args:
            goodbye: makes the message from the final counts.
            timeout: seconds after which it returns; before that the rest is spooled, or given up and counted.

        Returns:
            Whether everything was acknowledged.
        """
        if not self._connection.up:
            logger.info("Waiting for the writer, %.0f s at the most ...", timeout)
        self._last_words.tries_until = time.monotonic() + UNREACHABLE_S
        self._last_words.goodbye = goodbye
        return self.hurry(timeout)

    def hurry(self, timeout: float) -> bool:
        """Wait for a :meth:`finish` that is under way or over, and let it take no longer; returns what that does."""
        slack = min(SLACK_S, timeout / 5)
        self._last_words.deadline = min(self._last_words.deadline, time.monotonic() + timeout - slack)
        self._link.deadline = self._last_words.deadline
        self._flusher.wake.set()
        if not self._ownership.lost and not self._flusher.ended_within(timeout - slack / 2):
            self._relieve(max(slack / 2, LEAST_PATIENCE_S))
        statistics = self.statistics()
        return statistics.acknowledged == statistics.logged - self.queue.late

    def _relieve(self, patience: float) -> None:
        """Put aside in place of the flusher, which stands still: in a lock that a fork left behind, or a hung call."""
        with self._ownership.instead(patience) as owner:
            if not owner:
                left = many(self.statistics().waiting, "event")
                logger.warning("%s of this rank not sent, nor put on disk in time.", left)
            elif not self._ownership.lost and not self.done.is_set():
                self._ownership.lost = True
                self._flusher.note_where_it_stands()
                try:
                    self._last_words.put_aside(self.last_error or "no time left")
                except Exception:
                    logger.warning("This rank's events could not be put aside.\n%s", traceback.format_exc())


class NoChannel(Channel):
    """Takes nothing, has no thread, and waits for nothing: of an observer that observes nothing, and of one in a forked
    child, where the flusher does not exist and any lock may be held for ever."""

    last_error = None
    outcome = None

    run_id: str | None = None

    def __init__(self, run_id: str | None) -> None:
        self.run_id = run_id
        self.queue = EventQueue()
        self.queue.room = 0
        self.ready = self.done = Event()
        self.ready.set()

    def start(self) -> None: ...

    def put(self, event: object) -> None: ...

    def put_late(self, event: object) -> None: ...

    def refuse(self) -> None: ...

    def flush(self, timeout: float) -> bool:
        return True

    def finish(self, goodbye: Callable[[Counts], Goodbye], timeout: float) -> bool:
        return True

    def hurry(self, timeout: float) -> bool:
        return True

    def statistics(self) -> ChannelStatistics:
        return ChannelStatistics(0, 0, 0, {}, 0, 0)
