"""From the training thread to the writer: a bounded deque, and one thread that empties it.

The training thread only appends. The flusher thread joins events to batches, keeps each until the writer has it on
disk, has at most :data:`WINDOW` of them under way, and after a broken connection sends again from where the writer
stands. What does not fit in memory meanwhile goes to a spool on this machine's disk, and from there to the writer.

The order of a rank's events is: acknowledged, window, spool, unsent, queue.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from swanlab_ray.actors.journal.records import Ended, Entry
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.messages import (
    BATCH_BYTES,
    BEAT_S,
    EVENTS_PER_BATCH,
    WINDOW,
    Ack,
    Counted,
    Farewell,
    Goodbye,
    Hello,
    NumberedBatch,
    Sign,
)
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.actors.writer.members import arrived, counts_of
from swanlab_ray.observer.encoding.numbers import Deferred
from swanlab_ray.observer.job.doing import Pulse
from swanlab_ray.observer.script.notices import logger, warn_once
from swanlab_ray.observer.transport.link import CALL_DEADLINE_S, Hopeless, LinkBroken, NotNow, RunOver
from swanlab_ray.observer.transport.opening import Opening
from swanlab_ray.observer.transport.spool import Spool, how_to_upload

CAPACITY = 65_536
"""Events the training thread may be ahead of the flusher; the oldest go first and are counted."""
LARGE_BYTES = 4096
"""An event of this size or more counts for :data:`LARGE_TOTAL_BYTES` as well; others are bounded by their number."""
LARGE_TOTAL_BYTES = 256 << 20
"""Bytes of large events that the training thread may be ahead of the flusher."""
UNSENT_BYTES = 64 << 20
"""Bytes of events kept in memory while the writer cannot be reached; the oldest go to the spool."""
HOLD_S = 0.2
"""Pause after the writer had no room for a batch."""
COLLECTED_AT_END = 16
"""Looks at the queue at the end: what is taken from it may put more there."""
POLL_S = 0.002
"""Pause before the first look for an acknowledgement that somebody waits for; it doubles."""

# Why an event was dropped.
OVERFLOW = "logged faster than it could be sent"
NO_ROOM = "no room in memory or on disk while the writer was away"
UNREAD = "a value could not be read"
UNREADABLE = "the spool could not be read back"
UNSENT = "not sent when the process ended"
LATE = "logged after finish()"
FLUSH_INTERVAL_S = 0.2
RETRY_S = (0.2, 5.0)
"""First and longest pause between two attempts to connect."""
UNREACHABLE_S = 20.0
"""How long ``finish()`` tries to reach a writer that is not there."""
SLACK_S = 5.0
"""Kept of the time for ``finish()`` for a flusher that stands still: Ray's own calls have deadlines too."""
OPENING_POLL_S = 0.01
"""Pause between two looks at the queue while the connection is being opened: nothing else empties it."""
FRAMES_TOLD = 6
"""Innermost functions that are named where it stands."""


class Link(Protocol):
    """What the channel needs of a connection; see :class:`swanlab_ray.observer.transport.link.RayLink`."""

    run_id: str | None
    deadline: float

    def open(self, hello: Hello) -> Ack: ...
    def ingest(self, sign: Sign, batch: NumberedBatch | None) -> Any: ...
    def acknowledged(self, reference: Any, wait: float) -> Ack | None: ...
    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell: ...
    def wait_closed(self, deadline: float) -> WriterStatus | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Counts of one rank's channel, in events unless said otherwise."""

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


class _Rescued(BaseException):
    """Somebody else has put aside what there was: the flusher ends."""


@dataclass(slots=True)
class _Batch:
    seq: int
    events: int
    data: bytes
    reference: Any = None  # of the answer, while that is waited for
    sent: float = 0.0
    taken: bool = False
    """The writer has it, on disk or on the way there."""
    spooled: bool = False
    """It is in the spool as well."""


