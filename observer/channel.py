"""From the training thread to the writer: a bounded deque, and one thread that empties it.

The training thread only appends. The flusher thread joins events to batches, keeps each until it is acknowledged, has
at most :data:`WINDOW` of them under way, and after a broken connection sends again from where the writer stands.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from swanlab_ray.actors.protocol import (
    BATCH_BYTES,
    BEAT_S,
    EVENTS_PER_BATCH,
    Ack,
    Beat,
    Farewell,
    Goodbye,
    Hello,
    Welcome,
    WriterStatus,
    encode_batch,
)
from swanlab_ray.observer.link import CALL_DEADLINE_S, LinkBroken
from swanlab_ray.observer.notices import logger, warn_once
from swanlab_ray.observer.values import Deferred

CAPACITY = 65_536
"""Events the training thread may be ahead of the flusher; the oldest go first and are counted."""
UNSENT_BYTES = 64 << 20
"""Bytes of events kept while the writer cannot be reached."""
WINDOW = 4
FLUSH_INTERVAL_S = 0.2
RETRY_S = (0.2, 5.0)
"""First and longest pause between two attempts to connect."""
UNREACHABLE_S = 20.0
"""How long ``finish()`` tries to reach a writer that is not there."""


class Link(Protocol):
    """What the channel needs of a connection; see :class:`swanlab_ray.observer.link.RayLink`."""

    run_id: str | None

    def open(self, hello: Hello) -> Welcome: ...
    def ingest(self, rank: int, life: str, seq: int, batch: bytes) -> Any: ...
    def acknowledged(self, reference: Any, wait: float) -> Ack | None: ...
    def beat(self, beat: Beat) -> Any: ...
    def beaten(self, reference: Any) -> bool | None: ...
    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell: ...
    def wait_closed(self, deadline: float) -> WriterStatus | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Counts of one rank's channel, in events unless said otherwise."""

    logged: int
    """Put in by this rank."""
    acknowledged: int
    """Taken by the writer."""
    dropped: int
    """Given up because a bound was hit or the time for finishing ran out."""
    waiting: int
    """Not acknowledged yet."""
    reconnections: int
    """Times the connection was opened again."""


@dataclass(slots=True)
class _Batch:
    seq: int
    events: int
    data: bytes
    reference: Any = None
    sent: float = 0.0