class Channel:
    """Carries the events of one rank to the writer.

    Args:
        link: the connection.
        rank: rank of this process.
        life: unique to this process.
        hello: makes this rank's greeting, given the first batch it can still send. It may wait, for a GPU's driver.
        on_welcome: called on the flusher thread after the first connection.
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
        self._link = link
        self._rank = rank
        self._life = life
        self._hello = hello
        self._on_welcome = on_welcome
        self._make_spool = make_spool
        self._pulse = pulse
        self._stacks_told = 0
        self.queue: deque[bytes | Deferred] = deque()
        """Encoded events the flusher has not taken yet. Append those below :data:`LARGE_BYTES` while it has less than
        :data:`CAPACITY`, else call :meth:`put`."""
        self._large_bytes = 0  # of large events in the queue
        self._counting = threading.RLock()  # held for counts that any thread may change, and its signal handlers
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._spool: Spool | None = None
        self._window: deque[_Batch] = deque()
        self._in_window = 0  # events in it that are not in the spool as well
        self._moving = threading.RLock()  # held while events change place, so that counts add up; never by put()
        self._owned = threading.Lock()  # held by who may change anything here: the flusher, but while it is _away()
        self._rescued = False
        self._reading = False  # a value is being read, perhaps from a GPU that hangs
        self._next_seq = 0
        self._taken = 0  # events, out of the queue
        self._acknowledged = 0
        self._refused = 0
        self._late = 0
        self._opening: Opening | None = None
        self._greeting: Hello | None = None  # the latest
        self._dropped: dict[str, int] = {}
        self._overflowed = 0
        self._connections = 0
        self._interval = FLUSH_INTERVAL_S
        self._connected = False
        self._hold_until = 0.0
        self._said_goodbye = False
        self._poll = POLL_S
        self._flushing = 0  # calls of flush() that wait
        self._sign: tuple[Any, float] | None = None  # one without a batch: the reference of its answer, and when
        self._last_sign = 0.0
        self._wake = threading.Event()
        self._goodbye: Callable[[Counted], Goodbye] | None = None
        self._finishing = self._deadline = math.inf  # monotonic: when finish() was called, and its deadline
        self.last_error: str | None = None
        self.outcome: WriterStatus | None = None
        """The writer's last status, where this rank was the last one."""
        self.ready = threading.Event()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._work, name="swanlab-ray-flusher", daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:  # finish() puts aside what there is then
            self.last_error = f"this process can have no more threads ({error})"
            warn_once("no thread", f"Nothing can be sent from this rank: {self.last_error}; the training goes on.")

    def put(self, event: bytes | Deferred) -> None:
        """Append an event, or drop the oldest ones to make room. Never blocks."""
        self._count_large(event, 1)
        while self.queue and (len(self.queue) >= CAPACITY or self._large_bytes > LARGE_TOTAL_BYTES):
            with suppress(IndexError):  # the flusher has just taken it
                oldest = self.queue.popleft()
                self._overflowed += 1
                self._count_large(oldest, -1)
                if isinstance(oldest, Deferred):
                    oldest.lost()
        self.queue.append(event)

    def _count_large(self, event: bytes | Deferred, times: int) -> None:
        if not isinstance(event, Deferred) and len(event) >= LARGE_BYTES:
            with self._counting:
                self._large_bytes += times * len(event)

    def refuse(self) -> None:
        """Count a value or a call that this rank does not log, since it is wrong."""
        with self._counting:
            self._refused += 1

    def put_late(self, event: object) -> None:
        """Count an event that comes after :meth:`finish`, and say so once."""
        with self._counting:
            self._late += 1
        warn_once(
            "late", "Something was logged after finish(): it is not recorded. Log it before, or connect() once more."
        )

    def flush(self, timeout: float) -> bool:
        """Wait until everything put in so far is in the writer's journal; False after ``timeout`` seconds."""
        target = self.statistics().logged
        deadline = time.monotonic() + timeout
        with self._counting:
            self._flushing += 1
        try:
            while True:
                over = time.monotonic() >= deadline or self.done.is_set()
                statistics = self.statistics()
                reached = statistics.acknowledged + sum(statistics.dropped.values()) >= target
                if reached or over:
                    return reached
                self._wake.set()
                time.sleep(0.01)
        finally:
            with self._counting:
                self._flushing -= 1

    def finish(self, goodbye: Callable[[Counted], Goodbye], timeout: float) -> bool:
        """Send what is left, say goodbye, and wait; the last rank waits until the run is closed.

        Args:
            goodbye: makes the message from the final counts.
            timeout: seconds after which it returns; before that the rest is spooled, or given up and counted.

        Returns:
            Whether everything was acknowledged.
        """
        if not self._connected:
            logger.info("Waiting for the writer, %.0f s at the most ...", timeout)
        self._finishing = time.monotonic()
        self._goodbye = goodbye
        return self.hurry(timeout)

    def hurry(self, timeout: float) -> bool:
        """Wait for a :meth:`finish` that is under way or over, and let it take no longer; returns what that does."""
        slack = min(SLACK_S, timeout / 5)
        self._deadline = min(self._deadline, time.monotonic() + timeout - slack)
        self._link.deadline = self._deadline
        self._wake.set()
        if not self._rescued and not self._done_within(timeout - slack / 2):
            self._rescue(slack / 2)
        statistics = self.statistics()
        return statistics.acknowledged == statistics.logged - self._late

    def _done_within(self, seconds: float) -> bool:
        return self.done.is_set() or (self.thread.is_alive() and self.done.wait(seconds))

    def _rescue(self, patience: float) -> None:
        """Put aside in place of the flusher, which stands still: in a lock that a fork left behind, or a hung call."""
        if not self._owned.acquire(timeout=patience):  # it is the disk that hangs
            logger.warning("%s of this rank not sent, nor put on disk in time.", _events(self.statistics().waiting))
            return
        try:
            if self._rescued or self.done.is_set():
                return
            self._rescued = True
            frame = sys._current_frames().get(self.thread.ident or 0)
            if frame is not None:
                calls = traceback.extract_stack(frame)[-FRAMES_TOLD:]
                self.last_error = f"the thread that sends stands still: {' < '.join(call.name for call in calls[::-1])}"
            self._put_aside()
        except Exception:
            logger.warning("This rank's events could not be put aside.\n%s", traceback.format_exc())
        finally:
            self._owned.release()

    @contextmanager
    def _away(self) -> Iterator[None]:
        """Around what may take long. When the flusher is back somebody else may have put everything aside."""
        if threading.current_thread() is not self.thread:
            yield
            return
        self._owned.release()
        try:
            yield
        finally:
            self._owned.acquire()
            if self._rescued:
                raise _Rescued

    def _sleep(self, seconds: float) -> None:
        with self._away():
            time.sleep(seconds)

    def _pause(self, seconds: float) -> None:
        """Wait, unless there is something to do."""
        with self._away():
            self._wake.wait(seconds)
        self._wake.clear()

    def statistics(self) -> ChannelStatistics:
        """Counts so far."""
        with self._moving:
            return self._statistics()

    def _statistics(self) -> ChannelStatistics:
        waiting = len(self.queue) + len(self._unsent) + self._in_window
        spooled = self._spool.events if self._spool else 0
        dropped = dict(self._dropped)
        if self._overflowed:
            dropped[OVERFLOW] = self._overflowed
        if self._late:
            dropped[LATE] = self._late
        return ChannelStatistics(
            logged=self._taken + len(self.queue) + self._overflowed + self._late,
            acknowledged=self._acknowledged,
            spooled=spooled,
            dropped=dropped,
            waiting=waiting,
            reconnections=max(0, self._connections - 1),
        )

    def _work(self) -> None:
        try:
            with self._owned, suppress(_Rescued):
                self._send()
                self._put_aside()
        finally:
            self._leave()
            self.done.set()

    def _send(self) -> None:
        try:
            pause = RETRY_S[0]
            while True:
                try:
                    if not self._connected:
                        if not self._connect():
                            if self._out_of_time():
                                self.last_error = self.last_error or "the connection was still being opened"
                                break
                            continue
                        pause = RETRY_S[0]
                    if self._turn():
                        break
                    if self._goodbye is None and not self._more_to_send():
                        self._pause(self._interval)
                except RunOver as error:
                    if self._said_goodbye and not self.statistics().waiting:
                        break  # only the answer to the goodbye was lost
                    self._connected, self._sign, self.last_error = False, None, str(error)
                    if time.monotonic() >= min(self._deadline, self._finishing + UNREACHABLE_S):
                        break
                    self._pause(RETRY_S[0])
                except Exception as error:  # a broken link, or anything unforeseen: this thread must not end
                    self._connected = False
                    self._sign = None
                    self.last_error = str(error) if isinstance(error, LinkBroken) else traceback.format_exc()
                    if isinstance(error, NotNow):
                        self._show([str(error)] if str(error) else [])
                    elif isinstance(error, Hopeless):
                        warn_once("unreachable", f"{error} The training goes on.")
                        if self._goodbye is not None:
                            break
                    elif self._connections == 0:
                        warn_once(
                            "unreachable", f"{self.last_error.rstrip('. ')} - the training goes on; still trying."
                        )
                    else:
                        warn_once("away", f"The writer is away ({self.last_error}); events are kept until it is back.")
                    if time.monotonic() >= min(self._deadline, self._finishing + UNREACHABLE_S):
                        break
                    self._collect()
                    if self._goodbye is None:
                        self._pause(pause)
                    else:
                        self._sleep(RETRY_S[0])
                    pause = min(pause * 2, RETRY_S[1])
        except _Rescued:
            raise
        except BaseException:
            logger.warning("The observer of this rank stopped; the training goes on.\n%s", traceback.format_exc())

    def _turn(self) -> bool:
        """One round: take events, send, collect acknowledgements. True when everything is said."""
        finishing = self._goodbye is not None
        self._collect()
        self._pulse.look()
        self._fill_window()
        # With more to send than the window takes, what there is to wait for is an answer.
        pressing = finishing or self._more_to_send() or self._flushing > 0
        self._read_answers(wait=0.1 if pressing else 0.0)
        self._fill_window()
        self._give_sign(now=pressing and bool(self._window) and all(batch.taken for batch in self._window))
        if finishing and not (self._window or self._more_to_send() or self.queue):
            self._say_goodbye()
            self._count_stragglers()
            return True
        if pressing and not any(batch.reference is not None for batch in self._window):
            self._sleep(self._poll)  # for the disk, for room, or for a GPU
            self._poll = min(2 * self._poll, FLUSH_INTERVAL_S)
        if not finishing:
            return False
        if not self._out_of_time():
            return False
        self._put_aside()
        self._say_goodbye()
        return True

    def _more_to_send(self) -> bool:
        return bool(self._unsent) or (self._spool is not None and self._spool.unread > 0)

    def _connect(self) -> bool:
        """Open the connection. False: it is still being opened, and somebody has to look after the queue."""
        if self._opening is None:
            self._opening = Opening(partial(self._greet, self._first_unacknowledged()), self._link.close)
        with self._away():
            over = self._opening.wait(OPENING_POLL_S)
        if not over:
            self._collect()
            return False
        opening, self._opening = self._opening, None
        answer = opening.answer()
        self._connected = True
        self._connections += 1
        self._heed(answer)
        for batch in self._window:
            batch.taken, batch.reference = batch.seq < answer.next_seq, None
        self._hold_until = 0.0
        if self._connections == 1:
            self._on_welcome()
            self.ready.set()
        return True

    def _greet(self, next_seq: int) -> Ack:
        self._greeting = self._hello(next_seq)
        return self._link.open(self._greeting)

    def _first_unacknowledged(self) -> int:
        """Number of the first batch that this rank can still send."""
        spooled = self._spool.first if self._spool is not None else None
        known = [seq for seq in (self._window[0].seq if self._window else None, spooled) if seq is not None]
        return min(known, default=self._next_seq)

    def _heed(self, answer: Ack) -> None:
        self._interval = answer.flush_interval
        self._show(answer.notices)
        self._forget_until(answer.durable)
        for batch in self._window:
            if batch.seq >= answer.next_seq:  # a writer that was restarted does not have it
                batch.taken = False
        if answer.stacks > self._stacks_told:
            self._stacks_told = answer.stacks
            event = self._pulse.stacks()
            with self._moving:  # not through the queue, where a value may wait for a GPU that hangs
                self._take(event)

    @staticmethod
    def _show(notices: list[str]) -> None:
        for notice in notices:
            warn_once(notice, notice)

    def _collect(self) -> None:
        self._take_from_queue()
        while self._unsent_bytes > UNSENT_BYTES:
            self._spill()
        if self._dropped or self._overflowed:
            reason = OVERFLOW if self._overflowed else next(iter(self._dropped))
            warn_once("dropped", f"Events of this rank are dropped: {reason}.")

    def _take_from_queue(self) -> None:
        """Move events out of the training thread's deque."""
        for _ in range(len(self.queue) + 1):
            with self._moving:
                deferred = self._take_encoded()
            if deferred is None:
                return
            ready, event = True, None
            if not self._reading:  # else the flusher stands still at it, and this is not the flusher
                try:
                    with self._away():
                        self._reading = True
                        ready = deferred.ready()
                        event = deferred.encode() if ready else None
                        self._reading = False
                except Exception as error:  # perhaps the GPU has failed; the rank's own error is still to be sent
                    self._reading = False
                    warn_once("unread", f"A value could not be read: {error}")
            if not ready:
                return
            with self._moving:
                if not self.queue or self.queue[0] is not deferred:
                    continue  # the training thread has dropped it, and counted it
                self.queue.popleft()
                if event is None:
                    self._taken += 1
                    self._drop(UNREAD, 1)
                else:
                    self._take(event)

    def _take_encoded(self) -> Deferred | None:
        """Move what is encoded; returns the first that is not, which stays."""
        for _ in range(len(self.queue)):
            try:
                event = self.queue.popleft()
            except IndexError:  # the training thread has just dropped it
                break
            if isinstance(event, Deferred):
                self.queue.appendleft(event)
                return event
            self._count_large(event, -1)
            self._take(event)
        return None

    def _take(self, event: bytes) -> None:
        self._taken += 1
        self._unsent.append(event)
        self._unsent_bytes += len(event)

    def _drop(self, reason: str, events: int) -> None:
        self._dropped[reason] = self._dropped.get(reason, 0) + events

    def _next_batch(self) -> _Batch:
        """The oldest unsent events as a batch, counted as in the window from now on."""
        with self._moving:
            events: list[bytes] = []
            size = 0
            while self._unsent and len(events) < EVENTS_PER_BATCH and size < BATCH_BYTES:
                events.append(self._unsent.popleft())
                size += len(events[-1])
            self._unsent_bytes -= size
            self._in_window += len(events)
            seq, self._next_seq = self._next_seq, self._next_seq + 1
        return _Batch(seq, len(events), encode_batch(events))

    def _spill(self) -> None:
        """Put the oldest unsent events on disk; drop them if there is no room."""
        batch = self._next_batch()
        try:
            self._to_spool(batch)
        except OSError as error:
            self._next_seq -= 1
            with self._moving:
                self._in_window -= batch.events
                self._drop(NO_ROOM, batch.events)
            warn_once("spool", f"What this rank cannot send cannot be put on its disk either: {error}")

    def _to_spool(self, batch: _Batch, held: bool = False) -> None:
        """Append a batch to the spool, and before it those of the window, since it is in order."""
        if self._spool is None:
            # Where the ranks have not agreed on one yet, under an id of its own.
            self._spool = self._make_spool(self._link.run_id or f"unnamed-{self._life}")
        for earlier in self._window:
            if earlier is batch:
                break
            if not earlier.spooled:
                self._put(earlier, held=True)
        self._put(batch, held)

    def _put(self, batch: _Batch, held: bool) -> None:
        assert self._spool is not None
        self._spool.put(batch.seq, batch.events, batch.data, held)
        with self._moving:
            self._spool.events += batch.events
            batch.spooled = True
            self._in_window -= batch.events

    def _fill_window(self) -> None:
        while len(self._window) < WINDOW:
            if self._spool is not None and self._spool.unread:
                try:
                    seq, events, data = self._spool.read()
                except OSError as error:
                    seq, lost = self._spool.give_up_first()
                    events, data = 0, encode_batch([])  # its number is still waited for
                    with self._moving:
                        self._spool.events -= lost
                        self._drop(UNREADABLE, lost)
                    warn_once("spool", f"What this rank had put on its disk cannot be read back: {error}")
                self._window.append(_Batch(seq, events, data, spooled=True))
            elif self._unsent:
                self._window.append(self._next_batch())
            else:
                break
        if time.monotonic() >= self._hold_until:
            for batch in self._window:
                if not batch.taken and batch.reference is None:
                    batch.reference = self._ingest(NumberedBatch(batch.seq, batch.events, batch.data))
                    batch.sent = self._last_sign

    def _read_answers(self, wait: float) -> None:
        for batch in [batch for batch in self._window if batch.reference is not None]:
            with self._away():
                answer = self._link.acknowledged(batch.reference, wait)
            if answer is None:
                if time.monotonic() - batch.sent > CALL_DEADLINE_S:
                    raise LinkBroken(f"The writer has not answered for {CALL_DEADLINE_S:.0f} s.")
                return
            batch.reference = None
            batch.taken = answer.next_seq > batch.seq
            if not batch.taken:
                self._hold_until = time.monotonic() + HOLD_S
            self._heed(answer)

    def _forget_until(self, seq: int) -> None:
        while self._window and self._window[0].seq < seq:
            self._poll = POLL_S
            with self._moving:
                batch = self._window.popleft()
                if not batch.spooled:
                    self._in_window -= batch.events
                elif self._spool is not None:
                    self._spool.events -= batch.events
                self._acknowledged += batch.events
            if batch.spooled and self._spool is not None:
                self._spool.acknowledged(batch.seq + 1)

    def _give_sign(self, now: bool) -> None:
        """Send a sign of life where no batch was sent lately, or ``now`` for the sake of its answer, which says what is
        on disk."""
        if self._sign is not None:
            with self._away():
                answer = self._link.acknowledged(self._sign[0], 0.0)
            if answer is None:
                if time.monotonic() - self._sign[1] > CALL_DEADLINE_S:
                    raise LinkBroken(f"The writer has not answered for {CALL_DEADLINE_S:.0f} s.")
                return
            self._sign = None
            self._heed(answer)
        if now or time.monotonic() - self._last_sign >= BEAT_S:
            self._sign = self._ingest(None), self._last_sign

    def _ingest(self, batch: NumberedBatch | None) -> Any:
        self._last_sign = time.monotonic()
        sign = Sign(self._rank, self._life, self._counted(), self._pulse.doing(), time.time_ns())
        with self._away():
            return self._link.ingest(sign, batch)

    def _counted(self) -> Counted:
        statistics = self.statistics()
        return Counted(statistics.logged, statistics.spooled, statistics.dropped, self._refused)

    def _say_goodbye(self) -> None:
        assert self._goodbye is not None
        self._said_goodbye = True
        goodbye = self._goodbye(self._counted())
        with self._away():
            farewell = self._link.goodbye(goodbye, max(0.5, self._deadline - time.monotonic()))
        self._show(farewell.notices)
        if farewell.last:
            with suppress(LinkBroken):  # everything is said; a restarted writer has no use for this rank
                with self._away():
                    self.outcome = self._link.wait_closed(self._deadline)
                self._show(self.outcome.notices[farewell.told :] if self.outcome else [])

    def _count_stragglers(self) -> None:
        """A thread that was at a call of log() when finish() began may have been overtaken by the goodbye."""
        while self.queue:
            self.put_late(self.queue.popleft())

    def _out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline

    def _put_aside(self) -> None:
        """Put what could not be sent on disk, and count what could not even be put there."""
        spool = self._spool
        if not self.statistics().waiting and (spool is None or spool.closed or not spool.events):
            return
        reason = self.last_error or "no time left"
        for _ in range(COLLECTED_AT_END):
            self._collect()
        try:
            for batch in self._window:
                if not batch.spooled:
                    self._to_spool(batch, held=True)
            while self._unsent:
                self._to_spool(self._next_batch(), held=True)
            if self._spool is not None:
                self._spool.close(*self._beginning_and_end())
        except Exception as error:
            reason = f"{reason}; {error}"
        with self._moving:
            left = self._statistics().waiting
            if left:
                self._drop(UNSENT, left)
            self._taken += len(self.queue)
            self.queue.clear()
            self._unsent.clear()
            self._window.clear()
            self._in_window = 0
        spooled = self._spool.events if self._spool else 0
        if left:
            logger.warning("Lost, since it did not reach the writer: %s of this rank (%s).", _events(left), reason)
        if spooled and self._spool is not None and self._spool.path is not None:
            logger.warning(
                "%s of this rank did not reach the writer (%s). They are kept in %s: %s.",
                _events(spooled),
                reason,
                self._spool.path,
                how_to_upload(self._spool.path, met_a_writer=self._connections > 0),
            )

    def _beginning_and_end(self) -> list[Entry]:
        """For whoever puts spool and journal together: perhaps no writer will ever hear of this rank."""
        # Not while another thread waits for it: so would this one.
        greeting = self._greeting or (self._hello(0) if self._opening is None else None)
        entries: list[Entry] = [arrived(greeting)] if greeting else []
        if self._goodbye is not None:
            said = self._goodbye(self._counted())
            entries.append(
                Ended(
                    rank=said.rank,
                    life=said.life,
                    state=said.state,
                    error=said.error,
                    ended_ns=said.time_ns,
                    counts=counts_of(said.counted),
                )
            )
        return entries

    def _leave(self) -> None:
        try:
            if self._opening is not None:
                self._opening.abandon()
            else:
                self._link.close()
        except Exception as error:
            self.last_error = str(error)


def _events(count: int) -> str:
    return f"{count} event{'s' * (count != 1)}"