class Channel:
    """Carries the events of one rank to the writer.

    Args:
        link: the connection.
        rank: rank of this process.
        life: unique to this process.
        hello: makes this rank's greeting, given the first batch it can still send.
        on_welcome: called on the flusher thread after the first connection.
    """

    def __init__(
        self, link: Link, rank: int, life: str, hello: Callable[[int], Hello], on_welcome: Callable[[], None]
    ) -> None:
        self._link = link
        self._rank = rank
        self._life = life
        self._hello = hello
        self._on_welcome = on_welcome
        self.queue: deque[bytes | Deferred] = deque()
        """Encoded events the flusher has not taken yet. Append below :data:`CAPACITY`, else :meth:`put`."""
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._window: deque[_Batch] = deque()
        self._in_window = 0  # events in it
        self._moving = threading.Lock()  # held while events change place, so that counts add up; never by put()
        self._next_seq = 0
        self._acknowledged = 0
        self._dropped = 0
        self._overflowed = 0
        self._connections = 0
        self._interval = FLUSH_INTERVAL_S
        self._connected = False
        self._beat: tuple[Any, float] | None = None
        self._last_beat = 0.0
        self._wake = threading.Event()
        self._goodbye: Callable[[int, int], Goodbye] | None = None
        self._finishing = self._deadline = math.inf  # monotonic: when finish() was called, and its deadline
        self.last_error: str | None = None
        self.outcome: WriterStatus | None = None
        """The writer's last status, where this rank was the last one."""
        self.ready = threading.Event()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._work, name="swanlab-ray-flusher", daemon=True)
        self.thread.start()

    def put(self, event: bytes | Deferred) -> None:
        """Append an event, or drop the oldest one to make room. Never blocks."""
        if len(self.queue) >= CAPACITY:
            with suppress(IndexError):  # the flusher has just taken it
                self.queue.popleft()
                self._overflowed += 1
        self.queue.append(event)

    def flush(self, timeout: float) -> bool:
        """Wait until the writer has everything put in so far; False after ``timeout`` seconds."""
        target = self.statistics().logged
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not self.done.is_set():
            statistics = self.statistics()
            if statistics.acknowledged + statistics.dropped >= target:
                return True
            self._wake.set()
            time.sleep(0.01)
        return False

    def finish(self, goodbye: Callable[[int, int], Goodbye], timeout: float) -> bool:
        """Send what is left, say goodbye, and wait; the last rank waits until the run is closed.

        Args:
            goodbye: makes the message from the counts of logged and dropped events.
            timeout: seconds after which the rest is given up and counted.

        Returns:
            Whether everything was acknowledged.
        """
        if not self._connected:
            logger.info("Waiting for the writer, %.0f s at the most ...", timeout)
        self._finishing = time.monotonic()
        self._deadline = self._finishing + timeout
        self._goodbye = goodbye
        self._wake.set()
        # Ray's own calls have deadlines; the slack lets the flusher notice its own first.
        self.done.wait(timeout + 5.0)
        statistics = self.statistics()
        return self.done.is_set() and not statistics.waiting and not statistics.dropped

    def statistics(self) -> ChannelStatistics:
        """Counts so far."""
        with self._moving:
            return self._statistics()

    def _statistics(self) -> ChannelStatistics:
        waiting = len(self.queue) + len(self._unsent) + self._in_window
        dropped = self._dropped + self._overflowed
        return ChannelStatistics(
            logged=self._acknowledged + waiting + dropped,
            acknowledged=self._acknowledged,
            dropped=dropped,
            waiting=waiting,
            reconnections=max(0, self._connections - 1),
        )

    def _work(self) -> None:
        try:
            pause = RETRY_S[0]
            while True:
                try:
                    if not self._connected:
                        self._connect()
                        pause = RETRY_S[0]
                    if self._turn():
                        break
                    if self._goodbye is None and not self._unsent:
                        self._wake.wait(self._interval)
                        self._wake.clear()
                except Exception as error:  # a broken link, or anything unforeseen: this thread must not end
                    self._connected = False
                    self._beat = None
                    self.last_error = str(error) if isinstance(error, LinkBroken) else traceback.format_exc()
                    if self._connections == 0:
                        warn_once("unreachable", f"{self.last_error} - the training goes on; still trying.")
                    else:
                        warn_once("away", f"The writer is away ({self.last_error}); events are kept until it is back.")
                    if time.monotonic() >= min(self._deadline, self._finishing + UNREACHABLE_S):
                        break
                    self._collect()
                    time.sleep(pause if self._goodbye is None else 0.2)
                    pause = min(pause * 2, RETRY_S[1])
        except BaseException:
            logger.warning("The observer of this rank stopped; the training goes on.\n%s", traceback.format_exc())
        finally:
            self._give_up()
            self._leave()
            self.done.set()

    def _turn(self) -> bool:
        """One round: take events, send, collect acknowledgements. True when everything is said."""
        finishing = self._goodbye is not None
        self._collect()
        self._fill_window()
        # With more to send than the window takes, what there is to wait for is an acknowledgement.
        self._read_acknowledgements(wait=0.1 if finishing or self._unsent else 0.0)
        self._fill_window()
        self._show_life()
        if not finishing:
            return False
        if not (self._window or self._unsent or self.queue):
            self._say_goodbye()
            return True
        if not self._window:
            time.sleep(0.01)  # what is left waits for a GPU
        return self._out_of_time()

    def _connect(self) -> None:
        first_unacknowledged = self._window[0].seq if self._window else self._next_seq
        welcome = self._link.open(self._hello(first_unacknowledged))
        self._connected = True
        self._connections += 1
        self._heed(welcome)
        self._forget_until(welcome.next_seq)
        for batch in self._window:
            self._send(batch)
        if self._connections == 1:
            self._on_welcome()
            self.ready.set()

    def _heed(self, answer: Welcome | Ack) -> None:
        self._interval = answer.flush_interval
        self._show(answer.notices)

    @staticmethod
    def _show(notices: list[str]) -> None:
        for notice in notices:
            warn_once(notice, notice)

    def _collect(self) -> None:
        with self._moving:
            self._take_from_queue()
        if self._dropped or self._overflowed:
            warn_once("dropped", "Events are dropped: they are logged faster than they can be sent.")

    def _take_from_queue(self) -> None:
        """Move events out of the training thread's deque, within the byte bound."""
        unsent = self._unsent
        for _ in range(len(self.queue)):
            try:
                event = self.queue.popleft()
            except IndexError:  # the training thread has just dropped it
                break
            if isinstance(event, Deferred):
                try:
                    if not event.ready():
                        self.queue.appendleft(event)
                        break
                    event = event.encode()
                except Exception as error:  # the GPU has failed; the rank's own error is still to be sent
                    self._dropped += 1
                    warn_once("gpu", f"A value could not be read from the GPU: {error}")
                    continue
            unsent.append(event)
            self._unsent_bytes += len(event)
        while self._unsent_bytes > UNSENT_BYTES:
            self._unsent_bytes -= len(unsent.popleft())
            self._dropped += 1

    def _fill_window(self) -> None:
        while len(self._window) < WINDOW and self._unsent:
            with self._moving:
                events: list[bytes] = []
                size = 0
                while self._unsent and len(events) < EVENTS_PER_BATCH and size < BATCH_BYTES:
                    events.append(self._unsent.popleft())
                    size += len(events[-1])
                self._unsent_bytes -= size
                batch = _Batch(self._next_seq, len(events), encode_batch(events))
                self._next_seq += 1
                self._window.append(batch)
                self._in_window += batch.events
            self._send(batch)

    def _send(self, batch: _Batch) -> None:
        batch.sent = time.monotonic()
        batch.reference = self._link.ingest(self._rank, self._life, batch.seq, batch.data)

    def _read_acknowledgements(self, wait: float) -> None:
        while self._window:
            oldest = self._window[0]
            ack = self._link.acknowledged(oldest.reference, wait)
            if ack is None:
                if time.monotonic() - oldest.sent > CALL_DEADLINE_S:
                    raise LinkBroken(f"The writer has not answered for {CALL_DEADLINE_S:.0f} s.")
                return
            self._heed(ack)
            if ack.next_seq <= oldest.seq:
                raise LinkBroken(f"The writer wants batch {ack.next_seq} again.")
            self._forget_until(ack.next_seq)

    def _forget_until(self, next_seq: int) -> None:
        while self._window and self._window[0].seq < next_seq:
            with self._moving:
                events = self._window.popleft().events
                self._in_window -= events
                self._acknowledged += events

    def _show_life(self) -> None:
        now = time.monotonic()
        if self._beat is not None:
            known = self._link.beaten(self._beat[0])
            if known is False:
                raise LinkBroken("The writer does not know this rank any more.")
            if known is None and now - self._beat[1] > CALL_DEADLINE_S:
                raise LinkBroken(f"The writer has not answered for {CALL_DEADLINE_S:.0f} s.")
            if known is None:
                return
            self._beat = None
        if now - self._last_beat >= BEAT_S:
            self._last_beat = now
            statistics = self.statistics()
            self._beat = (self._link.beat(Beat(self._rank, self._life, statistics.logged, statistics.dropped)), now)

    def _say_goodbye(self) -> None:
        assert self._goodbye is not None
        statistics = self.statistics()
        message = self._goodbye(statistics.logged, statistics.dropped)
        farewell = self._link.goodbye(message, max(0.5, self._deadline - time.monotonic()))
        self._show(farewell.notices)
        if farewell.last:
            with suppress(LinkBroken):  # everything is said; a restarted writer has no use for this rank
                self.outcome = self._link.wait_closed(self._deadline)
                self._show(self.outcome.notices if self.outcome else [])

    def _out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline

    def _give_up(self) -> None:
        """Count what could not be sent."""
        with self._moving:
            left = self._statistics().waiting
            self._dropped += left
            self.queue.clear()
            self._unsent.clear()
            self._window.clear()
            self._in_window = 0
        if left:
            reason = self.last_error or "no time left"
            logger.warning("%d events of this rank did not reach the writer: %s", left, reason)

    def _leave(self) -> None:
        try:
            self._link.close()
        except Exception as error:
            self.last_error = str(error)
